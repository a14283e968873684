"""Base class of the tests' robots: named joints, cameras, and nothing to connect, calibrate or configure."""

from typing import ClassVar

from lerobot.robots import Robot, RobotConfig


class JointRobot(Robot):
    """Subclasses name the joints, read them and move them."""

    joints: ClassVar[list[str]]

    def __init__(self, config: RobotConfig, cameras: list[str], side: int) -> None:
        """Begin disconnected.

        Args:
            cameras, side: names of the cameras, and the side of their square images.
        """
        super().__init__(config)
        self.config, self._pictures, self.connected = config, dict.fromkeys(cameras, (side, side, 3)), False

    @property
    def observation_features(self) -> dict:
        return dict.fromkeys(self.joints, float) | self._pictures

    @property
    def action_features(self) -> dict:
        return dict.fromkeys(self.joints, float)

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
