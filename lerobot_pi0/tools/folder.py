"""A dataset's folder, read file by file: what is missing or damaged is listed, everything else is read.

Axes: N frames, D dims of state or action.
"""

import importlib
import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.table import table_cast
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.dataset_metadata import CODEBASE_VERSION
from lerobot.datasets.feature_utils import get_hf_features_from_features
from lerobot.datasets.io_utils import load_info, load_stats, load_tasks
from lerobot.datasets.utils import (
    DEFAULT_TASKS_PATH,
    EPISODES_DIR,
    INFO_PATH,
    STATS_PATH,
    check_version_compatibility,
)
from lerobot.utils.constants import ACTION, OBS_STATE

from ..inputs.statistics import recompute_command
from . import ToolError

POINTER = b"version https://git-lfs"

CONVERTER = "python -m lerobot.scripts.convert_dataset_v21_to_v30"


class Damage(NamedTuple):
    """A file that cannot be used: its name in the folder, what is wrong, and what to do."""

    file: str
    problem: str
    remedy: str


class Columns(NamedTuple):
    """State, actions and bookkeeping of a dataset, in the order of its frames.

    `file` and `row` say in which of the folder's data files a frame is, and in which row there.
    """

    state_ND: np.ndarray
    action_ND: np.ndarray
    timestamp: np.ndarray
    episode: np.ndarray
    frame: np.ndarray
    task: np.ndarray
    place: np.ndarray
    file: np.ndarray
    row: np.ndarray

    def of(self, episodes: Iterable[int] | None) -> "Columns":
        """The frames of these episodes; None: of all."""
        if episodes is None:
            return self
        kept = np.isin(self.episode, list(episodes))
        return Columns(*(values[kept] for values in self))


NUMBERS = {
    "timestamp": "timestamp", "episode": "episode_index", "frame": "frame_index", "task": "task_index",
    "place": "index",
}  # fmt: skip
"""Columns of one number per frame: our name, and the dataset's."""


def is_folder(root: str | Path | None) -> bool:
    """Whether this is the folder of a dataset, which then is read as it is and not completed from the Hub."""
    return root is not None and (Path(root) / "meta").is_dir()


def file_problem(path: Path) -> str | None:
    """Why a file cannot be read at all; None where it can be tried."""
    if not path.is_file():
        return "is missing"
    with path.open("rb") as file:
        beginning = file.read(len(POINTER))
    if beginning == POINTER:
        return "is a Git LFS pointer: its content was not downloaded"
    return None if beginning else "is empty"


class FolderMetadata(LeRobotDatasetMetadata):
    """The metadata in a folder, as far as it can be read; the network is never asked.

    Attributes:
        damage: files that cannot be used.

    Raises:
        ToolError: `info.json` cannot be read, or describes another version of the format.
    """

    def __init__(self, repo_id: str, root: str | Path) -> None:
        self.damage: list[Damage] = []
        super().__init__(repo_id, root=root)

    def _load_metadata(self) -> None:
        self.info = read_info(self.repo_id, self.root)
        self._name_axes()
        self.stats = self.attempt(STATS_PATH, lambda: load_stats(self.root)) or {}
        no_tasks = pd.DataFrame({"task_index": pd.Series(dtype=int)})
        tasks = self.attempt(DEFAULT_TASKS_PATH, lambda: _with_tasks(load_tasks(self.root)))
        self.tasks = no_tasks if tasks is None else tasks
        files = sorted(self.root.glob(f"{EPISODES_DIR}/*/*.parquet"))
        if not files:
            self.note(EPISODES_DIR, "is missing, or holds no parquet file")
        tables = [self.attempt(str(file.relative_to(self.root)), lambda: _episode_table(file)) for file in files]  # noqa: B023
        read = [table for table in tables if table is not None]
        empty = pd.DataFrame({"episode_index": pd.Series(dtype=int), "length": pd.Series(dtype=int)})
        self.episodes = pd.concat(read, ignore_index=True) if read else empty

    def _name_axes(self) -> None:
        """Give the axes of cameras the names by which LeRobot finds the channels, where `info.json` has other ones."""
        for key, feature in self.info.features.items():
            if feature["dtype"] in ("image", "video"):
                last, named = feature["shape"][2] in (1, 3), feature.get("names")
                axes = ["height", "width", "channels"] if last else ["channels", "height", "width"]
                known = isinstance(named, list | tuple) and len(named) == 3
                if not known or (named[2] in ("channel", "channels")) != last:
                    feature["names"] = axes
                    self.note(INFO_PATH, f"calls the axes of the camera {key!r} {named}: set its names to {axes}")

    def note(self, file: str, problem: str) -> None:
        """Add to `damage`, with the remedy that suits the problem."""
        again = f"hf download {self.repo_id} --repo-type=dataset --local-dir={shlex.quote(str(self.root))}"
        remedy = f"copy the file again, or download it: {again}"
        if "Git LFS" in problem:
            remedy = f"run `git lfs pull` in {self.root}, or download the dataset: {again}"
        elif file == STATS_PATH:
            remedy = f"compute it: {recompute_command(self.repo_id, self.root, in_place=True)}"
        if (damage := Damage(file, problem, remedy)) not in self.damage:
            self.damage.append(damage)

    def attempt(self, file: str, read: Callable[[], Any]) -> Any:
        """What `read` makes of a file; None, and a line in `damage`, where it cannot."""
        if (problem := file_problem(self.root / file)) is not None:
            self.note(file, problem)
            return None
        try:
            return read()
        except Exception as error:  # what parsers raise for damaged files has many types
            self.note(file, f"cannot be read: {short(error)}")
            return None

    def row_of(self, episode: int) -> dict[str, Any] | None:
        """The metadata of an episode, by column; None where there is none."""
        return self._rows.get(episode)

    @cached_property
    def _rows(self) -> dict[int, dict[str, Any]]:
        rows = self.episodes.to_dict("records")
        return {int(row["episode_index"]): row for row in reversed(rows)}  # of two for one episode, the first

    def episode_statistics(self, key: str, names: Sequence[str]) -> dict[int, np.ndarray] | None:
        """Statistics of state or actions by episode (names, D), NaN for what is no number; None without any."""
        columns = [f"stats/{key}/{name}" for name in names]
        found: dict[int, np.ndarray] = {}
        for file in sorted(self.root.glob(f"{EPISODES_DIR}/*/*.parquet")):
            table = self.attempt(str(file.relative_to(self.root)), lambda: _statistics_table(file, columns))  # noqa: B023
            for number, *cells in [] if table is None else table.itertuples(index=False):
                found[int(number)] = _as_rows(cells)
        return found or None

    def video(self, episode: int, key: str) -> tuple[Path, float] | None:
        """The video of an episode, and the second in it where the episode begins; None where that is not known."""
        row, parts = self.row_of(episode), [f"videos/{key}/{x}" for x in ("chunk_index", "file_index")]
        begin = f"videos/{key}/from_timestamp"
        if row is None or any(name not in row or not _is_number(row[name]) for name in (*parts, begin)):
            return None
        chunk, file = (int(row[name]) for name in parts)
        name = str(self.info.video_path).format(video_key=key, chunk_index=chunk, file_index=file)
        return self.root / name, float(row[begin])

    def data_files(self) -> list[Path]:
        """All files that should hold frames: those that are there, and those that the episodes name."""
        found = {*self.root.glob("data/*/*.parquet")}
        parts = [f"data/{x}" for x in ("chunk_index", "file_index")]
        if all(name in self.episodes for name in parts):
            for chunk, file in self.episodes[parts].dropna().drop_duplicates().itertuples(index=False):
                if _is_number(chunk) and _is_number(file):
                    name = self.info.data_path.format(chunk_index=int(chunk), file_index=int(file))
                    found.add(self.root / name)
        return sorted(found)


def read_info(repo_id: str, root: Path) -> Any:
    """LeRobot's DatasetInfo of a folder.

    Raises:
        ToolError: it cannot be read, is of another version, or describes no state and actions that π₀ could learn from.
    """
    path = root / INFO_PATH
    again = f"copy the dataset again: hf download {repo_id} --repo-type=dataset --local-dir={root}"
    if (problem := file_problem(path)) is not None:
        raise ToolError(f"{path} {problem}; {again}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = str(raw.get("codebase_version"))
        if version.removeprefix("v").startswith(("1.", "2.")):
            raise ToolError(
                f"the dataset in {root} has the format {version}, LeRobot reads v3.0. This command converts it in "
                f"place (a copy stays in {root}_old): {CONVERTER} --repo-id={repo_id} --root={shlex.quote(str(root))} "
                "--push-to-hub=false"
            )
        info = load_info(root)
        check_version_compatibility(repo_id, version, CODEBASE_VERSION)
        get_hf_features_from_features(info.features)  # which raises where a dtype is none
        problem = _info_problem(info)
    except ToolError:
        raise
    except Exception as error:  # damaged JSON, fields that are missing or of another type
        problem = f"cannot be read: {short(error)}"
    if problem:
        raise ToolError(f"{path} {problem}; {again}")
    return info


def _info_problem(info: Any) -> str | None:
    """What the rest of the commands could not read."""
    if not _is_number(info.fps) or not _is_number(info.total_episodes) or not _is_number(info.total_frames):
        return "has an fps, total_episodes or total_frames that is no number"
    for key, feature in info.features.items():
        shape = feature.get("shape")
        if not isinstance(feature.get("dtype"), str) or not isinstance(shape, tuple):
            return f"gives no dtype or no shape for {key!r}"
        if not shape or not all(isinstance(x, int) and x > 0 for x in shape):
            return f"gives {key!r} the shape {shape}, which is none"
        if feature["dtype"] in ("image", "video") and len(shape) != 3:
            return f"gives the camera {key!r} the shape {shape}, which has no height, width and channels"
        if not isinstance(feature.get("info") or {}, dict) or not isinstance(feature.get("video_info") or {}, dict):
            return f"gives {key!r} an `info` that is no mapping"
    for key in (OBS_STATE, ACTION):
        if info.features.get(key, {"dtype": "float32"})["dtype"] in ("image", "video", "string"):
            return f"gives {key!r} the dtype {info.features[key]['dtype']!r}, which holds no joints"
    _ = (
        info.data_path.format(chunk_index=0, file_index=0),
        str(info.video_path).format(video_key="x", chunk_index=0, file_index=0),
    )
    return None


def _with_tasks(tasks: pd.DataFrame) -> pd.DataFrame:
    return tasks.astype({"task_index": int})


def _episode_table(file: Path) -> pd.DataFrame:
    names = [name for name in pq.read_schema(file).names if not name.startswith("stats/")]
    table = pd.read_parquet(file, columns=names)
    return table.astype({"episode_index": int, "length": int})


def _statistics_table(file: Path, columns: list[str]) -> pd.DataFrame | None:
    known = pq.read_schema(file).names
    return pd.read_parquet(file, columns=["episode_index", *columns]) if {*columns} <= {*known} else None


def _as_rows(cells: list[Any]) -> np.ndarray:
    try:
        return np.stack([np.ravel(np.asarray(cell, dtype=np.float64)) for cell in cells])
    except (TypeError, ValueError):  # text, nothing, or lists of other lengths
        return np.full((len(cells), 1), np.nan)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float | np.integer | np.floating) and bool(np.isfinite(x))


def short(error: Exception) -> str:
    """The first line of an error, for a message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def read_columns(meta: FolderMetadata) -> Columns:
    """State, actions and bookkeeping of the frames that can be read, float64 and int64; others go to `meta.damage`."""
    parts = []
    for number, file in enumerate(meta.data_files()):
        name = str(file.relative_to(meta.root))
        table = meta.attempt(name, lambda: _read_file(meta, file))  # noqa: B023
        if table is not None:
            rows = np.arange(len(table["episode"]))
            parts.append(table | {"file": np.full(len(rows), number), "row": rows})
    if not parts:
        dims = {x: int(np.prod(meta.features[k]["shape"])) for x, k in (("state_ND", OBS_STATE), ("action_ND", ACTION))}
        parts = [{x: np.zeros((0, dims[x])) if x in dims else np.zeros(0, int) for x in Columns._fields}]
    return Columns(*(np.concatenate([part[field] for part in parts]) for field in Columns._fields))


def _read_file(meta: FolderMetadata, file: Path) -> dict[str, np.ndarray]:
    """The columns of one file.

    Raises:
        ValueError: one is missing, or not of the type or shape in info.json, so that LeRobot would not read it.
    """
    wanted = {"state_ND": OBS_STATE, "action_ND": ACTION, **NUMBERS}
    names = pq.read_schema(file).names
    if missing := [column for column in wanted.values() if column not in names]:
        raise ValueError(f"it has no column {', '.join(missing)}")
    table_cast(pq.read_schema(file).empty_table(), get_hf_features_from_features(meta.features).arrow_schema)
    table = pq.read_table(file, columns=list(wanted.values()))
    arrays = {}
    for field, column in wanted.items():
        if field in NUMBERS:
            x = table[column].to_numpy().astype(np.float64)
            if field != "timestamp" and not np.isfinite(x).all():
                raise ValueError(f"{column} has gaps")
            arrays[field] = x if field == "timestamp" else x.astype(np.int64)
        else:
            arrays[field] = _vectors(table[column], int(np.prod(meta.features[column]["shape"])), column)
    return arrays


def _vectors(column: pa.ChunkedArray, dims: int, name: str) -> np.ndarray:
    """A column of lists as (N, dims), float64; the lists may be nested."""
    cells = column.combine_chunks()
    if _is_list(cells.type) and not _is_list(cells.type.value_type) and not cells.null_count:
        sizes = pc.list_value_length(cells).to_numpy(zero_copy_only=False)
        if (sizes == dims).all():
            return cells.flatten().to_numpy(zero_copy_only=False).astype(np.float64).reshape(-1, dims)
    rows = [np.ravel(np.asarray(row, dtype=np.float64)) for row in column.to_pylist()]
    if found := sorted({row.size for row in rows} - {dims}):
        raise ValueError(f"{name} has {found[0]} dims in some rows, info.json says {dims}")
    return np.stack(rows) if rows else np.zeros((0, dims))


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


@cache
def video_backend() -> str:
    """LeRobot's choice of a video decoder, without the traceback that it logs where torchcodec cannot be loaded."""
    try:
        importlib.import_module("torchcodec.decoders")
    except Exception:  # an ImportError, or whatever the loader of its libraries raises
        return "pyav"
    return "torchcodec"
