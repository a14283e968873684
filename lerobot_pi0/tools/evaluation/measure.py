"""Errors of predicted chunks, and how far chunks move when an input is exchanged.

Axes: N observations, T steps of a chunk, A joints.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor
from tqdm import tqdm

from ...configuration_pi0 import choices
from ...inputs.smoothness import roughness
from ..data import dim_names
from .intervals import delay, ratio_interval
from .predictions import Change, Runner
from .verdicts import ignored, verdicts


def measure(
    runner: Runner, threshold: float, spread_A: np.ndarray, still_A: np.ndarray
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All numbers of the report, and what its plots need beside them.

    Args:
        spread_A: the unit of errors, the deviation of each joint's actions in training.
        still_A: joints that never move, which do not count.
    """
    rows = runner.rows
    recorded, valid = recorded_chunks(runner.items)
    actions, state = runner.columns.action_ND, runner.columns.state_ND[rows]
    still = state if state.shape[1] == actions.shape[1] else actions[np.maximum(rows - 1, 0)]
    normalised, predicted = runner.chunks()
    guesses = {"policy": predicted, "hold still": still[:, None], "mean action": actions.mean(axis=0)}
    squares = {name: ((guess - recorded) / spread_A) ** 2 for name, guess in guesses.items()}
    moving = {name: x[..., ~still_A] for name, x in squares.items()}
    unit = np.where(still_A, np.inf, spread_A)  # what never moves does not count
    names, episode = dim_names(runner.dataset, ACTION), runner.columns.episode[rows]
    error = {name: rms(x, valid) for name, x in moving.items()}
    content: dict[str, Any] = {
        "observations": len(rows),
        "episodes seen": len(np.unique(episode)),
        "error": error,
        **compared(moving, error, valid, episode, runner.seed),
        "error by step": {name: by_step(x, valid) for name, x in moving.items()},
        "error by joint": {x: {g: rms(e[..., i], valid) for g, e in squares.items()} for i, x in enumerate(names)},
        "never move": [names[i] for i in np.flatnonzero(still_A)],
        "way": way((predicted - still[:, None]) / unit, (recorded - still[:, None]) / unit, valid),
        "delay": delay(predicted / unit, recorded / unit, valid),
        "reactions": reactions(runner, normalised, recorded[..., ~still_A], spread_A, valid, ~still_A),
        "threshold": threshold,
    }
    chunks = {"predicted": predicted, "recorded": recorded, "valid": valid}
    content |= rattle(chunks, names, spread_A)
    content["ignored"] = ignored(content)
    content["verdicts"] = verdicts(content)
    return content, chunks | {"rows": rows, "columns": runner.columns, "joints": names}


def recorded_chunks(items: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Recorded chunks (N, T, A), and which of their steps lie within the episode (N, T)."""
    chunks = np.stack([item[ACTION].double().numpy() for item in items])
    chunks = chunks.reshape(*chunks.shape[:2], -1)  # LeRobot reads actions of one dim as scalars
    return chunks, np.stack([~item[f"{ACTION}_is_pad"].numpy() for item in items])


def by_resizing(runner: Runner, drawn: dict[str, Any], spread_A: np.ndarray, still_A: np.ndarray) -> dict[str, float]:
    """The policy's error for each way in which pictures can shrink (`image_resize`), in the units of `measure`."""
    used, errors = runner.config.image_resize, {}
    for how in tqdm(choices("image_resize"), desc="ways to shrink pictures", leave=False):
        runner.config.image_resize = how
        predicted = drawn["predicted"] if how == used else runner.chunks()[1]
        squares = ((predicted - drawn["recorded"]) / spread_A) ** 2
        errors[how] = rms(squares[..., ~still_A], drawn["valid"])
    runner.config.image_resize = used
    return errors


def rattle(chunks: dict[str, np.ndarray], joints: list[str], spread_A: np.ndarray) -> dict[str, Any]:
    """Roughness of the predicted chunks beside the recorded ones, by joint, and the joints that rattle."""
    found, spread = roughness(*map(torch.from_numpy, chunks.values())), spread_A.tolist()
    each = zip(joints, found.sampled, found.recorded, found.ratios(spread), strict=True)
    return {
        "roughness": {name: {"sampled": own, "recorded": theirs, "times": x} for name, own, theirs, x in each},
        "rattling": found.rattling(joints, spread),
    }


def compared(
    squares: dict[str, np.ndarray], error: dict[str, float], valid_NT: np.ndarray, episode_N: np.ndarray, seed: int
) -> dict[str, Any]:
    """The policy's error as part of the better guess's, and the interval of this ratio."""
    best = min(("hold still", "mean action"), key=error.__getitem__)
    each = {name: np.where(valid_NT[..., None], x, 0).sum(axis=(1, 2)) for name, x in squares.items()}
    interval = ratio_interval(each["policy"], each[best], episode_N, seed)
    return {"ratio": error["policy"] / max(error[best], 1e-9), "interval": interval}


def way(predicted_NTA: np.ndarray, recorded_NTA: np.ndarray, valid_NT: np.ndarray) -> float:
    """Which part of the recorded way from the measured joints a policy covers."""
    return rms(predicted_NTA**2, valid_NT) / max(rms(recorded_NTA**2, valid_NT), 1e-9)


def rms(squares: np.ndarray, valid_NT: np.ndarray) -> float:
    """Root of the mean over what was recorded; `squares` is (N, T) or (N, T, A)."""
    return float(np.sqrt(squares[valid_NT].mean()))


def by_step(squares_NTA: np.ndarray, valid_NT: np.ndarray) -> list[float]:
    """The same for each step of the chunk, as far as any observation has one."""
    steps = [t for t in range(valid_NT.shape[1]) if valid_NT[:, t].any()]
    return [rms(squares_NTA[:, t : t + 1], valid_NT[:, t : t + 1]) for t in steps]


def reactions(
    runner: Runner,
    normalised_NTA: np.ndarray,
    recorded_NTA: np.ndarray,
    scale_A: np.ndarray,
    valid_NT: np.ndarray,
    counts_A: np.ndarray,
) -> dict[str, dict[str, float]]:
    """How far the normalised chunk moves when an input is exchanged, and how large its error is then.

    `moves` is in deviations of the actions; `of everything` is its part of what a wholly different observation does.
    `recorded_NTA` holds the joints that count alone.
    """
    others = partners(runner.columns.episode[runner.rows], runner.seed)
    found: dict[str, dict[str, float]] = {}
    changes = dict(changes_of(runner))
    for name, change in tqdm(changes.items(), desc="exchanged inputs", leave=False):
        moved, physical = runner.chunks(change, others)
        found[name] = {
            "moves": float(np.sqrt(((moved - normalised_NTA) ** 2).mean())),
            "error": rms(((physical[..., counts_A] - recorded_NTA) / scale_A[counts_A]) ** 2, valid_NT),
        }
    everything = max(found["everything"]["moves"], 1e-9)
    return {name: x | {"of everything": x["moves"] / everything} for name, x in found.items()}


def partners(episode_N: np.ndarray, seed: int) -> np.ndarray:
    """For each observation another one, of another episode where there is one."""
    draw = np.random.default_rng(seed)
    everyone = np.arange(len(episode_N))
    found = []
    for i in everyone:
        candidates = everyone[episode_N != episode_N[i]]
        found.append(draw.choice(candidates if len(candidates) else everyone[everyone != i]))
    return np.array(found)


def changes_of(runner: Runner) -> Iterator[tuple[str, Change]]:
    """What is exchanged, by name; each takes a batch and one of partners."""
    first = first_states(runner)
    tasks = [str(task) for task in runner.dataset.meta.tasks.index]

    def another_task(batch: dict[str, Any], _: dict[str, Any]) -> dict[str, Any]:
        return batch | {"task": [tasks[(tasks.index(x) + 1) % len(tasks)] for x in batch["task"]]}

    def frozen(batch: dict[str, Any], _: dict[str, Any]) -> dict[str, Any]:
        return batch | {OBS_STATE: torch.stack([first[int(e)] for e in batch["episode_index"]])}

    def taken(*keys: str) -> Change:
        return lambda batch, other: batch | {key: other[key] for key in keys}

    def black(key: str) -> Change:
        return lambda batch, _: batch | {key: torch.zeros_like(batch[key])}

    yield "everything", taken(OBS_STATE, "task", *runner.cameras)
    if len(tasks) > 1:
        yield "instruction", another_task
    for key, name in runner.cameras.items():
        camera = name.removeprefix("observation.images.")
        yield f"camera {camera}", taken(key)
        yield f"camera {camera}, black", black(key)
    yield "state", taken(OBS_STATE)
    yield "state, frozen", frozen


def first_states(runner: Runner) -> dict[int, Tensor]:
    """The state with which each episode begins."""
    numbers, rows = np.unique(runner.columns.episode, return_index=True)
    states = torch.from_numpy(runner.columns.state_ND[rows]).float()
    return dict(zip(numbers.tolist(), states, strict=True))
