"""π₀ (arXiv 2410.24164) as a LeRobot policy: importing this package takes over the policy type "pi0".

Every LeRobot command imports installed plugins when it starts, so nothing here may load model code:
`PI0Policy` and the processor factory are imported when they are first asked for.
"""

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

try:
    import lerobot.policies  # noqa: F401  registers LeRobot's own pi0, which has to come first
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "lerobot":
        raise
    raise ModuleNotFoundError(
        "lerobot_policy_pi0 is a plugin of LeRobot, which is not installed in this environment, or too old: "
        "pip install 'lerobot[pi,training]>=0.6.1,<0.7'",
        name="lerobot",
    ) from error
from lerobot.configs import PreTrainedConfig
from lerobot.optim import LRSchedulerConfig, OptimizerConfig
from lerobot.processor import ProcessorStepRegistry

from .configuration_pi0 import OPTIMIZERS, SCHEDULES, PI0Config

if TYPE_CHECKING:
    from .modeling_pi0 import PI0Policy
    from .processor_pi0 import make_pi0_pre_post_processors

__all__ = ["PI0Config", "PI0Policy", "make_pi0_pre_post_processors", "take_over"]
__version__ = "0.1.0"

TAKEOVER_VARIABLE = "LEROBOT_PI0_TAKEOVER"
_LAZY = {"PI0Policy": ".modeling_pi0", "make_pi0_pre_post_processors": ".processor_pi0"}


def take_over() -> None:
    """Make "pi0" mean this package wherever LeRobot looks a name up. Calling it again changes nothing.

    All that this package does to the whole process is here:

    - the policy type `pi0` of LeRobot's configs is `PI0Config`;
    - saved steps of `inputs.steps.STEPS` (tokenizer, prompt, relative and absolute actions) are rebuilt as ours, for
      every policy;
    - `OPTIMIZERS` and `SCHEDULES` of `configuration_pi0` are known, so that a train_config.json which names them
      can be parsed;
    - a pipeline that is saved beside a policy of this plugin is recorded in the checkpoint's manifest.

    Beside it, `inputs.steps.PromptStep.asked` is a note from a policy that is built for training to the prompt step
    that is built next in this process.

    `register_subclass` would raise for `pi0`, since LeRobot has registered its own by then, and plugin discovery only
    logs what raises: the built-in would run in silence.
    """
    from .checkpoints.recorder import record_saved_pipelines
    from .inputs.steps import STEPS

    took_over = PreTrainedConfig.get_known_choices()["pi0"] is PI0Config
    PreTrainedConfig.get_known_choices()["pi0"] = PI0Config
    OptimizerConfig.get_known_choices().update(OPTIMIZERS)
    LRSchedulerConfig.get_known_choices().update(SCHEDULES)
    record_saved_pipelines()
    for name, step in STEPS.items():
        ProcessorStepRegistry.unregister(name)
        ProcessorStepRegistry.register(name)(step)
    if not took_over:
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
    take_over()
