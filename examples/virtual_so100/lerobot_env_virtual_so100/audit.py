"""Audit of a servo bus: the goals that reached the servos, compared with the actions in a dataset."""

import json
from pathlib import Path

import numpy as np

from . import calibration
from .constants import JOINTS


def goals(log: Path) -> np.ndarray:
    """Goal positions (N, 6) in ticks that came over an arm's bus, in the order in which they came."""
    lines = (json.loads(line) for line in log.read_text().splitlines())
    return np.array([[line["goal"][str(n)] for n in range(1, 7)] for line in lines if "goal" in line]).reshape(-1, 6)


def to_ticks(actions: np.ndarray, role: str = "follower") -> np.ndarray:
    """Actions (N, 6), degrees and 0..100 -> the ticks (N, 6), not rounded, that LeRobot sends for them.

    LeRobot clips the gripper to 0..100, and drops the fraction of each tick. It does not clip degrees; the servo does.
    """
    ticks = np.empty((len(actions), 6))
    for column, name in enumerate(JOINTS):
        entry = calibration.calibration(role)[name]
        low, high = entry["range_min"], entry["range_max"]
        if name == "gripper":
            ticks[:, column] = np.clip(actions[:, column], 0, 100) / 100 * (high - low) + low
        else:
            ticks[:, column] = actions[:, column] * 4095 / 360 + (low + high) / 2
    return ticks


def unmeant(log: Path, actions: np.ndarray, role: str = "follower") -> np.ndarray:
    """Goals (N, 6) on the bus that are not among the actions (M, 6), or are out of order.

    A goal may be missing (a packet was lost), but a goal that is no action is an error.
    """
    meant, left = to_ticks(np.asarray(actions, np.float64), role), 0
    strangers = []
    for goal in goals(log):
        # LeRobot truncated a float64, and the dataset holds a float32: the two may differ by one tick.
        same = np.flatnonzero((np.abs(np.trunc(meant[left:]) - goal) <= 1).all(axis=1))
        if len(same):
            left += int(same[0]) + 1
        else:
            strangers.append(goal)
    return np.array(strangers).reshape(-1, 6)


def recorded_actions(root: Path) -> np.ndarray:
    """All actions (N, 6) of a dataset, in order."""
    import pyarrow.dataset

    table = pyarrow.dataset.dataset(root / "data").to_table(columns=["index", "action"]).sort_by("index")
    return np.stack(table["action"].to_numpy())
