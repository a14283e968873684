"""MetaWorld from demonstrations to a table: record experts, train π₀ and others, evaluate them on unseen scenes.

    python -m lerobot_env_metaworld_small.learn [--tasks=… --episodes=… --steps=… --full=true]

LeRobot's own commands train and evaluate, each in a process of its own. Every number beside the table says with which
pictures it was made: without --full all are drawn without shadows, which a CPU can afford.
"""

import json
import logging
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import draccus
from lerobot_env_virtual_so100.running import KEEP_MEMORY, lines, remove_run, run

from lerobot_pi0.network.sizes import PALIGEMMA_PRESETS

from . import evaluate, policies, report, seeds
from .configuration_metaworld_small import IMAGE_SIZE, ZOOM
from .evaluate import Evaluation, Successes
from .policies import Training
from .record import RecordConfig
from .tasks import FIVE, instruction, parse
from .words import save_tokenizer

logger = logging.getLogger(__name__)
TIMING_STEPS = 40  # of a short run that shows how long a step takes
CURVE_TRIALS = 5  # scenes of each task for the points of the curve before the last


@dataclass
class LearnConfig:
    """Record demonstrations of MetaWorld's experts, train π₀ on them, evaluate it beside other policies."""

    # Tasks and groups (easy, medium, hard, very_hard, ten, all), with commas; reach-v3:250 has 250 demonstrations.
    tasks: str = FIVE
    # Demonstrations of each task that names no number.
    episodes: int = 100
    # Training steps of π₀; the other policies train for the same time.
    steps: int = 12000
    # Observations per training step.
    batch_size: int = 16
    # Peak learning rate of π₀.
    learning_rate: float = 8e-4
    # Actions of a chunk.
    chunk_size: int = 20
    # Actions that are executed before a policy looks again.
    n_action_steps: int = 5
    # Height and width of the pictures in pixels.
    image_size: int = IMAGE_SIZE
    # How many times larger things are than in the camera's whole picture; only its middle is shown.
    zoom: float = ZOOM
    # Scenes of each task to evaluate on.
    trials: int = 20
    # Evaluate on seeds that are kept for choosing settings, not on those that are reported.
    choosing: bool = False
    # Checkpoints that π₀'s curve is made of, the last one included.
    saves: int = 4
    # Seed of training.
    seed: int = 1000
    # Processes that run at once.
    processes: int = 2
    # Two more seeds of training, Diffusion Policy, the expert, and π₀ with LeRobot's own renderer. Takes hours.
    full: bool = False
    # Go on with trainings that were interrupted, from their last checkpoints (`saves`), with the same other options.
    resume: bool = False
    # Folder of the run. Demonstrations that are there are used again; everything else is overwritten.
    output: Path = Path("outputs/metaworld")

    def __post_init__(self) -> None:
        for name in ("episodes", "steps", "batch_size", "trials", "saves", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} has to be at least 1")
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(
                f"--n_action_steps={self.n_action_steps} has to be between 1 and --chunk_size={self.chunk_size}"
            )
        PALIGEMMA_PRESETS[policies.PRESET].vision.patches(self.image_size)  # raises where π₀ cannot see such pictures
        self.recording()  # raises where it cannot be recorded

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks."""
        return tuple(parse(self.tasks))

    def recording(self) -> RecordConfig:
        """How the demonstrations are made."""
        return RecordConfig(
            root=self.output / "demonstrations",
            tasks=self.tasks,
            episodes=self.episodes,
            repo_id=policies.REPO,
            image_size=self.image_size,
            zoom=self.zoom,
            processes=self.processes,
        )

    def training(self, run: str) -> Training:
        """A training run, by the name of its folder."""
        return Training(
            dataset=self.recording().root,
            run=self.output / run,
            image_size=self.image_size,
            steps=self.steps,
            batch_size=self.batch_size,
            seed=self.seed,
            saves=self.saves,
            chunk=self.chunk_size,
            executed=self.n_action_steps,
            tokenizer=self.output / "tokenizer",
        )

    def evaluation(self) -> Evaluation:
        """What policies are evaluated on."""
        first = (seeds.CHOOSING if self.choosing else seeds.REPORTED).start
        return Evaluation(self.names, self.trials, first, self.image_size, self.processes, self.zoom)


def record(config: LearnConfig) -> float:
    """Write the demonstrations, or what is missing of them; returns seconds."""
    options = {name: value for name, value in vars(config.recording()).items() if value is not False}
    command = [sys.executable, "-m", f"{__package__}.record", *lines(options)]
    return run("demonstrations", command, config.output / "logs" / "record.txt")


def train(config: LearnConfig, options: dict[str, Any]) -> float:
    """`lerobot-train` with these options, or the rest of a run that has a checkpoint; returns seconds.

    Raises:
        ValueError: the run to go on with has other options.
    """
    folder, steps = Path(options["output_dir"]), options["steps"]
    if (begun := interrupted(config, folder)) is None:
        remove_run(folder, policies.REPO)
        command, title = ["lerobot-train", *lines(options)], f"{folder.name}: {steps} training steps"
    else:
        for name in ("steps", "batch_size", "seed"):
            if begun[name] != options[name]:
                raise ValueError(
                    f"{folder} was trained with {name}={begun[name]}, and {name}={options[name]} is asked for: leave "
                    "--resume out to begin anew"
                )
        step, last = max(checkpoints(folder).items())
        if step == steps:
            return 0.0
        command = ["lerobot-train", f"--config_path={last / 'train_config.json'}", "--resume=true"]
        title = f"{folder.name}: training steps {step} to {steps}"
    # A step is too short for two threads: the second gains nothing. The other core loads data or trains another policy.
    log = config.output / "logs" / f"{folder.name}.txt"
    return run(title, command, log, OMP_NUM_THREADS="1", **KEEP_MEMORY)


def interrupted(config: LearnConfig, folder: Path) -> dict[str, Any] | None:
    """The options of the run in this folder, if it is to go on and has a checkpoint."""
    found = checkpoints(folder) if config.resume else {}
    return json.loads((found[max(found)] / "train_config.json").read_text()) if found else None


def seconds_a_step(log: str) -> float:
    """Time of a step in the last line that lerobot-train logged: update and waiting for data."""
    found = re.findall(r"updt_s:([\d.]+) data_s:([\d.]+)", log)
    if not found:
        raise ValueError("lerobot-train logged no step")
    return sum(float(x) for x in found[-1])


def steps_in_equal_time(config: LearnConfig, ours: dict[str, Any], other: dict[str, Any]) -> int:
    """How many steps the other policy makes in the time of our steps, from a short run of each."""
    taken = []
    for options in (ours, other):
        folder = Path(options["output_dir"])
        short = {"steps": TIMING_STEPS, "log_freq": TIMING_STEPS // 2, "save_checkpoint": "false"}
        train(config, options | short | {"output_dir": folder.with_name(f"{folder.name}_timing")})
        log = config.output / "logs" / f"{folder.name}_timing.txt"
        taken.append(seconds_a_step(log.read_text(errors="replace")))
    return max(1, round(config.steps * taken[0] / taken[1]))


def others(config: LearnConfig) -> dict[str, dict[str, Any]]:
    """Options of the other policies, by name; they train as long as π₀."""
    made = {"ACT": policies.act} | ({"Diffusion Policy": policies.diffusion} if config.full else {})
    ours, found = policies.pi0(config.training("pi0"), config.learning_rate), {}
    for name, make in made.items():
        training = replace(config.training(make.__name__), saves=1)
        begun = interrupted(config, training.run)
        steps = steps_in_equal_time(config, ours, make(training)) if begun is None else begun["steps"]
        found[name] = make(replace(training, steps=steps))
    return found


def ours(config: LearnConfig) -> dict[str, dict[str, Any]]:
    """Options of π₀'s runs, by name: one seed, or three."""
    found = {}
    for i in range(3 if config.full else 1):
        training = replace(config.training(f"pi0_{config.seed + i}" if i else "pi0"), seed=config.seed + i)
        found[f"π₀, seed {config.seed + i}" if config.full else "π₀"] = policies.pi0(training, config.learning_rate)
    return found


def checkpoints(run: Path) -> dict[int, Path]:
    """Checkpoints of a run by their step."""
    folders = [folder for folder in (run / "checkpoints").glob("*") if folder.name.isdigit()]
    return {int(folder.name): folder / "pretrained_model" for folder in sorted(folders)}


def evaluated(config: LearnConfig, name: str, options: dict[str, Any], evaluation: Evaluation) -> Successes:
    """Success of the last checkpoint of a run."""
    folder = Path(options["output_dir"])
    path = checkpoints(folder)[options["steps"]]
    drawn = "" if evaluation.image_size else "_lerobot_renderer"
    return evaluate.policy(evaluation, path, config.output / "evaluation" / f"{folder.name}{drawn}", name)


def curve(config: LearnConfig, options: dict[str, Any], last: Successes) -> dict[int, Successes]:
    """Success of π₀'s checkpoints by training step; the last one's is known."""
    few, found = replace(config.evaluation(), trials=min(CURVE_TRIALS, config.trials)), {options["steps"]: last}
    for step, path in checkpoints(Path(options["output_dir"])).items():
        if step != options["steps"]:
            folder = config.output / "evaluation" / f"step_{step}"
            found[step] = evaluate.policy(few, path, folder, f"π₀ after {step} steps")
    return dict(sorted(found.items()))


def learn(config: LearnConfig) -> dict[str, dict]:
    """Do all steps; returns the summaries by policy."""
    started = time.perf_counter()
    record(config)
    report.picture(config.recording().root, list(config.names), config.output / "tasks.png")
    save_tokenizer([instruction(task) for task in config.names], config.output / "tokenizer")
    mine = ours(config)
    runs = mine | others(config)
    with ThreadPoolExecutor(config.processes) as pool:  # each run has one thread, and is a process of its own
        trained = dict(zip(runs, pool.map(lambda options: train(config, options), runs.values()), strict=True))
    evaluation = config.evaluation()
    found = {name: evaluated(config, name, options, evaluation) for name, options in runs.items()}
    if config.full:
        name, options = next(iter(mine.items()))
        lerobots = replace(evaluation, image_size=None)
        found[f"{name}, LeRobot's renderer"] = evaluated(config, name, options, lerobots)
        found["expert"] = evaluate.controls(evaluation, expert=True)
    found["random actions"] = evaluate.controls(evaluation, expert=False)
    first = next(iter(mine))
    curves = {first: curve(config, mine[first], found[first])}
    report.plot_curves(curves, config.output / "curve.png")
    rows = {name: report.summary(each) for name, each in found.items()}
    minutes = (time.perf_counter() - started) / 60
    write(config, rows, curves, trained, minutes)
    tell(config, rows, runs, trained, minutes)
    return rows


def write(config: LearnConfig, rows: dict, curves: dict, trained: dict[str, float], minutes: float) -> None:
    """scores.json."""
    content = {
        "options": draccus.encode(config),
        "scores": rows,
        "curves": {name: {step: report.summary(x) for step, x in points.items()} for name, points in curves.items()},
        "training_seconds": trained,
        "minutes": minutes,
    }
    (config.output / "scores.json").write_text(json.dumps(content, indent=2) + "\n")


def tell(config: LearnConfig, rows: dict, runs: dict, trained: dict[str, float], minutes: float) -> None:
    """Print the table and what it was made with."""
    print(f"\n{config.trials} scenes of each task that are not in the data, drawn without shadows at ")
    print(
        f"{config.image_size} pixels, zoom {config.zoom:g}; {sum(config.recording().plan.values())} demonstrations.\n"
    )
    print(report.table(rows))
    parts = ", ".join(f"{name} {options['steps']} steps in {trained[name]:.0f} s" for name, options in runs.items())
    print(f"\nTraining: {parts}. ACT and Diffusion Policy are not told the task: they see picture and state alone.")
    print(f"{minutes:.0f} minutes. {config.output}: scores.json, curve.png, tasks.png, pi0/checkpoints/last")


@draccus.wrap()
def main(config: LearnConfig) -> None:
    """Command line."""
    learn(config)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
