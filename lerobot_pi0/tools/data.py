"""LeRobot datasets as the verbs read them.

Axes: N frames, D dims of state or action.
"""

import contextlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.utils.constants import ACTION, OBS_STATE

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.errors import CheckpointNotFoundError
from ..configuration_pi0 import PI0Config
from ..inputs.joints import names_in_dataset
from . import ToolError


@dataclass
class DatasetOptions:
    """The dataset to read."""

    # Hub id of the dataset; with `root`, any name.
    repo_id: str
    # Folder of the dataset; by default where LeRobot keeps its datasets.
    root: str | None = None
    # A branch, tag or commit on the Hub.
    revision: str | None = None
    # Numbers of the episodes to read; by default all.
    episodes: list[int] | None = None


class Columns(NamedTuple):
    """State, actions and bookkeeping of a dataset, in the order of its frames."""

    state_ND: np.ndarray
    action_ND: np.ndarray
    timestamp: np.ndarray
    episode: np.ndarray
    frame: np.ndarray
    task: np.ndarray


def open_meta(options: DatasetOptions) -> LeRobotDatasetMetadata:
    """Read the metadata of a dataset, without its data.

    Raises:
        ToolError: it cannot be read, or has no state or no actions.
    """
    try:
        meta = LeRobotDatasetMetadata(options.repo_id, root=options.root, revision=options.revision)
    except Exception as error:
        raise _unreadable(options, error) from error
    if missing := [key for key in (OBS_STATE, ACTION) if key not in meta.features]:
        raise ToolError(
            f"{options.repo_id} has no {' and no '.join(missing)}, which this command compares (lerobot-train learns "
            "without a state, and not without actions)"
        )
    return meta


def open_dataset(options: DatasetOptions, **kwargs: Any) -> LeRobotDataset:
    """Open a dataset from a folder, from LeRobot's own folder of datasets, or from the Hub.

    Raises:
        ToolError: it cannot be read, or has no state or no actions.
    """
    open_meta(options)
    try:
        return LeRobotDataset(
            options.repo_id, root=options.root, episodes=options.episodes, revision=options.revision, **kwargs
        )
    except Exception as error:
        raise _unreadable(options, error) from error


def _unreadable(options: DatasetOptions, error: Exception) -> ToolError:
    """What LeRobot raises depends on which of the files is not there."""
    where = options.root or "LeRobot's datasets and the Hub"
    return ToolError(
        f"the dataset {options.repo_id} cannot be read from {where} ({type(error).__name__}: {error}). Without a "
        "network, name its folder: --dataset.root=FOLDER, the one that holds `meta` and `data`"
    )


def read_columns(dataset: LeRobotDataset) -> Columns:
    """State, actions and bookkeeping of all its episodes, float64 and int64; no image is decoded."""
    names = {
        "state_ND": OBS_STATE,
        "action_ND": ACTION,
        "timestamp": "timestamp",
        "episode": "episode_index",
        "frame": "frame_index",
        "task": "task_index",
    }
    table = dataset.hf_dataset.with_format("numpy").select_columns(list(names.values()))[:]
    arrays = {field: np.asarray(table[column]) for field, column in names.items()}
    frames = len(arrays["episode"])
    for field in ("state_ND", "action_ND"):
        arrays[field] = arrays[field].reshape(frames, -1).astype(np.float64)
    return Columns(**arrays)


def need_pi0(policy: PreTrainedConfig | None) -> PI0Config:
    """The policy's config, with the options that the plugin saved beside its checkpoint.

    A checkpoint that is not found is taken as a name.

    Raises:
        CheckpointError: what is beside the checkpoint cannot be read.
        ToolError: there is no policy, or it is not π₀.
    """
    if policy is None:
        raise ToolError("no policy: give --policy.path=CHECKPOINT, or --policy.type=pi0 for a new one")
    if not isinstance(policy, PI0Config):
        raise ToolError(f"--policy.type={policy.type} is another policy; this command is for pi0")
    if policy.pretrained_path:
        with contextlib.suppress(CheckpointNotFoundError):
            policy.take_saved(Checkpoint.open(policy.pretrained_path, revision=policy.pretrained_revision).saved())
    return policy


def dim_names(dataset: LeRobotDataset, key: str) -> list[str]:
    """Names of the dims of state or actions, in order; numbers where the dataset has no names."""
    return names_in_dataset(dataset.meta.features, key)


def some(items: list[Any], most: int = 5) -> str:
    """The first items of a list, for a message."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more
