"""Sizes of π₀'s networks as frozen dataclasses, with named presets. Without torch, because the config imports them.

Sources: openpi `models/gemma.py: get_config`, big_vision `models/vit.py: decode_variant` (So400m/14).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class GemmaSize:
    """Size of a Gemma decoder. Multi-query attention: the `heads` query heads share one key/value head."""

    width: int
    depth: int
    mlp_dim: int
    heads: int
    head_dim: int


@dataclass(frozen=True)
class VisionSize:
    """Size of a SigLIP vision tower. `image_size`: side of the images that the preset is made for, in pixels.

    `stem`: channels of the convolutions that make the patches of small towers; () for SigLIP's single convolution.
    """

    width: int
    depth: int
    mlp_dim: int
    heads: int
    patch_size: int
    image_size: int
    stem: tuple[int, ...] = ()

    def patches(self, side: int) -> int:
        """How many patches an image of this side has in a row.

        Raises:
            ValueError: none, or the stem would make a part of a patch: its convolutions round up.
        """
        patch = self.patch_size
        whole, made = side // patch, side // (patch // 2 ** len(self.stem))
        for _ in self.stem:
            made = -(-made // 2)
        if whole < 1:
            raise ValueError(f"images of {side} pixels are smaller than one patch of {patch}")
        if self.stem and made != whole:
            raise ValueError(
                f"images of {side} pixels are not made of whole patches of {patch}: take {whole * patch} or "
                f"{(whole + 1) * patch} (image_resolution)"
            )
        return whole


@dataclass(frozen=True)
class PaliGemmaSize:
    """The VLM: a vision tower, a linear projector and a Gemma with a vocabulary."""

    vision: VisionSize
    gemma: GemmaSize
    vocab_size: int


@dataclass(frozen=True)
class Architecture:
    """All that the network's shapes depend on. States and actions are zero-padded to `state_dim` and `action_dim`."""

    vlm: PaliGemmaSize
    expert: GemmaSize
    state_dim: int = 32
    action_dim: int = 32
    min_period: float = 4e-3
    max_period: float = 4.0

    def __post_init__(self) -> None:
        vlm, expert = self.vlm.gemma, self.expert
        if (vlm.depth, vlm.head_dim) != (expert.depth, expert.head_dim):
            raise ValueError(
                "the expert attends to the VLM layer by layer, so depth and head_dim must be equal; "
                f"got {vlm.depth} x {vlm.head_dim} for the VLM, {expert.depth} x {expert.head_dim} for the expert"
            )


GEMMA_2B = GemmaSize(width=2048, depth=18, mlp_dim=16_384, heads=8, head_dim=256)
GEMMA_300M = GemmaSize(width=1024, depth=18, mlp_dim=4096, heads=8, head_dim=256)
SO400M = VisionSize(width=1152, depth=27, mlp_dim=4304, heads=16, patch_size=14, image_size=224)

PALIGEMMA_VOCAB = 257_152  # 256 000 of Gemma, 1 024 locations, 128 segmentations
BYTE_VOCAB = 384  # transformers' ByT5Tokenizer: 3 special tokens, 256 bytes, 125 sentinels

PALIGEMMA_PRESETS = {
    "gemma_2b": PaliGemmaSize(SO400M, GEMMA_2B, PALIGEMMA_VOCAB),
    "gemma_300m": PaliGemmaSize(SO400M, GEMMA_300M, PALIGEMMA_VOCAB),
    "tiny": PaliGemmaSize(
        VisionSize(width=128, depth=2, mlp_dim=256, heads=4, patch_size=16, image_size=64, stem=(48, 64)),
        GemmaSize(width=128, depth=3, mlp_dim=256, heads=4, head_dim=32),
        BYTE_VOCAB,
    ),
}
EXPERT_PRESETS = {
    "gemma_300m": GEMMA_300M,
    "gemma_2b": GEMMA_2B,
    "tiny": GemmaSize(width=64, depth=3, mlp_dim=128, heads=4, head_dim=32),
}
