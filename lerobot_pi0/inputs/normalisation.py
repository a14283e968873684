"""Normalisation of states and actions as a checkpoint's processors do it: statistics, modes and epsilon, checked."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from ..configuration_pi0 import PI0Config
from .features import Statistics
from .joints import names_in_config
from .statistics import STATISTICS

EPSILON = 1e-8
"""LeRobot's default, for processors that do not store their own."""

CLOSE_EPSILON = 1e-5
"""Two epsilons count as equal if they differ by less. openpi normalises by deviation + 1e-6, and unnormalises by the
deviation alone."""

RANGE = ("min", "max")
"""Statistics that `action_range_margin` reads, whatever the mode."""


class Normalisation(NamedTuple):
    """How the robot's numbers are converted into the network's, and back."""

    statistics: Statistics
    modes: Mapping[FeatureType, NormalizationMode]
    epsilon: float = EPSILON

    @classmethod
    def of(cls, config: PI0Config, statistics: Statistics) -> "Normalisation":
        """The normalisation that LeRobot's processors do with this config and these statistics."""
        return cls(statistics, {FeatureType(k): mode for k, mode in config.normalization_mapping.items()})

    def mode(self, feature: PolicyFeature) -> NormalizationMode:
        return self.modes.get(feature.type, NormalizationMode.IDENTITY)


def vectors(config: PI0Config) -> dict[str, PolicyFeature]:
    """State and actions of a policy, by key."""
    features = {**(config.input_features or {}), **(config.output_features or {})}
    return {key: features[key] for key in (OBS_STATE, ACTION) if key in features}


def problem_of(config: PI0Config, normalisation: Normalisation) -> str | None:
    """What makes the statistics unusable, with the joint's name; None if nothing does.

    A joint that never moved in the data has a spread of 0. This is allowed; a negative spread is not.
    """
    for key, feature in vectors(config).items():
        known = normalisation.statistics.get(key)
        if not known:
            continue
        wanted = STATISTICS.get(normalisation.mode(feature), ())
        if missing := [name for name in wanted if name not in known]:
            return f"no {' and '.join(missing)} of {key!r}, which is normalised by {normalisation.mode(feature).value}"
        size, most = int(np.prod(feature.shape)), config.max_action_dim if key == ACTION else config.max_state_dim
        names = names_in_config(config, key)
        values = {name: _flat(known[name]) for name in (*wanted, *RANGE) if name in known}
        for name, value in values.items():
            if value.size != size and size != most:  # features of the network's full width fit every robot
                return f"{name} of {key!r} has {value.size} dims, and the feature {size}"
            joints = names if value.size == len(names) else [f"{key}[{i}]" for i in range(value.size)]
            if len(bad := np.flatnonzero(~np.isfinite(value))):
                return f"{name} of {joints[bad[0]]} ({key!r}) is {value[bad[0]]}"
        for name, spread in _spreads(values):
            if len(bad := np.flatnonzero(spread < 0)):
                return f"{name} of {key!r} is negative in dim {bad[0]} ({spread[bad[0]]:g})"
    return None


def _flat(x: Any) -> np.ndarray:
    x = x.detach().to("cpu", torch.float64) if isinstance(x, Tensor) else x
    return np.asarray(x, dtype=np.float64).reshape(-1)


def _spreads(values: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    if "std" in values:
        yield "std", values["std"]
    for low, high in (RANGE, *(names for names in STATISTICS.values() if names[0] != "mean")):
        if low in values and high in values and values[low].shape == values[high].shape:
            yield f"{high} - {low}", values[high] - values[low]


def difference(config: PI0Config, before: Normalisation, after: Normalisation) -> str | None:
    """How the normalisation of actions in the preprocessor (`before`) and their unnormalisation in the postprocessor
    (`after`) differ; None if they do not."""
    action = vectors(config).get(ACTION)
    if action is None:
        return None
    if before.mode(action) is not after.mode(action):
        return f"actions are normalised by {before.mode(action).value} and unnormalised by {after.mode(action).value}"
    if abs(before.epsilon - after.epsilon) > CLOSE_EPSILON:
        return f"their epsilons are {before.epsilon:g} and {after.epsilon:g}"
    if before.mode(action) is NormalizationMode.IDENTITY:
        return None
    one, other = (dict(x.statistics.get(ACTION, {})) for x in (before, after))
    if bool(one) != bool(other):
        return f"only one of them has statistics of {ACTION!r}"
    for name in (*STATISTICS[before.mode(action)], *RANGE):
        if not np.array_equal(_flat(one.get(name, ())), _flat(other.get(name, ())), equal_nan=True):
            return f"{name} of {ACTION!r} is not the same"
    return None


def digest_of(statistics: Statistics | None) -> str | None:
    """A digest of the statistics of state and actions in float32, on which the robot's motion depends; None without."""
    known = {key: (statistics or {}).get(key) or {} for key in (OBS_STATE, ACTION)}
    names = sorted({*RANGE, *(name for pair in STATISTICS.values() for name in pair)})
    hashed = hashlib.blake2b(digest_size=8)
    for key, values in sorted(known.items()):
        for name in names:
            if name in values:
                hashed.update(f"{key}.{name}".encode() + _float32(values[name]).tobytes())
    return hashed.hexdigest() if any(known.values()) else None


def _float32(x: Any) -> np.ndarray:
    x = x.detach().to("cpu", torch.float32) if isinstance(x, Tensor) else x
    return np.asarray(x, dtype=np.float32).reshape(-1)


def name_of_bad(x_BA: Tensor, names: list[str]) -> str | None:
    """The first joint whose value is not finite, such as "pan is nan"; None if all are finite. The last axis is A."""
    if bool(x_BA.isfinite().all()):
        return None
    rows = x_BA.reshape(-1, x_BA.shape[-1])
    row, dim = (int(i) for i in torch.nonzero(~rows.isfinite())[0])
    name = names[dim] if len(names) == rows.shape[1] else f"dim {dim}"
    return f"{name} is {rows[row, dim].item()}"
