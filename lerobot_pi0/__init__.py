"""π₀ (arXiv 2410.24164) as a LeRobot policy: importing this package takes over the policy type "pi0".

Every LeRobot command imports installed plugins when it starts, so nothing here may load model code:
`PI0Policy` and the processor factory are imported when they are first asked for.
"""

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

import lerobot.policies  # noqa: F401  registers LeRobot's own pi0, which has to come first
from lerobot.configs import PreTrainedConfig

from .configuration_pi0 import PI0Config

if TYPE_CHECKING:
    from .modeling_pi0 import PI0Policy
    from .processor_pi0 import make_pi0_pre_post_processors

__all__ = ["PI0Config", "PI0Policy", "make_pi0_pre_post_processors"]
__version__ = "0.1.0"

TAKEOVER_VARIABLE = "LEROBOT_PI0_TAKEOVER"
_LAZY = {"PI0Policy": ".modeling_pi0", "make_pi0_pre_post_processors": ".processor_pi0"}


def _take_over() -> None:
    """Make "pi0" mean this package wherever LeRobot looks a policy type up.

    `register_subclass` would raise, since LeRobot has registered its own by then, and plugin discovery
    only logs what raises: the built-in would run in silence.
    """
    from .inputs.prompt import register_prompt_step
    from .inputs.relative import register_relative_step
    from .processor_pi0 import register_tokenizer_step

    PreTrainedConfig.get_known_choices()["pi0"] = PI0Config
    register_tokenizer_step()
    register_prompt_step()
    register_relative_step()
    # A warning, because LeRobot sets logging up after it has imported the plugins: an info line is lost.
    logging.getLogger(__name__).warning(
        "policy type 'pi0' is lerobot_policy_pi0 %s, in place of LeRobot's own (%s=0 leaves LeRobot's)",
        __version__,
        TAKEOVER_VARIABLE,
    )


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if os.environ.get(TAKEOVER_VARIABLE, "1") != "0":
    _take_over()
