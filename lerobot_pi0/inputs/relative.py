"""Relative actions: are the statistics those of relative actions, and to which state is an action relative?

An action a is learned as a - s, with s the state in which its chunk begins; joints that `relative_exclude_joints`
names stay absolute. LeRobot subtracts and adds the state in processor steps, but normalises with whatever statistics
the dataset has, and adds the state of the tick in which an action leaves the queue in place of its chunk's.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.lerobot_types import EnvTransition, TransitionKey
from lerobot.processor import ProcessorStepRegistry, RelativeActionsProcessorStep
from lerobot.utils.constants import ACTION, OBS_STATE

from ..configuration_pi0 import PI0Config, dim_name

logger = logging.getLogger(__name__)

STEP = "relative_actions_step"
"""Key of a batch under which the policy finds the step that took part in making it."""


def relative_mask(config: PI0Config, dims: int) -> np.ndarray:
    """Per dim of the action whether it is relative: LeRobot's own reading of `relative_exclude_joints`."""
    step = RelativeActionsProcessorStep(
        enabled=True, exclude_joints=config.relative_exclude_joints, action_names=config.action_feature_names
    )
    return np.array(step._build_mask(dims))


def check_relative_statistics(config: PI0Config, stats: Mapping[str, Mapping[str, Any]], meta: Any) -> None:
    """Refuse to train relative actions with statistics of absolute ones, and the reverse.

    `lerobot-edit-dataset` leaves three marks when it makes statistics of relative actions: they count every step of
    every chunk, and not every frame; the ranges of relative joints are no longer those of the recorded episodes; those
    of excluded joints still are.

    Args:
        stats: the dataset's statistics.
        meta: its LeRobotDatasetMetadata, if there is one: without it the first mark alone is looked at.

    Raises:
        ValueError: they are not those that this config needs; says which command makes them.
    """
    if ACTION not in stats or (problem := _problem(config, stats, meta)) is None:
        return
    name, root = getattr(meta, "repo_id", None) or "DATASET", getattr(meta, "root", None)
    command = f"lerobot-edit-dataset --repo_id={name}{f' --root={root}' if root else ''} "
    command += "--operation.type=recompute_stats"
    if config.use_relative_actions:
        command += f" --operation.relative_action=true --operation.chunk_size={config.chunk_size}"
        command += f' --operation.relative_exclude_joints="{config.relative_exclude_joints}"'
    raise ValueError(
        f"{problem}. Make the right statistics, in a copy of the dataset that will be {name}_recomputed_stats in "
        f"LeRobot's own folder (no --dataset.root), and train on that: {command}"
    )


def _problem(config: PI0Config, stats: Mapping[str, Mapping[str, Any]], meta: Any) -> str | None:
    """What is wrong with the statistics, None if nothing is."""
    frames, counted = (int(np.ravel(stats.get(key, {}).get("count", 0))[0]) for key in (OBS_STATE, ACTION))
    if not config.use_relative_actions:
        made = counted > frames > 0
        return f"use_relative_actions=false, but {ACTION!r} has statistics of relative actions" if made else None
    if config.relative_exclude_joints and config.action_feature_names is None:
        logger.warning("the dataset names no joints: relative_exclude_joints is without effect, all are relative")
    wanted = relative_mask(config, config.output_features[ACTION].shape[0])
    if counted == frames and config.chunk_size > 1 and wanted.any():
        return f"use_relative_actions=true, but {ACTION!r} has statistics of absolute actions"
    lengths, low, high = _recorded(meta)
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
    wrong = [dim_name(config, ACTION, int(i)) for i in np.flatnonzero(differ & (absolute == wanted))]
    asked = f"relative_exclude_joints={config.relative_exclude_joints}"
    return f"the statistics of {', '.join(wrong)} are not what {asked} asks for" if wrong else None


def _recorded(meta: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Length (E), lowest and highest action (E, A) of each episode as recorded; nothing without a dataset."""
    import pandas as pd

    files = sorted(Path(meta.root).glob("meta/episodes/**/*.parquet")) if getattr(meta, "root", None) else []
    columns = ["length", f"stats/{ACTION}/min", f"stats/{ACTION}/max"]
    if not files:
        return np.zeros(0), np.zeros((0, 0)), np.zeros((0, 0))
    table = pd.concat([pd.read_parquet(file, columns=columns) for file in files])
    return table["length"].to_numpy(), *(np.stack(list(table[name])) for name in columns[1:])


class AnchoredRelativeStep(RelativeActionsProcessorStep):
    """LeRobot's step, under LeRobot's name, which lets the policy tell to which state its actions are relative.

    `AbsoluteActionsProcessorStep` adds the state that this step saw last. While a chunk is executed from a queue, the
    state moves on, and the actions would with it.
    """

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        transition = super().__call__(transition)
        if self.enabled and transition.get(TransitionKey.ACTION) is None:  # at the robot
            data = {**(transition.get(TransitionKey.COMPLEMENTARY_DATA) or {}), STEP: self}
            transition = {**transition, TransitionKey.COMPLEMENTARY_DATA: data}  # type: ignore[assignment]
        return transition


class Anchor:
    """The state to which the actions of the chunk that is being executed are relative."""

    def __init__(self) -> None:
        self._raw: Any = None
        self._normalised: Any = None

    def set(self, batch: Mapping[str, Any]) -> None:
        """A chunk begins with this batch."""
        self._raw = batch[STEP].get_cached_state() if STEP in batch else None
        self._normalised = batch.get(OBS_STATE)

    def restore(self, batch: Mapping[str, Any]) -> Any:
        """An action of that chunk is about to be made absolute. Returns the (normalised) state it will be added to:
        the chunk's, or this batch's where LeRobot's own step is at work."""
        if STEP not in batch:
            return batch.get(OBS_STATE)
        batch[STEP]._last_state = self._raw
        return self._normalised


def register_relative_step() -> None:
    """Rebuild saved `relative_actions_processor` steps as the step that can do more."""
    ProcessorStepRegistry.unregister("relative_actions_processor")
    ProcessorStepRegistry.register("relative_actions_processor")(AnchoredRelativeStep)
