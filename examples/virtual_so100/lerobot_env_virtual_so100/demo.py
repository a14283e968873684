"""Demo of the whole workflow: record demonstrations, train π₀, and evaluate it and controls on unseen scenes.

    python -m lerobot_env_virtual_so100.demo [--task=pick_place --episodes=… --steps=…]

LeRobot's own commands do the work, each in a process of its own. The scores that are printed at the end are counted
from the simulator's state, episode by episode. The folder of the run keeps the dataset, the checkpoint, a video, a plot
of the losses, and the scores.
"""

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import draccus

from .constants import EPISODE_SECONDS, JOINTS
from .record import SCENES_FILE
from .running import KEEP_MEMORY, environment, lines, remove_run, run
from .score import ScoreConfig, score, summary

logger = logging.getLogger(__name__)

LOG_EVERY = 50  # training steps
FIRST_SCENE = 1000  # seed of the first scene to evaluate on
HELD_OUT = 30  # demonstrations that training does not see
HELD_OUT_NAME = "local/virtual_so100_held_out"


@dataclass(frozen=True)
class Recipe:
    """Default numbers for one task."""

    episodes: int
    steps: int
    n_action_steps: int
    near_noise: float
    """Part of the steps with times near the noise (`time_sampling_warmup_steps`)."""


RECIPES = {
    "reach": Recipe(episodes=2500, steps=6000, n_action_steps=10, near_noise=0.25),
    "pick_place": Recipe(episodes=800, steps=16_000, n_action_steps=10, near_noise=1.0),
}


@dataclass
class DemoConfig:
    """Record demonstrations of a scripted expert, train π₀ on them, evaluate it on scenes it has not seen."""

    # What the arm learns: reach (the cube that the instruction names) or pick_place.
    task: str = "reach"
    # Demonstrations to record; by default the task's number.
    episodes: int | None = None
    # Training steps; by default the task's number.
    steps: int | None = None
    # Observations per training step.
    batch_size: int = 16
    # Noise and time draws per observation.
    flow_samples: int = 1
    # Peak learning rate.
    learning_rate: float = 8e-4
    # Actions executed before the next observation is used; by default the task's number.
    n_action_steps: int | None = None
    # Scenes to evaluate on.
    scenes: int = 100
    # Seed of training, and of the order of the data.
    seed: int = 1000
    # Folder of the run. A dataset that is already there is used again; everything else is overwritten.
    output: Path = Path("outputs/demo")

    def __post_init__(self) -> None:
        if self.task not in RECIPES:
            raise ValueError(f"--task must be one of {', '.join(RECIPES)}, not {self.task!r}")
        for name, default in vars(RECIPES[self.task]).items():
            if getattr(self, name, default) is None:
                setattr(self, name, default)
        for name in ("episodes", "steps", "batch_size", "flow_samples", "n_action_steps", "scenes"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1")

    @property
    def dataset(self) -> Path:
        """Where the demonstrations are."""
        return self.output / f"{self.task}_{self.episodes}"

    @property
    def held_out(self) -> Path:
        """Folder of a few demonstrations that training does not see."""
        return self.output / f"{self.task}_held_out"

    @property
    def run(self) -> Path:
        """Where training writes."""
        return self.output / "train"

    @property
    def policy(self) -> Path:
        """The trained checkpoint."""
        return self.run / "checkpoints" / "last" / "pretrained_model"


def _check_rendering() -> None:
    """Stop now, and not after minutes, if this machine cannot render images.

    Raises:
        SystemExit: it cannot; the message says what to install.
    """
    check = f"from {__package__}.scene import check_rendering; check_rendering()"
    done = subprocess.run([sys.executable, "-c", check], env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])


def record(config: DemoConfig) -> float:
    """Write the demonstrations, unless they exist; returns seconds."""
    return _record(config, config.dataset, f"--episodes={config.episodes}")


def record_held_out(config: DemoConfig) -> float:
    """Write a few more demonstrations, of scenes that training does not see, for `open-loop`; returns seconds."""
    options = [f"--episodes={min(HELD_OUT, config.episodes)}", "--split=validation", f"--repo_id={HELD_OUT_NAME}"]
    return _record(config, config.held_out, *options)


def _record(config: DemoConfig, root: Path, *options: str) -> float:
    # Statistics are written last, before the scenes. What an older version left half joined has neither.
    if any((root / name).exists() for name in ("meta/stats.json", SCENES_FILE)):
        print(f"\n== demonstrations: {root} is there already")
        return 0.0
    shutil.rmtree(root, ignore_errors=True)
    command = [sys.executable, "-m", f"{__package__}.record", f"--root={root}", f"--task={config.task}", *options]
    return run(f"demonstrations: {root.name}", command, _log(config, f"record_{root.name}"))


def _log(config: DemoConfig, name: str) -> Path:
    return config.output / "logs" / f"{name}.txt"


def training_options(config: DemoConfig) -> dict[str, object]:
    """Options of `lerobot-train`: the small preset, from random weights."""
    return {
        "policy.type": "pi0",
        "policy.paligemma_variant": "tiny",
        "policy.action_expert_variant": "tiny",
        "policy.device": "cpu",
        "policy.flow_samples": config.flow_samples,
        "policy.n_action_steps": config.n_action_steps,
        "policy.optimizer_lr": config.learning_rate,
        "policy.optimizer_betas": "[0.9, 0.999]",
        # At first, three of five times are above 0.95. An arm's chunk ends with many equal actions, whose mean can be
        # seen through all but the strongest noise: at LeRobot's times the network reads it there and ignores the
        # images. Once it uses them, LeRobot's times make its chunks smooth.
        "policy.time_sampling_warmup_steps": round(RECIPES[config.task].near_noise * config.steps),
        # Only the arm's own six dims: with padding, most of the small expert's input would be noise in padded dims.
        "policy.max_state_dim": len(JOINTS),
        "policy.max_action_dim": len(JOINTS),
        "policy.scheduler_warmup_steps": min(100, config.steps),
        "policy.scheduler_decay_steps": config.steps,
        "policy.scheduler_decay_lr": config.learning_rate / 100,
        "policy.push_to_hub": "false",
        "dataset.repo_id": "local/virtual_so100",
        "dataset.root": config.dataset,
        "dataset.streaming": "true",
        "num_workers": 1,
        "batch_size": config.batch_size,
        "steps": config.steps,
        "save_freq": config.steps,
        "log_freq": LOG_EVERY,
        "seed": config.seed,
        "wandb.enable": "false",
        "output_dir": config.run,
    }


def train(config: DemoConfig) -> float:
    """`lerobot-train` with these options."""
    options = training_options(config)
    remove_run(config.run, str(options["dataset.repo_id"]))
    command = ["lerobot-train", *lines(options)]
    # A step of this size is too short for two threads: the second gains nothing, and on a busy machine they wait for
    # each other. The other core loads data.
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    variables = KEEP_MEMORY | {"OMP_NUM_THREADS": threads}
    return run(f"{config.steps} training steps", command, _log(config, "train"), **variables)


def evaluate(config: DemoConfig, instruction: str) -> tuple[dict, float]:
    """`lerobot-eval` on unseen scenes; the scores are those of the simulator."""
    results = config.output / f"{instruction}.jsonl"
    results.unlink(missing_ok=True)
    folder = config.output / f"eval_{instruction}"
    shutil.rmtree(folder, ignore_errors=True)
    options = {
        "policy.path": config.policy,
        "policy.device": "cpu",
        "env.type": "virtual_so100",
        "env.task": config.task,
        "env.instruction": instruction,
        "env.results": results,
        "eval.n_episodes": config.scenes,
        "eval.batch_size": min(25, config.scenes),
        "eval.use_async_envs": "false",
        "seed": FIRST_SCENE,
        "output_dir": folder,
    }
    command = ["lerobot-eval", *lines(options)]
    seconds = run(f"evaluation, instruction {instruction}", command, _log(config, f"eval_{instruction}"))
    outcomes = [json.loads(line) for line in results.read_text().splitlines()]  # in the order in which they ended
    outcomes = [x for x in outcomes if FIRST_SCENE <= x["seed"] < FIRST_SCENE + config.scenes]
    for video in sorted(folder.glob("videos/**/*.mp4"))[:1]:
        shutil.copy(video, config.output / f"{instruction}.mp4")
    return summary(outcomes), seconds


def losses(log: str) -> list[tuple[int, float]]:
    """(step, loss) of each line that lerobot-train logged. Steps are counted: LeRobot writes 1000 and more as 1K."""
    found = re.findall(r"step:\d+K? .*?loss:([\d.]+)", log)
    return [(LOG_EVERY * (i + 1), float(loss)) for i, loss in enumerate(found)]


def plot_losses(config: DemoConfig) -> None:
    """losses.png: the training loss over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = losses(_log(config, "train").read_text(errors="replace"))
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(*zip(*points, strict=True))
    axes.set(xlabel="training step", ylabel="flow-matching loss", yscale="log", title=f"π₀ tiny, {config.task}")
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(config.output / "losses.png", dpi=120)


def table(rows: dict[str, dict]) -> str:
    """One line per policy: successes, rate, 95 % interval, median distance."""
    lines = [f"{'policy':<34}{'success':>9}{'rate':>8}{'95 % interval':>18}{'median distance':>18}"]
    for name, row in rows.items():
        low, high = row["interval_95"]
        share = f"{row['successes']}/{row['episodes']}"
        interval = f"{low:.1%} – {high:.1%}"
        lines.append(f"{name:<34}{share:>9}{row['rate']:>8.0%}{interval:>18}{row['median_distance_m'] * 100:>15.1f} cm")
    return "\n".join(lines)


def open_loop_command(config: DemoConfig) -> str:
    """The command that reports to which inputs the trained policy reacts."""
    tool, report = Path(sys.executable).with_name("lerobot-pi0"), config.output / "open_loop"
    options = {
        "policy.path": config.policy, "dataset.repo_id": HELD_OUT_NAME, "dataset.root": config.held_out,
        "output_dir": report,
    }  # fmt: skip
    return shlex.join([str(tool), "open-loop", *lines(options)])


def demo(config: DemoConfig) -> dict[str, dict]:
    """Do all steps of the demo; returns the scores by policy."""
    _check_rendering()
    seconds = {"demonstrations": record(config) + record_held_out(config), "training": train(config)}
    plot_losses(config)
    trained, seconds["evaluation"] = evaluate(config, "named")
    rows = {"π₀, trained": trained}
    if config.task == "reach":
        swapped, seconds["evaluation, swapped"] = evaluate(config, "swapped")
        rows["π₀, told another cube"] = swapped
    print("\n== controls on the same scenes", flush=True)
    controls = score(
        ScoreConfig(
            task=config.task, controls=["random", "mean", "expert"], dataset=config.dataset, episodes=config.scenes
        )
    )
    rows |= {f"control: {name}": row for name, row in controls.items()}
    (config.output / "scores.json").write_text(json.dumps({"scores": rows, "seconds": seconds}, indent=2) + "\n")
    total = sum(seconds.values())
    print(f"\n{config.task}: {config.scenes} scenes of {EPISODE_SECONDS[config.task]} s that are not in the data\n")
    print(table(rows))
    if config.task == "reach":
        old = swapped["ended_at_scenes_target"]
        print(f"\nTold another cube, the arm ended at the scene's first target in {old} of {config.scenes} scenes.")
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    print(f"\n{total / 60:.1f} minutes: {parts}.")
    print(f"{config.output}: named.mp4, losses.png, scores.json, train/checkpoints/last/pretrained_model")
    print(f"\nDoes it use its images and the instruction? Half a minute:\n{open_loop_command(config)}")
    return rows


@draccus.wrap()
def main(config: DemoConfig) -> None:
    """Command line."""
    demo(config)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
