"""A simulated SO-100 arm for LeRobot: `--env.type=virtual_so100`.

LeRobot imports this module at the start of every command, so it only registers names; MuJoCo and the arm's
model are imported when an environment is made.
"""

import gymnasium as gym

from .configuration_virtual_so100 import VirtualSO100Env
from .constants import EPISODE_SECONDS

__all__ = ["VirtualSO100Env"]

for _task in EPISODE_SECONDS:
    gym.register(
        id=f"{__name__}/{_task}",
        entry_point=f"{__name__}.env:VirtualSO100GymEnv",
        kwargs={"task": _task},
    )
