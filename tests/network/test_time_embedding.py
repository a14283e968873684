"""The angles of the time embedding without float64."""

import math

import torch

from lerobot_pi0.network import time_embedding


def test_sines_are_those_of_float64():
    """Catches angles in plain float32, which are off by 1e-4 where a period is 4 ms, and whole turns taken wrongly."""
    width, least, most = 1024, 4e-3, 4.0
    time = torch.cat([torch.linspace(0, 1, 4001), torch.rand(4000, generator=torch.Generator().manual_seed(0))])
    period = time_embedding.periods(width, least, most, torch.device("cpu"))
    exact = time[:, None].double() * (2 * math.pi / period)
    found = time_embedding.angles(time, time_embedding.frequency_parts(width, least, most))
    assert found.dtype == torch.float32
    for function in (torch.sin, torch.cos):
        assert (function(found) - function(exact)).abs().max() < 1e-6
    plain = time[:, None] * (2 * math.pi / period).float()
    assert (plain.sin() - exact.sin()).abs().max() > 2e-5
