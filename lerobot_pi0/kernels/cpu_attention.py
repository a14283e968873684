"""Blockwise attention in bfloat16 on CPUs, with its backward pass.

On CPUs, torch's fused attention in bfloat16 has a fifth of the rate of plain matrix products. Where these are fast
in bfloat16, scores, softmax and weighted sum are computed one after the other, for a block of queries at a time.
Elsewhere torch's attention is used.

Axes: B batch, H heads, Q queries, P keys of earlier calls, N keys of this one, S keys of both, D head dim.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..network import attention, gemma, siglip
from ..network.attention import KVCache, Mask
from .cpu_linear import fast_in_bfloat16
from .kv_cache import PreallocatedKVCache

SCORES = 2**20
"""Numbers in a block of scores: as many as fit into the processor's cache together with their softmax."""


def attend(q_BQD: Tensor, new: KVCache, mask: Mask | None = None, past: KVCache | None = None) -> Tensor:
    """`network.attention.attention`, blockwise where that is faster."""
    if isinstance(past, PreallocatedKVCache):  # all keys are in one tensor: nothing can be skipped
        new, past, mask = past.append(new), None, None if mask is None else Mask(mask.bias)
    if not fast_in_bfloat16(q_BQD, *new, *(past or ())):
        return attention.attention(q_BQD, new, mask, past)
    mask = Mask(q_BQD.new_zeros(1, 1, 1)) if mask is None else mask
    return _Blockwise.apply(q_BQD, *new, *(past or (None, None)), mask.bias.to(q_BQD.dtype), mask.samples, mask.shared)


def attend_by_heads(q_BHQD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> Tensor:
    """Attention without a mask where each head has its own keys and values: (B, H, Q, D)."""
    if not fast_in_bfloat16(q_BHQD, k_BHSD, v_BHSD):
        return F.scaled_dot_product_attention(q_BHQD, k_BHSD, v_BHSD)
    q, k, v = (x.flatten(0, 1) for x in (q_BHQD, k_BHSD, v_BHSD))
    return attend(q, KVCache(k, v)).unflatten(0, q_BHQD.shape[:2])


class GemmaAttention(gemma.Attention):
    """Gemma's attention, blockwise."""

    attend = staticmethod(attend)


class SiglipAttention(siglip.Attention):
    """SigLIP's attention, blockwise."""

    attend = staticmethod(attend_by_heads)


class _Blockwise(torch.autograd.Function):
    """Attention over blocks of queries. The backward pass computes the scores again, so that none are kept.

    Scores and their softmax are rounded to bfloat16, as they are in LeRobot's π₀. The softmax of a row and the sums
    over blocks are computed in float32. Keys of other samples are skipped, and no gradient is computed for a past that
    needs none. The form with `setup_context` can be differentiated by torch.func too.
    """

    @staticmethod
    def forward(
        q_BQD: Tensor,
        k_BND: Tensor,
        v_BND: Tensor,
        past_k_BPD: Tensor | None,
        past_v_BPD: Tensor | None,
        bias: Tensor,
        samples: int | None,
        shared: int,
    ) -> Tensor:
        out = torch.empty_like(q_BQD)
        mask = Mask(bias, samples, shared)
        for block in _blocks(q_BQD, k_BND, v_BND, past_k_BPD, past_v_BPD, mask):
            out[:, block.queries] = block.weights @ block.values
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.samples, ctx.shared = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_BQD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, past_k, past_v, bias = ctx.saved_tensors
        past = 0 if past_k is None else past_k.shape[1]
        trained = past if any(ctx.needs_input_grad[3:5]) else 0  # how many keys of the past need a gradient
        common, scale = trained + ctx.shared, q.shape[-1] ** -0.5
        dq = torch.empty_like(q)
        dk, dv = (x.new_zeros(len(x), trained + x.shape[1], x.shape[2], dtype=torch.float32) for x in (k, v))
        for block in _blocks(q, k, v, past_k, past_v, Mask(bias, ctx.samples, ctx.shared)):
            rows, own = block.queries, slice(trained + block.own.start, trained + block.own.stop)
            g = grad_BQD[:, rows]
            d_scores = torch._softmax_backward_data(g @ block.values.mT, block.weights, -1, q.dtype)
            dq[:, rows] = (d_scores @ block.keys) * scale
            for total, left, right in ((dk, d_scores, q[:, rows]), (dv, block.weights, g)):
                part = left[..., past - trained :].mT @ right
                total[:, :common] += part[:, :common]
                total[:, own] += part[:, common:]
        dk, dv = (dk * scale).to(k.dtype), dv.to(v.dtype)
        of_past = (dk[:, :trained], dv[:, :trained]) if trained else (None, None)
        return dq, dk[:, trained:], dv[:, trained:], *of_past, None, None, None


class _Block(NamedTuple):
    """Some queries, and the keys and values that they see."""

    queries: slice
    own: slice  # those of the new keys that belong to the queries' sample
    keys: Tensor  # of the past, the shared tokens and the sample: (B, S, D)
    values: Tensor
    weights: Tensor  # the softmax of the scores: (B, queries, S)


def _blocks(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor | None, past_v: Tensor | None, mask: Mask
) -> Iterator[_Block]:
    """Queries of one sample at a time, and at most as many of them as have `SCORES` scores."""
    bias, samples, shared = mask
    tokens, common, scale = k.shape[1], bias.shape[-1] - k.shape[1] + shared, q.shape[-1] ** -0.5
    groups = [(range(q.shape[1]), slice(0, tokens))]
    if samples:
        heads, length = q.shape[1] // tokens, (tokens - shared) // samples
        groups = [(range(heads * a, heads * (a + length)), slice(a, a + length)) for a in range(shared, tokens, length)]
        groups += [(range(heads * shared), slice(shared, shared))] * (shared > 0)
    for queries, own in groups:
        keys, values = (_seen(past, new, shared, own) for past, new in ((past_k, k), (past_v, v)))
        if samples:  # all of a sample's queries see all of these keys, except the past's padding
            bias = F.pad(mask.bias[:, queries.start, None, :common], (0, own.stop - own.start))
        most = max(1, SCORES // (len(keys) * keys.shape[1]))
        for start in queries[::most]:
            rows = slice(start, min(start + most, queries.stop))
            scores = torch.baddbmm(bias if bias.shape[1] == 1 else bias[:, rows], q[:, rows], keys.mT, alpha=scale)
            yield _Block(rows, own, keys, values, torch.softmax(scores, dim=-1))


def _seen(past: Tensor | None, new: Tensor, shared: int, own: slice) -> Tensor:
    parts = [part for part in (past, new[:, :shared], new[:, own]) if part is not None and part.shape[1]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
