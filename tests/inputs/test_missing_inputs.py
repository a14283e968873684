"""Inputs that a dataset, robot or environment does not have: what LeRobot's own π₀ takes, this one takes too."""

import logging

import pytest
import torch
from conftest import CAMERAS, make_batch, tiny_config

from lerobot_pi0.inputs.observation import ObservationMaker

CPU = torch.device("cpu")


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
