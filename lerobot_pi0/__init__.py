"""π₀ (arXiv 2410.24164) as a LeRobot policy: importing this package takes over the policy type "pi0".

Every LeRobot command imports installed plugins when it starts, so nothing here may load model code:
`PI0Policy` and the processor factory are imported when they are first asked for.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

try:
    import lerobot.policies  # noqa: F401  registers LeRobot's own pi0, which has to come first
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "lerobot":
        raise
    raise ModuleNotFoundError(
        "lerobot_policy_pi0 is a plugin of LeRobot, which is not installed in this environment, or too old: "
        "pip install 'lerobot[pi,training]>=0.6.1,<0.6.2'",
        name="lerobot",
    ) from error
from . import takeover
from .configuration_pi0 import PI0Config
from .takeover import TAKEOVER_VARIABLE

if TYPE_CHECKING:
    from .modeling_pi0 import PI0Policy
    from .processor_pi0 import make_pi0_pre_post_processors

__all__ = ["PI0Config", "PI0Policy", "make_pi0_pre_post_processors", "take_over"]
__version__ = "0.5.3"

_LAZY = {"PI0Policy": ".modeling_pi0", "make_pi0_pre_post_processors": ".processor_pi0"}


def take_over() -> None:
    """Make "pi0" mean this package wherever LeRobot looks a name up (`takeover.py` lists what that changes)."""
    takeover.take_over(__version__)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if os.environ.get(TAKEOVER_VARIABLE, "1") != "0":
    take_over()
