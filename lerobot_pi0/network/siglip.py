"""SigLIP's vision tower, without the pooling head that PaliGemma does not use.

Axes: N images (cameras of all samples), C channels, P patches, H heads, D head dim, W width.

Parameter names are those of transformers' `SiglipVisionModel`, which published checkpoints use.
Sources: big_vision `models/vit.py`, transformers `models/siglip`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .sizes import VisionSize

LAYER_NORM_EPS = 1e-6


class ConvolutionalStem(nn.Module):
    """Patch embedding by several convolutions instead of one, for small towers.

    One linear map of 16 x 16 pixels says little about where in the patch an object is, and the two layers of a small
    tower cannot compensate for that (measured in docs/learning.md; Xiao et al. 2021, arXiv 2106.14881). Each image is
    normalised to zero mean and unit variance, because patches differ little from their common mean.
    """

    def __init__(self, cfg: VisionSize) -> None:
        super().__init__()
        first, *rest = cfg.stem
        stride = cfg.patch_size // 2 ** len(cfg.stem)
        layers: list[nn.Module] = [nn.Conv2d(3, first, stride, stride)]
        for before, after in zip(cfg.stem, [*rest, cfg.width], strict=True):
            layers += [nn.SiLU(), nn.Conv2d(before, after, 3, stride=2, padding=1)]
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(cfg.width)

    @property
    def weight(self) -> Tensor:
        """The weight of the first convolution; images are cast to its dtype, as with a single convolution."""
        return self.layers[0].weight  # type: ignore[return-value]

    def forward(self, images_NCHW: Tensor) -> Tensor:
        x = self.layers(F.instance_norm(images_NCHW))
        return rearrange(self.norm(rearrange(x, "n c h w -> n h w c")), "n h w c -> n c h w")


class Embeddings(nn.Module):
    """Patch embeddings plus position embeddings."""

    def __init__(self, cfg: VisionSize, image_size: int) -> None:
        super().__init__()
        patch = cfg.patch_size
        self.patch_embedding = ConvolutionalStem(cfg) if cfg.stem else nn.Conv2d(3, cfg.width, patch, patch)
        self.position_embedding = nn.Embedding(cfg.patches(image_size) ** 2, cfg.width)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        x = self.patch_embedding(images_NCHW.to(self.patch_embedding.weight.dtype))
        x_NPW = rearrange(x, "n w i j -> n (i j) w")
        return x_NPW + self.position_embedding(torch.arange(x_NPW.shape[1], device=x.device))


class Attention(nn.Module):
    """Multi-head attention in which every patch sees every other."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, cfg: VisionSize) -> None:
        super().__init__()
        self.heads = cfg.heads
        self.k_proj = nn.Linear(cfg.width, cfg.width)  # before q_proj: optimizers number parameters in order
        self.v_proj = nn.Linear(cfg.width, cfg.width)
        self.q_proj = nn.Linear(cfg.width, cfg.width)
        self.out_proj = nn.Linear(cfg.width, cfg.width)

    def forward(self, x_NPW: Tensor) -> Tensor:
        q, k, v = (
            rearrange(proj(x_NPW), "n p (h d) -> n h p d", h=self.heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(rearrange(self.attend(q, k, v), "n h p d -> n p (h d)"))


class MLP(nn.Module):
    """Two linear layers with tanh-GELU between them."""

    def __init__(self, cfg: VisionSize) -> None:
        super().__init__()
        self.fc1 = nn.Linear(cfg.width, cfg.mlp_dim)
        self.fc2 = nn.Linear(cfg.mlp_dim, cfg.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiglipEncoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). FSDP configurations know this class by transformers' name."""

    def __init__(self, cfg: VisionSize) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(cfg.width, eps=LAYER_NORM_EPS)
        self.self_attn = Attention(cfg)
        self.layer_norm2 = nn.LayerNorm(cfg.width, eps=LAYER_NORM_EPS)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionTower(nn.Module):
    """SigLIP's vision tower: one feature vector per image patch, after the last norm.

    Raises:
        ValueError: an image is smaller than a patch, or the stem cannot cut it into patches.
    """

    vision_model: Any

    def __init__(self, cfg: VisionSize, image_size: int) -> None:
        super().__init__()
        self.vision_model = nn.Module()
        self.vision_model.embeddings = Embeddings(cfg, image_size)
        self.vision_model.encoder = nn.Module()
        self.vision_model.encoder.layers = nn.ModuleList(SiglipEncoderLayer(cfg) for _ in range(cfg.depth))
        self.vision_model.post_layernorm = nn.LayerNorm(cfg.width, eps=LAYER_NORM_EPS)
        self.gradient_checkpointing = False

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """(N, P, W). Images are in [-1, 1]."""
        x = self.vision_model.embeddings(images_NCHW)
        for layer in self.vision_model.encoder.layers:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return self.vision_model.post_layernorm(x)
