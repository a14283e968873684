"""Options of `--env.type=metaworld_small`: LeRobot's own MetaWorld, drawn in another way."""

from dataclasses import dataclass
from functools import partial

import gymnasium as gym
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig, MetaworldEnv
from lerobot.envs.utils import _LazyAsyncVectorEnv, freeze_after_episode_end

ENV_TYPE = "metaworld_small"
IMAGE_SIZE = 128
SMOOTH = 2  # a pixel is the mean of SMOOTH x SMOOTH drawn ones: things that move by half a pixel are seen to move
LEROBOTS_SIZE = 480  # height and width of the pictures that LeRobot's renderer draws
ZOOM = 2.0  # the middle half of the camera's picture shows hand and objects; not always in soccer, sweep, stick-pull


def shown_size(image_size: int | None, zoom: float) -> int:
    """Height and width of the pictures that a policy sees.

    Raises:
        ValueError: the zoom is below 1.
    """
    if not zoom >= 1:
        raise ValueError(f"zoom={zoom} has to be at least 1, which shows the camera's whole picture")
    return round(LEROBOTS_SIZE / zoom) if image_size is None else image_size


def _make_env(**kwargs) -> gym.Env:
    from .env import SmallMetaworld  # imports MuJoCo: only where an environment is made

    return SmallMetaworld(**kwargs)


@EnvConfig.register_subclass(ENV_TYPE)
@dataclass
class MetaworldSmallEnv(MetaworldEnv):
    """LeRobot's MetaWorld, with a renderer that is cheap on a CPU: no shadows, small pictures with smooth edges.

    Tasks, camera, states, actions, seeds and success are LeRobot's; only the pictures differ. Its other options are
    those of `--env.type=metaworld`.

    Attributes:
        image_size: height and width of the pictures in pixels; that of the training data. None draws as LeRobot does.
        zoom: how many times larger things are than in the camera's whole picture, of which the middle is shown.
        draw_every: steps from one new picture to the next. A policy that looks only once in so many steps acts the
            same, and is evaluated faster; one that looks more often sees old pictures.
    """

    image_size: int | None = IMAGE_SIZE
    zoom: float = ZOOM
    draw_every: int = 1

    def __post_init__(self) -> None:
        if self.draw_every < 1:
            raise ValueError(f"draw_every={self.draw_every} has to be at least 1, which draws at every step")
        super().__post_init__()
        side = shown_size(self.image_size, self.zoom)
        self.features["pixels/top"] = PolicyFeature(FeatureType.VISUAL, (side, side, 3))

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict:
        """{task group: {index of the task: vector environment}}, as LeRobot expects it.

        Unlike LeRobot's, an environment whose episode is over rests until the next rollout, so that it costs nothing.
        """
        from lerobot.envs.metaworld import DIFFICULTY_TO_TASKS

        found: dict = {}
        spaces: tuple = ()
        for group in (name.strip() for name in self.task.split(",")):
            tasks = DIFFICULTY_TO_TASKS.get(group, [group])
            drawn = {"image_size": self.image_size, "zoom": self.zoom, "draw_every": self.draw_every}
            options = drawn | self.gym_kwargs
            found[group] = {}
            for i, task in enumerate(tasks):
                makers = [partial(_make_env, task=task, **options)] * n_envs
                if use_async_envs and n_envs > 1:  # its processes begin when its task does, and not those of all tasks
                    made = _LazyAsyncVectorEnv(makers, *spaces)
                    spaces = made.observation_space, made.action_space, made.metadata
                else:
                    made = gym.vector.SyncVectorEnv([freeze_after_episode_end(make) for make in makers])
                found[group][i] = made
        return found
