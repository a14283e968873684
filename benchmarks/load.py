"""Benchmark of loading and saving a checkpoint: this policy and LeRobot's built-in, each in its own process.

    python benchmarks/load.py --size full
    python benchmarks/load.py --size full --old ../checkout_of_0.1.0 --pairs 3

A policy with random weights is saved once. Then each of the two loads that folder, with the file in the page cache, and
saves it again. Seconds are those of the calls, without imports; memory is the process's peak. Before each call, free
memory is allocated and freed once: the host of a virtual machine may provide memory only at its first use, and this
takes longer than the call.

With `--old`, the folder of another version's checkout, both versions load what the other one wrote, in turn, and the
ratios of their medians are printed. With `--no-sync` a save does not wait for the disk, which shows the cost.
"""

import argparse
import json
import logging
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

VARIANTS = {"small": ("tiny", "tiny"), "full": ("gemma_2b", "gemma_300m")}
DIMS = 6


def options(size: str, dtype: str) -> dict:
    """Arguments of either side's PI0Config."""
    from lerobot.configs import FeatureType, PolicyFeature

    vlm, expert = VARIANTS[size]
    return {
        "paligemma_variant": vlm,
        "action_expert_variant": expert,
        "dtype": dtype,
        "device": "cpu",
        "input_features": {
            "observation.images.front": PolicyFeature(FeatureType.VISUAL, (3, 224, 224)),
            "observation.state": PolicyFeature(FeatureType.STATE, (DIMS,)),
        },
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (DIMS,))},
    }


def prepare(folder: Path) -> None:
    """Wait until all files are written, read `folder` into the page cache, and allocate memory once for the call."""
    os.sync()
    size = 0
    for file in folder.glob("*.safetensors"):
        size += file.stat().st_size
        with file.open("rb") as opened:
            while opened.read(2**24):
                pass
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") - 2**30
    use = f"import numpy; numpy.zeros({max(0, min(free, size * 5 // 4))}, numpy.uint8)[::4096] = 1"
    subprocess.run([sys.executable, "-c", use], check=True)


def measure(side: str, folder: Path, scratch: Path) -> dict[str, float]:
    """Load `folder`, save it to `scratch`; seconds and peak memory in GiB of this process."""
    if side == "ours":
        from lerobot_pi0 import PI0Policy
    else:
        from lerobot.policies.pi0.modeling_pi0 import PI0Policy
    from lerobot.configs import PreTrainedConfig

    config = PreTrainedConfig.from_pretrained(folder)
    prepare(folder)
    started = time.perf_counter()
    policy = PI0Policy.from_pretrained(folder, config=config, strict=True)
    loaded = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    prepare(folder)
    saving = time.perf_counter()
    policy.save_pretrained(scratch)
    return {
        "load_s": loaded - started,
        "load_peak_gib": peak,
        "save_s": time.perf_counter() - saving,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "parameters": sum(p.numel() for p in policy.parameters()),
    }


def build(size: str, dtype: str, folder: Path) -> dict[str, float]:
    """Make a policy with random weights and save it."""
    from lerobot_pi0 import PI0Config, PI0Policy

    started = time.perf_counter()
    policy = PI0Policy(PI0Config(**options(size, dtype)))
    built = time.perf_counter()
    policy.save_pretrained(folder)
    return {"build_s": built - started, "save_s": time.perf_counter() - built}


def in_process(*arguments: str | Path, takeover: bool = True, checkout: Path | None = None) -> dict[str, float]:
    """Run this file again for one measurement; the built-in needs a process that the plugin has not taken over."""
    environment = {**os.environ, "LEROBOT_PI0_TAKEOVER": "1" if takeover else "0", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, *map(str, arguments)]
    if checkout is not None:
        environment["PYTHONPATH"] = str(checkout.resolve())
        command[2:2] = ["--checkout", environment["PYTHONPATH"]]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def compare(old: Path, pairs: int, arguments: list[str | Path]) -> None:
    """Measure this version and another in turn, and print their medians and ratios."""
    rows: dict[str, list[dict[str, float]]] = {"this": [], "old": []}
    sides = [("this", Path(__file__).parents[1]), ("old", old)]
    for pair in range(pairs):
        for name, checkout in sides if pair % 2 == 0 else sides[::-1]:  # what one leaves in memory meets the other
            shutil.rmtree(arguments[-1], ignore_errors=True)
            row = in_process(*arguments, checkout=checkout)
            rows[name].append(row)
            print(
                f"{name:<10}{row['load_s']:>8.2f} s{row['load_peak_gib']:>8.2f} GiB{row['save_s']:>8.2f} s", flush=True
            )
    for key in ("load_s", "load_peak_gib", "save_s"):
        this, other = (statistics.median(row[key] for row in rows[name]) for name in ("this", "old"))
        print(f"{key}: {this:.3f} and {other:.3f}, this is {this / other:.3f} of the old")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=VARIANTS, default="small", help="small takes seconds, full minutes")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="type of the weights")
    parser.add_argument("--skip-builtin", action="store_true", help="measure only this policy")
    parser.add_argument("--old", type=Path, help="checkout of another version, to be measured in turn with this one")
    parser.add_argument("--pairs", type=int, default=3, help="how often, with --old")
    parser.add_argument("--no-sync", action="store_true", help="save without waiting for the disk (fsync)")
    parser.add_argument("--folder", type=Path, help="folder for the checkpoints; a temporary one by default")
    parser.add_argument("--checkout", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.checkout:
        import lerobot_pi0

        if not Path(lerobot_pi0.__file__).is_relative_to(args.checkout):
            sys.exit(f"{lerobot_pi0.__file__} was imported, which is not in {args.checkout}")
    if args.no_sync:
        os.fsync = lambda handle: None
    if args.part:
        side, folder, scratch = args.part[0], Path(args.part[1]), Path(args.part[2])
        result = build(args.size, args.dtype, folder) if side == "build" else measure(side, folder, scratch)
        print(json.dumps(result))
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with TemporaryDirectory(dir=args.folder) as temporary:
        folder, scratch = Path(temporary) / "checkpoint", Path(temporary) / "again"
        common = ["--size", args.size, "--dtype", args.dtype, *["--no-sync"] * args.no_sync, "--part"]
        built = in_process(*common, "build", folder, scratch, checkout=args.old)
        size = sum(f.stat().st_size for f in folder.iterdir()) / 2**30
        print(f"built in {built['build_s']:.1f} s, saved {size:.2f} GiB in {built['save_s']:.1f} s")
        print(f"{'':<10}{'load':>10}{'peak':>12}{'save':>10}{'parameters':>14}")
        if args.old is not None:
            compare(args.old, args.pairs, [*common, "ours", folder, scratch])
            return
        for side in ("ours",) if args.skip_builtin or args.size == "small" else ("ours", "built-in"):
            shutil.rmtree(scratch, ignore_errors=True)
            r = in_process(*common, side, folder, scratch, takeover=side == "ours")
            count = f"{r['parameters'] / 1e9:.3f} B"
            print(f"{side:<10}{r['load_s']:>8.1f} s{r['load_peak_gib']:>8.2f} GiB{r['save_s']:>8.1f} s{count:>14}")


if __name__ == "__main__":
    main()
