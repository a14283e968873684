"""Prompts, lengths of episodes and time stamps."""

from collections.abc import Iterable

import numpy as np

from ..data import some
from .subject import ERROR, FINE, WARNING, Finding, Subject

TOLERANCE_S = 1e-4
"""How far LeRobot lets a time stamp be from its frame, in seconds."""


def prompts(subject: Subject) -> Iterable[Finding]:
    """Empty ones, cut ones, and how long they are."""
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
    columns, chunk, fps = subject.columns, subject.config.chunk_size, subject.dataset.meta.fps
    numbers, lengths = np.unique(columns.episode, return_counts=True)
    if (short := numbers[lengths < chunk]).size:
        message = f"{len(short)} of {len(numbers)} episodes are shorter than a chunk of {chunk}: {some(short.tolist())}"
        yield Finding(
            WARNING, "episodes", f"{message}; the rest of each chunk repeats the last action",
            f"record longer, or train with a shorter chunk_size (the median episode has {int(np.median(lengths))})",
        )  # fmt: skip
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
    late = []
    for number in numbers:
        times = columns.timestamp[columns.episode == number].astype(np.float64)
        off = np.abs(np.diff(times) - 1 / fps)
        if off.size and off.max() > TOLERANCE_S:
            late.append(f"episode {number}, frame {int(off.argmax()) + 1} ({off.max() * 1e3:.1f} ms)")
    if late:
        message = f"time stamps are off {fps} fps: {some(late)}"
        yield Finding(
            ERROR,
            "time stamps",
            message,
            "frames of videos are found by time: delete the episodes, or set the fps right",
        )
    yield Finding(FINE, "episodes", f"{len(numbers)} of {lengths.min()} to {lengths.max()} frames, at {fps} fps")
