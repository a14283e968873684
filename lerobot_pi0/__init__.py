"""π₀ (arXiv 2410.24164) as a LeRobot policy: importing this package takes over the policy type "pi0".

Every LeRobot command imports installed plugins when it starts, so nothing here may load model code:
`PI0Policy` and the processor factory are imported when they are first asked for.
"""

import importlib
import logging
import os
import sys
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
import draccus
from lerobot.configs import PreTrainedConfig
from lerobot.optim import LRSchedulerConfig, OptimizerConfig

from .configuration_pi0 import PI0Config, encode_set, optimizers

if TYPE_CHECKING:
    from .modeling_pi0 import PI0Policy
    from .processor_pi0 import make_pi0_pre_post_processors

__all__ = ["PI0Config", "PI0Policy", "make_pi0_pre_post_processors", "take_over"]
__version__ = "0.2.0.dev0"

TAKEOVER_VARIABLE = "LEROBOT_PI0_TAKEOVER"
_LAZY = {"PI0Policy": ".modeling_pi0", "make_pi0_pre_post_processors": ".processor_pi0"}


def take_over() -> None:
    """Make "pi0" mean this package wherever LeRobot looks a name up. Calling it again changes nothing.

    All that this package does to the whole process is here:

    - the policy type `pi0` of LeRobot's configs is `PI0Config`;
    - saved pipelines of π₀ are rebuilt with the steps of `inputs.steps.STEPS` (tokenizer, prompt, relative and absolute
      actions) and with what the run asks for (`inputs.pipelines`); those of other policies are left alone;
    - draccus, which writes configs, leaves unset options of this plugin out (`configuration_pi0.encode_set`);
    - `lerobot-rollout --inference.rtc.mode=trained`, which LeRobot after 0.6.1 has for π₀.₅ only, takes π₀: it
      checks the mode once its options are loaded (`PI0Policy.init_rtc_processor`);
    - `OPTIMIZERS` and `SCHEDULES` of `training.optimizers` are known, so that a train_config.json which names them
      can be parsed;
    - a pipeline that is saved beside a policy of this plugin is recorded in the checkpoint's manifest.

    `register_subclass` would raise for `pi0`, since LeRobot has registered its own by then, and plugin discovery only
    logs what raises: the built-in would run in silence.
    """
    from .checkpoints.recorder import record_saved_pipelines
    from .inputs.pipelines import take_over_pipelines

    took_over = PreTrainedConfig.get_known_choices()["pi0"] is PI0Config
    PreTrainedConfig.get_known_choices()["pi0"] = PI0Config
    draccus.encode.register(PI0Config, encode_set)
    OptimizerConfig.get_known_choices().update(optimizers.OPTIMIZERS)
    LRSchedulerConfig.get_known_choices().update(optimizers.SCHEDULES)
    _accept_trained_mode(sys.modules.get("lerobot.rollout.context"))
    record_saved_pipelines()
    take_over_pipelines()
    if not took_over:
        # A warning, because LeRobot sets logging up after it has imported the plugins: an info line is lost.
        logging.getLogger(__name__).warning(
            "policy type 'pi0' is lerobot_policy_pi0 %s, in place of LeRobot's own (%s=0 leaves LeRobot's)",
            __version__,
            TAKEOVER_VARIABLE,
        )


def _accept_trained_mode(context: Any) -> None:
    """Let other policies alone be refused by their type; the module is there if the command is `lerobot-rollout`."""
    check = "_validate_trained_rtc_rollout_config"
    theirs = getattr(context, check, None)
    if theirs is None or hasattr(theirs, "without_pi0"):
        return

    def validate(policy_config: Any, inference_config: Any) -> None:
        if not isinstance(policy_config, PI0Config):
            theirs(policy_config, inference_config)

    validate.without_pi0 = theirs  # type: ignore[attr-defined]
    setattr(context, check, validate)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if os.environ.get(TAKEOVER_VARIABLE, "1") != "0":
    take_over()
