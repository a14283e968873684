"""Pictures of the cameras: size, range of values, and cameras that are black or hang.

Of every episode some frames are looked at, a second apart, and of some episodes a run of consecutive ones. Where these
are black or do not change, all frames of the episode are decoded.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from tqdm import tqdm

from ..data import some
from ..recording import PictureError
from .noise import speed_between
from .subject import ERROR, WARNING, Finding, Subject

GRID = 32
STANDING = 0.02
"""A picture has changed if a cell of a grid of 32 × 32 changes by more than this, where white is 1."""

BLACK = 0.1
"""A picture is black if nothing in it is brighter than this, where white is 1."""

SLOW = 0.15
"""A camera is slower than the fps from this part of repeated pictures on, of those of fast motions: 25 of 30 Hz is."""

SAMPLES = 8
"""At least so many frames of every episode are looked at."""

DECODED_IN_FULL = 20
"""At most so many suspicious episodes per camera are decoded in full; of the others the samples are reported."""


class Glance(NamedTuple):
    """A picture and what changed since the one that was looked at before it, in the same episode.

    `change` is by how much some cell differs; NaN for the first. `speed`: how fast joints moved meanwhile, as
    `speed_between` has it.
    """

    row: int
    low: float
    high: float
    change: float
    speed: float

    @property
    def moved(self) -> bool:
        return self.speed > 1


@dataclass
class Look:
    """What was seen of one camera, by episode: samples, and consecutive frames."""

    size: tuple[int, int] | None = None
    samples: dict[int, list[Glance]] = field(default_factory=dict)
    runs: dict[int, list[Glance]] = field(default_factory=dict)
    failed: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    def glances(self) -> list[Glance]:
        return [x for part in (self.samples, self.runs) for glances in part.values() for x in glances]


def images(subject: Subject) -> Iterable[Finding]:
    """Resolution, range, what cannot be decoded, is black, or does not change although the arm moves."""
    side = subject.config.image_size
    for key in subject.dataset.cameras:
        look = look_at_camera(subject, key)
        yield from undecodable(subject, key, look)
        if late := sorted(subject.dataset.untimely[key]):
            message = (
                f"{key} has no frames at the times of episodes {some(late)}: LeRobot looks frame_index / fps after "
            )
            message += "from_timestamp (meta/episodes)"
            remedy = "write the videos anew at the fps of the dataset, or copy the dataset again; training would stop"
            yield Finding(ERROR, "images", message, remedy)
        if look.size is None or not look.glances():
            continue
        yield from resolution(subject, key, look.size, side)
        low, high = min(x.low for x in look.glances()), max(x.high for x in look.glances())
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            message = f"{key} holds values from {low:.3g} to {high:.3g}, expected [0, 1]"
            yield Finding(ERROR, "images", message, "record 8-bit images; LeRobot divides them by 255")
        elif high < BLACK:
            message = f"{key} is black: its brightest value is {high:.3g} of 1"
            yield Finding(ERROR, "images", message, "divided by 255 twice, a lens cap, or exposure: record anew")
        elif high - low < STANDING:
            yield Finding(ERROR, "images", f"{key} shows one grey everywhere", "check the camera and record anew")
        else:
            yield from black_pictures(subject, key, look)
            if not late:  # of two frames the nearest may be the same
                yield from standing_pictures(subject, key, look)


def undecodable(subject: Subject, key: str, look: Look) -> Iterable[Finding]:
    """Episodes whose pictures cannot be decoded, by problem; files that `files` reports are left out."""
    known = [damage.file for damage in subject.dataset.damage]
    for problem, episodes in look.failed.items():
        if any(file in problem for file in known):
            continue
        message = f"{key} cannot be decoded in episodes {some(sorted(episodes))}: {problem}"
        yield Finding(
            ERROR, "images", message, "copy the files of these episodes again; training would stop when it reaches them"
        )


def resolution(subject: Subject, key: str, size: tuple[int, int], side: int) -> Iterable[Finding]:
    shape = tuple(subject.dataset.meta.features[key]["shape"])
    height, width = size
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


def black_pictures(subject: Subject, key: str, look: Look) -> Iterable[Finding]:
    """Episodes in which the camera is black, or becomes it."""
    where = []
    for episode, glances in look.samples.items():
        frames = look.runs.get(episode, glances)
        dark = np.array([x.high < BLACK for x in glances])
        if dark.sum() >= 2 or dark.all():
            start, length = longest_run(np.array([x.high < BLACK for x in frames]))
            first = subject.columns.frame[frames[start].row] if length else 0
            where.append(f"episode {episode} from frame {first}" if not dark.all() else f"all of episode {episode}")
    if where:
        yield Finding(ERROR, "images", f"{key} is black: {some(where)}", "delete these episodes (lerobot-edit-dataset)")


def standing_pictures(subject: Subject, key: str, look: Look) -> Iterable[Finding]:
    """Frames that equal the one before although joints moved: a camera that hangs, or is slower than the fps."""
    lively, fast = lively_change(look), fast_motion(look)
    hangs, repeated, moving, where = [], 0, 0, set()
    for episode, glances in look.runs.items():
        same = np.array([unchanged(x, lively) for x in glances])
        change = np.array([x.change for x in glances])
        moved = np.array([x.speed >= fast for x in glances])
        start, length = longest_hang(glances, lively)
        if length >= min(10, max(3, len(same) // 2)):
            hangs.append(f"episode {episode} from frame {subject.columns.frame[glances[start].row]}")
        else:
            around = np.fmax(np.append(change[1:], 0), np.append(0, change[:-1]))
            # A slow motion changes little in all frames, and a video codec leaves such changes out of every second one;
            # a slow camera repeats pictures of fast motions too.
            same &= moved & (around > 0.7 * lively)
            repeated, moving = repeated + int(same.sum()), moving + int(moved.sum())
            where |= {episode} if same.any() else set()
    for episode in suspicious(look, lively):
        if episode not in look.runs:  # more than are decoded in full
            hangs.append(f"episode {episode}, by samples")
    if hangs:
        message = f"{key} is frozen while the joints move: {some(hangs)}"
        yield Finding(ERROR, "images", message, "delete these episodes (lerobot-edit-dataset) and check the camera")
    if moving and repeated > SLOW * moving:
        message = (
            f"{key}: {repeated / moving:.0%} of the frames repeat the one before while the joints move fast "
            f"(episodes {some(sorted(where))})"
        )
        remedy = f"the camera is slower than {subject.dataset.meta.fps} fps: lower one, or light the scene"
        yield Finding(WARNING, "images", message, remedy)


def lively_change(look: Look) -> float:
    """By how much a picture of this camera changes from frame to frame when the joints move, or more."""
    changes = [x.change for glances in look.runs.values() for x in glances if x.moved and np.isfinite(x.change)]
    return float(np.quantile(changes, 0.9)) if changes else 0.0


def fast_motion(look: Look) -> float:
    """How fast the joints are in the faster half of the frames in which they move."""
    speeds = [x.speed for glances in look.runs.values() for x in glances if x.moved]
    return float(np.median(speeds)) if speeds else 0.0


def unchanged(glance: Glance, lively: float) -> bool:
    """Whether the picture equals the one before although joints moved."""
    return glance.moved and glance.change <= most_of_a_still(lively)


def most_of_a_still(lively: float) -> float:
    """The most by which a picture changes that shows the same as the one before."""
    return 0.05 * lively if lively > STANDING else STANDING


def suspicious(look: Look, lively: float) -> list[int]:
    """Episodes of which samples in a row do not change although the joints move."""
    return [
        episode
        for episode, glances in look.samples.items()
        if longest_run(np.array([unchanged(x, lively) for x in glances]))[1] >= 2
    ]


def longest_hang(glances: list[Glance], lively: float) -> tuple[int, int]:
    """Start of a run of equal pictures, and in how many of its frames joints moved; the arm may pause meanwhile."""
    best, start, count = (0, 0), 0, 0
    for i, glance in enumerate(glances):
        if not glance.change <= most_of_a_still(lively):  # NaN for the first
            start, count = i + 1, 0
            continue
        count += glance.moved
        best = max(best, (start, count), key=lambda x: x[1])
    return best


def longest_run(flags: np.ndarray) -> tuple[int, int]:
    """Start and length of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    return (int(starts[lengths.argmax()]), int(lengths.max())) if len(starts) else (0, 0)


def look_at_camera(subject: Subject, key: str) -> Look:
    """Samples of every episode, runs in some, and all frames of those that are suspicious."""
    look, columns = Look(), subject.columns
    whole = {number: np.flatnonzero(columns.episode == number) for number in np.unique(columns.episode).tolist()}
    samples = [rows[sample_of(len(rows), subject.dataset.meta.fps)] for rows in whole.values()]
    _look_at_all(subject, key, look, look.samples, samples, "samples")
    _look_at_all(subject, key, look, look.runs, list(runs_to_look_at(columns.episode, subject.images)), "runs")
    lively = lively_change(look)
    dark = [number for number, glances in look.samples.items() if any(x.high < BLACK for x in glances)]
    again = sorted({*suspicious(look, lively), *dark})[:DECODED_IN_FULL]
    _look_at_all(subject, key, look, look.runs, [whole[number] for number in again], "suspicious episodes")
    return look


def _look_at_all(
    subject: Subject, key: str, look: Look, part: dict[int, list[Glance]], episodes: list[np.ndarray], what: str
) -> None:
    """Decode rows of several episodes, and say how long it will take."""
    with tqdm(total=sum(map(len, episodes)), desc=f"{key}, {what}", unit="frame", leave=False) as bar:
        for rows in episodes:
            look_at(subject, key, look, part, rows)
            bar.update(len(rows))


def look_at(subject: Subject, key: str, look: Look, part: dict[int, list[Glance]], rows: np.ndarray) -> None:
    """Decode some rows of one episode into one part of a Look."""
    episode = int(subject.columns.episode[rows[0]])
    speed = speed_between(subject.columns, rows, subject.noise)
    try:
        part[episode] = list(_glances(subject.dataset.pictures(key, rows), rows, speed, look))
    except PictureError as error:
        if episode not in look.failed[str(error)]:
            look.failed[str(error)].append(episode)


def _glances(pictures: Iterator[torch.Tensor], rows: np.ndarray, speed: np.ndarray, look: Look) -> Iterator[Glance]:
    before = None
    for row, moved, picture in zip(rows.tolist(), speed.tolist(), pictures, strict=True):
        look.size = (picture.shape[-2], picture.shape[-1])
        small = F.adaptive_avg_pool2d(picture[None], GRID)[0]  # which evens out what a video codec adds
        change = float("nan") if before is None else float((small - before).abs().max())
        yield Glance(row, float(picture.min()), float(picture.max()), change, moved)
        before = small


def sample_of(length: int, fps: float) -> np.ndarray:
    """Positions in an episode, a second apart, at least `SAMPLES` of them and with the first and the last frame."""
    count = min(length, max(SAMPLES, int(length / fps) + 1))
    return np.unique(np.linspace(0, length - 1, count).astype(int))


def runs_to_look_at(episode: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Row numbers: a run in each of some episodes, the runs at the beginning, middle and end in turn."""
    numbers = np.unique(episode)
    chosen = numbers[np.unique(np.linspace(0, len(numbers) - 1, max(1, min(len(numbers), most // 40))).astype(int))]
    length = max(2, most // len(chosen))
    for turn, number in enumerate(chosen):
        mine = np.flatnonzero(episode == number)
        start = max(0, len(mine) - length) * (turn % 3) // 2
        yield mine[start : start + length]
