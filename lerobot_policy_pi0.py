"""What LeRobot's plugin discovery imports: installed distributions named `lerobot_policy_*`."""

import lerobot_pi0  # noqa: F401
