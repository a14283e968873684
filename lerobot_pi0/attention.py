"""Attention of the VLM, the vision tower and the action expert: one head at a time, or all as a batch.

Axes: B batch, H heads, Q queries, S keys, D head dim.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import AttentionInterface

from .linear import multiplies_fast

SCORES = 2**20
"""Numbers of a block of scores: what fits into the cache with its softmax."""


def attention(q_BQD: Tensor, k_BSD: Tensor, v_BSD: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q·k / √D + mask)·v: (B, Q, D). The mask is additive, (B, 1 or Q, S).

    torch's fused attention multiplies bfloat16 at a fifth of its products' rate on CPUs. Where those are fast, the
    three steps are written out (`_WrittenOut`).
    """
    mask = q_BQD.new_zeros(1, 1, 1) if mask is None else mask.to(q_BQD.dtype)
    if multiplies_fast(q_BQD, k_BSD, v_BSD):
        return _WrittenOut.apply(q_BQD, k_BSD, v_BSD, mask)
    q, k, v, m = (x[:, None] for x in (q_BQD, k_BSD, v_BSD, mask))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=m)[:, 0]


class _WrittenOut(torch.autograd.Function):
    """Attention, a block of queries at a time, and its derivative, which computes the scores again and keeps none.

    Scores are rounded to bfloat16, as they are in LeRobot's π₀; their softmax is float32, and so are the sums over
    blocks. In a form that torch.func differentiates too.
    """

    @staticmethod
    def forward(q_BQD: Tensor, k_BSD: Tensor, v_BSD: Tensor, mask: Tensor) -> Tensor:
        out = torch.empty_like(q_BQD)
        for block, shares in _shares(q_BQD, k_BSD, mask):
            out[:, block] = shares.to(v_BSD.dtype) @ v_BSD
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad_BQD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q_BQD, k_BSD, v_BSD, mask, out_BQD = ctx.saved_tensors
        dtype, scale = q_BQD.dtype, q_BQD.shape[-1] ** -0.5
        dq, dk, dv = torch.empty_like(q_BQD), *(torch.zeros_like(x, dtype=torch.float32) for x in (k_BSD, v_BSD))
        for block, shares in _shares(q_BQD, k_BSD, mask):
            g = grad_BQD[:, block]
            dv += shares.to(dtype).mT @ g
            along = (g.float() * out_BQD[:, block].float()).sum(dim=-1, keepdim=True)
            d_scores = (shares * ((g @ v_BSD.mT) - along)).to(dtype)
            dq[:, block] = (d_scores @ k_BSD) * scale
            dk += d_scores.mT @ q_BQD[:, block]
        return dq, (dk * scale).to(dtype), dv.to(dtype), None


def _shares(q_BQD: Tensor, k_BSD: Tensor, mask: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of queries, and how much each of them attends to each key: float32 (B, queries, S)."""
    keys, scale = k_BSD.mT, q_BQD.shape[-1] ** -0.5
    rows = max(1, SCORES // (len(k_BSD) * k_BSD.shape[1]))
    for start in range(0, q_BQD.shape[1], rows):
        block = slice(start, start + rows)
        scores = torch.baddbmm(mask if mask.shape[1] == 1 else mask[:, block], q_BQD[:, block], keys, alpha=scale)
        yield block, torch.softmax(scores, dim=-1, dtype=torch.float32)


def of_heads(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **_: Any
) -> tuple[Tensor, None]:
    """The same as transformers' modules call it: from (B, H, Q, D) to (B, Q, H, D), without a mask."""
    if not multiplies_fast(query, key, value):
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2), None
    out = attention(*(x.flatten(0, 1) for x in (query, key, value)))
    return out.unflatten(0, query.shape[:2]).transpose(1, 2), None


ATTENTION = "pi0"
"""Its name in transformers' configurations."""

AttentionInterface.register(ATTENTION, of_heads)
