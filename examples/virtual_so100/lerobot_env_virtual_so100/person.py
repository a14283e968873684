"""Simulated person at the leader arm, who moves it by hand so that the follower does the task, much as people do.

The scripted expert, which sees the follower and the scene, decides what to do. Unlike the expert, the person looks only
ten times a second, pauses now and then, is not exact, and sometimes starts towards a wrong place and turns around.
"""

import numpy as np

from .experts import make_expert
from .simulation import Simulation

LOOKS_A_SECOND = 10
_OFF_DEGREES, _OFF_MEMORY = 1.0, 0.9  # wandering of the hand
_PAUSES_A_SECOND, _PAUSE_SECONDS = 0.25, (0.2, 0.6)
_MISTAKE_SHARE, _MISTAKE_SECONDS, _MISTAKE_DEGREES = 0.3, 0.5, 15.0  # share of episodes; only on the way
_HAND_SPEED = 120.0  # degrees/s, and gripper units
_THERE = 4.0  # degrees between the follower and where it was to be brought


class Person:
    """Moves the leader towards `hand` (6,), in degrees and 0..100; None if the person does not hold it."""

    def __init__(self, task: str, simulation: Simulation, seed: int = 0):
        self._expert = make_expert(task, simulation, LOOKS_A_SECOND)
        self._arm = simulation.arm
        self._rng = np.random.default_rng(seed)
        self.hand: np.ndarray | None = None
        self._bringing: np.ndarray | None = None
        self._showing = False
        self._off = np.zeros(6)
        self._pause = self._mistake_at = self._mistake = 0
        self._wrong = np.zeros(6)
        self._looks = 0

    @property
    def busy(self) -> bool:
        """Whether there is something left to do."""
        return self._showing or self._bringing is not None

    def rest(self) -> None:
        """Let go of the leader."""
        self.hand, self._bringing, self._showing = None, None, False

    def bring(self, posture: np.ndarray) -> None:
        """Bring the follower to a posture (6,)."""
        self.rest()
        self._bringing = np.asarray(posture, float)

    def demonstrate(self, colour: str) -> None:
        """Do the task with the cube of this colour."""
        self.rest()
        self._expert.reset(colour)
        self._showing, self._off[:], self._pause, self._looks = True, 0.0, 0, 0
        errs = self._rng.random() < _MISTAKE_SHARE
        self._mistake = round(_MISTAKE_SECONDS * LOOKS_A_SECOND) if errs else 0
        self._mistake_at = int(self._rng.integers(1, LOOKS_A_SECOND // 2))
        self._wrong = np.append(self._rng.uniform(-1, 1, 3) * _MISTAKE_DEGREES, [0.0, 0.0, 0.0])

    def look(self) -> None:
        """See how far the arm is and decide where to move the leader; LOOKS_A_SECOND times a second."""
        if self._bringing is not None:
            self.hand = self._arm.hold(self._bringing)
            if np.abs(self._arm.state - self._bringing).max() < _THERE:
                self._bringing = None
        elif self._showing:
            self._looks += 1
            self.hand = self._decide()
            self._showing = not self._expert.settled

    def _decide(self) -> np.ndarray:
        """Where the hand goes while it demonstrates."""
        aim = self._expert.act()
        if not self._expert.travelling:  # the end is done with care
            return aim
        if self._pause > 0:
            self._pause -= 1
            return self.hand if self.hand is not None else aim
        if self._rng.random() < _PAUSES_A_SECOND / LOOKS_A_SECOND:
            self._pause = round(self._rng.uniform(*_PAUSE_SECONDS) * LOOKS_A_SECOND)
        fresh = self._rng.normal(0.0, _OFF_DEGREES, 6)
        self._off = _OFF_MEMORY * self._off + np.sqrt(1 - _OFF_MEMORY**2) * fresh
        if self._mistake > 0 and self._looks >= self._mistake_at:
            self._mistake -= 1
            aim = aim + self._wrong
        return aim + self._off

    def move(self, leader: np.ndarray, seconds: float) -> np.ndarray:
        """Where the leader (6,) is after the hand has moved it for `seconds`."""
        if self.hand is None:
            return leader
        step = _HAND_SPEED * seconds
        return leader + np.clip(self.hand - leader, -step, step)
