"""Roughness of sampled action chunks compared with recorded ones: root mean square of each joint's third difference.

The third difference of a motion is its jerk per control step³. It is almost zero on a ramp or a smooth curve;
independent noise of standard deviation σ on each step gives √20·σ. So it shows whether neighbouring steps of a chunk
fit together. The loss and the mean squared error do not show this: a few degrees of such noise hardly change them, but
they shake an arm.

Axes: B chunks, T steps of a chunk, A joints.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOO_ROUGH = 1.5
"""A joint rattles if its sampled chunks are more than this many times as rough as the recorded ones."""

HARMLESS_NOISE = 0.01
"""Standard deviation of a small noise on each step, as a fraction of the joint's standard deviation. Its roughness is
added to the recorded one before the two are compared: a joint that stands still has a recorded roughness of zero, and
any sampled roughness would be infinitely many times as large."""


@dataclass(frozen=True)
class Roughness:
    """Sums of squared third differences over the same steps of sampled and of recorded chunks."""

    sampled_A: Tensor
    recorded_A: Tensor
    differences: int

    def __add__(self, other: "Roughness") -> "Roughness":
        return Roughness(
            self.sampled_A + other.sampled_A, self.recorded_A + other.recorded_A, self.differences + other.differences
        )

    @property
    def sampled(self) -> list[float]:
        """Root mean square third difference of the sampled chunks by joint, in the actions' unit; 0 for no chunks."""
        return self._root(self.sampled_A)

    @property
    def recorded(self) -> list[float]:
        """The same of the recorded chunks."""
        return self._root(self.recorded_A)

    def _root(self, squares_A: Tensor) -> list[float]:
        return (squares_A / max(self.differences, 1)).sqrt().tolist()

    def ratios(self, deviation_A: Sequence[float]) -> list[float]:
        """By joint, how many times as rough sampled chunks are as recorded ones with `HARMLESS_NOISE` on them.

        Args:
            deviation_A: the standard deviation of each joint's actions in the dataset, in the actions' unit; 1 where
                actions are normalised by mean and deviation.
        """
        noise = [math.sqrt(20) * HARMLESS_NOISE * deviation for deviation in deviation_A]
        allowed = [math.hypot(*pair) for pair in zip(self.recorded, noise, strict=True)]
        return [own / most if own else 0.0 for own, most in zip(self.sampled, allowed, strict=True)]

    def rattling(self, joints: Sequence[str], deviation_A: Sequence[float]) -> list[str]:
        """Names of the joints that rattle: more than `TOO_ROUGH` times as rough as what was recorded."""
        ratios = self.ratios(deviation_A)
        return [joint for joint, ratio in zip(joints, ratios, strict=True) if ratio > TOO_ROUGH]


def roughness(sampled_BTA: Tensor, recorded_BTA: Tensor, valid_BT: Tensor) -> Roughness:
    """Compare sampled chunks with the recorded ones of the same observations.

    Args:
        valid_BT: False for steps after the end of the episode, where the recorded chunk stands still. Differences that
            include such a step are left out of both sums.
    """
    valid_BT = valid_BT.cpu()  # some devices have no float64
    counted_BT = valid_BT.unfold(1, 4, 1).all(dim=-1) if valid_BT.shape[1] > 3 else valid_BT[:, :0]
    sampled_A, recorded_A = (
        (torch.diff(chunk.cpu().double(), n=3, dim=1).square() * counted_BT[..., None]).sum(dim=(0, 1))
        for chunk in (sampled_BTA, recorded_BTA)
    )
    return Roughness(sampled_A, recorded_A, int(counted_BT.sum()))
