"""Input and output features of a policy: the robot's dims in padded states and actions, and the slots of the cameras.

The network knows no names. Its cameras are slots, in the order of the config's `input_features`; the robot's states and
actions are the first of `max_state_dim` and `max_action_dim` dims.
"""

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_STATE

from ..configuration_pi0 import PI0Config

logger = logging.getLogger(__name__)

Statistics = Mapping[str, Mapping[str, Any]]
"""Statistics of a dataset or of processors, by feature and then by kind, as in `meta.stats`."""

NOT_READ = (OBS_ENV_STATE, "observation.effort", "observation.velocity")
"""Features that datasets may hold, but for which π₀ has no input."""


def padded(config: PI0Config, statistics: Statistics | None = None) -> list[str]:
    """Keys of the state and the actions, if their feature has the network's padded width and not the robot's dims.

    `lerobot/pi0_base` has such features, and LeRobot's own π₀ keeps them in the checkpoints that it trains from it. In
    such a vector the robot's dims come first, followed by zeros. LeRobot also makes up such a feature where there is no
    state.

    Args:
        statistics: those that are known. What they have as many dims of is not padded.
    """
    return [
        key
        for key, features, most in _vectors(config)
        if key in features and features[key].shape == (most,) and _dims(statistics, key) != most
    ]


def _dims(statistics: Statistics | None, key: str) -> int | None:
    """How many dims the statistics of a feature have; None if they do not say."""
    known = (statistics or {}).get(key, {})
    sizes = {np.asarray(known[kind]).size for kind in ("mean", "min", "q01") if kind in known}
    return sizes.pop() if len(sizes) == 1 else None


def narrow_padded(config: PI0Config, statistics: Callable[[], Statistics | None]) -> list[str]:
    """Set the shapes of padded features to the robot's dims, which the statistics have; without them do nothing.

    Args:
        statistics: reads the statistics by feature and kind; called only if a feature may be padded.

    Returns:
        The keys of those that are still padded: it is not known how many dims the robot has, or whether it has any.
    """
    if not padded(config):
        return []
    stats = statistics()
    for key, features, most in _vectors(config):
        if key in padded(config, stats) and 0 < (dims := _dims(stats, key) or 0) < most:
            features[key] = PolicyFeature(features[key].type, (dims,))
            logger.info("%r: the first %d of %d dims are the robot's, and the rest is padding", key, dims, most)
    return padded(config, stats)


def _vectors(config: PI0Config) -> list[tuple[str, dict[str, PolicyFeature], int]]:
    return [
        (OBS_STATE, config.input_features or {}, config.max_state_dim),
        (ACTION, config.output_features or {}, config.max_action_dim),
    ]


def set_cameras(config: PI0Config, cameras: Mapping[str, PolicyFeature], slots: Sequence[str]) -> None:
    """Give the policy these cameras: first those that the checkpoint knows, in its order, then the others.

    Args:
        cameras: features by the keys that a batch will have.
        slots: the checkpoint's cameras, in the order of its slots.
    """
    order = sorted(cameras, key=lambda key: slots.index(key) if key in slots else len(slots))
    rest = {key: x for key, x in (config.input_features or {}).items() if x.type is not FeatureType.VISUAL}
    config.input_features = {key: cameras[key] for key in order} | rest


def colour_cameras(meta: Any) -> list[str]:
    """The colour cameras of a dataset: π₀ does not use depth maps.

    Args:
        meta: its LeRobotDatasetMetadata.
    """
    depth = getattr(meta, "depth_keys", ())
    return [key for key in getattr(meta, "camera_keys", ()) if key not in depth]


def log_cameras(
    config: PI0Config, dataset: Iterable[str], rename_map: Mapping[str, str], slots: Sequence[str] = ()
) -> None:
    """Log which camera of the dataset goes into which slot, which slots stay empty, and which cameras are not used.

    Args:
        dataset: the dataset's cameras.
        rename_map: LeRobot's `--rename_map`.
        slots: the cameras that the weights were trained with, in the order of their slots, if that is known.
    """
    names = {rename_map.get(key, key): key for key in dataset}
    policy = list(config.image_features)
    filled = [(key, names[key]) for key in policy if key in names]
    parts = [f"slot {i} ← {own}" + (f" as {key}" if own != key else "") for i, (key, own) in enumerate(filled, 1)]
    empty = [key for key in dict.fromkeys([*policy, *slots]) if key not in names]
    if empty:
        parts.append(f"empty, and left out of the network: {', '.join(empty)}")
    logger.info("cameras of the dataset: %s", "; ".join(parts) or "none")
    lost = {own: key for key, own in names.items() if key not in policy}
    for own, key in lost.items():
        near = difflib.get_close_matches(key, policy, 1)
        renamed = f", which --rename_map calls {key}," if own != key else ""
        hint = f" Is {near[0]} meant?" if near else ""
        logger.warning(
            "camera %s of the dataset%s is not used: the policy has %s.%s", own, renamed, ", ".join(policy), hint
        )


def unread_features(config: PI0Config, features: Iterable[str]) -> list[str]:
    """Features that are read neither by π₀ nor by its training."""
    told = {OBS_ENV_STATE} if config.environment_state_weight else set()
    return [key for key in features if key in NOT_READ and key not in told]


def name_unread(config: PI0Config, features: Iterable[str]) -> None:
    """Warn of features and options that π₀ does not read."""
    if unread := unread_features(config, features):
        logger.warning("%s of the dataset are not read: π₀ sees cameras, state and instruction", ", ".join(unread))
    if config.n_obs_steps != 1:
        logger.warning("n_obs_steps=%d is not read: π₀ sees one observation at a time", config.n_obs_steps)


LONG_CHUNK = 0.25
"""A chunk is long if this part of all its steps, or more, lies beyond the end of an episode."""


def long_chunk(config: PI0Config, lengths: Sequence[int]) -> tuple[str, str] | None:
    """What is wrong with a chunk that is long beside the episodes, and what to do; None if it is not long.

    Args:
        lengths: frames of each episode.
    """
    chunk, frames = config.chunk_size, np.asarray(lengths, np.int64)
    last = np.minimum(frames, chunk)  # so many frames have a chunk that goes beyond the end
    beyond = last * chunk - last * (last + 1) // 2
    share = beyond.sum() / max(1, frames.sum() * chunk)
    if share < LONG_CHUNK or config.mask_padded_actions:
        return None
    middle = int(np.median(frames))
    shorter = max(1, middle // 4)
    executed = f" --policy.n_action_steps={shorter}" if config.n_action_steps > shorter else ""
    return (
        f"chunk_size={chunk} is long beside the episodes (median {middle} frames): {share:.0%} of all steps of chunks "
        "lie beyond the end of their episode, where LeRobot repeats the last action, and the policy learns that",
        f"train with --policy.chunk_size={shorter}{executed}, or leave these steps out: "
        "--policy.mask_padded_actions=true",
    )


def name_long_chunk(config: PI0Config, meta: Any) -> None:
    """Warn of a chunk that is long beside the episodes of a dataset, `meta` being its LeRobotDatasetMetadata."""
    episodes = getattr(meta, "episodes", None)
    if episodes is not None and (said := long_chunk(config, episodes["length"])):
        logger.warning("%s. To change it: %s", *said)
