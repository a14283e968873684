"""ODE solvers for flow matching: from noise at t = 1 to actions at t = 0, as pure functions of tensors.

Axes: B batch, K flow samples of one observation, T steps of a chunk, A action dim.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_BKTA, time, time_embedding) -> v of x's shape. Times are float32 and broadcast against (B, K, T)."""

Embed = Callable[[Tensor], Tensor]
"""The embedding of times: (*, T) -> (*, T, W)."""


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method as its Butcher tableau: times within a step, stages, and weights of the slopes."""

    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


FIXED = {
    "euler": Tableau((0.0,), ((),), (1.0,)),
    "midpoint": Tableau((0.0, 0.5), ((), (0.5,)), (0.0, 1.0)),
    "heun": Tableau((0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
}
"""Solvers with equal steps."""


def fixed_times(solver: str, steps: int, device: torch.device) -> Tensor:
    """Times at which `solver` evaluates the velocity, in order: float32 (steps · stages,)."""
    step = torch.arange(steps, dtype=torch.float32, device=device)
    stages = [1.0 - (step + node) / steps for node in FIXED[solver].nodes]  # floats: no copy to the GPU, no wait
    return torch.stack(stages, dim=1).flatten()


def integrate(
    velocity: Velocity,
    embed: Embed,
    noise_BKTA: Tensor,
    solver: str = "euler",
    steps: int = 10,
    tolerance: float = 1e-2,
    dims: int | None = None,
) -> Tensor:
    """Integrate dx/dt = v from t = 1 to t = 0; the sum is float32.

    Args:
        solver: one of `FIXED`, whose times are embedded in one call, or "adaptive".
        steps: number of steps of a fixed solver, largest number of steps of the adaptive one.
        tolerance, dims: only for the adaptive solver, see `_adaptive`.

    Raises:
        ValueError: fewer than one step, which would return the noise as actions.
    """
    if steps < 1:
        raise ValueError(f"num_inference_steps={steps} must be at least 1")
    x = noise_BKTA.float()
    if solver == "adaptive":
        return _adaptive(velocity, embed, x, steps, tolerance, dims)
    method, times = FIXED[solver], fixed_times(solver, steps, x.device)[:, None, None, None]
    moments: Iterator[tuple[Tensor, Tensor]] = zip(times, embed(times), strict=True)
    for _ in range(steps):
        slopes: list[Tensor] = []
        for row in method.stages:
            slopes.append(velocity(x - _weighted_sum(row, slopes) / steps, *next(moments)).float())
        x = x - _weighted_sum(method.weights, slopes) / steps
    return x


def _weighted_sum(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor | float:
    return sum((w * k for w, k in zip(weights, slopes, strict=True) if w), start=0.0)


def _adaptive(velocity: Velocity, embed: Embed, x: Tensor, steps: int, tolerance: float, dims: int | None) -> Tensor:
    """Bogacki and Shampine's method of third order, with its second-order one to control the step.

    Each observation has its own step sizes, so that its chunk does not depend on the others in the batch; those that
    reach t = 0 first wait for the others. There are at most `steps` steps, each with three evaluations, and one before
    the first. A step is never shorter than the remaining time divided by the remaining steps, and a step of that length
    is always accepted. After each step the host waits for the GPU, to check whether all have reached t = 0.

    Args:
        tolerance: root mean square of a step's error, over the first `dims` dims of the chunk.
    """
    t = x.new_ones(len(x), 1, 1)
    h = t / steps
    k1 = velocity(x, t, embed(t)).float()
    for left in range(steps, 0, -1):
        shortest = t / left
        h = torch.minimum(h, t).maximum(shortest)
        h_ = h[..., None]
        middle, late, end = (t - c * h for c in (0.5, 0.75, 1.0))
        k2 = velocity(x - h_ * (0.5 * k1), middle, embed(middle)).float()
        k3 = velocity(x - h_ * (0.75 * k2), late, embed(late)).float()
        ahead = x - h_ * (2 * k1 + 3 * k2 + 4 * k3) / 9
        k4 = velocity(ahead, end, embed(end)).float()
        gap = h_ * (-5 * k1 + 6 * k2 + 8 * k3 - 9 * k4) / 72
        error = gap[..., :dims].square().mean(dim=(1, 2, 3)).sqrt()[:, None, None] / tolerance
        good = ~(error > 1) | (h <= shortest)  # NaN is accepted here; the check of the finished chunk reports it
        t = torch.where(good, end, t)
        x, k1 = (torch.where(good[..., None], new, old) for new, old in ((ahead, x), (k4, k1)))
        h = h * (0.9 * error.clamp(min=1e-6) ** (-1 / 3)).clamp(0.2, 5.0)
        if not (t > 0).any():
            break
    return x
