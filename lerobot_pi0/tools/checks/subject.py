"""What `lerobot-pi0 check` looks at, and what it reports.

Axes: N frames, D dims of state or action.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from lerobot.configs import NormalizationMode
from lerobot.datasets import LeRobotDataset
from lerobot.robots import Robot
from lerobot.utils.constants import ACTION, OBS_STATE

from ...configuration_pi0 import PI0Config
from ...inputs import joints
from ..data import Columns

ERROR, WARNING, FINE = "error", "warning", "fine"


class Finding(NamedTuple):
    """One answer; `remedy` is empty where nothing is to be done."""

    grade: str
    about: str
    message: str
    remedy: str = ""


class Trained(NamedTuple):
    """What the weights to start from were trained on; empty for a policy from scratch."""

    source: str | None
    config: PI0Config | None
    stats: dict[str, dict[str, Any]]
    tokenizer: Any
    problem: str | None


@dataclass
class Subject:
    """Policy, dataset and robot that are checked against each other."""

    config: PI0Config
    keeps_features: bool
    trained: Trained
    dataset: LeRobotDataset
    all_episodes: bool
    columns: Columns
    robot: Robot | None = None
    rename_map: dict[str, str] = field(default_factory=dict)
    images: int = 600
    card_gb: float | None = None
    batch_size: int = 8

    @cached_property
    def stats(self) -> dict[str, dict[str, Any]]:
        return self.dataset.meta.stats or {}

    @cached_property
    def cameras(self) -> dict[str, str]:
        """The dataset's cameras: their keys, by the keys that the policy knows them under."""
        return {self.rename_map.get(key, key): key for key in self.dataset.meta.camera_keys}

    def vectors(self) -> Iterator[tuple[str, np.ndarray, NormalizationMode]]:
        """State and actions as they are normalised: key, values (N, D), mode."""
        actions = self.columns.action_ND
        if self.config.use_relative_actions:
            mask = relative_mask(self.config, actions.shape[1], self.columns.state_ND.shape[1])
            actions = actions - np.where(mask, self.columns.state_ND[:, : actions.shape[1]], 0)
        for key, kind, values in ((OBS_STATE, "STATE", self.columns.state_ND), (ACTION, "ACTION", actions)):
            yield key, values, self.config.normalization_mapping.get(kind, NormalizationMode.IDENTITY)


def relative_mask(config: PI0Config, dims: int, state_dims: int) -> np.ndarray:
    """Which dims of the actions are relative to the state."""
    return joints.relative_mask(config, dims) & (np.arange(dims) < state_dims)


def array(x: Any) -> np.ndarray:
    return np.asarray(x, dtype=np.float64).reshape(-1)


def clearly_less(a: float, b: float, floor: float) -> bool:
    """Whether `a` explains the data, and `b` does not."""
    return b > floor and a < 0.25 * b


def permutation(ours: np.ndarray, theirs: np.ndarray, floor: float = 0.02) -> list[int] | None:
    """The order in which rows of `ours` are rows of `theirs`, if it is clearly another one than theirs."""
    cost = np.abs(ours[:, None] - theirs[None]).mean(axis=2)
    best = cost.argmin(axis=1)
    if sorted(best) != list(range(len(best))) or (best == np.arange(len(best))).all():
        return None
    moved = np.flatnonzero(best != np.arange(len(best)))
    return best.tolist() if clearly_less(cost[moved, best[moved]].mean(), cost[moved, moved].mean(), floor) else None
