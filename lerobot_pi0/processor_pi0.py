"""Processors of π₀: LeRobot's own steps in LeRobot's order, a tokenizer that needs no network, and the
check of the statistics that they normalise with."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType, NormalizationMode
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    ProcessorStepRegistry,
    TokenizerProcessorStep,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)
from torch import Tensor

from .configuration_pi0 import BYTE_TOKENIZER, PALIGEMMA_TOKENIZER, PI0Config, dim_name
from .inputs.prompt import PromptStep
from .inputs.relative import AnchoredRelativeStep

logger = logging.getLogger(__name__)

NEAR_CONSTANT = 1e-3
"""A dimension whose spread is below this part of the largest one's is called near-constant."""

NOT_CARRIED = "not_carried"
"""Name of the one tensor in the state of a tokenizer step whose checkpoint must not hold the tokenizer."""

MANY_PROMPTS = 1000
"""After so many different ones, what is remembered of prompts is forgotten."""

STATISTICS = {
    NormalizationMode.MEAN_STD: ("mean", "std"),
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
}


class TokenizerError(OSError):
    """A tokenizer that is not here and cannot be fetched."""


def load_tokenizer(name: str) -> Any:
    """A tokenizer by name: "bytes", a folder, or a Hub id.

    Raises:
        TokenizerError: it cannot be had; says how to get at a gated one.
    """
    from transformers import AutoTokenizer, ByT5Tokenizer

    if name == BYTE_TOKENIZER:
        return ByT5Tokenizer()
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        gated = (
            f"PaliGemma's is gated: accept the terms at huggingface.co/{name}, then `hf auth login`. "
            if name == PALIGEMMA_TOKENIZER
            else ""
        )
        raise TokenizerError(
            f"the tokenizer {name!r} cannot be loaded. {gated}Without a network, name a folder that holds it "
            "(--policy.text_tokenizer_name=FOLDER), or use a checkpoint that this plugin saved, which carries its "
            f"tokenizer ({type(error).__name__}: {error})"
        ) from error


@dataclass
class PI0TokenizerStep(TokenizerProcessorStep):
    """LeRobot's tokenizer step, which also travels with its tokenizer and knows the byte tokenizer.

    It takes LeRobot's name in the registry, because a saved pipeline is rebuilt from names alone. The files of the
    tokenizer are its state, which LeRobot's own step ignores when it meets it; that they are not to travel is state
    too, since a checkpoint without any (LeRobot's) carries its tokenizer once this plugin saves it. A tokenizer is
    looked up when it is first needed, since its files may be about to come from the checkpoint.
    """

    carry: bool = True

    def __post_init__(self) -> None:
        if self.tokenizer is None and self.tokenizer_name is None:
            raise ValueError("tokenizer_processor needs a tokenizer_name")
        self._loaded = self.tokenizer
        self._files: dict[str, Tensor] = {}
        self._known: dict[str, dict[str, Tensor]] = {}  # tokens of prompts that came before

    @property
    def input_tokenizer(self) -> Any:  # type: ignore[override]
        """The tokenizer itself; the name is LeRobot's."""
        if self._loaded is None:
            self._loaded = load_tokenizer(str(self.tokenizer_name))
        return self._loaded

    def _tokenize_text(self, text: str | list[str]) -> dict[str, Tensor]:
        """LeRobot's, but for each prompt once: a dataset has few, and the byte tokenizer takes 1 ms for one."""
        texts = [text] if isinstance(text, str) else list(text)
        if self.padding != "max_length":  # lengths depend on the batch
            return super()._tokenize_text(texts)
        if len(self._known) > MANY_PROMPTS:
            self._known.clear()
        for prompt in {*texts} - self._known.keys():
            self._known[prompt] = dict(super()._tokenize_text([prompt]))
        return {key: torch.cat([self._known[prompt][key] for prompt in texts]) for key in self._known[texts[0]]}

    def state_dict(self) -> dict[str, Tensor]:
        """The tokenizer's files, as bytes; nothing for the byte tokenizer, which has none."""
        if self.tokenizer_name == BYTE_TOKENIZER:
            return {}
        if not self.carry:
            return {NOT_CARRIED: torch.zeros(1, dtype=torch.uint8)}
        if not self._files:
            with TemporaryDirectory() as folder:
                self.input_tokenizer.save_pretrained(folder)
                for file in sorted(Path(folder).iterdir()):
                    self._files[file.name] = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
        return dict(self._files)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the tokenizer from its files, or leave it to its name if they were not to travel."""
        from transformers import AutoTokenizer

        self.carry = NOT_CARRIED not in state
        if not self.carry:
            return
        self._known.clear()
        self._files = dict(state)
        with TemporaryDirectory() as folder:
            for name, content in state.items():
                (Path(folder) / Path(name).name).write_bytes(content.cpu().numpy().tobytes())
            self._loaded = AutoTokenizer.from_pretrained(folder)


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
        if {low.size, high.size} != {int(np.prod(feature.shape))}:
            raise ValueError(
                f"the statistics of {key!r} have {low.size} and {high.size} dims, the feature {tuple(feature.shape)}: "
                "they are of another dataset. To fine-tune a checkpoint for another robot, give --policy.type=pi0 "
                "--policy.pretrained_path=CHECKPOINT in place of --policy.path, which keeps the old robot's joints"
            )
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError(f"the statistics of {key!r} hold NaN or infinity: recompute them")
        spread = high if mode is NormalizationMode.MEAN_STD else high - low
        flat = np.flatnonzero(spread <= max(NEAR_CONSTANT * spread.max(initial=0), 1e-8))
        if len(flat):
            dims = ", ".join(f"{dim_name(config, key, i)} (spread {spread[i]:.3g})" for i in flat)
            logger.warning(
                "near-constant dimensions of %r: %s. Normalised, their smallest change becomes a large one; "
                "leave them out of the dataset unless they are meant to be fixed",
                key,
                dims,
            )


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
        TokenizerError: the tokenizer cannot be had.
    """
    check_statistics(config, dataset_stats)
    tokenizer = PI0TokenizerStep(
        tokenizer_name=config.tokenizer,
        max_length=config.tokenizer_max_length or 0,
        padding_side="right",
        padding="max_length",
        carry=config.save_tokenizer is not False,
    )
    _ = tokenizer.input_tokenizer  # a tokenizer that cannot be had is an error now, not at the first prompt
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
            tokenizer,
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
