"""Benchmark of this policy against LeRobot's built-in π₀: seconds, arithmetic and memory, measured in the same run.

    python benchmarks/bench.py                                      # a small network, a minute
    python benchmarks/bench.py --size full --accounting-only --dtype float32   # no weights, no memory
    python benchmarks/bench.py --size full --what chunk --pairs 5
    python benchmarks/bench.py --size full --what chunk --pairs 5 --quantization int8
    python benchmarks/bench.py --size full --what chunk --pairs 5 --beside transformers
    python benchmarks/bench.py --size full --what step-frozen --flow-samples 8 --beside K=1
    python benchmarks/bench.py --size full --what step-cached --batch-size 8 --pairs 5    # see cached_steps.py

The table's lines are: a training step (forward and backward pass, no optimizer) with the VLM frozen or with everything
trained; a chunk of 50 actions; a tick of the control loop that only takes an action from the queue. Steps and chunks
are measured with all three cameras and a full prompt, and with one camera of three and a prompt of 10 tokens.

TFLOP and GiB kept by autograd are counted on fake tensors. Seconds are medians over alternating pairs of runs, and the
ratio is the median of the pairs' ratios. In bfloat16 a step runs under autocast, as lerobot-train runs it, and each
policy stores its weights in the dtypes that it chooses itself. Peak memory is that of a process that builds one policy
and runs the line once; it includes the memory of LeRobot and torch.

With `--quantization int8` our VLM is in int8 wherever it is frozen, and the built-in is unchanged (TFLOP then counts
integer operations too). Each chunk is compared with the chunk of the unrounded VLM from equal noise. With `--beside
transformers` ours is compared with transformers' `PI0ForConditionalGeneration`, which gets only cameras that exist and
no padding. With `--flow-samples K --beside K=1` a step with K draws is compared with a step with a single draw.
"""

import argparse
import functools
import json
import logging
import os
import statistics
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import cached_steps
import measure
import psutil
import torch
from presets import SIZES
from subjects import CHUNK, SUBJECTS, NoWeights, Policy, RandomWeights, batch_for
from torch import Tensor

GIB, TERA = 2**30, 1e12
OURS, THEIRS, OTHERS, ONE_SAMPLE = SUBJECTS


@dataclass(frozen=True)
class Line:
    """One row of the table: what runs, and on how much input."""

    what: str
    cameras: int = 3
    prompt: int = 48

    @property
    def training(self) -> bool:
        return self.what.startswith("step")

    def __str__(self) -> str:
        name = {
            "step-frozen": "step, VLM frozen",
            "step-all": "step, all trained",
            "chunk": "chunk",
            "tick": "tick from the queue",
        }[self.what]
        if self.what == "tick":
            return name
        return f"{name}, {self.cameras} of 3 cameras, {self.prompt} tokens"


LINES = [Line(what, *load) for what in ("step-frozen", "step-all", "chunk") for load in ((3, 48), (1, 10))]
LINES.append(Line("tick"))


@dataclass
class Result:
    """One policy's numbers in one line; None where nothing was measured."""

    flop: int | None = None
    kept_bytes: int | None = None
    seconds: list[float] | None = None
    peak_bytes: int | None = None
    weights: dict[tuple[str, torch.dtype], int] = field(default_factory=dict, repr=False)
    gradient_bytes: int = 0


@dataclass(frozen=True)
class Bench:
    """A run of the benchmark: the options that every line shares."""

    size: str
    dtype: str
    batch_size: int
    pairs: int
    quantization: str | None = None
    beside: str = THEIRS
    flow_samples: int = 1

    @property
    def subjects(self) -> tuple[str, str]:
        """Our policy, and the one that it is compared with."""
        return OURS, self.beside

    def build(self, subject: str, line: Line, make: Callable, rounded: bool = False) -> Policy:
        frozen = line.what != "step-all"
        options = {"rounded": rounded and frozen, "flow_samples": self.flow_samples} if subject == OURS else {}
        return SUBJECTS[subject].build(SIZES[self.size], make, self.dtype, frozen, line.training, **options)

    def batch(self, line: Line) -> dict[str, Tensor]:
        return batch_for(SIZES[self.size], line.cameras, line.prompt, self.batch_size)

    def autocast(self) -> torch.autocast:
        """The autocast that accelerate uses for a training step."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16")

    def account(self, subject: str, line: Line) -> Result:
        """Count arithmetic and kept memory, without weights."""
        policy, run = self.build(subject, line, NoWeights()), SUBJECTS[subject]
        trained = [p for p in policy.parameters() if p.requires_grad] if line.training else []
        result = Result(
            weights={(name, p.dtype): p.nbytes for name, p in policy.named_parameters()},
            gradient_bytes=sum(p.nbytes for p in trained),
        )
        batch = self.batch(line)

        def loss() -> Tensor:
            with self.autocast():
                return run.loss(policy, batch)

        if line.training:
            result.flop, result.kept_bytes = measure.account_step(loss, policy.parameters())
        elif line.what == "chunk" and subject != OTHERS:  # its shapes depend on values, which fake tensors do not have
            result.flop = measure.account_inference(lambda: run.chunk(policy, batch))
        return result

    def timer(self, subject: str, line: Line, make: Callable) -> Callable[[], float]:
        """A function that runs the line once and returns the seconds it took."""
        rounded = self.quantization is not None and line.what != "tick"
        policy, batch = self.build(subject, line, make, rounded), self.batch(line)

        def step() -> None:
            with self.autocast():
                loss, _ = policy.forward(batch)
            loss.backward()
            policy.zero_grad()

        @torch.inference_mode()
        def chunk() -> None:
            policy.predict_action_chunk(batch)

        @torch.inference_mode()
        def tick() -> float:
            policy.reset()
            policy.predict_action_chunk = lambda *args, **kwargs: torch.zeros(self.batch_size, 50, 6)
            policy.select_action(batch)
            return measure.seconds(lambda: policy.select_action(batch), repeats=49)

        if line.what == "tick":
            return tick
        return functools.partial(measure.seconds, step if line.training else chunk)

    def peak(self, subject: str, line: Line) -> int:
        """Peak memory of this process after one run of the line."""
        logging.getLogger("lerobot_pi0").setLevel(logging.ERROR)
        self.timer(subject, line, RandomWeights())()
        return measure.peak_bytes()

    def measure_seconds(self, line: Line, results: dict[str, Result]) -> None:
        make = NoWeights() if line.what == "tick" else functools.cache(RandomWeights())
        times = measure.alternate({s: self.timer(s, line, make) for s in self.subjects}, self.pairs)
        for subject, result in results.items():
            result.seconds = times[subject]

    @torch.no_grad()
    def rounding(self, line: Line) -> str:
        """The difference between results with the VLM in int8 and results with the unrounded VLM."""
        make, batch, shape = functools.cache(RandomWeights()), self.batch(line), (self.batch_size, CHUNK, 32)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        policies = [self.build(OURS, line, make, rounded) for rounded in (True, False)]
        chunks = [p.predict_action_chunk(batch, noise=noise) for p in policies]
        contexts = [p.model.context(p.observe(batch, noise.device)).cache for p in policies]
        caches = [torch.cat([x.float().flatten() for kv in context for x in kv]) for context in contexts]
        chunk, cache = (((a - b).norm() / b.norm()).item() for a, b in (chunks, caches))
        return (
            f"{line}: {self.quantization} from {self.dtype}: {chunk:.2%} of the chunk, {cache:.2%} of the context's "
            "keys and values (random weights have no outliers, as trained ones do: a hint at most)"
        )

    def measure_peak(self, line: Line, results: dict[str, Result]) -> None:
        for subject, result in results.items():
            if fits([result]):
                try:
                    result.peak_bytes = measure.in_own_process(self.peak, subject, line)
                except BrokenProcessPool:
                    logging.warning("%s, %s: the process was killed, probably for its memory", line, subject)


def fits(results: list[Result]) -> bool:
    """Whether policies with these weights (shared where possible) and the larger of their steps fit into memory."""
    measure.give_back()  # memory of the policies of the line before
    weights = functools.reduce(dict.__or__, (r.weights for r in results))
    step = max(r.gradient_bytes + (r.kept_bytes or 0) for r in results)
    needed = sum(weights.values()) + step + GIB
    available = psutil.virtual_memory().available
    if needed > available:
        logging.warning("skipped: needs %.1f GiB of memory, %.1f are free", needed / GIB, available / GIB)
    return needed <= available


def short_seconds(x: float) -> str:
    """Seconds as text, in a suitable unit."""
    unit, scale = next(((u, s) for u, s in (("s", 1), ("ms", 1e-3)) if x >= s), ("µs", 1e-6))
    return f"{x / scale:.3g} {unit}"


GROUPS = ["", "seconds", "", "", "TFLOP", "", "GiB kept", "", "GiB peak", ""]


def table_row(line: Line, ours: Result, theirs: Result) -> list[str]:
    """Cells of one line, "-" where nothing was measured."""

    def pair(name: str, show: Callable[[float], str]) -> list[str]:
        values = [getattr(result, name) for result in (ours, theirs)]
        return ["-" if value is None else show(value) for value in values]

    faster = "-"
    if ours.seconds and theirs.seconds:
        faster = f"{measure.median_ratio(theirs.seconds, ours.seconds):.3g}x"
    return [
        str(line),
        *pair("seconds", lambda times: short_seconds(statistics.median(times))),
        faster,
        *pair("flop", lambda flop: f"{flop / TERA:.3g}"),
        *pair("kept_bytes", lambda size: f"{size / GIB:.3g}"),
        *pair("peak_bytes", lambda size: f"{size / GIB:.3g}"),
    ]


def format_table(rows: list[list[str]]) -> str:
    """Text with aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = list(dict.fromkeys(line.what for line in LINES))
    parser.add_argument("--size", choices=SIZES, default="small", help="size of both networks (default: small)")
    parser.add_argument(
        "--what", default=",".join(what), help=f"lines to measure, from {','.join(what)} (default: all); or step-cached"
    )
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="config.dtype (default: bfloat16)"
    )
    parser.add_argument("--quantization", choices=["int8"], default=None, help="of our VLM (default: none)")
    parser.add_argument(
        "--beside",
        choices=[THEIRS, OTHERS, ONE_SAMPLE],
        default=THEIRS,
        help="what ours is compared with (default: built-in)",
    )
    parser.add_argument(
        "--flow-samples", type=int, default=1, help="draws of noise and time per sample, ours (default: 1)"
    )
    parser.add_argument("--pairs", type=int, default=3, help="timed runs of each policy (default: 3)")
    parser.add_argument("--batch-size", type=int, default=1, help="samples per step and chunk (default: 1)")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch (default: torch's own choice)")
    parser.add_argument(
        "--accounting-only", action="store_true", help="only count TFLOP and kept memory; this needs no memory"
    )
    parser.add_argument("--theirs-batch", type=int, default=1, help="step-cached: the built-in's; 0: none (default: 1)")
    parser.add_argument("--frames", type=int, default=64, help="step-cached: frames of the cache (default: 64)")
    parser.add_argument("--bits", type=int, choices=[8], default=None, help="step-cached: of contexts (default: all)")
    parser.add_argument("--disk", type=Path, default=None, help="step-cached: folder for the cache (default: /tmp's)")
    parser.add_argument(
        "--no-peak", action="store_true", help="skip peak memory, which needs a process for each number"
    )
    parser.add_argument("--json", type=Path, default=None, help="also write every number to this file")
    options = parser.parse_args(arguments)
    options.what = options.what.split(",")
    if options.what == ["step-cached"]:
        return options
    if unknown := set(options.what) - set(what):
        parser.error(f"--what: {', '.join(sorted(unknown))} is not one of {', '.join(what)}")
    if options.beside == OTHERS and options.what != ["chunk"]:
        parser.error(f"--beside {OTHERS} compares chunks alone: give --what chunk")
    return options


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Result]]:
    """Measure, print the table, and return the results by line and policy."""
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = Bench(**{f.name: getattr(options, f.name) for f in fields(Bench)})
    rounded = f", our VLM in {bench.quantization}" if bench.quantization else ""
    print(
        f"π₀ {bench.size}, {bench.dtype}{rounded}, batch {bench.batch_size}, {bench.pairs} pairs, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()} "
        f"{'with' if torch.cpu._is_amx_tile_supported() else 'without'} AMX, "  # bfloat16 is fast only with it
        f"load {os.getloadavg()[0]:.1f}"
    )
    if options.what == ["step-cached"]:
        found = cached_steps.run(options)
        if options.json:
            options.json.write_text(json.dumps(found, indent=2))
        return found
    results: dict[str, dict[str, Result]] = {}
    rows = [GROUPS, ["", *bench.subjects, "faster", *bench.subjects * 3]]
    for line in (line for line in LINES if line.what in options.what):
        row = results[str(line)] = {subject: bench.account(subject, line) for subject in bench.subjects}
        if not options.accounting_only:
            if line.what == "tick" or fits(list(row.values())):
                bench.measure_seconds(line, row)
            if line.what != "tick" and not options.no_peak:
                bench.measure_peak(line, row)
        rows.append(table_row(line, *row.values()))
        print(" | ".join(rows[-1]), flush=True)  # not only at the end: the full size takes long
        if bench.quantization and line.what == "chunk" and not options.accounting_only:
            print(bench.rounding(line), flush=True)
    print(f"\n{format_table(rows)}")
    if options.json:
        numbers = ("flop", "kept_bytes", "seconds", "peak_bytes")
        content = {
            line: {subject: {n: asdict(r)[n] for n in numbers} for subject, r in row.items()}
            for line, row in results.items()
        }
        options.json.write_text(json.dumps({"options": vars(options) | {"json": None}, "lines": content}, indent=2))
    return results


if __name__ == "__main__":
    logging.getLogger("lerobot_pi0").setLevel(logging.ERROR)
    main()
