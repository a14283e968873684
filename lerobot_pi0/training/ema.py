"""The exponential moving average of the trained weights: what is deployed, while training goes on with the weights.

    average ← decay · average + (1 - decay) · weights          after each step of the optimizer, from the first weights

openpi keeps it for all fine-tuning but LoRA (`training/config.py: ema_decay`). LeRobot restores the optimizer when a
run is resumed and nothing else that is ours, so both sets travel in the optimizer's state; `model.safetensors` holds
the average.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from lerobot.optim import AdamWConfig
from torch import Tensor, nn
from torch.optim import Optimizer

SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
AVERAGE, WEIGHTS = "average", "weights"


def sharding() -> str | None:
    """What spreads the weights over processes, if anything does."""
    from accelerate.state import AcceleratorState  # too much for every command's start

    kind = AcceleratorState._shared_state.get("distributed_type")
    return str(getattr(kind, "value", kind)) if kind in SHARDED else None


def check_averaging(use_peft: bool) -> None:
    """Refuse to average where a resumed run would not get its averages back.

    Raises:
        ValueError: adapters, whose file peft writes, or weights that are spread over processes.
    """
    if obstacle := "adapters" if use_peft else sharding():
        raise ValueError(
            f"ema_decay does not go together with {obstacle}: what is saved there is not the policy's to choose, so "
            "the average would be lost. Set --policy.ema_decay=0"
        )


class Ema(list[nn.Parameter]):
    """The trained parameters and their averages.

    A list, because a list is what LeRobot carries from `get_optim_params` to the builder of the optimizer, which is
    where the averages are hung onto the optimizer (`attach`).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        super().__init__(parameters)
        self.decay = decay
        self.averages: list[Tensor] = []  # empty until there is an optimizer
        self.deployed = False  # whether the parameters hold the averages, and `averages` the weights

    @torch.no_grad()
    def attach(self, optimizer: Optimizer) -> None:
        """Start the averages at the parameters, and let them travel with the optimizer's state."""
        self.averages = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in self]
        optimizer.register_state_dict_post_hook(self._store)
        optimizer.register_load_state_dict_post_hook(self._restore)

    @torch.no_grad()
    def update(self) -> None:
        """One step of the average."""
        torch._foreach_lerp_(self.averages, [p.data for p in self], 1 - self.decay)

    @torch.no_grad()
    def deploy(self, deployed: bool) -> None:
        """Let the parameters hold the averages, or the weights again; nothing is copied."""
        if self.averages and deployed != self.deployed:
            for i, p in enumerate(self):
                p.data, self.averages[i] = self.averages[i], p.data
            self.deployed = deployed

    def deployed_state(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
        """The averages, by the names that the averaged ones of `parameters` have."""
        if not self.averages:  # there is no optimizer yet
            return {}
        tensors = {id(p): p.data if self.deployed else average for p, average in zip(self, self.averages, strict=True)}
        return {name: tensors[id(p)] for name, p in parameters if id(p) in tensors}

    def _store(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Add both sets to a state that is about to be saved.

        Where no step has been made they are equal, and there is no state: torch does not load one without moments.
        """
        for i, (p, average) in enumerate(zip(self, self.averages, strict=True)):
            if i in state["state"]:
                own = (p.data, average) if self.deployed else (average, p.data)
                state["state"][i] = {**state["state"][i], AVERAGE: own[0], WEIGHTS: own[1]}

    @torch.no_grad()
    def _restore(self, optimizer: Optimizer) -> None:
        """Take both sets out of a state that was loaded; one that has none belongs to a run without averages."""
        self.deploy(False)
        for p, average in zip(self, self.averages, strict=True):
            own = optimizer.state.get(p, {})
            if AVERAGE in own:
                average.copy_(own.pop(AVERAGE))
                p.data.copy_(own.pop(WEIGHTS))


@dataclass
class AveragedAdamWConfig(AdamWConfig):
    """AdamW whose state carries the averages; it has a name of its own for `train_config.json`, which resume reads."""

    def build(self, params: Any) -> Optimizer:
        """
        Raises:
            ValueError: the policy does not average, though the run that is resumed did.
        """
        if not isinstance(params, Ema):
            raise ValueError(
                f"this run averages its weights (optimizer.type={self.type}), but ema_decay is not set: a run keeps "
                "its ema_decay until it ends"
            )
        optimizer = super().build(params)
        params.attach(optimizer)
        return optimizer
