"""Saving and publishing as LeRobot after 0.6.1 does it, where the functions for it are there; else as LeRobot 0.6.1.

LeRobot's later versions save in every process and gather sharded weights while they do, and write a model card from
the config alone, by a function of their own. LeRobot 0.6.1 gathers first, saves in one process, and asks the policy
for its card.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import Tensor, nn

from ..configuration_pi0 import PI0Config
from .model_card import make_card
from .origin import Origin


def whole_state(module: nn.Module, state: dict[str, Tensor] | None) -> tuple[dict[str, Tensor] | None, bool]:
    """The state dict to write, and whether this process writes it; to be called in every process that saves.

    Args:
        state: gathered already; None takes the module's own, gathered here if it is sharded and LeRobot can.
    """
    if state is not None:
        return state, True
    try:
        distributed = importlib.import_module("lerobot.distributed.checkpoint")
        is_main_process = importlib.import_module("lerobot.distributed.utils").is_main_process
    except ModuleNotFoundError:  # LeRobot 0.6.1: the caller gathers, and calls the main process alone
        return None, True
    if distributed.is_sharded_module(module):
        state = distributed.full_model_state_dict(module)
    return state, is_main_process()


def remember_for_card(config: PI0Config, sizes: dict[str, tuple[int, int]], start: str | None) -> None:
    """Let the function that writes LeRobot's cards from a config alone write this plugin's for this config.

    Args:
        sizes, start: what `make_card` tells of the network and of its start.
    """
    config.card_facts = sizes, start  # type: ignore[assignment]
    train_utils = importlib.import_module("lerobot.common.train_utils")
    theirs = getattr(train_utils, "generate_model_card", None)
    if theirs is not None and not hasattr(theirs, "without_pi0"):
        train_utils.generate_model_card = _with_pi0(theirs)  # type: ignore[attr-defined]


def _with_pi0(theirs: Callable[..., ModelCard]) -> Callable[..., ModelCard]:
    def generate_model_card(model_cfg: Any, cfg: Any = None, dataset_meta: Any = None) -> ModelCard:
        """LeRobot's card of a policy or reward model; of π₀ this plugin's, which names the true base model."""
        if not isinstance(model_cfg, PI0Config):
            return theirs(model_cfg, cfg=cfg, dataset_meta=dataset_meta)
        sizes, start = model_cfg.card_facts
        dataset = None if cfg is None else cfg.dataset.repo_id
        return make_card(model_cfg, sizes, start, dataset, cfg, dataset_meta)

    generate_model_card.without_pi0 = theirs  # type: ignore[attr-defined]
    return generate_model_card


class Publishing:
    """Methods of PI0Policy that save and publish, for both."""

    config: Any
    model: Any
    origin: Origin
    _run: Any

    def save_pretrained(
        self, save_directory: str | Path, *, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> str | None:
        """Write a checkpoint, and push it if LeRobot's arguments for that ask to.

        Args:
            state_dict: weights to write in place of the policy's, as they were gathered from several processes.
        """
        if state_dict is None:
            return super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        if kwargs.get("push_to_hub"):
            raise ValueError("weights that were gathered (state_dict) are written to a folder: push that afterwards")
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self._save_pretrained(Path(save_directory), state_dict)  # type: ignore[attr-defined]
        return None

    def push_to_hub(self, *args: Any, **kwargs: Any) -> str | None:
        """LeRobot's push of the weights; of `save_expert_only` over a folder it pushes all weights."""
        remember_for_card(self.config, self._run.part_sizes(self.model), self.origin.start)
        with self.origin.complete_for_others(self.config):
            return super().push_to_hub(*args, **kwargs)  # type: ignore[misc]

    def push_model_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """LeRobot's push; of `save_expert_only` over a folder, which nobody else has, it pushes all weights."""
        with self.origin.complete_for_others(self.config):
            super().push_model_to_hub(*args, **kwargs)  # type: ignore[misc]

    def generate_model_card(
        self,
        dataset_repo_id: str | None,
        model_type: str | None = None,
        license: str | None = None,
        tags: list[str] | None = None,
        cfg: Any = None,
        dataset_meta: Any = None,
    ) -> ModelCard:
        """The card that LeRobot pushes with the weights; needs no network."""
        sizes = self._run.part_sizes(self.model)
        return make_card(self.config, sizes, self.origin.start, dataset_repo_id, cfg, dataset_meta)
