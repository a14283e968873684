"""Random weights of a network without a checkpoint."""

import pytest
import torch

from lerobot_pi0.network.init import DRAWN_AT_ONCE, draw_normal


def test_bfloat16_draws_are_float32_draws_rounded():
    """Catches torch's own bfloat16 draws on CPUs: nothing beyond 3.4 deviations, where a million reach about 4.9."""
    drawn = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        drawn[dtype] = torch.empty(32, DRAWN_AT_ONCE, dtype=dtype)
        draw_normal(drawn[dtype], 0.5)
    assert torch.equal(drawn[torch.bfloat16], drawn[torch.float32].bfloat16())
    assert drawn[torch.bfloat16].float().std().item() == pytest.approx(0.5, rel=5e-3)
    assert 4.5 * 0.5 < drawn[torch.bfloat16].abs().max() < 6 * 0.5
    left = torch.full((DRAWN_AT_ONCE + 3,), float("nan"), dtype=torch.bfloat16)
    draw_normal(left, 1.0)
    assert left.isfinite().all()
