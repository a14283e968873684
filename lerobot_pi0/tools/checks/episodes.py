"""Prompts, lengths of episodes and time stamps."""

from collections.abc import Iterable

import numpy as np
from lerobot.datasets.utils import DEFAULT_TASKS_PATH as TASKS

from ...configuration_pi0 import PI0Config
from ...inputs.features import long_chunk
from ..data import some
from ..recording import TOLERANCE_S
from .subject import ERROR, FINE, WARNING, Finding, Subject


def prompts(subject: Subject) -> Iterable[Finding]:
    """Empty ones, cut ones, and how long they are."""
    if TASKS in {damage.file for damage in subject.dataset.damage}:
        return
    tasks = {int(i): str(task) for task, i in subject.dataset.meta.tasks["task_index"].items()}
    used = {i: tasks.get(i, "") for i in np.unique(subject.columns.task).tolist()}
    episodes = {i: sorted({int(x) for x in subject.columns.episode[subject.columns.task == i]}) for i in used}
    if empty := [episode for i, task in used.items() if not task.strip() for episode in episodes[i]]:
        message = f"no instruction in episodes {some(empty)}; the policy refuses them"
        yield Finding(ERROR, "prompts", message, "lerobot-edit-dataset --operation.type=modify_tasks sets them")
    if subject.trained.tokenizer is None:
        message = f"tokens are not counted: {subject.trained.problem}"
        yield Finding(
            WARNING, "prompts", message, "see above; --policy.text_tokenizer_name=FOLDER names one that is here"
        )
        return
    lengths = {task: len(subject.trained.tokenizer(task.rstrip("\n") + "\n")["input_ids"]) for task in used.values()}
    limit = subject.config.tokenizer_max_length or 0
    if cut := [f"{task[:60]!r}… ({n} tokens)" for task, n in lengths.items() if n > limit]:
        message = f"cut after {limit} tokens: {some(cut)}"
        yield Finding(WARNING, "prompts", message, "shorten them, or train with a larger tokenizer_max_length")
    yield Finding(
        FINE, "prompts", f"{len(used)} instructions of at most {max(lengths.values())} tokens; room for {limit}"
    )


def episodes(subject: Subject) -> Iterable[Finding]:
    """Shorter than a chunk, not as long as the metadata says, or with time stamps off the fps."""
    columns, fps = subject.columns, subject.dataset.meta.fps
    numbers, lengths = np.unique(columns.episode, return_counts=True)
    if not subject.goes_on:  # otherwise the weights have learnt from chunks as long as these already
        yield from long_chunks(subject.config, numbers, lengths)
    recorded = dict(
        zip(subject.dataset.meta.episodes["episode_index"], subject.dataset.meta.episodes["length"], strict=True)
    )
    if wrong := [int(n) for n, length in zip(numbers, lengths, strict=True) if recorded.get(int(n)) != length]:
        yield Finding(
            ERROR,
            "episodes",
            f"other lengths than the metadata says: {some(wrong)}",
            "the dataset is damaged: copy it anew",
        )
    gaps = [int(n) for n in numbers if not _counts_up(columns.frame[columns.episode == n])]
    if gaps:
        message = f"frame_index does not count from 0 without gaps in episodes {some(gaps)}"
        yield Finding(ERROR, "episodes", message, "frames were lost or doubled: copy the dataset anew, or delete these")
    yield from off_the_grid(subject)
    yield Finding(FINE, "episodes", f"{len(numbers)} of {lengths.min()} to {lengths.max()} frames, at {fps} fps")


def long_chunks(config: PI0Config, numbers: np.ndarray, lengths: np.ndarray) -> Iterable[Finding]:
    """Chunks that are longer than episodes, or nearly.

    Args:
        numbers, lengths: number and frames of each episode.
    """
    chunk = config.chunk_size
    if (short := numbers[lengths < chunk]).size:
        message = f"{len(short)} of {len(numbers)} episodes are shorter than a chunk of {chunk}: {some(short.tolist())}"
        yield Finding(
            WARNING, "episodes", f"{message}; the rest of each chunk repeats the last action",
            f"record longer, or train with a shorter chunk_size (the median episode has {int(np.median(lengths))})",
        )  # fmt: skip
    elif said := long_chunk(config, lengths.tolist()):
        yield Finding(WARNING, "episodes", *said)


def off_the_grid(subject: Subject) -> Iterable[Finding]:
    """Time stamps that are not those of the fps, and the rate that they have."""
    columns, fps = subject.columns, subject.dataset.meta.fps
    late, steps = [], []
    for number in np.unique(columns.episode):
        step = np.diff(columns.timestamp[columns.episode == number].astype(np.float64))
        off = np.abs(step - 1 / fps)
        steps.append(step)
        if off.size and not off.max() <= TOLERANCE_S:  # NaN too
            at = int(np.argmax(np.where(np.isnan(off), np.inf, off)))
            late.append(f"episode {number}, frame {at + 1} ({off[at] * 1e3:.1f} ms)")
    if not late:
        return
    step = np.concatenate(steps)
    step = step[np.isfinite(step)]
    middle = float(np.median(step)) if len(step) else 0.0
    rate = f"{1 / middle:.4g} fps" if middle > 0 else "no rate"
    even = middle > 0 and bool((np.abs(step - middle) <= 0.02 * middle).mean() > 0.9)
    message = f"time stamps are off {fps} fps: {some(late)}; "
    if even:
        message += f"they are those of {rate}"
        remedy = f"set fps to {1 / middle:.4g} in meta/info.json, or delete the episodes"
        if abs(middle * fps - 1) < 1e-3:
            message = f"time stamps are off {fps} fps at some frames: {some(late)}"
            remedy = "frames were lost there: delete the episodes (lerobot-edit-dataset), or write them anew"
    else:
        message += f"they are uneven: the median step is that of {rate}, steps go from {_range(step)} s"
        remedy = f"write timestamp = frame_index / fps with the true rate (about {rate}), or record anew"
    yield Finding(ERROR, "time stamps", message, f"{remedy}: LeRobot finds the frames of videos by time")


def _range(step: np.ndarray) -> str:
    return f"{step.min():.3f} to {step.max():.3f}" if len(step) else "0 to 0"


def _counts_up(frame: np.ndarray) -> bool:
    return bool((frame == np.arange(len(frame))).all())
