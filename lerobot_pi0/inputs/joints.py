"""Names of joints, made from what LeRobot stores, and which joints have relative actions.

A dataset's `meta/info.json` holds names in many shapes: a list of them, a list in a list, `{"motors": [...]}` (LeRobot
before 0.4), name → index, one name for all dims, or none. A config holds `list(names)`, which turns `{"motors": [...]}`
into `["motors"]`.
"""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from lerobot.processor import RelativeActionsProcessorStep
from lerobot.utils.constants import ACTION, OBS_STATE

from ..configuration_pi0 import PI0Config

logger = logging.getLogger(__name__)


def joint_names(stored: Any, dims: int, key: str) -> list[str]:
    """A name for each dim of a feature, different from all others.

    Where the stored names are not one for each dim, dims have numbers, since nobody knows which names are whose:

        ["pan", "lift"], [["pan", "lift"]], {"motors": ["pan", "lift"]}, {"pan": 0, "lift": 1} → ["pan", "lift"]
        None, ["state"], ["pan", "pan"], ["pan", "lift", "flex"]                      → ["action[0]", "action[1]"]

    Args:
        stored: `names` of a feature in `meta/info.json`, or a config's `action_feature_names`.
        dims: how many dims the feature has.
        key: the feature's key, for names that are numbers.
    """
    names = _flat(stored)
    return names if len(set(names)) == len(names) == dims else [f"{key}[{i}]" for i in range(dims)]


def is_numbered(names: list[str], key: str) -> bool:
    """Whether these are the numbers that `joint_names` gives where there are no names."""
    return names[:1] == [f"{key}[0]"]


def names_in_dataset(features: Mapping[str, Mapping[str, Any]], key: str) -> list[str]:
    """`joint_names` of a feature of a dataset (`meta.features`)."""
    return joint_names(features[key].get("names"), int(np.prod(features[key]["shape"])), key)


def names_in_config(config: PI0Config, key: str) -> list[str]:
    """`joint_names` of the state or the actions of a policy; a config knows the names of actions alone."""
    feature = {**(config.input_features or {}), **(config.output_features or {})}[key]
    return joint_names(config.action_feature_names if key == ACTION else None, int(np.prod(feature.shape)), key)


def take_names(config: PI0Config, meta: Any) -> None:
    """Give the config the names of the dataset's actions as a list of names, which is all that LeRobot can read.

    Args:
        meta: the dataset's LeRobotDatasetMetadata, or None.
    """
    feature = (getattr(meta, "features", None) or {}).get(ACTION, {})
    names = _flat(feature.get("names"))
    if names and names == joint_names(names, int(np.prod(feature["shape"])), ACTION):
        config.action_feature_names = names


def relative_mask(config: PI0Config, dims: int) -> np.ndarray:
    """Which dims of the actions are relative to the state, boolean (dims): what LeRobot's step makes of the names."""
    return _lerobots_mask(config.action_feature_names, config.relative_exclude_joints, dims)


def check_relative_names(config: PI0Config, meta: Any = None) -> None:
    """Refuse relative actions where `relative_exclude_joints` would keep other joints absolute than it names.

    LeRobot pairs the stored names with dims as they come: of `[["pan", "gripper"]]`, which is one item, the first joint
    stays absolute where the gripper is excluded; `{"motors": [...]}` it cannot read when it makes statistics.

    Args:
        meta: the dataset's LeRobotDatasetMetadata; without it the config's names are looked at.

    Raises:
        ValueError: the names are not a list with one name for each dim; says which list would be.
    """
    if not (config.use_relative_actions and config.relative_exclude_joints):
        return
    dims = int(np.prod(config.output_features[ACTION].shape))
    in_dataset = (getattr(meta, "features", None) or {}).get(ACTION)
    stored = config.action_feature_names if in_dataset is None else in_dataset.get("names")
    names, excluded = _flat(stored), ", ".join(config.relative_exclude_joints)
    where = f"the names of {ACTION!r}, {stored!r},"
    remedy = "in the dataset's meta/info.json (action_feature_names where there is no dataset)"
    if joint_names(names, dims, ACTION) == names:
        if not isinstance(stored, list | tuple) or list(stored) != names:
            quoted = ", ".join(f'"{name}"' for name in names)
            raise ValueError(
                f"{where} cannot be read by LeRobot, which would keep other joints absolute than {excluded} "
                f'(relative_exclude_joints): write "names": [{quoted}] {remedy}'
            )
    elif names and not _lerobots_mask(names, config.relative_exclude_joints, dims).all():
        raise ValueError(
            f"{where} are not {dims} different ones, so which dims are {excluded} (relative_exclude_joints) is "
            f"unknown: write a list with a name for each dim {remedy}"
        )
    else:
        logger.warning("the dataset names no joints: relative_exclude_joints is without effect, all are relative")


def pairing_problem(config: PI0Config, meta: Any) -> tuple[str, bool] | None:
    """What is wrong with relative actions and the state that they are relative to; None if nothing is known to be.

    LeRobot subtracts dim i of the state from dim i of the actions, whatever their names are.

    Args:
        meta: the dataset's LeRobotDatasetMetadata, or None.

    Returns:
        What is wrong and what to do; and whether it is certain: a joint has no state, or that of another joint. It is
        not where the two name their joints otherwise, which may be the same.
    """
    features = getattr(meta, "features", None) or {}
    if not config.use_relative_actions or not {ACTION, OBS_STATE} <= features.keys():
        return None
    actions, states = (names_in_dataset(features, key) for key in (ACTION, OBS_STATE))
    otherwise = "or train with --policy.use_relative_actions=false"
    if beyond := actions[len(states) :]:
        return (
            f"these actions cannot be relative to the state: it has {len(states)} dims and no {', '.join(beyond)}. "
            f"Leave these dims out of the actions, record them in the state too, {otherwise}"
        ), True
    mask = relative_mask(config, len(actions))
    pairs = [(a, states[i]) for i, a in enumerate(actions) if mask[i] and a != states[i]]
    said = ", ".join(f"{a} from {s}" for a, s in pairs)
    if any(a in states or s in actions for a, s in pairs):
        return (
            "state and actions do not have the same joints in the same order, and LeRobot pairs them by place: it "
            f"would count {said}. Record both in one order, leave these joints absolute "
            f"(--policy.relative_exclude_joints), {otherwise}"
        ), True
    if pairs and not (is_numbered(actions, ACTION) or is_numbered(states, OBS_STATE)):
        return (
            f"state and actions name their joints otherwise, and relative actions pair them by place: {said}. If they "
            f"are the same joints, give both the same names in meta/info.json, {otherwise}"
        ), False
    return None


def check_pairing(config: PI0Config, meta: Any) -> None:
    """Refuse relative actions that `pairing_problem` knows to be wrong, and warn of those that it doubts.

    Raises:
        ValueError: a relative dim has no state, or that of another joint; says which.
    """
    problem, is_certain = pairing_problem(config, meta) or ("", False)
    if is_certain:
        raise ValueError(problem)
    if problem:
        logger.warning(problem)


def _lerobots_mask(names: Any, excluded: list[str], dims: int) -> np.ndarray:
    step = RelativeActionsProcessorStep(enabled=True, exclude_joints=excluded, action_names=names)
    return np.array(step._build_mask(dims))


def _flat(stored: Any) -> list[str]:
    """All names within lists and mappings, in order; a mapping of names to indices is sorted by index."""
    if stored is None:
        return []
    if isinstance(stored, Mapping):
        if stored and all(isinstance(x, int) for x in stored.values()):
            return [str(name) for name in sorted(stored, key=stored.__getitem__)]
        stored = list(stored.values())
    if isinstance(stored, list | tuple):
        return [name for item in stored for name in _flat(item)]
    return [str(stored)]
