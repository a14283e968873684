"""Processors of π₀: LeRobot's own steps in LeRobot's order, a tokenizer that needs no network, and the
check of the statistics that they normalise with."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType, NormalizationMode
from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    ProcessorStepRegistry,
    RelativeActionsProcessorStep,
    TokenizerProcessorStep,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)

from .configuration_pi0 import BYTE_TOKENIZER, PI0Config

logger = logging.getLogger(__name__)

NEAR_CONSTANT = 1e-3
"""A dimension whose spread is below this part of the largest one's is called near-constant."""

STATISTICS = {
    NormalizationMode.MEAN_STD: ("mean", "std"),
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
}


@dataclass
class PI0TokenizerStep(TokenizerProcessorStep):
    """LeRobot's tokenizer step, which also knows the byte tokenizer (`tokenizer_name="bytes"`).

    It takes LeRobot's name in the registry, because a saved pipeline is rebuilt from names alone.
    """

    def __post_init__(self) -> None:
        if self.tokenizer is None and self.tokenizer_name == BYTE_TOKENIZER:
            from transformers import ByT5Tokenizer

            self.input_tokenizer = ByT5Tokenizer()
            return
        super().__post_init__()


def register_tokenizer_step() -> None:
    """Rebuild saved `tokenizer_processor` steps, of every policy, as the step that can do more."""
    ProcessorStepRegistry.unregister("tokenizer_processor")
    ProcessorStepRegistry.register("tokenizer_processor")(PI0TokenizerStep)


def check_statistics(config: PI0Config, stats: Mapping[str, Mapping[str, Any]] | None) -> None:
    """Refuse to normalise with statistics that are not there; name dimensions that hardly vary.

    Args:
        stats: per feature, `mean`, `std`, … as a LeRobotDataset's `meta.stats` has them.

    Raises:
        ValueError: a feature that is normalised has no statistics, or some that are not finite.
    """
    features = {**(config.input_features or {}), **(config.output_features or {})}
    for key, feature in features.items():
        mode = config.normalization_mapping.get(feature.type.value, NormalizationMode.IDENTITY)
        if mode is NormalizationMode.IDENTITY or feature.type is FeatureType.VISUAL:
            continue
        names = STATISTICS[mode]
        found = (stats or {}).get(key, {})
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(
                f"no {' and '.join(missing)} for {key!r}, which is normalised by {mode.value}: without statistics "
                "the policy would learn, or send to the robot, numbers of another scale. Pass the dataset's "
                "`meta.stats`; `lerobot-edit-dataset --operation.type recompute_stats` makes them"
            )
        low, high = (np.asarray(found[name], dtype=np.float64).reshape(-1) for name in names)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError(f"the statistics of {key!r} hold NaN or infinity: recompute them")
        spread = high if mode is NormalizationMode.MEAN_STD else high - low
        flat = np.flatnonzero(spread <= max(NEAR_CONSTANT * spread.max(initial=0), 1e-8))
        if len(flat):
            dims = ", ".join(f"{_dim_name(config, key, i)} ({names[1]} {high[i]:.3g})" for i in flat)
            logger.warning(
                "near-constant dimensions of %r: %s. Normalised, their smallest change becomes a large one; "
                "leave them out of the dataset unless they are meant to be fixed",
                key,
                dims,
            )


def _dim_name(config: PI0Config, key: str, i: int) -> str:
    names = config.action_feature_names or []
    return names[i] if i < len(names) else f"{key}[{i}]"


def make_pi0_pre_post_processors(
    config: PI0Config,
    dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None,
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """Pipelines before and after the policy, in openpi's order: relative actions, then normalisation.

    Raises:
        ValueError: statistics are missing (`check_statistics`).
        OSError: the tokenizer cannot be had.
    """
    check_statistics(config, dataset_stats)
    relative = RelativeActionsProcessorStep(
        enabled=config.use_relative_actions,
        exclude_joints=config.relative_exclude_joints,
        action_names=config.action_feature_names,
    )
    steps = make_default_policy_processor_steps(config, dataset_stats)
    return make_policy_processor_pipelines(
        input_steps=[
            steps.rename_observations,
            steps.add_batch_dim,
            Pi0NewLineProcessor(),
            PI0TokenizerStep(
                tokenizer_name=config.tokenizer,
                max_length=config.tokenizer_max_length,
                padding_side="right",
                padding="max_length",
            ),
            steps.to_device,
            relative,
            steps.normalize,
        ],
        output_steps=[
            steps.unnormalize,
            AbsoluteActionsProcessorStep(enabled=config.use_relative_actions, relative_step=relative),
            steps.to_cpu,
        ],
    )
