"""Processor files of a checkpoint, read and checked before LeRobot builds pipelines of them.

LeRobot imports and calls whatever a step names as its `class` before it looks at its type, so that a file could run a
program. Here nothing is built: JSON and tensors are read, and compared with what π₀ needs.
"""

import logging
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from lerobot.configs import FeatureType, NormalizationMode
from lerobot.processor import ProcessorStepRegistry
from lerobot.utils.constants import ACTION, POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME
from torch import Tensor

from ..configuration_pi0 import PI0Config
from ..inputs.normalisation import EPSILON, Normalisation, difference, digest_of, problem_of, vectors
from ..inputs.pipelines import PROMPT, RENAME, Steps
from ..inputs.steps import TOKENIZER
from .errors import CheckpointConfigError, CorruptCheckpointError, UnsafeCheckpointError
from .source import Source

logger = logging.getLogger(__name__)

PREPROCESSOR = f"{POLICY_PREPROCESSOR_DEFAULT_NAME}.json"
POSTPROCESSOR = f"{POLICY_POSTPROCESSOR_DEFAULT_NAME}.json"

RELATIVE, ABSOLUTE = "relative_actions_processor", "absolute_actions_processor"
NORMALISE, UNNORMALISE = "normalizer_processor", "unnormalizer_processor"

EITHER = (RENAME, "to_batch_processor", "device_processor")
"""Steps that may stand where they like."""

ORDER = {
    POSTPROCESSOR: (UNNORMALISE, ABSOLUTE),
    PREPROCESSOR: (PROMPT, TOKENIZER, RELATIVE, NORMALISE),
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


class Pipelines:
    """What the two processor files of a checkpoint say, and their statistics; each file is read once.

    Args:
        source: the checkpoint.

    Raises:
        UnsafeCheckpointError: a step names a class, or loads code.
        CheckpointError: a file is broken or lost.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.steps = {file: self._read(file) for file in ORDER if source.read(file) is not None}
        self.by_name = {step.name: step for steps in self.steps.values() for step in steps}
        self.arguments: Steps = {name: step.config for name, step in self.by_name.items()}
        self.rename_map = self._rename_map()
        """The `--rename_map` of the training: the policy's name of a camera by the dataset's."""
        self.normalisation, self.unnormalisation = (self._normalisation(name) for name in (NORMALISE, UNNORMALISE))

    def _rename_map(self) -> dict[str, str]:
        names = self.arguments.get(RENAME, {}).get("rename_map") or {}
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise CorruptCheckpointError(
                f"{RENAME} of {self.source} renames no cameras ({names!r}): download or copy {PREPROCESSOR} again"
            )
        return names

    @property
    def digest(self) -> str | None:
        """Digest of the statistics; None without any."""
        return digest_of(self.normalisation.statistics) if self.normalisation else None

    def state_of(self, name: str) -> dict[str, Tensor]:
        """The tensors of a step's state; none where it has none, or is not there.

        Raises:
            CorruptCheckpointError: its file is lost or broken.
        """
        step = self.by_name.get(name)
        if step is None or step.state_file is None:
            return {}
        tensors = self.source.read_tensors(step.state_file)
        if tensors is None:
            raise CorruptCheckpointError(
                f"{self.source} lacks {step.state_file}, the state of its {name}: a save or a copy was cut off. Copy "
                "or download it again"
            )
        return tensors

    def check(self, config: PI0Config, replaced: bool) -> None:
        """Refuse processors that are not π₀'s, or with which actions would come back as others.

        Args:
            replaced: whether a run puts statistics, features and relative actions of its own in their place.

        Raises:
            CheckpointError: a step is missing, twice there or out of order; statistics are not finite, of other dims,
                or not the same before and after the policy.
        """
        for file, steps in reversed(self.steps.items()):
            self._check_steps(file, [step.name for step in steps])
        for name in self.by_name:
            self.state_of(name)  # is there, and can be read
        if lost := ORDER.keys() - self.steps.keys():
            if self.steps:
                raise CorruptCheckpointError(
                    f"{self.source} holds {min(self.steps)} and no {min(lost)}: a save or a copy was cut off. Take "
                    "another checkpoint, or copy the folder again"
                )
        elif not replaced:
            self._check_relative()
            self._check_statistics(config)
            self._check_features(config)

    def _check_steps(self, file: str, names: list[str]) -> None:
        of_both = {*EITHER, *(name for order in ORDER.values() for name in order)}
        for name in dict.fromkeys(names):
            if name not in ProcessorStepRegistry.list():
                raise CheckpointConfigError(
                    f"{file} of {self.source} names the step {name!r}, which is not registered here: install the "
                    "plugin that it belongs to, or take a checkpoint without it"
                )
            if name not in of_both:
                logger.warning(
                    "%s of %s has the step %r, which π₀ does not know: it runs as its plugin made it",
                    file,
                    self.source,
                    name,
                )
        ours = [name for name in names if name not in EITHER and name in of_both]
        wanted = [name for name in ORDER[file] if name in ours or name not in OPTIONAL]
        if ours != wanted:
            raise CorruptCheckpointError(
                f"the steps of {file} in {self.source} are {', '.join(ours) or 'none'}; π₀ needs {', '.join(wanted)}, "
                "once each and in this order: download or copy it again"
            )

    def _check_relative(self) -> None:
        before, after = ("on" if self.arguments.get(name, {}).get("enabled") else "off" for name in OPTIONAL)
        if before != after:
            raise CheckpointConfigError(
                f"{self.source}: {RELATIVE} is {before} in {PREPROCESSOR}, and {ABSOLUTE} {after} in {POSTPROCESSOR}: "
                "actions would be those of another pose. Copy or download both files again"
            )

    def _check_statistics(self, config: PI0Config) -> None:
        assert self.normalisation is not None and self.unnormalisation is not None  # `_check_steps` has found both
        feature, known = vectors(config).get(ACTION), self.unnormalisation.statistics.get(ACTION)
        if feature and not known and self.unnormalisation.mode(feature) is not NormalizationMode.IDENTITY:
            logger.warning(
                "%s has no statistics of actions: those that come out are normalised numbers, mostly from -1 to 1, not "
                "in the robot's units. Let no arm move by them: fine-tune it first (lerobot-train --policy.path=%s)",
                self.source,
                self.source,
            )
        for file, x in ((PREPROCESSOR, self.normalisation), (POSTPROCESSOR, self.unnormalisation)):
            if problem := problem_of(config, x):
                raise CorruptCheckpointError(
                    f"the statistics of {file} in {self.source} cannot be used: {problem}. Copy or download them "
                    "again; if they were made so, recompute the dataset's (lerobot-edit-dataset "
                    "--operation.type=recompute_stats) and train again"
                )
        if problem := difference(config, self.normalisation, self.unnormalisation):
            raise CorruptCheckpointError(
                f"{PREPROCESSOR} and {POSTPROCESSOR} of {self.source} do not belong together: {problem}. The robot "
                "would be sent other actions than the policy means: copy or download both again, with their "
                ".safetensors files"
            )

    def _check_features(self, config: PI0Config) -> None:
        """Statistics are only used for features that the steps list, by the type that they give them."""
        assert self.normalisation is not None
        features = self.arguments[NORMALISE].get("features")
        listed = features if isinstance(features, dict) else {}
        for key, feature in vectors(config).items():
            found = listed.get(key, {})
            if key in self.normalisation.statistics and (
                not isinstance(found, dict) or found.get("type") != feature.type.value
            ):
                raise CorruptCheckpointError(
                    f"{PREPROCESSOR} of {self.source} has statistics of {key!r}, but does not list it as a feature of "
                    f"type {feature.type.value}, so they would not be used: copy or download it again"
                )

    # --- reading ---

    def _read(self, file: str) -> list[Step]:
        entries = (self.source.read_json(file) or {}).get("steps")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise CorruptCheckpointError(f"{file} of {self.source} lists no steps: download or copy it again")
        return [_step(f"{file} of {self.source}", entry) for entry in entries]

    def _normalisation(self, name: str) -> Normalisation | None:
        """What the (un)normalising step does; None where there is no such step."""
        if name not in self.by_name:
            return None
        arguments = self.by_name[name].config
        epsilon = arguments.get("eps", EPSILON)
        try:
            modes = {FeatureType(x): NormalizationMode(mode) for x, mode in arguments.get("norm_map", {}).items()}
            if isinstance(epsilon, bool) or not 0 <= epsilon < 1:
                raise ValueError(f"eps={epsilon!r}")
        except (ValueError, TypeError, AttributeError) as error:
            raise CorruptCheckpointError(
                f"{name} of {self.source} does not say how it normalises ({error}): download or copy it again"
            ) from error
        statistics: dict[str, dict[str, Tensor]] = {}
        for key, value in self.state_of(name).items():
            feature, _, statistic = key.rpartition(".")
            statistics.setdefault(feature, {})[statistic] = value
        return Normalisation(statistics, modes, float(epsilon))


def _step(file: str, entry: dict[str, Any]) -> Step:
    """One step, if nothing of it would be executed."""
    if "class" in entry:
        raise UnsafeCheckpointError(
            f"a step of {file} names the class {entry['class']!r}, which LeRobot would import and call: that can be "
            "any program. Do not load this checkpoint; if you trust who made it, have the step registered "
            "(ProcessorStepRegistry) in a plugin, and saved again"
        )
    name, config, state = entry.get("registry_name"), entry.get("config", {}), entry.get("state_file")
    folders = entry.get("artifacts") or {}  # of LeRobot after 0.6.1: names of folders, in place of options
    if (
        not isinstance(name, str)
        or not isinstance(config, dict)
        or not isinstance(state, str | None)
        or not isinstance(folders, dict)
    ):
        raise CorruptCheckpointError(f"a step of {file} is unreadable ({entry}): download or copy it again")
    if state is not None and (
        PurePosixPath(state).name != state or "\\" in state or not state.endswith(".safetensors")
    ):
        raise UnsafeCheckpointError(f"{name} in {file} reads {state!r}, which is no file of the checkpoint")
    if name.startswith(LOADS_CODE) or _trusts_code(config):
        raise UnsafeCheckpointError(
            f"the step {name} in {file} would load code or models that the file names: do not load this checkpoint. π₀ "
            "needs no such step"
        )
    return Step(name, config | dict.fromkeys(folders), state)


def _trusts_code(config: Any) -> bool:
    """Whether anything in it, however deep, lets transformers run programs of a repository."""
    left = [config]
    while left:
        x = left.pop()
        if isinstance(x, dict):
            if x.get("trust_remote_code", False) is not False:
                return True
            left += x.values()
        elif isinstance(x, list):
            left += x
    return False
