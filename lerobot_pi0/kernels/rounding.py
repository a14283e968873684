"""The frozen VLM in int8, FP8 or NF4 (`vlm_quantization`). In int8 and FP8, activations are rounded too, as they come:

    w ≈ scale of the output channel · int8 or e4m3      once, when the weight is read
    x ≈ scale of the token · int8 or e4m3               at each call: what a token gives depends on no other token
    y = both scales · the product, which is exact in int8, and in FP8 a sum in float32

In NF4 (arXiv 2305.14314), w ≈ scale of its block of 64 · one of 16 levels, by bitsandbytes; activations stay exact.

The linear layers of the vision tower and of the VLM's decoder are rounded. Embeddings, norms, convolutions, the
projector between the two and all of the action expert are not. Rounded weights cannot be trained and are never saved:
a checkpoint holds the trained weights, and names the checkpoint that has the unrounded ones.

Axes: M tokens, K inputs, N outputs.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ..network.pi0 import PI0

FLOAT8 = torch.float8_e4m3fn
FLOAT8_RANGE = torch.finfo(FLOAT8).max

FLOAT8_CAPABILITY = (8, 9)
"""The first cards that multiply FP8: Ada; Hopper and Blackwell follow."""

FLOAT8_MULTIPLE = 16
"""What inputs and outputs of their products have to be multiples of."""

WEIGHT_RANGE = 127
TOKEN_RANGE = 126
"""Largest integers. The one of tokens is smaller, as a scale in bfloat16 may be too small by one part in 512."""

OFFSET = 128
"""Zero point: oneDNN has a fast product for uint8 activations with a zero point, but only a slow one for int8."""

CUDA_TOKENS = 17
"""Fewest tokens that `torch._int_mm` takes on CUDA."""

PART = 2**18
"""Numbers that a CPU rounds at a time, so that intermediate results stay in the cache."""


def check(kind: str, device: torch.device) -> None:
    """Refuse int8 on CPUs without VNNI, where it is slow and wrong: they add products in 16 bits, which overflow.

    Raises:
        ImportError: NF4 without bitsandbytes.
        ValueError: int8 on neither CUDA nor a CPU with VNNI; FP8 on anything but a card that multiplies it.
    """
    if kind == "fp8":
        has_card = device.type == "cuda" and torch.cuda.is_available()
        if not has_card or torch.version.hip or torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
            found = torch.cuda.get_device_name(device) if has_card else f"the device {device.type}"
            raise ValueError(
                "vlm_quantization=fp8 needs an NVIDIA card of compute capability 8.9 or later (Ada, Hopper, "
                f"Blackwell), and this is {found}: take int8, or leave the option out"
            )
        return
    if kind == "nf4":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"vlm_quantization=nf4 needs bitsandbytes: pip install 'lerobot_policy_pi0[bitsandbytes]' ({error})"
            ) from error
        return
    fast = device.type == "cuda" or (
        device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()
    )
    if not fast:
        raise ValueError(
            f"vlm_quantization=int8 needs CUDA, or a CPU with AVX512-VNNI and PyTorch's oneDNN, and this {device.type} "
            "device is neither: leave the option out"
        )


def _on_cpu(x: Tensor) -> bool:
    """Whether this is a real tensor on a CPU. Fake tensors, with which memory is counted, are treated as on a GPU."""
    return x.device.type == "cpu" and not isinstance(x, FakeTensor)


def _largest(x_RK: Tensor) -> Tensor:
    """The largest absolute value of each row, (R, 1), by one kernel."""
    return torch.linalg.vector_norm(x_RK, float("inf"), dim=1, keepdim=True)


def _rounded_rows(x_RK: Tensor, most: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows as integers up to `most`, int8 (R, K), and the scale of each, (R, 1), computed in `dtype`."""
    if not _on_cpu(x_RK):  # a GPU has no use for parts, and each would cost copies
        x_RK = x_RK.to(dtype)
        scale_R1 = (_largest(x_RK) / most).clamp(min=torch.finfo(dtype).tiny)
        return (x_RK / scale_R1).round().to(torch.int8), scale_R1
    whole = torch.empty(x_RK.shape, dtype=torch.int8, device=x_RK.device)
    scale_R1 = x_RK.new_empty(len(x_RK), 1, dtype=dtype)
    rows = max(1, PART // x_RK.shape[1])
    for part, target, scale in zip(*(x.split(rows) for x in (x_RK, whole, scale_R1)), strict=True):
        part = part.to(dtype)
        scale.copy_((part.abs().amax(dim=1, keepdim=True) / most).clamp_(min=torch.finfo(dtype).tiny))
        target.copy_((part / scale).round_())
    return whole, scale_R1


@torch.no_grad()
def rounded(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as int8 (N, K), and the scale of each output channel, float32 (N)."""
    whole, scale_N1 = _rounded_rows(weight_NK, WEIGHT_RANGE, torch.float32)
    return whole, scale_N1[:, 0]


def rounded_tokens(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Activations as int8 (M, K), and the scale of each token (M, 1) in their dtype, not finite if the token is not."""
    return _rounded_rows(x_MK, TOKEN_RANGE, x_MK.dtype)


def plain_product(x_MK: Tensor, weight_NK: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    """The product of int8 tensors, times the channels' scales, by PyTorch's own function, which CUDA has too."""
    missing = CUDA_TOKENS - len(x_MK)
    padded = F.pad(x_MK, (0, 0, 0, missing)) if missing > 0 else x_MK  # padding by nothing would copy
    return (torch._int_mm(padded, weight_NK.t())[: len(x_MK)] * scale_N).to(dtype)


def float8_rows(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in FP8 (R, K), and the scale of each, float32 (R, 1), not finite if the row is not."""
    x_RK = x_RK.float()
    scale_R1 = (_largest(x_RK) / FLOAT8_RANGE).clamp(min=torch.finfo(torch.float32).tiny)
    return (x_RK / scale_R1).to(FLOAT8), scale_R1


def float8_product(x_MK: Tensor, scale_M1: Tensor, weight_NK: Tensor, scale_N1: Tensor, bias: Tensor | None) -> Tensor:
    """The product of FP8 tensors times both scales, bfloat16 (M, N): by the card, or on a CPU the same in float32."""
    if not _on_cpu(x_MK) and all(n % FLOAT8_MULTIPLE == 0 for n in weight_NK.shape):
        return torch._scaled_mm(x_MK, weight_NK.t(), scale_M1, scale_N1.t(), bias=bias, out_dtype=torch.bfloat16)
    y_MN = (x_MK.float() @ weight_NK.float().t()) * scale_M1 * scale_N1.t()
    return (y_MN if bias is None else y_MN + bias.float()).bfloat16()


def packed_product(x_MK: Tensor, packed_KN: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    """The same product by oneDNN, from a weight that `qlinear_prepack` has packed; changes x_MK."""
    x_MK = x_MK.view(torch.uint8).bitwise_xor_(OFFSET)  # x + 128, in uint8; in place, as nothing else uses them
    zero = scale_N.new_zeros(1, dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        x_MK, 1.0, OFFSET, packed_KN, scale_N, zero, None, 1.0, 0, dtype, "none", [], ""
    )


class RoundedLinear(nn.Module):
    """A frozen linear layer in int8; the base class of those in FP8 and NF4.

    Its parameter `weight` has the published name and shape but no numbers (it is on the `meta` device). So rounded
    weights cannot be mistaken for real ones: saving a state dict, or loading one, fails instead.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        self.weight = nn.Parameter(linear.weight.detach().to("meta"), requires_grad=False)
        self.bias = linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self._rounded: Tensor | None = None  # int8: (N, K) on CUDA, oneDNN's own layout on CPUs
        self._scale_N = torch.empty(0)

    def put(self, weight: Tensor) -> None:
        """Round `weight` (N, K), and keep the result on its device."""
        whole, self._scale_N = rounded(weight.detach())
        self._product = packed_product if _on_cpu(weight) else plain_product
        self._rounded = torch.ops.onednn.qlinear_prepack(whole, None) if _on_cpu(weight) else whole

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output in the dtype that its weights had, as autocast makes an nn.Linear answer.

        Raises:
            RuntimeError: a gradient would have to pass, or `put` has not been called yet.
        """
        if self._rounded is None or (torch.is_grad_enabled() and x.requires_grad):
            raise RuntimeError(
                "a layer of the VLM is rounded (vlm_quantization), so it passes no gradient and has no weights before "
                "a checkpoint is loaded: load the policy from a checkpoint, and freeze all of the VLM to train"
            )
        return self._answer(x.detach().to(self.dtype), self._rounded)

    def _answer(self, x: Tensor, weight: Tensor) -> Tensor:
        tokens_MK, scale_M1 = rounded_tokens(x.reshape(-1, self.in_features))
        y_MN = self._product(tokens_MK, weight, self._scale_N, self.dtype)
        y_MN = y_MN.mul_(scale_M1) if self.bias is None else torch.addcmul(self.bias, y_MN, scale_M1)
        return y_MN.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Any, recurse: bool = True) -> "RoundedLinear":
        """What `to()` does to each tensor, except for `weight`, which has no numbers; a RuntimeError where device or
        dtype would change, which would need the unrounded weights."""
        probe = torch.empty(0, dtype=self.dtype, device=self._scale_N.device)
        if self._rounded is not None and (fn(probe).device, fn(probe).dtype) != (probe.device, probe.dtype):
            raise RuntimeError(
                f"the VLM is rounded (vlm_quantization) and stays on {probe.device} in {probe.dtype}: load the policy "
                "again, with the new device and dtype in its config"
            )
        weight = self._parameters.pop("weight")
        try:
            return super()._apply(fn, recurse)
        finally:
            self._parameters["weight"] = weight

    def __deepcopy__(self, memo: dict[int, Any]) -> "RoundedLinear":
        """A copy that shares the rounded weights: they never change, and torch cannot copy oneDNN's packed ones."""
        memo[id(self._rounded)] = self._rounded
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}weight" in state_dict:
            *_, errors = args
            errors.append(f"{prefix}weight is rounded (vlm_quantization): load the policy with from_pretrained")
        else:
            super()._load_from_state_dict(state_dict, prefix, *args)


class NF4Linear(RoundedLinear):
    """A frozen linear layer in 4 bits: bitsandbytes' product, which unpacks the weight at each call."""

    def put(self, weight: Tensor) -> None:
        from bitsandbytes.functional import quantize_4bit  # an extra

        self._rounded, self._levels = quantize_4bit(weight.detach(), blocksize=64, quant_type="nf4")
        self._scale_N = self._levels.absmax  # of each block

    def _answer(self, x: Tensor, weight: Tensor) -> Tensor:
        from bitsandbytes import matmul_4bit

        return matmul_4bit(x, weight, self._levels, bias=self.bias)


class Float8Linear(RoundedLinear):
    """A frozen linear layer in FP8 (e4m3). On a CPU, where `check` refuses it, its numbers are emulated for tests."""

    def put(self, weight: Tensor) -> None:
        self._rounded, self._scale_N1 = float8_rows(weight.detach())
        self._scale_N = self._scale_N1[:, 0]

    def _answer(self, x: Tensor, weight: Tensor) -> Tensor:
        tokens_MK, scale_M1 = float8_rows(x.reshape(-1, self.in_features))
        bias = None if self.bias is None else self.bias.bfloat16()
        y_MN = float8_product(tokens_MK, scale_M1, weight, self._scale_N1, bias)
        return y_MN.to(self.dtype).view(*x.shape[:-1], self.out_features)


LAYERS = {"int8": RoundedLinear, "nf4": NF4Linear, "fp8": Float8Linear}


def prepare(model: PI0, kind: str) -> None:
    """Freeze the VLM, and replace its linear layers by rounded ones; `put` gives each its weights later."""
    model.paligemma.requires_grad_(False)
    for part in (model.vision, model.vlm):
        for name, child in list(part.named_modules()):
            if isinstance(child, nn.Linear):
                part.set_submodule(name, LAYERS[kind](child))


def layers(module: nn.Module) -> dict[str, RoundedLinear]:
    """Rounded layers by the names of their weights."""
    return {f"{name}.weight": m for name, m in module.named_modules() if isinstance(m, RoundedLinear)}
