"""Verdicts on policies whose faults are known: oracles that see the recorded actions, changed in one way each.

The first joint goes where the instruction says, the second where the camera says, the third where the state says; the
fourth never moves but for its noise. The chunk moves there in a smooth curve.
"""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ACTION, OBS_STATE
from torch.utils.data import default_collate

from lerobot_pi0.tools.evaluation.measure import measure
from lerobot_pi0.tools.evaluation.predictions import spread_over
from lerobot_pi0.tools.folder import Columns

CAMERA, TASKS = "observation.images.front", ("left", "right")
FRAMES, CHUNK, JOINTS = 60, 12, 4
SPREAD = np.array([1.0, 1.0, 1.0, 0.01])
STILL = np.array([False, False, False, True])


class Oracle:
    """What `measure` asks of a Runner: observations of a recording, and a policy that knows where each scene leads."""

    def __init__(self, episodes: int, observations: int, seed: int, policy, idle: bool = False) -> None:
        draw = np.random.default_rng(seed)
        self.seed, self.policy, self.cameras = seed, policy, {CAMERA: CAMERA}
        word, light = np.arange(episodes) % 2, draw.uniform(-1, 1, episodes)
        place = draw.uniform(-1, 1, episodes)
        light = light * 0.002 if idle else light  # the joint moves in training, and rests in what was held out
        goal = np.stack([2.0 * word - 1, 1.5 * light, 1.5 * place, np.zeros(episodes)], axis=1)
        path = 1 - np.cos(np.linspace(0, 3 * np.pi, FRAMES))
        action = goal[:, None] * path[None, :, None] + draw.normal(0, 0.01, (episodes, FRAMES, JOINTS))
        state = np.concatenate([action[:, :1], action[:, :-1]], axis=1)
        episode, frame = (x.ravel() for x in np.mgrid[:episodes, :FRAMES])
        self.columns = Columns(
            state.reshape(-1, JOINTS), action.reshape(-1, JOINTS), frame / 10, episode, frame, word[episode],
            np.arange(episode.size), 0 * episode, 0 * episode,
        )  # fmt: skip
        self.path = np.concatenate([path, np.full(CHUNK, path[-1])])
        self.rows = spread_over(episode, observations)
        self.items = [self._item(int(i), light, place, word) for i in self.rows]
        names = ["pan", "lift", "flex", "still"]
        meta = SimpleNamespace(
            tasks=pd.DataFrame({"task_index": [0, 1]}, index=TASKS), features={ACTION: {"names": names, "shape": (4,)}}
        )
        self.dataset = SimpleNamespace(meta=meta)

    def _item(self, row: int, light, place, word) -> dict:
        episode, frame = int(self.columns.episode[row]), int(self.columns.frame[row])
        steps = np.minimum(np.arange(frame, frame + CHUNK), FRAMES - 1)
        mine = self.columns.action_ND[self.columns.episode == episode]
        return {
            ACTION: torch.from_numpy(mine[steps]), f"{ACTION}_is_pad": torch.arange(frame, frame + CHUNK) >= FRAMES,
            OBS_STATE: torch.from_numpy(np.append(self.columns.state_ND[row], place[episode])),
            CAMERA: torch.tensor([light[episode]]), "task": TASKS[word[episode]], "frame": frame,
            "episode_index": episode,
        }  # fmt: skip

    def chunks(self, change=None, others=None):
        batch = default_collate(self.items)
        if change is not None:
            batch = change(batch, default_collate([self.items[i] for i in others]))
        word = np.array([2.0 * TASKS.index(x) - 1 for x in batch["task"]])
        state = batch[OBS_STATE].numpy()
        place = state[:, -1] if state.shape[1] > JOINTS else np.zeros(len(word))
        scene = np.stack([word, 1.5 * batch[CAMERA].numpy()[:, 0], 1.5 * place, 0 * word], axis=1)
        frames = np.array([item["frame"] for item in self.items])
        held = np.stack([item[OBS_STATE].numpy()[:JOINTS] for item in self.items])
        chunk = self.policy(self.path, frames, scene, held, np.random.default_rng(7))
        return chunk / SPREAD, chunk


def along(path, frames, scene, late: int = 0) -> np.ndarray:
    steps = np.clip(frames[:, None] + np.arange(CHUNK) - late, 0, None)
    return scene[:, None] * path[steps][..., None]


def good(noise):
    return lambda path, frames, scene, held, draw: (
        along(path, frames, scene) + draw.normal(0, noise, (len(scene), CHUNK, JOINTS))
    )


def blind(path, frames, scene, held, draw):
    return along(path, frames, scene * [1, 0, 1, 1])


def deaf(path, frames, scene, held, draw):
    return along(path, frames, scene * [0, 1, 1, 1])


def frozen(path, frames, scene, held, draw):
    return np.broadcast_to(held[:, None], (len(scene), CHUNK, JOINTS)) + 0.0


def constant(path, frames, scene, held, draw):
    return np.full((len(scene), CHUNK, JOINTS), 0.3)


def lagging(path, frames, scene, held, draw):
    return along(path, frames, scene, late=4)


def wild(path, frames, scene, held, draw):
    return along(path, frames, scene[::-1]) + draw.normal(0, 2.0, (len(scene), CHUNK, JOINTS))


EXPECTED = {
    "good": (good(0.06), ["good"]),
    "good, with much noise": (good(0.3), ["good"]),
    "blind": (blind, ["ignores the camera observation.images.front", "ignores the camera front"]),
    "deaf": (deaf, ["ignores the instruction"]),
    "frozen": (frozen, ["barely moves"]),
    "constant": (constant, ["has not learned these movements"]),
    "lagging": (lagging, ["comes too late by about 4 steps"]),
    "wild": (wild, ["has not learned these movements"]),
}


def verdicts_on(policy, episodes: int, observations: int = 64, seed: int = 0, idle: bool = False) -> list[str]:
    content, _ = measure(Oracle(episodes, observations, seed, policy, idle), 0.05, SPREAD, STILL)
    return content["verdicts"]


@pytest.mark.parametrize("episodes", [8, 33, 100])
@pytest.mark.parametrize(("policy", "said"), EXPECTED.values(), ids=EXPECTED)
def test_each_fault_is_named(policy, said, episodes):
    """Catches a fault that a large or small held-out set hides, as one of which first frames alone were looked at."""
    found = [x.split(":")[0] for x in verdicts_on(policy, episodes)]
    assert {*found} & {*said}, found
    assert "good" in said or "good" not in found


@pytest.mark.parametrize(("noise", "rattles"), [(0.002, False), (0.01, False), (0.1, True)])
def test_a_policy_that_rattles_is_named(noise, rattles):
    """Catches a policy that would shake the arm, called good and no more; or one that is as smooth as what it saw."""
    content, _ = measure(Oracle(8, 64, 0, good(noise)), 0.05, SPREAD, STILL)
    found = {x.split(":")[0]: x for x in content["verdicts"]}
    assert ("rattles" in found) == rattles == bool(content["rattling"])
    assert "good" in found
    for x in content["roughness"].values():
        assert x["sampled"] == pytest.approx(20**0.5 * noise, rel=0.15)
        assert x["recorded"] == pytest.approx(20**0.5 * 0.01, rel=0.15)
    if rattles:
        assert re.findall(r"(\w+) \d\.\d", found["rattles"])[:3] == ["pan", "lift", "flex"]
        assert content["roughness"]["pan"]["times"] == pytest.approx(0.1 / np.hypot(0.01, 0.01), rel=0.15)


@pytest.mark.parametrize("seed", range(5))
def test_a_joint_that_rests_in_what_was_held_out(seed):
    """Catches errors in units of the held-out episodes: there this joint's noise would be a hundred deviations."""
    found = verdicts_on(good(0.06), 8, seed=seed, idle=True)
    assert not any(x.startswith("has not learned") for x in found), found


@pytest.mark.parametrize("seed", range(5))
def test_no_verdict_where_nothing_can_be_said(seed):
    """Catches a verdict on two episodes that others would reverse, and one about inputs from a single episode."""
    middling = good(0.75)
    found = verdicts_on(middling, 2, seed=seed)
    assert not any(x.startswith(("good", "has not")) for x in found), found
    assert any(x.startswith("cannot be judged") for x in found)
    alone = verdicts_on(good(0.06), 1, seed=seed)
    assert any(x.startswith("cannot be asked which inputs") for x in alone)
    assert not any(x.startswith("ignores") for x in alone)


@pytest.mark.parametrize("seed", range(20))
def test_a_good_policy_is_never_called_bad(seed):
    """Catches a verdict that chance decides: which episodes were held out, and how many."""
    for episodes in (3, 5, 12):
        found = verdicts_on(good(0.2), episodes, seed=seed)
        assert not any(x.startswith(("has not", "ignores", "barely", "comes too late")) for x in found), found
