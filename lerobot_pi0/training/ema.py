"""Exponential moving average (EMA) of the trained weights. Evaluation and checkpoints use it in place of the weights.

    average ← decay · average + (1 - decay) · weights     after each step of the optimizer; it starts at the weights

openpi keeps it for all fine-tuning except LoRA (`training/config.py: ema_decay`). `model.safetensors` holds the
averages. When a run is resumed, LeRobot restores the optimizer, so its state holds both the averages and the weights.
"""

from collections.abc import Iterable, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
AVERAGE, WEIGHTS = "average", "weights"


def sharding() -> str | None:
    """What shards the weights over processes ("FSDP", "DEEPSPEED", …); None if nothing does."""
    from accelerate.state import AcceleratorState  # slow; not at the start of each command

    kind = AcceleratorState._shared_state.get("distributed_type")
    return str(getattr(kind, "value", kind)) if kind in SHARDED else None


class Trained(list[nn.Parameter]):
    """The trained parameters, and which of them Muon would train.

    It is a list of the parameters, because LeRobot passes what `get_optim_params` returns to the optimizer's `build`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], matrices: Set[int] = frozenset()) -> None:
        """Take the parameters, and the `id` of those that are matrices of layers."""
        super().__init__(parameters)
        self.matrices = matrices

    def parted(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The matrices of layers, and the others."""
        return [p for p in self if id(p) in self.matrices], [p for p in self if id(p) not in self.matrices]


class Ema(Trained):
    """The trained parameters and their averages, which `build` attaches to the optimizer (`attach`)."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float, matrices: Set[int] = frozenset()) -> None:
        super().__init__(parameters, matrices)
        self.decay = decay
        self.averages: list[Tensor] = []  # empty until an optimizer is built
        self.deployed = False  # whether the parameters hold the averages, and `averages` the weights

    @torch.no_grad()
    def attach(self, optimizer: Optimizer) -> None:
        """Start the averages at the parameters, and save and restore them with the optimizer's state."""
        self[:] = [p for group in optimizer.param_groups for p in group["params"]]  # it may group them by kind
        self.averages = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in self]
        optimizer.register_state_dict_post_hook(self._store)
        optimizer.register_load_state_dict_post_hook(self._restore)

    @torch.no_grad()
    def update(self) -> None:
        """One step of the average."""
        torch._foreach_lerp_(self.averages, [p.data for p in self], 1 - self.decay)

    @torch.no_grad()
    def deploy(self, deployed: bool) -> None:
        """Put the averages into the parameters, or put the weights back. The two are exchanged, not copied."""
        if self.averages and deployed != self.deployed:
            for i, p in enumerate(self):
                p.data, self.averages[i] = self.averages[i], p.data
            self.deployed = deployed

    def deployed_state(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
        """The averages by name. `parameters` gives the names; it may hold other parameters too."""
        if not self.averages:  # no optimizer was built yet
            return {}
        tensors = {id(p): p.data if self.deployed else average for p, average in zip(self, self.averages, strict=True)}
        return {name: tensors[id(p)] for name, p in parameters if id(p) in tensors}

    def _store(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Add weights and averages to a state that is about to be saved.

        Before the first step the two are equal, and nothing is added: torch does not load a state without moments.
        """
        for i, (p, average) in enumerate(zip(self, self.averages, strict=True)):
            if i in state["state"]:
                own = (p.data, average) if self.deployed else (average, p.data)
                state["state"][i] = {**state["state"][i], AVERAGE: own[0], WEIGHTS: own[1]}

    @torch.no_grad()
    def _restore(self, optimizer: Optimizer) -> None:
        """Take weights and averages from a state that was loaded; a run without averages has saved none."""
        self.deploy(False)
        for p, average in zip(self, self.averages, strict=True):
            own = optimizer.state.get(p, {})
            if AVERAGE in own:
                average.copy_(own.pop(AVERAGE))
                p.data.copy_(own.pop(WEIGHTS))
