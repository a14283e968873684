"""Noise of joints: what changes in a reading of an arm that stands still.

Axes: N frames, D dims.
"""

import numpy as np

from ...inputs.statistics import NEAR_CONSTANT
from ..folder import Columns

NOISE = 6.0
"""A joint moves if it changes by more than this many deviations of its noise."""

PART = 0.05
"""And by more than this part of the deviation that it has in the dataset."""

TICKS = 1.5
"""And by more than one step of its encoder, which an arm at rest may go to and fro."""


FEW, CLOSE = 8, 0.005
"""So few different values are an encoder's if they are closer than this part of what the widest joint covers."""


def noise_of(values_ND: np.ndarray, episode: np.ndarray, part: float = PART) -> np.ndarray:
    """The least change of each joint that counts as a motion, in its own unit (D).

    A joint whose readings are whole steps of an encoder has no noise that could be measured, and toggles by one step.

    Args:
        part: of a joint's deviation, below which no change counts.
    """
    spread = values_ND.std(axis=0) if len(values_ND) else np.zeros(values_ND.shape[1])
    deviation = noise_deviation(values_ND, episode)
    return np.maximum(np.maximum(NOISE * deviation, part * spread), TICKS * tick_of(values_ND))


def noise_deviation(values_ND: np.ndarray, episode: np.ndarray) -> np.ndarray:
    """The deviation of each joint's noise (D).

    The second difference of a smooth motion is almost zero, that of noise has √6 of its deviation. The median is not
    changed by the moments in which the arm accelerates.
    """
    inside = (episode[2:] == episode[1:-1]) & (episode[1:-1] == episode[:-2])
    second = np.abs(values_ND[2:] - 2 * values_ND[1:-1] + values_ND[:-2])[inside]
    return 1.4826 * np.median(second, axis=0) / np.sqrt(6) if len(second) else np.zeros(values_ND.shape[1])


def never_moves(values_ND: np.ndarray, episode: np.ndarray) -> np.ndarray:
    """Which joints never move (D): small beside the others, and no more than their noise.

    Small alone may be another unit, as radians beside a gripper of 0 to 850.
    """
    if not len(values_ND):
        return np.zeros(values_ND.shape[1], bool)
    spread = np.ptp(values_ND, axis=0)
    small = spread <= NEAR_CONSTANT * spread.max(initial=0)
    return (small & (values_ND.std(axis=0) <= 2 * noise_deviation(values_ND, episode))) | (spread <= 1e-8)


def tick_of(values_ND: np.ndarray) -> np.ndarray:
    """The step of each joint's encoder (D), 0 where values are no multiples of one.

    A gripper that is open or closed has two values, and its step is a motion: few values count only if they are close.
    """
    ticks = np.zeros(values_ND.shape[1])
    widest = float(np.nanmax(np.ptp(values_ND, axis=0), initial=0)) if len(values_ND) else 0.0
    for i, column in enumerate(values_ND.T):
        steps = np.diff(np.unique(column[np.isfinite(column)]))
        if len(steps) and len(steps) < 5000:
            least = np.median(steps)
            if len(steps) < FEW and least > CLOSE * widest:
                continue
            ticks[i] = least if np.mean(np.abs(steps / least - np.round(steps / least)) < 0.05) > 0.9 else 0.0
    return ticks


def speed_between(columns: Columns, rows: np.ndarray, least_D: np.ndarray) -> np.ndarray:
    """For each row, how far the joint that moved most did since the row before, in parts of what counts as a motion.

    0 for the first row; more than 1 is a motion.
    """
    step = np.abs(np.diff(columns.state_ND[rows], axis=0))
    return np.concatenate([[0.0], (step / np.maximum(least_D, 1e-12)).max(axis=1, initial=0)])
