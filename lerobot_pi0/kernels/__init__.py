"""Faster forms of the network's layers. π₀ runs and is right without them.

`install` replaces layers by faster subclasses; parameters and their names stay. Other hardware gets a file of its own.

What acts on the whole process, and not on one model:

- `compilation.compiled` raises `torch._dynamo.config.recompile_limit`;
- `cpu_linear` keeps one scratch buffer per thread for a weight in float32, as large as the largest such weight;
- `compiled_layers` keeps what it has compiled, for the layers of all models;
- `cuda_graphs` lets one graph run at a time, as all share the memory between their kernels;
- `cpu_linear.packed` keeps copies of packed weights, as long as their layers live.
"""

from torch import nn

from ..network import gemma, siglip
from ..network.pi0 import PI0
from .compiled_layers import Layer, SiglipEncoderLayer, compile_layers
from .cpu_linear import Linear, SiglipMLP, advise
from .cuda_layers import CudaGemmaAttention, CudaGemmaMLP, CudaRMSNorm, CudaSiglipAttention, join

__all__ = ["FASTER", "advise", "compile_layers", "install", "join"]

FASTER: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    gemma.Attention: CudaGemmaAttention,
    gemma.MLP: CudaGemmaMLP,
    gemma.Layer: Layer,
    gemma.RMSNorm: CudaRMSNorm,
    siglip.Attention: CudaSiglipAttention,
    siglip.MLP: SiglipMLP,
    siglip.SiglipEncoderLayer: SiglipEncoderLayer,
}


def install(model: PI0) -> None:
    """Give the layers of the vision tower, the VLM and the expert their faster forms."""
    for part in (model.vision, model.vlm, model.expert):
        for module in part.modules():
            if type(module) in FASTER:
                module.__class__ = FASTER[type(module)]
