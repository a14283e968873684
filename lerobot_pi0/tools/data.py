"""LeRobot datasets as the verbs read them."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.datasets.utils import has_legacy_hub_download_metadata
from lerobot.policies import make_pre_post_processors
from lerobot.utils.constants import ACTION, HF_LEROBOT_HOME, OBS_STATE

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.errors import CheckpointNotFoundError
from ..configuration_pi0 import PI0Config
from ..inputs.joints import names_in_dataset
from . import ToolError
from .folder import FolderMetadata, is_folder, short, video_backend
from .recording import Recording


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


def open_recording(options: DatasetOptions) -> Recording:
    """Read a dataset as far as it can be read: from a folder, from LeRobot's own folder of datasets, or from the Hub.

    Raises:
        ToolError: as `open_meta`.
    """
    return Recording(open_meta(options), options.episodes)


def open_meta(options: DatasetOptions, whole: bool = True) -> FolderMetadata:
    """Read the metadata of a dataset.

    A folder that holds `meta` is read as it is. Where there is none, the dataset is downloaded.

    Args:
        whole: download frames and pictures too.

    Raises:
        ToolError: there is no dataset, its `info.json` cannot be read, or it has no state or no actions.
    """
    home: Path | None = HF_LEROBOT_HOME / options.repo_id
    if options.revision or has_legacy_hub_download_metadata(home):  # which LeRobot does not read: it downloads another
        home = None
    root = options.root or home
    meta = FolderMetadata(options.repo_id, root if root is not None and is_folder(root) else _download(options, whole))
    if missing := [key for key in (OBS_STATE, ACTION) if key not in meta.features]:
        raise ToolError(
            f"{options.repo_id} has no {' and no '.join(missing)}, which this command compares (lerobot-train learns "
            "without a state, and not without actions)"
        )
    return meta


def _download(options: DatasetOptions, whole: bool) -> Path:
    """Raises ToolError if it cannot be downloaded."""
    where = {"root": options.root, "revision": options.revision}
    try:
        if whole:
            return Path(LeRobotDataset(options.repo_id, video_backend=video_backend(), **where).root)
        return Path(LeRobotDatasetMetadata(options.repo_id, **where).root)
    except Exception as error:  # what is raised depends on which of many things fails
        found = f"{options.root} holds no dataset (no folder `meta`)" if options.root else "it is not on this machine"
        remedy = "name the folder that holds `meta` and `data`: --dataset.root=FOLDER"
        raise ToolError(
            f"the dataset {options.repo_id} cannot be read: {found}, and the Hub says {short(error)}; {remedy}"
        ) from error


def open_dataset(options: DatasetOptions, meta: FolderMetadata, **kwargs: Any) -> tuple[LeRobotDataset, Recording]:
    """Open a dataset with LeRobot, which needs every file of the episodes that are read; and as it was recorded.

    Raises:
        ToolError: a file is missing or damaged, which is named.
    """
    recording = Recording(meta, options.episodes)
    recording.look_at_videos()
    asked = range(meta.total_episodes) if options.episodes is None else options.episodes
    need_whole(meta, sorted({*asked} - {*np.unique(recording.columns.episode).tolist()}))
    try:
        dataset = LeRobotDataset(
            options.repo_id, root=meta.root, episodes=options.episodes, video_backend=video_backend(), **kwargs
        )
    except Exception as error:  # what is raised depends on which of many things is damaged
        raise ToolError(f"LeRobot cannot open the dataset in {meta.root} ({short(error)}). {_checked(meta)}") from error
    return dataset, recording


def need_whole(meta: FolderMetadata, missing: Sequence[int] = ()) -> None:
    """Refuse a dataset of which files are damaged, or that lacks the episodes that are to be read.

    Raises:
        ToolError: names them.
    """
    problems = [f"{damage.file} {damage.problem}" for damage in meta.damage]
    problems += [f"there are no frames of episodes {some(list(missing))}"] if missing else []
    if problems:
        raise ToolError(f"the dataset in {meta.root} is not whole: {some(problems, 3)}. {_checked(meta)}")


def _checked(meta: FolderMetadata) -> str:
    return f"`lerobot-pi0 check` with --dataset.root={meta.root} lists everything that is wrong, and what to do"


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


def build_pipelines(config: PI0Config, **arguments: dict[str, Any]) -> tuple[Any, Any]:
    """LeRobot's pipelines of the checkpoint that `config` is of; to be called after its files were checked.

    Args:
        arguments: of steps, in place of those that were saved, by name of the step.

    Raises:
        ToolError: a file is damaged in a way that only building them shows.
    """
    try:
        return make_pre_post_processors(
            config,
            pretrained_path=str(config.pretrained_path),
            pretrained_revision=config.pretrained_revision,
            preprocessor_overrides=arguments,
        )
    except Exception as error:  # steps and libraries of tokenizers raise errors of many kinds
        raise ToolError(
            f"the processors of {config.pretrained_path} cannot be rebuilt: {short(error)}. Copy or download its files "
            "again"
        ) from error


def preprocessor_for(config: PI0Config, stats: Any, rename_map: dict[str, str]) -> Any:
    """The preprocessor that training gets, on the CPU.

    Args:
        config: with all of its features; those of a checkpoint go with the checkpoint's processors.
        stats: of the dataset.
    """
    overrides = {
        "device_processor": {"device": "cpu"},
        "rename_observations_processor": {"rename_map": rename_map},
        "normalizer_processor": {
            "stats": stats,
            "features": {**(config.input_features or {}), **(config.output_features or {})},
            "norm_map": config.normalization_mapping,
        },
    }
    source = None if config.pretrained_path is None else str(config.pretrained_path)
    preprocessor, _ = make_pre_post_processors(
        config,
        pretrained_path=source,
        pretrained_revision=config.pretrained_revision,
        dataset_stats=stats,
        preprocessor_overrides=overrides if source else None,
    )
    return preprocessor


def dim_names(dataset: Recording | LeRobotDataset, key: str) -> list[str]:
    """Names of the dims of state or actions, in order; numbers where the dataset has no names."""
    return names_in_dataset(dataset.meta.features, key)


def some(items: list[Any], most: int = 5) -> str:
    """The first items of a list, for a message."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more
