"""Linear layers and MLPs in bfloat16 on CPUs: widened weights, packed weights, GELU fused with the product.

CPUs with instructions for bfloat16 products (AVX512-BF16, AMX) compute them at up to three times their float32 rate;
those without at little more than half of it. On CPUs without them, frozen weights stay bfloat16 in memory, and for many
tokens they are converted to float32 into a scratch buffer and multiplied in float32, which is also more accurate.
816 tokens x 2048 x 16384 on one core, in bfloat16 and converted (with the time to convert): 675 and 435 ms
without the instructions, 275 and 674 ms with AVX512-BF16. 50 tokens without them: 6 and 8 ms.
"""

import contextlib
import logging
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import xxhash
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..network import gemma, siglip

BFLOAT16_IS_SLOW = not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
MANY_TOKENS = 128
FEW_WEIGHTS = 2**27
"""A network of as many needs 0.5 GB in float32, so bfloat16 has no advantage where it is slow."""

logger = logging.getLogger(__name__)
_scratch = threading.local()


def advise(model: nn.Module) -> None:
    """Tell of a small network in bfloat16 on a CPU without instructions for it: only large products are widened."""
    weights = list(model.parameters())
    narrow = any(p.dtype == torch.bfloat16 and p.device.type == "cpu" for p in weights)
    if BFLOAT16_IS_SLOW and narrow and sum(p.numel() for p in weights) < FEW_WEIGHTS:
        logger.warning(
            "this CPU has no instructions for bfloat16: a network of this size is 3 to 8 times as fast with "
            "--policy.dtype=float32"
        )


def _widened(weight: Tensor) -> Tensor:
    """The weight in float32, in this thread's buffer: good until the next call."""
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.numel() < weight.numel():
        with torch.inference_mode(False):  # later calls, outside of a caller's inference mode, write into it too
            buffer = _scratch.buffer = torch.empty(weight.numel())
    return buffer[: weight.numel()].view_as(weight).copy_(weight)


class Linear(nn.Linear):
    """nn.Linear that multiplies in float32 where that is faster and no gradient is needed."""

    packed: Tensor | None = None  # the weight in oneDNN's order, inside of `packed` below

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed
        if packed is not None and is_inference(x):
            return torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "none", [], "")
        if not self._widens(x):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(x.float(), _widened(self.weight), bias).to(self.weight.dtype)

    def _widens(self, x: Tensor) -> bool:
        on_slow_cpu = BFLOAT16_IS_SLOW and x.device.type == "cpu"
        if not (on_slow_cpu and is_inference(self.weight) and x.numel() >= MANY_TOKENS * self.in_features):
            return False
        return _get_current_dispatch_mode() is None  # a mode may compute with tensors that have no numbers


def is_inference(x: Tensor) -> bool:
    """Whether this is a bfloat16 tensor on a CPU that is neither differentiated nor traced.

    A layer may then change its output in place. This saves fresh memory, which the system provides slowly.
    """
    plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and plain


def fast_in_bfloat16(*tensors: Tensor) -> bool:
    """Whether these are bfloat16 on a CPU that multiplies it fast, and no mode traces or counts their products."""
    return (
        all(x.device.type == "cpu" and x.dtype == torch.bfloat16 for x in tensors)
        and not torch.compiler.is_compiling()
        and not BFLOAT16_IS_SLOW
        and torch.backends.mkldnn.is_available()
        and _get_current_dispatch_mode() is None
    )


def gelu_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """gelu(layer(x)), in its tanh form."""
    if can_fuse(layer, x):
        return torch.ops.mkldnn._linear_pointwise(x, _for_onednn(layer), layer.bias, "gelu", [], "tanh")
    y = layer(x)
    return torch.ops.aten.gelu_(y, approximate="tanh") if is_inference(y) else F.gelu(y, approximate="tanh")


def gated(gate: nn.Module, up: nn.Module, x: Tensor) -> Tensor:
    """gelu(gate(x)) · up(x), in its tanh form; neither layer has a bias."""
    activated = gelu_linear(gate, x)
    if can_fuse(up, x):
        return torch.ops.mkldnn._linear_pointwise.binary(x, activated, _for_onednn(up), None, "mul")
    return activated.mul_(up(x)) if is_inference(activated) else activated * up(x)


def can_fuse(layer: nn.Module, x: Tensor) -> bool:
    """Whether oneDNN can fuse GELU or the gate with the product, as torch.compile does.

    As separate operations they take a seventh of the time of the VLM's MLP, mostly to read memory. False for a layer
    of another class (an adapter around ours), and where the layer is differentiated, traced or counted.
    """
    return type(layer) is Linear and is_inference(x) and fast_in_bfloat16(layer.weight, x)


def _for_onednn(layer: nn.Module) -> Any:
    packed = layer.packed
    return layer.weight if packed is None else packed


HIDDEN = 2**22
"""Most hidden activations of Gemma's MLP at a time: for more, the system provides fresh memory at each call."""


class GemmaMLP(gemma.MLP):
    """Gemma's MLP, fused, and at inference for a block of tokens at a time."""

    def forward(self, x: Tensor) -> Tensor:
        blocks = -(-x.shape[:-1].numel() * self.gate_proj.out_features // HIDDEN)
        if blocks == 1 or not is_inference(x):
            return self._whole(x)
        return torch.cat([self._whole(block) for block in x.flatten(0, -2).chunk(blocks)]).view_as(x)

    def _whole(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj, self.up_proj, x))


class SiglipMLP(siglip.MLP):
    """SigLIP's MLP, fused."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu_linear(self.fc1, x))


@contextlib.contextmanager
def packed(module: nn.Module) -> Iterator[None]:
    """Let the linear layers of `module` use copies of their weights, packed in the order in which oneDNN reads them.

    Without that, oneDNN reorders each weight at each product, which is a third of the time of a product with few
    tokens. A copy is used again as long as the digest of the weight's bytes is the same. So a weight that has changed
    in any way (by an optimizer, a merged adapter, exchanged rows, or without autograd's knowledge) is packed again.
    """
    layers = [m for m in module.modules() if type(m) is Linear and _can_be_packed(m.weight)]
    for layer in layers:
        digest = _digest(layer.weight)
        if layer not in _copies or _copies[layer][0] != digest:
            _copies[layer] = digest, torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
        layer.packed = _copies[layer][1]
    try:
        yield
    finally:
        for layer in layers:
            layer.packed = None


_copies: "weakref.WeakKeyDictionary[Linear, tuple[int, Tensor]]" = weakref.WeakKeyDictionary()
"""Kept outside of the layers: oneDNN's packed weights can be neither copied nor pickled with them."""


def _digest(weight: Tensor) -> int:
    """Of all bytes: the version that autograd counts misses changes by `.data`, and inference tensors have none."""
    return xxhash.xxh3_64_intdigest(weight.detach().view(torch.uint8).numpy())


def _can_be_packed(weight: Tensor) -> bool:
    whole = type(weight) is nn.Parameter and weight.is_contiguous() and weight.shape[1] % 4 == 0
    return whole and fast_in_bfloat16(weight)
