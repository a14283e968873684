"""Right alarms of `lerobot-pi0 check`: each fault of a recording is found, and noise and other units are no fault."""

import logging

import numpy as np
import pytest
from conftest import ACTION, DIMS, OBS_STATE
from lerobot.datasets import LeRobotDataset
from tools.test_check import SCRATCH, findings, serious

from lerobot_pi0.tools.checks.noise import never_moves, noise_deviation, noise_of

CAMERA = "observation.images.front"
FPS = 10


@pytest.fixture(autouse=True)
def logs(monkeypatch, caplog) -> None:
    """The command sets logging up anew, which would take it away from pytest."""
    monkeypatch.setattr("lerobot_pi0.tools.init_logging", lambda: None)
    caplog.set_level(logging.INFO, "lerobot_pi0")


def joints(episode: int, i: int, length: int) -> np.ndarray:
    """A motion there and back in degrees, with an encoder's noise; the gripper opens and closes from 0 to 850."""
    draw = np.random.default_rng(1000 * episode + i)
    path = np.sin(np.pi * i / length) ** 2
    values = 40 * np.cos(np.arange(DIMS) + 0.3 * episode) * path + draw.normal(0, 0.02, DIMS)
    values[-1] = 850.0 * (0.3 < i / length < 0.6)
    return values


def same(values, episode, i):
    return values


def build(
    root, change=same, act=same, picture=None, episodes: int = 6, length=lambda e: 40, video: bool = False
) -> None:
    """Six episodes; `change` alters states and actions, `act` actions alone, and `picture` pictures."""
    names = [f"joint_{i}.pos" for i in range(DIMS - 1)] + ["gripper.pos"]
    vector = {"dtype": "float32", "shape": (DIMS,), "names": names}
    image = {"dtype": "video" if video else "image", "shape": (64, 64, 3), "names": ["height", "width", "channels"]}
    columns = {OBS_STATE: vector, ACTION: vector, CAMERA: image}
    dataset = LeRobotDataset.create("test/alarms", fps=FPS, features=columns, root=root, use_videos=video)
    for episode in range(episodes):
        for i in range(length(episode)):
            state, action = (change(joints(episode, j, length(episode)), episode, j) for j in (i, i + 1))
            action = act(action, episode, i)
            shown = np.full((64, 64, 3), (180, 110, 60), np.uint8)
            shown[:, (3 * i + 7 * episode) % 56 :][:, :8] = 255
            if picture is not None:
                shown = picture(shown, episode, i)
            frame = {OBS_STATE: state.astype(np.float32), ACTION: action.astype(np.float32), CAMERA: shown}
            dataset.add_frame(frame | {"task": "reach the cube"})
        dataset.save_episode()
    dataset.finalize()


def said(capsys, root, *more: str) -> dict[str, str]:
    return serious(findings(capsys, root, "--policy.type=pi0", *SCRATCH, *more)[1])


def test_a_good_recording(tmp_path, capsys):
    """Catches a false alarm about noise, a gripper of another unit, or episodes of usual lengths."""
    build(tmp_path / "data", length=lambda e: 30 + 5 * (e % 3))
    assert said(capsys, tmp_path / "data") == {}


def put(joint, value, when):
    def change(values, episode, i):
        if when(episode, i):
            values[joint] = value(values[joint]) if callable(value) else value
        return values

    return change


def held(values, episode, i):
    """Stands still but for its noise from the middle of each episode on, as an operator who waits."""
    return values if i < 14 else joints(episode, 14, 40) + 0.02 * (np.arange(DIMS) == i % DIMS)


def hung(values, episode, i):
    """A leader that hangs in the middle of an episode, while the follower goes on."""
    return joints(3, 13, 40) if episode == 3 and i >= 12 else values


def elsewhere(values, episode, i):
    values[:3] += 60.0 * (episode >= 15)
    return values


def noisy(values, episode, i):
    values[2] = 152.5 + np.random.default_rng(77 * episode + i).normal(0, 0.01)
    return values


ALARMS = {
    "it stands still": ({"change": held}, "warning idle", "stands still in"),
    "the leader hangs": (
        {"act": hung}, "warning idle", "action is repeated while the arm moves: episode 3 from frame 13 (2.7 s)",
    ),
    "a jump and back": (
        {"change": put(1, 170.0, lambda e, i: (e, i) == (2, 20))}, "warning jumps", "joint_1.pos in episode 2",
    ),
    "a joint at its limit": (
        {"change": put(0, lambda x: min(x, 9.0), lambda e, i: True)}, "warning limits", "joint_0.pos at its largest",
    ),
    "a long episode": ({"length": lambda e: 400 if e == 3 else 40}, "warning episodes", "much longer than the median"),
    "a short episode": ({"length": lambda e: 9 if e == 3 else 40}, "warning episodes", "much shorter than the median"),
    "a drift": ({"change": elsewhere, "episodes": 20}, "warning drift", "joint_0.pos by"),
    "a joint of noise": ({"change": noisy}, "warning constant", "joint_2.pos (changes by"),
}  # fmt: skip


@pytest.mark.parametrize(("how", "about", "expected"), ALARMS.values(), ids=ALARMS)
def test_alarm(tmp_path, capsys, how, about, expected):
    """Catches a fault of the demonstrations that is not found, and one that raises other alarms beside."""
    build(tmp_path / "data", **how)
    found = said(capsys, tmp_path / "data")
    assert expected in found.pop(about, ""), found
    assert not [x for x in found if x.startswith("error")], found


def test_small_motions_in_a_video(tmp_path, capsys):
    """Catches changes that a video codec leaves out, and that are taken for a camera that is slower than the fps."""
    build(tmp_path / "data", picture=small_steps, video=True)
    assert "warning images" not in said(capsys, tmp_path / "data")


def test_a_still_joint_has_the_statistics_that_lerobot_gives_it(tmp_path, capsys):
    """Catches an error about float32's rounding, which recomputing the statistics cannot cure."""
    build(tmp_path / "data", change=noisy)
    assert "error statistics" not in said(capsys, tmp_path / "data")


def small_steps(shown, episode, i):
    """A bar that follows the first joint, which is slow at the beginning and at the end of its motion."""
    shown[:] = (180, 110, 60)
    at = int(joints(episode, i, 40)[0] / 2) % 48
    shown[20:44, at : at + 8] = 220
    return shown


def black(shown, episode, i):
    return shown // 40 if episode == 7 and i >= 12 else shown


def frozen(shown, episode, i):
    if episode == 7 and i >= 12:
        shown[:] = (180, 110, 60)
    return shown


@pytest.mark.parametrize(("picture", "expected"), [(black, "is black"), (frozen, "is frozen")], ids=["black", "frozen"])
def test_one_episode_of_many(tmp_path, capsys, picture, expected):
    """Catches a camera that fails in an episode of which, with few --images, no run of frames is looked at."""
    build(tmp_path / "data", picture=picture, episodes=10)
    found = said(capsys, tmp_path / "data", "--images=40")
    assert f"{expected}" in found["error images"] and "episode 7 from frame 1" in found["error images"]


def test_noise():
    """Catches noise that counts as motion, and a smooth motion that counts as noise."""
    draw = np.random.default_rng(0)
    time = np.arange(600)
    episode = time // 200
    values = np.stack([draw.normal(152.5, 0.01, 600), 90 * np.sin(time / 40), 850.0 * (time % 200 > 90)], axis=1)
    assert noise_deviation(values, episode)[0] == pytest.approx(0.01, rel=0.2)
    assert noise_deviation(values, episode)[1] < 0.05
    assert never_moves(values, episode).tolist() == [True, False, False]
    steps = np.abs(np.diff(values, axis=0)) > noise_of(values, episode)
    assert steps[:, 0].mean() < 0.001 and steps[:, 2].any()
    radians = values * [1, np.pi / 180, 1]
    assert never_moves(radians[:, 1:], episode).tolist() == [False, False]
