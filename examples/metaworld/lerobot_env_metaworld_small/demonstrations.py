"""Demonstrations of MetaWorld's scripted experts, as LeRobot's environment shows them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import seeds
from .constants import ACTION
from .env import Simulation, SmallMetaworld

LIMIT = 350  # steps in which the expert has to succeed
_PUSH_STEPS = (3, 8)  # length of a push: a hand moves at most 1 cm a step
_SCATTER_STEPS = (5, 26)  # length of the way to another start


@dataclass
class Episode:
    """One demonstration of T steps; what is seen at a step is seen before its action."""

    instruction: str
    seed: int
    images: np.ndarray
    """(T, H, W, 3) uint8."""
    states: np.ndarray
    """(T, 4): place of the hand, opening of the gripper."""
    full_states: np.ndarray
    """(T, 39): MetaWorld's observation, with the places of objects and goal. LeRobot's environment does not show it."""
    actions: np.ndarray
    """(T, 4) in [-1, 1]."""


class ExpertFailedError(RuntimeError):
    """The expert did not solve the task from any seed of an episode."""


class Demonstrator:
    """Plays the expert of one task.

    Args:
        task: MetaWorld's name of the task.
        image_size, zoom: of the pictures, as `SmallMetaworld` has them.
        pushes: how likely a step begins a push, which moves the hand and is not recorded: so the data shows how to
            return from places where a policy may drift.
        scatter: how likely an episode begins with the hand elsewhere, up to 25 cm away. If all began at one place, the
            place of a moving hand would tell where it is going, and a small policy would not learn to look.
        hold: steps that the expert goes on once the task is solved. Without them all data ends at the edge of success,
            and a policy that is slightly off stops before it.
    """

    def __init__(self, task: str, image_size: int | None, zoom: float, pushes: float, scatter: float, hold: int):
        self._task = task
        self._sim = Simulation(make_env(task, image_size, zoom))
        self._pushes, self._scatter, self._hold = pushes, scatter, hold

    def episode(self, index: int) -> Episode:
        """The demonstration with this number; always the same one.

        Raises:
            ExpertFailedError: the expert fails from all its seeds.
        """
        for seed in seeds.of_episode(index):
            # Pictures take most of the time, so an expert's failure is noticed without them.
            if self._play(seed, lambda full: ()) and (frames := self._play(seed, self._sim.look)):
                images, states, fulls, actions = (np.stack(column) for column in zip(*frames, strict=True))
                states, fulls = states.astype(np.float32), fulls.astype(np.float32)
                return Episode(self._sim.instruction, seed, images, states, fulls, actions)
        raise ExpertFailedError(
            f"{self._task}: the expert failed {seeds.ATTEMPTS} times at episode {index}; push less (--pushes=0)"
        )

    def close(self) -> None:
        """Free the simulation and its renderer."""
        self._sim.close()

    def _play(self, seed: int, look: Callable[[np.ndarray], tuple]) -> list[tuple]:
        """One episode: of each step what `look` returns, MetaWorld's observation and the expert's action. Empty if the
        expert fails."""
        rng, sim = np.random.default_rng(seed), self._sim
        push, frames, end = _Push(rng, self._pushes), [], None
        sim.reset(seed)
        # LeRobot's environment draws the goal of some tasks at a wrong place until the first step. This step is not
        # recorded.
        full, _ = sim.step(np.zeros(len(ACTION), np.float32))
        if rng.random() < self._scatter:
            away = np.append(rng.uniform((-1, -1, -0.5), 1), -1).astype(np.float32)  # seldom down, with an open gripper
            for _ in range(rng.integers(*_SCATTER_STEPS)):
                full, _ = sim.step(away)
        while len(frames) < (LIMIT if end is None else end):
            action = sim.expert(full)
            frames.append((*look(full), full, action))
            full, solved = sim.step(push.disturb(action))
            if solved and end is None:
                end = len(frames) + self._hold
        return frames if end is not None else []


def make_env(task: str, image_size: int | None, zoom: float = 1.0) -> SmallMetaworld:
    """LeRobot's environment of a task, with pictures of this size and zoom, and the state."""
    return SmallMetaworld(task, image_size, zoom, obs_type="pixels_agent_pos")


class _Push:
    """Pushes of the hand at random times into random directions."""

    def __init__(self, rng: np.random.Generator, rate: float):
        self._rng, self._rate, self._left = rng, rate, 0

    def disturb(self, action: np.ndarray) -> np.ndarray:
        """What is executed in place of an action (4,)."""
        if self._left == 0 and self._rng.random() < self._rate:
            self._left = int(self._rng.integers(*_PUSH_STEPS))
            self._direction = np.append(self._rng.uniform(-1, 1, 3), 0.0)
        if self._left == 0:
            return action
        self._left -= 1
        return np.clip(action + self._direction, -1, 1).astype(np.float32)
