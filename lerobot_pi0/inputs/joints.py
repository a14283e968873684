"""Names of joints, as read from datasets and configs, and which joints have relative actions.

A dataset's `meta/info.json` holds names in many forms: a list of names, a list in a list, `{"motors": [...]}` (LeRobot
before 0.4), a mapping from name to index, one name for all dims, or none. A config holds `list(names)`, which turns
`{"motors": [...]}` into `["motors"]`.
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
    """A unique name for each dim of a feature.

    If the stored names are not one different name per dim, nobody knows which name belongs to which dim. Then the dims
    are numbered:

        ["pan", "lift"], [["pan", "lift"]], {"motors": ["pan", "lift"]}, {"pan": 0, "lift": 1} → ["pan", "lift"]
        None, ["state"], ["pan", "pan"], ["pan", "lift", "flex"]                      → ["action[0]", "action[1]"]

    Args:
        stored: `names` of a feature in `meta/info.json`, or a config's `action_feature_names`.
        dims: how many dims the feature has.
        key: the feature's key, for numbered names.
    """
    names = _flat(stored)
    return names if len(set(names)) == len(names) == dims else [f"{key}[{i}]" for i in range(dims)]


def is_numbered(names: list[str], key: str) -> bool:
    """Whether these are numbered names, which `joint_names` gives if there are no usable ones."""
    return names[:1] == [f"{key}[0]"]


def names_in_dataset(features: Mapping[str, Mapping[str, Any]], key: str) -> list[str]:
    """`joint_names` of a feature of a dataset (`meta.features`)."""
    return joint_names(features[key].get("names"), int(np.prod(features[key]["shape"])), key)


def names_in_config(config: PI0Config, key: str) -> list[str]:
    """`joint_names` of a policy's state or actions. A config has names of actions alone; states are numbered."""
    feature = {**(config.input_features or {}), **(config.output_features or {})}[key]
    return joint_names(config.action_feature_names if key == ACTION else None, int(np.prod(feature.shape)), key)


def take_names(config: PI0Config, meta: Any) -> None:
    """Copy the names of the dataset's actions into the config as a flat list, the only form that LeRobot can read.

    Args:
        meta: the dataset's LeRobotDatasetMetadata, or None.
    """
    feature = (getattr(meta, "features", None) or {}).get(ACTION, {})
    names = _flat(feature.get("names"))
    if names and names == joint_names(names, int(np.prod(feature["shape"])), ACTION):
        config.action_feature_names = names


def relative_mask(config: PI0Config, dims: int) -> np.ndarray:
    """Which dims of the actions are relative to the state, boolean (dims,), as LeRobot's step decides by the names."""
    return _lerobots_mask(config.action_feature_names, config.relative_exclude_joints, dims)


def check_relative_names(config: PI0Config, meta: Any = None) -> None:
    """Refuse relative actions if LeRobot would keep other joints absolute than `relative_exclude_joints` names.

    LeRobot takes item i of the stored names as the name of dim i. `[["pan", "gripper"]]` is a single item, so if the
    gripper is excluded, the first joint stays absolute. And LeRobot cannot make statistics with `{"motors": [...]}`.

    Args:
        meta: the dataset's LeRobotDatasetMetadata; without it the config's names are checked.

    Raises:
        ValueError: the names are not a list with one name for each dim; the message shows the right list.
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
            f"{where} are not {dims} different names, so it is unknown which dims are {excluded} "
            f"(relative_exclude_joints): write a list with a name for each dim {remedy}"
        )
    else:
        logger.warning(
            "the dataset has no names of joints: relative_exclude_joints has no effect, and all joints are relative"
        )


def pairing_problem(config: PI0Config, meta: Any) -> tuple[str, bool] | None:
    """What is wrong with relative actions and the state to which they are relative; None if no problem is known.

    LeRobot subtracts dim i of the state from dim i of the actions, whatever their names are.

    Args:
        meta: the dataset's LeRobotDatasetMetadata, or None.

    Returns:
        What is wrong and what to do; and whether it is certain. It is certain if the state has no dim for a joint, or
        the dim of another joint. It is not if state and actions only have different names, perhaps for the same joints.
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
    paired = ", ".join(f"{a} relative to {s}" for a, s in pairs)
    if any(a in states or s in actions for a, s in pairs):
        return (
            "state and actions do not have the same joints in the same order, and LeRobot pairs them by position: it "
            f"would compute {paired}. Record both in one order, leave these joints absolute "
            f"(--policy.relative_exclude_joints), {otherwise}"
        ), True
    if pairs and not (is_numbered(actions, ACTION) or is_numbered(states, OBS_STATE)):
        return (
            "state and actions have different names for their joints, and relative actions pair them by position: "
            f"{paired}. If they are the same joints, give both the same names in meta/info.json, {otherwise}"
        ), False
    return None


def check_pairing(config: PI0Config, meta: Any) -> None:
    """Refuse relative actions if `pairing_problem` is certain of a problem; warn if it is not certain.

    Raises:
        ValueError: for a relative dim the state has no dim, or the dim of another joint; the message names them.
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
