"""Muon for the matrices of the layers and AdamW for all other weights, as one optimizer that LeRobot can save.

    update = momentum, with all its singular values set to about 1      (Jordan et al. 2024, "Muon")

AdamW scales each number by itself, so the few directions in which all gradients of a matrix agree take most of a step.
Muon gives all directions of a matrix the same length. A small network that learns from random weights needs fewer
steps (docs/metaworld.md). Steps are as long as AdamW's usual ones, so a learning rate serves both (arXiv 2502.16982).

torch's own Muon (from 2.9) orthogonalises one matrix after the other, in bfloat16, which many CPUs multiply slowly.
Here all matrices of one shape are one product, in bfloat16 where that is fast.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the polynomial a·s + b·s³ + c·s⁵ that moves each singular value s towards 1: Jordan's, and torch's defaults."""
ITERATIONS = 5
LENGTH = 0.2
"""Root mean square of AdamW's usual update, divided by the learning rate (arXiv 2502.16982, section 2.2)."""


def orthogonalise(x_NRC: Tensor) -> Tensor:
    """Matrices with the singular vectors of N matrices (R, C), R ≤ C, and singular values between 0.5 and 1.5.

    Newton-Schulz's iteration: five applications of an odd polynomial, which needs products of matrices alone.
    """
    from ..kernels import cpu_linear  # with all kernels: not while LeRobot only looks for optimizers by their names

    (a, b, c), device = COEFFICIENTS, x_NRC.device.type
    is_fast = device == "cuda" or (device == "cpu" and not cpu_linear.BFLOAT16_IS_SLOW)
    x = x_NRC.bfloat16() if is_fast else x_NRC.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above 1 then
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(x_NRC.dtype)


class Muon(Optimizer):
    """Momentum whose singular values are equal, for matrices.

    Args:
        params: matrices.
        lr: a step has a root mean square of `LENGTH` times this.
        weight_decay: decoupled, as AdamW's.
    """

    def __init__(self, params: Sequence[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": MOMENTUM})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            alike: dict[tuple, list[nn.Parameter]] = defaultdict(list)  # matrices of one shape, lying or standing
            for p in group["params"]:
                if p.grad is not None:
                    alike[(*sorted(p.shape), p.dtype, p.device)].append(p)
            for matrices in alike.values():
                self._step(matrices, **{name: group[name] for name in ("lr", "weight_decay", "momentum")})

    def _step(self, matrices: list[nn.Parameter], lr: float, weight_decay: float, momentum: float) -> None:
        gradients = [p.grad for p in matrices if p.grad is not None]
        for p in matrices:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers, weights = [self.state[p]["momentum_buffer"] for p in matrices], [p.data for p in matrices]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, buffers, momentum)  # Nesterov's: one step further than the momentum
        stands = [len(x) > x.shape[1] for x in ahead]
        stacked = torch.stack([x.mT if is_standing else x for x, is_standing in zip(ahead, stands, strict=True)])
        updates = zip(orthogonalise(stacked), stands, strict=True)
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
        length = LENGTH * max(matrices[0].shape) ** 0.5
        torch._foreach_add_(weights, [x.mT if is_standing else x for x, is_standing in updates], alpha=-lr * length)


class MuonAdamW(Optimizer):
    """Muon and torch's AdamW; groups of parameters and state are those of both.

    Args:
        matrices: for Muon.
        others: for AdamW.
        lr, weight_decay: of both.
        adamw: further options of AdamW.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        others: Sequence[nn.Parameter],
        lr: float,
        weight_decay: float,
        **adamw: Any,
    ) -> None:
        self._parts: list[Optimizer] = []
        if matrices:
            self._parts.append(Muon(matrices, lr, weight_decay))
        if others:
            self._parts.append(AdamW(others, lr, weight_decay=weight_decay, **adamw))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the parts work on the groups and the state of this optimizer, which others read, change and replace."""
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was loaded; torch calls this at the end of `load_state_dict`."""
        super().__setstate__(state)
        self._share()

    def step(self, closure: Any = None) -> Any:
        """One step of both."""
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss
