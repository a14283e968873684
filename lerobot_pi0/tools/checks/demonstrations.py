"""Demonstrations: stretches in which nothing happens, jumps, limits, odd lengths, and drift from first to last.

Axes: N frames, D dims of state or action.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from lerobot.utils.constants import ACTION, OBS_STATE

from ..data import dim_names, some
from .noise import noise_of, tick_of
from .pictures import longest_run
from .subject import WARNING, Finding, Subject

IDLE_S = 1.0
"""An arm that keeps within its noise for so long, in seconds, stands still: less is a pause, or the end of a reach."""

IDLE_PART = 0.35
"""A dataset is called idle if the arm stands still in more than this part of its frames."""

AT_LIMIT = 0.2
"""A joint is at its limit too often from this part of the frames on."""

GROUP = 5
"""Episodes at the beginning and at the end that are compared for drift; there have to be four times as many."""

HANDS = ("gripper", "hand", "finger", "jaw", "claw")
"""Parts of names of joints that are meant to be at their limits, and to snap."""


def idle(subject: Subject) -> Iterable[Finding]:
    """The arm stands still, or the same action is repeated while it moves."""
    columns, fps = subject.columns, subject.dataset.meta.fps
    window = max(2, round(IDLE_S * fps))
    least = {x: noise_of(getattr(columns, x), columns.episode, part=0.01) for x in ("state_ND", "action_ND")}
    still, repeats = [], []
    for number, mine in _episodes(subject):
        quiet = [_within(getattr(columns, x)[mine], values, window) for x, values in least.items()]
        stands = quiet[0] & quiet[1]
        still.append((number, float(stands.mean()), len(mine)))
        same = np.append(False, (np.diff(columns.action_ND[mine], axis=0) == 0).all(axis=1))
        start, length = longest_run(same & ~stands)
        if length >= max(window, 5) and columns.state_ND.shape == columns.action_ND.shape:
            repeats.append(f"episode {number} from frame {columns.frame[mine[start]]} ({length / fps:.1f} s)")
    part = sum(share * n for _, share, n in still) / sum(n for *_, n in still)
    whole = [number for number, share, _ in still if share > 0.9]
    if part > IDLE_PART or whole:
        worst = [f"{number} ({share:.0%})" for number, share, _ in sorted(still, key=lambda x: -x[1])]
        message = f"the arm stands still in {part:.0%} of the frames, most in episodes {some(worst)}"
        remedy = "the policy would learn to stand: delete such episodes (lerobot-edit-dataset), begin and end "
        yield Finding(WARNING, "idle", message, f"{remedy}recordings with the motion")
    if repeats:
        message = f"the same action is repeated while the arm moves: {some(repeats)}"
        yield Finding(WARNING, "idle", message, "did the leader hang? look at these episodes, and delete them")


def jumps(subject: Subject) -> Iterable[Finding]:
    """Joints that jump from one frame to the next."""
    columns = subject.columns
    inside = np.append(False, np.diff(columns.episode) == 0)
    for key, values in ((OBS_STATE, columns.state_ND), (ACTION, columns.action_ND)):
        names, found = dim_names(subject.dataset, key), []
        for i, name in enumerate(names):
            x = values[:, i]
            step = np.where(inside, np.abs(np.append(0, np.diff(x))), 0)
            usual = np.quantile(step[inside], 0.99) if inside.any() else np.inf
            if len(np.unique(x)) <= 10 or _is_hand(name) or not np.isfinite(x).all():
                continue
            rows = np.flatnonzero(step > max(10 * usual, 0.2 * float(np.ptp(x))))
            found += [f"{name} in episode {columns.episode[n]}, frame {columns.frame[n]}" for n in rows]
        if found:
            message = f"{key} jumps within one frame: {some(found)}"
            yield Finding(
                WARNING, "jumps", message, "a fault of the bus, or an angle that wraps around: delete these episodes"
            )


def limits(subject: Subject) -> Iterable[Finding]:
    """Joints that are exactly at their smallest or largest value while the arm moves."""
    columns = subject.columns
    values = columns.state_ND
    moves = np.append(False, (np.abs(np.diff(values, axis=0)) > subject.noise).any(axis=1))
    if moves.sum() < 20:
        return
    ticks, found = tick_of(values), []
    for i, name in enumerate(dim_names(subject.dataset, OBS_STATE)):
        x = values[moves, i]
        reach = max(float(ticks[i]) / 2, 1e-4 * float(np.ptp(x)))
        shares = [float((x <= x.min() + reach).mean()), float((x >= x.max() - reach).mean())]
        moving = float(np.ptp(x)) > subject.noise[i]
        if moving and max(shares) > AT_LIMIT and not _is_hand(name) and len(np.unique(x)) > 10:
            which = f"smallest value {x.min():.4g}" if shares[0] > shares[1] else f"largest value {x.max():.4g}"
            found.append(f"{name} at its {which} in {max(shares):.0%}")
    if found:
        message = f"joints are at their limit while the arm moves: {some(found)} of the frames"
        yield Finding(WARNING, "limits", message, "check the calibration's range; what lies beyond was not recorded")


def lengths(subject: Subject) -> Iterable[Finding]:
    """Episodes that are much longer or shorter than the others."""
    numbers, counts = np.unique(subject.columns.episode, return_counts=True)
    if len(numbers) < 5:
        return
    middle = float(np.median(counts))
    for what, odd in (("longer", counts > 4 * middle), ("shorter", counts < middle / 4)):
        if odd.any():
            episodes = [f"{n} ({c} frames)" for n, c in zip(numbers[odd], counts[odd], strict=True)]
            message = f"much {what} than the median of {middle:.0f} frames: episodes {some(episodes)}"
            yield Finding(WARNING, "episodes", message, "a recording that was not ended, or was broken off? look at it")


def drift(subject: Subject) -> Iterable[Finding]:
    """Whether the last episodes of a task are other ones than the first: those are what `eval_split` holds out."""
    columns = subject.columns
    numbers = np.unique(columns.episode)
    rows = {n: np.flatnonzero(columns.episode == n) for n in numbers}
    task = {n: int(columns.task[mine[0]]) for n, mine in rows.items()}
    scale = np.maximum(columns.state_ND.std(axis=0), subject.noise)
    for one in sorted({*task.values()}):
        mine = [n for n in numbers if task[n] == one]
        if len(mine) < 4 * GROUP:
            continue
        means = np.stack([columns.state_ND[rows[n]].mean(axis=0) for n in mine])
        first, last = means[:GROUP], means[-GROUP:]
        within = np.sqrt((first.var(axis=0, ddof=1) + last.var(axis=0, ddof=1)) / GROUP) + 1e-9 * scale
        apart = np.abs(last.mean(axis=0) - first.mean(axis=0))
        moved = np.flatnonzero((apart > 8 * within) & (apart > 0.5 * scale))
        if len(moved):
            names = dim_names(subject.dataset, OBS_STATE)
            joints = [f"{names[i]} by {apart[i]:.3g}" for i in moved]
            message = f"the last {GROUP} episodes (to {mine[-1]}) are elsewhere than the first {GROUP}: {some(joints)}"
            remedy = "was the arm, the camera or the calibration moved? eval_split holds out the last episodes: "
            yield Finding(WARNING, "drift", message, f"{remedy}name others with --dataset.episodes")


def _episodes(subject: Subject) -> Iterator[tuple[int, np.ndarray]]:
    for number in np.unique(subject.columns.episode).tolist():
        yield number, np.flatnonzero(subject.columns.episode == number)


def _within(values_ND: np.ndarray, least_D: np.ndarray, window: int) -> np.ndarray:
    """For each frame, whether all joints keep within their noise for some window of frames around it (N)."""
    if len(values_ND) < window:
        return np.full(len(values_ND), bool((np.ptp(values_ND, axis=0) <= least_D).all()))
    windows = np.lib.stride_tricks.sliding_window_view(values_ND, window, axis=0)
    quiet = (np.ptp(windows, axis=-1) <= least_D).all(axis=1)
    found = np.zeros(len(values_ND), bool)
    for offset in range(window):
        found[offset : offset + len(quiet)] |= quiet
    return found


def _is_hand(name: str) -> bool:
    return any(part in name.lower() for part in HANDS)
