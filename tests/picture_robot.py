"""A robot whose cameras are an option, for `drop_in.py`. LeRobot finds the class beside its config, by name."""

from dataclasses import dataclass, field

from drop_in import DIMS, SIDE, picture
from lerobot.robots import Robot, RobotConfig

JOINTS = [f"joint_{i}.pos" for i in range(DIMS)]


@RobotConfig.register_subclass("pictures")
@dataclass
class PicturesConfig(RobotConfig):
    # Names of its cameras.
    names: list[str] = field(default_factory=list)


class Pictures(Robot):
    """Shows what each camera takes, stands still, and ends the command after two actions, as ctrl-C does."""

    config_class = PicturesConfig
    name = "pictures"

    def __init__(self, config: PicturesConfig) -> None:
        super().__init__(config)
        self.config, self.connected, self.actions = config, False, 0

    @property
    def observation_features(self) -> dict:
        return dict.fromkeys(JOINTS, float) | dict.fromkeys(self.config.names, (SIDE, SIDE, 3))

    @property
    def action_features(self) -> dict:
        return dict.fromkeys(JOINTS, float)

    @property
    def is_connected(self) -> bool:
        return self.connected

    is_calibrated = is_connected

    def connect(self, calibrate: bool = True) -> None:
        self.connected = True

    def disconnect(self) -> None:
        self.connected = False

    def calibrate(self) -> None:
        """Nothing to calibrate."""

    def configure(self) -> None:
        """Nothing to configure."""

    def get_observation(self) -> dict:
        return dict.fromkeys(JOINTS, 0.0) | {name: picture(name) for name in self.config.names}

    def send_action(self, action: dict) -> dict:
        self.actions += 1
        if self.actions == 2:
            raise KeyboardInterrupt
        return action
