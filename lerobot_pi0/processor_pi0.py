"""Processors of π₀: LeRobot's own steps in LeRobot's order, some of which can do more."""

from typing import Any

import torch
from lerobot.processor import (
    PolicyAction,
    PolicyProcessorPipeline,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)

from .configuration_pi0 import PI0Config
from .inputs.finite import FiniteAbsoluteStep
from .inputs.joints import check_relative_names
from .inputs.statistics import check_statistics
from .inputs.steps import AnchoredRelativeStep, CheckedNormalizerStep, PI0TokenizerStep, PromptStep


def make_pi0_pre_post_processors(
    config: PI0Config,
    dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None,
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """Pipelines before and after the policy, in openpi's order: relative actions, then normalisation.

    Raises:
        ValueError: statistics are missing (`check_statistics`), or names of joints with which relative actions would be
            those of other joints (`check_relative_names`).
        TokenizerError: the tokenizer cannot be had.
    """
    check_statistics(config, dataset_stats)
    check_relative_names(config)
    relative = AnchoredRelativeStep(
        enabled=config.use_relative_actions,
        exclude_joints=config.relative_exclude_joints,
        action_names=config.action_feature_names,
    )
    steps = make_default_policy_processor_steps(config, dataset_stats)
    return make_policy_processor_pipelines(
        input_steps=[
            steps.rename_observations,
            steps.add_batch_dim,
            PromptStep(cleans=bool(config.clean_prompts)),
            _tokenizer_step(config),
            steps.to_device,
            relative,
            CheckedNormalizerStep.of(steps.normalize),
        ],
        output_steps=[
            steps.unnormalize,
            FiniteAbsoluteStep(enabled=config.use_relative_actions, relative_step=relative),
            steps.to_cpu,
        ],
    )


def _tokenizer_step(config: PI0Config) -> PI0TokenizerStep:
    step = PI0TokenizerStep(
        tokenizer_name=config.tokenizer,
        max_length=config.tokenizer_max_length or 0,
        padding_side="right",
        padding="max_length",
        carry=config.save_tokenizer is not False,
    )
    _ = step.input_tokenizer  # a tokenizer that cannot be had is an error now, not at the first prompt
    return step
