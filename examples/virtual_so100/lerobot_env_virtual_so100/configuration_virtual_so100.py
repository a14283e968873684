"""Options of `--env.type=virtual_so100`, and the environments that LeRobot makes from them."""

from dataclasses import dataclass, field
from functools import partial

import gymnasium as gym
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.envs.utils import freeze_after_episode_end
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from .constants import CAMERAS, ENV_TYPE, FPS, IMAGE_SIZE, INSTRUCTIONS, JOINTS, SPLITS, episode_steps


def _make_env(**kwargs) -> gym.Env:
    from .env import VirtualSO100GymEnv  # imports MuJoCo: only where an environment is made

    return VirtualSO100GymEnv(**kwargs)


@EnvConfig.register_subclass(ENV_TYPE)
@dataclass
class VirtualSO100Env(EnvConfig):
    """A simulated SO-100 with two cameras.

    Attributes:
        task: "reach" (go to the one of three cubes that the instruction names), "hover" (stop above it) or "pick_place"
            (cube onto the disc).
        fps: control steps a second; must be that of the data a policy was trained on.
        episode_length: steps after which an episode ends; by default the task's (2.8 s, or 13 s for pick_place).
        image_size: height and width of the cameras' images in pixels; that of the training data.
        split: stream of scenes, "train", "validation" or "test". Data is recorded from the first two; they share
            no scene with "test" whatever the seeds.
        instruction: with "named" the prompt names the scene's target, with "swapped" another cube of the same scene.
            Success means the cube that the prompt names.
        results: file to which every finished episode appends one JSON line (ground truth of the simulator).
        render_size: height of the frames of evaluation videos in pixels.
    """

    task: str | None = "reach"
    fps: int = FPS
    episode_length: int | None = None
    image_size: int = IMAGE_SIZE
    split: str = "test"
    instruction: str = "named"
    results: str | None = None
    render_size: int = 224
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if self.split not in SPLITS:
            raise ValueError(f"--env.split must be one of {', '.join(SPLITS)}, not {self.split!r}")
        if self.instruction not in INSTRUCTIONS:
            raise ValueError(f"--env.instruction must be one of {', '.join(INSTRUCTIONS)}, not {self.instruction!r}")
        if self.episode_length is None:
            self.episode_length = episode_steps(self.task, self.fps)
        image = PolicyFeature(FeatureType.VISUAL, (self.image_size, self.image_size, 3))
        cameras = [f"{OBS_IMAGES}.{name}" for name in CAMERAS]
        self.features = {
            ACTION: PolicyFeature(FeatureType.ACTION, (len(JOINTS),)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (len(JOINTS),)),
            **dict.fromkeys(cameras, image),
        }
        self.features_map = {ACTION: ACTION, "agent_pos": OBS_STATE, **{key: key for key in cameras}}

    @property
    def package_name(self) -> str:
        """Namespace of the gymnasium ids."""
        return __package__

    @property
    def gym_kwargs(self) -> dict:
        """Arguments of the environment."""
        return {
            "task": self.task,
            "fps": self.fps,
            "episode_length": self.episode_length,
            "image_size": self.image_size,
            "split": self.split,
            "instruction": self.instruction,
            "results": self.results,
            "render_size": self.render_size,
        }

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict:
        """{type: {0: vector environment}}, as LeRobot expects it.

        Unlike with the base class, a finished environment keeps its last observation until the next rollout: no
        scene is built only to be discarded, and the last frame of a video shows the end of its episode.
        """
        make = freeze_after_episode_end(partial(_make_env, **self.gym_kwargs))
        options = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
        if use_async_envs and n_envs > 1:
            # A GL context does not survive a fork.
            return {self.type: {0: gym.vector.AsyncVectorEnv([make] * n_envs, context="forkserver", **options)}}
        return {self.type: {0: gym.vector.SyncVectorEnv([make] * n_envs, **options)}}
