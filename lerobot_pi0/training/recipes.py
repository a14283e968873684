"""Recipes: what "openpi" and "small" make of LeRobot's options, optimizer and schedule.

The plugin's own options have their values under a recipe where they are declared. LeRobot's options are for
fine-tuning billions of parameters; a network of a few million that starts from random weights hardly moves with them.
"""

import logging
from typing import TYPE_CHECKING, Any

from lerobot.optim import AdamWConfig, LRSchedulerConfig
from lerobot.policies.pi0.configuration_pi0 import PI0Config as BuiltinPI0Config
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_STATE

from . import optimizers

if TYPE_CHECKING:
    from ..configuration_pi0 import PI0Config

logger = logging.getLogger(__name__)

SMALL: dict[str, Any] = {"optimizer_lr": 8e-4, "optimizer_betas": (0.9, 0.999), "scheduler_decay_lr": 8e-6}


def _is_lerobots(config: "PI0Config", name: str) -> bool:
    return getattr(config, name) == getattr(BuiltinPI0Config, name)


def set_lerobots(config: "PI0Config") -> None:
    """Set LeRobot's options as the recipe has them, where they have LeRobot's default."""
    for name, value in SMALL.items() if config.recipe == "small" else ():
        if _is_lerobots(config, name):
            setattr(config, name, value)


def optimizer(config: "PI0Config", preset: AdamWConfig) -> AdamWConfig:
    """LeRobot's; openpi's recipe hardly decays weights, and averages have to travel with the optimizer."""
    if config.recipe == "openpi" and _is_lerobots(config, "optimizer_weight_decay"):
        preset.weight_decay = 1e-10
    name = "adamw_8bit" if config.optimizer_8bit else "muon" if config.optimizer_muon else "adamw"
    kind = optimizers.OPTIMIZERS.get(f"pi0_averaged_{name}" if config.ema_decay else f"pi0_{name}")
    return preset if kind is None else kind(**vars(preset))


def schedule(config: "PI0Config", preset: LRSchedulerConfig) -> LRSchedulerConfig:
    """LeRobot's, or openpi's: the same numbers, but never rescaled, and the decay begins after the warm-up."""
    return optimizers.WarmupCosineConfig(**vars(preset)) if config.recipe == "openpi" else preset


def take_dims(config: "PI0Config", features: dict[str, Any]) -> None:
    """Make states and actions as wide as the dataset's: with padding, a small expert would read mostly noise. Only the
    second loss has a use for padding (`environment_state`)."""
    has_loss = config.environment_state_weight and OBS_ENV_STATE in (config.input_features or {})
    told = [OBS_ENV_STATE] if has_loss else []
    for name, keys in (("max_state_dim", [OBS_STATE]), ("max_action_dim", [ACTION, *told])):
        if _is_lerobots(config, name) and keys[0] in features:
            setattr(config, name, sum(int(features[key]["shape"][0]) for key in keys if key in features))


def advise(config: "PI0Config") -> None:
    """Name the recipe to those who train a small network without it."""
    small = "tiny" in (config.paligemma_variant, config.action_expert_variant)
    if small and config.recipe == "lerobot" and _is_lerobots(config, "optimizer_lr"):
        logger.warning(
            "a small network that starts from random weights learns little with LeRobot's options, which are for "
            "fine-tuning: train it with --policy.recipe=small"
        )
