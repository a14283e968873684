"""The name that LeRobot's plugin discovery imports: installed distributions are called `lerobot_policy_*`.

`from lerobot_policy_pi0 import PI0Policy, PI0Config, make_pi0_pre_post_processors` works as LeRobot's page on plugins
has it; the model's code is imported when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

import lerobot_pi0

if TYPE_CHECKING:
    from lerobot_pi0 import PI0Config, PI0Policy, make_pi0_pre_post_processors

__all__ = ["PI0Config", "PI0Policy", "make_pi0_pre_post_processors"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(lerobot_pi0, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
