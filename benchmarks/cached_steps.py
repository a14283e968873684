"""Benchmark of a training step on cached contexts, compared with a step that computes them, and with the built-in.

`bench.py --what step-cached` calls it. Seconds are per sample: medians over alternating pairs. Both of our steps use
one policy in one process, which reads contexts or gets images; the built-in has its own batch size (`--theirs-batch`),
because a larger batch may not fit. Contexts are random numbers in a real folder of `--frames` frames. First they are
in memory; then each step reads them from the disk, because the system is told before to forget the file.

The optimizer is timed separately, because its work is the same in both of our steps: torch's AdamW as LeRobot builds
it, and its fused kernel. A whole step is the sum. The difference of the two optimizers after a step is printed too.
"""

import argparse
import functools
import logging
import mmap
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from presets import CAMERAS, SIZES, presets
from subjects import Builtin, Ours, RandomWeights, batch_for

from lerobot_pi0.network.attention import KVCache
from lerobot_pi0.tools.memory import context_shape
from lerobot_pi0.training.context_cache import CachedObservations
from lerobot_pi0.training.context_store import ContextCache, ContextWriter, Manifest, made_from, pack

LOADS = ((3, 48), (1, 10))
"""Cameras of three, and tokens of the prompt."""


def write_contexts(folder: Path, config: Any, cameras: int, batch: dict, frames: int, bits: int | None) -> ContextCache:
    """Write a cache of random contexts, all with the prompt of the batch's first sample."""
    tokens = batch[OBS_LANGUAGE_TOKENS][:1][batch[OBS_LANGUAGE_ATTENTION_MASK][:1]][None]
    layers, both, length, head_dim = context_shape(config, cameras, tokens.shape[1])
    manifest = Manifest(
        **made_from(config), vlm_digest="", cameras=list(CAMERAS[:cameras]), bits=bits, frames=frames, every=1,
        image_tokens=length - tokens.shape[1], prompt_tokens=tokens.shape[1], batch_size=1, dataset="", checkpoint="",
        dataset_frames=frames,
    )  # fmt: skip
    writer, draw = ContextWriter(folder, manifest), torch.Generator().manual_seed(0)
    mask = torch.ones(1, length, dtype=torch.bool)
    for slot in range(frames):
        x = torch.randn(layers, both, 1, length, head_dim, generator=draw).to(getattr(torch, config.dtype))
        writer.write(slot, pack([KVCache(*kv) for kv in x], mask, manifest), tokens.int().numpy())
    writer.close()
    return ContextCache(folder)


def forget(contexts: ContextCache) -> None:
    """Tell the system to drop the contexts' file from the page cache, if it supports this."""
    contexts._map.madvise(mmap.MADV_DONTNEED)
    with (contexts.folder / "contexts.bin").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Steps:
    """Forward and backward passes of our policy, with images and with cached contexts."""

    def __init__(self, load: tuple[int, int], options: argparse.Namespace, folder: Path) -> None:
        self.make = functools.cache(RandomWeights())
        size, dtype = SIZES[options.size], options.dtype
        self.size, self.dtype, self.options = size, dtype, options
        self.policy = Ours.build(size, self.make, dtype, True, True, flow_samples=options.flow_samples)
        self.batch = batch_for(size, *load, options.batch_size)
        for key in (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK):
            self.batch[key] = self.batch[key][:1].expand(options.batch_size, -1).clone()
        config = self.policy.config
        self.plain, self.cached = self.policy.observe, CachedObservations(config)
        with presets(size):
            self.cached.contexts = write_contexts(folder, config, load[0], self.batch, options.frames, options.bits)
        pixel = dict.fromkeys(CAMERAS[: load[0]], torch.zeros(options.batch_size, 3, 1, 1))
        self.samples, self.draw = self.batch | pixel, np.random.default_rng(0)

    def step(self, cached: bool, batch: dict) -> None:
        self.policy.observe = self.policy.objective._observe = self.cached if cached else self.plain
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16"):
            loss, _ = self.policy.forward(batch)
        loss.backward()
        self.policy.zero_grad()

    def computed(self) -> float:
        """Seconds for a sample whose context is computed."""
        return measure.seconds(lambda: self.step(False, self.batch)) / self.options.batch_size

    def read(self, from_disk: bool = False) -> float:
        """Seconds for a sample whose context is read."""
        index = self.draw.choice(self.options.frames, self.options.batch_size, replace=False)
        if from_disk:
            forget(self.cached.contexts)
        batch = self.samples | {"index": torch.from_numpy(index)}
        return measure.seconds(lambda: self.step(True, batch)) / self.options.batch_size

    def theirs(self, load: tuple[int, int]) -> tuple[Any, Callable[[], float]]:
        """LeRobot's policy, and seconds of its sample."""
        policy = Builtin.build(self.size, self.make, self.dtype, True, True)
        batch = batch_for(self.size, *load, self.options.theirs_batch)

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16"):
                loss, _ = policy.forward(batch)
            loss.backward()
            policy.zero_grad()

        return policy, lambda: measure.seconds(step) / self.options.theirs_batch


def optimizer_seconds(policy: Any, fused: bool | None, repeats: int) -> tuple[float, list[torch.Tensor]]:
    """Median seconds of AdamW's steps for the trained weights of a policy, and the first weights after these steps."""
    weights = [p.detach().float().clone().requires_grad_() for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.01, fused=fused)
    draw = torch.Generator().manual_seed(1)
    for p in weights:
        p.grad = torch.empty_like(p).normal_(std=0.01, generator=draw)
    times = [measure.seconds(optimizer.step) for _ in range(repeats + 1)]
    return statistics.median(times[1:]), [p.detach()[:1].clone() for p in weights]


def compare(options: argparse.Namespace, load: tuple[int, int]) -> dict[str, Any]:
    """All numbers of one load."""
    with tempfile.TemporaryDirectory(dir=options.disk) as folder:
        steps = Steps(load, options, Path(folder))
        timers = {"read": steps.read, "from disk": functools.partial(steps.read, True), "computed": steps.computed}
        theirs = None
        if options.theirs_batch:
            theirs, timers["built-in"] = steps.theirs(load)
        times = measure.alternate(timers, options.pairs)
        megabytes = steps.cached.contexts.manifest.record_bytes / 1e6
        policy = steps.policy
        del steps, timers
    measure.give_back()
    plain, fused = (optimizer_seconds(policy, kind, options.pairs) for kind in (None, True))
    apart = max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(plain[1], fused[1], strict=True))
    own = optimizer_seconds(theirs, None, options.pairs)[0] if theirs is not None else None
    return {
        "seconds": times, "MB a frame": megabytes, "AdamW": plain[0], "fused AdamW": fused[0],
        "fused differs by": apart, "built-in AdamW": own,
    }  # fmt: skip


def as_text(load: tuple[int, int], found: dict[str, Any], batch: int, theirs: int) -> str:
    """The numbers of one load as lines."""
    times = found["seconds"]

    def faster(than: str, ours: str, more: float = 0.0, its: float = 0.0) -> str:
        pairs = zip(times[than], times[ours], strict=True)
        return f"{statistics.median((a + its) / (b + more) for a, b in pairs):.1f}x"

    lines = [
        f"step-cached, {load[0]} of 3 cameras, {load[1]} tokens, batch {batch}, {found['MB a frame']:.2f} MB a frame"
    ]
    lines += [f"  {name:12} {statistics.median(x):9.4f} s a sample" for name, x in times.items()]
    lines.append(f"  forward and backward: {faster('computed', 'read')} our own with the VLM")
    if "built-in" in times:
        lines[-1] += f", {faster('built-in', 'read')} the built-in's (batch {theirs})"
    for name in ("AdamW", "fused AdamW"):
        each = found[name] / batch
        lines.append(
            f"  with the disk and {name} ({found[name]:.3f} s a step): {faster('computed', 'from disk', each, each)}"
        )
        if "built-in" in times:
            its = found["built-in AdamW"] / theirs
            lines[-1] += f", the built-in with its AdamW ({found['built-in AdamW']:.3f} s a step) "
            lines[-1] += faster("built-in", "from disk", each, its)
    lines.append(f"  fused AdamW differs by {found['fused differs by']:.1e} of the largest weight of a row")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure all loads, print them, and return the numbers."""
    logging.getLogger("lerobot_pi0").setLevel(logging.ERROR)
    results = {}
    for load in LOADS:
        found = results[f"{load[0]} cameras"] = compare(options, load)
        print(as_text(load, found, options.batch_size, options.theirs_batch), flush=True)
    return results
