"""Which fused attention PyTorch takes on CUDA, and in which order.

PyTorch 2.11 tries cuDNN first on Hopper and Blackwell. cuDNN builds a plan for each new shape, about half a second
each, and every length of a prompt is a new shape; with a mask, its backward pass returns NaN for some numbers of keys
(pytorch issue 196678). So flash attention comes first, then the memory-efficient kernel, which takes masks.
"""

import contextlib

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ORDER = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention_order(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The context in which attention on this device is computed; once around many layers, as it costs host time."""
    return sdpa_kernel(ORDER, set_priority=True) if device.type == "cuda" else contextlib.nullcontext()
