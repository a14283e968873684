"""Random initial weights of a network that starts without a checkpoint.

Linear layers keep unit variance (LeCun normal), norms start as the identity, position embeddings as in SigLIP.
"""

import math

import torch
from torch import Tensor, nn

from .gemma import RMSNorm
from .pi0 import PI0
from .siglip import VisionTower

QUERY_GAIN, OUTPUT_GAIN = 3.0, 2.0
"""Factors on the weights of attention's queries and output, compared with weights that keep unit variance."""

DRAWN_AT_ONCE = 2**15
"""How many numbers are drawn and rounded at a time."""


def draw_normal(x: Tensor, std: float) -> None:
    """Fill `x` with draws from N(0, std²). On a CPU, bfloat16 numbers are drawn in float32 and then rounded.

    torch's own bfloat16 draws on a CPU come from uniform numbers of 8 bits, and never exceed 3.4 standard deviations.
    """
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        nn.init.normal_(x, std=std)
        return
    for part in x.view(-1).split(DRAWN_AT_ONCE):
        part.copy_(torch.empty(len(part)).normal_(std=std))


def sincos_positions(side: int, width: int) -> Tensor:
    """2D sine-cosine position embedding (side², W), as SigLIP starts in big_vision (`posemb_sincos_2d`)."""
    omega = 10_000.0 ** -torch.linspace(0, 1, width // 4)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.flatten()[:, None] * omega for axis in (x, y)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)


@torch.no_grad()
def initialise(network: PI0) -> None:
    """Draw all weights.

    The weights of attention's queries and output start larger (`QUERY_GAIN`, `OUTPUT_GAIN`). With unit variance, each
    token would get an almost even mean over a hundred others, and a small network would take far longer to learn which
    token matters (docs/learning.md). Weights on the `meta` device stay there: a checkpoint will fill them.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            draw_normal(module.weight, 1 / math.sqrt(module.in_features))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.zeros_(module.weight)
    for layer in (*network.vlm.layers, *network.expert.layers):
        layer.self_attn.q_proj.weight.mul_(QUERY_GAIN)
        layer.self_attn.o_proj.weight.mul_(OUTPUT_GAIN)
    draw_normal(network.vlm.embed_tokens.weight, 1 / math.sqrt(network.vlm.cfg.width))
    initialise_vision(network.vision)


@torch.no_grad()
def initialise_vision(tower: VisionTower) -> None:
    """Initialise the vision tower's convolutions, positions and norms; `initialise` draws its linear layers."""
    positions = tower.vision_model.embeddings.position_embedding.weight
    positions.copy_(sincos_positions(math.isqrt(len(positions)), positions.shape[1]))
    for module in tower.modules():
        if isinstance(module, nn.Conv2d):
            draw_normal(module.weight, 1 / math.sqrt(module.weight[0].numel()))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
