"""Success by task: of policies through `lerobot-eval`, and of controls that need no pictures."""

import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from lerobot_env_virtual_so100.running import lines, run

from .configuration_metaworld_small import ENV_TYPE, ZOOM

AT_ONCE = 10  # scenes that share a pass of the policy

Successes = dict[str, list[bool]]
"""By task, one per scene."""


@dataclass(frozen=True)
class Evaluation:
    """On what policies are evaluated.

    Attributes:
        tasks: names of MetaWorld's tasks.
        trials: scenes of each task.
        seed: seed of the first scene; the others follow it.
        image_size, zoom: of the pictures, as `SmallMetaworld` has them.
        processes: commands that run at once, each with a part of the tasks.
    """

    tasks: tuple[str, ...]
    trials: int
    seed: int
    image_size: int | None
    processes: int
    zoom: float = ZOOM

    def shares(self) -> list["Evaluation"]:
        """The parts of the processes: the tasks are dealt like cards."""
        parts = [self.tasks[i :: self.processes] for i in range(self.processes)]
        return [replace(self, tasks=part, processes=1) for part in parts if part]


def looks_every(policy: Path) -> int:
    """Once in how many steps the policy of a checkpoint uses a picture: between, it executes a chunk.

    It is 1 where a policy may use pictures of earlier steps too, or is not known to execute whole chunks.
    """
    config = json.loads((policy / "config.json").read_text())
    alone = config["type"] in ("pi0", "act") and config.get("n_obs_steps") == 1
    return config["n_action_steps"] if alone and config.get("temporal_ensemble_coeff") is None else 1


def options(evaluation: Evaluation, policy: Path, output: Path) -> dict[str, object]:
    """Options of `lerobot-eval`."""
    return {
        "env.type": ENV_TYPE,
        "env.image_size": "null" if evaluation.image_size is None else evaluation.image_size,
        "env.zoom": evaluation.zoom,
        "env.draw_every": looks_every(policy),  # drawing takes most of the time
        "env.task": ",".join(evaluation.tasks),
        "policy.path": policy,
        "policy.device": "cpu",
        "eval.n_episodes": evaluation.trials,
        "eval.batch_size": min(AT_ONCE, evaluation.trials),
        "eval.use_async_envs": "false",
        "seed": evaluation.seed,
        "output_dir": output,
    }


def successes(info: dict, tasks: tuple[str, ...]) -> Successes:
    """What `eval_info.json` says.

    Raises:
        ValueError: a task is not in it.
    """
    found = {entry["task_group"]: [bool(x) for x in entry["metrics"]["successes"]] for entry in info["per_task"]}
    if missing := [task for task in tasks if task not in found]:
        raise ValueError(f"lerobot-eval reports nothing of {', '.join(missing)}, only of {', '.join(found)}")
    return {task: found[task] for task in tasks}


def policy(evaluation: Evaluation, path: Path, output: Path, title: str) -> Successes:
    """Evaluate a checkpoint through `lerobot-eval`, in several processes at once."""

    def part(number: int, share: Evaluation) -> Successes:
        folder = output / str(number)
        shutil.rmtree(folder, ignore_errors=True)
        command = ["lerobot-eval", *lines(options(share, path, folder))]
        log = output / f"eval_{number}.txt"
        run(f"{title}: {', '.join(share.tasks)}", command, log, OMP_NUM_THREADS="1")
        return successes(json.loads((folder / "eval_info.json").read_text()), share.tasks)

    shares = evaluation.shares()
    with ThreadPoolExecutor(len(shares)) as pool:
        found = {task: each for part in pool.map(part, range(len(shares)), shares) for task, each in part.items()}
    return {task: found[task] for task in evaluation.tasks}


def control(task: str, seeds: range, expert: bool) -> list[bool]:
    """Success of the expert, or of random actions, on the scenes of these seeds; nothing is drawn."""
    from .demonstrations import make_env
    from .env import Simulation

    sim, found = Simulation(make_env(task, None)), []
    for seed in seeds:
        full, rng, solved, step = sim.reset(seed), np.random.default_rng(seed), False, 0
        while not solved and step < sim.steps:
            full, solved = sim.step(sim.expert(full) if expert else rng.uniform(-1, 1, 4).astype(np.float32))
            step += 1
        found.append(solved)
    sim.close()
    return found


def controls(evaluation: Evaluation, expert: bool) -> Successes:
    """Success by task of the expert, or of random actions."""
    seeds = range(evaluation.seed, evaluation.seed + evaluation.trials)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(evaluation.processes, context) as pool:
        futures = {task: pool.submit(control, task, seeds, expert) for task in evaluation.tasks}
        return {task: future.result() for task, future in futures.items()}
