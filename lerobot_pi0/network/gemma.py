"""Gemma's decoder with a KV cache: the transformer of the VLM and of the action expert.

Axes: B batch, T tokens of this call, S tokens attended to, H query heads, D head dim, W width.

It differs from a language model's decoder in two ways. Attention is not causal: it follows the mask that it gets. And
the keys and values of earlier tokens are an argument (`past`); other weights may have computed them. Parameter names
are those of transformers' `GemmaModel`. Sources: openpi `models/gemma.py`, transformers `models/gemma`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import KVCache, Mask, attention
from .sizes import GemmaSize

Rope = tuple[Tensor, Tensor]
"""Cosine and sine of RoPE's angles, float32 (B, T, D/2)."""

ROPE_BASE = 10_000.0


class RMSNorm(nn.Module):
    """x / rms(x) · (1 + weight); variance in float32."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], 1.0 + self.weight.float(), self.eps).type_as(x)


def rotary_angles(positions_BT: Tensor, head_dim: int) -> Rope:
    """Cosine and sine of RoPE's angles, float32 (B, T, D/2)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BT.device) / head_dim
    angle = positions_BT[..., None].float() * ROPE_BASE**-exponent
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + D/2}) of the last axis by its angle; in float32, returned in x's dtype."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


class Attention(nn.Module):
    """Multi-query attention: all query heads share one key/value head, so each head is a further set of queries."""

    attend = staticmethod(attention)

    def __init__(self, cfg: GemmaSize) -> None:
        super().__init__()
        self.heads, self.head_dim = cfg.heads, cfg.head_dim
        self.q_proj = nn.Linear(cfg.width, cfg.heads * cfg.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.width, cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.width, cfg.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.heads * cfg.head_dim, cfg.width, bias=False)

    def keys_values(self, x_BTW: Tensor, rope: Rope) -> KVCache:
        """Keys and values of these tokens, each (B, T, D)."""
        return KVCache(rotate(self.k_proj(x_BTW), *rope), self.v_proj(x_BTW))

    def forward(self, x_BTW: Tensor, rope: Rope, kv: KVCache, mask: Mask | None, past: KVCache | None) -> Tensor:
        """Attend from x to `past` and to x's own keys and values, `kv`."""
        cos, sin = (angle[:, :, None] for angle in rope)
        q_BTHD = rotate(rearrange(self.q_proj(x_BTW), "b t (h d) -> b t h d", h=self.heads), cos, sin)
        out = self.attend(rearrange(q_BTHD, "b t h d -> b (t h) d"), kv, mask, past)
        return self.o_proj(rearrange(out, "b (t h) d -> b t (h d)", h=self.heads))


class MLP(nn.Module):
    """Linear layers with a tanh-GELU gate."""

    def __init__(self, cfg: GemmaSize) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.width, cfg.mlp_dim, bias=False)
        self.up_proj = nn.Linear(cfg.width, cfg.mlp_dim, bias=False)
        self.down_proj = nn.Linear(cfg.mlp_dim, cfg.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg: GemmaSize) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.width)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.width)
        self.mlp = MLP(cfg)

    def forward(
        self, x: Tensor, rope: Rope, mask: Mask | None, past: KVCache | None, kv_only: bool
    ) -> tuple[Tensor, KVCache]:
        """Returns the layer's output, and the keys and values of x, each (B, T, D)."""
        h = self.input_layernorm(x)
        kv = self.self_attn.keys_values(h, rope)
        if kv_only:
            return x, kv
        x = x + self.self_attn(h, rope, kv, mask, past)
        return x + self.mlp(self.post_attention_layernorm(x)), kv


class Gemma(nn.Module):
    """A stack of layers. Without `vocab_size`, as in the action expert, there is no `embed_tokens`."""

    layers: Any  # an nn.ModuleList of Layer

    def __init__(self, cfg: GemmaSize, vocab_size: int | None = None) -> None:
        super().__init__()
        self.cfg = cfg
        if vocab_size is not None:
            self.embed_tokens = nn.Embedding(vocab_size, cfg.width)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.depth))
        self.norm = RMSNorm(cfg.width)
        self.gradient_checkpointing = False

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Token embeddings times √W, as in Gemma: (B, T, W)."""
        return self.embed_tokens(tokens_BT) * self.cfg.width**0.5

    def rope(self, positions_BT: Tensor) -> Rope:
        """RoPE's angles at these positions."""
        return rotary_angles(positions_BT, self.cfg.head_dim)

    def cache(
        self, x_BTW: Tensor, rope: Rope, mask: Mask | None, past: Sequence[KVCache] | None = None
    ) -> list[KVCache]:
        """Keys and values per layer of `past` and x together. The last layer's attention and MLP are not computed,
        because nothing reads their output."""
        new = self._layers(x_BTW, rope, mask, past, cache_only=True)[1]
        return new if past is None else [before.append(kv) for before, kv in zip(past, new, strict=True)]

    def forward(self, x_BTW: Tensor, rope: Rope, mask: Mask | None, past: Sequence[KVCache] | None = None) -> Tensor:
        """Final hidden states (B, T, W), after the last norm.

        Args:
            rope: the angles of each token.
            mask: which of the S keys (of `past`, then of these tokens) each of the T·H queries sees; None if each query
                sees all keys.
            past: for each layer, the keys and values of the earlier tokens.
        """
        return self.norm(self._layers(x_BTW, rope, mask, past, cache_only=False)[0])

    def _layers(
        self, x: Tensor, rope: Rope, mask: Mask | None, past: Sequence[KVCache] | None, cache_only: bool
    ) -> tuple[Tensor, list[KVCache]]:
        cache = []
        for i, layer in enumerate(self.layers):
            args = (x, rope, mask, None if past is None else past[i], cache_only and i == self.cfg.depth - 1)
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x, kv = checkpoint(layer, *args, use_reentrant=False)
            else:
                x, kv = layer(*args)
            cache.append(kv)
        return x, cache
