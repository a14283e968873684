"""Gymnasium environment of one simulated arm, with the interface that `lerobot-eval` calls."""

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from .constants import CAMERAS, FPS, IMAGE_SIZE, INSTRUCTIONS, JOINTS, episode_steps
from .simulation import Simulation
from .tasks import Layout, make_task


class VirtualSO100GymEnv(gym.Env):
    """One arm, one episode at a time.

    Observations: `agent_pos` (6,) float32 in degrees and 0..100 for the gripper, and `pixels` with one uint8
    image (H, W, 3) for each camera. Actions: joint targets (6,) in the same units. The reward is 1 in the step that
    ends an episode with success. The final info has `is_success` and more: `instructed` (the cube that the prompt
    named), `target` (the scene's own), `ended_at` (the cube at which the episode ended, or "none") and `distance`
    (m, from the grasp point to the instructed cube, or from the cube to the goal).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}

    def __init__(
        self,
        task: str = "reach",
        fps: int = FPS,
        episode_length: int | None = None,
        image_size: int = IMAGE_SIZE,
        split: str = "test",
        instruction: str = "named",
        results: str | None = None,
        render_size: int = 224,
        render_mode: str = "rgb_array",
        pixels: bool = True,
    ):
        """See `VirtualSO100Env` for the options. Without `pixels`, which may change between steps, nothing is rendered:
        for controls, and for steps that no policy sees."""
        if instruction not in INSTRUCTIONS:
            raise ValueError(f"instruction must be one of {', '.join(INSTRUCTIONS)}, not {instruction!r}")
        self.metadata = {**self.metadata, "render_fps": fps}
        self.render_mode = render_mode
        self._task = make_task(task)
        if instruction == "swapped" and len(self._task.spec.cubes) < 2:
            raise ValueError(f"instruction='swapped' needs more than one cube, and task {task!r} has only one")
        self._max_episode_steps = episode_length or episode_steps(task, fps)
        self._swapped = instruction == "swapped"
        self._split, self._image_size, self._render_size = split, image_size, render_size
        self._results = None if results is None else Path(results)
        self.pixels = pixels
        self.simulation = Simulation(self._task.spec, fps)
        self.layout: Layout | None = None
        self._steps = 0
        self._set_spaces()

    def _set_spaces(self) -> None:
        joints = (len(JOINTS),)
        images = spaces.Box(0, 255, (self._image_size, self._image_size, 3), np.uint8)
        observations = {"agent_pos": spaces.Box(-np.inf, np.inf, joints, np.float32)}
        if self.pixels:
            observations["pixels"] = spaces.Dict(dict.fromkeys(CAMERAS, images))
        self.observation_space = spaces.Dict(observations)
        arm = self.simulation.arm
        self.action_space = spaces.Box(arm.low.astype(np.float32), arm.high.astype(np.float32))

    @property
    def task(self) -> str:
        """Name of the task."""
        return self._task.name

    @property
    def task_description(self) -> str:
        """The instruction of the current episode."""
        return self._task.instruction(self.instructed, self.layout.phrase)

    @property
    def instructed(self) -> str:
        """The cube that the instruction names."""
        return self.layout.other if self._swapped else self.layout.target

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Set up the scene of `seed` (a random one without a seed), or the `layout` given in `options`."""
        super().reset(seed=seed)
        scene = int(self.np_random.integers(2**31)) if seed is None else seed
        self.layout = (options or {}).get("layout") or self._task.sample(self._split, scene)
        self.simulation.load(self.layout)
        self._task.begin(self.simulation)
        self._steps = 0
        return self._observation(), self._info(False)

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Move towards joint targets (6,) for one control step. Raises ValueError if one is not finite."""
        if self.layout is None:
            raise RuntimeError("step() before reset(): the environment has no scene yet")
        action = np.asarray(action, np.float64)
        if action.shape != (len(JOINTS),) or not np.isfinite(action).all():
            raise ValueError(f"an action is {len(JOINTS)} finite joint targets ({', '.join(JOINTS)}), not {action}")
        self.simulation.advance(action)
        self._task.observe(self.simulation)
        self._steps += 1
        at_goal = self._task.success(self.simulation, self.instructed)
        truncated = self._steps >= self._max_episode_steps
        terminated = at_goal and self._task.ends_on_success
        # Only the end counts: passing by is not arriving, and lerobot-eval would count success in any step.
        success = at_goal and (terminated or truncated)
        info = self._info(success)
        if terminated or truncated:
            self._log(info)
        return self._observation(), float(success), terminated, truncated and not terminated, info

    def render(self) -> np.ndarray:
        """Both cameras side by side, uint8 (render_size, 2 render_size, 3)."""
        return np.hstack(self.simulation.images(self._render_size, self._render_size))

    def _observation(self) -> dict:
        observation = {"agent_pos": self.simulation.arm.state.astype(np.float32)}
        if self.pixels:
            images = self.simulation.images(self._image_size, self._image_size)
            observation["pixels"] = dict(zip(CAMERAS, images, strict=True))
        return observation

    def _info(self, success: bool) -> dict:
        at = [c for c in self._task.spec.cubes if self._task.success(self.simulation, c)]
        return {
            "is_success": success,
            "instructed": self.instructed,
            "target": self.layout.target,
            "ended_at": at[0] if at else "none",
            "distance": self._task.distance(self.simulation, self.instructed),
        }

    def _log(self, info: dict) -> None:
        """Append the finished episode to the results file, with one write per line: workers may share the file."""
        if self._results is None:
            return
        record = {
            "task": self.task,
            "split": self.layout.split,
            "seed": self.layout.seed,
            "prompt": self.task_description,
            "steps": self._steps,
            **info,
        }
        self._results.parent.mkdir(parents=True, exist_ok=True)
        with self._results.open("a") as file:
            file.write(json.dumps(record) + "\n")
