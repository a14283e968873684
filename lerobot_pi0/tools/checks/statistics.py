"""Statistics of the dataset, and values far outside of them.

Axes: N frames, D dims of state or action.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from lerobot.configs import NormalizationMode
from lerobot.datasets.compute_stats import compute_relative_action_stats
from lerobot.utils.constants import ACTION, OBS_STATE

from ...inputs.joints import pairing_problem
from ...inputs.statistics import STATISTICS, check_relative_statistics, check_statistics, recompute_command
from ..data import dim_names, some
from .subject import ERROR, FINE, WARNING, Finding, Subject, array

FLOAT32 = 32 * float(np.finfo(np.float32).eps)
"""What LeRobot loses, relative to the square of the mean: it makes variances of sums of squares, in float32."""

OUTLIER = 10.0
"""A normalised value beyond this is called an outlier."""


def statistics(subject: Subject) -> Iterable[Finding]:
    """There, finite, and of this data in the space that is trained."""
    try:
        check_statistics(subject.config, subject.stats)
    except ValueError as error:
        yield Finding(ERROR, "statistics", str(error), recompute(subject))
        return
    if (pairing_problem(subject.config, subject.dataset.meta) or ("", False))[1]:
        return  # which `joints` reports
    try:
        check_relative_statistics(subject.config, subject.stats, subject.dataset.meta)
    except ValueError as error:
        problem, _, remedy = str(error).partition(". ")
        yield Finding(ERROR, "statistics", problem, remedy)
        return
    foreign = list(foreign_statistics(subject)) if subject.all_episodes else []
    yield from foreign
    if (lost := [key for key in subject.dataset.cameras if key not in subject.stats]) and subject.stats:
        message = f"there are none of {some(lost)}, where lerobot-train writes ImageNet's: it would stop"
        remedy = (
            "train with --dataset.use_imagenet_stats=false (pictures are not normalised by them), or add empty ones"
        )
        yield Finding(ERROR, "statistics", message, f'{remedy} to meta/stats.json: "KEY": {{}}')
    if not foreign:
        yield Finding(
            FINE,
            "statistics",
            "those of state and actions are there" + (" and of this data" if subject.all_episodes else ""),
        )


def recompute(subject: Subject) -> str:
    """The command that mends the statistics of this dataset."""
    meta = subject.dataset.meta
    return recompute_command(meta.repo_id, meta.root, subject.config, in_place=True)


def foreign_statistics(subject: Subject) -> Iterable[Finding]:
    """Stored mean and spread against those of the data, per dim."""
    for key, values, mode in subject.vectors():
        if mode is NormalizationMode.IDENTITY:
            continue
        mean, std, space = values.mean(axis=0), values.std(axis=0), "absolute"
        if key == ACTION and subject.config.use_relative_actions:
            mean, std, space = relative_statistics(subject)
        low, high = (array(subject.stats[key][name]) for name in STATISTICS[mode])
        lost = FLOAT32 * np.abs(mean)
        if mode is NormalizationMode.MEAN_STD:
            bad = np.abs(low - mean) > 0.2 * std + 1e-6 + lost
            bad |= np.abs(high**2 - std**2) > 0.44 * std**2 + 1e-12 + FLOAT32 * mean**2
        else:
            bad = (low > mean + 0.2 * std + lost) | (high < mean - 0.2 * std - lost)
            bad |= high - low > 4 * (np.ptp(values, axis=0) + 1e-6 + lost)
        if space == "absolute":
            bad |= foreign_range(subject.stats[key], values, lost)
        if bad.any():
            names = [dim_names(subject.dataset, key)[i] for i in np.flatnonzero(bad)]
            message = f"the statistics of {key} are not those of its {space} values: {some(names)}"
            yield Finding(ERROR, "statistics", message, recompute(subject))


def foreign_range(stats: dict[str, Any], values_ND: np.ndarray, lost_D: np.ndarray) -> np.ndarray:
    """Dims whose stored min or max, which bounds read, is not that of the values (D). `lost_D`: what float32 rounds."""
    bad, least = np.zeros(values_ND.shape[1], bool), 1e-3 * np.ptp(values_ND, axis=0) + lost_D + 1e-6
    for name, found in (("min", values_ND.min(axis=0)), ("max", values_ND.max(axis=0))):
        if name in stats:
            stored = array(stats[name])
            bad |= ~(np.abs(stored - found) <= least) if stored.size == bad.size else True
    return bad


def relative_statistics(subject: Subject) -> tuple[np.ndarray, np.ndarray, str]:
    """Mean and deviation of actions relative to the state at the beginning of their chunk, as LeRobot makes them."""
    columns = subject.columns
    try:
        stats = compute_relative_action_stats(
            {ACTION: columns.action_ND, OBS_STATE: columns.state_ND, "episode_index": columns.episode},
            subject.dataset.meta.features, subject.config.chunk_size,
            subject.config.relative_exclude_joints,
        )  # fmt: skip
    except (RuntimeError, ValueError):  # no episode is as long as a chunk, and `episodes` says so
        *_, (_, values, _) = subject.vectors()
        return values.mean(axis=0), values.std(axis=0), "relative"
    return array(stats["mean"]), array(stats["std"]), "relative"


def outliers(subject: Subject) -> Iterable[Finding]:
    """Values that are not finite, or more than 10 when normalised: by episode, frame and joint."""
    for key, values, mode in subject.vectors():
        finite = np.isfinite(values)
        for what, grade, remedy, bad in (
            ("NaN or infinity", ERROR, "delete these episodes", ~finite),
            (f"|normalised| > {OUTLIER:g}", WARNING, "look at these frames: a jump of the bus or of the leader?",
             np.abs(normalise(np.where(finite, values, 0), subject.stats.get(key, {}), mode)) > OUTLIER),
        ):  # fmt: skip
            rows, dims = np.nonzero(bad)
            if len(rows):
                names = dim_names(subject.dataset, key)
                columns = subject.columns
                where = [
                    f"{names[d]} in episode {columns.episode[n]}, frame {columns.frame[n]}"
                    for n, d in zip(rows, dims, strict=True)
                ]
                yield Finding(grade, "outliers", f"{key}, {what}: {some(where)}", remedy)


def normalise(values_ND: np.ndarray, stats: dict[str, Any], mode: NormalizationMode) -> np.ndarray:
    """What the network would see; zeros where statistics are not there, which `statistics` says."""
    names = STATISTICS.get(mode)
    if names is None:
        return values_ND
    if any(name not in stats or array(stats[name]).size != values_ND.shape[1] for name in names):
        return np.zeros_like(values_ND)
    low, high = (array(stats[name]) for name in names)
    if mode is NormalizationMode.MEAN_STD:
        return (values_ND - low) / (high + 1e-8)
    return 2 * (values_ND - low) / (high - low + 1e-8) - 1
