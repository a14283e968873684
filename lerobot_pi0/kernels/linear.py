"""A linear layer that knows in which type the processor multiplies faster, and its fusion with GELU.

CPUs with instructions for bfloat16 products (AVX512-BF16, AMX) multiply it at up to three times their float32 rate;
those without at little more than half of it. Frozen weights stay in bfloat16 in memory; on the latter, where many
tokens meet them, the weights are widened into a scratch buffer and the product is taken in float32, which is also the
more accurate one. 816 tokens x 2048 x 16384 on one core, bfloat16 against widened (buffer included): 675 and 435 ms
without the instructions, 275 and 674 ms with AVX512-BF16. 50 tokens without them: 6 and 8 ms.
"""

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

BFLOAT16_IS_SLOW = not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
MANY_TOKENS = 128

_scratch = threading.local()


def _widened(weight: Tensor) -> Tensor:
    """The weight in float32, in this thread's buffer: good until the next call."""
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.numel() < weight.numel():
        buffer = _scratch.buffer = torch.empty(weight.numel())
    return buffer[: weight.numel()].view_as(weight).copy_(weight)


class Linear(nn.Linear):
    """nn.Linear; in float32 where that is faster and nothing is to be differentiated."""

    packed: Tensor | None = None  # the weight for oneDNN, while `packed` below holds

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed
        if packed is not None and infers(x):
            return torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "none", [], "")
        if not self._widens(x):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(x.float(), _widened(self.weight), bias).to(self.weight.dtype)

    def _widens(self, x: Tensor) -> bool:
        on_slow_cpu = BFLOAT16_IS_SLOW and x.device.type == "cpu"
        return on_slow_cpu and infers(self.weight) and x.numel() >= MANY_TOKENS * self.in_features


def infers(x: Tensor) -> bool:
    """Whether what happens to this bfloat16 tensor is neither differentiated nor traced.

    A layer's answer is then changed in place: the system hands out fresh memory more slowly than it is filled.
    """
    return x.dtype == torch.bfloat16 and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def multiplies_fast(*tensors: Tensor) -> bool:
    """Whether all of these are bfloat16 on a CPU that multiplies it fast, and their products not traced or counted."""
    return (
        all(x.device.type == "cpu" and x.dtype == torch.bfloat16 for x in tensors)
        and not torch.compiler.is_compiling()
        and not BFLOAT16_IS_SLOW
        and torch.backends.mkldnn.is_available()
        and _get_current_dispatch_mode() is None
    )


def gelu_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """gelu(layer(x)), in its tanh form."""
    if fuses(layer, x):
        return torch.ops.mkldnn._linear_pointwise(x, operand(layer), layer.bias, "gelu", [], "tanh")
    y = layer(x)
    return torch.ops.aten.gelu_(y, approximate="tanh") if infers(y) else F.gelu(y, approximate="tanh")


def gated(gate: nn.Module, up: nn.Module, x: Tensor) -> Tensor:
    """gelu(gate(x)) · up(x), in its tanh form; neither layer has a bias."""
    activated = gelu_linear(gate, x)
    if fuses(up, x):
        return torch.ops.mkldnn._linear_pointwise.binary(x, activated, operand(up), None, "mul")
    return activated.mul_(up(x)) if infers(activated) else activated * up(x)


def fuses(layer: nn.Module, x: Tensor) -> bool:
    """Whether oneDNN can do what follows the product while it has the numbers at hand, as torch.compile lets it.

    GELU and product alone take a seventh of the time of the VLM's MLP, most of it to fetch memory. What is not our
    layer (an adapter around it), is differentiated, traced or counted goes the plain way.
    """
    return type(layer) is Linear and infers(x) and multiplies_fast(layer.weight, x)


def operand(layer: nn.Module) -> Any:
    """The layer's weight as oneDNN shall read it."""
    packed = layer.packed
    return layer.weight if packed is None else packed


@contextlib.contextmanager
def packed(module: nn.Module) -> Iterator[None]:
    """Let the linear layers of `module` read copies of their weights in the order in which oneDNN multiplies them.

    It would bring each weight into that order at each product, which takes a third of the time of one with few tokens.
    The copies are kept from one time to the next as long as the weights' checksums stay: a weight that was changed in
    whatever way, by an optimizer, an adapter that was merged, or behind autograd's back, is packed anew.
    """
    layers = [m for m in module.modules() if type(m) is Linear and _can_be_packed(m.weight)]
    for layer in layers:
        checksum = layer.weight.detach().view(torch.int64).sum()
        if layer not in _copies or _copies[layer][0] != checksum:
            _copies[layer] = checksum, torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
        layer.packed = _copies[layer][1]
    try:
        yield
    finally:
        for layer in layers:
            layer.packed = None


_copies: "weakref.WeakKeyDictionary[Linear, tuple[Tensor, Tensor]]" = weakref.WeakKeyDictionary()
"""Not in the layers: what oneDNN has packed can be neither copied nor pickled with them."""


def _can_be_packed(weight: Tensor) -> bool:
    whole = type(weight) is nn.Parameter and weight.is_contiguous() and weight.shape[1] % 4 == 0
    return whole and multiplies_fast(weight)


PART = 2**15
"""Numbers that torch draws and converts in one thread: more of them would wait for each other."""


def draw_normal(x: Tensor, std: float) -> None:
    """Fill with draws from N(0, std²); those of bfloat16 are drawn in float32 and rounded.

    On CPUs torch draws bfloat16 from uniform numbers of 8 bits: nothing beyond 3.4 deviations, and five times slower.
    """
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        nn.init.normal_(x, std=std)
        return
    for part in x.view(-1).split(PART):
        part.copy_(torch.empty(len(part)).normal_(std=std))


def use_linear(module: nn.Module) -> None:
    """Replace a foreign module's linear layers by ours; to be called before it has weights worth keeping."""
    for name, child in list(module.named_modules()):
        if type(child) is nn.Linear:
            owner, _, leaf = name.rpartition(".")
            ours = Linear(child.in_features, child.out_features, bias=child.bias is not None)
            setattr(module.get_submodule(owner), leaf, ours)
