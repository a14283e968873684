"""Numbers that can be trusted: what is not finite stops a run before the weights take it, and held-out errors.

Axes: B batch, T steps of a chunk, A dims of the robot's actions.
"""

import logging
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

logger = logging.getLogger(__name__)


class DivergedError(FloatingPointError):
    """A loss or a gradient that is not finite. The weights are those before the step."""


class Watch:
    """Looks at the losses of a policy, and at its gradients before an optimizer takes them.

    LeRobot steps the optimizer before it lets a policy see the gradients, so they are looked at in a hook that torch
    calls before any optimizer's step: after gradients are reduced over processes, so that all of them stop.
    """

    def __init__(
        self, parameters: Callable[[], Iterable[nn.Parameter]], check_optimizer: Callable[[Optimizer], None]
    ) -> None:
        """
        Args:
            parameters: the policy's.
            check_optimizer: called before each step of an optimizer that has some of them.
        """
        self._parameters, self._check_optimizer = parameters, check_optimizer
        self._waits = False  # for the gradients of a loss
        self._index: Any = None
        self._keys = ""
        self.stepped = False  # the policy's weights, since it was last told of it (`PI0Policy.update`)

    def check_loss(self, loss: float, per_sample_B: Tensor, batch: Mapping[str, Any]) -> None:
        """
        Raises:
            DivergedError: the loss is not finite; says for which samples, and which of their values are to blame.
        """
        _watches.add(self)  # here, as a policy may be a copy
        self._waits, self._index, self._keys = per_sample_B.requires_grad, batch.get("index"), ", ".join(batch)
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

    def check_gradients(self, optimizer: Optimizer) -> None:
        """
        Raises:
            DivergedError: one of the policy's gradients is not finite; says which batch they come from.
        """
        if not self._waits:
            return
        own = {id(p) for p in self._parameters()}
        trained = [p for group in optimizer.param_groups for p in group["params"] if id(p) in own]
        if trained:
            self._check_optimizer(optimizer)
        grads = [p.grad for p in trained if p.grad is not None]
        self._waits = not trained
        # One pass and one synchronisation with the host for all of them.
        if grads and not bool(torch.nn.utils.get_total_norm(grads, float("inf")).isfinite()):
            raise DivergedError(
                f"a gradient of {self._samples()} is not finite, and the step is not taken: look at these frames "
                f"({self._keys}), lower the learning rate, or train with dtype=float32"
            )
        self.stepped = bool(trained)

    def _samples(self, rows: Sequence[int] | None = None) -> str:
        """Which samples these rows of the last batch are, all of them by default."""
        if self._index is None:
            return "a batch without 'index'" if rows is None else f"the batch's rows {rows}"
        index = torch.as_tensor(self._index).reshape(-1).tolist()
        return f"the dataset's samples {index if rows is None else [index[row] for row in rows]}"


_watches: "weakref.WeakSet[Watch]" = weakref.WeakSet()


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for watch in list(_watches):
        watch.check_gradients(optimizer)


register_optimizer_step_pre_hook(_before_step)


class HeldOut:
    """The error of sampled chunks over the held-out samples of one evaluation.

    LeRobot reports their loss, which says little about what the robot will do; it throws away what else a policy
    tells it, so this is logged. In units of the variance, where actions are normalised by mean and deviation: to
    predict the mean of the dataset is 1. Steps after the end of an episode do not count.
    """

    def __init__(self) -> None:
        self._sum_A: Tensor | None = None
        self._steps = 0
        self._samples = 0

    def add(self, chunk_BTA: Tensor, actions_BTA: Tensor, valid_BT: Tensor) -> float:
        """Take a batch in; returns its mean squared error."""
        errors_BTA = (chunk_BTA - actions_BTA).square() * valid_BT[..., None]
        steps, sum_A = int(valid_BT.sum()), errors_BTA.sum(dim=(0, 1)).double()
        self._sum_A = sum_A if self._sum_A is None else self._sum_A + sum_A
        self._steps, self._samples = self._steps + steps, self._samples + len(chunk_BTA)
        return sum_A.mean().item() / max(steps, 1)

    def report(self, joints: Sequence[str]) -> None:
        """Log the errors of all batches since the last report."""
        if self._sum_A is None:
            return
        errors = (self._sum_A / max(self._steps, 1)).tolist()
        logger.info(
            "held out: error of sampled chunks %.4f over %d samples (%s)",
            sum(errors) / len(errors),
            self._samples,
            ", ".join(f"{joint} {error:.4f}" for joint, error in zip(joints, errors, strict=True)),
        )
        self.__init__()  # type: ignore[misc]
