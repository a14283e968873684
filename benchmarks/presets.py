"""Sizes, features and batches for benchmarks and tests, for this π₀ and for LeRobot's.

LeRobot's built-in has the sizes of "gemma_2b" and "gemma_300m" in its code. They are patched here, and in our presets
too.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import lerobot.policies.pi0.modeling_pi0 as builtin
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE

import lerobot_pi0.configuration_pi0 as ours
from lerobot_pi0.network.sizes import (
    GEMMA_2B,
    GEMMA_300M,
    PALIGEMMA_VOCAB,
    SO400M,
    GemmaSize,
    PaliGemmaSize,
    VisionSize,
)

CAMERAS = ("observation.images.front", "observation.images.left", "observation.images.wrist")
DIMS = 6


@dataclass(frozen=True)
class Size:
    """Shapes of both policies. There are always eight query heads, because LeRobot's code has this number in it."""

    vlm: PaliGemmaSize
    expert: GemmaSize


SIZES = {
    "small": Size(
        PaliGemmaSize(
            VisionSize(width=64, depth=2, mlp_dim=128, heads=4, patch_size=8, image_size=64),
            GemmaSize(width=128, depth=3, mlp_dim=512, heads=8, head_dim=16),
            vocab_size=512,
        ),
        GemmaSize(width=64, depth=3, mlp_dim=128, heads=8, head_dim=16),
    ),
    "medium": Size(
        PaliGemmaSize(
            VisionSize(width=384, depth=12, mlp_dim=1536, heads=6, patch_size=14, image_size=224),
            GemmaSize(width=768, depth=6, mlp_dim=6144, heads=8, head_dim=128),
            vocab_size=32_768,
        ),
        GemmaSize(width=384, depth=6, mlp_dim=1536, heads=8, head_dim=128),
    ),
    "full": Size(PaliGemmaSize(SO400M, GEMMA_2B, PALIGEMMA_VOCAB), GEMMA_300M),
}


class Patches:
    """The part of pytest's `monkeypatch` that is needed here: a machine that only measures has no pytest."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack

    def setattr(self, target: Any, name: str, value: Any) -> None:
        self._stack.enter_context(mock.patch.object(target, name, value))

    def setitem(self, mapping: Any, key: str, value: Any) -> None:
        self._stack.enter_context(mock.patch.dict(mapping, {key: value}))


def set_presets(patch: Any, size: Size) -> None:
    """Let "gemma_2b" and "gemma_300m" mean this size, until the patch (`Patches` or pytest's) is undone."""
    patch.setitem(ours.PALIGEMMA_PRESETS, "gemma_2b", size.vlm)
    patch.setitem(ours.EXPERT_PRESETS, "gemma_300m", size.expert)
    stacks = {"gemma_2b": size.vlm.gemma, "gemma_300m": size.expert}
    paligemma, expert = builtin.PaliGemmaForConditionalGenerationWithPiGemma, builtin.PiGemmaForCausalLM

    def gemma_config(variant: str) -> builtin.GemmaConfig:
        stack = stacks[variant]
        return builtin.GemmaConfig(stack.width, stack.depth, stack.mlp_dim, stack.heads, 1, stack.head_dim)

    def make_paligemma(config):
        vision, preset = config.vision_config, size.vlm.vision
        vision.hidden_size, vision.num_hidden_layers = preset.width, preset.depth
        vision.intermediate_size, vision.num_attention_heads = preset.mlp_dim, preset.heads
        vision.patch_size, vision.projection_dim = preset.patch_size, size.vlm.gemma.width
        config.text_config.vocab_size = size.vlm.vocab_size
        return paligemma(config)

    def make_expert(config):
        config.vocab_size = size.vlm.vocab_size
        return expert(config)

    patch.setattr(builtin, "get_gemma_config", gemma_config)
    patch.setattr(builtin, "PaliGemmaForConditionalGenerationWithPiGemma", make_paligemma)
    patch.setattr(builtin, "PiGemmaForCausalLM", make_expert)


@contextlib.contextmanager
def presets(size: Size) -> Iterator[None]:
    """Let the presets mean this size for a while."""
    with contextlib.ExitStack() as stack:
        set_presets(Patches(stack), size)
        yield


def features(cameras=CAMERAS, dims: int = DIMS, size: int = 32) -> dict:
    """Config arguments for a robot with these cameras and joints."""
    visual = {key: PolicyFeature(FeatureType.VISUAL, (3, size, size)) for key in cameras}
    return {
        "input_features": visual | {OBS_STATE: PolicyFeature(FeatureType.STATE, (dims,))},
        "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (dims,))},
    }


def make_batch(
    seed: int = 0, batch_size: int = 2, cameras=CAMERAS, prompt=(9, 5), dims: int = DIMS, size: int = 32,
    chunk: int = 50, length: int = 12, vocab_size: int = 300,
) -> dict:  # fmt: skip
    """A random batch, as the preprocessor would make it, for either policy.

    Args:
        prompt: numbers of tokens of the prompts, repeated over the batch; the rest of `length` is padding.
    """
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([prompt[i % len(prompt)] for i in range(batch_size)])
    batch = {key: torch.rand(batch_size, 3, size, size, generator=draw) for key in cameras}
    return batch | {
        OBS_STATE: torch.randn(batch_size, dims, generator=draw),
        ACTION: torch.randn(batch_size, chunk, dims, generator=draw),
        OBS_LANGUAGE_TOKENS: torch.randint(1, vocab_size, (batch_size, length), generator=draw),
        OBS_LANGUAGE_ATTENTION_MASK: torch.arange(length) < lengths[:, None],
    }
