"""Bookkeeping: what LeRobot finds by its place or through a number, and the statistics of single episodes.

Axes: N frames, D dims of state or action, E episodes.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from lerobot.datasets.utils import DEFAULT_TASKS_PATH as TASKS
from lerobot.datasets.utils import EPISODES_DIR
from lerobot.utils.constants import ACTION, OBS_STATE

from ..data import some
from .statistics import FLOAT32
from .subject import ERROR, WARNING, Finding, Subject

AGAIN = "copy the dataset again; LeRobot would take other frames, or stop"

STATISTIC: dict[str, Callable[..., Any]] = {"min": np.min, "max": np.max, "mean": np.mean}
"""Which statistics of an episode are compared with its frames."""

CLOSE = 1e-3
"""How far they may be off, in parts of what the joint covers in the dataset."""


def places(subject: Subject) -> Iterable[Finding]:
    """Frames, episodes and tasks that are not in the place where LeRobot looks for them."""
    meta, damaged = subject.dataset.meta, {damage.file for damage in subject.dataset.damage}
    if subject.all_episodes and not any(file.startswith("data/") for file in damaged):
        yield from _misplaced("row", "of the data", "index", subject.columns.place)
    if not any(file.startswith(EPISODES_DIR) for file in damaged):
        yield from _misplaced("row", f"of {EPISODES_DIR}", "episode_index", meta.episodes["episode_index"].to_numpy())
        yield from _ranges(subject)
    if TASKS not in damaged:
        yield from _misplaced("row", f"of {TASKS}", "task_index", meta.tasks["task_index"].to_numpy())
        if meta.info.total_tasks != len(meta.tasks):
            message = f"info.json declares {meta.info.total_tasks} tasks, {TASKS} holds {len(meta.tasks)}"
            yield Finding(ERROR, "files", message, f"set total_tasks to {len(meta.tasks)} in meta/info.json")


def _misplaced(what: str, where: str, column: str, numbers: np.ndarray) -> Iterator[Finding]:
    wrong = np.flatnonzero(numbers != np.arange(len(numbers)))
    if len(wrong):
        message = f"{what} {wrong[0]} {where} has the {column} {numbers[wrong[0]]}"
        more = f", and {len(wrong) - 1} more are not in their place" if len(wrong) > 1 else ""
        yield Finding(ERROR, "files", f"{message}{more}: rows were moved, lost or doubled", AGAIN)


def _ranges(subject: Subject) -> Iterator[Finding]:
    """Episodes that begin or end elsewhere than their metadata says, in the data and in their videos."""
    meta, fps = subject.dataset.meta, float(subject.dataset.meta.fps)
    numbers, first, lengths = np.unique(subject.columns.episode, return_index=True, return_counts=True)
    wrong: dict[str, list[int]] = {}
    for number, begin, length in zip(numbers.tolist(), subject.columns.place[first], lengths.tolist(), strict=True):
        row = meta.row_of(number) or {}
        if (row.get("dataset_from_index"), row.get("dataset_to_index")) != (begin, begin + length):
            wrong.setdefault("dataset_from_index and dataset_to_index", []).append(number)
        for key in meta.video_keys:
            begins, ends = (row.get(f"videos/{key}/{edge}_timestamp") for edge in ("from", "to"))
            if begins is None or ends is None:
                continue  # which `files` reports
            if not abs((ends - begins) * fps - length) <= 1:  # NaN too
                wrong.setdefault(f"from_timestamp and to_timestamp of {key}", []).append(number)
    for number, tasks in _tasks(subject).items():
        named = (meta.row_of(number) or {}).get("tasks")
        if not isinstance(named, list | np.ndarray) or {*map(str, named)} != tasks:
            wrong.setdefault("tasks", []).append(number)
    for what, episodes in wrong.items():
        message = f"{what} in {EPISODES_DIR} are not those of the frames in episodes {some(episodes)}"
        yield Finding(ERROR, "episodes", message, AGAIN)


def _are_close(known: np.ndarray, found: np.ndarray, least_D: np.ndarray) -> bool:
    if known.shape != found.shape:
        return False
    equal = (known == found) | (np.isnan(known) & np.isnan(found))  # NaN that was recorded, which `outliers` reports
    return bool((equal | (np.abs(known - found) <= least_D)).all())


def _tasks(subject: Subject) -> dict[int, set[str]]:
    """Instructions of the frames of each episode."""
    columns, tasks = subject.columns, subject.dataset.meta.tasks
    names = {int(i): str(name) for name, i in tasks["task_index"].items()}
    found: dict[int, set[str]] = {}
    for number, task in np.unique(np.stack([columns.episode, columns.task], axis=1), axis=0).tolist():
        found.setdefault(number, set()).add(names.get(task, ""))
    return found if len(tasks) else {}


def episodes_statistics(subject: Subject) -> Iterable[Finding]:
    """Episodes whose frames are not those that their own statistics were made of: exchanged, damaged or edited ones."""
    columns, meta = subject.columns, subject.dataset.meta
    for key, values in ((OBS_STATE, columns.state_ND), (ACTION, columns.action_ND)):
        if (stored := meta.episode_statistics(key, tuple(STATISTIC))) is None or not len(values):
            continue
        finite = np.where(np.isfinite(values), values, 0)
        least = CLOSE * np.ptp(finite, axis=0) + FLOAT32 * np.abs(finite).max(axis=0) + 1e-6
        other = []
        for number in np.unique(columns.episode).tolist():
            mine = values[columns.episode == number]
            known = stored.get(number)
            found = np.stack([make(mine, axis=0) for make in STATISTIC.values()])
            if known is not None and not _are_close(known, found, least):
                other.append(number)
        if other:
            message = f"{key} of episodes {some(other)} is not what the statistics of these episodes were made of"
            remedy = (
                "copy the dataset again. If the values were changed on purpose: lerobot-edit-dataset makes the "
                "statistics of datasets that it cuts or joins from those, and they would be wrong"
            )
            yield Finding(WARNING, "statistics", message, remedy)
