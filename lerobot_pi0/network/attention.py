"""Attention of the VLM, the vision tower and the action expert: one head at a time, or all as a batch.

Axes: B batch, H heads, Q queries, P keys of earlier calls, N keys of this one, S keys of both, D head dim.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import AttentionInterface

from ..kernels.linear import multiplies_fast

SCORES = 2**20
"""Numbers of a block of scores: what fits into the cache with its softmax."""

KeysValues = tuple[Tensor, Tensor]
"""Keys (rotated) and values of one layer, each (B, S, D): one head serves all query heads."""


class Mask(NamedTuple):
    """Which keys a query sees.

    A call's tokens may be samples, one behind the other and each of as many tokens, behind `front` tokens that see none
    of them. A sample sees the past, the front and itself. `additive` says so too; this tells what can be left out.
    """

    additive: Tensor  # (B, 1 or Q, S): 0 where a query sees, -inf elsewhere
    samples: int = 0  # 0: the tokens are none
    front: int = 0


def additive_mask(visible: Tensor, dtype: torch.dtype, samples: int = 0, front: int = 0) -> Mask:
    """The mask of what is `visible`, made once per call, where a boolean would be converted per layer."""
    zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return Mask(zeros.masked_fill(~visible, float("-inf")), samples, front)


def with_room(cache: Sequence[KeysValues], tokens: int) -> list[KeysValues]:
    """The same keys and values, with room for those of some tokens more: they are put there, and nothing is copied
    again. Not for what is differentiated, nor for two calls at a time."""
    return [(F.pad(k, (0, 0, 0, tokens)), F.pad(v, (0, 0, 0, tokens))) for k, v in cache]


def joined(past: KeysValues, new: KeysValues) -> KeysValues:
    """Keys and values, one behind the other."""
    return torch.cat([past[0], new[0]], dim=1), torch.cat([past[1], new[1]], dim=1)


def attention(q_BQD: Tensor, new: KeysValues, mask: Mask | None = None, past: KeysValues | None = None) -> Tensor:
    """softmax(q·k / √D + mask)·v: (B, Q, D), over earlier keys and values and over new ones.

    torch's fused attention multiplies bfloat16 at a fifth of its products' rate on CPUs. Where those are fast, the
    three steps are written out (`_WrittenOut`).

    Args:
        past: as it is, or with room for `new` (`with_room`).
    """
    mask = Mask(q_BQD.new_zeros(1, 1, 1)) if mask is None else mask
    if past is not None and past[0].shape[1] == mask.additive.shape[-1]:
        for room, tokens in zip(past, new, strict=True):
            room[:, -tokens.shape[1] :] = tokens
        new, past, mask = past, None, Mask(mask.additive)
    additive = mask.additive.to(q_BQD.dtype)
    if multiplies_fast(q_BQD, *new, *(past or ())):
        return _WrittenOut.apply(q_BQD, *new, *(past or (None, None)), additive, mask.samples, mask.front)
    k, v = new if past is None else joined(past, new)
    return F.scaled_dot_product_attention(q_BQD[:, None], k[:, None], v[:, None], attn_mask=additive[:, None])[:, 0]


class _WrittenOut(torch.autograd.Function):
    """Attention, a block of queries at a time, and its derivative, which computes the scores again and keeps none.

    Scores are rounded to bfloat16, as they are in LeRobot's π₀; their softmax is float32, and so are the sums over
    blocks. Other samples' keys are left out, and so is the derivative of a past that needs none. In a form that
    torch.func differentiates too.
    """

    @staticmethod
    def forward(
        q_BQD: Tensor,
        k_BND: Tensor,
        v_BND: Tensor,
        past_k_BPD: Tensor | None,
        past_v_BPD: Tensor | None,
        additive: Tensor,
        samples: int,
        front: int,
    ) -> Tensor:
        out = torch.empty_like(q_BQD)
        mask = Mask(additive, samples, front)
        for block in _blocks(q_BQD, k_BND, v_BND, past_k_BPD, past_v_BPD, mask):
            out[:, block.queries] = block.shares.to(v_BND.dtype) @ block.values
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.samples, ctx.front = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    def backward(ctx: Any, grad_BQD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, past_k, past_v, additive, out = ctx.saved_tensors
        past = 0 if past_k is None else past_k.shape[1]
        asked = past if any(ctx.needs_input_grad[3:5]) else 0  # keys of the past that want a derivative: all or none
        shared, scale = asked + ctx.front, q.shape[-1] ** -0.5
        dq = torch.empty_like(q)
        dk, dv = (x.new_zeros(len(x), asked + x.shape[1], x.shape[2], dtype=torch.float32) for x in (k, v))
        for block in _blocks(q, k, v, past_k, past_v, Mask(additive, ctx.samples, ctx.front)):
            rows, own = block.queries, slice(asked + block.own.start, asked + block.own.stop)
            g = grad_BQD[:, rows]
            along = (g.float() * out[:, rows].float()).sum(dim=-1, keepdim=True)
            d_scores = (block.shares * ((g @ block.values.mT) - along)).to(q.dtype)
            dq[:, rows] = (d_scores @ block.keys) * scale
            for total, left, right in ((dk, d_scores, q[:, rows]), (dv, block.shares.to(q.dtype), g)):
                part = left[..., past - asked :].mT @ right
                total[:, :shared] += part[:, :shared]
                total[:, own] += part[:, shared:]
        dk, dv = (dk * scale).to(k.dtype), dv.to(v.dtype)
        of_past = (dk[:, :asked], dv[:, :asked]) if asked else (None, None)
        return dq, dk[:, asked:], dv[:, asked:], *of_past, None, None, None


class _Block(NamedTuple):
    """Some queries, and what they see."""

    queries: slice
    own: slice  # of the new keys, those behind the front
    keys: Tensor  # the past's, the front's and their own: (B, S, D)
    values: Tensor
    shares: Tensor  # how much each query attends to each key: float32 (B, queries, S)


def _blocks(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor | None, past_v: Tensor | None, mask: Mask
) -> Iterator[_Block]:
    """Queries of one sample at a time, and no more of them than make `SCORES` scores."""
    additive, samples, front = mask
    tokens, shared, scale = k.shape[1], additive.shape[-1] - k.shape[1] + front, q.shape[-1] ** -0.5
    groups = [(range(q.shape[1]), slice(0, tokens))]
    if samples:
        heads, length = q.shape[1] // tokens, (tokens - front) // samples
        groups = [(range(heads * a, heads * (a + length)), slice(a, a + length)) for a in range(front, tokens, length)]
        groups += [(range(heads * front), slice(front, front))] * (front > 0)
    for queries, own in groups:
        keys, values = (_seen(past, new, front, own) for past, new in ((past_k, k), (past_v, v)))
        if samples:  # all of a sample's queries see all of these, but for the past's padding
            additive = F.pad(mask.additive[:, queries.start, None, :shared], (0, own.stop - own.start))
        most = max(1, SCORES // (len(keys) * keys.shape[1]))
        for start in queries[::most]:
            rows = slice(start, min(start + most, queries.stop))
            bias = additive if additive.shape[1] == 1 else additive[:, rows]
            scores = torch.baddbmm(bias, q[:, rows], keys.mT, alpha=scale)
            yield _Block(rows, own, keys, values, torch.softmax(scores, dim=-1, dtype=torch.float32))


def _seen(past: Tensor | None, new: Tensor, front: int, own: slice) -> Tensor:
    parts = [part for part in (past, new[:, :front], new[:, own]) if part is not None and part.shape[1]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def of_heads(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **_: Any
) -> tuple[Tensor, None]:
    """The same as transformers' modules call it: from (B, H, Q, D) to (B, Q, H, D), without a mask."""
    if not multiplies_fast(query, key, value):
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2), None
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    return attention(q, (k, v)).unflatten(0, query.shape[:2]).transpose(1, 2), None


ATTENTION = "pi0"
"""Its name in transformers' configurations."""

AttentionInterface.register(ATTENTION, of_heads)
