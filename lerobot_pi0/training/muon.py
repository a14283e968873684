"""Muon for the matrices of the layers and AdamW for all other weights, as one optimizer that LeRobot can save.

    update = momentum, with all its singular values set to about 1      (Jordan et al. 2024, "Muon")

AdamW scales each number by itself, so the few directions in which all gradients of a matrix agree take most of a step.
Muon gives all directions of a matrix the same length. A small network that learns from random weights needs about half
the steps (docs/metaworld.md). Steps have AdamW's usual length, so a learning rate serves both (arXiv 2502.16982).

Importing this module needs torch 2.9.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """torch's Muon and torch's AdamW; groups of parameters and state are those of both.

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
            self._parts.append(Muon(matrices, lr, weight_decay, adjust_lr_fn="match_rms_adamw"))
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
