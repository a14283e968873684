"""Study of training options on the demo's task: flow samples, the average of the weights (EMA), augmentation.

    python benchmarks/learning.py --dataset=outputs/demo/reach_2500            # on two cores, about an hour

`lerobot-train` runs as in the demo, for each variant and seed, two runs at a time with one core each. `--steps` is the
number of steps with K = 1. A variant with K flow samples gets as many steps as fit into the same time, by LeRobot's own
measurement of its steps (`updt_s`). Runs and scores that exist already are used again.

All runs average their weights (`ema_decay`), which does not change the training: both the weights and the average are
scored. Five checkpoints of each run are scored on held-out episodes: the flow-matching
loss from fixed draws, and the mean squared error of sampled chunks in units of the actions' variance, over all frames
and over the first frames of episodes, where only images and words tell what to do. Success is that of the last
checkpoint on scenes that are not in the data.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from control import Driver, measure
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata
from lerobot_env_virtual_so100.demo import DemoConfig, training_options
from lerobot_env_virtual_so100.score import wilson
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch.utils.data import default_collate

from lerobot_pi0 import PI0Policy
from lerobot_pi0.training.ema import WEIGHTS

DECAY = 0.99
SAMPLES = (1, 2, 4, 8)
VARIANTS: dict[str, dict[str, object]] = {f"K={k}": {"policy.flow_samples": k} for k in SAMPLES}
VARIANTS["augmented"] = {"policy.augment_images": "true"}
CHECKPOINTS = 5
CALIBRATION = 100  # steps; LeRobot reports the mean time of the last fifty
STRIDE = 5  # every fifth held-out frame is scored

Row = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """Settings that all runs share."""

    dataset: Path
    held_out: Path
    output: Path
    steps: int
    scenes: int
    seeds: tuple[int, ...]

    def train(self, name: str, variant: str, seed: int, steps: int, saves: int) -> str:
        """Run lerobot-train if there is no checkpoint yet; returns its log.

        Raises:
            RuntimeError: it failed.
        """
        folder, log = self.output / name, self.output / f"{name}.txt"
        if not (folder / "checkpoints" / "last").exists():
            config = DemoConfig(steps=steps, seed=seed, output=folder)
            options = training_options(config) | {"dataset.root": self.dataset, "output_dir": folder}
            options |= {"policy.ema_decay": DECAY, "save_freq": steps // saves} | VARIANTS[variant]
            command = [Path(sys.executable).with_name("lerobot-train"), *(f"--{k}={v}" for k, v in options.items())]
            quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            with log.open("w") as file:
                if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | quiet).returncode:
                    raise RuntimeError(f"{name} failed: see {log}")
        return log.read_text(errors="replace")

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Seconds of a training step, by variant."""
        found = {}
        for variant in VARIANTS:
            log = self.train(f"time_{variant}", variant, self.seeds[0], CALIBRATION, saves=1)
            found[variant] = float(re.findall(r"updt_s:([\d.]+)", log)[-1])
        return found

    @cached_property
    def held_out_batches(self) -> dict[str, dict[str, Any]]:
        """Frames of episodes that no run has seen."""
        return held_out_batches(self.held_out)

    def complete(self, variant: str, seed: int, steps: int) -> Row:
        """Train and score one run, in a process of its own."""
        name = f"{variant}_{seed}"
        scores = self.output / f"{name}.json"
        if not scores.exists():
            torch.set_num_threads(1)
            self.train(name, variant, seed, steps, CHECKPOINTS)
            row = {"variant": variant, "seed": seed, "steps": steps, "points": list(self._points(name))}
            row |= self._successes(name)
            scores.write_text(json.dumps(row, indent=2) + "\n")
        return json.loads(scores.read_text())

    def _points(self, name: str) -> Iterator[Row]:
        """Held-out numbers of each checkpoint."""
        for folder in sorted((self.output / name / "checkpoints").glob("[0-9]*")):
            driver = Driver(folder / "pretrained_model", self.scenes)
            for kind in ("average", "weights"):
                if kind == "weights":
                    take_weights(driver.policy, folder)
                yield {"step": int(folder.name), "kind": kind} | held_out_errors(driver, self.held_out_batches)

    def _successes(self, name: str) -> Row:
        """Successes of the last checkpoint, with its weights and with the average."""
        folder = self.output / name / "checkpoints" / "last"
        driver = Driver(folder / "pretrained_model", self.scenes)
        every = driver.policy.config.n_action_steps
        average = measure(driver, "none", 0, every)["successes"]
        take_weights(driver.policy, folder)
        return {"average": average, "weights": measure(driver, "none", 0, every)["successes"]}


def held_out_batches(root: Path) -> dict[str, dict[str, Any]]:
    """The first frame of each episode, and a sample of all frames."""
    meta = LeRobotDatasetMetadata("local/held_out", root=root)
    config = PI0Policy.config_class(chunk_size=50)
    dataset = LeRobotDataset("local/held_out", root=root, delta_timestamps=resolve_delta_timestamps(config, meta))
    starts = [int(i) for i in meta.episodes["dataset_from_index"]]
    rows = {"first": starts, "all": range(0, len(dataset), STRIDE)}
    return {name: default_collate([dataset[i] for i in chosen]) for name, chosen in rows.items()}


def held_out_errors(driver: Driver, batches: dict[str, dict[str, Any]]) -> Row:
    """Losses and errors of sampled chunks on such frames."""
    row: Row = {}
    for frames, batch in batches.items():
        with torch.no_grad():
            loss, info = driver.policy(driver.pre(dict(batch)))
        row |= {f"loss_{frames}": loss.item(), f"error_{frames}": info["chunk_error"]}
    return row


def take_weights(policy: PI0Policy, checkpoint: Path) -> None:
    """Put the weights into the policy in place of the average, which a checkpoint holds."""
    state = load_file(checkpoint / "training_state" / "optimizer_state.safetensors")
    for i, p in enumerate(policy.get_optim_params()):
        p.data.copy_(state[f"state/{i}/{WEIGHTS}"])


def mean_and_range(values: list[float]) -> str:
    """The mean over seeds, and the lowest and highest."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} – {max(values):.3f})"


def line(label: str, rows: list[Row], kind: str, seconds: float, scenes: int) -> str:
    """One row of the table: runs that differ only in their seeds, taken together."""
    wins, total = sum(row[kind] for row in rows), scenes * len(rows)
    low, high = wilson(wins, total)
    last = [[p for p in row["points"] if p["kind"] == kind][-1] for row in rows]
    each = ", ".join(str(row[kind]) for row in rows)
    success = f"{wins}/{total} ({low:.0%} – {high:.0%}): {each}"
    numbers = [mean_and_range([p[key] for p in last]) for key in ("loss_all", "error_all", "error_first")]
    return f"| {label} | {seconds * 1e3:.0f} | {rows[0]['steps']} | {success} | {' | '.join(numbers)} |"


def table(rows: list[Row], study: Study) -> str:
    """The table: each variant with its weights, and with the average."""
    lines = ["| | ms a step | steps | success, and by seed | loss | error | error, first frames |", "|" + "---|" * 7]
    for variant in VARIANTS:
        own = [row for row in rows if row["variant"] == variant]
        for kind in ("weights", "average"):
            label = variant if kind == "weights" else f"{variant}, average"
            lines.append(line(label, own, kind, study.seconds[variant], study.scenes))
    return "\n".join(lines)


def plot(rows: list[Row], study: Study, path: Path) -> None:
    """Success and loss over K at equal time; loss and error of chunks over steps."""
    figure = Figure(figsize=(15, 4))
    success, final, loss, error = figure.subplots(1, 4)
    for color, k in enumerate(SAMPLES):
        own = [row for row in rows if row["variant"] == f"K={k}"]
        wins, total = sum(row["weights"] for row in own), study.scenes * len(own)
        low, high = wilson(wins, total)
        rate = wins / total
        success.errorbar(k, 100 * rate, [[100 * (rate - low)], [100 * (high - rate)]], marker="o", color=f"C{color}")
        for row in own:
            points = [p for p in row["points"] if p["kind"] == "weights"]
            steps = [p["step"] for p in points]
            final.plot(k, points[-1]["loss_all"], "o", color=f"C{color}")
            label = f"K = {k}" if row is own[0] else None
            loss.plot(steps, [p["loss_all"] for p in points], color=f"C{color}", label=label)
            error.plot(steps, [p["error_first"] for p in points], color=f"C{color}")
    success.set(ylabel="success, %", xlabel="K, at equal time", ylim=(0, 103))
    final.set(ylabel="held-out loss at the end", xlabel="K, at equal time")
    loss.set(ylabel="held-out loss", xlabel="training step")
    error.set(ylabel="error of chunks, first frames", xlabel="training step")
    loss.legend()
    for axis in (success, final, loss, error):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def record_held_out(folder: Path, episodes: int, task: str = "reach") -> None:
    """Record demonstrations in scenes of the validation stream, unless they exist."""
    if not (folder / "meta" / "info.json").exists():
        module = "lerobot_env_virtual_so100.record"
        options = [f"--root={folder}", f"--task={task}", "--split=validation", f"--episodes={episodes}"]
        subprocess.run([sys.executable, "-m", module, *options], check=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="folder of demonstrations that make demo recorded")
    parser.add_argument("--output", type=Path, default=Path("outputs/learning"), help="folder of runs, table and plot")
    parser.add_argument("--steps", type=int, default=2500, help="training steps of the plain recipe (default: 2500)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1000, 1001, 1002], help="seeds of training")
    parser.add_argument("--scenes", type=int, default=100, help="unseen scenes for each run (default: 100)")
    parser.add_argument("--episodes", type=int, default=60, help="held-out episodes (default: 60)")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, with one core each (default: 2)")
    options = parser.parse_args()
    held_out = options.output / "held_out"
    options.output.mkdir(parents=True, exist_ok=True)
    record_held_out(held_out, options.episodes)
    study = Study(options.dataset, held_out, options.output, options.steps, options.scenes, tuple(options.seeds))
    seconds = study.seconds
    budget = study.steps * seconds["K=1"]
    with ProcessPoolExecutor(options.parallel, mp_context=get_context("spawn")) as pool:
        jobs = []
        for seed in study.seeds:
            for variant in VARIANTS:
                steps = study.steps if variant == "augmented" else round(budget / seconds[variant])
                jobs.append(pool.submit(study.complete, variant, seed, steps))
        rows = [job.result() for job in jobs]
    text = table(rows, study)
    (options.output / "table.md").write_text(text + "\n")
    plot(rows, study, options.output / "learning.png")
    print(text)


if __name__ == "__main__":
    main()
