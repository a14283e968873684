"""The takeover: all that this plugin does to the whole process, in one place.

It runs at the start of every LeRobot command, so nothing heavy is imported before it is needed.
"""

import inspect
import logging
import sys
from functools import partial, wraps
from pathlib import Path
from typing import Any

import draccus
from lerobot.configs import PreTrainedConfig
from lerobot.optim import LRSchedulerConfig, OptimizerConfig
from lerobot.processor import DataProcessorPipeline, NormalizerProcessorStep

from .configuration_pi0 import PI0Config, encode_set, recipes

TAKEOVER_VARIABLE = "LEROBOT_PI0_TAKEOVER"


def take_over(version: str) -> None:
    """Make "pi0" mean this package wherever LeRobot looks a name up. Calling it again changes nothing.

    - The policy type `pi0` of LeRobot's configs is `PI0Config`. `register_subclass` would raise, since LeRobot has
      registered its own by then, and plugin discovery only logs what raises: the built-in would run in silence.
    - Saved pipelines of π₀ are rebuilt with the steps of `inputs.steps.STEPS` (tokenizer, prompt, relative and absolute
      actions) and with what the run asks for (`inputs.pipelines`); those of other policies are left alone.
    - A pipeline that is saved beside a policy of this plugin is recorded in the checkpoint's manifest.
    - draccus, which writes configs, leaves unset options of this plugin out (`configuration_pi0.encode_set`).
    - `OPTIMIZERS` and `SCHEDULES` of `training.optimizers` are known, so that a train_config.json which names them
      can be parsed.
    - `lerobot-rollout --inference.rtc.mode=trained`, which LeRobot after 0.6.1 has for π₀.₅ only, takes π₀: it
      checks the mode once its options are loaded (`PI0Policy.init_rtc_processor`).
    - LeRobot after 0.6.1 writes model cards by a function of its own. Once a policy of this plugin is pushed, that
      function writes this plugin's card for it (`checkpoints.publishing`).
    """
    took_over = PreTrainedConfig.get_known_choices()["pi0"] is PI0Config
    PreTrainedConfig.get_known_choices()["pi0"] = PI0Config
    draccus.encode.register(PI0Config, encode_set)
    OptimizerConfig.get_known_choices().update(recipes.optimizers.OPTIMIZERS)
    LRSchedulerConfig.get_known_choices().update(recipes.optimizers.SCHEDULES)
    _accept_trained_mode(sys.modules.get("lerobot.rollout.context"))
    _record_saved_pipelines()
    _rebuild_saved_pipelines()
    if not took_over:
        # A warning, because LeRobot sets logging up after it has imported the plugins: an info line is lost.
        logging.getLogger(__package__).warning(
            "policy type 'pi0' is lerobot_policy_pi0 %s, in place of LeRobot's own (%s=0 leaves LeRobot's)",
            version,
            TAKEOVER_VARIABLE,
        )


def _record_saved_pipelines() -> None:
    """Note in the checkpoint's manifest what was written: LeRobot tells a step neither where its pipeline is saved nor
    when the files are there."""
    original = DataProcessorPipeline._save_pretrained
    if hasattr(original, "records"):
        return

    @wraps(original)
    def save_and_record(self: Any, save_directory: Path, **kwargs: Any) -> None:
        file = kwargs.get("config_filename") or f"{self._get_sanitized_name()}.json"
        original(self, save_directory, **kwargs)
        if file in ("policy_preprocessor.json", "policy_postprocessor.json"):
            from .checkpoints.manifest import record_pipeline
            from .inputs.normalisation import digest_of

            statistics = [digest_of(step.stats) for step in self.steps if isinstance(step, NormalizerProcessorStep)]
            record_pipeline(Path(save_directory), file, next(iter(statistics), None))

    save_and_record.records = True  # type: ignore[attr-defined]
    DataProcessorPipeline._save_pretrained = save_and_record  # type: ignore[method-assign]


def _rebuild_saved_pipelines() -> None:
    """Let LeRobot rebuild saved pipelines through `inputs.pipelines`."""
    build: Any = DataProcessorPipeline.__dict__["_build_steps_with_overrides"].__func__
    if getattr(build, "of_pi0", False):
        return

    signature = inspect.signature(build)

    def rebuild(*args: Any, **kwargs: Any) -> Any:
        from .inputs.pipelines import artifact, rewritten

        bound = signature.bind(*args, **kwargs)
        given, place = bound.arguments, str(bound.arguments["model_id"])
        fetch = partial(artifact, place, given["base_path"], given["hub_download_kwargs"])
        given["loaded_config"], given["overrides"] = rewritten(
            given["loaded_config"], given["overrides"] or {}, place, fetch
        )
        return build(*bound.args, **bound.kwargs)

    rebuild.of_pi0 = True  # type: ignore[attr-defined]
    DataProcessorPipeline._build_steps_with_overrides = classmethod(rebuild)  # type: ignore[assignment, method-assign]


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
