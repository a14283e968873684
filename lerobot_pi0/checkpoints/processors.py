"""Options of a run that live in a checkpoint's saved processors: compared, handed to them, or refused.

LeRobot rebuilds processors from their files and shows them nothing of the run's config. Here the two are brought
together when a policy is loaded: an option that nobody set takes the processors' value; in training, the processors
take what the run says; of a policy that only acts, they stay as they were in training, but for the tokenizer's name and
length.
"""

import logging
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..configuration_pi0 import PI0Config
from ..inputs.features import padded, set_cameras
from ..inputs.pipelines import PROMPT, Run, Steps, follow
from ..inputs.samples import cameras_of, leave_out_depth
from ..inputs.steps import TOKENIZER
from .configs import decode_options
from .errors import CheckpointConfigError, CorruptCheckpointError
from .manifest import cameras
from .pipelines import ABSOLUTE, NORMALISE, RELATIVE, UNNORMALISE, Pipelines
from .source import Source

logger = logging.getLogger(__name__)


class Link(NamedTuple):
    """An option of the config that is an argument of a saved step."""

    option: str
    step: str
    argument: str
    trained: bool = True
    """Whether the weights depend on it, so that it cannot be changed without training."""


LINKS = (
    Link("tokenizer_max_length", TOKENIZER, "max_length", trained=False),
    Link("text_tokenizer_name", TOKENIZER, "tokenizer_name", trained=False),
    Link("use_relative_actions", RELATIVE, "enabled"),
    Link("relative_exclude_joints", RELATIVE, "exclude_joints"),
    Link("normalization_mapping", NORMALISE, "norm_map"),
)


def settle_processors(
    pipelines: Pipelines,
    slots: Mapping[str, Any],
    own: Mapping[str, Any],
    config: PI0Config,
    meta: Any,
    trains: bool,
) -> None:
    """As `Checkpoint.settle_processors`.

    Args:
        slots: the content of the checkpoint's config.json, whose `input_features` name the slots of the cameras.
        own: the content of the config.json beside the processors.
    """
    steps, source = pipelines.arguments, pipelines.source
    run = Run(weakref.ref(config), slots=tuple(cameras(slots)))
    for link in LINKS:
        if link.argument in steps.get(link.step, {}):
            _settle(link, steps[link.step][link.argument], source, own, config, run.changes, trains)
    for step, other in ((RELATIVE, ABSOLUTE), (NORMALISE, UNNORMALISE)):
        shared = {name: x for name, x in run.changes.get(step, {}).items() if name in ("enabled", "norm_map")}
        if shared and other in steps:
            run.changes[other] = shared
    if config.clean_prompts is not None and PROMPT in steps:
        run.changes[PROMPT] = {"cleans": config.clean_prompts}
    if config.save_tokenizer is not None and TOKENIZER in steps:
        run.changes.setdefault(TOKENIZER, {})["carry"] = config.save_tokenizer
    features = getattr(meta, "features", None)
    if features is not None:
        _take_cameras(run, config, features, for_any_robot=not steps.get(NORMALISE, {}).get("features"))
    follow(source.place, run)


def _settle(
    link: Link, saved: Any, source: Source, own: Mapping[str, Any], config: PI0Config, changes: Steps, trains: bool
) -> None:
    """One option against the argument of the step that was saved."""
    value = getattr(config, link.option)
    if value is None or (link.option == "tokenizer_max_length" and config.takes_length):
        setattr(config, link.option, _decoded(link, saved, source))
        return
    if (plain := _plain(value)) == saved or (link.argument == "exclude_joints" and not config.use_relative_actions):
        return
    if trains or (not link.trained and own.get(link.option) != plain):
        changes.setdefault(link.step, {})[link.argument] = value
        logger.info("%s=%s: the processors of %s had %s, and follow the run", link.option, plain, source, saved)
    elif own.get(link.option, plain) == plain:  # the files of the checkpoint disagree; its weights met the processors
        logger.warning(
            "%s: config.json says %s=%s, the processors say %s, which is what the weights were trained with",
            source, link.option, plain, saved,
        )  # fmt: skip
        setattr(config, link.option, _decoded(link, saved, source))
    else:
        raise CheckpointConfigError(
            f"{link.option}={plain}, but the weights of {source} were trained with {saved}: leave --policy."
            f"{link.option} out, or train with it (lerobot-train --policy.path={source})"
        )


def _decoded(link: Link, saved: Any, source: Source) -> Any:
    try:
        return getattr(decode_options({link.option: saved}), link.option)
    except Exception as error:  # as in `decode_config`
        raise CorruptCheckpointError(
            f"{link.argument}={saved!r} of {link.step} in the processors of {source} cannot be used ({error}): copy or "
            "download them again"
        ) from error


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(x) for key, x in value.items()}
    return list(value) if isinstance(value, tuple) else getattr(value, "value", value)


def _take_cameras(run: Run, config: PI0Config, dataset: dict[str, dict[str, Any]], for_any_robot: bool) -> None:
    """Note the dataset's cameras; where the policy has them for its own, put them into the checkpoint's order."""
    leave_out_depth(config)
    run.dataset = cameras_of(dataset)
    mine, slots = set(config.image_features), set(run.slots)
    if mine == slots and not slots & set(run.dataset) and run.dataset and for_any_robot and padded(config):
        # A base, whose cameras nobody has. LeRobot refuses other names unless there is a --rename_map,
        # which is known when the processors are rebuilt.
        run.instead_of = dict(config.image_features)
        set_cameras(config, run.dataset, run.slots)
    elif mine == set(run.dataset):
        run.of_dataset = mine != slots
        set_cameras(config, run.dataset, run.slots)
    else:  # the checkpoint's, or the dataset's which LeRobot after 0.6.1 has renamed by now
        set_cameras(config, dict(config.image_features), run.slots)
