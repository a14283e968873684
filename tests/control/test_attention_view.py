"""What the actions look at in the Rerun window of `lerobot-rollout`, with a stand-in for Rerun."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CAMERAS, stats, tiny_config
from lerobot.utils import rerun_visualization
from lerobot.utils.constants import OBS_STATE

from lerobot_pi0 import PI0Policy, make_pi0_pre_post_processors
from lerobot_pi0.control.attention_view import OPAQUE, lines, tint

FRONT = CAMERAS[:1]


class Rerun:
    """The functions of the package rerun that are called, and what they got."""

    def __init__(self, recording: object) -> None:
        self.logged: dict[str, object] = {}
        self.sent: list[list] = []
        self.get_global_data_recording = lambda: recording
        self.Image = lambda image, draw_order: image
        self.TextDocument = str
        self.blueprint = SimpleNamespace(
            TextDocumentView=lambda origin, name: origin, Grid=lambda *views: [*views], Blueprint=lambda grid: grid
        )
        self.send_blueprint = self.sent.append

    def log(self, place: str, what: object, static: bool) -> None:
        assert static  # as LeRobot's pictures are: only the newest is kept
        self.logged[place] = what


@pytest.fixture
def act(monkeypatch):
    """Sample two chunks for one picture of 48 x 64 pixels and the words "reach it", with this rerun in the process."""

    def run(rerun, **options) -> torch.Tensor:
        torch.manual_seed(0)
        policy = PI0Policy(tiny_config(FRONT, num_inference_steps=2, **options))
        preprocess, _ = make_pi0_pre_post_processors(policy.config, stats(cameras=FRONT))
        draw = torch.Generator().manual_seed(1)
        observation = {FRONT[0]: torch.rand(3, 48, 64, generator=draw), OBS_STATE: torch.zeros(6), "task": "reach it"}
        if rerun is not None:
            monkeypatch.setitem(sys.modules, "rerun", rerun)
        noise = torch.randn(1, policy.config.chunk_size, policy.config.max_action_dim, generator=draw)
        first, second = (policy.predict_action_chunk(preprocess(observation), noise=noise) for _ in range(2))
        assert torch.equal(first, second)
        return second

    return run


def test_what_is_shown(act, monkeypatch):
    """Catches heat that lies beside LeRobot's picture, words without weights, a chunk that differs, and a window
    that is arranged anew at each chunk."""
    views = SimpleNamespace(root_container=SimpleNamespace(contents=("observation.front",)))
    monkeypatch.setattr(rerun_visualization.log_rerun_data, "blueprint", views, raising=False)
    rerun = Rerun(object())
    assert torch.equal(act(rerun, show_attention=True), act(None))
    heat = rerun.logged.pop("observation.front/attention")
    assert heat.shape == (48, 64, 4) and heat[..., 3].max() == round(255 * OPAQUE)
    shares, _, *found = rerun.logged.pop("attention").splitlines()
    assert shares.startswith("front ") and not rerun.logged
    assert [line.split()[1] for line in found] == ["reach", "it", "↵", "</s>"]
    assert sum(int(line.split("%")[0]) for line in found) == pytest.approx(100, abs=2)
    assert rerun.sent == [["observation.front", "attention"]]


def test_nothing_is_recorded_without_the_option(act):
    """Catches a recording that costs time though nobody asked for it."""
    rerun = Rerun(object())
    act(rerun)
    assert not rerun.logged and not rerun.sent


@pytest.mark.parametrize("rerun", [None, Rerun(None)], ids=["no rerun", "no window"])
def test_without_a_window(act, rerun, caplog, monkeypatch):
    """Catches an option that stops the robot, or is silent, where nobody opened a window."""
    monkeypatch.delitem(sys.modules, "rerun", raising=False)
    chunk = act(rerun, show_attention=True)
    assert chunk.isfinite().all() and caplog.text.count("--display_data=true") == 1
    assert rerun is None or not rerun.logged


def test_a_layer_of_heat():
    """Catches heat that hides pictures where there is none, or is drawn beyond its strongest."""
    layer = tint(np.array([[0.0, 0.5, 1.0, 2.0]]), 1.0)
    assert layer[0, :, 3].tolist() == [0, round(255 * OPAQUE / 2), round(255 * OPAQUE), round(255 * OPAQUE)]
    assert tint(np.zeros((1, 1)), 0.0)[0, 0, 3] == 0


def test_lines_of_words():
    """Catches parts that are of all attention and not of the words', and a line break that breaks a line."""
    assert lines([("red", 0.03), ("\n", 0.01)]) == "75%  red\n25%  ↵"
