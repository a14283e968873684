"""A frozen VLM as a CUDA graph: in training it asks for a third of a step's launches, and has no gradient.

Axes: B batch, S tokens of the prefix, L prompt tokens, D head dim.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..network.attention import KVCache
from ..network.pi0 import PI0, Observation
from .cuda_attention import attention_order
from .cuda_graphs import CudaGraphs
from .cuda_layers import on_gpu

LARGEST_PREFIX = 4096
"""Tokens of a batch above which kernels are long enough for the host to keep up, and a graph's memory, which the
backward pass cannot use, is large."""


def with_prefix(graphs: CudaGraphs, model: PI0, obs: Observation) -> Observation:
    """The observation with the keys and values of its prefix, computed by a graph; unchanged if it has them already
    (cached contexts), the VLM is trained, or the batch is too large."""
    if obs.prefix is not None or not on_gpu(obs.state_BA.device):
        return obs
    if _tokens(model, obs) > LARGEST_PREFIX or not _is_frozen(model.paligemma):
        return obs

    def stacked(images: Tensor, tokens: Tensor, mask: Tensor, padded: bool) -> Tensor:
        seen = Observation(images, tokens, mask, obs.state_BA, padded)
        with torch.no_grad(), attention_order(images.device):
            return torch.stack([x for layer in model.encode_prefix(seen)[0] for x in layer])

    flat = graphs(model.paligemma, stacked, (obs.images_BNCHW, obs.tokens_BL, obs.token_mask_BL, obs.padded))
    return obs._replace(prefix=[KVCache(*pair) for pair in zip(flat[::2], flat[1::2], strict=True)])


def _tokens(model: PI0, obs: Observation) -> int:
    batch, cameras = obs.images_BNCHW.shape[:2]
    patches = len(model.vision.vision_model.embeddings.position_embedding.weight)
    return batch * (cameras * patches + obs.tokens_BL.shape[1])


def _is_frozen(vlm: Any) -> bool:
    """Whether nothing is trained, and each process has all of the weights (FSDP gathers them layer by layer)."""
    return all(type(p) is nn.Parameter and not p.requires_grad for p in vlm.parameters()) and not any(
        type(m).__name__.startswith(("FSDP", "FullySharded")) for m in vlm.modules()
    )
