"""SigLIP's vision tower (transformers') and the linear projector that makes image tokens of its features.

Axes: N images (cameras of all samples), C channels, P patches, W width of the VLM.
"""

import math

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from .architecture import Vision
from .linear import use_linear


def vision_tower(cfg: Vision, image_size: int) -> SiglipVisionModel:
    """A SigLIP tower without the pooling head, which PaliGemma does not have.

    Raises:
        ValueError: the image does not divide into patches.
    """
    if image_size < cfg.patch_size:
        raise ValueError(f"images of {image_size} pixels are smaller than one patch of {cfg.patch_size}")
    siglip = SiglipVisionConfig(
        hidden_size=cfg.width,
        num_hidden_layers=cfg.depth,
        intermediate_size=cfg.mlp_dim,
        num_attention_heads=cfg.heads,
        patch_size=cfg.patch_size,
        image_size=image_size,
        hidden_act="gelu_pytorch_tanh",
        vision_use_head=False,
        attn_implementation="sdpa",
    )
    tower = SiglipVisionModel(siglip)
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
    """Set what the linear layers' common initialisation does not cover: patches, positions, norms."""
    embeddings = tower.vision_model.embeddings
    weight, bias = embeddings.patch_embedding.parameters()
    nn.init.normal_(weight, std=1 / math.sqrt(weight[0].numel()))
    nn.init.zeros_(bias)
    side = math.isqrt(embeddings.num_positions)
    embeddings.position_embedding.weight.copy_(sincos_positions(side, embeddings.embed_dim))
    for module in tower.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def image_tokens(tower: SiglipVisionModel, projector: nn.Linear, images_NCHW: Tensor) -> Tensor:
    """Tokens of the VLM's width, one a patch: (N, P, W). Images are in [-1, 1]."""
    return projector(tower(images_NCHW).last_hidden_state)
