"""Inputs that a dataset, robot or environment does not have, or has in LeRobot's way and not in π₀'s."""

import logging
import re

import numpy as np
import pytest
import torch
from conftest import CAMERAS, make_batch, stats, tiny_config
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.datasets import LeRobotDataset
from lerobot.lerobot_types import TransitionKey
from lerobot.policies import make_pre_post_processors
from lerobot.policies.factory import make_policy
from lerobot.utils.constants import ACTION, OBS_STATE
from torch.utils.data import DataLoader

from lerobot_pi0 import PI0Config, PI0Policy, make_pi0_pre_post_processors
from lerobot_pi0.inputs.observation import ObservationError, ObservationMaker
from lerobot_pi0.inputs.samples import check_sample, restore_dims

CPU = torch.device("cpu")
CHUNK = 4


@pytest.mark.parametrize("task", [["pick the cube\n", "  \n"], ["", ""], "\n", ""])
def test_an_empty_task(caplog, task):
    """Catches an environment without instructions (PushT gives [""]) in which the policy cannot be evaluated, as
    lerobot-eval has no option for one; and a forgotten --task of which nothing is said."""
    make = ObservationMaker(tiny_config(CAMERAS, dims=6))
    batch = make_batch(size=64)
    with caplog.at_level(logging.WARNING):
        seen = [make(batch | {"task": task}, CPU) for _ in range(2)]
    assert caplog.text.count("'task' is empty") == 1
    assert all(word in caplog.text for word in ("--task", "--dataset.single_task", "lerobot-eval"))
    assert all(torch.equal(x.tokens_BL, make(batch, CPU).tokens_BL) for x in seen)


def recorded(root, state: int = 6, action: int = 6, depth: bool = False) -> LeRobotDataset:
    """A dataset with so many dims, 0 for none, and a batch of it as lerobot-train loads it for chunks."""
    columns = {
        "observation.images.front": {"dtype": "image", "shape": (16, 24, 3), "names": ["height", "width", "channels"]}
    }
    if depth:
        columns["observation.images.front_depth"] = {
            "dtype": "image",
            "shape": (16, 24, 1),
            "names": ["height", "width", "channels"],
            "info": {"is_depth_map": True},
        }
    for key, dims in ((OBS_STATE, state), (ACTION, action)):
        if dims:
            columns[key] = {"dtype": "float32", "shape": (dims,), "names": [f"j{i}.pos" for i in range(dims)]}
    data = LeRobotDataset.create("local/data", fps=10, features=columns, root=root, use_videos=False)
    draw = np.random.default_rng(0)
    for _ in range(2):
        for _ in range(6):
            row = {
                key: draw.integers(0, 255, x["shape"], np.uint8) for key, x in columns.items() if x["dtype"] == "image"
            }
            row |= {
                key: draw.normal(2, 9, x["shape"]).astype("float32")
                for key, x in columns.items()
                if x["dtype"] != "image"
            }
            if depth:
                row["observation.images.front_depth"] = row["observation.images.front_depth"].astype(np.uint16)
            data.add_frame(row | {"task": "push"})
        data.save_episode()
    data.finalize()
    steps = [i / 10 for i in range(CHUNK)]
    return LeRobotDataset("local/data", root=root, delta_timestamps={ACTION: steps})


def trained(data: LeRobotDataset, folder, batch_size: int = 3, **options):
    """A policy and its processors made of a dataset as lerobot-train does it, after a loss; saved and loaded again."""
    config = PI0Config(paligemma_variant="tiny", action_expert_variant="tiny", device="cpu", chunk_size=CHUNK,
                       n_action_steps=CHUNK, num_inference_steps=2, **options)  # fmt: skip
    policy = make_policy(config, ds_meta=data.meta)
    processors = make_pre_post_processors(policy.config, dataset_stats=data.meta.stats)
    batch = next(iter(DataLoader(data, batch_size=batch_size)))
    losses = policy.losses(processors[0](batch))
    policy.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)
    again = PI0Policy.from_pretrained(folder)
    return losses, again, *make_pre_post_processors(again.config, pretrained_path=str(folder))


def observation(state: int | None, cameras=("front",)) -> dict:
    """What lerobot-rollout hands to the preprocessor."""
    seen = {f"observation.images.{name}": torch.rand(1, 3, 16, 24) for name in cameras} | {"task": "push"}
    return seen if state is None else seen | {OBS_STATE: torch.randn(1, state)}


@pytest.mark.parametrize(("state", "action", "batch_size"), [(1, 6, 3), (6, 1, 1), (6, 1, CHUNK), (1, 1, 1), (1, 1, 3)])
def test_one_dim(tmp_path, state, action, batch_size):
    """Catches a state or an action of one dim that cannot be learnt, since LeRobot reads it as a scalar: a batch of
    states becomes one state, and a batch of chunks single actions."""
    data = recorded(tmp_path / "data", state, action)
    losses, policy, pre, post = trained(data, tmp_path / "policy", batch_size)
    assert (len(losses), *losses.shape[2:]) == (batch_size, CHUNK, action)
    batch = pre(next(iter(DataLoader(data, batch_size=batch_size))))
    raw = torch.as_tensor(np.array([data.hf_dataset[i][OBS_STATE] for i in range(batch_size)])).reshape(-1, state)
    mean, std = (torch.as_tensor(data.meta.stats[OBS_STATE][name]).float() for name in ("mean", "std"))
    assert torch.allclose(batch[OBS_STATE], (raw - mean) / std, atol=1e-4)
    first = torch.as_tensor(np.array([data.hf_dataset[i][ACTION] for i in range(batch_size)])).reshape(-1, action)
    assert torch.allclose(post(batch[ACTION][:, 0]), first.float(), atol=1e-3)  # by sample, and not by step
    assert post(policy.select_action(pre(observation(state)))).shape == (1, action)
    assert pre(data[0])[OBS_STATE].shape == (1, state)  # one frame, as `lerobot-pi0 check` takes it
    assert pre(data[0])[ACTION].shape[-1] == action


def test_one_dim_relative(tmp_path):
    """Catches relative actions of one dim that are relative to another sample's state."""
    pre, _ = make_pi0_pre_post_processors(
        tiny_config(CAMERAS[:1], dims=1, use_relative_actions=True, chunk_size=CHUNK, n_action_steps=CHUNK),
        {key: {"mean": torch.zeros(1), "std": torch.ones(1)} for key in (OBS_STATE, ACTION)},
    )
    state, action = torch.tensor([1.0, 10.0, 100.0]), torch.arange(12.0).reshape(3, CHUNK)
    batch = pre({CAMERAS[0]: torch.rand(3, 3, 8, 8), OBS_STATE: state, ACTION: action, "task": ["a"] * 3,
                 "action_is_pad": torch.zeros(3, CHUNK, dtype=torch.bool)})  # fmt: skip
    assert torch.allclose(batch[ACTION][..., 0], action - state[:, None], atol=1e-5)


def test_no_state(tmp_path, caplog):
    """Catches a dataset without `observation.state` that cannot be learnt, whose error names a command that does not
    help; the loss does not depend on a state, and a policy with one does not act without it."""
    data = recorded(tmp_path / "data", state=0)
    with caplog.at_level(logging.WARNING):
        losses, policy, pre, post = trained(data, tmp_path / "policy")
    assert losses.isfinite().all()
    assert "the policy learns from images and the task alone" in caplog.text
    assert post(policy.select_action(pre(observation(None)))).shape == (1, 6)
    with_state = ObservationMaker(tiny_config(CAMERAS[:1]))
    batch = make_batch(cameras=CAMERAS[:1], size=64)
    with pytest.raises(ObservationError, match=r"no 'observation.state' in the batch"):
        with_state({key: x for key, x in batch.items() if key != OBS_STATE}, CPU)


@pytest.mark.parametrize("recipe", ["lerobot", "small"])
def test_a_state_that_is_not_there(tmp_path, recipe):
    """Catches a policy that was trained with a state and acts on zeros, or on some of its dims. The small recipe leaves
    no room for padding, by which policies without a state were told."""
    config = tiny_config(CAMERAS[:1], recipe=recipe)
    config.set_dataset_feature_metadata({OBS_STATE: {"shape": (6,)}, ACTION: {"shape": (6,)}})
    assert (config.max_state_dim == 6) == (recipe == "small")
    made = PI0Policy(config, dataset_stats=stats(6, CAMERAS[:1]))
    made.save_pretrained(tmp_path)
    for pipeline in make_pi0_pre_post_processors(config, stats(6, CAMERAS[:1])):
        pipeline.save_pretrained(tmp_path)
    batch = make_batch(cameras=CAMERAS[:1], size=64)
    for policy in (made.eval(), PI0Policy.from_pretrained(tmp_path)):
        policy.predict_action_chunk(batch)
        with pytest.raises(ObservationError, match=r"no 'observation.state' in the batch"):
            policy.predict_action_chunk({key: x for key, x in batch.items() if key != OBS_STATE})
        with pytest.raises(ObservationError, match=r"has 5 dims.*another robot"):
            policy.predict_action_chunk(batch | {OBS_STATE: batch[OBS_STATE][:, :5]})


def test_a_camera_without_a_name():
    """Catches states of one dim, or pictures without a batch axis, that are only mended or named beside a camera of
    `observation.images`: LeRobot calls a single one `observation.image`."""
    for key in ("observation.image", "observation.images.top"):
        transition = {TransitionKey.OBSERVATION: {key: torch.zeros(5, 3, 8, 8), OBS_STATE: torch.zeros(1, 5)}}
        assert restore_dims(transition)[TransitionKey.OBSERVATION][OBS_STATE].shape == (5, 1)
        sample = {TransitionKey.OBSERVATION: {key: np.zeros((8, 8, 3))}, TransitionKey.COMPLEMENTARY_DATA: {"task": ""}}
        with pytest.raises(ObservationError, match=r"numpy array of shape \(8, 8, 3\)"):
            check_sample(sample)


def test_no_state_to_be_relative_to(tmp_path):
    """Catches actions that are called relative and are absolute, as there is no state: LeRobot's step says nothing."""
    data = recorded(tmp_path / "data", state=0)
    with pytest.raises(ValueError, match=r"use_relative_actions=true needs 'observation.state'.*set it to false"):
        trained(data, tmp_path / "policy", use_relative_actions=True)


def test_depth_cameras(tmp_path, caplog):
    """Catches a depth camera, which lerobot-record writes beside the colours, that stops the training with a message
    about batches; and one that is trained on as if it were colours."""
    data = recorded(tmp_path / "data", depth=True)
    with caplog.at_level(logging.WARNING):
        losses, policy, pre, _ = trained(data, tmp_path / "policy")
    assert losses.isfinite().all()
    assert "depth cameras are left out, because π₀ takes colour images: observation.images.front_depth" in caplog.text
    assert list(policy.config.image_features) == ["observation.images.front"]
    seen = observation(6) | {"observation.images.front_depth": torch.ones(1, 1, 16, 24)}
    noise = torch.zeros(1, CHUNK, 32)
    chunks = [policy.predict_action_chunk(pre(dict(seen)), noise=noise)]
    del seen["observation.images.front_depth"]
    assert torch.equal(chunks[0], policy.predict_action_chunk(pre(dict(seen)), noise=noise))


def processors(dims: int = 6):
    return make_pi0_pre_post_processors(tiny_config(CAMERAS[:1], dims), stats(dims, CAMERAS[:1]))


SPOILT = {
    "no task": (lambda x: x.pop("task"), r"no 'task' in the batch.*Set batch\['task'\]"),
    "task is None": (lambda x: x.update(task=None), r"no 'task' in the batch"),
    "state of 7": (lambda x: x.update({OBS_STATE: torch.zeros(7)}), r"'observation.state' has 7 dims.*have 6.*robot"),
    "state of 1": (lambda x: x.update({OBS_STATE: torch.zeros(1)}), r"'observation.state' has 1 dims.*have 6"),
    "numpy state": (lambda x: x.update({OBS_STATE: np.zeros(6)}), r"numpy array of shape \(6,\).*prepare_observation"),
    "numpy image": (
        lambda x: x.update({CAMERAS[0]: np.zeros((64, 64, 3), np.uint8)}), r"numpy array of shape \(64, 64, 3\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_words_where_lerobots_steps_would_fail(name):
    """Catches an observation whose fault LeRobot's steps find first: KeyError: 'task', sizes of tensors, or 'int' has
    no attribute; and one that torch stretches to the right length in silence."""
    spoil, says = SPOILT[name]
    pre, _ = processors()
    sample = {CAMERAS[0]: torch.rand(3, 64, 64), OBS_STATE: torch.zeros(6), "task": "reach"}
    pre(dict(sample))
    spoil(sample)
    with pytest.raises(ObservationError, match=says):
        pre(sample)


def test_words_about_chunks():
    """Catches advice about the batch axis where the dataset was loaded without delta_timestamps, and where several
    steps of observations are given."""
    make = ObservationMaker(tiny_config(CAMERAS[:1]))
    batch = make_batch(cameras=CAMERAS[:1], size=64)
    with pytest.raises(
        ObservationError, match=re.escape("(batch, steps, dims): load the dataset with the delta_timest")
    ):
        make.actions(batch | {ACTION: batch[ACTION][:, 0]}, CPU)
    for key, many in ((OBS_STATE, batch[OBS_STATE][:, None]), (CAMERAS[0], batch[CAMERAS[0]][:, None])):
        with pytest.raises(ObservationError) as error:
            make(batch | {key: many}, CPU)
        assert "adds the batch dimension" not in str(error.value)
    for key, single in ((OBS_STATE, batch[OBS_STATE][0]), (CAMERAS[0], batch[CAMERAS[0]][0])):
        with pytest.raises(ObservationError, match="LeRobot's preprocessor adds the batch dimension of a single"):
            make(batch | {key: single}, CPU)


def test_numpy_batches_are_taken():
    """Catches whole batches of numpy arrays that are refused with their single observations."""
    pre, _ = processors()
    image, state = np.random.default_rng(0).random((2, 64, 64, 3), np.float32), np.ones((2, 6), np.float32)
    batch = pre({CAMERAS[0]: image, OBS_STATE: state, "task": ["a", "b"]})
    seen = ObservationMaker(tiny_config(CAMERAS[:1]))(batch, CPU)
    assert torch.allclose(seen.images_BNCHW[:, 0], torch.as_tensor(image).permute(0, 3, 1, 2) * 2 - 1)


def test_a_missing_feature_is_not_a_padded_one():
    """Catches statistics that are lost, of a dataset with a state, taken for a dataset without."""
    config = tiny_config(CAMERAS[:1])
    config.input_features[OBS_STATE] = PolicyFeature(FeatureType.STATE, (config.max_state_dim,))
    vector = {"dtype": "float32", "shape": (6,), "names": None}
    meta = type("Meta", (), {"features": {OBS_STATE: vector, ACTION: vector}, "stats": {}})()
    with pytest.raises(ValueError, match=r"no statistics of 'observation.state', which the dataset has"):
        PI0Policy(config, dataset_stats={ACTION: stats()[ACTION]}, dataset_meta=meta)
