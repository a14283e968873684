"""`lerobot-pi0 open-loop` compares the two ways in which pictures shrink."""

import numpy as np
import pytest
from test_open_loop import data, logs, make_policy, open_loop, presets, save  # noqa: F401  fixtures among them

from lerobot_pi0.tools.evaluation import measure


@pytest.mark.parametrize("used", ["lerobot", "openpi"])
def test_both_ways(data, tmp_path, used, monkeypatch):  # noqa: F811
    """Catches a comparison of one way with itself, or a report whose other numbers are of another way than its own."""
    policy, asked = make_policy(), []
    policy.config.image_resize = used
    save(policy, tmp_path / "policy")
    chunks = measure.Runner.chunks

    def noted(runner, *arguments):
        asked.append(runner.config.image_resize)
        return chunks(runner, *arguments)

    monkeypatch.setattr(measure.Runner, "chunks", noted)
    content = open_loop(tmp_path / "policy", data, tmp_path / "report", "--observations=4")
    assert content["error by resizing"].keys() == {"lerobot", "openpi"}
    assert content["error by resizing"][used] == content["error"]["policy"]
    assert np.isfinite(list(content["error by resizing"].values())).all()
    assert asked[-1] != used and {*asked[:-1]} == {used}
