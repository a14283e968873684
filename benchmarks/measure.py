"""Measurements for benchmarks: FLOPs, memory that autograd keeps, seconds of alternating runs, peak memory."""

import ctypes
import gc
import resource
import statistics
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def _attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""torch's FLOP counter knows only the GPU's fused attention, and would count none for the CPU's."""


class _Kept:
    """A tensor that autograd keeps. This object exists as long as its node of the graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_by_autograd(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the tensors that autograd keeps for its backward pass: one per storage, without parameters.

    They are counted after `forward` has returned: by then, branches whose output was not used have been freed.
    """
    known = {p.untyped_storage()._cdata for p in parameters}
    alive: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        loss = forward()
    storages = {kept.tensor.untyped_storage()._cdata: kept.tensor for kept in alive}
    return loss, [tensor for key, tensor in storages.items() if key not in known]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind these tensors."""
    return sum(t.untyped_storage().nbytes() for t in tensors)


def account_step(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> tuple[int, int]:
    """Floating-point operations of forward and backward pass, and bytes that autograd keeps in between.

    Counted are matrix products, convolutions and attention, two operations per multiply-add.
    """
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        loss, kept = kept_by_autograd(forward, parameters)
        loss.backward()
    return counter.get_total_flops(), storage_bytes(kept)


def account_inference(run: Callable[[], object]) -> int:
    """Floating-point operations of `run`."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        run()
    return counter.get_total_flops()


def seconds(run: Callable[[], object], repeats: int = 1) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def alternate(timers: dict[str, Callable[[], float]], pairs: int) -> dict[str, list[float]]:
    """Call each timer `pairs` times, in turn and in changing order, after one call that does not count."""
    names = list(timers)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(pairs + 1):
        for name in names if i % 2 else names[::-1]:
            elapsed = timers[name]()
            if i > 0:
                times[name].append(elapsed)
    return times


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over pairs of how many times faster `fast` is. Other work on the machine slows both runs of a pair."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def peak_bytes() -> int:
    """Peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes(most: bool = False) -> int:
    """Resident memory of this process, or its peak since `restart_peak`; on Linux."""
    key = "VmHWM" if most else "VmRSS"
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def file_bytes() -> int:
    """Resident memory that belongs to files, including libraries; on Linux."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssFile"))
    return int(line.split()[1]) * 1024


def restart_peak() -> None:
    """Start a new peak for `resident_bytes`; on Linux."""
    Path("/proc/self/clear_refs").write_text("5")


def give_back_at_once() -> None:
    """Let every tensor have its own pages, which go back to the system when it is freed; on Linux with glibc.

    By default the heap keeps the memory of freed tensors of up to 32 MiB for later ones.
    """
    threshold = -3  # M_MMAP_THRESHOLD
    ctypes.CDLL(None).mallopt(threshold, 2**16)
    give_back()


def give_back() -> None:
    """Return freed memory to the system; on Linux with glibc."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def in_own_process[**P, T](function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function` in a fresh process, so that peak memory is that of this call.

    The process is forked from one that has only done the imports, which would take longer than the call.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
        return pool.submit(function, *args, **kwargs).result()
