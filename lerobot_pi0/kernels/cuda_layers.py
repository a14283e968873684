"""Layers of the transformers in fewer kernel launches on CUDA, where the network is called without autograd.

A chunk is thousands of small kernels, and a GPU waits for the host to launch them. So products of the same input become
one where their weights lie side by side in memory, the residual is added by the product before it, and conversions
between bfloat16 and float32 happen inside of kernels. Norms and RoPE stay in float32 between reading and writing.

torch.compile fuses more than this, so what it traces is the plain network, or a layer of `compiled_layers.py`.

Axes: B batch, T tokens, H query heads, D head dim, W width, N outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from einops import rearrange
from torch import Tensor, nn

from ..network import gemma
from ..network.attention import KVCache, Mask
from ..network.gemma import Rope
from ..network.pi0 import PI0
from .cpu_attention import GemmaAttention, SiglipAttention
from .cpu_linear import GemmaMLP, Linear

ON = ("cuda",)
"""Devices on which launches are saved."""


def on_gpu(device: torch.device) -> bool:
    """Whether launches count on this device."""
    return device.type in ON


def saves_launches(x: Tensor, *weights: Tensor) -> bool:
    """Whether these are on CUDA, of one dtype, and neither differentiated nor traced."""
    plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return plain and on_gpu(x.device) and all(w.dtype == x.dtype for w in weights)


def joined(layers: list[nn.Module], name: str = "weight") -> Tensor | None:
    """Weights or biases of linear layers as one tensor, without a copy; None where they do not lie side by side.

    They do after `join`, until one of them is moved, swapped or wrapped by an adapter.
    """
    if not all(type(layer) is Linear for layer in layers):
        return None
    first, *rest = (getattr(layer, name) for layer in layers)
    end, rows = first.storage_offset() + first.numel(), len(first)
    for x in rest:
        if x.untyped_storage()._cdata != first.untyped_storage()._cdata or x.storage_offset() != end:
            return None
        if x.dtype != first.dtype or not x.is_contiguous():
            return None
        end, rows = end + x.numel(), rows + len(x)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


@torch.no_grad()
def join(model: PI0) -> None:
    """On CUDA, move weights that multiply the same input side by side. Parameters, their names and numbers stay."""
    if not on_gpu(model.action_in_proj.weight.device):
        return
    for part in (model.vision, model.vlm, model.expert):
        for module in part.modules():
            if isinstance(module, GemmaAttention | SiglipAttention):
                _move([module.q_proj, module.k_proj, module.v_proj])
            elif isinstance(module, GemmaMLP):
                _move([module.gate_proj, module.up_proj])


def _move(layers: list[Any]) -> None:
    if not all(type(layer) is Linear for layer in layers):
        return
    for name in ("weight", "bias"):
        parameters = [getattr(layer, name) for layer in layers]
        if None in parameters or len({p.dtype for p in parameters}) > 1 or joined(layers, name) is not None:
            continue
        whole = torch.cat([p.data for p in parameters])
        for p, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
            p.data = part


Joined = tuple[Tensor | None, Tensor | None]
"""Weight and bias of several layers, each as one tensor; None where that is not to be had."""


def joined_parts(layers: list[Any]) -> Joined:
    """The weights and biases of layers that multiply the same input, if they lie side by side."""
    weight = joined(layers)
    if weight is None or layers[0].bias is None:
        return weight, None
    bias = joined(layers, "bias")
    return (None, None) if bias is None else (weight, bias)


def apply(layers: list[Any], x: Tensor, parts: Joined) -> list[Tensor]:
    """Each layer's output for x, by one product if there is one weight."""
    weight, bias = parts
    if weight is None:
        return [layer(x) for layer in layers]
    return list(F.linear(x, weight, bias).split([layer.out_features for layer in layers], dim=-1))


def project(layers: list[Any], x: Tensor) -> list[Tensor]:
    """Each layer's output, by one product if their weights lie side by side."""
    return apply(layers, x, joined_parts(layers))


def add_linear(layer: Any, x: Tensor, residual: Tensor) -> Tensor:
    """residual + layer(x)."""
    if type(layer) is not Linear or residual.dtype != layer.weight.dtype:
        return residual + layer(x)
    product = torch.addmm(residual.flatten(0, -2), x.flatten(0, -2), layer.weight.t())
    return product.view_as(residual)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`network.gemma.rotate`: its kernels read x's dtype and write it."""
    out = torch.empty_like(x)
    (a, b), (left, right) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.addcmul(a * cos, b, sin, value=-1, out=left)
    torch.addcmul(b * cos, a, sin, out=right)
    return out


class CudaRMSNorm(gemma.RMSNorm):
    """Gemma's norm: 1 + weight is not made, x·(1 + weight) is x + x·weight."""

    def forward(self, x: Tensor) -> Tensor:
        if not saves_launches(x, self.weight):
            return super().forward(x)
        normed = F.rms_norm(x.float(), x.shape[-1:], None, self.eps)
        return torch.addcmul(normed, normed, self.weight, out=torch.empty_like(x))


class CudaGemmaAttention(GemmaAttention):
    """Gemma's attention: one product makes queries, keys and values, and RoPE turns queries and keys at once."""

    def project(self, x_BTW: Tensor, rope: Rope) -> tuple[Tensor, KVCache]:
        """Queries (B, T·H, D), keys and values."""
        cos, sin = (angle[:, :, None] for angle in rope)
        layers: list[Any] = [self.q_proj, self.k_proj, self.v_proj]
        q, k, v = project(layers, x_BTW)
        if joined(layers) is None:
            q = rotate(rearrange(q, "b t (h d) -> b t h d", h=self.heads), cos, sin)
            return q.flatten(1, 2), KVCache(rotate(k, *rope), v)
        qk = q.as_strided((*q.shape[:2], self.heads + 1, self.head_dim), (*q.stride()[:2], self.head_dim, 1))
        qk = rotate(qk, cos, sin)
        return qk[:, :, :-1].flatten(1, 2), KVCache(qk[:, :, -1], v)

    def add(self, residual: Tensor, q_BQD: Tensor, kv: KVCache, mask: Mask | None, past: KVCache | None) -> Tensor:
        """The residual, and what these queries attend to."""
        out = self.attend(q_BQD, kv, mask, past)
        return add_linear(self.o_proj, rearrange(out, "b (t h) d -> b t (h d)", h=self.heads), residual)


class CudaGemmaMLP(GemmaMLP):
    """Gemma's MLP: one product makes the gate and what it multiplies."""

    def add(self, residual: Tensor, x: Tensor) -> Tensor:
        """The residual, and the output for x."""
        gate, up = project([self.gate_proj, self.up_proj], x)
        return add_linear(self.down_proj, F.gelu(gate, approximate="tanh").mul_(up), residual)


class Layer(gemma.Layer):
    """A layer of Gemma, of the parts above; its class keeps the name by which configurations of FSDP find it."""

    def forward(
        self, x: Tensor, rope: Rope, mask: Mask | None, past: KVCache | None, kv_only: bool
    ) -> tuple[Tensor, KVCache]:
        attention: Any = self.self_attn
        mlp: Any = self.mlp
        if kv_only or not saves_launches(x) or not self._is_ours():
            return super().forward(x, rope, mask, past, kv_only)
        q, kv = attention.project(self.input_layernorm(x), rope)
        x = attention.add(x, q, kv, mask, past)
        return mlp.add(x, self.post_attention_layernorm(x)), kv

    def _is_ours(self) -> bool:
        return isinstance(self.self_attn, CudaGemmaAttention) and isinstance(self.mlp, CudaGemmaMLP)


class CudaSiglipAttention(SiglipAttention):
    """SigLIP's attention: one product makes queries, keys and values."""

    def forward(self, x_NPW: Tensor) -> Tensor:
        if not saves_launches(x_NPW):
            return super().forward(x_NPW)
        return self.attend_with(x_NPW, joined_parts([self.q_proj, self.k_proj, self.v_proj]))

    def attend_with(self, x_NPW: Tensor, parts: Joined) -> Tensor:
        """The layer's output, with the joined weights of queries, keys and values."""
        projected = apply([self.q_proj, self.k_proj, self.v_proj], x_NPW, parts)
        q, k, v = (rearrange(x, "n p (h d) -> n h p d", h=self.heads) for x in projected)
        return self.out_proj(rearrange(self.attend(q, k, v), "n h p d -> n p (h d)"))
