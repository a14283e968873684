"""Real-time chunking as a wrapper around `velocity`: a chunk that continues the one being executed.

While a chunk is computed, the robot goes on with the old one, and what is left of that (`left over`) is known. The
first `delay` of these actions will have been executed when the new chunk is there; up to the horizon the new chunk is
drawn towards them, ever less. Three ways (arXiv 2506.07339; 2512.05964), where this package's
t is the papers' 1 - τ:

    x̂ = x - t·v(x, t)                      the chunk that x will become, as the network sees it now
    e = W·(left over - x̂)                  W: 1 on the delay, falling to 0 at the horizon

    vjp         v ← v - g(t)·(∂x̂/∂x)ᵀe      the paper's; costs a pass backwards through the action expert
    identity    v ← v - g(t)·e             LeRobot's, in effect: it takes the Jacobian for the identity
    trained     v ← 0 on the delay         x starts with the left over there, and these tokens are told t = 0

Axes: B batch (1 where all are alike), K = 1, T steps of a chunk, A action dim.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class Guide(NamedTuple):
    """What a chunk is drawn to, or begins with."""

    mode: str
    actions_BKTA: Tensor  # what is left over, zero-padded
    weights_BKTA: Tensor  # how much each number counts; 0 or 1 in mode "trained"
    most: float  # upper bound of g(t)


def prefix_weights(schedule: str, delay: int, end_B1: Tensor, steps: int) -> Tensor:
    """Weights (B, T): 1 up to the delay, 0 from `end` on, between them what RTCConfig's schedule says.

    For a delay of 2 and an end of 5:

        ZEROS   1  1  0    0    0    0
        ONES    1  1  1    1    1    0
        LINEAR  1  1  3/4  1/2  1/4  0
        EXP     as LINEAR, each w times (eʷ - 1) / (e - 1)

    Raises:
        ValueError: no such schedule.
    """
    i = torch.arange(steps, device=end_B1.device)
    start = end_B1.clamp(max=max(delay, 0))
    if schedule == "ZEROS":
        return (i < start).float()
    if schedule == "ONES":
        return (i < end_B1).float()
    if schedule not in ("LINEAR", "EXP"):
        raise ValueError(f"prefix_attention_schedule={schedule!r} is not one of ZEROS, ONES, LINEAR, EXP")
    ramp = (end_B1 - i) / (end_B1 - start + 1)
    if schedule == "EXP":
        ramp = ramp * torch.expm1(ramp) / (math.e - 1)
    return torch.where(i < start, 1.0, torch.where(i < end_B1, ramp, 0.0))


def strength(time: Tensor, most: float) -> Tensor:
    """g(t) = (t² + (1 - t)²) / (t·(1 - t)), at most `most`: the paper's guidance weight, clipped."""
    other = 1 - time
    return ((time**2 + other**2) / (time * other)).clamp(max=most)


def make_guide(
    mode: str,
    left_over: Tensor | None,
    delay: int,
    horizon: int,
    noise_BKTA: Tensor,
    schedule: str = "LINEAR",
    most: float = 10.0,
) -> Guide | None:
    """The guide of one chunk; None where nothing is left over to guide it.

    Rows of zeros at the end of `left_over` are padding (LeRobot pads to a fixed length) and do not count: zero is the
    mean action. Only mode "trained" has a guide without anything left over, which gives nothing: it tells each
    token its own time, and a compiled network is to see the same shapes in each chunk.

    Args:
        left_over: normalised actions, (T', A') or (B, T', A'), of any length; None in the first chunk.
        delay: actions that will have been executed by the time the chunk is there.
        horizon: actions after which the new chunk is free.

    Raises:
        ValueError: `left_over` has another shape, or more dims than the chunk.
    """
    steps, dims = noise_BKTA.shape[-2:]
    if left_over is None or left_over.numel() == 0:
        if mode != "trained":
            return None
        left_over = noise_BKTA.new_zeros(1, 1, dims)
    left = left_over[None] if left_over.ndim == 2 else left_over
    if left.ndim != 3 or left.shape[-1] > dims or len(left) not in (1, len(noise_BKTA)):
        raise ValueError(
            f"prev_chunk_left_over has shape {tuple(left_over.shape)}, expected (steps, dims) or "
            f"({len(noise_BKTA)}, steps, dims) with at most {dims} dims"
        )
    given_dims = left.shape[-1]
    left = left[:, :steps].to(noise_BKTA.device, torch.float32)
    left = F.pad(left, (0, dims - given_dims, 0, steps - left.shape[1]))
    rows = left.ne(0).any(dim=-1) * torch.arange(1, steps + 1, device=left.device)
    end = rows.amax(dim=1, keepdim=True)
    if mode == "trained":
        weights = prefix_weights("ZEROS", delay, end, steps)[..., None]
    else:
        weights = prefix_weights(schedule, delay, end.clamp(max=horizon), steps)[..., None]
    if mode == "vjp":  # the network's answer to dims that the robot lacks is not trained: no error of theirs
        weights = F.pad(weights.expand(-1, -1, given_dims), (0, dims - given_dims))
    return Guide(mode, left[:, None], weights[:, None], most)


def begin(noise_BKTA: Tensor, guide: Guide | None) -> Tensor:
    """Where the integration starts: noise, after what is given."""
    if guide is None or guide.mode != "trained":
        return noise_BKTA
    return torch.where(guide.weights_BKTA > 0, guide.actions_BKTA, noise_BKTA)


def token_times(time: Tensor, guide: Guide | None) -> Tensor:
    """The times that the tokens are told: 0 where their actions are given."""
    if guide is None or guide.mode != "trained":
        return time
    return torch.where(guide.weights_BKTA[..., 0] > 0, 0.0, time)


def guided(velocity: Callable[[Tensor], Tensor], x_BKTA: Tensor, time: Tensor, guide: Guide) -> Tensor:
    """The velocity at x, guided; works without autograd being on.

    Args:
        velocity: of x alone, at `time`, which broadcasts against (B, K, T).
    """
    mode, actions, weights, most = guide
    if mode == "trained":
        return torch.where(weights > 0, 0.0, velocity(x_BKTA))
    t = time[..., None]
    if mode == "identity":
        v = velocity(x_BKTA)
        return v - strength(t, most) * weights * (actions - (x_BKTA - t * v))
    v, pull_back = torch.func.vjp(velocity, x_BKTA)[:2]
    error = weights * (actions - (x_BKTA - t * v))
    return v - strength(t, most) * (error - t * pull_back(error)[0])
