"""LeRobot's MetaWorld environment, drawn without shadows and multisampling in small pictures."""

import numpy as np
from lerobot.envs.metaworld import MetaworldEnv


class SmallMetaworld(MetaworldEnv):
    """`lerobot.envs.metaworld.MetaworldEnv` with a renderer that a CPU can afford.

    Args:
        task: MetaWorld's name of the task, e.g. "door-open-v3".
        image_size: height and width of the pictures in pixels.
        kwargs: LeRobot's own, e.g. obs_type.
    """

    def __init__(self, task: str, image_size: int, **kwargs):
        super().__init__(task, observation_width=image_size, observation_height=image_size, **kwargs)

    def _ensure_env(self) -> None:
        if self._env is not None:
            return
        super()._ensure_env()
        draw_cheaply(self._env, self.observation_width)

    def render(self) -> np.ndarray:
        """The picture of the camera: (image_size, image_size, 3) uint8."""
        make_current(self)
        return super().render()

    def _format_raw_obs(self, raw_obs: np.ndarray) -> dict:
        make_current(self)
        return super()._format_raw_obs(raw_obs)


def draw_cheaply(env, image_size: int) -> None:
    """Let MetaWorld's environment draw small pictures, without shadows and multisampling. Before its first picture."""
    env.mujoco_renderer.width = env.mujoco_renderer.height = image_size
    env.model.vis.quality.offsamples = 0
    env.model.vis.quality.shadowsize = 0


def make_current(env: MetaworldEnv) -> None:
    """Let the next picture be drawn by the environment's own GL context, and not by that of another in this process."""
    if env._env is not None and (viewer := env._env.mujoco_renderer.viewer) is not None:
        viewer.make_context_current()
