"""Flow matching, as pure functions of tensors.

Here t = 1 is noise and t = 0 is data, as in openpi and LeRobot: the reverse of the paper's τ (τ = 1 - t).

    x_t = t·ε + (1 - t)·a          u = dx_t/dt = ε - a          loss = mean ‖v(x_t, t) - u‖²

Axes: B batch, K flow samples of one observation, T steps of a chunk, A action dim.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor


class BetaTime(NamedTuple):
    """t ~ offset + scale·Beta(alpha, beta): more often near the noise than near the data (paper, appendix B)."""

    alpha: float = 1.5
    beta: float = 1.0
    scale: float = 0.999
    offset: float = 0.001

    def sample(self, shape: Sequence[int], device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Times, float32."""
        if self.beta == 1.0:  # Beta(α, 1) has the distribution function x^α
            draw = torch.rand(tuple(shape), device=device, generator=generator) ** (1 / self.alpha)
        else:
            shapes = (torch.full(tuple(shape), float(c), device=device) for c in (self.alpha, self.beta))
            first, second = (torch._standard_gamma(c, generator=generator) for c in shapes)
            draw = first / (first + second)
        return self.offset + self.scale * draw


def sample_noise(shape: Sequence[int], device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """ε: standard normal, float32."""
    return torch.randn(tuple(shape), device=device, generator=generator)


def generator_of(*key: object) -> torch.Generator:
    """A generator on the CPU whose draws depend on nothing but the key."""
    seed = xxhash.xxh3_64_intdigest(" ".join(map(str, key)).encode())
    return torch.Generator().manual_seed(seed & (2**63 - 1))


def repeatable_draws(
    seed: int, update: int, samples: Sequence[int], shape_KTA: Sequence[int], time: BetaTime
) -> tuple[Tensor, Tensor]:
    """Noise (B, K, T, A) and time (B, K) that depend on nothing but seed, update and sample; on the CPU.

    A run that is resumed, or split over processes, so draws what the uninterrupted, single one would.

    Args:
        samples: a number per observation, such as its index in the dataset.
    """
    noise, times = [], []
    for sample in samples:
        generator = generator_of(seed, update, sample)
        times.append(time.sample(shape_KTA[:1], torch.device("cpu"), generator))
        noise.append(sample_noise(shape_KTA, torch.device("cpu"), generator))
    return torch.stack(noise), torch.stack(times)


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
