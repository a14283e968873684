"""Profile of a chunk on a CPU: seconds of each part, and how far it is from the best rate of the machine.

    python benchmarks/breakdown.py --size full
    python benchmarks/breakdown.py --size full --quantization int8

Each part of a chunk is timed while the chunk runs (median over `--repeats`); the whole chunk is also timed without
these clocks. A part's rate of operations is compared with the machine's rate for products of the VLM's MLP (most of the
work has this shape). Its rate of reading weights is compared with the rate at which the machine reads memory. Both
limits are measured in the same run.
"""

import argparse
import contextlib
import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from measure import account_inference, seconds
from presets import SIZES
from subjects import NoWeights, Ours, RandomWeights, batch_for
from torch import Tensor, nn

from lerobot_pi0 import PI0Policy
from lerobot_pi0.kernels import cpu_attention, rounding
from lerobot_pi0.kernels.cpu_linear import Linear
from lerobot_pi0.network import gemma, siglip
from lerobot_pi0.network.attention import KVCache, Mask

GIGA, TERA = 1e9, 1e12
STACKS = {"vision tower": "vision", "VLM": "vlm", "expert": "expert"}
PARTS = ("MLP", "projections of attention", "attention", "other")
REST = "all else"
READ = 2**28  # how many numbers are read to measure the memory: one GiB


class Clock:
    """Seconds, operations and bytes of weights by part of one chunk."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.flop: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.stack = ""  # the one that runs
        self._began: dict[str, float] = {}

    def around(self, part: str, call: Callable, flop: Callable[..., int] = lambda *_: 0) -> Callable:
        """A function that does `call` and times it as `part`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            label = f"{self.stack}: {part}" if self.stack else part
            start = time.perf_counter()
            result = call(*args, **kwargs)
            self.seconds[label] += time.perf_counter() - start
            self.flop[label] += flop(*args)
            return result

        return timed

    def within(self, stack: str, call: Callable) -> Callable:
        """A function that does `call` and counts its parts for this stack; the rest of its time is its `other`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            before, self.stack = sum(self.seconds.values()), stack
            start = time.perf_counter()
            result = call(*args, **kwargs)
            inner = sum(self.seconds.values()) - before
            self.seconds[f"{stack}: other"] += time.perf_counter() - start - inner
            self.stack = ""
            return result

        return timed

    def hook(self, stack: str, part: str, module: nn.Module) -> Iterator[Any]:
        """Time a module, and count its products and the weights that it reads."""
        label = f"{stack}: {part}" if stack else part
        weights = [w for w in module.parameters() if w.ndim > 1]
        size = sum(w.numel() * (1 if w.is_meta else w.element_size()) for w in weights)

        def begin(module: nn.Module, args: tuple) -> None:
            self._began[label] = time.perf_counter()

        def end(module: nn.Module, args: tuple, output: Tensor) -> None:
            self.seconds[label] += time.perf_counter() - self._began[label]
            if isinstance(module, nn.Conv2d):
                self.flop[label] += 2 * output[0, 0].numel() * len(output) * module.weight.numel()
            else:
                self.flop[label] += 2 * args[0].shape[:-1].numel() * sum(w.numel() for w in weights)
            self.bytes[label] += size

        yield module.register_forward_pre_hook(begin)
        yield module.register_forward_hook(end)


def products(q: Tensor, new: KVCache, mask: Mask | None = None, past: KVCache | None = None) -> int:
    """Operations of attention with these queries, (B, Q, D); in a chunk the past has memory for the new keys."""
    return 4 * q.numel() * (new if past is None else past).keys_BSD.shape[1]


def products_by_heads(q: Tensor, k: Tensor, v: Tensor) -> int:
    """The same for queries (B, H, Q, D) with keys of their own heads."""
    return 4 * q.numel() * k.shape[-2]


@contextlib.contextmanager
def timed(policy: PI0Policy) -> Iterator[Clock]:
    """A clock that times the policy's network."""
    clock, net, handles = Clock(), policy.model, contextlib.ExitStack()
    with handles:
        names = {id(getattr(net, attribute)): stack for stack, attribute in STACKS.items()}
        stack_of = {
            id(m): stack for key, stack in names.items() for x in net.modules() if id(x) == key for m in x.modules()
        }
        for name, module in net.named_modules():
            stack = stack_of.get(id(module), "")
            if isinstance(module, gemma.MLP | siglip.MLP):
                part = "MLP"
            elif isinstance(module, nn.Linear | rounding.RoundedLinear | nn.Conv2d) and ".mlp." not in name:
                part = "projections of attention" if "attn" in name else "other products"
            else:
                continue
            for handle in clock.hook(stack, part if stack else REST, module):
                handles.callback(handle.remove)
        for cls, flop in ((cpu_attention.GemmaAttention, products), (cpu_attention.SiglipAttention, products_by_heads)):
            attend = staticmethod(clock.around("attention", cls.attend, flop))
            handles.enter_context(mock.patch.object(cls, "attend", attend))
        for owner, call, stack in (
            (net.vision, "forward", "vision tower"),
            (net.vlm, "cache", "VLM"),
            (net.expert, "cache", "expert"),
            (net.expert, "forward", "expert"),
        ):
            handles.enter_context(mock.patch.object(owner, call, clock.within(stack, getattr(owner, call))))
        yield clock


def limits(size: str, dtype: str, tokens: int, rounded: bool) -> dict[str, float]:
    """The machine's best rates: operations per second by dtype, and bytes per second of memory."""
    cfg = SIZES[size].vlm.gemma
    layer = Linear(cfg.width, cfg.mlp_dim, bias=False, dtype=getattr(torch, dtype))
    x, work = torch.randn(tokens, cfg.width, dtype=layer.weight.dtype), 2 * tokens * cfg.width * cfg.mlp_dim
    best = {dtype: work / min(seconds(lambda: layer(x)) for _ in range(7))}
    if rounded:
        weight, scale = rounding.rounded(layer.weight)
        packed = torch.ops.onednn.qlinear_prepack(weight, None)

        def product() -> Tensor:
            return rounding.packed_product(whole, packed, scale, x.dtype)

        whole, _ = rounding.rounded_tokens(x)
        best["int8"] = work / min(seconds(product) for _ in range(7))
    memory = torch.ones(READ)
    best["memory"] = memory.nbytes / min(seconds(memory.sum) for _ in range(5))
    return best


@torch.no_grad()
def breakdown(options: argparse.Namespace) -> tuple[dict[str, dict[str, float]], dict[str, float], float, int]:
    """Numbers by part, the machine's limits, seconds of the whole chunk without clocks, operations counted by torch."""
    size, rounded = SIZES[options.size], options.quantization is not None
    batch = batch_for(size, options.cameras, options.prompt)
    shapes = Ours.build(size, NoWeights(), options.dtype)
    counted = account_inference(lambda: Ours.chunk(shapes, batch))
    policy = Ours.build(size, RandomWeights(), options.dtype, rounded=rounded)
    tokens = len(policy.model.context(policy.observe(batch, torch.device("cpu"))).mask_BS[0]) - 1
    Ours.chunk(policy, batch)
    whole = statistics.median(seconds(lambda: Ours.chunk(policy, batch)) for _ in range(options.repeats))
    runs = []
    for _ in range(options.repeats):
        with timed(policy) as clock:
            clock.seconds[REST] = 0.0
            total = seconds(lambda: Ours.chunk(policy, batch))
        clock.seconds[REST] += total - sum(clock.seconds.values())
        runs.append(clock)
    rows = {
        label: {
            "seconds": statistics.median(run.seconds[label] for run in runs),
            "flop": runs[0].flop[label],
            "bytes": runs[0].bytes[label],
        }
        for label in runs[0].seconds
    }
    return rows, limits(options.size, options.dtype, tokens, rounded), whole, counted


def table(rows: dict[str, dict[str, float]], best: dict[str, float], whole: float, dtype: str) -> str:
    """A Markdown table of the parts, in the order in which they run."""
    lines = ["| part | seconds | share | TFLOP | GFLOP/s | of the machine's | GB/s of weights |", "|" + "---|" * 7]
    total = sum(row["seconds"] for row in rows.values())
    fast = best.get("int8", best[dtype])
    for label, row in rows.items():
        s, flop = row["seconds"], row["flop"]
        peak = best[dtype] if label.startswith(("expert", REST)) or label.endswith(": attention") else fast
        rate = [f"{flop / s / GIGA:.0f}", f"{flop / s / peak:.0%}"] if flop else ["", ""]
        read = f"{row['bytes'] / s / GIGA:.1f}" if row["bytes"] else ""
        work = f"{flop / TERA:.3f}" if flop else ""
        lines.append(f"| {label} | {s:.3f} | {s / total:.0%} | {work} | {rate[0]} | {rate[1]} | {read} |")
    lines.append(f"| sum | {total:.3f} | | {sum(row['flop'] for row in rows.values()) / TERA:.3f} | | | |")
    rates = ", ".join(
        f"{name} {rate / GIGA:.0f} G{'B' if name == 'memory' else 'FLOP'}/s" for name, rate in best.items()
    )
    return "\n".join([*lines, "", f"Without the clock: {whole:.3f} s. The machine: {rates}."])


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="size of the network (default: small)")
    parser.add_argument("--cameras", type=int, default=3, help="cameras of three that exist (default: 3)")
    parser.add_argument("--prompt", type=int, default=48, help="tokens of the prompt (default: 48)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="default: bfloat16")
    parser.add_argument("--quantization", choices=["int8"], default=None, help="of the VLM (default: none)")
    parser.add_argument("--repeats", type=int, default=3, help="chunks of which the median is taken (default: 3)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> tuple[dict[str, dict[str, float]], int]:
    """Print the table; returns the numbers by part, and the operations as torch counts them."""
    options = parse_arguments(arguments)
    rows, best, whole, counted = breakdown(options)
    print(table(rows, best, whole, options.dtype))
    return rows, counted


if __name__ == "__main__":
    logging.getLogger("lerobot_pi0").setLevel(logging.ERROR)
    main()
