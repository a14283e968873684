"""Kernels on and off: the same network, and in float32 the same numbers."""

import pytest
import torch
from conftest import assert_gradients_close, draws, gradients, make_batch, relative, shake, small_policy
from lerobot.policies.rtc.configuration_rtc import RTCConfig

from lerobot_pi0 import PI0Policy, kernels

pytestmark = pytest.mark.usefixtures("small")
PLAIN = {faster: plain for plain, faster in kernels.FASTER.items()}


def pair(**options) -> tuple[PI0Policy, PI0Policy]:
    """A policy with its kernels, and one of equal weights without them."""
    policies = []
    for _ in range(2):
        torch.manual_seed(0)
        policies.append(small_policy(**options))
        shake(policies[-1])
    for module in policies[1].model.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    return policies[0], policies[1]


def test_every_layer_is_replaced_once():
    """Catches a kind of layer that is forgotten, one that is replaced by a class with other parameters, and a second
    `install` that replaces what is there."""
    fast, plain = pair()
    kinds = [
        {type(m) for part in (p.model.vision, p.model.vlm, p.model.expert) for m in part.modules()}
        for p in (fast, plain)
    ]
    assert kinds[0] - kinds[1] == set(PLAIN) and kinds[1] - kinds[0] == set(kernels.FASTER)
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in plain.named_parameters()]
    before = [type(m) for m in fast.model.modules()]
    kernels.install(fast.model)
    assert [type(m) for m in fast.model.modules()] == before


@pytest.mark.parametrize("guide", [None, "identity", "vjp", "trained"])
def test_chunks(guide):
    """Catches a kernel that takes part in float32, where its arithmetic is torch's: bitwise; in bfloat16 within its
    rounding."""
    options = {"rtc_config": RTCConfig(), "rtc_guidance": guide, "rtc_training_max_delay": 9} if guide else {}
    left = {"prev_chunk_left_over": torch.randn(20, 6), "inference_delay": 3} if guide else {}
    batch, (noise, _) = make_batch(), draws(0, 2)
    for dtype in ("float32", "bfloat16"):
        chunks = [p.predict_action_chunk(batch, noise=noise[:, 0], **left) for p in pair(dtype=dtype, **options)]
        assert relative(*chunks) < 5e-2
        assert dtype == "bfloat16" or torch.equal(*chunks)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("samples", [1, 3])
def test_training(frozen, samples):
    """Catches a loss or a gradient that depends on the kernels in float32, and one that is wrong in bfloat16."""
    batch, (noise, time) = make_batch(), draws(0, 2, samples)
    for dtype in ("float32", "bfloat16"):
        policies = pair(dtype=dtype, train_expert_only=frozen, flow_samples=samples)
        losses = [p.losses(batch, noise, time) for p in policies]
        for loss in losses:
            loss.mean().backward()
        fast, plain = (gradients(p) for p in policies)
        if dtype == "float32":
            assert torch.equal(*losses) and all(torch.equal(fast[name], plain[name]) for name in plain)
        assert relative(*(loss.detach() for loss in losses)) < 5e-2
        assert_gradients_close(
            {k: v.float() for k, v in fast.items()}, {k: v.float() for k, v in plain.items()}, tolerance=0.2
        )
