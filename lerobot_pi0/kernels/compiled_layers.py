"""Layers compiled by torch.compile on CUDA: one graph for all layers of a stack, to be captured in that of a chunk.

`context` and `velocity` compiled as a whole unroll 27, 18 and 18 layers. One layer compiles in seconds, has as few
kernels, and needs no graphs of torch.compile's own, which only the thread that made them can replay. Products of the
same input are one product where their weights lie side by side (`cuda_layers.join`).

Axes: B batch, N images, P patches, T tokens, H heads, D head dim, W width.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch.nn.functional as F  # noqa: N812
from einops import rearrange
from torch import Tensor

from ..network import siglip
from ..network.attention import KVCache, Mask
from ..network.gemma import Rope, rotate
from ..network.pi0 import PI0
from . import cuda_layers
from .compilation import compiled
from .cuda_layers import Joined, add_linear, apply, joined_parts, saves_launches

WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
"""Modes of torch.compile that make CUDA graphs of their own, and the same without."""


@cache
def _compiled(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    return compiled(function, mode)


def compile_layers(model: PI0, mode: str | None) -> None:
    """Let the layers of all stacks be compiled when they run on CUDA without autograd, and nobody compiles around them.

    Args:
        mode: torch.compile's; None compiles nothing.
    """
    for module in model.modules():
        if isinstance(module, Layer | SiglipEncoderLayer):
            module.compile_mode = WITHOUT_GRAPHS.get(mode, mode) if mode else None


class Layer(cuda_layers.Layer):
    """A layer of Gemma, compiled if `compile_layers` says so."""

    compile_mode: str | None = None

    def forward(
        self, x: Tensor, rope: Rope, mask: Mask | None, past: KVCache | None, kv_only: bool
    ) -> tuple[Tensor, KVCache]:
        attention: Any = self.self_attn
        mlp: Any = self.mlp
        if self.compile_mode is None or kv_only or not saves_launches(x) or not self._is_ours():
            return super().forward(x, rope, mask, past, kv_only)
        qkv = joined_parts([attention.q_proj, attention.k_proj, attention.v_proj])
        gate_up = joined_parts([mlp.gate_proj, mlp.up_proj])
        return _compiled(_gemma_layer, self.compile_mode)(self, x, qkv, gate_up, rope, mask, past)


class SiglipEncoderLayer(siglip.SiglipEncoderLayer):
    """A layer of SigLIP, compiled if `compile_layers` says so; FSDP's configurations name this class."""

    compile_mode: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        attention: Any = self.self_attn
        if self.compile_mode is None or not saves_launches(x):
            return super().forward(x)
        qkv = joined_parts([attention.q_proj, attention.k_proj, attention.v_proj])
        return _compiled(_siglip_layer, self.compile_mode)(self, x, qkv)


def _gemma_layer(
    layer: Any, x: Tensor, qkv: Joined, gate_up: Joined, rope: Rope, mask: Mask | None, past: KVCache | None
) -> tuple[Tensor, KVCache]:
    attention, mlp = layer.self_attn, layer.mlp
    q, k, v = apply([attention.q_proj, attention.k_proj, attention.v_proj], layer.input_layernorm(x), qkv)
    cos, sin = (angle[:, :, None] for angle in rope)
    q_BTHD = rotate(rearrange(q, "b t (h d) -> b t h d", h=attention.heads), cos, sin)
    kv = KVCache(rotate(k, *rope), v)
    x = attention.add(x, rearrange(q_BTHD, "b t h d -> b (t h) d"), kv, mask, past)
    gate, up = apply([mlp.gate_proj, mlp.up_proj], layer.post_attention_layernorm(x), gate_up)
    return add_linear(mlp.down_proj, F.gelu(gate, approximate="tanh") * up, x), kv


def _siglip_layer(layer: Any, x_NPW: Tensor, qkv: Joined) -> Tensor:
    x_NPW = x_NPW + layer.self_attn.attend_with(layer.layer_norm1(x_NPW), qkv)
    return x_NPW + layer.mlp(layer.layer_norm2(x_NPW))
