"""Processor steps of π₀: LeRobot's tokenizer, prompt, normaliser and relative actions, extended, under LeRobot's names.

A saved pipeline is rebuilt from the registered names of its steps and from their states. So everything that a
checkpoint has to keep is in a step's state. When a pipeline of π₀ is rebuilt, `pipelines.py` replaces LeRobot's steps
by those in `STEPS`.
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
"""Name of the only tensor in the state of a tokenizer step whose checkpoint must not hold the tokenizer."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "spiece.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja",
)  # fmt: skip
"""Files of a tokenizer that a checkpoint may carry: vocabularies and settings, no program and no pickle."""

NO_TOKENIZER = "tokenizer_processor has no tokenizer: give it a tokenizer or a tokenizer_name (preprocessor_overrides)"

MANY_PROMPTS = 1000
"""The cache of tokenized prompts is emptied when it holds more than this many."""

CLEANED = "cleaned"
"""Name of the only tensor in the state of a `PromptStep` that cleans prompts; LeRobot's own step ignores it."""

TOKENIZER_STEP = "tokenizer_step"
"""Key of a batch of control under which the policy finds the `PI0TokenizerStep` that made its tokens."""

STEP = "relative_actions_step"
"""Key of a batch under which the policy finds the `AnchoredRelativeStep` that processed it."""


class TokenizerError(OSError):
    """A tokenizer that cannot be loaded or downloaded."""


def load_tokenizer(name: str) -> Any:
    """A tokenizer by name: "bytes", a folder, or a Hub id.

    Raises:
        TokenizerError: it cannot be loaded; the message says how to get access to a gated one.
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
    """LeRobot's tokenizer step, which also saves the tokenizer in the checkpoint and knows the byte tokenizer.

    It is saved under LeRobot's name, so that LeRobot can load it. The tokenizer's files are the state of this step;
    LeRobot's own step ignores them. The choice not to save them (`carry=False`) is state too: without this mark a
    checkpoint that has no such files, as LeRobot's have none, gets them when this plugin saves it. The tokenizer is
    loaded when it is first needed, since its files may still come from the checkpoint.
    """

    carry: bool | None = None
    """Whether checkpoints hold the tokenizer's files; None takes it from the loaded state, where yes is the default."""
    takes_files: bool = True
    """Whether to use the checkpoint's files; False if the caller gives another tokenizer."""
    folder: str | None = None
    """Folder from which the tokenizer is loaded, in place of its name: LeRobot after 0.6.1 saves it in a folder."""

    def __post_init__(self) -> None:
        if self.tokenizer is None and self.tokenizer_name is None and not self.takes_files:
            raise ValueError(NO_TOKENIZER)
        self._loaded = self.tokenizer
        self._files: dict[str, Tensor] = {}
        self._known: dict[str, dict[str, Tensor]] = {}  # tokens of earlier prompts

    @property
    def input_tokenizer(self) -> Any:  # type: ignore[override]
        """The tokenizer itself; the name is LeRobot's."""
        if self._loaded is None:
            self._loaded = load_tokenizer(self.folder or str(self.tokenizer_name))
        return self._loaded

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        """LeRobot's step. In control, the batch then says who can turn its tokens back into words."""
        transition = super().__call__(transition)
        return (
            transition if transition.get(TransitionKey.ACTION) is not None else _with(transition, TOKENIZER_STEP, self)
        )

    def _tokenize_text(self, text: str | list[str]) -> dict[str, Tensor]:
        """LeRobot's method, once for each prompt: a dataset has few, and the byte tokenizer takes 1 ms for one."""
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
        """Write no files: the state holds the tokenizer, and LeRobot after 0.6.1 would write it a second time."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the tokenizer from its files; if the checkpoint does not hold them, it is loaded by its name later.

        Raises:
            TokenizerError: the files are not those of a tokenizer.
            ValueError: the checkpoint holds no files, and there is no name.
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
            except Exception as error:  # tokenizer libraries raise many types
                raise TokenizerError(
                    f"the tokenizer that the checkpoint carries cannot be loaded ({type(error).__name__}: {error}): "
                    "download or copy the checkpoint again"
                ) from error


def clean(prompt: str) -> str:
    """The prompt without spaces at its ends, and with spaces in place of underscores and line breaks."""
    return prompt.strip().replace("_", " ").replace("\n", " ")


class PromptStep(Pi0NewLineProcessor):
    """LeRobot's step, under LeRobot's name, that ends a prompt with a line break. If `cleans`, it calls `clean` first.

    A saved pipeline is rebuilt from names and states, so `cleans` is saved as state.

    Args:
        cleans: whether to clean prompts; None takes it from the state that is loaded.
    """

    def __init__(self, cleans: bool | None = None) -> None:
        self._decided = cleans
        self.cleans = bool(cleans)

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        """Check the sample and restore its dims, then do LeRobot's step. Steps that read the values come later."""
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


def _with(transition: EnvTransition, key: str, step: ProcessorStep) -> EnvTransition:
    """The transition with a step under this key of the batch."""
    data = {**(transition.get(TransitionKey.COMPLEMENTARY_DATA) or {}), key: step}
    return {**transition, TransitionKey.COMPLEMENTARY_DATA: data}  # type: ignore[return-value]


class AnchoredRelativeStep(RelativeActionsProcessorStep):
    """LeRobot's step, under LeRobot's name, which lets the policy choose the state to which its actions are relative.

    `AbsoluteActionsProcessorStep` adds the state that this step saw last. But while a chunk is executed from a queue,
    new states come in, and all actions of the chunk are relative to the state from which it was predicted.
    """

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        transition = super().__call__(transition)
        if self.enabled and transition.get(TransitionKey.ACTION) is None:  # no action: this is control, not training
            transition = _with(transition, STEP, self)
        return transition


class CheckedNormalizerStep(NormalizerProcessorStep):
    """LeRobot's step, under LeRobot's name, with an error if a state or action is not as long as its statistics."""

    @classmethod
    def of(cls, step: NormalizerProcessorStep) -> "CheckedNormalizerStep":
        """A copy of a step of LeRobot's class."""
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
    """The state to which the actions of the current chunk are relative: the one from which it was predicted."""

    def __init__(self) -> None:
        self._raw: Any = None
        self._normalised: Any = None

    def set(self, batch: Mapping[str, Any]) -> None:
        """Remember the state of the batch from which a chunk was predicted."""
        self._raw = batch[STEP].get_cached_state() if STEP in batch else None
        self._normalised = batch.get(OBS_STATE)

    def restore(self, batch: Mapping[str, Any]) -> Any:
        """Make the postprocessor add the chunk's state to its next action. Returns the normalised state that it will
        add: the chunk's, or this batch's if the pipeline has LeRobot's own step."""
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
"""The steps of this plugin, by the registered name of the LeRobot step that each replaces in pipelines of π₀."""
