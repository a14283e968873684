"""Demonstrations: which episodes a scene gives, and how the expert is disturbed while it shows them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .constants import CAMERAS, episode_steps
from .experts import make_expert
from .simulation import Simulation
from .tasks import Layout, make_task, scene_rng

# The disturbance is executed and not recorded: the data shows the way back from where a policy may stray.
_NOISE_DEGREES, _NOISE_MEMORY, _NOISE_SECONDS = 2.0, 0.7, 1.2
_ATTEMPTS = 5


@dataclass
class Episode:
    """One demonstration of T steps: states and actions (T, 6), images (T, H, W, 3) uint8 a camera."""

    layout: Layout
    prompt: str
    states: np.ndarray
    actions: np.ndarray
    images: dict[str, np.ndarray]


class Demonstrator:
    """Makes the episodes of scenes, the same ones whenever it is asked."""

    def __init__(self, task: str, fps: int, image_size: int, split: str):
        self._task = make_task(task)
        self._sim = Simulation(self._task.spec, fps)
        self._expert = make_expert(task, self._sim, fps)
        self._max_steps, self._noise_steps = episode_steps(task, fps), round(_NOISE_SECONDS * fps)
        self._image_size, self._split = image_size, split

    @staticmethod
    def episodes_per_scene(task: str) -> int:
        """One for each cube: a policy that saw one instruction a scene learns the scene, not the words."""
        return len(make_task(task).spec.cubes)

    def scene(self, seed: int) -> Iterator[Episode]:
        """The episodes of one scene, one for each cube, in an order of its own.

        All start from the same posture: pictures and joints equal, words different. In every fourth scene that is
        around home, in the others anywhere above the table. Where all episodes start from one place, the posture soon
        tells which cube is meant, and a policy learns to read the posture in place of words and pictures: with wide
        starts only those tell, up to the last steps.
        """
        rng = np.random.default_rng([*scene_rng(self._split, seed).integers(2**31, size=2), 1])
        layout = self._task.sample(self._split, seed, wide_start=seed % 4 != 0)
        for colour in rng.permutation(self._task.spec.cubes):
            phrase = int(rng.integers(len(self._task.phrases)))
            episode = self._demonstrate(replace(layout, target=str(colour), phrase=phrase), rng)
            yield episode

    def _demonstrate(self, layout: Layout, rng: np.random.Generator) -> Episode:
        """One successful episode; what fails under its disturbance is tried again with another."""
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
        while len(actions) < self._max_steps and not expert.settled:
            states.append(sim.arm.state)
            images.append(sim.images(self._image_size, self._image_size))
            actions.append(expert.act())
            fresh = rng.normal(0.0, _NOISE_DEGREES, size=6)
            noise = _NOISE_MEMORY * noise + np.sqrt(1 - _NOISE_MEMORY**2) * fresh
            disturbed = expert.travelling and len(actions) < self._noise_steps
            sim.advance(actions[-1] + noise * disturbed)
            self._task.observe(sim)
        return Episode(
            layout,
            self._task.instruction(layout.target, layout.phrase),
            np.array(states, np.float32),
            np.array(actions, np.float32),
            {name: np.stack([frame[i] for frame in images]) for i, name in enumerate(CAMERAS)},
        )
