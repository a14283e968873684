"""Roughness of sampled chunks beside recorded ones, against laws of third differences."""

import math

import pytest
import torch
from torch import Tensor

from lerobot_pi0.inputs.smoothness import HARMLESS_NOISE, Roughness, roughness

JOINTS = ["pan", "lift", "grip"]


def everything(chunk: Tensor) -> Tensor:
    """All steps of these chunks count."""
    return torch.ones(chunk.shape[:2], dtype=torch.bool)


def noise(*shape: int, deviation: float = 1.0) -> Tensor:
    """Independent noise on each step, in float64."""
    return deviation * torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_polynomials():
    """Catches differences of another order: a parabola has none of the third, a cubic has 6 times its factor."""
    t = torch.arange(12.0)
    chunk = torch.stack([3 + 2 * t, t**2, 0.5 * t**3], dim=-1)[None]
    found = roughness(chunk, torch.zeros_like(chunk), everything(chunk))
    assert found.sampled == pytest.approx([0, 0, 3], abs=1e-9)
    assert found.recorded == [0, 0, 0]
    assert found.differences == 9


def test_noise_has_the_root_of_twenty_of_its_deviation():
    """Catches a mean over other than chunks and steps, and joints that are mixed."""
    chunk = noise(400, 50, 3) * torch.tensor([1.0, 0.1, 3.0])
    found = roughness(chunk, chunk / 2, everything(chunk))
    assert found.sampled == pytest.approx([math.sqrt(20), 0.1 * math.sqrt(20), 3 * math.sqrt(20)], rel=0.02)
    assert found.recorded == pytest.approx([x / 2 for x in found.sampled])


def test_steps_after_the_end_do_not_count():
    """Catches the stop at an episode's end, which nobody recorded, counted as jerk."""
    chunk = noise(2, 10, 3)
    valid = everything(chunk)
    valid[0, 6:] = False
    wild = chunk.clone()
    wild[0, 6:] += 1e3
    first, second = roughness(chunk[:1, :6], chunk[:1, :6], valid[:1, :6]), roughness(chunk[1:], chunk[1:], valid[1:])
    found = roughness(wild, wild, valid)
    assert found.differences == 3 + 7
    assert found.sampled == pytest.approx((first + second).sampled)


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_chunks_without_a_third_difference(steps: int):
    """Catches an error or NaN where chunks are short, or end at once."""
    chunk = noise(2, steps, 3)
    found = roughness(chunk, chunk, torch.zeros(2, steps, dtype=torch.bool))
    assert found.sampled == found.recorded == found.ratios([1, 1, 1]) == [0, 0, 0]
    assert found.rattling(JOINTS, [1, 1, 1]) == []


def test_batches_add_up():
    """Catches a mean of means: batches of unlike size would weigh the same."""
    sampled, recorded = noise(7, 9, 3), noise(7, 9, 3).flip(0)
    valid = noise(7, 9, 1)[..., 0] > -1.5
    parts = [roughness(sampled[s], recorded[s], valid[s]) for s in (slice(0, 2), slice(2, 7))]
    total, whole = parts[0] + parts[1], roughness(sampled, recorded, valid)
    assert total.differences == whole.differences
    assert total.sampled == pytest.approx(whole.sampled)
    assert total.recorded == pytest.approx(whole.recorded)


def test_a_joint_that_rattles_is_named():
    """Catches a verdict over the mean of the joints, and one on a joint that stands still but for a hair."""
    t = torch.arange(20.0, dtype=torch.float64)
    recorded = torch.stack([torch.sin(t), torch.sin(t / 3), torch.zeros(20)], dim=-1).expand(50, 20, 3)
    sampled = recorded + noise(50, 20, 3) * torch.tensor([0.01, 0.1, HARMLESS_NOISE])
    found = roughness(sampled, recorded, everything(recorded))
    assert found.rattling(JOINTS, [1, 1, 1]) == ["lift"]
    assert found.ratios([1, 1, 1])[2] == pytest.approx(1, rel=0.1)
    assert found.rattling(JOINTS, [1, 1, 0.2]) == ["lift", "grip"]


def test_a_smoother_chunk_than_the_recorded_one():
    """Catches a distance in place of a ratio: chunks that are smoother than a person's hand do not rattle."""
    one = torch.ones(3, dtype=torch.float64)
    assert Roughness(one * 0.01, one, 1).ratios([0, 0, 0]) == pytest.approx([0.1] * 3)
