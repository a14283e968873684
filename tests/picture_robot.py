"""A robot whose cameras are an option, for `drop_in.py`. LeRobot finds the class beside its config, by name."""

from dataclasses import dataclass, field

from drop_in import DIMS, SIDE, picture
from joint_robot import JointRobot
from lerobot.robots import RobotConfig

JOINTS = [f"joint_{i}.pos" for i in range(DIMS)]


@RobotConfig.register_subclass("pictures")
@dataclass
class PicturesConfig(RobotConfig):
    # Names of its cameras.
    names: list[str] = field(default_factory=list)


class Pictures(JointRobot):
    """Shows what each camera takes, stands still, and ends the command after two actions, as ctrl-C does."""

    config_class = PicturesConfig
    name = "pictures"
    joints = JOINTS

    def __init__(self, config: PicturesConfig) -> None:
        super().__init__(config, config.names, SIDE)
        self.actions = 0

    def get_observation(self) -> dict:
        return dict.fromkeys(JOINTS, 0.0) | {name: picture(name) for name in self.config.names}

    def send_action(self, action: dict) -> dict:
        self.actions += 1
        if self.actions == 2:
            raise KeyboardInterrupt
        return action
