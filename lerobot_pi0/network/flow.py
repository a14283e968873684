"""Flow matching: the path between noise and data, and its random draws, as pure functions of tensors.

Here t = 1 is noise and t = 0 is data, as in openpi and LeRobot: the reverse of the paper's τ (τ = 1 - t).

    x_t = t·ε + (1 - t)·a          u = dx_t/dt = ε - a          loss = mean ‖v(x_t, t) - u‖²

Axes: B batch, K flow samples of one observation, T steps of a chunk, A action dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class BetaTime(NamedTuple):
    """Times t ~ offset + scale·Beta(alpha, beta), denser near the noise than near the data (paper, appendix B)."""

    alpha: float = 1.5
    beta: float = 1.0
    scale: float = 0.999
    offset: float = 0.001

    def sample(self, shape: Sequence[int], device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Random times of this shape, float32."""
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


def interpolate(actions: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """The point x_t between data and noise, and the velocity u there. `time` broadcasts against both."""
    return time * noise + (1 - time) * actions, noise - actions
