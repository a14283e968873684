"""Checks of a dataset's statistics: do they exist, do the joints move, are they statistics of relative actions?"""

import logging
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.configs import FeatureType, NormalizationMode
from lerobot.utils.constants import ACTION, OBS_STATE

from ..configuration_pi0 import PI0Config
from .features import Statistics, colour_cameras, log_cameras, name_long_chunk, name_unread
from .joints import check_pairing, check_relative_names, names_in_config, relative_mask, take_names
from .samples import has_state

logger = logging.getLogger(__name__)

NEAR_CONSTANT = 1e-3
"""A dimension whose spread is below this fraction of the largest spread is called near-constant."""

STATISTICS = {
    NormalizationMode.MEAN_STD: ("mean", "std"),
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
}
"""Which statistics each mode of normalisation needs."""


def check_dataset(config: PI0Config, stats: Statistics | None, meta: Any) -> None:
    """Copy the names of a dataset's joints into the config, and refuse statistics that do not fit the config.

    Args:
        stats: the statistics to train with.
        meta: the dataset's LeRobotDatasetMetadata, or None.

    Raises:
        ValueError: see `check_statistics` and `check_relative_statistics`.
    """
    take_names(config, meta)
    name_unread(config, getattr(meta, "features", None) or {})
    name_long_chunk(config, meta)
    if meta is not None and not config.pretrained_path:
        log_cameras(config, colour_cameras(meta), {})
    recorded = getattr(meta, "features", None) or stats or {}
    if config.use_relative_actions and OBS_STATE not in recorded:
        raise ValueError(
            f"use_relative_actions=true needs {OBS_STATE!r}, which the dataset does not have: set it to false"
        )
    if OBS_STATE in recorded and not has_state(config, stats or {}):
        raise ValueError(
            f"no statistics of {OBS_STATE!r}, which the dataset has: `lerobot-edit-dataset --operation.type "
            "recompute_stats` makes them, in a copy of the dataset"
        )
    check_statistics(config, stats)
    check_relative_statistics(config, stats or {}, meta)


def check_statistics(config: PI0Config, stats: Statistics | None) -> None:
    """Refuse to normalise without statistics; warn of dimensions that hardly vary.

    Args:
        stats: per feature, `mean`, `std`, … as a LeRobotDataset's `meta.stats` has them.

    Raises:
        ValueError: a feature that is normalised has no statistics, or statistics of another size or not finite.
    """
    features = {**(config.input_features or {}), **(config.output_features or {})}
    for key, feature in features.items():
        mode = config.normalization_mapping.get(feature.type.value, NormalizationMode.IDENTITY)
        if mode is NormalizationMode.IDENTITY or feature.type is FeatureType.VISUAL:
            continue
        if key == OBS_STATE and not has_state(config, stats or {}):
            logger.warning("there is no %r: the policy learns from images and the task alone", OBS_STATE)
            continue
        names = STATISTICS[mode]
        found = (stats or {}).get(key, {})
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(
                f"no {' and '.join(missing)} for {key!r}, which is normalised by {mode.value}: without statistics "
                "the policy would learn, or send to the robot, numbers of another scale. Pass the dataset's "
                "`meta.stats`; `lerobot-edit-dataset --operation.type recompute_stats` makes them, in a copy"
            )
        low, high = (np.asarray(found[name], dtype=np.float64).reshape(-1) for name in names)
        if {low.size, high.size} != {int(np.prod(feature.shape))}:
            raise ValueError(
                f"the statistics of {key!r} have {low.size} and {high.size} dims, the feature {tuple(feature.shape)}: "
                "they are of another dataset. To fine-tune a checkpoint for another robot, give --policy.type=pi0 "
                "--policy.pretrained_path=CHECKPOINT in place of --policy.path, which keeps the old robot's joints"
            )
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError(f"the statistics of {key!r} hold NaN or infinity: recompute them")
        spread = high if mode is NormalizationMode.MEAN_STD else high - low
        _name_near_constant(config, key, spread, low if mode is NormalizationMode.MEAN_STD else (low + high) / 2)


def _name_near_constant(config: PI0Config, key: str, spread: np.ndarray, middle: np.ndarray) -> None:
    """Warn of dims that hardly vary, by name.

    A spread that is small compared with others may only have another unit, such as radians beside a gripper from 0 to
    850. So it must also be small compared with the dim's own values, or tiny in any unit.
    """
    small = spread <= NEAR_CONSTANT * np.maximum(np.abs(middle), 1)
    flat = np.flatnonzero((small & (spread <= NEAR_CONSTANT * spread.max(initial=0))) | (spread <= 1e-8))
    if len(flat):
        joints = names_in_config(config, key)
        logger.warning(
            "near-constant dimensions of %r: %s. Normalised, their smallest change becomes a large one; "
            "leave them out of the dataset unless they are meant to be fixed",
            key,
            ", ".join(f"{joints[i]} (spread {spread[i]:.3g})" for i in flat),
        )


def check_relative_statistics(config: PI0Config, stats: Statistics, meta: Any) -> None:
    """Refuse to train relative actions with statistics of absolute ones, and the reverse.

    An action a is learnt as a - s, with s the state in which its chunk begins; joints that `relative_exclude_joints`
    names stay absolute. LeRobot normalises with whatever statistics the dataset has.

    Three marks show that `lerobot-edit-dataset` made statistics of relative actions: their count is the number of steps
    in all chunks, not the number of frames; the ranges of relative joints differ from those of the recorded episodes;
    the ranges of excluded joints do not.

    Args:
        stats: the dataset's statistics.
        meta: its LeRobotDatasetMetadata, if there is one: without it only the first mark is checked.

    Raises:
        ValueError: the statistics are not those that this config needs; the message gives the command that makes them.
            Or this command would make wrong ones from these joints (`check_pairing`, `check_relative_names`).
    """
    check_pairing(config, meta)
    check_relative_names(config, meta)
    if ACTION not in stats or (problem := _problem(config, stats, meta)) is None:
        return
    name, root = getattr(meta, "repo_id", None) or "DATASET", getattr(meta, "root", None)
    raise ValueError(
        f"{problem}. Make the right statistics, in a copy of the dataset that will be {name}_recomputed_stats in "
        f"LeRobot's own folder (no --dataset.root), and train on that: {recompute_command(name, root, config)}"
    )


def recompute_command(name: str, root: Any, config: PI0Config | None = None, in_place: bool = False) -> str:
    """LeRobot's command that computes a dataset's statistics anew, as this config needs them.

    Args:
        name: the dataset's id.
        root: its folder, if that is known.
        config: of the policy to train, whose actions may be relative.
        in_place: in the dataset itself, and not in a copy.
    """
    command = f"lerobot-edit-dataset --repo_id={shlex.quote(name)}"
    command += f" --root={shlex.quote(str(root))}" if root else ""
    command += f" --new_root={shlex.quote(str(root))} --operation.overwrite=true" if root and in_place else ""
    command += " --operation.type=recompute_stats"
    if config is not None and config.use_relative_actions:
        command += f" --operation.relative_action=true --operation.chunk_size={config.chunk_size}"
        command += f' --operation.relative_exclude_joints="{config.relative_exclude_joints}"'
    return command


def _problem(config: PI0Config, stats: Statistics, meta: Any) -> str | None:
    """What is wrong with the statistics, None if nothing is."""
    frames, counted = (int(np.ravel(stats.get(key, {}).get("count", 0))[0]) for key in (OBS_STATE, ACTION))
    if not config.use_relative_actions:
        made = counted > frames > 0
        return f"use_relative_actions=false, but {ACTION!r} has statistics of relative actions" if made else None
    wanted = relative_mask(config, config.output_features[ACTION].shape[0])
    if counted == frames and config.chunk_size > 1 and wanted.any():
        return f"use_relative_actions=true, but {ACTION!r} has statistics of absolute actions"
    lengths, low, high = _episode_ranges(meta)
    whole = lengths >= config.chunk_size
    if not whole.any():
        return None
    expected = int((lengths[whole] - config.chunk_size + 1).sum()) * config.chunk_size
    if counted != expected:
        return (
            f"{ACTION!r} has statistics of {counted} steps, and chunks of chunk_size={config.chunk_size} have "
            f"{expected}: they were made for other chunks, or before the dataset grew"
        )
    ranges = np.stack([low[whole].min(axis=0), high[whole].max(axis=0)])
    found, state = (np.stack([np.ravel(stats[key][name]) for name in ("min", "max")]) for key in (ACTION, OBS_STATE))
    absolute = np.isclose(found, ranges, rtol=1e-5, atol=1e-6).all(axis=0)
    differ = state[:, : len(wanted)].any(axis=0)  # relative to a state that is always 0 is absolute
    names = names_in_config(config, ACTION)
    wrong = [names[i] for i in np.flatnonzero(differ & (absolute == wanted))]
    asked = f"relative_exclude_joints={config.relative_exclude_joints}"
    return f"the statistics of {', '.join(wrong)} are not what {asked} asks for" if wrong else None


def _episode_ranges(meta: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Length (E), lowest and highest action (E, A) of each recorded episode; empty arrays without a dataset."""
    import pandas as pd

    files = sorted(Path(meta.root).glob("meta/episodes/**/*.parquet")) if getattr(meta, "root", None) else []
    columns = ["length", f"stats/{ACTION}/min", f"stats/{ACTION}/max"]
    if not files:
        return np.zeros(0), np.zeros((0, 0)), np.zeros((0, 0))
    table = pd.concat([pd.read_parquet(file, columns=columns) for file in files])
    return table["length"].to_numpy(), *(np.stack(list(table[name])) for name in columns[1:])
