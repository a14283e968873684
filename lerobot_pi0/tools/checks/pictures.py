"""Pictures of the cameras: size, range of values, and cameras that hang."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from tqdm import tqdm

from ..data import some
from .subject import ERROR, WARNING, Finding, Subject

GRID = 32
STANDING = 0.02
"""A picture has changed if a cell of a grid of 32 × 32 changes by more than this, where white is 1."""


class Look(NamedTuple):
    """What was seen of one camera: size, range, and by how much some cell differs from the frame before."""

    height_width: tuple[int, int]
    low: float
    high: float
    change: np.ndarray
    episode: np.ndarray
    frame: np.ndarray
    moving: np.ndarray


def images(subject: Subject) -> Iterable[Finding]:
    """Resolution, range, and what does not change although the arm moves."""
    side = subject.config.image_size
    for key, look in look_at_images(subject).items():
        yield from resolution(subject, key, look, side)
        if not (look.low >= -1e-3 and look.high <= 1 + 1e-3):
            message = f"{key} holds values from {look.low:.3g} to {look.high:.3g}, expected [0, 1]"
            yield Finding(ERROR, "images", message, "record 8-bit images; LeRobot divides them by 255")
        elif look.high < 0.1:
            message = f"{key} is black: its brightest value is {look.high:.3g} of 1"
            yield Finding(ERROR, "images", message, "divided by 255 twice, a lens cap, or exposure: record anew")
        elif look.high - look.low < 0.02:
            yield Finding(ERROR, "images", f"{key} shows one grey everywhere", "check the camera and record anew")
        else:
            yield from standing_pictures(subject, key, look)


def resolution(subject: Subject, key: str, look: Look, side: int) -> Iterable[Finding]:
    shape = tuple(subject.dataset.meta.features[key]["shape"])
    height, width = look.height_width
    if {height, width} - {*shape}:
        message = f"{key} is {height} × {width}, the dataset says {shape}"
        yield Finding(ERROR, "images", message, "the files are of another recording: restore or record anew")
    if max(height, width) < side:
        message = f"{key} is {height} × {width} and is enlarged to {side}: details are missing"
        yield Finding(WARNING, "images", message, f"record at {side} pixels or more")
    policy_key = subject.rename_map.get(key, key)
    trained = subject.trained.config.image_features.get(policy_key) if subject.trained.config else None
    if trained is not None and subject.keeps_features:
        ratios = width / height, trained.shape[-1] / trained.shape[-2]
        if trained.shape[-1] != trained.shape[-2] and abs(ratios[0] / ratios[1] - 1) > 0.1:
            message = f"{key} has the aspect {ratios[0]:.2f}, in training it had {ratios[1]:.2f}"
            yield Finding(WARNING, "images", message, "record at the shape of training")


def standing_pictures(subject: Subject, key: str, look: Look) -> Iterable[Finding]:
    """Frames that equal the one before although joints moved: a camera that hangs, or is slower than the fps."""
    moving = look.moving
    if not moving.any():
        return
    lively = np.quantile(look.change[moving], 0.9)
    same = moving & (look.change <= 0.05 * lively) if lively > STANDING else moving
    episodes, frames = look.episode, look.frame
    hangs = []
    for episode in np.unique(episodes):
        mine = episodes == episode
        start, length = longest_run(same[mine])
        if length >= min(10, max(3, mine.sum() // 2)):
            hangs.append(f"episode {episode} from frame {frames[mine][start]}")
            same &= ~mine
    if hangs:
        message = f"{key} is frozen while the joints move: {some(hangs)}"
        yield Finding(ERROR, "images", message, "delete these episodes (lerobot-edit-dataset) and check the camera")
    share = same.sum() / moving.sum()
    if share > 0.1:
        where = sorted({int(x) for x in episodes[same]})
        message = (
            f"{key}: {share:.0%} of the frames repeat the one before while the joints move (episodes {some(where)})"
        )
        yield Finding(
            WARNING,
            "images",
            message,
            f"the camera is slower than {subject.dataset.meta.fps} fps: lower one, or light the scene",
        )


def longest_run(flags: np.ndarray) -> tuple[int, int]:
    """Start and length of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    return (int(starts[lengths.argmax()]), int(lengths.max())) if len(starts) else (0, 0)


def look_at_images(subject: Subject) -> dict[str, Look]:
    """Decode runs of consecutive frames, spread over the episodes."""
    columns, dataset = subject.columns, subject.dataset
    found: dict[str, list[tuple[float, int, int, bool]]] = {key: [] for key in dataset.meta.camera_keys}
    ranges: dict[str, list[tuple[float, float]]] = {key: [] for key in found}
    sizes: dict[str, tuple[int, int]] = {}
    spread = np.maximum(columns.state_ND.std(axis=0), 1e-9)
    rows = frames_to_look_at(columns.episode, subject.images)
    previous: dict[str, torch.Tensor] = {}
    last = -2
    for i in tqdm(rows, desc="images", disable=not found, leave=False):
        item = dataset[int(i)]
        joined = i == last + 1 and columns.episode[i] == columns.episode[last]
        for key in found:
            picture = item[key].float()
            picture = picture / 255 if item[key].dtype == torch.uint8 else picture
            sizes[key] = (picture.shape[-2], picture.shape[-1])
            ranges[key].append((float(picture.min()), float(picture.max())))
            small = F.adaptive_avg_pool2d(picture[None], GRID)[0]  # which evens out what a video codec adds
            if joined:
                step = np.abs(columns.state_ND[i] - columns.state_ND[last]) / spread
                change = float((small - previous[key]).abs().max())
                found[key].append((change, int(columns.episode[i]), int(columns.frame[i]), bool(step.max() > 0.05)))
            previous[key] = small
        last = i
    return {key: _look(sizes[key], ranges[key], found[key]) for key in sizes}


def _look(size: tuple[int, int], ranges: list[tuple[float, float]], found: list[tuple[float, int, int, bool]]) -> Look:
    low, high = np.array(ranges).T
    change, episode, frame, moving = zip(*found, strict=True) if found else ((), (), (), ())
    return Look(
        size, float(low.min()), float(high.max()), np.array(change), np.array(episode, int), np.array(frame, int),
        np.array(moving, bool),
    )  # fmt: skip


def frames_to_look_at(episode: np.ndarray, most: int) -> np.ndarray:
    """Row numbers: a run in each of some episodes, the runs at the beginning, middle and end in turn."""
    numbers = np.unique(episode)
    chosen = numbers[np.unique(np.linspace(0, len(numbers) - 1, max(1, min(len(numbers), most // 40))).astype(int))]
    length = most // len(chosen)
    rows = []
    for turn, number in enumerate(chosen):
        mine = np.flatnonzero(episode == number)
        start = max(0, len(mine) - length) * (turn % 3) // 2
        rows.append(mine[start : start + length])
    return np.concatenate(rows)
