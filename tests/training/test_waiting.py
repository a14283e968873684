"""Runs that wait for data."""

import logging

import pytest
from conftest import CAMERAS, make_batch, small_policy

from lerobot_pi0.training import waiting
from lerobot_pi0.training.waiting import STEPS, Waiting


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("wait", "pause", "warned"), [(0.3, 0.0, 1), (0.05, 0.0, 0), (0.05, 60.0, 0)])
def test_a_run_that_waits_longer_than_it_computes_says_so_once(caplog, wait, pause, warned):
    """Catches silence about a slow reader, a warning at every step, and checkpoints that are taken for waiting."""
    clock = Clock()
    watch = Waiting(clock)
    for step in range(3 * STEPS):
        clock.now += wait + pause * (step % 20 == 0)
        watch.begin()
        clock.now += 0.1
        watch.end()
    said = [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING]
    assert len(said) == warned
    assert all("300 ms before each step of 100 ms" in x and "convert_image_to_video" in x for x in said)


def test_the_policy_tells_when_a_step_begins_and_ends(small, monkeypatch):
    """Catches a policy that never asks, or takes held-out batches for steps."""
    calls = []
    monkeypatch.setattr(waiting.Waiting, "begin", lambda self: calls.append("begin"))
    monkeypatch.setattr(waiting.Waiting, "end", lambda self: calls.append("end"))
    policy, batch = small_policy(CAMERAS[:1]).train(), make_batch(cameras=CAMERAS[:1])
    policy(batch)
    policy.update()
    policy.eval()(batch)
    assert calls == ["begin", "end"]
