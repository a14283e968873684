"""Intervals of errors: how much they could differ with other episodes, and the spread of actions in training.

Axes: N observations, T steps of a chunk, A joints.
"""

from typing import Any

import numpy as np
from lerobot.processor import UnnormalizerProcessorStep
from lerobot.utils.constants import ACTION

from ..checks.noise import never_moves
from ..folder import Columns

FEWEST = 3
"""With fewer episodes there is no interval: frames of one episode tell nothing about another one."""

DRAWS = 1000
WIDTH = 0.9


def ratio_interval(
    squares_N: np.ndarray, other_N: np.ndarray, episode_N: np.ndarray, seed: int
) -> tuple[float, float] | None:
    """Where 90 % of the ratios of two errors lie, if other episodes had been held out; None for too few episodes.

    Whole episodes are drawn with replacement: frames of one episode are no independent evidence.

    Args:
        squares_N, other_N: mean squared error of each observation.
    """
    numbers, group = np.unique(episode_N, return_inverse=True)
    if len(numbers) < FEWEST:
        return None
    sums = np.stack([np.bincount(group, weights=x) for x in (squares_N, other_N)])
    drawn = np.random.default_rng(seed).integers(0, len(numbers), (DRAWS, len(numbers)))
    errors = np.sqrt(sums[:, drawn].sum(axis=-1))
    low, high = np.quantile(errors[0] / np.maximum(errors[1], 1e-12), [(1 - WIDTH) / 2, (1 + WIDTH) / 2])
    return float(low), float(high)


def training_spread(postprocessor: Any, everything: Columns, relative: bool) -> tuple[np.ndarray, np.ndarray]:
    """The deviation of each joint's actions in training, and which joints never move (both A).

    Of the held-out episodes alone the deviation would be too small: a joint may rest in them by chance.

    Args:
        postprocessor: the checkpoint's, whose statistics are those of training.
        everything: all episodes of the dataset, for a checkpoint whose statistics are of relative actions, or ranges.
    """
    actions = everything.action_ND
    spread = actions.std(axis=0)
    steps = [step for step in postprocessor.steps if isinstance(step, UnnormalizerProcessorStep)]
    stored = (steps[0].stats or {}).get(ACTION, {}).get("std") if steps else None
    if stored is not None and not relative and np.size(stored) == actions.shape[1]:
        trained = np.asarray(stored, dtype=np.float64).reshape(-1)
        spread = np.where(trained > 1e-8, trained, spread)
    still = never_moves(actions, everything.episode)
    floor = np.maximum(1e-6 * np.abs(actions.mean(axis=0)), 1e-9)
    return np.maximum(spread, floor), still if not still.all() else np.zeros_like(still)


def delay(predicted_NTA: np.ndarray, recorded_NTA: np.ndarray, valid_NT: np.ndarray) -> tuple[int, float]:
    """By how many steps predictions come too late, and which part of the error is left if they are moved back."""
    steps = valid_NT.shape[1]
    best, left = 0, 1.0
    for late in range(1, steps // 2 + 1):
        both = valid_NT[:, late:]
        if not both.any():
            break
        now = ((predicted_NTA[:, late:] - recorded_NTA[:, late:]) ** 2)[both].mean()
        moved = ((predicted_NTA[:, late:] - recorded_NTA[:, :-late]) ** 2)[both].mean()
        if (ratio := float(np.sqrt(moved / max(now, 1e-12)))) < left:
            best, left = late, ratio
    return best, left
