"""The LeRobot dataset beside cached contexts: their frames, in the order of their records, without pictures.

A sample is what LeRobot makes of a frame of the recorded dataset: its state, task, and chunk of actions with what is
beyond the end of the episode. The chunk is in the sample, because its steps are mostly not among the frames. `index` is
the number of the record. A camera is a black pixel, which costs nothing to decode: so LeRobot treats cameras, their
names and their order as it always does. Numbers and statistics of episodes are those of the recorded dataset.

Axes: M frames of this dataset, T steps of a chunk.
"""

import copy
import dataclasses
import io
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.datasets import LeRobotDataset
from lerobot.datasets.feature_utils import get_hf_features_from_features
from lerobot.datasets.io_utils import write_info
from lerobot.datasets.utils import (
    DEFAULT_DATA_PATH,
    DEFAULT_EPISODES_PATH,
    DEFAULT_TASKS_PATH,
    EPISODES_DIR,
    STATS_PATH,
)
from lerobot.utils.constants import ACTION, DEFAULT_FEATURES, OBS_STATE
from PIL import Image

from ..inputs.features import colour_cameras
from ..inputs.samples import IS_PAD
from ..training.context_store import Manifest
from .folder import Columns


def write_dataset(folder: Path, source: LeRobotDataset, columns: Columns, rows: np.ndarray, manifest: Manifest) -> None:
    """Write the dataset, unless it is there already: it comes into being whole.

    Args:
        rows: the frames of `source`, whose `columns` these are, in order.
    """
    if folder.exists():
        return
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    features = make_features(source, manifest)
    samples = make_samples(features, columns, rows, manifest.chunk_size)
    data = part / DEFAULT_DATA_PATH.format(chunk_index=0, file_index=0)
    data.parent.mkdir(parents=True)
    datasets.Dataset.from_dict(samples, features=get_hf_features_from_features(features)).to_parquet(data)
    table = part / DEFAULT_EPISODES_PATH.format(chunk_index=0, file_index=0)
    table.parent.mkdir(parents=True)
    pq.write_table(make_episodes(source.root, columns.episode[rows]), table)
    for name in (STATS_PATH, DEFAULT_TASKS_PATH):
        shutil.copy(source.root / name, part / name)
    info = dataclasses.replace(source.meta.info, features=features, total_frames=len(rows), video_path=None)
    write_info(info, part)
    part.replace(folder)


def make_features(source: LeRobotDataset, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """LeRobot's description of the samples; the actions' says which contexts they go with."""
    features = copy.deepcopy(source.meta.features)
    colours = {key: features[key] for key in colour_cameras(source.meta)}
    made = {key: {"dtype": "image", "shape": x["shape"], "names": x["names"]} for key, x in colours.items()}
    action = features[ACTION]
    shape = (manifest.chunk_size, int(np.prod(action["shape"])))
    return made | {
        OBS_STATE: features[OBS_STATE],
        ACTION: action | {"shape": shape, "info": {"contexts": manifest.name}},
        IS_PAD: {"dtype": "bool", "shape": (manifest.chunk_size,), "names": None},
        **copy.deepcopy(DEFAULT_FEATURES),
    }


def make_samples(features: dict[str, dict[str, Any]], columns: Columns, rows: np.ndarray, steps: int) -> dict[str, Any]:
    """The columns of the samples: as LeRobot reads a chunk, steps beyond an episode repeat its last action."""
    ends = np.searchsorted(columns.episode, columns.episode[rows], side="right")
    wanted_MT = rows[:, None] + np.arange(steps)
    actions = columns.action_ND[np.minimum(wanted_MT, ends[:, None] - 1)]
    state = columns.state_ND[rows].reshape(len(rows), *features[OBS_STATE]["shape"])
    pixel = io.BytesIO()
    Image.new("RGB", (1, 1)).save(pixel, "PNG")
    picture = {"bytes": pixel.getvalue(), "path": None}
    return {
        **{key: [picture] * len(rows) for key, x in features.items() if x["dtype"] == "image"},
        OBS_STATE: (state[:, 0] if state.shape[1:] == (1,) else state).astype(features[OBS_STATE]["dtype"]),
        ACTION: actions.astype(features[ACTION]["dtype"]),
        IS_PAD: wanted_MT >= ends[:, None],
        "timestamp": columns.timestamp[rows].astype(np.float32),
        "frame_index": columns.frame[rows],
        "episode_index": columns.episode[rows],
        "index": np.arange(len(rows)),
        "task_index": columns.task[rows],
    }


def make_episodes(root: Path, episode_M: np.ndarray) -> pa.Table:
    """The recorded dataset's table of episodes, with the places of these frames and without videos."""
    files = sorted((root / EPISODES_DIR).glob("*/*.parquet"))
    table = pa.concat_tables([pq.read_table(file) for file in files], promote_options="default")
    table = table.sort_by("episode_index").drop_columns([x for x in table.column_names if x.startswith("videos/")])
    numbers = table["episode_index"].to_numpy()
    zero = np.zeros(len(numbers), np.int64)
    places = {
        "dataset_from_index": np.searchsorted(episode_M, numbers, side="left"),
        "dataset_to_index": np.searchsorted(episode_M, numbers, side="right"),
        **{f"{kind}/{part}": zero for kind in ("data", "meta/episodes") for part in ("chunk_index", "file_index")},
    }
    for name, column in places.items():
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, pa.array(column.astype(np.int64)))
    return table
