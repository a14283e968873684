"""Units and motion of the joints: degrees or radians, and joints that never move.

Axes: N frames, D dims of state or action.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from lerobot.utils.constants import ACTION, OBS_STATE

from ..data import dim_names, some
from .noise import never_moves
from .subject import ERROR, FINE, WARNING, Finding, Subject, array, permutation

DEGREES_PER_RADIAN = 180 / np.pi


def units(subject: Subject) -> Iterable[Finding]:
    """Degrees for radians, permuted joints, another robot: distributions against those of the weights' training."""
    pairs = [(OBS_STATE, subject.columns.state_ND)]
    if not subject.config.use_relative_actions:  # the weights' statistics of relative actions are no positions
        pairs.append((ACTION, subject.columns.action_ND))
    for key, values in pairs:
        stats = subject.trained.stats.get(key, {})
        if "mean" in stats and array(stats["mean"]).size == values.shape[1]:
            yield compare_distributions(key, values, stats, dim_names(subject.dataset, key), subject.trained.source)


def compare_distributions(
    key: str, values_ND: np.ndarray, stats: dict[str, Any], names: list[str], source: str | None
) -> Finding:
    """The first explanation of how far the values are from those that the weights know."""
    mean, std = array(stats["mean"]), np.maximum(array(stats["std"]), 1e-9)
    own_mean, own_std = values_ND.mean(axis=0), np.maximum(values_ND.std(axis=0), 1e-9)
    ratio = own_std / std
    for what, factor in (
        ("degrees where the weights know radians", DEGREES_PER_RADIAN),
        ("radians where the weights know degrees", 1 / DEGREES_PER_RADIAN),
    ):
        if are_near(ratio, factor):
            message = f"{key} looks like {what} (spread × {np.median(ratio):.3g})"
            return Finding(WARNING, "units", message, "convert the dataset, or set the robot to the weights' unit")
    order = permutation(np.stack([own_mean, own_std], 1) / std.mean(), np.stack([mean, std], 1) / std.mean(), 0.3)
    if order is not None:
        moved = [f"{names[i]} like {names[j]}" for i, j in enumerate(order) if i != j]
        message = f"{key}: joints are distributed as others were in training ({some(moved)})"
        return Finding(WARNING, "joints", message, "check the order of the joints")
    far = [name for i, name in enumerate(names) if abs(own_mean[i] - mean[i]) > 5 * std[i] or ratio[i] > 5]
    if far:
        message = f"{key}: {some(far)} move where the weights were never trained"
        return Finding(WARNING, "units", message, "expected for another robot; otherwise check calibration and units")
    return Finding(FINE, "units", f"{key} is distributed as in the training of {source}")


def are_near(ratios: np.ndarray, factor: float) -> bool:
    """Whether most joints move so many times as far, which leaves a gripper its own unit."""
    return bool((np.abs(np.log(ratios / factor)) < np.log(1.6)).mean() >= 2 / 3)


def motion(subject: Subject) -> Iterable[Finding]:
    """State and actions in one unit, and no joint that never moves."""
    state, action = subject.columns.state_ND, subject.columns.action_ND
    if state.shape == action.shape:
        ratio = np.maximum(action.std(axis=0), 1e-9) / np.maximum(state.std(axis=0), 1e-9)
        for factor in (DEGREES_PER_RADIAN, 1 / DEGREES_PER_RADIAN):
            if are_near(ratio, factor):
                message = (
                    f"actions move {np.median(ratio):.3g} times as far as the state: degrees and radians are mixed"
                )
                yield Finding(ERROR, "units", message, "convert one of them")
    for key, values, _ in subject.vectors():
        spread = values.max(axis=0) - values.min(axis=0)
        flat = np.flatnonzero(never_moves(values, subject.columns.episode))
        if len(flat):
            names = [f"{dim_names(subject.dataset, key)[i]} (changes by {spread[i]:.3g})" for i in flat]
            message = f"{key}: {some(names)} never move; normalised, their smallest change becomes a large one"
            yield Finding(
                WARNING, "constant", message, "leave them out of the dataset unless they are meant to be fixed"
            )
