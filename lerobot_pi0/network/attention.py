"""Multi-query attention (all query heads share one key/value head), its KV cache and its mask.

Axes: B batch, Q queries of all heads, S keys, D head dim.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class KVCache(NamedTuple):
    """Keys (rotated) and values of one layer's tokens."""

    keys_BSD: Tensor
    values_BSD: Tensor

    def append(self, new: "KVCache") -> "KVCache":
        """The keys and values of this cache, followed by those of `new`."""
        return KVCache(*(torch.cat(pair, dim=1) for pair in zip(self, new, strict=True)))


class Mask(NamedTuple):
    """Which keys each query sees. `bias` is the whole mask; the other two tell a kernel which keys it can skip.

    With `samples`, the new tokens are `shared` tokens, then `samples` samples of equal length. A token of a sample
    sees the past, the shared tokens and its own sample; a shared token sees the past and the shared tokens.
    """

    bias: Tensor  # (B, 1 or Q, S): 0 where a query sees, -inf elsewhere
    samples: int | None = None  # None: nothing is known beyond `bias`
    shared: int = 0


def additive_mask(visible: Tensor, dtype: torch.dtype, samples: int | None = None, shared: int = 0) -> Mask:
    """The mask made from `visible`, boolean (B, 1 or Q, S): True where a query sees a key. All layers share it."""
    zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return Mask(zeros.masked_fill(~visible, float("-inf")), samples, shared)


def attention(q_BQD: Tensor, new: KVCache, mask: Mask | None = None, past: KVCache | None = None) -> Tensor:
    """softmax(q·k / √D + bias)·v, of shape (B, Q, D). The keys and values are those of `past`, followed by `new`."""
    k, v = new if past is None else past.append(new)
    bias = None if mask is None else mask.bias.to(q_BQD.dtype)[:, None]
    return F.scaled_dot_product_attention(q_BQD[:, None], k[:, None], v[:, None], attn_mask=bias)[:, 0]
