"""Attention of the VLM, the vision tower and the action expert: one head at a time, or all as a batch.

Axes: B batch, H heads, Q queries, S keys, D head dim.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import AttentionInterface

from .linear import infers_fast

SCORES = 2**20
"""Numbers of a block of scores: what fits into the cache with its softmax."""


def attention(q_BQD: Tensor, k_BSD: Tensor, v_BSD: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q·k / √D + mask)·v: (B, Q, D). The mask is additive, (B, 1 or Q, S).

    torch's fused attention multiplies bfloat16 at a fifth of its products' rate on CPUs. Where those are fast, the
    three steps are written out, a block of queries at a time: scores are rounded to bfloat16, as they are in LeRobot's
    π₀, and their softmax is float32.
    """
    mask = None if mask is None else mask.to(q_BQD.dtype)
    if not infers_fast(q_BQD, k_BSD, v_BSD):
        q, k, v = (x[:, None] for x in (q_BQD, k_BSD, v_BSD))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None])[:, 0]
    keys, scale = k_BSD.transpose(1, 2), q_BQD.shape[-1] ** -0.5
    mask = q_BQD.new_zeros(1, 1, 1) if mask is None else mask
    out = torch.empty_like(q_BQD)
    rows = max(1, SCORES // (len(k_BSD) * k_BSD.shape[1]))
    for start in range(0, q_BQD.shape[1], rows):
        block = slice(start, start + rows)
        scores = torch.baddbmm(mask if mask.shape[1] == 1 else mask[:, block], q_BQD[:, block], keys, alpha=scale)
        out[:, block] = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v_BSD.dtype) @ v_BSD
    return out


def of_heads(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **_: Any
) -> tuple[Tensor, None]:
    """The same as transformers' modules call it: from (B, H, Q, D) to (B, Q, H, D), without a mask."""
    if not infers_fast(query, key, value):
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2), None
    out = attention(*(x.flatten(0, 1) for x in (query, key, value)))
    return out.unflatten(0, query.shape[:2]).transpose(1, 2), None


ATTENTION = "pi0"
"""Its name in transformers' configurations."""

AttentionInterface.register(ATTENTION, of_heads)
