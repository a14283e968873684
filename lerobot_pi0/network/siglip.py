"""SigLIP's vision tower (transformers') and the linear projector that makes image tokens of its features.

Axes: N images (cameras of all samples), C channels, P patches, W width of the VLM.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from einops import rearrange
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from ..kernels.linear import Linear, draw_normal, gelu_linear, use_linear
from .attention import ATTENTION
from .sizes import Vision


class ConvolutionalStem(nn.Module):
    """Patches through several convolutions in place of one; what small towers begin with.

    One linear map of 16 x 16 pixels tells little about where in it a thing is, and the two layers of a small tower
    have no room to make up for it (measured in docs/learning.md; Xiao et al. 2021, arXiv 2106.14881). Pictures are
    brought to zero mean and unit variance, since what differs between patches is small beside what they share.
    """

    def __init__(self, cfg: Vision) -> None:
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
        """SigLIP asks its patch embedding for the dtype of its weights."""
        return self.layers[0].weight  # type: ignore[return-value]

    def forward(self, images_NCHW: Tensor) -> Tensor:
        x = self.layers(F.instance_norm(images_NCHW))
        return rearrange(self.norm(rearrange(x, "n c h w -> n h w c")), "n h w c -> n c h w")


class MLP(nn.Module):
    """SigLIP's MLP, which transformers computes in the same way but for the fusion."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu_linear(self.fc1, x))


def siglip_config(cfg: Vision, image_size: int, **more: Any) -> SiglipVisionConfig:
    """transformers' name for such a tower, without the pooling head, which PaliGemma does not have."""
    return SiglipVisionConfig(
        hidden_size=cfg.width,
        num_hidden_layers=cfg.depth,
        intermediate_size=cfg.mlp_dim,
        num_attention_heads=cfg.heads,
        patch_size=cfg.patch_size,
        image_size=image_size,
        hidden_act="gelu_pytorch_tanh",
        vision_use_head=False,
        **more,
    )


def vision_tower(cfg: Vision, image_size: int) -> SiglipVisionModel:
    """A SigLIP tower, with the small presets' stem and our MLP.

    Raises:
        ValueError: the image does not divide into patches.
    """
    if image_size < cfg.patch_size:
        raise ValueError(f"images of {image_size} pixels are smaller than one patch of {cfg.patch_size}")
    tower = SiglipVisionModel(siglip_config(cfg, image_size, attn_implementation=ATTENTION))
    if cfg.stem:
        tower.vision_model.embeddings.patch_embedding = ConvolutionalStem(cfg)
    for layer in tower.vision_model.encoder.layers:
        layer.mlp = MLP(cfg.width, cfg.mlp_dim)
    use_linear(tower)
    return tower


def sincos_positions(side: int, width: int) -> Tensor:
    """2D sine-cosine position embedding (side², W), SigLIP's start in big_vision: `posemb_sincos_2d`."""
    omega = 10_000.0 ** -torch.linspace(0, 1, width // 4)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.flatten()[:, None] * omega for axis in (x, y)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)


@torch.no_grad()
def initialise(tower: SiglipVisionModel) -> None:
    """Set what the linear layers' common initialisation does not cover: convolutions, positions, norms."""
    embeddings = tower.vision_model.embeddings
    side = math.isqrt(embeddings.num_positions)
    embeddings.position_embedding.weight.copy_(sincos_positions(side, embeddings.embed_dim))
    for module in tower.modules():
        if isinstance(module, nn.Conv2d):
            draw_normal(module.weight, 1 / math.sqrt(module.weight[0].numel()))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def image_tokens(tower: SiglipVisionModel, projector: nn.Linear, images_NCHW: Tensor) -> Tensor:
    """Tokens of the VLM's width, one a patch: (N, P, W). Images are in [-1, 1]."""
    return projector(tower(images_NCHW).last_hidden_state)
