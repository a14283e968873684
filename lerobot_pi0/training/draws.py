"""Random draws of training that can be repeated: noise, times and delays as functions of seed, update and sample.

Axes: B batch, K flow samples of one observation, T steps of a chunk, A action dim.
"""

from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

from ..network import flow


def generator_of(*key: object) -> torch.Generator:
    """A generator on the CPU whose draws depend on the key alone."""
    seed = xxhash.xxh3_64_intdigest(" ".join(map(str, key)).encode())
    return torch.Generator().manual_seed(seed & (2**63 - 1))


def repeatable_draws(
    seed: int, update: int, samples: Sequence[int], shape_KTA: Sequence[int], time: flow.BetaTime, max_delay: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise (B, K, T, A), time (B, K) and delay (B, K) that depend on seed, update and sample alone; on the CPU.

    So a run that is resumed, or uses several processes (multi-GPU), has the same draws as one uninterrupted process.

    Args:
        samples: a number per observation, such as its index in the dataset.
        max_delay: largest delay, see `sample_delay`.
    """
    noise, times, delays = [], [], []
    for sample in samples:
        generator = generator_of(seed, update, sample)
        times.append(time.sample(shape_KTA[:1], torch.device("cpu"), generator))
        noise.append(flow.sample_noise(shape_KTA, torch.device("cpu"), generator))
        delays.append(sample_delay(shape_KTA[:1], max_delay, torch.device("cpu"), generator))
    return torch.stack(noise), torch.stack(times), torch.stack(delays)


def sample_delay(
    shape: Sequence[int], most: int, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """How many actions at the start of a chunk are known, uniform over 0 … `most` (arXiv 2512.05964, section III)."""
    if most == 0:
        return torch.zeros(tuple(shape), dtype=torch.long, device=device)
    return torch.randint(most + 1, tuple(shape), device=device, generator=generator)


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy float32 or small-integer tensors from the CPU to a device; to a GPU in one asynchronous copy."""
    if device.type != "cuda":
        return [x.to(device) for x in tensors]
    flat = torch.cat([x.reshape(-1).float() for x in tensors])
    flat = flat.pin_memory() if torch.cuda.is_available() else flat
    parts = flat.to(device, non_blocking=True).split([x.numel() for x in tensors])
    return [part.view(x.shape).to(x.dtype) for part, x in zip(parts, tensors, strict=True)]
