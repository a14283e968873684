"""Angles of the time embedding: products of times and frequencies, up to 250 turns, exact enough for float32 sines.

openpi computes them in float64, and so does `PI0` on a CPU. Some devices have no float64 (Apple's), and on others it is
slow. For these, times and frequencies are split into parts of 12 bits. The product of two parts is exact in float32.
Whole turns are subtracted from each product, and the remainders are small enough to be added in float32.

Axes: W width of the action expert.
"""

import math

import torch
from torch import Tensor

PART_BITS = 12


def periods(width: int, least: float, most: float, device: torch.device) -> Tensor:
    """W/2 periods from `least` to `most`, float64; the ratio of neighbours is constant."""
    fraction = torch.linspace(0, 1, width // 2, dtype=torch.float64, device=device)
    return least * (most / least) ** fraction


def frequency_parts(width: int, least: float, most: float) -> Tensor:
    """Each frequency as a sum of three float32 numbers, (3, W/2) on the CPU: the first two have 12 bits each."""
    rest, parts = 1 / periods(width, least, most, torch.device("cpu")), []
    for _ in range(2):
        mantissa, exponent = torch.frexp(rest)
        parts.append(torch.ldexp((mantissa * 2**PART_BITS).round(), exponent - PART_BITS))
        rest = rest - parts[-1]
    return torch.stack([*parts, rest]).float()


def angles(time: Tensor, parts_3F: Tensor) -> Tensor:
    """2π · time · frequency without whole turns, float32 (*, W/2), within 1e-6 of the exact angle.

    Args:
        time: float32 in [0, 1].
        parts_3F: `frequency_parts`, on the device of `time`.
    """
    time = time[..., None]
    shifted = time * (2**PART_BITS + 1)
    high = shifted - (shifted - time)
    low = time - high
    first, second, third = parts_3F
    turns = time * third + low * second
    for product in (low * first, high * second, high * first):
        turns = turns + (product - product.round())
    return 2 * math.pi * (turns - turns.round())
