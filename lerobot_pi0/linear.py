"""A linear layer that knows in which type the processor multiplies faster, and its fusion with GELU.

CPUs with instructions for bfloat16 products (AVX512-BF16, AMX) multiply it at up to three times their float32 rate;
those without at little more than half of it. Frozen weights stay in bfloat16 in memory; on the latter, where many
tokens meet them, the weights are widened into a scratch buffer and the product is taken in float32, which is also the
more accurate one. 816 tokens x 2048 x 16384 on one core, bfloat16 against widened (buffer included): 675 and 435 ms
without the instructions, 275 and 674 ms with AVX512-BF16. 50 tokens without them: 6 and 8 ms.
"""

import threading

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

    def forward(self, x: Tensor) -> Tensor:
        if not self._widens(x):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(x.float(), _widened(self.weight), bias).to(self.weight.dtype)

    def _widens(self, x: Tensor) -> bool:
        return BFLOAT16_IS_SLOW and x.numel() >= MANY_TOKENS * self.in_features and infers_on_cpu(self.weight, x)


def infers_on_cpu(weight: Tensor, x: Tensor) -> bool:
    """Whether a product with bfloat16 weights runs on the CPU, and is neither differentiated nor traced."""
    return (
        weight.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def gelu_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """gelu(layer(x)), in its tanh form."""
    if fuses(layer, x):
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "gelu", [], "tanh")
    return F.gelu(layer(x), approximate="tanh")


def gated(gate: nn.Module, up: nn.Module, x: Tensor) -> Tensor:
    """gelu(gate(x)) · up(x), in its tanh form; neither layer has a bias."""
    activated = gelu_linear(gate, x)
    if fuses(up, x):
        return torch.ops.mkldnn._linear_pointwise.binary(x, activated, up.weight, None, "mul")
    return activated * up(x)


def fuses(layer: nn.Module, x: Tensor) -> bool:
    """Whether oneDNN can do what follows the product while it has the numbers at hand, as torch.compile lets it.

    GELU and product alone take a seventh of the time of the VLM's MLP, most of it to fetch memory. What is not our
    layer (an adapter around it), is differentiated, traced or counted goes the plain way.
    """
    return (
        type(layer) is Linear
        and not BFLOAT16_IS_SLOW
        and x.dtype == torch.bfloat16
        and infers_on_cpu(layer.weight, x)
        and torch.backends.mkldnn.is_available()
        and _get_current_dispatch_mode() is None
    )


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
