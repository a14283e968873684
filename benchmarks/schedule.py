"""Count of the kernels that Inductor (torch.compile's backend) would launch on CUDA, without a GPU or its driver.

The function is traced on fake tensors, lowered and scheduled as in torch.compile. Then, instead of generating code,
the kernels are counted: those that would be generated, and calls of libraries. Inductor asks the driver for the GPU's
properties; here it gets those of an H100. Inductor may fuse a matrix product with what follows it, but it decides this
by measuring (max-autotune). So this is not counted: each product is one call.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._dynamo.device_interface import CudaInterface, caching_worker_device_properties
from torch._inductor import compile_fx, ir, scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _triton
from torch.utils._pytree import tree_flatten, tree_unflatten

CARD = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    warp_size=32,
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
)
"""What the driver says of a card."""


@contextlib.contextmanager
def as_with_a_card() -> Iterator[None]:
    """Answer Inductor's questions about the GPU."""
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *args: CARD,
        "get_device_capability": lambda *args: (CARD.major, CARD.minor),
    }
    caches = (_triton.has_triton, DeviceProperties.create)
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
            if hasattr(CudaInterface, name):
                stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(answer)))
        stack.enter_context(mock.patch.dict(caching_worker_device_properties, {"cuda": [CARD]}))
        for cached in caches:
            cached.cache_clear()
        yield
    for cached in caches:
        cached.cache_clear()


def scheduled(function: Callable[..., Any], args: tuple[Any, ...], mode: FakeTensorMode) -> int:
    """Kernels and calls of libraries that Inductor schedules for function(*args).

    Args:
        args: a structure of fake tensors and plain values.
        mode: of the fake tensors.
    """
    leaves, structure = tree_flatten(args)
    places = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]

    def flat(*tensors: torch.Tensor) -> Any:
        given = list(leaves)
        for i, x in zip(places, tensors, strict=True):
            given[i] = x
        return tree_flatten(function(*tree_unflatten(given, structure)))[0]

    inputs = [leaves[i] for i in places]
    with mode, torch.no_grad():
        traced = make_fx(torch.func.functionalize(flat), decomposition_table=select_decomp_table())(*inputs)
    with as_with_a_card(), torch.no_grad(), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        compile_fx._recursive_post_grad_passes(traced, is_inference=True)
        graph = GraphLowering(traced, example_inputs=inputs, is_inference=True)
        with V.set_graph_handler(graph), V.set_extern_kernel_nodes([]):
            graph.run(*inputs)
            graph.init_wrapper_code()
            graph._update_scheduler()
            return sum(map(_launches, graph.scheduler.nodes))


def _launches(node: scheduler.BaseSchedulerNode) -> bool:
    """Whether a kernel is launched: not for a part of another result, and not without elements."""
    return not isinstance(node, scheduler.NopKernelSchedulerNode) and not isinstance(node.node, ir.MultiOutput)
