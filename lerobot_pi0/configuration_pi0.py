"""PI0Config: LeRobot's own π₀ options, and the few that only this plugin has.

A checkpoint's `config.json` holds LeRobot's keys alone, so that the built-in can parse it; what only this
plugin knows is kept beside it in `lerobot_pi0.json`. LeRobot reads `config.json` through its base class, where
no method of ours is called: an option of the plugin is None while nobody has set it, and `PI0Policy` settles
it from the checkpoint's file (`settle`).
"""

import json
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import draccus
from huggingface_hub.constants import CONFIG_NAME
from lerobot.configs import PreTrainedConfig
from lerobot.optim import AdamWConfig, LRSchedulerConfig
from lerobot.policies.pi0.configuration_pi0 import PI0Config as BuiltinPI0Config
from lerobot.utils.constants import ACTION

from .network.sizes import EXPERT_PRESETS, PALIGEMMA_PRESETS, Architecture
from .training.optimizers import (
    AdamW8bitConfig,
    AveragedAdamW8bitConfig,
    AveragedAdamWConfig,
    WarmupCosineConfig,
)

logger = logging.getLogger(__name__)

PLUGIN_CONFIG_NAME = "lerobot_pi0.json"
PALIGEMMA_TOKENIZER = "google/paligemma-3b-pt-224"
BYTE_TOKENIZER = "bytes"
"""Name of transformers' ByT5 tokenizer, which is made in place: no vocabulary to download."""

DTYPES = ("bfloat16", "float32")
SOLVERS = ("euler", "midpoint", "heun", "adaptive")
GUIDANCE = ("vjp", "identity", "trained")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
RECIPES = ("lerobot", "openpi")
QUANTIZATION = ("int8", "nf4")
OF_THE_RUN = ("ema_decay", "augment_images", "mask_padded_actions", "optimizer_8bit", "recipe", "vlm_quantization")
"""Options that a checkpoint remembers, but does not hand on to the runs that begin with it."""


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
    text_tokenizer_name: str | None = None
    # PaliGemma (transformers' format; Hub id or folder) whose weights a policy built from scratch takes for its VLM.
    vlm_path: str | None = None
    # Noise and time draws per observation in training; they share one pass over the images. None means 1.
    flow_samples: int | None = None
    # Decay of the average of the trained weights that is deployed; 0 deploys the weights. None means 0.
    ema_decay: float | None = None
    # Keep the optimizer's moments in 8 bits: a quarter of their memory, by bitsandbytes. None means False.
    optimizer_8bit: bool | None = None
    # openpi's augmentation of the images in training. None means False.
    augment_images: bool | None = None
    # Leave steps after the end of an episode out of the loss. None means False.
    mask_padded_actions: bool | None = None
    # Strip prompts and put spaces for underscores and line breaks, as openpi does. None: as the checkpoint, or False.
    clean_prompts: bool | None = None
    # "openpi" takes its schedule, weight decay, average, augmentation and prompts as defaults. None means "lerobot".
    recipe: str | None = None
    # Put the tokenizer's files into checkpoints, for robots without a network. None means True.
    save_tokenizer: bool | None = None
    # Write only the trained weights, and which checkpoint the frozen ones come from. None means False.
    save_expert_only: bool | None = None
    # How noise becomes actions: euler, midpoint, heun or adaptive, in num_inference_steps steps. None means euler.
    solver: str | None = None
    # Error per step of the adaptive solver, root mean square in units of normalised actions. None means 0.01.
    solver_tolerance: float | None = None
    # Rounds a frozen VLM when it is loaded. "int8": faster and smaller, less exact; "nf4": smaller still, slower, less
    # exact still. None rounds nothing.
    vlm_quantization: str | None = None
    # Real-time chunking: vjp, identity or trained. None takes trained after rtc_training_max_delay, or else identity.
    rtc_guidance: str | None = None
    # Train chunks that begin with up to so many known actions, for real-time chunking. None means 0.
    rtc_training_max_delay: int | None = None

    # Safety on hardware: at most this far from the measured joints, in the robot's units. None or inf bounds nothing.
    max_action_step: float | None = None
    # Safety on hardware: within the range of the data, widened by this part of it. None or inf bounds nothing.
    action_range_margin: float | None = None

    # No option: optimiser steps so far. It is here because of adapters, with which LeRobot saves a config alone.
    updates = 0

    def __post_init__(self) -> None:
        try:
            self._complete()
        except ValueError as error:
            logger.error("%s", error)  # LeRobot's commands say no more than that the options do not make a config
            raise

    def _complete(self) -> None:
        PreTrainedConfig.__post_init__(self)  # not the built-in's, which refuses the small presets
        for name, presets in (
            ("paligemma_variant", PALIGEMMA_PRESETS),
            ("action_expert_variant", EXPERT_PRESETS),
        ):
            if getattr(self, name) not in presets:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(presets)}")
        self.architecture()  # raises where the two do not go together
        if self.image_resolution is None:
            self.image_resolution = (PALIGEMMA_PRESETS[self.paligemma_variant].vision.image_size,) * 2
        if self.tokenizer_max_length is None:
            self.tokenizer_max_length = 128 if self.tokenizer == BYTE_TOKENIZER else 48
        if self.recipe == "openpi":
            self.ema_decay = 0.99 if self.ema_decay is None else self.ema_decay
            self.augment_images = True if self.augment_images is None else self.augment_images
            self.clean_prompts = True if self.clean_prompts is None else self.clean_prompts
        self._check()

    def _check(self) -> None:
        if tuple(self.image_resolution or ()) != (self.image_size,) * 2:
            raise ValueError(f"image_resolution has to be square, got {self.image_resolution}")
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(
                f"n_action_steps={self.n_action_steps} has to be between 1 and chunk_size={self.chunk_size}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}")
        for name in ("num_inference_steps", "tokenizer_max_length", "max_state_dim", "max_action_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} has to be at least 1")
        if self.flow_samples is not None and self.flow_samples < 1:
            raise ValueError(f"flow_samples={self.flow_samples} has to be at least 1")
        if self.max_action_step is not None and not self.max_action_step > 0:
            raise ValueError(f"max_action_step={self.max_action_step} has to be more than 0, or inf for no bound")
        if self.action_range_margin is not None and not self.action_range_margin >= 0:
            raise ValueError(f"action_range_margin={self.action_range_margin} has to be 0 or more, or inf for no bound")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} has to be at least 0 and below 1; openpi's is 0.99")
        if self.recipe not in (None, *RECIPES):
            raise ValueError(f"recipe={self.recipe!r} is not one of {', '.join(RECIPES)}")
        self._check_control()

    def _check_control(self) -> None:
        for name, known in (
            ("solver", SOLVERS),
            ("rtc_guidance", GUIDANCE),
            ("compile_mode", COMPILE_MODES),
            ("vlm_quantization", QUANTIZATION),
        ):
            if getattr(self, name) not in (None, *known):
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.solver_tolerance is not None and not self.solver_tolerance > 0:
            raise ValueError(f"solver_tolerance={self.solver_tolerance} has to be more than 0")
        if self.vlm_quantization is not None and self.compile_model:
            raise ValueError(
                "compile_model does not go together with vlm_quantization, whose layers nothing can trace: take one "
                "of the two"
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

    def inherit(self, saved: dict[str, Any]) -> None:
        """Take over what the plugin saved with a checkpoint, where it is unset here and not the run's own."""
        for name in PLUGIN_FIELDS:
            if getattr(self, name) is None and name not in OF_THE_RUN:
                setattr(self, name, saved.get(name))

    def settle(self, saved: dict[str, Any], vlm_is_pretrained: bool) -> None:
        """Give a value to every option that is still unset: the checkpoint's, or else the default."""
        self.inherit(saved)
        if self.text_tokenizer_name is None:
            self.text_tokenizer_name = self.tokenizer
        for name, default in DEFAULTS.items():
            if getattr(self, name) is None:
                setattr(self, name, default)
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
        self._check()

    def get_optimizer_preset(self) -> AdamWConfig:
        """LeRobot's; openpi's recipe hardly decays weights, and averages have to travel with the optimizer."""
        preset = super().get_optimizer_preset()
        if self.recipe == "openpi" and preset.weight_decay == BuiltinPI0Config.optimizer_weight_decay:
            preset.weight_decay = 1e-10
        if self.optimizer_8bit:
            return (AveragedAdamW8bitConfig if self.ema_decay else AdamW8bitConfig)(**vars(preset))
        return AveragedAdamWConfig(**vars(preset)) if self.ema_decay else preset

    def get_scheduler_preset(self) -> LRSchedulerConfig:
        """LeRobot's, or openpi's: the same numbers, but never rescaled, and the decay begins after the warm-up."""
        preset = super().get_scheduler_preset()
        return WarmupCosineConfig(**vars(preset)) if self.recipe == "openpi" else preset

    def to_files(self) -> dict[str, dict[str, Any]]:
        """Content of a checkpoint's config.json, LeRobot's keys alone, and of this plugin's file."""
        options = draccus.encode(self, PreTrainedConfig)
        ours = {name: options.pop(name) for name in PLUGIN_FIELDS}
        return {CONFIG_NAME: options, PLUGIN_CONFIG_NAME: ours | {"updates": self.updates}}

    def _save_pretrained(self, save_directory: Path) -> None:
        for name, content in self.to_files().items():
            (save_directory / name).write_text(json.dumps(content, indent=4) + "\n")


PLUGIN_FIELDS = tuple(sorted({f.name for f in fields(PI0Config)} - {f.name for f in fields(BuiltinPI0Config)}))

DEFAULTS = {
    "flow_samples": 1,
    "save_expert_only": False,
    "save_tokenizer": True,
    "solver": "euler",
    "solver_tolerance": 1e-2,
    "rtc_training_max_delay": 0,
    "ema_decay": 0.0,
    "augment_images": False,
    "clean_prompts": False,
    "mask_padded_actions": False,
    "optimizer_8bit": False,
    "recipe": "lerobot",
}
"""What an option of the plugin means that nobody has set."""


def dim_name(config: PI0Config, key: str, i: int) -> str:
    """What the dataset calls a dimension of a feature, or its number."""
    names = (config.action_feature_names or []) if key == ACTION else []
    return names[i] if i < len(names) else f"{key}[{i}]"
