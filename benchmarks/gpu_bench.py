"""Helpers for the parts of `gpu.py`: policies on a device, time and memory of calls, and lines for errors."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from presets import SIZES, presets
from subjects import Ours, Policy, RandomWeights, batch_for
from torch import Tensor

from lerobot_pi0 import PI0Policy
from lerobot_pi0.kernels import rounding

Row = dict[str, Any]
GIB = 2**30


class LeftOutError(Exception):
    """This machine cannot do a measurement; the message says why."""


class Bench:
    """A device, a size, and functions that all parts need."""

    def __init__(self, device: str, size: str, repeats: int) -> None:
        self.device, self.name, self.size, self.repeats = torch.device(device), size, SIZES[size], repeats
        self.full = size == "full"

    @property
    def on_card(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Wait until the device has finished."""
        if self.on_card:
            torch.cuda.synchronize()

    def milliseconds(self, run: Callable[[], object], repeats: int | None = None) -> Row:
        """Median and 90th percentile of one call, after two calls that do not count; and the time of the first call."""
        times = []
        for _ in range((repeats or self.repeats) + 2):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            times.append((time.perf_counter() - start) * 1e3)
        rest = sorted(times[2:])
        return {"ms": statistics.median(rest), "p90_ms": rest[math.ceil(0.9 * len(rest)) - 1], "first_ms": times[0]}

    def build(
        self, subject: Any, dtype: str = "bfloat16", device: torch.device | None = None, **options: Any
    ) -> Policy:
        """A policy whose weights are made on the device."""
        device, weights = device or self.device, RandomWeights()

        def make(name: str, shape: torch.Size, kind: torch.dtype) -> Tensor:
            with device:
                return weights(name, shape, kind)

        policy = subject.build(self.size, make, dtype, **options)
        unread = {name: torch.empty(p.shape) for name, p in policy.named_parameters() if p.is_meta}
        policy.load_state_dict(unread, strict=False, assign=True)
        policy.to(device)
        policy.config.device = str(device)
        if isinstance(policy, PI0Policy):
            policy.finish().train(options.get("training", False))
        return policy

    def rounded(self, kind: str, emulate: bool = False, **options: Any) -> PI0Policy:
        """Ours with a VLM that is rounded on the device.

        Args:
            emulate: allow FP8 on a CPU too, which computes the same numbers slowly.

        Raises:
            LeftOutError: the device cannot compute products of this kind.
        """
        try:
            if not (emulate and kind == "fp8" and self.device.type == "cpu"):
                rounding.check(kind, self.device)
        except (ImportError, ValueError) as error:
            raise LeftOutError(str(error)) from error
        with presets(self.size):
            policy = Ours.build(self.size, RandomWeights(), "bfloat16", **options)
        weights = {name: p.detach() for name, p in policy.named_parameters()}
        rounding.prepare(policy.model, kind)
        policy.to(self.device)
        for name, layer in rounding.layers(policy).items():
            layer.put(weights[name].to(self.device))
        policy.config.device = str(self.device)
        return policy.finish()

    def batch(self, cameras: int = 3, prompt: int = 48, batch_size: int = 1) -> dict[str, Tensor]:
        """A batch as LeRobot's preprocessor makes it, on the device."""
        made = batch_for(self.size, cameras, prompt, batch_size) | {"index": torch.arange(batch_size)}
        return {key: x.to(self.device) for key, x in made.items()}

    @contextmanager
    def peak(self, row: Row) -> Iterator[None]:
        """Add to the row the peak of memory that tensors took in the block, and of memory that torch reserved."""
        if not self.on_card:
            yield
            return
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        yield
        row["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        row["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB

    def free(self) -> None:
        """Free memory that is no longer used."""
        gc.collect()
        if self.on_card:
            torch.cuda.empty_cache()

    def lines(self, cases: Iterable[tuple[Row, Callable[[], Row]]]) -> Iterator[Row]:
        """A line for each case: its results, its error, or why it is left out. An error does not end the others."""
        for row, run in cases:
            try:
                yield row | run()
            except LeftOutError as why:
                yield row | {"left out": str(why)}
            except Exception as error:  # such as too little memory
                yield row | {"error": repr(error)}
            self.free()


def relative(found: Tensor, exact: Tensor) -> float:
    """The difference, relative to the norm of `exact`."""
    found, exact = found.detach().cpu().double(), exact.detach().cpu().double()
    return ((found - exact).norm() / exact.norm()).item()
