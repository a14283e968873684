"""What a run of training would see of a dataset, read with LeRobot alone: the reference for `check` on damaged ones."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import ACTION, OBS_STATE, tiny_config
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.utils.feature_utils import dataset_to_policy_features

from lerobot_pi0 import make_pi0_pre_post_processors
from lerobot_pi0.inputs.joints import names_in_dataset
from lerobot_pi0.inputs.statistics import check_dataset

CHUNK = 4
NUMBERS = (OBS_STATE, ACTION, f"{ACTION}_is_pad", "episode_index", "frame_index", "timestamp")

PICTURE = 0.02
"""Pictures are the same that differ by no more than this in the mean of their pixels, where white is 1."""


def seen(root: Path, repo_id: str = "test/damaged") -> dict[str, Any]:
    """Frames, chunks, pictures, instructions, and what normalises and names them.

    Raises whatever LeRobot raises, or the policy, for a dataset that they cannot read or use.
    """
    meta = LeRobotDatasetMetadata(repo_id, root=root)
    deltas = {ACTION: [i / meta.fps for i in range(CHUNK)]}
    dataset = LeRobotDataset(repo_id, root=root, delta_timestamps=deltas, video_backend="pyav")
    features = dataset_to_policy_features(meta.features)
    config = tiny_config(list(meta.camera_keys), chunk_size=CHUNK, n_action_steps=CHUNK)
    config.input_features = {key: x for key, x in features.items() if key != ACTION}
    config.output_features = {ACTION: features[ACTION]}
    for key in meta.camera_keys:  # as lerobot-train does
        meta.stats[key]["mean"] = torch.zeros(3)
    check_dataset(config, meta.stats, meta)
    preprocessor, _ = make_pi0_pre_post_processors(config, meta.stats)
    items = [dataset[i] for i in range(len(dataset))]
    preprocessor(dict(items[0]))
    pictures = {key: torch.stack([item[key] for item in items]).double() for key in meta.camera_keys}
    assert all(bool(x.isfinite().all()) for x in pictures.values())
    kinds = ("mean", "std", "min", "max")
    return {
        "fps": float(meta.fps),
        "episodes": meta.total_episodes,
        "names": names_in_dataset(meta.features, ACTION),
        "features": {key: (feature.type, feature.shape) for key, feature in features.items()},
        "tasks": [item["task"] for item in items],
        "tasks of episodes": [list(x) for x in meta.episodes["tasks"]],  # by which eval_split holds out
        **{key: torch.stack([item[key] for item in items]).double().numpy() for key in NUMBERS},
        **{f"{kind} of {key}": np.ravel(meta.stats[key][kind]) for key in (OBS_STATE, ACTION) for kind in kinds},
        **pictures,
    }


def difference(whole: dict[str, Any], root: Path) -> str | None:
    """In what a damaged dataset is another one for training than the whole one; None: in nothing."""
    try:
        now = seen(root)
    except Exception as error:  # whatever a damaged dataset leads to
        return f"training stops: {type(error).__name__}: {str(error)[:80]}"
    if whole.keys() != now.keys():
        return f"it has {sorted(now.keys() ^ whole.keys())} more or less"
    for name, before in whole.items():
        after = now[name]
        if isinstance(before, torch.Tensor):
            apart = math.inf if before.shape != after.shape else (before - after).abs().mean(dim=(1, 2, 3)).max().item()
            same = apart <= PICTURE
        elif isinstance(before, np.ndarray):
            same = before.shape == after.shape and np.allclose(before, after, rtol=1e-6, atol=1e-6)
        else:
            same = before == after
        if not same:
            return f"{name} differs"
    return None
