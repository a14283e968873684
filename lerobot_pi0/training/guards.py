"""Guards against NaN and infinity in training: a run stops before an optimizer step would put them into the weights.

LeRobot calls the optimizer's step before a policy can look at the gradients. So a hook checks them, which torch calls
before the step of any optimizer. At this point gradients are already averaged over all processes (multi-GPU), so all
processes stop.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook


class DivergedError(FloatingPointError):
    """A loss or a gradient is not finite. The weights are still those from before the step."""


class Guards:
    """Checks the losses of a network, and its gradients before an optimizer uses them."""

    def __init__(self, check_optimizer: Callable[[Optimizer], None]) -> None:
        """Make guards that have not seen a loss yet.

        Args:
            check_optimizer: called before each step of an optimizer that holds weights of the network.
        """
        self._check_optimizer = check_optimizer
        self._expects_gradients = False
        self._index: Any = None
        self._keys = ""
        self.stepped = False  # an optimizer has stepped since `PI0Policy.update` was called last

    def check_loss(self, network: nn.Module, loss: float, per_sample_B: Tensor, batch: Mapping[str, Any]) -> None:
        """Check a loss, and from now on the gradients of `network`.

        Raises:
            DivergedError: the loss is not finite; the message names the samples, and the values of the batch that
                cause it.
        """
        _guards_by_network()[network] = self  # here and not in __init__, because a policy may be a copy of another
        self._expects_gradients = per_sample_B.requires_grad
        self._index, self._keys = batch.get("index"), ", ".join(batch)
        if math.isfinite(loss):
            return
        broken = [key for key, x in batch.items() if isinstance(x, Tensor) and not bool(x.isfinite().all())]
        cause = (
            f"{', '.join(broken)} of the batch hold NaN or infinity: repair these frames, or leave their episodes out"
            if broken
            else f"all values of the batch ({self._keys}) are finite, so the weights are not: lower the learning rate"
        )
        bad = (~per_sample_B.isfinite()).nonzero().flatten().tolist()
        raise DivergedError(f"the loss of {self._samples(bad)} is not finite, and the step is not taken; {cause}")

    def check_gradients(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Check the gradients that `optimizer` is about to use.

        Raises:
            DivergedError: a gradient of the network is not finite; the message names the samples of the batch.
        """
        if not self._expects_gradients:
            return
        own = {id(p) for p in network.parameters()}
        trained = [p for group in optimizer.param_groups for p in group["params"] if id(p) in own]
        if trained:
            self._check_optimizer(optimizer)
        grads = [p.grad for p in trained if p.grad is not None]
        self._expects_gradients = not trained
        # One pass over all gradients, and one synchronisation with the device.
        if grads and not bool(torch.nn.utils.get_total_norm(grads, float("inf")).isfinite()):
            raise DivergedError(
                f"a gradient of {self._samples()} is not finite, and the step is not taken: look at these frames "
                f"({self._keys}), lower the learning rate, or train with dtype=float32"
            )
        self.stepped = bool(trained)

    def _samples(self, rows: Sequence[int] | None = None) -> str:
        """Which samples these rows of the last batch are; by default all of them."""
        if self._index is None:
            return "a batch without 'index'" if rows is None else f"the batch's rows {rows}"
        index = torch.as_tensor(self._index).reshape(-1).tolist()
        return f"the dataset's samples {index if rows is None else [index[row] for row in rows]}"


@cache
def _guards_by_network() -> "WeakKeyDictionary[nn.Module, Guards]":
    """The guards of each network that has computed a loss; the first call registers torch's hook in this process."""
    guarded: WeakKeyDictionary[nn.Module, Guards] = WeakKeyDictionary()

    def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for network, guards in list(guarded.items()):
            guards.check_gradients(network, optimizer)

    register_optimizer_step_pre_hook(before_step)
    return guarded
