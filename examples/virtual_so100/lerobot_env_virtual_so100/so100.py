"""A user's whole workflow with two SO-100 arms, on a machine without hardware, and a table of success rates.

    python -m lerobot_env_virtual_so100.so100 [--policy=… --scenes=…]

LeRobot's commands do everything: calibrate, teleoperate, record, train, rollout, replay. The person at the leader gives
only a few demonstrations, because they take real time; the simulator adds its own, with the same features.
"""

import json
import logging
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import draccus

from . import closed_loop, demo
from .cell import Cell
from .film import film
from .record import join
from .running import lines, run
from .score import ScoreConfig, score, summary
from .way import Way

logger = logging.getLogger(__name__)
REPO = "local/so100"


@dataclass
class SO100Config:
    """Calibrate, teleoperate, record, train, roll out and replay on two virtual SO-100 arms."""

    # What the arm learns: reach or pick_place.
    task: str = "reach"
    # Episodes that the person records with the leader.
    episodes: int = 6
    # Episodes that the simulator adds to them (0: none); by default the demo's number.
    simulated: int | None = None
    # Training steps; by default the demo's number.
    steps: int | None = None
    # Folder of a trained policy; with it, nothing is trained.
    policy: Path | None = None
    # Unseen scenes to roll the policy out on.
    scenes: int = 24
    # First of these scenes, of the stream test.
    seed: int = 5000
    # Inference of lerobot-rollout: sync or rtc.
    inference: str = "sync"
    # Folder of the run; it is overwritten.
    output: Path = Path("outputs/so100")

    def __post_init__(self):
        if self.task not in demo.RECIPES:
            raise ValueError(f"--task must be one of {', '.join(demo.RECIPES)}, not {self.task!r}")
        if self.inference not in ("sync", "rtc"):
            raise ValueError(f"--inference must be sync or rtc, not {self.inference!r}")
        if self.episodes < 1 or self.scenes < 1:
            raise ValueError("--episodes and --scenes must be at least 1")
        if self.policy is not None and not (self.policy / "config.json").exists():
            raise FileNotFoundError(f"--policy={self.policy} is not the folder of a policy: no config.json in it")
        if self.policy is not None and self.policy.resolve().is_relative_to(self.output.resolve()):
            raise ValueError(
                f"--policy={self.policy} lies in --output={self.output}, which is removed: give another one"
            )

    @property
    def recorded(self) -> Path:
        """The dataset of lerobot-record."""
        return self.output / "recorded"


class _Training(demo.DemoConfig):
    """The demo's recipe, on this run's dataset."""

    @property
    def dataset(self) -> Path:
        return self.output / "dataset"


def training(config: SO100Config) -> demo.DemoConfig:
    """The options of training."""
    options = {"steps": config.steps, "episodes": config.simulated or None}
    return _Training(task=config.task, output=config.output, **{k: v for k, v in options.items() if v is not None})


def make_dataset(config: SO100Config) -> None:
    """Join what the person recorded with what the simulator adds; their features are the same."""
    recipe = training(config)
    roots = [config.recorded]
    if config.simulated != 0:
        simulated = demo.DemoConfig(task=config.task, output=config.output, episodes=recipe.episodes)
        demo.record(simulated)
        roots.append(simulated.dataset)
    join(REPO, roots, recipe.dataset)


def _say(title: str, judgements: list[dict]) -> None:
    wins = sum(judgement["is_success"] for judgement in judgements)
    print(f"   {title}: {wins} of {len(judgements)} episodes succeeded", flush=True)


def demonstrate(config: SO100Config, way: Way) -> list[dict]:
    """Calibrate, teleoperate and record; returns the judgements of the recorded episodes."""
    print("\n== lerobot-calibrate, from the files", flush=True)
    way.calibrate()
    layouts = [way.cell.task.sample("train", 10_000 + index) for index in range(config.episodes)]
    print("\n== lerobot-teleoperate", flush=True)
    _say("by hand", [way.teleoperate(layouts[0])])
    print(f"\n== lerobot-record, {config.episodes} episodes", flush=True)
    judgements = way.record(layouts, config.recorded, REPO)
    _say("recorded", judgements)
    return judgements


def roll_out(config: SO100Config, way: Way, policy: Path) -> dict[str, dict]:
    """Roll the policy out on all scenes (strategy base), then episodic and dagger, then the controls. Returns summaries
    by name."""
    task = way.cell.task
    layouts = [task.sample("test", config.seed + index) for index in range(config.scenes)]
    options = [f"--inference.type={config.inference}"]
    print(
        f"\n== lerobot-rollout, {config.scenes} scenes that are not in the data, inference {config.inference}",
        flush=True,
    )
    with film(way.cell.view, task.spec, config.output / "rollout.mp4"):
        first = closed_loop.policy(way, layouts[:3], policy, *options)
    rows = {"π₀ through lerobot-rollout": first + closed_loop.policy(way, layouts[3:], policy, *options)}
    print("\n== lerobot-rollout, episodic and dagger", flush=True)
    words = way.instruction(layouts[0])
    same = [layout for layout in layouts if way.instruction(layout) == words][:3]
    _say("episodic", way.episodic(same, policy, config.output / "rollout_episodic", "local/rollout_episodic", *options))
    _say("dagger, the person took over",
         [way.dagger(layouts[0], policy, config.output / "rollout_dagger", "local/rollout_dagger")])  # fmt: skip
    print("\n== controls through the drivers", flush=True)
    rows |= {f"control: {name}": found for name, found in closed_loop.controls(way.cell, layouts, way.fps).items()}
    rows["control: lerobot-replay"] = closed_loop.replays(way, config.recorded, REPO, config.episodes)
    return {name: summary(judgements) for name, judgements in rows.items()}


def fast_path(config: SO100Config, policy: Path) -> dict[str, dict]:
    """Evaluate the same policy on the same scenes in `lerobot-eval`: without drivers, buses and real time."""
    recipe = replace(training(config), scenes=config.scenes)
    results = config.output / "fast.jsonl"
    results.unlink(missing_ok=True)
    options = {
        "policy.path": policy, "policy.device": "cpu", "env.type": "virtual_so100", "env.task": config.task,
        "env.results": results, "eval.n_episodes": config.scenes, "eval.batch_size": 1,
        "eval.use_async_envs": "false", "seed": config.seed, "output_dir": config.output / "eval",
    }  # fmt: skip
    command = ["lerobot-eval", *lines(options)]
    run("the same scenes without drivers: lerobot-eval", command, recipe.output / "logs" / "eval.txt")
    scores = score(ScoreConfig(task=config.task, controls=[], results=results))
    return {"π₀ in the simulator (lerobot-eval)": scores["results"]}


def so100(config: SO100Config) -> dict[str, dict]:
    """Do the whole workflow; returns the summaries by policy and control."""
    started = time.perf_counter()
    folder = config.output / "cell"
    if config.output.exists():
        if any(config.output.iterdir()) and not folder.is_dir():
            raise SystemExit(
                f"{config.output} holds other things than an earlier run of this command: give another --output"
            )
        shutil.rmtree(config.output)
    with Cell(folder, task=config.task, calibrated=False) as cell:
        demonstrate(config, Way(cell))
        skipped = cell.status()["skipped"]
    policy = config.policy
    if policy is None:  # without the cell, which runs in real time and would take its share of the processor
        make_dataset(config)
        recipe = training(config)
        demo.train(recipe)
        policy = recipe.policy
    with Cell(folder, task=config.task) as cell:
        rows = roll_out(config, Way(cell), policy)
        skipped += cell.status()["skipped"]
    rows = fast_path(config, policy) | rows
    (config.output / "scores.json").write_text(json.dumps({"scores": rows, "skipped_s": skipped}, indent=2) + "\n")
    print(f"\n{demo.table(rows)}\n")
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes; the machine was too slow for {skipped:.1f} s of them.")
    print(f"{config.output}: rollout.mp4, scores.json, recorded, rollout_episodic, rollout_dagger, cell/logs")
    return rows


@draccus.wrap()
def main(config: SO100Config) -> None:
    """Command line."""
    so100(config)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
