"""Study of training on cached contexts: success at equal processor time, with a cache and without.

    python -m lerobot_env_virtual_so100.record --root=outputs/hover_150 --task=hover --episodes=150
    OMP_NUM_THREADS=1 python benchmarks/cached_learning.py --policy=DIR --dataset=outputs/hover_150

`--policy` is what `make demo` trained: its VLM knows the task reach, and stays frozen. Its expert goes on from there,
or begins from random weights (`--new-expert`), and learns the task hover, which is not in the demo's data.

The commands are `lerobot-pi0 cache` and `lerobot-train`, called in one process, one after the other. Time is the
processor time of this process and of the one that loads its data, so that other programs on the machine hardly change
the result. A run may use `--seconds` of it: for caching, loading, training and saving, but not for the import of
LeRobot. Two short runs of each kind tell what a step takes, and so how many steps fit; the table shows the time that
was used. Runs that exist already are used again.
"""

import argparse
import gc
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import active_children
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from control import Driver, actions_of, chunk_of
from learning import Row, held_out_batches, held_out_errors, mean_and_range, record_held_out
from lerobot.scripts import lerobot_train
from lerobot_env_virtual_so100.constants import FPS, episode_steps
from lerobot_env_virtual_so100.demo import DemoConfig, training_options
from lerobot_env_virtual_so100.env import VirtualSO100GymEnv
from lerobot_env_virtual_so100.score import summary, wilson

from lerobot_pi0 import PI0Policy
from lerobot_pi0.tools import main as lerobot_pi0

CONDITIONS: dict[str, tuple[str, ...] | None] = {
    "no cache": None,
    "every frame": ("--every=1",),
    "every fifth frame": ("--every=5",),
    "every frame, 8 bits": ("--every=1", "--bits=8"),
    "every fifth frame, 8 bits": ("--every=5", "--bits=8"),
}
CALIBRATION = 20, 80  # steps
TASK = "hover"


def processor_seconds(call: Callable[[], Any]) -> float:
    """Processor time of a call, in this process and in those that load its data."""
    before = sum(os.times()[:4])
    call()
    gc.collect()  # ends these processes, whose time counts from then on
    if active_children():
        raise RuntimeError("a process that loads data did not end, so its time is not known")
    return sum(os.times()[:4]) - before


@dataclass(frozen=True)
class CachedStudy:
    """Settings that all runs share."""

    policy: Path
    dataset: Path
    held_out: Path
    output: Path
    seconds: float
    scenes: int

    def remembered(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` found, now or in an earlier call of the study."""
        file = self.output / f"{name}.json"
        if not file.exists():
            file.write_text(json.dumps(make(), indent=2) + "\n")
        return json.loads(file.read_text())

    def contexts(self, condition: str) -> Path:
        return self.output / f"contexts, {condition}"

    def caching(self, condition: str) -> float:
        """Compute the contexts of a condition; returns processor seconds."""
        how = CONDITIONS[condition]
        if how is None:
            return 0.0
        policy = {key: x for key, x in self.options(1, 0).items() if key.startswith("policy.")}
        data = {"dataset.repo_id": "local/hover", "dataset.root": self.dataset}
        options = policy | data | {"output": self.contexts(condition), "num_workers": 1}

        def make() -> float:
            shutil.rmtree(self.contexts(condition), ignore_errors=True)
            return processor_seconds(lambda: lerobot_pi0(["cache", *(f"--{k}={v}" for k, v in options.items()), *how]))

        return self.remembered(f"caching, {condition}", make)

    def options(self, steps: int, seed: int) -> dict[str, object]:
        """The demo's options of `lerobot-train`, which go on from a policy and train the expert alone."""
        own = {
            "policy.pretrained_path": self.policy,
            "policy.train_expert_only": "true",
            "policy.save_expert_only": "true",
            "dataset.root": self.dataset,
            "dataloader_multiprocessing_context": "fork",  # a spawned process would import LeRobot again
        }
        return training_options(DemoConfig(steps=steps, seed=seed)) | own

    def train(self, condition: str, steps: int, seed: int, folder: Path) -> float:
        """`lerobot-train`; returns processor seconds."""
        shutil.rmtree(folder, ignore_errors=True)
        options = self.options(steps, seed) | {"output_dir": folder}
        if CONDITIONS[condition] is not None:
            contexts = self.contexts(condition)
            data = {"dataset.root": contexts / "dataset", "dataset.streaming": "false"}
            options |= data | {"policy.context_cache": contexts}
        command = ["lerobot-train", *(f"--{key}={x}" for key, x in options.items())]
        with mock.patch.object(sys, "argv", command):
            return processor_seconds(lerobot_train.main)

    def steps(self, condition: str) -> int:
        """How many steps fit into what caching has left of the time."""
        caching, folder = self.caching(condition), self.output / "calibration"

        def make() -> list[float]:
            return [self.train(condition, steps, 0, folder) for steps in CALIBRATION]

        kind = condition.replace("fifth ", "")  # a step takes the same time, however many frames there are
        short, long = self.remembered(f"calibration, {kind}", make)
        step = (long - short) / (CALIBRATION[1] - CALIBRATION[0])
        return round((self.seconds - caching - short) / step) + CALIBRATION[0]

    @cached_property
    def held_out_batches(self) -> dict[str, dict[str, Any]]:
        return held_out_batches(self.held_out)

    def score(self, policy: Path) -> Row:
        """Successes in unseen scenes, and errors on held-out frames."""
        driver = Driver(policy, self.scenes, task=TASK)
        infos = [info for group in driver.groups() for info in act(driver, *group)]
        return held_out_errors(driver, self.held_out_batches) | summary(infos)

    def complete(self, condition: str, seed: int) -> Row:
        """Train and score one run."""

        def make() -> Row:
            steps, folder = self.steps(condition), self.output / "run"
            used = self.caching(condition) + self.train(condition, steps, seed, folder)
            row = {"condition": condition, "seed": seed, "steps": steps, "seconds": used}
            return row | self.score(folder / "checkpoints" / "last" / "pretrained_model")

        return self.remembered(f"{condition}, {seed}", make)


def act(driver: Driver, envs: list[VirtualSO100GymEnv], seen: list[dict]) -> list[dict]:
    """How the episodes of a policy end. Only what it looks at is rendered."""
    chunk, every, steps = chunk_of(driver, "none"), driver.policy.config.n_action_steps, episode_steps(TASK, FPS)
    for tick in range(steps):
        if tick % every == 0:
            plan = chunk(driver.observe(envs, seen), None, 0)
        for env in envs:
            env.pixels = (tick + 1) % every == 0
        last = [env.step(action) for env, action in zip(envs, actions_of(driver, plan, tick % every), strict=True)]
        seen = [observation for observation, *_ in last]
    return [info for *_, info in last]


def with_new_expert(policy: Path, folder: Path) -> Path:
    """A checkpoint with the VLM of a policy, and an expert and projections from random weights."""
    if not folder.exists():
        trained = PI0Policy.from_pretrained(policy)
        torch.manual_seed(0)
        new = PI0Policy(trained.config)
        vlm = {name: x for name, x in trained.state_dict().items() if ".paligemma." in name}
        new.load_state_dict(vlm, strict=False)
        shutil.copytree(policy, folder)
        new.save_pretrained(folder)
    return folder


def success(rows: list[Row], scenes: int) -> str:
    """Successes of several seeds with Wilson's interval, and of each."""
    wins, total = sum(row["successes"] for row in rows), scenes * len(rows)
    low, high = wilson(wins, total)
    each = ", ".join(str(row["successes"]) for row in rows)
    return f"{wins}/{total} ({low:.0%} – {high:.0%}): {each}"


def table(rows: list[Row], study: CachedStudy) -> str:
    """A line for each condition."""
    lines = [
        "| contexts | caching, s | steps | all, s | success, and by seed | loss | error | error, first frames |",
        "|" + "---|" * 8,
    ]
    for condition in CONDITIONS:
        if own := [row for row in rows if row["condition"] == condition]:
            used = ", ".join(f"{row['seconds']:.1f}" for row in own)
            numbers = [mean_and_range([row[key] for row in own]) for key in ("loss_all", "error_all", "error_first")]
            lines.append(
                f"| {condition} | {study.caching(condition):.1f} | {own[0]['steps']} | {used} | "
                f"{success(own, study.scenes)} | {' | '.join(numbers)} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, required=True, help="folder of a policy that make demo trained")
    parser.add_argument("--dataset", type=Path, required=True, help="folder of demonstrations of the task hover")
    parser.add_argument("--output", type=Path, default=Path("outputs/cached_learning"), help="folder of runs and table")
    parser.add_argument("--seconds", type=float, default=180.0, help="processor time of a run (default: 180)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1000, 1001, 1002], help="seeds of training")
    parser.add_argument("--scenes", type=int, default=100, help="unseen scenes for each run (default: 100)")
    parser.add_argument("--episodes", type=int, default=30, help="held-out episodes (default: 30)")
    parser.add_argument("--new-expert", action="store_true", help="train the expert from random weights")
    options = parser.parse_args()
    torch.set_num_threads(1)
    held_out = options.output / "held_out"
    options.output.mkdir(parents=True, exist_ok=True)
    record_held_out(held_out, options.episodes, TASK)
    policy = options.policy.resolve()
    if options.new_expert:
        policy = with_new_expert(policy, (options.output / "new_expert").resolve())
    study = CachedStudy(policy, options.dataset, held_out, options.output, options.seconds, options.scenes)
    print("before training:", success([study.remembered("before", lambda: study.score(options.policy))], study.scenes))
    rows = []
    for seed in options.seeds:
        for condition in CONDITIONS:
            rows.append(study.complete(condition, seed))
            (options.output / "table.md").write_text(table(rows, study) + "\n")
    print(table(rows, study))


if __name__ == "__main__":
    main()
