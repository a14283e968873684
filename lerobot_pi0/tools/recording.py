"""A dataset as `lerobot-pi0 check` sees it: metadata, columns and pictures, as far as they can be read."""

import io
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import torch
from lerobot.datasets.io_utils import pil_to_chw_tensor
from lerobot.datasets.video_utils import FrameTimestampError, decode_video_frames
from lerobot.utils.constants import ACTION, OBS_STATE
from PIL import Image
from torch import Tensor

from ..inputs.features import colour_cameras
from .folder import Columns, Damage, FolderMetadata, file_problem, read_columns, short, video_backend

TOLERANCE_S = 1e-4
"""How far LeRobot lets a time stamp be from its frame, in seconds."""


class PictureError(RuntimeError):
    """A picture cannot be decoded; says why."""


class Recording:
    """A dataset in a folder, of which everything that can be read is read.

    Args:
        episodes: numbers of the episodes to look at; None: all.

    Attributes:
        columns, everything: the frames of these episodes, and of all.
        untimely: by camera, episodes in whose video LeRobot would not find a frame at the time where it looks for it.
    """

    def __init__(self, meta: FolderMetadata, episodes: list[int] | None) -> None:
        self.meta = meta
        self.everything = read_columns(meta)
        self.columns: Columns = self.everything.of(episodes)
        self.untimely: dict[str, set[int]] = defaultdict(set)
        self._files = meta.data_files()
        self._row_group = lru_cache(maxsize=4)(self._read_row_group)

    @property
    def damage(self) -> list[Damage]:
        """Files that cannot be used; grows with what has been looked at."""
        return self.meta.damage

    @cached_property
    def cameras(self) -> list[str]:
        """Cameras whose pictures have colours: depth maps are no input of π₀."""
        return colour_cameras(self.meta)

    def look_at_videos(self) -> None:
        """Put videos that are missing, damaged, or end before their episodes into `damage`."""
        ends: dict[tuple[Path, str], float] = {}
        numbers, lengths = np.unique(self.columns.episode, return_counts=True)
        for key in self.meta.video_keys:
            for episode, frames in zip(numbers.tolist(), lengths.tolist(), strict=True):
                if (found := self.meta.video(episode, key)) is None:
                    self.meta.note("meta/episodes", f"does not say where the pictures of {key!r} are")
                    continue
                path, begin = found
                ends[path, key] = max(ends.get((path, key), 0.0), begin + frames / self.meta.fps)
        for (path, _), end in ends.items():
            name = str(path.relative_to(self.meta.root))
            seconds = self.meta.attempt(name, lambda: _duration(path))  # noqa: B023
            if seconds is not None and seconds < end - 1.5 / self.meta.fps:
                self.meta.note(name, f"holds {seconds:.2f} s, its episodes last {end:.2f} s")

    def pictures(self, key: str, rows: np.ndarray) -> Iterator[Tensor]:
        """The pictures of a camera at some rows of one episode, (channels, height, width), in [0, 1].

        Raises:
            PictureError: one cannot be decoded.
        """
        try:
            if self.meta.features[key]["dtype"] == "video":
                yield from self._from_video(key, rows)
            else:
                for row in rows:
                    yield self._from_column(key, int(row))
        except PictureError:
            raise
        except Exception as error:  # what decoders raise for damaged data has many types
            raise PictureError(short(error)) from error

    def _from_video(self, key: str, rows: np.ndarray) -> Iterator[Tensor]:
        found = self.meta.video(int(self.columns.episode[rows[0]]), key)
        if found is None:
            raise PictureError("the metadata does not say where its video is")
        path, begin = found
        if (problem := file_problem(path)) is not None:
            raise PictureError(f"{path.relative_to(self.meta.root)} {problem}")
        steps = np.flatnonzero(np.diff(rows) != 1) + 1
        for run in np.split(rows, steps):  # a decoder reads consecutive frames at once, and seeks to others
            for part in np.array_split(run, -(-len(run) // 64)):
                # By number and not by time stamp: those may be off, which `episodes` reports.
                times = begin + self.columns.frame[part] / self.meta.fps
                try:
                    pictures = self._decode(path, times.tolist(), key, int(self.columns.episode[rows[0]]))
                except Exception as error:  # decoders raise errors of many types
                    name = path.relative_to(self.meta.root)
                    raise PictureError(f"{name} is damaged, or ends too early") from error
                yield from (picture.float() / 255 for picture in pictures)

    def _decode(self, path: Path, times: list[float], key: str, episode: int) -> Tensor:
        """Frames as LeRobot finds them; where it would find none so close, the nearest, and the episode is noted."""
        options = {"backend": video_backend(), "return_uint8": True}
        try:
            return decode_video_frames(path, times, TOLERANCE_S, **options)
        except FrameTimestampError:
            frames = decode_video_frames(path, times, 1 / self.meta.fps, **options)
            self.untimely[key].add(episode)
            return frames

    def _from_column(self, key: str, row: int) -> Tensor:
        file, at = int(self.columns.file[row]), int(self.columns.row[row])
        begin, cells = self._row_group(file, self._group_of(file, at), key)
        cell = cells[at - begin]
        if isinstance(cell, dict):
            data = cell.get("bytes") or (self.meta.root / (cell.get("path") or "")).read_bytes()
            return pil_to_chw_tensor(Image.open(io.BytesIO(data)))
        if cell is None:
            raise PictureError("there is no picture")
        values = torch.as_tensor(np.array(cell))
        return values.float() / 255 if values.dtype == torch.uint8 else values.float()

    def _group_of(self, file: int, at: int) -> int:
        return int(np.searchsorted(self._group_ends(file), at, side="right"))

    @lru_cache(maxsize=64)  # noqa: B019  of one command's only dataset
    def _group_ends(self, file: int) -> np.ndarray:
        metadata = self._parquet(file).metadata
        return np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])

    @lru_cache(maxsize=8)  # noqa: B019  of one command's only dataset
    def _parquet(self, file: int) -> pq.ParquetFile:
        return pq.ParquetFile(self._files[file])

    def _read_row_group(self, file: int, group: int, key: str) -> tuple[int, list[Any]]:
        ends = self._group_ends(file)
        parquet = self._parquet(file)
        if key not in parquet.schema_arrow.names:
            raise PictureError(f"{self._files[file].relative_to(self.meta.root)} has no column {key}")
        cells = parquet.read_row_group(group, columns=[key], use_threads=False)[key].to_pylist()
        return int(ends[group - 1]) if group else 0, cells

    def first_item(self) -> dict[str, Any]:
        """The first frame as LeRobot's dataset hands it out.

        Raises:
            PictureError: one of its pictures cannot be decoded.
        """
        columns, tasks = self.columns, self.meta.tasks
        named = tasks.index[tasks["task_index"] == columns.task[0]].tolist()
        item: dict[str, Any] = {key: next(self.pictures(key, np.array([0]))) for key in self.cameras}
        item[OBS_STATE] = torch.from_numpy(columns.state_ND[0]).float()
        item[ACTION] = torch.from_numpy(columns.action_ND[0]).float()
        return item | {"task": str(named[0]) if named else ""}


def _duration(path: Path) -> float:
    """Seconds of a video, by its header."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        seconds = float(container.duration or 0) / 1e6
        if stream.duration is not None and stream.time_base is not None:
            seconds = float(stream.duration * stream.time_base)
    return seconds
