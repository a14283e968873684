"""Demonstrations of the scripted expert: which episodes a scene gives, and how the expert is disturbed in them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .constants import CAMERAS, episode_steps
from .experts import make_expert
from .simulation import Simulation
from .tasks import Layout, make_task, scene_rng

# The disturbance is executed but not recorded: so the data shows how to return from places where a policy may drift.
_NOISE_DEGREES, _NOISE_MEMORY = 2.0, 0.7
_NOISE_SECONDS = {"reach": 0.3, "hover": 0.3, "pick_place": 1.2}
# Shares of the reach scenes that show one, two and three cubes. A policy learns positions from scenes with one cube,
# and words from scenes with three.
_CUBES_SHOWN = (0.15, 0.35, 0.5)
_ATTEMPTS = 5


def _episodes_rng(split: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([*scene_rng(split, seed).integers(2**31, size=2), 1])


def cubes_shown(task: str, split: str, seed: int) -> list[str]:
    """The cubes on the table of a demonstrated scene, each of which gives an episode.

    A policy that saw one instruction per scene would learn the scene, not the words.
    """
    cubes = make_task(task).spec.cubes
    if len(cubes) == 1:
        return list(cubes)
    rng = np.random.default_rng([*scene_rng(split, seed).integers(2**31, size=2), 2])
    count = rng.choice(len(cubes), p=_CUBES_SHOWN) + 1
    return [str(colour) for colour in rng.permutation(cubes)[:count]]


@dataclass
class Episode:
    """One demonstration of T steps: states and actions (T, 6), and for each camera images (T, H, W, 3) uint8."""

    layout: Layout
    prompt: str
    states: np.ndarray
    actions: np.ndarray
    images: dict[str, np.ndarray]


class Demonstrator:
    """Makes the episodes of scenes; the same scene always gives the same episodes."""

    def __init__(self, task: str, fps: int, image_size: int, split: str):
        self._task = make_task(task)
        self._sim = Simulation(self._task.spec, fps)
        self._expert = make_expert(task, self._sim, fps)
        self._max_steps, self._noise_steps = episode_steps(task, fps), round(_NOISE_SECONDS[task] * fps)
        self._image_size, self._split = image_size, split

    def scene(self, seed: int) -> Iterator[Episode]:
        """The episodes of one scene, one for each cube, in random order.

        All start from the same posture: images and joints are equal, only the words differ. In every second scene this
        posture is near home; in the others it is anywhere above the table, as when a policy computes its next chunk.
        """
        rng = _episodes_rng(self._split, seed)
        shown = cubes_shown(self._task.name, self._split, seed)
        layout = self._task.sample(self._split, seed, wide_start=seed % 2 != 0)
        layout = replace(layout, cubes={colour: layout.cubes[colour] for colour in shown})
        for colour in rng.permutation(shown):
            phrase = int(rng.integers(len(self._task.phrases)))
            yield self._demonstrate(replace(layout, target=str(colour), phrase=phrase), rng)

    def _demonstrate(self, layout: Layout, rng: np.random.Generator) -> Episode:
        """One successful episode. If the expert fails, it tries again with another disturbance."""
        for _ in range(_ATTEMPTS):
            episode = self._roll_out(layout, rng)
            if self._task.success(self._sim, layout.target):
                return episode
        raise RuntimeError(
            f"the expert failed {_ATTEMPTS} times in scene {layout.seed} of split {layout.split!r} "
            f"({self._task.name}): an unreachable place in tasks.py, or too much disturbance"
        )

    def _roll_out(self, layout: Layout, rng: np.random.Generator) -> Episode:
        sim, expert = self._sim, self._expert
        sim.load(layout)
        self._task.begin(sim)
        expert.reset(layout.target)
        states, actions, images = [], [], []
        noise = np.zeros(6)
        moved = 0
        while len(actions) < self._max_steps and not expert.settled:
            states.append(sim.arm.state)
            images.append(sim.images(self._image_size, self._image_size))
            disturbed = expert.travelling and moved < self._noise_steps
            moved += not expert.resting
            actions.append(expert.act())
            fresh = rng.normal(0.0, _NOISE_DEGREES, size=6)
            noise = _NOISE_MEMORY * noise + np.sqrt(1 - _NOISE_MEMORY**2) * fresh
            sim.advance(actions[-1] + noise * disturbed)
            self._task.observe(sim)
        return Episode(
            layout,
            self._task.instruction(layout.target, layout.phrase),
            np.array(states, np.float32),
            np.array(actions, np.float32),
            {name: np.stack([frame[i] for frame in images]) for i, name in enumerate(CAMERAS)},
        )
