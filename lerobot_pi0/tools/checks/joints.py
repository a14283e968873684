"""Joints: their names and order, and what the robot has.

Axes: N frames, D dims of state or action.
"""

from collections.abc import Iterable

import numpy as np
from lerobot.robots import Robot
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from ...configuration_pi0 import PI0Config
from ...inputs.joints import is_numbered, joint_names, pairing_problem
from ..data import dim_names, some
from .subject import ERROR, FINE, WARNING, Finding, Subject


def joints(subject: Subject) -> Iterable[Finding]:
    """Names and order of the joints: state against actions, dataset against weights and robot."""
    names = {key: dim_names(subject.dataset, key) for key in (OBS_STATE, ACTION)}
    config = subject.config
    for key, most, option in (
        (OBS_STATE, config.max_state_dim, "max_state_dim"),
        (ACTION, config.max_action_dim, "max_action_dim"),
    ):
        if len(names[key]) > most:
            message = f"{key} has {len(names[key])} dims, the network has room for {most}"
            yield Finding(ERROR, "dims", message, f"leave dims out, or train from scratch with a larger {option}")
        else:
            yield Finding(FINE, "joints", f"{key}: {', '.join(names[key])}")
    if sorted(names[OBS_STATE]) == sorted(names[ACTION]) and names[OBS_STATE] != names[ACTION]:
        message = "state and actions have the same joints in another order"
        yield Finding(WARNING, "joints", message, "record both in one order; relative actions need it")
    yield from relative_joints(subject)
    before = subject.trained.config
    if before is not None and before.output_features:
        grade = ERROR if subject.keeps_features else WARNING
        yield from compare_joints(names, before, subject.trained.source, grade)
    if subject.robot is not None:
        yield from compare_with_robot(subject, subject.robot, names)


def relative_joints(subject: Subject) -> Iterable[Finding]:
    """Relative actions from which the state of another joint would be subtracted."""
    if (found := pairing_problem(subject.config, subject.dataset.meta)) is not None:
        problem, is_certain = found
        message, _, remedy = problem.partition(". ")
        yield Finding(ERROR if is_certain else WARNING, "joints", message, remedy)


def compare_joints(names: dict[str, list[str]], before: PI0Config, source: str | None, grade: str) -> Iterable[Finding]:
    other = (
        "to fine-tune for another robot, give --policy.type=pi0 --policy.pretrained_path=CHECKPOINT, not --policy.path"
    )
    features = {**(before.input_features or {}), **(before.output_features or {})}
    for key, found in names.items():
        dims = features[key].shape[0] if key in features else len(found)
        if dims not in (len(found), before.max_state_dim, before.max_action_dim):
            yield Finding(grade, "joints", f"{key} has {len(found)} dims, {source} has {dims}", other)
    stored, found = before.action_feature_names, names[ACTION]
    expected = joint_names(stored, len(found), ACTION) if stored else found
    if stored and is_numbered(found, ACTION) and not is_numbered(expected, ACTION):
        message = f"the dataset does not name the joints of the actions, so their order is not compared with {source}"
        yield Finding(
            WARNING, "joints", message, f"see that it is {', '.join(expected)}, and name them in meta/info.json"
        )
    known = not (is_numbered(expected, ACTION) or is_numbered(found, ACTION))
    if known and expected != found and len(expected) == len(found):
        what = "in another order" if sorted(expected) == sorted(found) else "other joints"
        message = f"{what} than {source}: {', '.join(found)}; there {', '.join(expected)}"
        yield Finding(
            grade, "joints", message, "record the joints in the weights' order: dims have no names in the network"
        )


def compare_with_robot(subject: Subject, robot: Robot, names: dict[str, list[str]]) -> Iterable[Finding]:
    """The robot's joints and cameras against the dataset's."""
    mine = list(robot.action_features)
    if mine != names[ACTION]:
        message = f"{robot.name} has the joints {', '.join(mine)}; the dataset {', '.join(names[ACTION])}"
        yield Finding(ERROR, "robot", message, "this dataset is of another robot, or of another order of joints")
    shapes = {f"{OBS_IMAGES}.{k}": v for k, v in robot.observation_features.items() if isinstance(v, tuple)}
    if missing := [key for key in subject.cameras.values() if key not in shapes]:
        message = f"{robot.name} has no {some(missing)}, only {some(list(shapes)) or 'no camera'}"
        yield Finding(ERROR, "robot", message, "name --robot.cameras as in the dataset")
    for key, shape in shapes.items():
        recorded = tuple(subject.dataset.meta.features.get(key, {}).get("shape", shape))
        if None not in shape and sorted(recorded) != sorted(shape):
            yield Finding(
                WARNING, "robot", f"{key} is {shape} on {robot.name}, {recorded} in the dataset", "use one size"
            )
    if getattr(robot.config, "use_degrees", None) is False and np.abs(subject.columns.state_ND).max() > 101:
        message = f"{robot.name} speaks of -100 … 100, the dataset goes to {np.abs(subject.columns.state_ND).max():.0f}"
        yield Finding(ERROR, "robot", message, "the dataset is in degrees: set --robot.use_degrees=true")
    if mine == names[ACTION] and not missing:
        yield Finding(FINE, "robot", f"{robot.name}: joints and cameras are the dataset's")
