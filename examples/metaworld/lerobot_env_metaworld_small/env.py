"""LeRobot's MetaWorld environment, drawn without shadows in small pictures, and its simulation."""

import os
import warnings

import numpy as np
from lerobot.envs.metaworld import MetaworldEnv
from lerobot_env_virtual_so100.running import uses_egl

from .configuration_metaworld_small import IMAGE_SIZE, ZOOM, shown_size
from .drawing import PartRenderer

if uses_egl():
    os.environ["MUJOCO_GL"] = "egl"  # read by the renderer when it is made

CENTRE = (0.5, 0.6)
"""The middle of where hand and objects are in the camera's picture, over all tasks: parts of its height and width."""


class SmallMetaworld(MetaworldEnv):
    """`lerobot.envs.metaworld.MetaworldEnv` with a renderer that a CPU can afford.

    Args:
        task: MetaWorld's name of the task, e.g. "door-open-v3".
        image_size: height and width of the pictures in pixels; None for LeRobot's own renderer.
        zoom: how many times larger things are than in the camera's whole picture; only its middle is shown.
        draw_every: steps from one new picture to the next, which begin anew with each episode; between them the last
            picture is shown again.
        kwargs: LeRobot's own, e.g. obs_type.
    """

    def __init__(
        self, task: str, image_size: int | None = IMAGE_SIZE, zoom: float = ZOOM, draw_every: int = 1, **kwargs
    ):
        side = shown_size(image_size, zoom)
        super().__init__(task, observation_width=side, observation_height=side, **kwargs)
        self._cheaply, self._whole = image_size is not None, round(side * zoom)
        self._window = tuple(_middle(centre, side, self._whole) for centre in CENTRE)
        self._draw_every, self._looks = draw_every, 0

    def _ensure_env(self) -> None:
        if self._env is not None:
            return
        super()._ensure_env()
        if self._cheaply:
            rows, columns = self._window
            if self.camera_name == "corner2":  # whose pictures LeRobot turns by 180 degrees
                columns = _from_the_end(columns, self._whole)
            else:  # a renderer counts rows from the bottom
                rows = _from_the_end(rows, self._whole)
            self._env.mujoco_renderer = PartRenderer(self._env, self._whole, rows, columns)

    def render(self) -> np.ndarray:
        """The picture of the last observation, (image_size, image_size, 3) uint8: videos need not be drawn anew."""
        return self._shown["pixels"]

    def reset(self, seed: int | None = None, **kwargs) -> tuple[dict, dict]:
        """LeRobot's; its picture is a new one."""
        self._looks = 0
        return super().reset(seed=seed, **kwargs)

    def _format_raw_obs(self, raw_obs: np.ndarray) -> dict:
        new = self._looks % self._draw_every == 0
        self._looks += 1
        if not new:
            return {key: raw_obs[:4] if key == "agent_pos" else last for key, last in self._shown.items()}
        if (viewer := self._env.mujoco_renderer.viewer) is not None:
            viewer.make_context_current()  # and not that of another environment in this process
        seen = super()._format_raw_obs(raw_obs)
        if not self._cheaply:
            rows, columns = (slice(each.start, each.stop) for each in self._window)
            seen["pixels"] = np.ascontiguousarray(seen["pixels"][rows, columns])
        self._shown = seen
        return seen


def _from_the_end(part: range, whole: int) -> range:
    """The same part of so many, counted from the other end."""
    return range(whole - part.stop, whole - part.start)


def _middle(centre: float, side: int, whole: int) -> range:
    """The `side` pixels around a centre, or next to an edge, of so many."""
    start = min(max(round(centre * whole - side / 2), 0), whole - side)
    return range(start, start + side)


class Simulation:
    """The simulation under LeRobot's environment: an episode goes on after its success, and only `look` draws.

    Args:
        env: `SmallMetaworld` or LeRobot's environment, with obs_type "pixels_agent_pos".
    """

    def __init__(self, env: MetaworldEnv):
        self._env = env
        self.instruction, self.steps = env.task_description, env._max_episode_steps

    def reset(self, seed: int) -> np.ndarray:
        """Begin the episode of a seed, as LeRobot's environment does; returns MetaWorld's observation (39,)."""
        self._env._ensure_env()
        self._env._env.seed(seed)
        full, _ = self._env._env.reset(seed=seed)
        return full

    def step(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """Execute an action (4,); returns MetaWorld's observation (39,), and whether the task is solved now."""
        full, *_, info = self._env._env.step(action)
        return full, bool(info["success"])

    def look(self, full: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What LeRobot's environment shows to a policy: the picture (H, W, 3) uint8, and the state (4,)."""
        seen = self._env._format_raw_obs(full)
        return seen["pixels"], seen["agent_pos"]

    def expert(self, full: np.ndarray) -> np.ndarray:
        """The action (4,) of MetaWorld's expert, within [-1, 1]: the simulation clips what is larger."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the experts warn of their larger actions
            action = self._env.expert_policy.get_action(full)
        return np.clip(action, -1, 1).astype(np.float32)

    def close(self) -> None:
        """Free the simulation and its renderer."""
        self._env.close()
