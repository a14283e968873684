"""Manifest of a checkpoint: what was saved together, so that a file of another checkpoint is noticed and named.

LeRobot saves weights first and processors later. So the policy writes the manifest with its weights, and each pipeline
that is then saved into the same folder is recorded in it. A save that is cut off between the two leaves a manifest
without processors, which is not taken for one that was tampered with.
"""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from lerobot.configs import FeatureType

from ..configuration_pi0 import OPTIONS, PLUGIN_CONFIG_NAME
from .errors import CheckpointConfigError, CorruptCheckpointError
from .names import ACTING_OPTIONS, ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, CONFIG_DIGEST, EXPERT_HEAD
from .pipelines import POSTPROCESSOR, PREPROCESSOR
from .reading import metadata_of
from .source import Source
from .tensor_bytes import digest_of_file, digest_of_json

logger = logging.getLogger(__name__)

MANIFEST_NAME = "lerobot_pi0_manifest.json"

FIXED = {
    CONFIG_NAME: (
        "input_features", "output_features", "normalization_mapping", "action_feature_names", "use_relative_actions",
        "relative_exclude_joints", "min_period", "max_period", "image_resolution",
    ),
    PLUGIN_CONFIG_NAME: ("base", "rtc_training_max_delay"),
}  # fmt: skip
"""What weights and statistics were made for, and cannot be edited in a file. Everything else is an option."""

OF_THE_BASE = ("base_model_name_or_path", "revision")
"""What may be edited in adapter_config.json, as where a base lies is not what it is."""

HOW_TO_ACCEPT = f"If the change is meant, remove {MANIFEST_NAME}: nothing is compared then"


def make(
    configs: Mapping[str, Mapping[str, Any]], weights: str | None, statistics: str | None, base: Any = None
) -> dict[str, Any]:
    """The manifest of a policy that is being saved; its processors come later.

    Args:
        configs: content of config.json and lerobot_pi0.json, by file name.
        weights: digest of the weights (`digest_of_weights`, or of an adapter's file).
        statistics: digest of the statistics that the policy was built with, if it was.
        base: the checkpoint that an adapter belongs to, as `origin.Base` without its class.
    """
    return {
        "version": 1,
        "options": {name: _digests(content) for name, content in configs.items()},
        "cameras": cameras(configs[CONFIG_NAME]),
        "weights": weights,
        "statistics": statistics,
        "base": base,
        "processors": None,
    }


ACTING = (
    "solver", "solver_tolerance", "noise_temperature", "max_action_step", "action_range_margin", "rtc_guidance",
    "rtc_training_max_delay",
)  # fmt: skip
"""Options of lerobot_pi0.json without which a policy acts otherwise, or without its bounds."""


def options_that_matter(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Those of `ACTING` that are not what they would be without the file; weights carry them too."""
    ours = configs[PLUGIN_CONFIG_NAME]
    return {name: ours[name] for name in ACTING if ours.get(name) not in (None, math.inf, OPTIONS[name].default)}


def cameras(config: Mapping[str, Any]) -> list[str]:
    """Cameras in the order in which the network sees them: that of the features in config.json."""
    features = config.get("input_features")
    listed = features.items() if isinstance(features, dict) else ()
    return [key for key, x in listed if isinstance(x, dict) and x.get("type") == FeatureType.VISUAL.value]


def _digests(options: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the options of a file, without the sizes of pictures: those are resized, whatever they were."""
    return {key: digest_of_json(_without_sizes(x) if key == "input_features" else x) for key, x in options.items()}


def _without_sizes(features: Any) -> Any:
    if not isinstance(features, dict):
        return features
    pictures = {
        key: {**x, "shape": [None if type(n) is int and n > 3 else n for n in x["shape"]]}
        for key, x in features.items()
        if isinstance(x, dict) and x.get("type") == FeatureType.VISUAL.value and isinstance(x.get("shape"), list)
    }
    return {**features, **pictures}


def digest_of_weights(digests: Mapping[str, str | None]) -> str | None:
    """One digest of a file's tensors, by the digests that it carries; None where it carries none."""
    known = {name: x for name, x in digests.items() if x is not None and name != EXPERT_HEAD}
    return digest_of_json(known) if known else None


# --- reading ----------------------------------------------------------------------------------------------------


def read(source: Source) -> dict[str, Any] | None:
    """The manifest; None for checkpoints of version 0.1.0 and of others.

    Raises:
        CorruptCheckpointError: it is cut, or no manifest.
    """
    content = source.read_json(MANIFEST_NAME)
    if content is None:
        return None
    options, processors = content.get("options"), content.get("processors")
    if not (
        content.keys() >= {"base", "cameras", "processors", "statistics", "weights"}
        and isinstance(options, dict)
        and options.keys() >= FIXED.keys()
        and all(isinstance(saved, dict) for saved in options.values())
        and isinstance(processors, dict | None)
        and isinstance(content.get("cameras"), list)
        and all(isinstance(content.get(name), str | None) for name in ("weights", "statistics"))
        and isinstance(content.get("base"), dict | None)
    ):
        raise CorruptCheckpointError(
            f"{MANIFEST_NAME} of {source} is unreadable: download or copy it again, or remove it and with it the "
            "comparison of what was saved together"
        )
    return content


def check(source: Source, statistics: str | None) -> None:
    """Compare the files beside the weights with what was saved; an adapter's weights too, which PEFT will load.

    Args:
        statistics: digest of those in the checkpoint's processors.

    Raises:
        CheckpointConfigError: something was changed that the weights or the statistics were made for.
        CorruptCheckpointError: a file is broken, lost, or another than was saved; the save was cut off before the
            processors were written; or the folder is being written.
    """
    manifest = read(source)
    _check_lost(source)
    if manifest is not None:
        for file in (name for name in (*FIXED, ADAPTER_CONFIG_NAME) if name in manifest["options"]):
            _check_options(source, file, manifest)
        _check_processors(source, manifest, statistics)
        if manifest["base"] is not None:
            _check_adapter(source, manifest)
    elif source.file(PLUGIN_CONFIG_NAME) is not None:
        logger.warning(
            "%s has no %s (version 0.1.0 wrote none): whether its processors and options are those of its weights "
            "cannot be known. Saving the policy and its processors again makes one",
            source,
            MANIFEST_NAME,
        )


def _check_lost(source: Source) -> None:
    """Notice a lerobot_pi0.json that did not come along: the weights know that it was there."""
    if source.file(PLUGIN_CONFIG_NAME) is not None or source.file(CONFIG_NAME) is None:
        return
    weights = source.file(SAFETENSORS_SINGLE_FILE)
    carried = {} if weights is None else metadata_of(weights)
    if CONFIG_DIGEST not in carried:
        return
    if (options := carried.get(ACTING_OPTIONS, "{}")) != "{}":
        raise CorruptCheckpointError(
            f"{source} has lost {PLUGIN_CONFIG_NAME}, and with it options that decide how the policy acts: {options}. "
            "Copy or download the file again"
        )
    logger.warning(
        "%s has lost %s, which this plugin wrote with it: updates and options of its training are unknown",
        source,
        PLUGIN_CONFIG_NAME,
    )


def _check_options(source: Source, file: str, manifest: Mapping[str, Any]) -> None:
    content, saved = source.read_json(file), manifest["options"][file]
    if content is None:
        return  # `_check_lost` knows what is lost with it
    found = _digests(content)
    changed = sorted(key for key in found.keys() | saved.keys() if found.get(key) != saved.get(key))
    if changed and source.has_changed():
        raise being_written(source)
    if fixed := [key for key in changed if (key in FIXED[file] if file in FIXED else key not in OF_THE_BASE)]:
        raise CheckpointConfigError(
            f"{', '.join(fixed)} in {file} of {source} is not what was saved, and the weights were made for that: "
            f"copy or download the file again. {HOW_TO_ACCEPT}"
        )
    if changed:
        logger.warning("%s of %s was edited since it was saved: %s", file, source, ", ".join(changed))
    if file == CONFIG_NAME and (order := cameras(content)) != manifest["cameras"]:
        raise CheckpointConfigError(
            f"the cameras in {file} of {source} are in the order {', '.join(order)}, and the network was trained "
            f"with {', '.join(map(str, manifest['cameras']))}: put the keys of input_features back in that order. "
            "Programs that sort the keys of a JSON file exchange cameras"
        )


def _check_processors(source: Source, manifest: Mapping[str, Any], statistics: str | None) -> None:
    recorded = manifest["processors"] or {}
    present = [name for name in (PREPROCESSOR, POSTPROCESSOR) if source.read(name) is not None]
    if not {PREPROCESSOR, POSTPROCESSOR} <= recorded.keys():
        bound = manifest["statistics"]
        if present and (recorded or (None not in (bound, statistics) and bound != statistics)):
            raise CorruptCheckpointError(
                f"the save of {source} is unfinished: it was cut off between the weights and the processors, and the "
                f"processors that are there belong to other weights. Take another checkpoint. {HOW_TO_ACCEPT}"
            )
        return
    for name, digest in recorded.items():
        if (found := _digest_of(source, name)) is None:
            raise CorruptCheckpointError(
                f"{source} has lost {name}, which was saved with it: copy or download it again"
            )
        if found != digest:
            raise CorruptCheckpointError(
                f"{name} of {source} is not the one that was saved with these weights (its digest differs): copy or "
                f"download it again. {HOW_TO_ACCEPT}"
            )


def _digest_of(source: Source, name: str) -> str | None:
    """A digest of a file: of what it says if it is JSON, or else of its bytes; None where there is no such file."""
    if (data := source.read(name)) is None:
        return None
    return digest_of_json(source.read_json(name)) if name.endswith(".json") else xxhash.xxh3_64_hexdigest(data)


def being_written(source: Source) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{source} was written while it was being read: load it again when the other process has finished"
    )


def check_weights(source: Source, digests: Mapping[str, str | None]) -> None:
    """Compare the weights' digests with those of the weights that were saved with the other files.

    Raises:
        CorruptCheckpointError: the weights are of another checkpoint, or the folder is being written.
    """
    found, manifest = digest_of_weights(digests), read(source)
    if manifest is not None and None not in (found, manifest["weights"]) and found != manifest["weights"]:
        raise CorruptCheckpointError(
            f"the weights in {source} are not those that its {CONFIG_NAME}, processors and {MANIFEST_NAME} were saved "
            "with: they were exchanged, or the folder was being written just now. Load it again; if this repeats, copy "
            "or download all files again"
        )


def _check_adapter(source: Source, manifest: Mapping[str, Any]) -> None:
    file = source.file(ADAPTER_WEIGHTS_NAME)
    if manifest["weights"] is not None and (file is None or digest_of_file(file) != manifest["weights"]):
        raise CorruptCheckpointError(
            f"{ADAPTER_WEIGHTS_NAME} of {source} is lost, or not the one that was saved: copy or download it again"
        )


# --- writing ----------------------------------------------------------------------------------------------------


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Put a manifest into a folder, whole or not at all."""
    part = folder / f"{MANIFEST_NAME}.part"
    part.write_text(json.dumps(content, indent=4) + "\n")
    part.replace(folder / MANIFEST_NAME)


def record_pipeline(folder: Path, config_file: str, statistics: str | None) -> None:
    """Note in the folder's manifest, if there is one, a pipeline that has just been saved there.

    Args:
        config_file: the pipeline's JSON file.
        statistics: digest of what its normalising step holds; None where it has none.
    """
    source = Source(folder)
    if (content := read(source)) is None:
        return
    steps = (source.read_json(config_file) or {})["steps"]
    names = [config_file, *(step["state_file"] for step in steps if step.get("state_file"))]
    content["processors"] = {**(content["processors"] or {}), **{name: _digest_of(source, name) for name in names}}
    write(folder, content | ({} if statistics is None else {"statistics": statistics}))
