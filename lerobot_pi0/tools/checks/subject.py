"""What `lerobot-pi0 check` looks at, and what it reports.

Axes: N frames, D dims of state or action.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from lerobot.configs import NormalizationMode
from lerobot.robots import Robot
from lerobot.utils.constants import ACTION, OBS_STATE

from ...configuration_pi0 import PI0Config
from ...inputs.joints import relative_mask
from ..folder import Columns
from ..recording import Recording
from .noise import noise_of

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
    rename_map: Mapping[str, str] = MappingProxyType({})
    """The `--rename_map` that they were trained with."""


@dataclass
class Subject:
    """Policy, dataset and robot that are checked against each other."""

    config: PI0Config
    keeps_features: bool
    trained: Trained
    dataset: Recording
    all_episodes: bool
    robot: Robot | None = None
    rename_map: dict[str, str] = field(default_factory=dict)
    images: int = 600
    card_gb: float | None = None
    batch_size: int = 8

    @property
    def columns(self) -> Columns:
        return self.dataset.columns

    @cached_property
    def stats(self) -> dict[str, dict[str, Any]]:
        return self.dataset.meta.stats or {}

    @cached_property
    def goes_on(self) -> bool:
        """Whether the weights learnt from this very data, in chunks of this length: the run would go on as it began."""
        before, keys = self.trained.config, (OBS_STATE, ACTION)
        if before is None or before.chunk_size != self.config.chunk_size:
            return False
        pairs = [(self.trained.stats.get(key, {}), self.stats.get(key, {})) for key in keys]
        return all(
            name in ours and name in theirs and _same(ours[name], theirs[name])
            for theirs, ours in pairs
            for name in ("mean", "std", "min", "max")
        )

    @cached_property
    def noise(self) -> np.ndarray:
        """The least change of each joint of the state that counts as a motion (D)."""
        return noise_of(self.columns.state_ND, self.columns.episode)

    @cached_property
    def cameras(self) -> dict[str, str]:
        """The dataset's cameras, depth maps apart: their keys, by the keys that the policy knows them under."""
        features = self.dataset.meta.features
        colours = [key for key in self.dataset.cameras if 1 not in features[key]["shape"]]
        return {self.rename_map.get(key, key): key for key in colours}

    def vectors(self) -> Iterator[tuple[str, np.ndarray, NormalizationMode]]:
        """State and actions as they are normalised: key, values (N, D), mode."""
        actions = self.columns.action_ND
        if self.config.use_relative_actions:
            dims, states = actions.shape[1], self.columns.state_ND.shape[1]
            mask = relative_mask(self.config, dims) & (np.arange(dims) < states)
            state = np.zeros_like(actions)
            state[:, : min(dims, states)] = self.columns.state_ND[:, :dims]
            actions = actions - np.where(mask, state, 0)
        for key, kind, values in ((OBS_STATE, "STATE", self.columns.state_ND), (ACTION, "ACTION", actions)):
            yield key, values, self.config.normalization_mapping.get(kind, NormalizationMode.IDENTITY)


def array(x: Any) -> np.ndarray:
    return np.asarray(x, dtype=np.float64).reshape(-1)


def _same(a: Any, b: Any) -> bool:
    """Whether these are the same numbers, but for their being rounded to float32."""
    x, y = array(a), array(b)
    return x.shape == y.shape and bool(np.allclose(x, y, rtol=1e-5, atol=1e-7))


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
