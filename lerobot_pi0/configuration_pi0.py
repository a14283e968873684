"""PI0Config: LeRobot's own π₀ options, and the few that only this plugin has.

A checkpoint's `config.json` holds LeRobot's keys alone, so that the built-in can parse it; what only this
plugin knows is kept beside it in `lerobot_pi0.json`. LeRobot reads `config.json` through its base class, where
no method of ours is called: an option of the plugin is None while nobody has set it, and `PI0Policy` resolves
it from the checkpoint's file (`PI0Config.resolve`).

An option of the plugin is declared once, as a field with `option(...)`. The comment above the field is its help
text: LeRobot's commands show it with `--help`, and `help_of` gives it to code.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import draccus
from draccus.wrappers.docstring import get_attribute_docstring
from huggingface_hub.constants import CONFIG_NAME
from lerobot.configs import PreTrainedConfig
from lerobot.optim import AdamWConfig, LRSchedulerConfig
from lerobot.policies.pi0.configuration_pi0 import PI0Config as BuiltinPI0Config

from .network.sizes import EXPERT_PRESETS, PALIGEMMA_PRESETS, Architecture
from .rules import BELOW_HALF, FINITE, LEROBOTS, Option, Rule, above, at_least, kinds_of, one_of, option
from .training import recipes

logger = logging.getLogger(__name__)

PLUGIN_CONFIG_NAME = "lerobot_pi0.json"
PALIGEMMA_TOKENIZER = "google/paligemma-3b-pt-224"
BYTE_TOKENIZER = "bytes"
"""Name of transformers' ByT5 tokenizer, which is made in place: no vocabulary to download."""


@dataclass
class PI0Config(BuiltinPI0Config):
    """Options of π₀. Those not listed here are LeRobot's, with LeRobot's meaning and defaults."""

    # Side of the (square) images in pixels; None takes the preset's own: 224 for gemma_2b, 64 for tiny.
    image_resolution: tuple[int, int] | None = None  # type: ignore[assignment]
    # Prompt tokens after which a prompt is cut; None means 48, or 128 where a token is a byte.
    tokenizer_max_length: int | None = None  # type: ignore[assignment]
    # Train the expert and the projections alone; None freezes a VLM that was loaded and trains a random one.
    train_expert_only: bool | None = None  # type: ignore[assignment]
    # Tokenizer of the prompt: a Hub id, a folder, or "bytes"; None takes the preset's own.
    text_tokenizer_name: str | None = option()
    # PaliGemma (transformers' format; Hub id or folder) whose weights a policy built from scratch takes for its VLM.
    vlm_path: str | None = option()
    # Noise and time draws per observation in training; they share one pass over the images. None means 1.
    flow_samples: int | None = option(1, at_least(1))
    # Decay of the average of the trained weights that is deployed; 0 deploys the weights. None means 0.
    ema_decay: float | None = option(
        0.0,
        Rule(lambda x: 0 <= x < 1, "has to be at least 0 and below 1; openpi's is 0.99"),
        of_the_run=True,
        openpi=0.99,
    )
    # Keep the optimizer's moments in 8 bits: a quarter of their memory, by bitsandbytes. None means False.
    optimizer_8bit: bool | None = option(False, of_the_run=True)
    # Train the layers' matrices with Muon in place of AdamW: for random weights, fewer steps. None means False.
    optimizer_muon: bool | None = option(False, of_the_run=True, small=True)
    # openpi's augmentation of the images in training. None means False.
    augment_images: bool | None = option(False, of_the_run=True, openpi=True)
    # Move each training image by up to this part of its side, except wrist cameras': for small networks. None means 0.
    augment_shift: float | None = option(0.0, BELOW_HALF, of_the_run=True, small=0.02)
    # Leave steps after the end of an episode out of the loss. None means False.
    mask_padded_actions: bool | None = option(False, of_the_run=True)
    # Strip prompts and put spaces for underscores and line breaks, as openpi does. None: as the checkpoint, or False.
    clean_prompts: bool | None = option(False, openpi=True)
    # "openpi" takes its schedule, weight decay, average, augmentation and prompts as defaults; "small" what a small
    # network needs to learn from random weights. None means "lerobot".
    recipe: str | None = option("lerobot", one_of("lerobot", "openpi", "small"), of_the_run=True)
    # Put the tokenizer's files into checkpoints, for robots without a network. None means True.
    save_tokenizer: bool | None = option(True)
    # Write only the trained weights, and which checkpoint the frozen ones come from. None means False.
    save_expert_only: bool | None = option(False)
    # How pictures shrink: "lerobot" as its π₀, "openpi" smoothed (antialiased), as openpi trained its checkpoints and
    # `lerobot-pi0 convert` sets it. None: as the checkpoint, or lerobot.
    image_resize: str | None = option("lerobot", one_of("lerobot", "openpi"))
    # How noise becomes actions: euler, midpoint, heun or adaptive, in num_inference_steps steps. None means euler.
    solver: str | None = option("euler", one_of("euler", "midpoint", "heun", "adaptive"))
    # Error per step of the adaptive solver, root mean square in units of normalised actions. None means 0.01.
    solver_tolerance: float | None = option(1e-2, above(0))
    # Chunks begin at noise times this: 1 as in training; below 1 they differ less from time to time, and at 0 one
    # observation gives always the same chunk. None means 1.
    noise_temperature: float | None = option(1.0, FINITE, small=0.5)
    # Rounds a frozen VLM when it is loaded. "int8": smaller, faster on CPUs, less exact; "nf4": smaller still, slower,
    # less exact still; "fp8": as small as int8, for NVIDIA cards from Ada on. None rounds nothing.
    vlm_quantization: str | None = option(None, one_of("int8", "fp8", "nf4"), of_the_run=True)
    # Train the expert on the contexts that `lerobot-pi0 cache` has put into this folder, without the VLM in memory.
    # Goes with --dataset.root=FOLDER/dataset. None: contexts are computed at each step.
    context_cache: str | None = option(of_the_run=True)
    # On CUDA, launch a chunk, and in training a frozen VLM, as one CUDA graph. None means True.
    cuda_graphs: bool | None = option(True)
    # Show in the Rerun window of --display_data=true what the actions look at, without CUDA graphs. None means False.
    show_attention: bool | None = option(False, of_the_run=True)
    # Real-time chunking: vjp, identity or trained. None takes trained after rtc_training_max_delay, or else identity.
    rtc_guidance: str | None = option(None, one_of("vjp", "identity", "trained"))
    # For training from scratch: until the weights have had this many updates, times are near the noise, where only
    # images and words tell the action; then LeRobot's, for smooth chunks. None means 0.
    time_sampling_warmup_steps: int | None = option(0, at_least(0), of_the_run=True, small=1500)
    # Weight of a second loss in training where the data has observation.environment_state (simulators): to tell it from
    # what is seen. Policies do not read it. None means 0.
    environment_state_weight: float | None = option(0.0, FINITE, of_the_run=True, small=0.1)
    # Train chunks that begin with up to so many known actions, for real-time chunking. None means 0.
    rtc_training_max_delay: int | None = option(0)

    # Safety on hardware: at most this far from the measured joints, in the robot's units. None or inf bounds nothing.
    max_action_step: float | None = option(None, above(0, "has to be more than 0, or inf for no bound"))
    # Safety on hardware: within the range of the data, widened by this part of it. None or inf bounds nothing.
    action_range_margin: float | None = option(None, at_least(0, "has to be 0 or more, or inf for no bound"))

    # No option: whether `tokenizer_max_length` is a default, so that a checkpoint's own length takes its place.
    takes_length = False
    # No option: optimiser steps so far. It is here because of adapters, with which LeRobot saves a config alone.
    updates = 0
    # No option: sizes and start of the policy, for a model card that LeRobot writes from the config alone.
    card_facts = {}, None  # type: ignore[var-annotated]

    def __post_init__(self) -> None:
        try:
            self._complete()
            self.__dict__["_made"] = True
        except ValueError as error:
            logger.error("%s", error)  # LeRobot's commands say no more than that the options do not make a config
            raise

    def _complete(self) -> None:
        PreTrainedConfig.__post_init__(self)  # not the built-in's, which refuses the small presets
        for name, presets in (("paligemma_variant", PALIGEMMA_PRESETS), ("action_expert_variant", EXPERT_PRESETS)):
            if getattr(self, name) not in presets:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(presets)}")
        self.architecture()  # raises where the two do not go together
        if self.image_resolution is None:
            self.image_resolution = (PALIGEMMA_PRESETS[self.paligemma_variant].vision.image_size,) * 2
        if self.tokenizer_max_length is None:
            self.takes_length = True
            self.tokenizer_max_length = 128 if self.tokenizer == BYTE_TOKENIZER else 48
        self._set_unset({name: x.recipes.get(str(self.recipe)) for name, x in OPTIONS.items()})
        recipes.set_lerobots(self)
        self._check()

    def _set_unset(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_made") and name in {**KINDS, **RULES}:  # also what is set later keeps the rules
            self._check_value(name, value)
        super().__setattr__(name, value)

    def _check_value(self, name: str, value: Any) -> None:
        kind, may_be_none = KINDS.get(name, (None, False))
        if value is None and (may_be_none or name == "compile_mode"):
            return
        rule = RULES.get(name)
        for one in (rule,) if rule is not None and rule.choices else (kind, rule):
            if one is not None and not one.holds(value):
                raise ValueError(f"{name}={value!r} {one.says}")

    def _check(self) -> None:
        """Raises ValueError for an option that breaks its rule, and for options that do not go together."""
        for name in {**KINDS, **RULES}:
            self._check_value(name, getattr(self, name))
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(
                f"n_action_steps={self.n_action_steps} has to be between 1 and chunk_size={self.chunk_size}"
            )
        traceable = self.vlm_quantization != "nf4" and str(self.device).startswith("cuda")  # torch's own products
        if self.vlm_quantization and self.compile_model and not traceable:
            raise ValueError(
                f"compile_model does not go together with vlm_quantization={self.vlm_quantization} on the device "
                f"{self.device}, whose layers nothing can trace: take one of the two"
            )
        if self.optimizer_8bit and self.optimizer_muon:
            raise ValueError("optimizer_8bit and optimizer_muon are two optimizers: set one of them to false")
        PALIGEMMA_PRESETS[self.paligemma_variant].vision.patches(self.image_size)  # raises where there are none
        if not self.min_period < self.max_period:
            raise ValueError(f"min_period={self.min_period} has to be below max_period={self.max_period}")
        if not 0 < self.time_sampling_scale + self.time_sampling_offset < 1 + 1e-6:
            raise ValueError(
                f"time_sampling_scale={self.time_sampling_scale} and time_sampling_offset={self.time_sampling_offset} "
                "have to give times from 0 to 1: their sum is more"
            )
        most = self.rtc_training_max_delay
        if most is not None and not 0 <= most < self.chunk_size:
            raise ValueError(
                f"rtc_training_max_delay={most} has to be from 0 to chunk_size - 1 = {self.chunk_size - 1}: one "
                "action at least has to be learnt"
            )
        if most == 0 and self.rtc_guidance == "trained":
            raise ValueError(
                "rtc_guidance=trained needs a policy that was trained with rtc_training_max_delay: train it so, or "
                "take identity or vjp"
            )

    def architecture(self) -> Architecture:
        """Shapes of the network.

        Raises:
            ValueError: the two presets do not go together.
        """
        return Architecture(
            vlm=PALIGEMMA_PRESETS[self.paligemma_variant],
            expert=EXPERT_PRESETS[self.action_expert_variant],
            state_dim=self.max_state_dim,
            action_dim=self.max_action_dim,
            min_period=self.min_period,
            max_period=self.max_period,
        )

    @property
    def image_size(self) -> int:
        """Side of the square images that the network sees, in pixels."""
        assert self.image_resolution is not None  # __post_init__ has set it
        return self.image_resolution[0]

    @property
    def tokenizer(self) -> str:
        """`text_tokenizer_name`, or the preset's own."""
        if self.text_tokenizer_name is not None:
            return self.text_tokenizer_name
        return BYTE_TOKENIZER if self.paligemma_variant == "tiny" else PALIGEMMA_TOKENIZER

    @property
    def guidance(self) -> str:
        """`rtc_guidance`, or what the policy was trained for."""
        return self.rtc_guidance or ("trained" if self.rtc_training_max_delay else "identity")

    def take_saved(self, saved: dict[str, Any]) -> None:
        """Use what the plugin saved with a checkpoint for the options that are unset and not of the run.

        Args:
            saved: the content of the checkpoint's `lerobot_pi0.json`.
        """
        self._set_unset({name: saved.get(name) for name, x in OPTIONS.items() if not x.of_the_run})

    def resolve(self, saved: dict[str, Any], vlm_is_pretrained: bool) -> None:
        """Give a value to every option that is still unset: the checkpoint's, or else the default.

        Args:
            saved: the content of the checkpoint's `lerobot_pi0.json`; empty without a checkpoint.
            vlm_is_pretrained: whether the VLM's weights are loaded; `train_expert_only` is that by default.

        Raises:
            ValueError: an option that breaks its rule, or options that do not go together.
        """
        self.take_saved(saved)
        if self.text_tokenizer_name is None:
            self.text_tokenizer_name = self.tokenizer
        self._set_unset({name: x.default for name, x in OPTIONS.items()})
        if self.train_expert_only and not vlm_is_pretrained:
            logger.warning(
                "train_expert_only=true, and the VLM that is frozen is random: give it weights with "
                "--policy.pretrained_path or --policy.vlm_path"
            )
        if self.train_expert_only is None:
            self.train_expert_only = vlm_is_pretrained
            logger.info(
                "train_expert_only=%s: the VLM starts from %s weights",
                vlm_is_pretrained,
                "pretrained" if vlm_is_pretrained else "random",
            )
        if not vlm_is_pretrained:
            recipes.advise(self)
        self._check()

    def call_after_save(self, note: Callable[[Path, dict[str, dict[str, Any]]], None]) -> None:
        """Have `note` called with the folder and the content of its files whenever the config is saved."""
        self.__dict__["_after_save"] = note

    def get_optimizer_preset(self) -> AdamWConfig:
        """The recipe's AdamW, with the averages and the 8-bit moments that were asked for."""
        return recipes.optimizer(self, super().get_optimizer_preset())

    def get_scheduler_preset(self) -> LRSchedulerConfig:
        """The recipe's schedule."""
        return recipes.schedule(self, super().get_scheduler_preset())

    @property
    def action_delta_indices(self) -> list[int] | None:  # type: ignore[override]
        """Which actions LeRobot gathers for a sample; none where a sample of the dataset holds its chunk already."""
        return None if self.context_cache else super().action_delta_indices

    def set_dataset_feature_metadata(self, features: dict[str, Any]) -> None:
        """LeRobot tells which features the dataset has, before it builds the policy."""
        if self.context_cache:
            from .training.context_cache import take_features  # it needs this module

            take_features(self, features)
        if self.recipe == "small" and self.pretrained_path is None:
            recipes.take_dims(self, features)

    def to_files(self) -> dict[str, dict[str, Any]]:
        """Content of a checkpoint's config.json, LeRobot's keys alone, and of this plugin's file."""
        options = draccus.encode(self, PreTrainedConfig)
        options["pretrained_revision"] = None  # of `pretrained_path`: LeRobot would ask for it in this repository
        ours = {name: options.pop(name, None) for name in PLUGIN_FIELDS}
        return {CONFIG_NAME: options, PLUGIN_CONFIG_NAME: ours | {"updates": self.updates}}

    def _save_pretrained(self, save_directory: Path) -> None:
        files = self.to_files()
        known = save_directory / PLUGIN_CONFIG_NAME
        if known.is_file():  # options of a checkpoint are changed: where its weights come from stays
            kept = json.loads(known.read_text())
            files[PLUGIN_CONFIG_NAME] |= {name: kept[name] for name in ("start", "base") if name in kept}
        texts = {name: json.dumps(content, indent=4) + "\n" for name, content in files.items()}
        for name, text in texts.items():
            (save_directory / name).write_text(text)
        if (note := self.__dict__.get("_after_save")) is not None:
            note(save_directory, {name: json.loads(text) for name, text in texts.items()})


OPTIONS: dict[str, Option] = {f.name: f.metadata["option"] for f in fields(PI0Config) if "option" in f.metadata}
"""The options that only this plugin has, in the order of their declaration."""

PLUGIN_FIELDS = tuple(sorted(OPTIONS))

UNKNOWN_TO_LEROBOT = (*PLUGIN_FIELDS, "train_expert_only")
"""Fields that LeRobot's own π₀ cannot read: those that it does not have, and one that is True or False there."""


def encode_set(config: PI0Config, declared_type: type | None = None) -> dict[str, Any]:
    """The config as draccus writes it, without the options that nobody has set and LeRobot's own π₀ cannot read.

    So a train_config.json without options of this plugin is LeRobot's, as `lerobot-train --job.target` sends it.
    """
    options = draccus.parsers.encoding.encode_choice(config, PreTrainedConfig)
    return {k: v for k, v in options.items() if not (k in UNKNOWN_TO_LEROBOT and v is None)}


KINDS = kinds_of(PI0Config)
"""By option: the rule of its kind, and whether it may be None."""

RULES = {name: x.rule for name, x in OPTIONS.items() if x.rule is not None} | LEROBOTS
"""Rules of single options, LeRobot's included."""


def choices(name: str) -> tuple[str, ...]:
    """All values of an option that has few; none for another."""
    return RULES[name].choices if name in RULES else ()


def help_of(name: str) -> str:
    """The help text of an option, as `--help` shows it: the comment above its field."""
    return " ".join(get_attribute_docstring(PI0Config, name).comment_above.split())
