"""A simulated robot for LeRobot's own loops: joints that follow their goals, and one camera. LeRobot finds the class by
its name, in the module of its config, as it does for robots of plugins."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from conftest import CAMERAS, DIMS, stats, tiny_config
from joint_robot import JointRobot
from lerobot.robots import RobotConfig

from lerobot_pi0 import PI0Policy, make_pi0_pre_post_processors

JOINTS = [f"joint_{i}.pos" for i in range(DIMS)]


@RobotConfig.register_subclass("stand_in")
@dataclass
class StandInConfig(RobotConfig):
    # Side of the camera's square images.
    size: int = 64
    # Actions after which somebody presses ctrl-C; 0 means that nobody does.
    stop_after: int = 0


class StandIn(JointRobot):
    """Keeps the actions that it gets in `received`. All objects share this list, because LeRobot makes the object."""

    config_class = StandInConfig
    name = "stand_in"
    joints = JOINTS
    received: ClassVar[list[np.ndarray]] = []

    def __init__(self, config: StandInConfig) -> None:
        super().__init__(config, ["front"], config.size)
        self.size = config.size
        self.position = np.zeros(DIMS)
        self.draw = np.random.default_rng(0)

    def get_observation(self) -> dict:
        image = self.draw.integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)
        return dict(zip(JOINTS, self.position.tolist(), strict=True)) | {"front": image}

    def send_action(self, action: dict) -> dict:
        goal = np.array([action[joint] for joint in JOINTS])
        type(self).received.append(goal)
        if len(self.received) == self.config.stop_after:
            raise KeyboardInterrupt
        self.position += 0.3 * (goal - self.position)
        return action


def save_policy(folder, **options) -> PI0Policy:
    """A checkpoint of the tiny preset for this robot, with its processors, as lerobot-train writes one."""
    policy = PI0Policy(tiny_config(CAMERAS[:1], **{"num_inference_steps": 2, **options}))
    policy.config.action_feature_names = JOINTS
    policy.save_pretrained(folder)
    for processor in make_pi0_pre_post_processors(policy.config, stats(cameras=CAMERAS[:1])):
        processor.save_pretrained(folder)
    return policy
