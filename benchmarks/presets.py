"""Sizes of π₀ for benchmarks and tests: what "gemma_2b" and "gemma_300m" mean, in our presets and in LeRobot's π₀.

LeRobot's built-in has its sizes written into its code; here they are patched.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import lerobot.policies.pi0.modeling_pi0 as builtin
import pytest

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


@dataclass(frozen=True)
class Size:
    """Shapes of both policies. Eight query heads always: LeRobot's attention has that number written into it."""

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


def set_presets(patch: pytest.MonkeyPatch, size: Size) -> None:
    """Let "gemma_2b" and "gemma_300m" mean this size, until the patch is undone."""
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
    with pytest.MonkeyPatch.context() as patch:
        set_presets(patch, size)
        yield
