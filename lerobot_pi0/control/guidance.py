"""Real-time chunking (RTC) as a wrapper around `velocity`: a chunk that continues the one being executed.

While a chunk is computed, the robot continues with the old one. The rest of the old chunk (`left_over`) is known, and
its first `delay` actions will have been executed when the new chunk is ready. From there to the horizon, the new chunk
is guided towards the rest with falling weights. There are three modes (arXiv 2506.07339; 2512.05964); the papers' τ is
1 - t here:

    x̂ = x - t·v(x, t)                      the final chunk, as predicted from x
    e = W·(left_over - x̂)                  W: 1 on the delay, falling to 0 at the horizon

    vjp         v ← v - g(t)·(∂x̂/∂x)ᵀe      the paper's mode; needs a backward pass through the action expert
    identity    v ← v - g(t)·e             what LeRobot computes: the identity in place of the Jacobian
    trained     v ← 0 on the delay         x begins with `left_over` there, and these tokens get t = 0

Axes: B batch (1 if all rows are equal), K = 1, T steps of a chunk, A action dim.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class Guide(NamedTuple):
    """What a chunk is guided towards; in mode "trained", what it begins with."""

    mode: str
    actions_BKTA: Tensor  # the rest of the old chunk, zero-padded
    weights_BKTA: Tensor  # W; 0 or 1 in mode "trained"
    most: float  # upper bound of g(t)


def prefix_weights(schedule: str, delay: int, end_B1: Tensor, steps: int) -> Tensor:
    """Weights (B, T): 1 up to the delay, 0 from `end` on, and between them as RTCConfig's schedule says.

    They are the weights of LeRobot's `RTCProcessor.get_prefix_weights`, for a batch whose `end` stays on the device.

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
    """The guide of one chunk; None if there is no old chunk, or nothing left of it.

    Rows of zeros at the end of `left_over` are ignored: LeRobot pads to a fixed length, and zero is the mean action.
    Mode "trained" always has a guide, with weights of zero if nothing is left: in this mode each token has its own
    time, and a compiled network has to see the same shapes in each chunk.

    Args:
        left_over: normalised actions, (T', A') or (B, T', A'), of any length; None in the first chunk.
        delay: actions that will have been executed when the chunk is ready.
        horizon: number of actions after which the new chunk is not guided.

    Raises:
        ValueError: `left_over` has another shape, or more dims than the chunk.
    """
    steps, dims = noise_BKTA.shape[-2:]
    if left_over is None or left_over.numel() == 0:
        if mode != "trained":
            return None
        left_over = noise_BKTA.new_zeros(1, 1, dims)
    given_dims, left = left_over.shape[-1], _padded(left_over, noise_BKTA)
    rows = left.ne(0).any(dim=-1) * torch.arange(1, steps + 1, device=left.device)
    end = rows.amax(dim=1, keepdim=True)
    if mode == "trained":
        weights = prefix_weights("ZEROS", delay, end, steps)[..., None]
    else:
        weights = prefix_weights(schedule, delay, end.clamp(max=horizon), steps)[..., None]
    if mode == "vjp":  # the network's output in dims that the robot lacks is not trained, so their error means nothing
        weights = F.pad(weights.expand(-1, -1, given_dims), (0, dims - given_dims))
    return Guide(mode, left[:, None], weights[:, None], most)


def _padded(left_over: Tensor, noise_BKTA: Tensor) -> Tensor:
    """`left_over` as float32 (B or 1, T, A); a ValueError if its shape does not fit the noise."""
    steps, dims = noise_BKTA.shape[-2:]
    left = left_over[None] if left_over.ndim == 2 else left_over
    if left.ndim != 3 or left.shape[-1] > dims or len(left) not in (1, len(noise_BKTA)):
        raise ValueError(
            f"prev_chunk_left_over has shape {tuple(left_over.shape)}, expected (steps, dims) or "
            f"({len(noise_BKTA)}, steps, dims) with at most {dims} dims"
        )
    left = left[:, :steps].to(noise_BKTA.device, torch.float32)
    return F.pad(left, (0, dims - left.shape[-1], 0, steps - left.shape[1]))


def begin(noise_BKTA: Tensor, guide: Guide | None) -> Tensor:
    """The tensor from which the integration starts: noise; in mode "trained", the known actions followed by noise."""
    if guide is None or guide.mode != "trained":
        return noise_BKTA
    return torch.where(guide.weights_BKTA > 0, guide.actions_BKTA, noise_BKTA)


def token_times(time: Tensor, guide: Guide | None) -> Tensor:
    """The time of each action token: 0 where its action is known."""
    if guide is None or guide.mode != "trained":
        return time
    return torch.where(guide.weights_BKTA[..., 0] > 0, 0.0, time)


def guided(
    velocity: Callable[[Tensor], Tensor],
    x_BKTA: Tensor,
    time: Tensor,
    guide: Guide,
    record: Callable[..., None] | None = None,
) -> Tensor:
    """The guided velocity at x; autograd need not be enabled.

    Args:
        velocity: the velocity at `time` as a function of x.
        time: broadcasts against (B, K, T).
        record: called with x̂, the error and the correction, under LeRobot's names; not in mode "trained".
    """
    mode, actions, weights, most = guide
    if mode == "trained":
        return torch.where(weights > 0, 0.0, velocity(x_BKTA))
    t = time[..., None]
    if mode == "identity":
        v = velocity(x_BKTA)
        if record is not None:
            error = weights * (actions - (x_BKTA - t * v))
            record(time, **_debug(x_BKTA - t * v, error, error, guide, t))
        return v - strength(t, most) * weights * (actions - (x_BKTA - t * v))
    v, pull_back = torch.func.vjp(velocity, x_BKTA)[:2]
    error = weights * (actions - (x_BKTA - t * v))
    correction = error - t * pull_back(error)[0]
    if record is not None:
        record(time, **_debug(x_BKTA - t * v, error, correction, guide, t))
    return v - strength(t, most) * correction


def _debug(final: Tensor, error: Tensor, correction: Tensor, guide: Guide, t: Tensor) -> dict[str, Tensor]:
    weight = strength(t, guide.most).flatten()[0]
    found = {"x1_t": final, "err": error, "correction": correction, "weights": guide.weights_BKTA}
    return found | {"guidance_weight": weight}
