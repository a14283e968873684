"""Relative actions: which statistics are refused, and which absolute actions reach the robot."""

import itertools
import queue
import shlex
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ACTION, CAMERAS, DIMS, stats, tiny_config, write_dataset
from lerobot.datasets import LeRobotDataset
from lerobot.policies import make_policy, make_pre_post_processors
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.rollout.inference.rtc import RTCInferenceEngine
from lerobot.rollout.inference.sync import SyncInferenceEngine
from lerobot.scripts import lerobot_edit_dataset
from lerobot.utils.constants import OBS_STATE

from lerobot_pi0 import PI0Policy, make_pi0_pre_post_processors
from lerobot_pi0.configuration_pi0 import choices

CHUNK, CAMERA = 4, CAMERAS[:1]
PATIENCE = 300  # s to wait for LeRobot's thread; only a dead one takes longer
NAMES = [f"joint_{i}" for i in range(DIMS)]


def config_of(**options):
    sizes = {"chunk_size": CHUNK, "n_action_steps": 3, "use_relative_actions": True}
    return tiny_config(CAMERA, **sizes | {"relative_exclude_joints": ["joint_5"]} | options)


def train_on(root, **options) -> PI0Policy:
    """The policy as lerobot-train makes it for this dataset."""
    return make_policy(config_of(**options), ds_meta=LeRobotDataset("test/tiny", root=root).meta)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A dataset as it is recorded: two episodes of six frames."""
    root = tmp_path_factory.mktemp("relative") / "recorded"
    write_dataset(root, cameras=CAMERA)
    return root


def edited(error: Exception, monkeypatch, to) -> None:
    """Run the command that the error names, into the folder `to`."""
    command = shlex.split(str(error).rsplit("train on that: ", 1)[1])
    monkeypatch.setattr("sys.argv", [*command, f"--new_root={to}"])
    lerobot_edit_dataset.main()


@pytest.fixture(scope="module")
def relative(recorded, tmp_path_factory):
    """The same with statistics of relative actions, made by the command of the error."""
    root = tmp_path_factory.mktemp("relative") / "edited"
    with pytest.MonkeyPatch.context() as monkeypatch:
        with pytest.raises(ValueError, match=r"use_relative_actions=true.*absolute") as refused:
            train_on(recorded)
        edited(refused.value, monkeypatch, root)
    return root


def test_the_command_makes_what_is_wanted(relative):
    """Catches a command that LeRobot does not take, or that makes statistics which are refused again."""
    policy = train_on(relative)
    assert policy.config.action_feature_names == NAMES
    data = LeRobotDataset("test/tiny", root=relative)
    columns = {key: torch.stack(list(data.hf_dataset[key])) for key in (ACTION, OBS_STATE)}
    episode = torch.tensor(data.hf_dataset["episode_index"])
    moves = []
    for start in range(len(episode) - CHUNK + 1):
        if episode[start] == episode[start + CHUNK - 1]:
            state = columns[OBS_STATE][start] * (torch.arange(DIMS) < 5)
            moves.append(columns[ACTION][start : start + CHUNK] - state)
    moves = torch.cat(moves).numpy()
    found = data.meta.stats[ACTION]
    np.testing.assert_allclose(found["mean"], moves.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found["std"], moves.std(axis=0), rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"use_relative_actions": False}, "use_relative_actions=false.*of relative"),
        ({"chunk_size": 5}, "24 steps.*chunk_size=5"),
        ({"relative_exclude_joints": []}, "of joint_5 are not"),
        ({"relative_exclude_joints": ["joint_4", "joint_5"]}, "of joint_4 are not"),
        ({"relative_exclude_joints": ["joint_0"]}, "of joint_0, joint_5 are not"),
    ],
)
def test_statistics_of_something_else(relative, tmp_path, monkeypatch, options, problem):
    """Catches statistics of other chunks or joints, which normalise just as silently; the command mends it."""
    with pytest.raises(ValueError, match=problem) as refused:
        train_on(relative, **options)
    edited(refused.value, monkeypatch, tmp_path / "mended")
    train_on(tmp_path / "mended", **options)


def test_absolute_actions_and_their_statistics(recorded):
    """Catches a refusal of what nearly everybody trains on."""
    train_on(recorded, use_relative_actions=False)


def observation(seed: int) -> dict:
    draw = torch.Generator().manual_seed(seed)
    return {
        CAMERA[0]: torch.rand(1, 3, 64, 64, generator=draw),
        OBS_STATE: torch.randn(1, DIMS, generator=draw) * 40,
        "task": "reach",
    }


@pytest.fixture(params=["new", "saved"])
def rollout(request, tmp_path):
    """A policy with relative actions and its processors, as made and as rebuilt from a checkpoint."""
    torch.manual_seed(0)
    config = config_of(action_feature_names=NAMES)
    policy, numbers = PI0Policy(config), stats(cameras=CAMERA)
    pre, post = make_pi0_pre_post_processors(config, numbers)
    if request.param == "saved":
        for part in (policy, pre, post):
            part.save_pretrained(tmp_path)
        policy = PI0Policy.from_pretrained(tmp_path)
        pre, post = make_pre_post_processors(policy.config, pretrained_path=str(tmp_path))
    return policy, pre, post, numbers[ACTION]


def by_hand(policy, pre, observations, noises, numbers) -> list[torch.Tensor]:
    """Absolute actions of a rollout: each relative to the state in which its chunk began."""
    actions = []
    for tick, seen in enumerate(observations):
        if tick % 3 == 0:
            chunk = policy.predict_action_chunk(pre(dict(seen)), noise=noises[tick // 3])[0]
            start = seen[OBS_STATE][0] * (torch.arange(DIMS) < 5)
        actions.append(chunk[tick % 3] * numbers["std"] + numbers["mean"] + start)
    return actions


def test_sync_rollout(rollout, monkeypatch):
    """Catches actions of a chunk that are added to the state of the tick in which they are executed."""
    policy, pre, post, numbers = rollout
    observations, noises = [observation(i) for i in range(7)], torch.randn(3, 1, CHUNK, 32)
    expected = by_hand(policy, pre, observations, noises, numbers)
    draws = iter(noises)
    monkeypatch.setattr("lerobot_pi0.network.flow.sample_noise", lambda *args: next(draws))
    features = {ACTION: {"dtype": "float32", "shape": (DIMS,), "names": NAMES}}
    engine = SyncInferenceEngine(policy, pre, post, features, NAMES, "reach", "cpu", "so100")
    for seen, action in zip(observations, expected, strict=True):
        frame = {CAMERA[0]: (seen[CAMERA[0]][0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()}
        frame[OBS_STATE] = seen[OBS_STATE][0].numpy()
        found = engine.get_action(frame)
        torch.testing.assert_close(found, action, rtol=1e-2, atol=0.2)  # images of 8 bits
        assert (found - action).abs().max() < 0.2


def test_lerobot_evals_loop(rollout, monkeypatch):
    """Catches the same in the loop of lerobot-eval, exactly, and an anchor that survives the end of an episode."""
    policy, pre, post, numbers = rollout
    draws = torch.randn(4, 1, CHUNK, 32)
    for episode in range(2):
        observations = [observation(10 * episode + i) for i in range(5)]
        noises = draws[2 * episode : 2 * episode + 2]
        expected = by_hand(policy, pre, observations, noises, numbers)
        queue = iter(noises)
        monkeypatch.setattr("lerobot_pi0.network.flow.sample_noise", lambda *args, queue=queue: next(queue))
        policy.reset()
        for seen, action in zip(observations, expected, strict=True):
            found = post(policy.select_action(pre(dict(seen))))
            torch.testing.assert_close(found[0], action, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("guide", choices("rtc_guidance"))
def test_rtc_rollout(guide, monkeypatch):
    """Catches left-over actions that stay relative to the old chunk's state, and actions that are added to another
    state than that of their chunk, in LeRobot's engine for real-time chunking.

    Each inference takes 40 ms of the engine's clock, less than a tick. The second one ends after the ticks that the
    test compares, however long it really takes.
    """
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: 0.04 * next(ticks), sleep=time.sleep)
    monkeypatch.setattr("lerobot.rollout.inference.rtc.time", clock)
    torch.manual_seed(0)
    names = [f"{name}.pos" for name in NAMES]
    delay = {"rtc_training_max_delay": 3} if guide == "trained" else {}
    config = config_of(action_feature_names=names, chunk_size=12, rtc_guidance=guide, num_inference_steps=2, **delay)
    policy, numbers = PI0Policy(config), stats(cameras=CAMERA)
    pre, post = make_pi0_pre_post_processors(config, numbers)
    policy.config.rtc_config = RTCConfig(execution_horizon=6)
    policy.init_rtc_processor()
    calls: queue.Queue = queue.Queue()
    predict, first_is_executed = policy.predict_action_chunk, threading.Event()

    def noted(batch, **kwargs):
        chunk = predict(batch, **kwargs)
        if kwargs.get("prev_chunk_left_over") is not None:
            assert first_is_executed.wait(PATIENCE)
        calls.put((kwargs.get("prev_chunk_left_over"), chunk[0]))
        return chunk

    monkeypatch.setattr(policy, "predict_action_chunk", noted)
    camera = CAMERA[0].removeprefix("observation.images.")
    shown = {CAMERA[0]: {"dtype": "image", "shape": (64, 64, 3), "names": ["height", "width", "channels"]}}
    shown[OBS_STATE] = {"dtype": "float32", "shape": (DIMS,), "names": names}
    robot = SimpleNamespace(robot_type="so100", action_features=dict.fromkeys(names, float))
    engine = RTCInferenceEngine(
        policy, pre, post, robot, policy.config.rtc_config, shown, "reach", 20.0, "cpu", rtc_queue_threshold=9
    )

    def seen(state: torch.Tensor) -> dict:
        return dict(zip(names, state.tolist(), strict=True)) | {camera: np.full((64, 64, 3), 100, np.uint8)}

    def action() -> torch.Tensor:
        deadline = time.monotonic() + PATIENCE
        while (found := engine.get_action(None)) is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return found

    mean, std, moves = numbers[ACTION]["mean"], numbers[ACTION]["std"], (torch.arange(DIMS) < 5).float()
    states = [torch.arange(DIMS) * 3.0, torch.arange(DIMS) * 3.0 + 5]
    engine.start()
    engine.resume()
    try:
        engine.notify_observation(seen(states[0]))
        _, first = calls.get(timeout=PATIENCE)
        expected = first * std + mean + states[0] * moves
        executed = [action()]
        engine.notify_observation(seen(states[1]))
        executed += [action() for _ in range(3)]
        begin = int((expected - executed[0]).abs().amax(dim=1).argmin())
        torch.testing.assert_close(torch.stack(executed[:3]), expected[begin : begin + 3], rtol=1e-4, atol=1e-3)
        first_is_executed.set()
        left, second = calls.get(timeout=PATIENCE)
    finally:
        first_is_executed.set()
        engine.stop()
    again = (expected - states[1] * moves - mean) / std  # what is left, relative to where the new chunk begins
    gaps = [(left[:3] - again[k : k + 3]).abs().max() for k in range(1, 10)]
    assert min(gaps) < 1e-3
    queued = engine.get_action(None)
    expected = second * std + mean + states[1] * moves
    assert queued is not None
    assert (expected - queued).abs().amax(dim=1).min() < 1e-3


def test_bounded_rollout(rollout, tmp_path):
    """Catches a bound of the distance to the measured joints that takes the chunk's state for the one of the tick."""
    policy, pre, post, _ = rollout
    for part in (policy, pre, post):
        part.save_pretrained(tmp_path / "bounded")
    policy.config.max_action_step = 0.5
    policy = PI0Policy.from_pretrained(tmp_path / "bounded", config=policy.config)
    for tick in range(7):
        seen = observation(tick)
        found = post(policy.select_action(pre(dict(seen))))
        assert (found - seen[OBS_STATE]).abs().max() < 0.5 + 1e-3
