"""Flow matching, as pure functions of tensors.

Here t = 1 is noise and t = 0 is data, as in openpi and LeRobot: the reverse of the paper's τ (τ = 1 - t).

    x_t = t·ε + (1 - t)·a          u = dx_t/dt = ε - a          loss = mean ‖v(x_t, t) - u‖²

Axes: B batch, K flow samples of one observation, T steps of a chunk, A action dim.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TIME_SCALE = 0.999
TIME_OFFSET = 0.001


def sample_noise(shape: Sequence[int], device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """ε: standard normal, float32."""
    return torch.randn(tuple(shape), device=device, generator=generator)


def sample_time(
    shape: Sequence[int],
    device: torch.device,
    alpha: float = 1.5,
    beta: float = 1.0,
    scale: float = TIME_SCALE,
    offset: float = TIME_OFFSET,
    generator: torch.Generator | None = None,
) -> Tensor:
    """t ~ offset + scale·Beta(alpha, beta), float32: more often near the noise than near the data (paper, B)."""
    if beta == 1.0:  # Beta(α, 1) has the distribution function x^α
        draw = torch.rand(tuple(shape), device=device, generator=generator) ** (1 / alpha)
    else:
        gamma = [
            torch._standard_gamma(torch.full(tuple(shape), float(c), device=device), generator=generator)
            for c in (alpha, beta)
        ]
        draw = gamma[0] / (gamma[0] + gamma[1])
    return offset + scale * draw


def interpolate(actions: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """The point x_t between data and noise, and the velocity u there. `time` broadcasts against both."""
    return time * noise + (1 - time) * actions, noise - actions


def euler_times(steps: int, device: torch.device) -> Tensor:
    """Times of the Euler steps from noise to data: 1, 1 - 1/N, ..., 1/N; float32 (N,)."""
    return 1.0 - torch.arange(steps, dtype=torch.float32, device=device) / steps


def euler(velocity: Callable[[Tensor, int], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Integrate dx/dt = v from t = 1 to t = 0 in equal steps; the sum is float32.

    Args:
        velocity: (x_t, index of the step in `euler_times`) -> v, of x_t's shape.
    """
    x = noise.float()
    for i in range(steps):
        x = x - velocity(x, i).float() / steps
    return x
