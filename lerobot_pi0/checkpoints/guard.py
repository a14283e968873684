"""Guard of a checkpoint's files beside its weights: processors, options and manifest, looked at before any is used."""

import json
import logging
from typing import Any

from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE

from ..configuration_pi0 import PLUGIN_CONFIG_NAME, PI0Config
from ..inputs.normalisation import Normalisation, digest_of
from . import manifest, pipelines
from .errors import CorruptCheckpointError
from .names import CONFIG_DIGEST, OPTIONS
from .reading import opened_safetensors
from .source import Source

logger = logging.getLogger(__name__)


def check(source: Source, config: Any, replaced: bool = False) -> str | None:
    """Refuse what would run a program, what is not π₀'s, and what was not saved together.

    Args:
        config: the options that statistics and steps have to suit; another policy's are not looked at.
        replaced: whether a run puts statistics, features and relative actions of its own in the checkpoint's place.

    Returns:
        Digest of the statistics in the checkpoint's processors; None without any.

    Raises:
        UnsafeCheckpointError: a step names a class, or loads code.
        CheckpointError: a file is broken, lost, or another than was saved.
    """
    found, known = pipelines.read(source), manifest.read(source)
    statistics = digest_of(found.normalisation.statistics) if found.normalisation else None
    _check_lost(source)
    if known is not None:
        manifest.check_options(source, known)
        manifest.check_processors(source, known, statistics)
        if known["base"] is not None:
            manifest.check_adapter(source, known)
    elif source.file(PLUGIN_CONFIG_NAME) is not None:
        logger.warning(
            "%s has no %s (version 0.1.0 wrote none): whether its processors and options are those of its weights "
            "cannot be known. Saving the policy and its processors again makes one",
            source,
            manifest.MANIFEST_NAME,
        )
    if isinstance(config, PI0Config):
        pipelines.check(source, found, config, replaced)
    return statistics


def normalisation(source: Source) -> Normalisation:
    """What the preprocessor does to state and actions; without statistics where there are none.

    Raises:
        CheckpointError: a file is broken, or it would run a program.
    """
    return pipelines.read(source).normalisation or Normalisation({}, {})


def _check_lost(source: Source) -> None:
    """Notice a lerobot_pi0.json that did not come along: the weights know that it was there."""
    if source.file(PLUGIN_CONFIG_NAME) is not None or source.file(CONFIG_NAME) is None:
        return
    weights = source.file(SAFETENSORS_SINGLE_FILE)
    if weights is None:
        return
    with opened_safetensors(weights) as opened:
        carried = opened.metadata() or {}
    if CONFIG_DIGEST not in carried:
        return
    try:
        options = json.loads(carried.get(OPTIONS, "{}"))
    except (ValueError, RecursionError) as error:
        raise _lost(source, f"unreadable ({error})") from error
    if options:
        raise _lost(source, json.dumps(options))
    logger.warning(
        "%s has lost %s, which this plugin wrote with it: updates and options of its training are unknown",
        source,
        PLUGIN_CONFIG_NAME,
    )


def _lost(source: Source, options: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{source} has lost {PLUGIN_CONFIG_NAME}, and with it options that decide how the policy acts: {options}. Copy "
        "or download the file again"
    )
