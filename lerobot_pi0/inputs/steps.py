"""Processor steps: LeRobot's tokenizer, prompt and relative actions, under LeRobot's names, which can do more.

A saved pipeline is rebuilt from the registered names of its steps and their states, so what has to travel with a
checkpoint is state. In pipelines of π₀, `pipelines` puts `STEPS` where their files name LeRobot's steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lerobot.configs import FeatureType
from lerobot.lerobot_types import EnvTransition, TransitionKey
from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
from lerobot.processor import (
    NormalizerProcessorStep,
    ProcessorStep,
    RelativeActionsProcessorStep,
    TokenizerProcessorStep,
)
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from ..configuration_pi0 import BYTE_TOKENIZER, PALIGEMMA_TOKENIZER
from .finite import FiniteAbsoluteStep
from .samples import ObservationError, check_sample, restore_dims

TOKENIZER = "tokenizer_processor"
"""LeRobot's name of the tokenizer step."""

NOT_CARRIED = "not_carried"
"""Name of the one tensor in the state of a tokenizer step whose checkpoint must not hold the tokenizer."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "spiece.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja",
)  # fmt: skip
"""Files of a tokenizer that a checkpoint may carry: vocabularies and settings, no program and no pickle."""

NO_TOKENIZER = "tokenizer_processor has no tokenizer: give it a tokenizer or a tokenizer_name (preprocessor_overrides)"

MANY_PROMPTS = 1000
"""After so many different ones, what is remembered of prompts is forgotten."""

CLEANED = "cleaned"
"""Name of the one tensor in the state of a step that cleans; LeRobot's own step ignores it."""

STEP = "relative_actions_step"
"""Key of a batch under which the policy finds the step that took part in making it."""


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
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
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

    It is saved under LeRobot's name, so that LeRobot can load it. The files of the tokenizer are its state, which
    LeRobot's own step ignores when it meets it; that they are not to travel is state too, since a checkpoint without
    any (LeRobot's) carries its tokenizer once this plugin saves it. A tokenizer is looked up when it is first needed,
    since its files may be about to come from the checkpoint.
    """

    carry: bool | None = None
    """Whether they travel; None leaves it to the state, and without a state they do."""
    takes_files: bool = True
    """Whether the checkpoint's files are those of the tokenizer that is meant; not where another one is given."""
    folder: str | None = None
    """Where the tokenizer is loaded from in place of its name: LeRobot after 0.6.1 saves it in a folder."""

    def __post_init__(self) -> None:
        if self.tokenizer is None and self.tokenizer_name is None and not self.takes_files:
            raise ValueError(NO_TOKENIZER)
        self._loaded = self.tokenizer
        self._files: dict[str, Tensor] = {}
        self._known: dict[str, dict[str, Tensor]] = {}  # tokens of prompts that came before

    @property
    def input_tokenizer(self) -> Any:  # type: ignore[override]
        """The tokenizer itself; the name is LeRobot's."""
        if self._loaded is None:
            self._loaded = load_tokenizer(self.folder or str(self.tokenizer_name))
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
        if self.tokenizer_name == BYTE_TOKENIZER and self.folder is None and not self._files:
            return {}
        if self.carry is False:
            return {NOT_CARRIED: torch.zeros(1, dtype=torch.uint8)}
        if not self._files:
            with TemporaryDirectory() as folder:
                self.input_tokenizer.save_pretrained(folder)
                for file in sorted(Path(folder).iterdir()):
                    self._files[file.name] = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
        return dict(self._files)

    def save_artifacts(self, save_directory: Path) -> dict[str, str]:
        """No files beside the state, which holds the tokenizer: LeRobot after 0.6.1 would write it twice."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the tokenizer from its files, or leave it to its name if they were not to travel.

        Raises:
            TokenizerError: they are not those of a tokenizer.
        """
        from transformers import AutoTokenizer

        carried = NOT_CARRIED not in state
        self.carry = carried if self.carry is None else self.carry
        if not carried and self.tokenizer is None and self.tokenizer_name is None:
            raise ValueError(NO_TOKENIZER)
        if not carried or not self.takes_files or self.tokenizer is not None:
            return
        self._known.clear()
        self._files = dict(state)
        with TemporaryDirectory() as folder:
            for name, content in state.items():
                if name not in TOKENIZER_FILES:
                    raise TokenizerError(
                        f"the checkpoint's tokenizer has a file {name!r}, which no tokenizer of its kind has: download "
                        "the checkpoint again, or do not load it"
                    )
                (Path(folder) / name).write_bytes(content.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            try:
                self._loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
                if self._loaded.pad_token is None:
                    raise ValueError("it has no token to pad with")
            except Exception as error:  # libraries of tokenizers raise many kinds
                raise TokenizerError(
                    f"the tokenizer that the checkpoint carries cannot be loaded ({type(error).__name__}: {error}): "
                    "download or copy the checkpoint again"
                ) from error


def clean(prompt: str) -> str:
    """Without space around it, and with spaces for underscores and line breaks."""
    return prompt.strip().replace("_", " ").replace("\n", " ")


class PromptStep(Pi0NewLineProcessor):
    """LeRobot's step, under LeRobot's name, that ends a prompt with a line break; where asked to, it cleans it first.

    A saved pipeline is rebuilt from names and states, so whether to clean is state.

    Args:
        cleans: whether to clean; None leaves it to the state.
    """

    def __init__(self, cleans: bool | None = None) -> None:
        self._decided = cleans
        self.cleans = bool(cleans)

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        """LeRobot's, after what π₀ needs of every sample: this step comes before all that look at the values."""
        check_sample(transition)
        return super().__call__(restore_dims(transition))

    def complementary_data(self, complementary_data: dict[str, Any]) -> dict[str, Any]:
        task = complementary_data.get("task")
        if self.cleans and isinstance(task, str | list):
            cleaned = clean(task) if isinstance(task, str) else [clean(t) if isinstance(t, str) else t for t in task]
            complementary_data = {**complementary_data, "task": cleaned}
        return super().complementary_data(complementary_data)

    def state_dict(self) -> dict[str, Tensor]:
        return {CLEANED: torch.ones(1, dtype=torch.uint8)} if self.cleans else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self._decided is None:
            self.cleans = CLEANED in state


class AnchoredRelativeStep(RelativeActionsProcessorStep):
    """LeRobot's step, under LeRobot's name, which lets the policy tell to which state its actions are relative.

    `AbsoluteActionsProcessorStep` adds the state that this step saw last. While a chunk is executed from a queue, the
    state moves on, and the actions would with it.
    """

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        transition = super().__call__(transition)
        if self.enabled and transition.get(TransitionKey.ACTION) is None:  # at the robot
            data = {**(transition.get(TransitionKey.COMPLEMENTARY_DATA) or {}), STEP: self}
            transition = {**transition, TransitionKey.COMPLEMENTARY_DATA: data}  # type: ignore[assignment]
        return transition


class CheckedNormalizerStep(NormalizerProcessorStep):
    """LeRobot's step, under LeRobot's name, which names a state or an action that is not as long as its statistics."""

    @classmethod
    def of(cls, step: NormalizerProcessorStep) -> "CheckedNormalizerStep":
        """The same step, of this class."""
        return cls(**{x.name: getattr(step, x.name) for x in fields(step) if x.init})

    def _apply_transform(self, tensor: Tensor, key: str, feature_type: FeatureType, **kwargs: Any) -> Tensor:
        lengths = {len(x) for x in self._tensor_stats.get(key, {}).values() if x.ndim == 1 and len(x) > 1}
        if feature_type in (FeatureType.STATE, FeatureType.ACTION) and lengths - {tensor.shape[-1]}:
            raise ObservationError(
                f"{key!r} has {tensor.shape[-1]} dims, and the statistics that it is normalised with have "
                f"{max(lengths)}: this is another robot, or another order of joints, than the policy was trained for"
            )
        return super()._apply_transform(tensor, key, feature_type, **kwargs)


class Anchor:
    """The state to which the actions of the chunk that is being executed are relative."""

    def __init__(self) -> None:
        self._raw: Any = None
        self._normalised: Any = None

    def set(self, batch: Mapping[str, Any]) -> None:
        """A chunk begins with this batch."""
        self._raw = batch[STEP].get_cached_state() if STEP in batch else None
        self._normalised = batch.get(OBS_STATE)

    def restore(self, batch: Mapping[str, Any]) -> Any:
        """An action of that chunk is about to be made absolute. Returns the (normalised) state it will be added to:
        the chunk's, or this batch's where LeRobot's own step is at work."""
        if STEP not in batch:
            return batch.get(OBS_STATE)
        batch[STEP]._last_state = self._raw
        return self._normalised


STEPS: dict[str, type[ProcessorStep]] = {
    TOKENIZER: PI0TokenizerStep,
    "pi0_new_line_processor": PromptStep,
    "relative_actions_processor": AnchoredRelativeStep,
    "absolute_actions_processor": FiniteAbsoluteStep,
    "normalizer_processor": CheckedNormalizerStep,
}
"""The steps of this plugin by the names of LeRobot's, in whose place they stand in pipelines of π₀."""
