"""Processor files of a checkpoint, read and checked before LeRobot builds pipelines of them.

LeRobot imports and calls whatever a step names as its `class` before it looks at its type, so that a file could run a
program. Here nothing is built: JSON and tensors are read, and compared with what π₀ needs.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from lerobot.configs import FeatureType, NormalizationMode
from lerobot.processor import ProcessorStepRegistry
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME
from torch import Tensor

from ..configuration_pi0 import PI0Config
from ..inputs.normalisation import EPSILON, Normalisation, difference, problem_of, vectors
from .errors import CheckpointConfigError, CorruptCheckpointError, UnsafeCheckpointError
from .reading import opened_safetensors
from .source import Source

logger = logging.getLogger(__name__)

PREPROCESSOR = f"{POLICY_PREPROCESSOR_DEFAULT_NAME}.json"
POSTPROCESSOR = f"{POLICY_POSTPROCESSOR_DEFAULT_NAME}.json"

RELATIVE, ABSOLUTE = "relative_actions_processor", "absolute_actions_processor"
NORMALISE, UNNORMALISE = "normalizer_processor", "unnormalizer_processor"

EITHER = ("rename_observations_processor", "to_batch_processor", "device_processor")
"""Steps that may stand where they like."""

ORDER = {
    PREPROCESSOR: ("pi0_new_line_processor", "tokenizer_processor", RELATIVE, NORMALISE),
    POSTPROCESSOR: (UNNORMALISE, ABSOLUTE),
}
"""The other steps of π₀, which stand in this order: relative actions are normalised, and made absolute last."""

OPTIONAL = (RELATIVE, ABSOLUTE)

LOADS_CODE = ("action_tokenizer_processor", "reward_classifier_processor", "robometer_encoder", "groot_")
"""LeRobot's steps that load models or code which their configuration names; or how their names begin."""


class Step(NamedTuple):
    """One step of a processor file."""

    name: str
    config: dict[str, Any]
    state_file: str | None


class Pipelines(NamedTuple):
    """What the two processor files of a checkpoint say; None where a file is not there."""

    before: list[Step] | None
    after: list[Step] | None
    normalisation: Normalisation | None
    unnormalisation: Normalisation | None


def read(source: Source) -> Pipelines:
    """Read both files, and refuse what would run a program.

    Raises:
        UnsafeCheckpointError: a step names a class, or loads code.
        CheckpointError: a file is broken, or names a step that is not installed.
    """
    before, after = (_steps(source, file) for file in (PREPROCESSOR, POSTPROCESSOR))
    return Pipelines(
        before,
        after,
        _normalisation(source, before, NORMALISE),
        _normalisation(source, after, UNNORMALISE),
    )


def check(source: Source, pipelines: Pipelines, config: PI0Config, replaced: bool) -> None:
    """Refuse processors that are not π₀'s, or with which actions would come back as others.

    Args:
        replaced: whether a run puts statistics, features and relative actions of its own in their place.

    Raises:
        CheckpointError: a step is missing, twice there or out of order; statistics are not finite, of other dims, or
            not the same before and after the policy.
    """
    for file, steps in ((PREPROCESSOR, pipelines.before), (POSTPROCESSOR, pipelines.after)):
        if steps is not None:
            _check_steps(source, file, steps)
    if (pipelines.before is None) != (pipelines.after is None):
        there, lost = (PREPROCESSOR, POSTPROCESSOR) if pipelines.after is None else (POSTPROCESSOR, PREPROCESSOR)
        raise CorruptCheckpointError(
            f"{source} holds {there} and no {lost}: a save or a copy was cut off. Take another checkpoint, or copy "
            "the folder again"
        )
    if replaced or pipelines.before is None or pipelines.after is None:
        return
    _check_pair(source, pipelines, config)


def _check_pair(source: Source, pipelines: Pipelines, config: PI0Config) -> None:
    enabled = [
        bool(step.config.get("enabled", False))
        for steps, name in ((pipelines.before, RELATIVE), (pipelines.after, ABSOLUTE))
        for step in (next((s for s in steps or [] if s.name == name), Step(name, {}, None)),)
    ]
    if enabled[0] != enabled[1]:
        raise CheckpointConfigError(
            f"{source}: {RELATIVE} is {'on' if enabled[0] else 'off'} in {PREPROCESSOR}, and {ABSOLUTE} "
            f"{'on' if enabled[1] else 'off'} in {POSTPROCESSOR}: actions would be those of another pose. "
            "Copy or download both files again"
        )
    normalise, unnormalise = pipelines.normalisation, pipelines.unnormalisation
    assert normalise is not None and unnormalise is not None  # `_check_steps` has found both steps
    for file, x in ((PREPROCESSOR, normalise), (POSTPROCESSOR, unnormalise)):
        if problem := problem_of(config, x):
            raise CorruptCheckpointError(
                f"the statistics of {file} in {source} cannot be used: {problem}. Copy or download them again; if they "
                "were made so, recompute the dataset's (lerobot-edit-dataset --operation.type=recompute_stats) and "
                "train again"
            )
    if problem := difference(config, normalise, unnormalise):
        raise CorruptCheckpointError(
            f"{PREPROCESSOR} and {POSTPROCESSOR} of {source} do not belong together: {problem}. The robot would be "
            "sent other actions than the policy means: copy or download both again, with their .safetensors files"
        )
    _check_features(source, pipelines, config)


def _check_features(source: Source, pipelines: Pipelines, config: PI0Config) -> None:
    """Statistics are only used for features that the steps list, by the type that they give them."""
    assert pipelines.before is not None and pipelines.normalisation is not None
    listed = next(s for s in pipelines.before if s.name == NORMALISE).config.get("features") or {}
    for key, feature in vectors(config).items():
        if key not in pipelines.normalisation.statistics:
            continue
        found = listed.get(key, {})
        if not isinstance(found, dict) or found.get("type") != feature.type.value:
            raise CorruptCheckpointError(
                f"{PREPROCESSOR} of {source} has statistics of {key!r}, but does not list it as a feature of type "
                f"{feature.type.value}, so they would not be used: copy or download it again"
            )


# --- steps ------------------------------------------------------------------------------------------------------


def _steps(source: Source, file: str) -> list[Step] | None:
    content = source.read_json(file)
    if content is None:
        return None
    entries = content.get("steps")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CorruptCheckpointError(f"{file} of {source} lists no steps: download or copy it again")
    return [_step(source, file, entry) for entry in entries]


def _step(source: Source, file: str, entry: dict[str, Any]) -> Step:
    """One step, if nothing of it would be executed."""
    if "class" in entry:
        raise UnsafeCheckpointError(
            f"a step of {file} in {source} names the class {entry['class']!r}, which LeRobot would import and call: "
            "that can be any program. Do not load this checkpoint; if you trust who made it, have the step registered "
            "(ProcessorStepRegistry) in a plugin, and saved again"
        )
    name, config, state = entry.get("registry_name"), entry.get("config", {}), entry.get("state_file")
    if not isinstance(name, str) or not isinstance(config, dict) or not isinstance(state, str | None):
        raise CorruptCheckpointError(f"a step of {file} in {source} is unreadable ({entry}): download or copy it again")
    if state is not None and (
        PurePosixPath(state).name != state or "\\" in state or not state.endswith(".safetensors")
    ):
        raise UnsafeCheckpointError(f"{name} in {file} of {source} reads {state!r}, which is no file of the checkpoint")
    if name.startswith(LOADS_CODE) or any(_trusts_code(config)):
        raise UnsafeCheckpointError(
            f"the step {name} in {file} of {source} would load code or models that the file names: do not load this "
            "checkpoint. π₀ needs no such step"
        )
    return Step(name, config, state)


def _trusts_code(value: Any) -> Iterator[bool]:
    if isinstance(value, Mapping):
        for key, x in value.items():
            yield key == "trust_remote_code" and x is not False
            yield from _trusts_code(x)
    elif isinstance(value, list):
        for x in value:
            yield from _trusts_code(x)


def _check_steps(source: Source, file: str, steps: list[Step]) -> None:
    names = [step.name for step in steps]
    of_both = {*EITHER, *(name for order in ORDER.values() for name in order)}
    registered = set(ProcessorStepRegistry.list())
    for name in dict.fromkeys(names):
        if name not in registered:
            raise CheckpointConfigError(
                f"{file} of {source} names the step {name!r}, which is not registered here: install the plugin that it "
                "belongs to, or take a checkpoint without it"
            )
        if name not in of_both:
            logger.warning(
                "%s of %s has the step %r, which π₀ does not know: it runs as its plugin made it", file, source, name
            )
    ours = [name for name in names if name not in EITHER and name in of_both]
    wanted = [name for name in ORDER[file] if name in ours or name not in OPTIONAL]
    if ours != wanted:
        raise CorruptCheckpointError(
            f"the steps of {file} in {source} are {', '.join(ours) or 'none'}; π₀ needs {', '.join(wanted)}, once each "
            "and in this order: download or copy it again"
        )


# --- normalisation ----------------------------------------------------------------------------------------------


def _normalisation(source: Source, steps: list[Step] | None, name: str) -> Normalisation | None:
    """What the (un)normalising step of a file does; None where there is no such step."""
    step = next((step for step in steps or [] if step.name == name), None)
    if step is None:
        return None
    modes, epsilon = step.config.get("norm_map", {}), step.config.get("eps", EPSILON)
    try:
        read_modes = {FeatureType(kind): NormalizationMode(mode) for kind, mode in modes.items()}
        if isinstance(epsilon, bool) or not 0 <= epsilon < 1:
            raise ValueError(f"eps={epsilon!r}")
    except (ValueError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(
            f"{name} of {source} does not say how it normalises ({error}): download or copy it again"
        ) from error
    return Normalisation(_statistics(source, step), read_modes, float(epsilon))


def _statistics(source: Source, step: Step) -> dict[str, dict[str, Tensor]]:
    """The statistics of a step, by feature and kind."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in state_of(source, step).items():
        key, _, statistic = name.rpartition(".")
        found.setdefault(key, {})[statistic] = value
    return found


def state_of(source: Source, step: Step) -> dict[str, Tensor]:
    """The tensors of a step's state; none where it has no state.

    Raises:
        CorruptCheckpointError: its file is lost or broken.
    """
    if step.state_file is None:
        return {}
    file = source.file(step.state_file)
    if file is None:
        raise CorruptCheckpointError(
            f"{source} lacks {step.state_file}, the state of its {step.name}: a save or a copy was cut off. Copy or "
            "download it again"
        )
    with opened_safetensors(file) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  it is no mapping
