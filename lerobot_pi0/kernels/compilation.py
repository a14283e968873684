"""torch.compile with the settings that π₀'s calls need: whole graphs, and fixed shapes."""

from collections.abc import Callable

import torch

RECOMPILATIONS = 64
"""Prompts have at most four padded lengths, times training and control, times guided and not; torch's limit is 8."""


def compiled[**P, R](function: Callable[P, R], mode: str) -> Callable[P, R]:
    """The function as one compiled graph per shape of its arguments; a graph break is an error.

    Raises torch's limit of recompilations, and on CUDA lets float32 products be TF32: both for the whole process.

    Args:
        mode: torch.compile's.
    """
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32, as LeRobot's π₀ sets it where it compiles
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILATIONS)
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def begin_step() -> None:
    """To be called before the first compiled call of a chunk or a loss: CUDA graphs may then reuse their outputs."""
    torch.compiler.cudagraph_mark_step_begin()
