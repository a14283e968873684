"""Names of joints: every shape in which LeRobot stores them, and who is harmed by one that is read wrongly."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from conftest import ACTION, CAMERAS, DIMS, make_batch, stats, tiny_config, write_dataset
from lerobot.datasets import LeRobotDataset
from lerobot.policies import make_policy
from lerobot.processor import RelativeActionsProcessorStep
from lerobot.utils.constants import OBS_STATE

from lerobot_pi0 import PI0Policy, make_pi0_pre_post_processors
from lerobot_pi0.control.bounds import make_bounds
from lerobot_pi0.inputs.joints import (
    check_pairing,
    check_relative_names,
    joint_names,
    names_in_config,
    names_in_dataset,
    relative_mask,
    take_names,
)

NAMES = ["pan", "lift", "elbow", "flex", "roll", "gripper"]
NUMBERS = [f"{ACTION}[{i}]" for i in range(DIMS)]

NAMED = {
    "list": NAMES,
    "tuple": tuple(NAMES),
    "list in a list": [NAMES],
    "two lists": [NAMES[:3], NAMES[3:]],
    "motors": {"motors": NAMES},
    "two groups": {"arm": NAMES[:5], "hand": NAMES[5:]},
    "groups in groups": {"left": {"arm": NAMES[:5], "hand": NAMES[5:]}},
    "indices": {name: i for i, name in reversed(list(enumerate(NAMES)))},
}
"""Shapes from which each dim gets its name."""

UNNAMED = {
    "none": None,
    "nothing": [],
    "motors of a config": ["motors"],
    "one name": ["state"],
    "a word": "state",
    "a list of one list of one": [["state"]],
    "too few": NAMES[:4],
    "too many": [*NAMES, "wrist"],
    "twice": [*NAMES[:5], "pan"],
    "no group": {},
    "two arms of equal names": {"left": ["a", "b", "c"], "right": ["a", "b", "c"]},
}
"""Shapes from which nobody knows which dim is which."""

EVERY = NAMED | UNNAMED


@pytest.mark.parametrize("stored", NAMED.values(), ids=NAMED)
def test_named(stored):
    """Catches a shape that LeRobot stores and that is read as one joint, as letters, or not at all."""
    assert joint_names(stored, DIMS, ACTION) == NAMES
    features = {ACTION: {"dtype": "float32", "shape": (DIMS,), "names": stored}}
    assert names_in_dataset(features, ACTION) == NAMES


@pytest.mark.parametrize("stored", UNNAMED.values(), ids=UNNAMED)
def test_numbered(stored):
    """Catches names given to dims that they are not known to belong to, fewer names than dims, and equal names."""
    assert joint_names(stored, DIMS, ACTION) == NUMBERS


def test_names_that_are_numbers():
    """Catches an index that is taken for a name of another type, and one dim that has the one name there is."""
    assert joint_names([0, 1, 2], 3, ACTION) == ["0", "1", "2"]
    assert joint_names(["width"], 1, ACTION) == ["width"]


def test_names_of_the_state_are_not_those_of_the_actions():
    """Catches a message about the state that names the joint of an action."""
    config = tiny_config(action_feature_names=NAMES)
    assert names_in_config(config, ACTION) == NAMES
    assert names_in_config(config, OBS_STATE) == [f"{OBS_STATE}[{i}]" for i in range(DIMS)]


def meta_of(stored) -> SimpleNamespace:
    return SimpleNamespace(features={ACTION: {"dtype": "float32", "shape": (DIMS,), "names": stored}})


@pytest.mark.parametrize("stored", EVERY.values(), ids=EVERY)
def test_a_config_takes_names_that_lerobot_can_read(stored):
    """Catches `list({"motors": [...]})`, of which one word is left for every later message and mask."""
    named = any(stored is x for x in NAMED.values())
    config = tiny_config(action_feature_names=["as LeRobot left it"])
    take_names(config, meta_of(stored))
    assert config.action_feature_names == (NAMES if named else ["as LeRobot left it"])
    assert json.loads(json.dumps(config.action_feature_names)) == config.action_feature_names


@pytest.mark.parametrize("meta", [None, SimpleNamespace(), SimpleNamespace(features={})])
def test_no_dataset(meta):
    """Catches a policy that cannot be built without a dataset, or with one of other columns."""
    config = tiny_config(action_feature_names=NAMES)
    take_names(config, meta)
    assert config.action_feature_names == NAMES
    check_relative_names(config, meta)


def as_in_a_config(stored):
    """What LeRobot's make_policy does with a dataset's names."""
    return None if stored is None else list(stored)


@pytest.mark.parametrize("stored", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("option", ["max_action_step", "action_range_margin"])
def test_bounds(stored, option, caplog):
    """Catches a robot that stops in the middle of a motion because a warning cannot name its joints."""
    config = tiny_config(action_feature_names=as_in_a_config(stored), **{option: 1e-3})
    numbers = {key: dict(x) for key, x in stats().items()}
    bound = make_bounds(config, lambda: numbers)
    far = torch.full((1, 5, DIMS), 9.0)
    with caplog.at_level(logging.WARNING):
        assert (bound.chunk(far, torch.zeros(1, DIMS)) < far).all()
    (message,) = [record.getMessage() for record in caplog.records if "bounds actions" in record.getMessage()]
    for name in joint_names(as_in_a_config(stored), DIMS, ACTION):
        assert f"{name} 5 times" in message


@pytest.mark.parametrize("stored", EVERY.values(), ids=EVERY)
def test_loss_labels(stored):
    """Catches losses of several joints under one label, of which one is logged."""
    policy = PI0Policy(tiny_config(action_feature_names=as_in_a_config(stored)))
    _, numbers = policy(make_batch(size=64))
    expected = joint_names(as_in_a_config(stored), DIMS, ACTION)
    assert [name for name in numbers if name.startswith("loss_")] == [f"loss_{name}" for name in expected]


# --- relative actions ---------------------------------------------------------------------------------------


def relative_config(stored, **options):
    return tiny_config(action_feature_names=as_in_a_config(stored), use_relative_actions=True, **options)


@pytest.mark.parametrize("excluded", [["gripper"], ["pan", "GRIP"], [], ["no such joint"]], ids=str)
def test_the_mask_is_that_of_the_step(excluded):
    """Catches bounds and statistics that take another joint for relative than the processors do."""
    config = relative_config(NAMES, relative_exclude_joints=excluded)
    pipeline, _ = make_pi0_pre_post_processors(config, stats())
    (step,) = [step for step in pipeline.steps if isinstance(step, RelativeActionsProcessorStep)]
    found = relative_mask(config, DIMS)
    assert found.tolist() == step._build_mask(DIMS)
    kept = [name for name, moves in zip(NAMES, found, strict=True) if not moves]
    assert kept == [name for name in NAMES if any(x.lower() in name for x in excluded)]


def readable(stored) -> bool:
    return isinstance(stored, list | tuple) and list(stored) == NAMES


@pytest.mark.parametrize("stored", NAMED.values(), ids=NAMED)
def test_names_that_lerobot_misreads_are_refused(stored):
    """Catches relative actions that keep the first joint absolute in place of the gripper."""
    config = relative_config(stored)
    if readable(stored):
        check_relative_names(config, meta_of(stored))
        return
    with pytest.raises(ValueError, match="gripper") as refused:
        check_relative_names(config, meta_of(stored))
    advice = "[" + str(refused.value).rsplit('"names": [', 1)[1].split("]")[0] + "]"
    assert json.loads(advice) == NAMES
    check_relative_names(config, meta_of(json.loads(advice)))


@pytest.mark.parametrize("stored", EVERY.values(), ids=EVERY)
def test_no_joint_is_excluded(stored):
    """Catches a refusal of names that nothing reads: all joints are relative, or none."""
    check_relative_names(relative_config(stored, relative_exclude_joints=[]), meta_of(stored))
    check_relative_names(tiny_config(action_feature_names=as_in_a_config(stored)), meta_of(stored))


@pytest.mark.parametrize("stored", [["gripper"], [*NAMES, "wrist"], ["gripper", *NAMES[:4]]], ids=str)
def test_names_without_a_dim(stored):
    """Catches LeRobot's pairing of names with the first dims, whatever they are."""
    with pytest.raises(ValueError, match=r"relative_exclude_joints.*a name for each dim"):
        check_relative_names(relative_config(stored))


@pytest.mark.parametrize("stored", [None, [], ["motors"]], ids=str)
def test_no_names_are_told_of(stored, caplog):
    """Catches an option without effect that nobody hears of."""
    config = relative_config(stored)
    check_relative_names(config)
    assert "relative_exclude_joints has no effect" in caplog.text
    assert relative_mask(config, DIMS).all()


def test_processors_refuse_them_too():
    """Catches processors that are made without a policy and keep another joint absolute."""
    with pytest.raises(ValueError, match="cannot be read by LeRobot"):
        make_pi0_pre_post_processors(relative_config([NAMES]), stats())


@pytest.mark.parametrize("stored", [{"motors": NAMES}, [NAMES]], ids=["motors", "list in a list"])
def test_a_dataset_of_such_names(tmp_path, stored):
    """Catches a run on a dataset of before LeRobot 0.4 whose losses, bounds and relative actions know no joint."""
    write_dataset(tmp_path / "data", cameras=CAMERAS[:1])
    file = tmp_path / "data" / "meta" / "info.json"
    info = json.loads(file.read_text())
    for key in (ACTION, OBS_STATE):
        info["features"][key]["names"] = stored
    file.write_text(json.dumps(info))
    meta = LeRobotDataset("test/tiny", root=tmp_path / "data").meta
    options = {"chunk_size": 4, "n_action_steps": 2, "max_action_step": 1.0}
    policy = make_policy(tiny_config(CAMERAS[:1], **options), ds_meta=meta)
    assert policy.config.action_feature_names == NAMES
    policy.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["action_feature_names"] == NAMES
    with pytest.raises(ValueError, match=r'"names": \["pan", "lift"'):
        make_policy(tiny_config(CAMERAS[:1], use_relative_actions=True, **options), ds_meta=meta)


def both(state, action) -> SimpleNamespace:
    named = {OBS_STATE: state, ACTION: action}
    return SimpleNamespace(
        features={key: {"dtype": "float32", "shape": (len(x),), "names": x} for key, x in named.items()}
    )


PLACES = {
    "the same": (NAMES, "fine"),
    "more joints behind": ([*NAMES, "velocity"], "fine"),
    "another order": (NAMES[::-1], "refused"),
    "one joint in front": (["base", *NAMES], "refused"),
    "other names": ([f"joint_{i}" for i in range(DIMS)], "warned of"),
    "the excluded joint alone": ([*NAMES[:5], "hand"], "fine"),
}


@pytest.mark.parametrize(("state", "answer"), PLACES.values(), ids=PLACES)
def test_the_state_has_other_joints_than_the_actions(state, answer, caplog):
    """Catches relative actions from which the state of another joint is subtracted, silently."""
    config = relative_config(NAMES, relative_exclude_joints=["gripper"])
    meta = both(state, NAMES)
    if answer == "refused":
        with pytest.raises(ValueError, match=r"pairs them by position.*Record both in one order"):
            check_pairing(config, meta)
        return
    check_pairing(config, meta)
    assert ("different names for their joints" in caplog.text) == (answer == "warned of")
    config.use_relative_actions = False
    check_pairing(config, both(NAMES[::-1], NAMES))
