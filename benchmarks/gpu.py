"""π₀ on a GPU, unattended: is it right there, how fast is it, how much memory does it take, beside the built-in.

    python benchmarks/gpu.py                          # `make bench-gpu`: everything, at full size
    python benchmarks/gpu.py --seconds 600 --parts card right chunk
    python benchmarks/gpu.py --device cpu --size small     # a rehearsal

Parts come in the order of what they tell. Each line is written to `gpu.jsonl` as soon as it is known; at the end there
are `gpu.json` and `gpu.md`. A part that is not likely to fit into the time left is not begun, and an error is a line.

Weights are random; the built-in and ours hold the same numbers.
"""

import argparse
import json
import math
import platform
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from presets import SIZES, presets
from subjects import CHUNK, DIMS, Builtin, Ours, Policy, RandomWeights, Transformers, batch_for
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lerobot_pi0 import PI0Policy
from lerobot_pi0.kernels import rounding

Row = dict[str, Any]
GIB = 2**30


class Bench:
    """A device, a size, and what all parts need."""

    def __init__(self, device: str, size: str, repeats: int) -> None:
        self.device, self.name, self.size, self.repeats = torch.device(device), size, SIZES[size], repeats
        self.full = size == "full"

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, run: Callable[[], object], repeats: int | None = None) -> Row:
        """Median and 90th percentile of one call, after two that do not count; the first is given too."""
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
        """A policy on the device."""
        policy = subject.build(self.size, RandomWeights(), dtype, **options)
        unread = {name: torch.empty(p.shape) for name, p in policy.named_parameters() if p.is_meta}
        policy.load_state_dict(unread, strict=False, assign=True)
        policy.to(device or self.device)
        policy.config.device = str(device or self.device)
        if isinstance(policy, PI0Policy):
            policy.finish().train(options.get("training", False))
        return policy

    def rounded(self, kind: str) -> PI0Policy:
        """Ours with a VLM that is rounded on the device."""
        with presets(self.size):
            policy = Ours.build(self.size, RandomWeights(), "bfloat16")
        weights = {name: p.detach() for name, p in policy.named_parameters()}
        rounding.check(kind, self.device)
        rounding.prepare(policy.model, kind)
        policy.to(self.device)
        for name, layer in rounding.layers(policy).items():
            layer.put(weights[name].to(self.device))
        policy.config.device = str(self.device)
        return policy.finish()

    def batch(self, cameras: int = 3, prompt: int = 48, batch_size: int = 1) -> dict[str, Tensor]:
        """What LeRobot's preprocessor hands over, on the device."""
        made = batch_for(self.size, cameras, prompt, batch_size) | {"index": torch.arange(batch_size)}
        return {key: x.to(self.device) for key, x in made.items()}

    @contextmanager
    def peak(self, row: Row) -> Iterator[None]:
        """Put the most memory that tensors took meanwhile, and what was reserved for them, into the row."""
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        yield
        row["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        row["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB


def relative(found: Tensor, exact: Tensor) -> float:
    """How far apart, of the exact one's norm."""
    found, exact = found.detach().cpu().double(), exact.detach().cpu().double()
    return ((found - exact).norm() / exact.norm()).item()


def card(bench: Bench) -> Iterator[Row]:
    """What the device itself reaches: a copy, and products as wide as the VLM's."""
    if bench.device.type == "cuda":
        properties = torch.cuda.get_device_properties(bench.device)
        yield {
            "name": properties.name,
            "gib": properties.total_memory / GIB,
            "capability": torch.cuda.get_device_capability(),
        }
    yield {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    x = torch.empty(2**30 if bench.full else 2**20, dtype=torch.uint8, device=bench.device)
    other = torch.empty_like(x)
    copied = bench.milliseconds(lambda: other.copy_(x))
    yield {"what": "copy", **copied, "gb_per_s": 2 * x.nbytes / copied["ms"] / 1e6}
    width, wide = bench.size.vlm.gemma.width, bench.size.vlm.gemma.mlp_dim
    weight = torch.randn(wide, width, device=bench.device, dtype=torch.bfloat16)
    for rows in (8192, 816, 50):
        tokens = torch.randn(rows, width, device=bench.device, dtype=torch.bfloat16)
        found = bench.milliseconds(lambda tokens=tokens: F.linear(tokens, weight))
        yield {"what": f"product, {rows} rows", **found, "tflop_per_s": 2 * rows * width * wide / found["ms"] / 1e9}


def right(bench: Bench) -> Iterator[Row]:
    """The device against the CPU in float32 at the small size; the limits are those of rounding."""
    small = Bench(str(bench.device), "small", 1)
    cpu = torch.device("cpu")
    noise, draws = torch.randn(1, CHUNK, 32), (torch.randn(2, 1, CHUNK, 32), torch.rand(2, 1))
    tf32 = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        for options in _settings():
            there, here = (small.build(Ours, "float32", device, **options) for device in (small.device, cpu))
            how = _guide(options)
            chunks = [
                p.predict_action_chunk(batch_for(small.size), noise=noise.to(p.config.device), **how)
                for p in (there, here)
            ]
            off = relative(*chunks)
            yield {"what": "chunk", "options": _short(options), "off": off, "good": off < 1e-4}
        for frozen in (True, False):
            pair = [
                small.build(Ours, "float32", device, frozen=frozen, training=True) for device in (small.device, cpu)
            ]
            yield _training(pair, batch_for(small.size, batch_size=2), draws, frozen)
        exact = small.build(Ours, "float32", cpu).predict_action_chunk(batch_for(small.size), noise=noise)
        yield from _bfloat16(small, exact, noise)
    finally:
        torch.set_float32_matmul_precision(tf32)


def _settings() -> Iterator[Row]:
    yield {}
    yield {"cuda_graphs": False}
    for solver in ("midpoint", "heun", "adaptive"):
        yield {"solver": solver}
    for mode in ("identity", "vjp", "trained"):
        delays = {"rtc_training_max_delay": 9} if mode == "trained" else {}
        yield {"rtc_config": RTCConfig(), "rtc_guidance": mode, **delays}


def _short(options: Row) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items() if key != "rtc_config") or "defaults"


def _guide(options: Row) -> Row:
    if "rtc_config" not in options:
        return {}
    left = torch.randn(10, DIMS, generator=torch.Generator().manual_seed(1))
    return {"inference_delay": 4, "prev_chunk_left_over": left}


def _training(pair: list[Any], batch: dict[str, Tensor], draws: tuple[Tensor, Tensor], frozen: bool) -> Row:
    losses = []
    for policy in pair:
        noise, times = (x.to(policy.config.device) for x in draws)
        losses.append(policy.forward(batch, noise=noise, time=times)[0])
        losses[-1].backward()
    grads = [[p.grad.cpu() for p in policy.parameters() if p.grad is not None] for policy in pair]
    off = max(relative(a, b) for a, b in zip(*grads, strict=True) if b.norm() > 0)
    far = relative(*losses)
    return {
        "what": "loss and gradients",
        "frozen": frozen,
        "off": far,
        "gradients_off": off,
        "good": far < 1e-4 and off < 1e-3,
    }


def _bfloat16(small: Bench, exact: Tensor, noise: Tensor) -> Iterator[Row]:
    makers: dict[str, Callable[[], Any]] = {
        "bfloat16": lambda: small.build(Ours),
        "int8": lambda: small.rounded("int8"),
        "nf4": lambda: small.rounded("nf4"),
    }
    for name, make in makers.items():
        try:
            policy = make()
        except (ImportError, ValueError) as error:
            yield {"what": name, "left out": str(error)}
            continue
        off = relative(policy.predict_action_chunk(batch_for(small.size), noise=noise.to(small.device)), exact)
        yield {"what": name, "off": off, "good": off < (0.03 if name == "bfloat16" else 0.3)}


def chunk(bench: Bench) -> Iterator[Row]:
    """Chunks: ours in a graph and kernel by kernel, rounded, the built-in's, transformers'."""
    ours = bench.build(Ours)
    subjects: dict[str, Callable[[], Any]] = {
        "ours, one graph": lambda: ours,
        "ours, kernel by kernel": lambda: bench.build(Ours, cuda_graphs=False),
        "built-in": lambda: bench.build(Builtin),
        "transformers": lambda: bench.build(Transformers),
        "ours, int8": lambda: bench.rounded("int8"),
    }
    for name, make in subjects.items():
        try:
            policy = make()
            for cameras, prompt in ((3, 48), (1, 10)):
                batch, row = bench.batch(cameras, prompt), {"what": name, "cameras": cameras, "prompt": prompt}
                with torch.inference_mode(), bench.peak(row):
                    found = bench.milliseconds(lambda policy=policy, batch=batch: policy.predict_action_chunk(batch))
                yield row | found
        except Exception as error:  # one subject's error shall not hide the others
            yield {"what": name, "error": repr(error)}


def attention(bench: Bench) -> Iterator[Row]:
    """Backends of attention at our shapes, with and without a mask: the first call shows what a plan costs."""
    dim, dtype = bench.size.vlm.gemma.head_dim, torch.bfloat16
    for queries, keys in ((8 * 816, 816), (8 * 50, 867)) if bench.full else ((8 * 10, 64),):
        q, kv = (torch.randn(1, 1, n, dim, device=bench.device, dtype=dtype) for n in (queries, keys))
        for masked in (False, True):
            mask = torch.zeros(1, 1, 1, keys, device=bench.device, dtype=dtype) if masked else None
            for backend in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
                row = {"what": backend.lower(), "queries": queries, "keys": keys, "mask": masked}
                try:
                    with sdpa_kernel(getattr(SDPBackend, backend)):
                        found = bench.milliseconds(
                            lambda q=q, kv=kv, mask=mask: F.scaled_dot_product_attention(q, kv, kv, mask)
                        )
                    yield row | found
                except RuntimeError as error:
                    yield row | {"left out": str(error).splitlines()[0]}


def step(bench: Bench) -> Iterator[Row]:
    """Training steps with a frozen VLM, and their peak memory beside what `lerobot-pi0 plan` counts."""
    for name, subject in (("ours", Ours), ("built-in", Builtin)):
        for batch_size in (1, 8, 32, 64) if bench.full else (1, 2):
            row: Row = {"what": name, "batch": batch_size}
            try:
                with bench.peak(row):
                    row |= _one_step(bench, subject, batch_size)
                row["samples_per_s"] = batch_size / row["ms"] * 1e3
                if name == "ours":
                    row["plan_gib"] = _planned(bench, batch_size) / GIB
            except Exception as error:  # such as too little memory
                row["error"] = repr(error)
            yield row
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()


def _one_step(bench: Bench, subject: Any, batch_size: int) -> Row:
    policy = bench.build(subject, training=True)
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
    batch = bench.batch(batch_size=batch_size)
    ours = isinstance(policy, PI0Policy)

    def run() -> None:
        mixed = nullcontext() if ours else torch.autocast(bench.device.type, torch.bfloat16)
        with mixed:
            loss, _ = policy.forward(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if ours:
            policy.update()

    return bench.milliseconds(run, max(3, bench.repeats // 4))


def _planned(bench: Bench, batch_size: int) -> int:
    from lerobot_pi0.tools.memory import Counter, Load

    with presets(bench.size):
        config = Ours.config(bench.size, "bfloat16", True)
        counter = Counter(config, foreach=bench.device.type == "cuda")
        side = bench.size.vlm.vision.image_size
        return counter.count(batch_size, Load(((side, side),) * 3, 48)).peak


def load(bench: Bench) -> Iterator[Row]:
    """Saving and loading a checkpoint."""
    with TemporaryDirectory() as folder, presets(bench.size):
        policy = bench.build(Ours)
        policy.config.save_tokenizer = False
        yield {"what": "save", **bench.milliseconds(lambda: policy.save_pretrained(folder), 1)}
        yield {"what": "load", **bench.milliseconds(lambda: PI0Policy.from_pretrained(folder), 1)}


def threads(bench: Bench) -> Iterator[Row]:
    """Two threads that ask the same policy: their chunks are those of one."""
    policy, batch = bench.build(Ours), bench.batch()
    noise = torch.randn(2, 1, CHUNK, 32, device=bench.device)
    alone = [policy.predict_action_chunk(batch, noise=x) for x in noise]
    together: list[list[Tensor]] = [[], []]

    def ask(i: int) -> None:
        together[i] += [policy.predict_action_chunk(batch, noise=noise[i]) for _ in range(5)]

    running = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    off = [relative(x, alone[i]) for i in range(2) for x in together[i]]
    yield {
        "what": "two threads",
        "chunks": len(off),
        "off": max(off, default=None),
        "good": len(off) == 10 and max(off) < 1e-3,
    }


def compilation(bench: Bench) -> Iterator[Row]:
    """torch.compile: the time until the first chunk, and then; the built-in too."""
    if bench.device.type != "cuda":
        yield {"what": "compile_model", "left out": "takes minutes, and says nothing about a GPU"}
        return
    for name, options in (("ours", {"compile_model": True, "compile_mode": "max-autotune-no-cudagraphs"}),):
        policy, batch = bench.build(Ours, **options), bench.batch()
        yield {
            "what": name,
            **bench.milliseconds(lambda policy=policy, batch=batch: policy.predict_action_chunk(batch)),
        }
    theirs = bench.build(Builtin)
    theirs.model.sample_actions = torch.compile(theirs.model.sample_actions, mode="max-autotune")
    torch.set_float32_matmul_precision("high")
    with torch.inference_mode():
        yield {"what": "built-in", **bench.milliseconds(lambda: theirs.predict_action_chunk(bench.batch()))}


PARTS: dict[str, tuple[Callable[[Bench], Iterator[Row]], float]] = {
    "card": (card, 10),
    "right": (right, 60),
    "chunk": (chunk, 120),
    "attention": (attention, 30),
    "step": (step, 180),
    "load": (load, 60),
    "threads": (threads, 30),
    "compile": (compilation, 600),
}
"""Each part, and the seconds that it is likely to need at full size."""


def markdown(rows: Sequence[Row], title: str) -> str:
    """A table for each part."""
    lines = [f"# {title}", ""]
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == part]
        keys = list(dict.fromkeys(key for row in own for key in row if key != "part"))
        lines += [f"## {part}", "", "| " + " | ".join(keys) + " |", "|---" * len(keys) + "|"]
        lines += ["| " + " | ".join(_cell(row.get(key, "")) for key in keys) + " |" for row in own] + [""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="(default: cuda)")
    parser.add_argument("--size", choices=SIZES, default="full", help="of the networks (default: full)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--seconds", type=float, default=3600, help="time for all parts (default: 3600)")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each line (default: 20)")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"), help="folder for the results")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    bench, begun, rows = Bench(options.device, options.size, options.repeats), time.monotonic(), []
    with (options.out / "gpu.jsonl").open("w") as log:

        def write(part: str, row: Row) -> None:
            rows.append({"part": part, **row})
            log.write(json.dumps(rows[-1], default=str) + "\n")
            log.flush()
            print(*(f"{key}={_cell(value)}" for key, value in rows[-1].items()), flush=True)

        for part in options.parts:
            run, needed = PARTS[part]
            left = options.seconds - (time.monotonic() - begun)
            if left < (needed if bench.full else 1):
                write(part, {"left out": f"needs about {needed:.0f} s, and {left:.0f} are left"})
                continue
            try:
                for row in run(bench):
                    write(part, row)
            except Exception as error:  # the other parts shall still be measured
                write(part, {"error": repr(error), "where": traceback.format_exc().splitlines()[-3].strip()})
    (options.out / "gpu.json").write_text(json.dumps(rows, indent=1, default=str))
    title = next((row["name"] for row in rows if row["part"] == "card" and "name" in row), options.device)
    (options.out / "gpu.md").write_text(markdown(rows, f"{title}, {options.size} size"))
    return rows


if __name__ == "__main__":
    main()
