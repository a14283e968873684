"""Bitwise comparison of this checkout with another version of the package, in one process on one machine.

    git worktree add ../v010 v0.1.0
    python benchmarks/compare_versions.py ../v010                 # losses, gradients and chunks of a small network
    python benchmarks/compare_versions.py ../v010 --bench         # seconds at full size: 24 GiB of memory, 7 of disk
    python benchmarks/compare_versions.py ../v010 --bench --size small

The settings are those of `tests/v010/recording.py`: both dtypes; frozen, everything trained, K = 3, gradient
checkpointing, real-time chunking in its three modes, int8. The other version is imported as `old_lerobot_pi0`. Each
version has its own contents of the registries of LeRobot, transformers and draccus, which are exchanged when the other
version runs.

`--bench` times a training step with the VLM frozen, a chunk, a tick of the queue and a chunk over an int8 VLM, all in
bfloat16, in alternating pairs, and then the import, each in a fresh process. A ratio is the other version's seconds
divided by ours, the median over the pairs; a ratio below `--limit` counts as slower. Results are compared bit for bit.

The exit status is 1 if anything differs or is slower.
"""

import argparse
import gc
import importlib
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "LEROBOT_PI0_TAKEOVER": "1"}
HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE / "tests" / "v010"))

import recording  # noqa: E402
import torch  # noqa: E402
from lerobot.configs import PreTrainedConfig  # noqa: E402
from lerobot.optim import LRSchedulerConfig, OptimizerConfig  # noqa: E402
from lerobot.processor import ProcessorStepRegistry  # noqa: E402
from lerobot.utils.constants import (  # noqa: E402
    ACTION,
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
    OBS_STATE,
)
from torch import Tensor, nn  # noqa: E402
from transformers import AttentionInterface  # noqa: E402

PROMPT, TICKS = 48, 49


def registries() -> list[dict]:
    """The registries into which versions of the package write themselves."""
    choices = [cls.get_known_choices() for cls in (PreTrainedConfig, OptimizerConfig, LRSchedulerConfig)]
    return [*choices, ProcessorStepRegistry._registry, AttentionInterface._global_mapping]


def exchange(contents: list[dict]) -> list[dict]:
    """Put `contents` into the registries, and return what they held before."""
    before = [dict(registry) for registry in registries()]
    for registry, content in zip(registries(), contents, strict=True):
        registry.clear()
        registry.update(content)
    return before


class Version:
    """The package of a checkout under its own name, and the contents of the registries for it."""

    def __init__(self, checkout: Path, name: str) -> None:
        self.checkout, self.name = checkout, name
        self._contents = [dict(registry) for registry in registries()]
        place = checkout / "lerobot_pi0" / "__init__.py"
        spec = importlib.util.spec_from_file_location(name, place, submodule_search_locations=[str(place.parent)])
        assert spec is not None and spec.loader is not None
        self.module = sys.modules[name] = importlib.util.module_from_spec(spec)
        with self.active():
            spec.loader.exec_module(self.module)
            for part in ("configuration_pi0", "modeling_pi0", "processor_pi0"):
                importlib.import_module(f"{name}.{part}")

    @contextmanager
    def active(self) -> Iterator[None]:
        """A block in which the registries are as this version left them."""
        before = exchange(self._contents)
        try:
            yield
        finally:
            self._contents = exchange(before)

    def __str__(self) -> str:
        return f"{self.module.__version__} ({self.checkout})"


def differences(old: dict[str, Tensor], new: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not bitwise equal, and their relative differences."""
    found = [f"{name} is in only one version" for name in old.keys() ^ new.keys()]
    for name in old.keys() & new.keys():
        a, b = old[name], new[name]
        if a.dtype != b.dtype or a.shape != b.shape:
            found.append(f"{name}: {a.dtype} {tuple(a.shape)} became {b.dtype} {tuple(b.shape)}")
        elif not torch.equal(a, b):
            found.append(f"{name}: off by {((b - a).double().norm() / a.double().norm()).item():.1e}")
    return sorted(found)


def compare(old: Version, new: Version) -> bool:
    """Compare every setting at the small size; whether all are bitwise equal."""
    equal = True
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16"):
            for name, setting in recording.SETTINGS.items():
                if "int8" in name and not torch.cpu._is_vnni_supported():
                    print(f"{dtype:8}  {name:24}  left out: the CPU has no VNNI", flush=True)
                    equal = False
                    continue
                results = []
                for version in (old, new):
                    with version.active(), recording.small(version.name):
                        results.append(setting(version.name, dtype, Path(folder)))
                off = differences(*results)
                verdict = "equal" if not off else f"{len(off)} DIFFER, such as {off[0]}"
                print(f"{dtype:8}  {name:24}  {len(results[0]):3} tensors  {verdict}", flush=True)
                equal = equal and not off
    return equal


# --- seconds ----------------------------------------------------------------------------------------------------


class Bench:
    """Policies of both versions with the weights of one checkpoint, in bfloat16."""

    def __init__(self, size: str, folder: Path) -> None:
        self.size, self.folder, self.side = size, folder, 224 if size == "full" else 32

    def presets(self, version: Version):
        return nullcontext() if self.size == "full" else recording.small(version.name)

    def write(self, version: Version) -> None:
        """Write a checkpoint of random weights: one repeated block of normal numbers, as billions take long to draw."""
        if (self.folder / "config.json").exists():
            return
        with version.active(), self.presets(version):
            config = version.module.PI0Config(
                **recording.features(3, self.side), device="cpu", dtype="bfloat16", tokenizer_max_length=PROMPT,
                image_resolution=(self.side, self.side), save_tokenizer=False, train_expert_only=True,
            )  # fmt: skip
            skip = mock.patch("torch.Tensor.normal_", lambda x, *args, **kwargs: x)  # weights are overwritten below
            with skip, mock.patch("torch.nn.init.normal_", lambda x, *args, **kwargs: x):
                policy = version.module.PI0Policy(config)
            block = (recording.normal(1_000_003, seed=0) * 0.02).bfloat16()
            for p in policy.parameters():
                for part in p.data.view(-1).split(len(block)):
                    part.copy_(block[: len(part)])
            policy.save_pretrained(self.folder)

    def load(self, version: Version, training: bool, rounded: bool) -> nn.Module:
        with version.active(), self.presets(version):
            config = PreTrainedConfig.from_pretrained(self.folder)
            config.device, config.train_expert_only = "cpu", True
            config.vlm_quantization = "int8" if rounded else None
            statistics = recording.STATISTICS if training else None
            policy = version.module.PI0Policy.from_pretrained(self.folder, config=config, dataset_stats=statistics)
            return policy.train(training)

    def batch(self) -> dict[str, Tensor]:
        images = [key for key in recording.features(3, self.side)["input_features"] if "images" in key]
        return {key: recording.uniform(1, 3, self.side, self.side, seed=i) for i, key in enumerate(images)} | {
            OBS_STATE: recording.normal(1, recording.DIMS, seed=10),
            ACTION: recording.normal(1, 50, recording.DIMS, seed=11),
            OBS_LANGUAGE_TOKENS: torch.arange(1, PROMPT + 1)[None],
            OBS_LANGUAGE_ATTENTION_MASK: torch.ones(1, PROMPT, dtype=torch.bool),
        }

    def timer(self, row: str, policy: nn.Module) -> Callable[[], tuple[float, dict[str, Tensor]]]:
        """A function that runs the row once, and returns its seconds and what it computed."""
        batch, noise = self.batch(), recording.normal(1, 50, 32, seed=12)

        def step() -> dict[str, Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                loss, _ = policy.forward(batch, noise=noise[:, None], time=torch.full((1, 1), 0.4))
            loss.backward()
            return {"loss": loss.detach()}

        def run() -> tuple[float, dict[str, Tensor]]:
            policy.zero_grad()
            start = time.perf_counter()
            with nullcontext() if row == "step" else torch.inference_mode():
                found = step() if row == "step" else {"chunk": policy.predict_action_chunk(batch, noise=noise)}
            elapsed = time.perf_counter() - start
            grads = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
            sums = {name: grad.double().sum() for name, grad in grads.items()}  # gradients themselves are 1.2 GB
            return elapsed, found | sums

        def tick() -> tuple[float, dict[str, Tensor]]:
            rounds = []
            with torch.inference_mode():
                for _ in range(5):
                    policy.reset()
                    policy.select_action(batch, noise=noise)
                    start = time.perf_counter()
                    actions = [policy.select_action(batch) for _ in range(TICKS)]
                    rounds.append((time.perf_counter() - start) / TICKS)
            return min(rounds), {"actions": torch.stack(actions)}

        return tick if row == "tick" else run

    def measure(self, row: str, old: Version, new: Version, pairs: int) -> tuple[list[list[float]], list[str]]:
        """Lists of seconds of each version, after one run that does not count; and the differences of their results."""
        versions = (old, new)
        policies = [self.load(version, row == "step", row == "int8") for version in versions]
        share(*policies)
        timers = [self.timer("chunk" if row == "int8" else row, policy) for policy in policies]
        seconds: list[list[float]] = [[], []]
        results: list[dict[str, Tensor]] = [{}, {}]
        for pair in range(pairs + 1):
            for i in (0, 1) if pair % 2 else (1, 0):
                with versions[i].active():
                    elapsed, results[i] = timers[i]()
                if pair:
                    seconds[i].append(elapsed)
        return seconds, differences(*results)


@torch.no_grad()
def share(old: nn.Module, new: nn.Module) -> None:
    """Let both policies share the memory of frozen weights, which they have read from the same file."""
    theirs = dict(old.named_parameters())
    for name, p in new.named_parameters():
        other = theirs.get(name)
        if other is not None and not p.requires_grad and not p.is_meta and p.dtype == other.dtype:
            if not torch.equal(p, other):
                raise ValueError(f"{name} was read differently by the two versions: compare without --bench first")
            p.data = other.data
    gc.collect()


IMPORT = """
import time
import lerobot.policies
start = time.perf_counter()
import lerobot_policy_pi0
middle = time.perf_counter()
from lerobot_pi0 import PI0Policy
print(middle - start, time.perf_counter() - start)
"""


def import_seconds(version: Version) -> tuple[float, float]:
    """Seconds that the plugin adds to the start of every LeRobot command, and seconds until its policy is imported."""
    env = {name: x for name, x in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], env=env | {"PYTHONPATH": str(version.checkout)}, cwd=version.checkout,
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    first, second = done.stdout.split()[-2:]
    return float(first), float(second)


def report(row: str, seconds: list[list[float]], limit: float, off: list[str]) -> bool:
    """Print a row; whether it is fast enough, and the results are equal."""
    ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
    old, new = (statistics.median(s) * 1e3 for s in seconds)
    verdict = ("" if ratio >= limit else "  SLOWER") + (f"  {len(off)} DIFFER, such as {off[0]}" if off else "")
    print(f"{row:16}  old {old:10.3f} ms  new {new:10.3f} ms  ratio {ratio:.3f}{verdict}", flush=True)
    return ratio >= limit and not off


def bench(old: Version, new: Version, options: argparse.Namespace) -> bool:
    """Measure all rows; whether each is fast enough, with equal results."""
    good = True
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        runs = Bench(options.size, Path(folder) / "checkpoint")
        runs.write(old)
        for row in options.rows:
            if row == "import":
                continue
            seconds, off = runs.measure(row, old, new, options.pairs)
            good = report(row, seconds, options.limit, off) and good
            gc.collect()
    if "import" in options.rows:
        times: list[list[tuple[float, float]]] = [[], []]
        for pair in range(2 * options.pairs + 1):
            for i in (0, 1) if pair % 2 else (1, 0):
                found = import_seconds((old, new)[i])
                if pair:  # the first run reads the files into memory, and does not count
                    times[i].append(found)
        for i, row in enumerate(("import plugin", "import policy")):
            good = report(row, [[t[i] for t in version] for version in times], options.limit, []) and good
    return good


ROWS = ("step", "chunk", "tick", "int8", "import")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="a checkout of the other version, such as of the tag v0.1.0")
    parser.add_argument("--bench", action="store_true", help="measure seconds instead of comparing results")
    parser.add_argument(
        "--size", choices=("full", "small"), default="full", help="size of the networks with --bench (default: full)"
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="what is timed (default: all)")
    parser.add_argument("--pairs", type=int, default=3, help="timed runs of each version (default: 3)")
    parser.add_argument("--limit", type=float, default=0.97, help="smallest ratio that passes (default: 0.97)")
    parser.add_argument(
        "--folder", type=Path, default=None, help="folder with 7 GB for temporary files (default: /tmp)"
    )
    options = parser.parse_args()
    old = Version(options.old.resolve(), "old_lerobot_pi0")
    new = Version(HERE, "lerobot_pi0")
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"old: {old}\nnew: {new}\ntorch {torch.__version__}, {torch.get_num_threads()} threads, {capability}")
    return 0 if (bench(old, new, options) if options.bench else compare(old, new)) else 1


if __name__ == "__main__":
    sys.exit(main())
