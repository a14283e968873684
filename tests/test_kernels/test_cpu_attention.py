"""Attention, fused by torch and written out, beside its formula in float64."""

import pytest
import torch
from conftest import CAMERAS, DIMS, make_batch, shake, small_policy
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from torch.utils.flop_counter import FlopCounterMode

from lerobot_pi0.control import sampling
from lerobot_pi0.kernels import cpu_attention, cpu_linear
from lerobot_pi0.kernels.cpu_attention import attend, attend_by_heads
from lerobot_pi0.network import gemma
from lerobot_pi0.network.attention import KVCache, additive_mask
from lerobot_pi0.network.pi0 import block_mask


@pytest.fixture(params=[True, False], ids=["written out", "fused"])
def fast(request, monkeypatch):
    """As on a CPU with products of bfloat16, whatever this one has (oneDNN then emulates them), and as on another."""
    monkeypatch.setattr(cpu_linear, "BFLOAT16_IS_SLOW", not request.param)


def formula(q, k, v, mask):
    """In float64."""
    q, k, v = (x.double() for x in (q, k, v))
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + mask.double(), dim=-1) @ v


@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("masked", ["all alike", "each its own", "none"])
def test_formula(fast, monkeypatch, masked, rows):
    """Catches a scale, a mask or a block of queries that is wrong, and a softmax that is taken in bfloat16."""
    monkeypatch.setattr(cpu_attention, "SCORES", rows * 2 * 37)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 16, generator=draw).bfloat16() for n in (12, 37, 37))
    visible = torch.rand(2, 1 if masked == "all alike" else 12, 37, generator=draw) < 0.6
    mask = None if masked == "none" else additive_mask(visible, torch.bfloat16)
    with torch.no_grad():
        found = attend(4 * q, KVCache(k, v), mask)
    exact = formula(4 * q, k, v, torch.zeros(1) if mask is None else mask.bias)
    assert found.dtype == torch.bfloat16 and found.shape == q.shape
    assert (found - exact).norm() < 6e-3 * exact.norm()


def test_heads_with_keys_of_their_own(fast):
    """Catches heads that are mixed up with queries."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 9, 3, 8, generator=draw).bfloat16().transpose(1, 2) for _ in range(3))
    with torch.no_grad():
        found = attend_by_heads(q, k, v)
    exact = formula(q, k, v, torch.zeros(1))
    assert found.shape == exact.shape and (found - exact).norm() < 6e-3 * exact.norm()


@pytest.mark.parametrize("rows", [5, 1000])
@pytest.mark.parametrize("masked", ["all alike", "each its own"])
def test_derivative(fast, monkeypatch, masked, rows):
    """Catches a derivative of one of the three that is wrong, or is that of the last block alone."""
    monkeypatch.setattr(cpu_attention, "SCORES", rows * 2 * 37)
    draw = torch.Generator().manual_seed(0)
    shapes = (12, 37, 37)
    inputs = [torch.randn(2, n, 16, generator=draw).bfloat16().requires_grad_() for n in shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    visible = torch.rand(2, 1 if masked == "all alike" else 12, 37, generator=draw) < 0.6
    mask, grad = additive_mask(visible, torch.bfloat16), torch.randn(2, 12, 16, generator=draw).bfloat16()
    attend(inputs[0], KVCache(*inputs[1:]), mask).backward(grad)
    formula(*exact, mask.bias).backward(grad.double())
    for found, wanted in zip(inputs, exact, strict=True):
        assert found.grad.dtype == torch.bfloat16
        assert (found.grad - wanted.grad).norm() < 1.5e-2 * wanted.grad.norm()

    def of_queries(q):
        return attend(q, KVCache(*(x.detach() for x in inputs[1:])), mask)

    pulled = torch.func.vjp(of_queries, inputs[0].detach())[1](grad)[0]
    torch.testing.assert_close(pulled, inputs[0].grad)


@pytest.mark.parametrize("rows", [5, 1000])
@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("trained", [True, False], ids=["past trained", "past frozen"])
def test_samples_behind_a_past(fast, monkeypatch, trained, shared, rows):
    """Catches a sample that sees another's keys, padding, or not all of the past and the shared, a shared that sees
    samples, and gradients that are summed over too few samples, put at other keys or made where none is asked for."""
    heads, past, samples, steps = 3, 7, 4, 5
    new = shared + samples * steps
    monkeypatch.setattr(cpu_attention, "SCORES", rows * 2 * (past + shared + steps))
    draw = torch.Generator().manual_seed(0)
    shapes = {"q": new * heads, "k": new, "v": new, "past_k": past, "past_v": past}
    inputs = {key: torch.randn(2, n, 16, generator=draw).bfloat16() for key, n in shapes.items()}
    exact = {key: x.double().requires_grad_() for key, x in inputs.items()}
    for key, x in inputs.items():
        x.requires_grad_(trained or "past" not in key)
    seen = torch.arange(past) < torch.tensor([[past], [past - 2]])
    visible = block_mask(seen, samples, steps, heads)
    if shared:
        own = torch.zeros(new, new, dtype=torch.bool)
        own[:, :shared] = True
        own[shared:, shared:] = torch.block_diag(*[torch.ones(steps, steps)] * samples).bool()
        own = own.repeat_interleave(heads, dim=0).expand(2, -1, -1)
        visible = torch.cat([seen[:, None].expand(-1, own.shape[1], -1), own], dim=2)
    mask, grad = (
        additive_mask(visible, torch.bfloat16, samples, shared),
        torch.randn(2, new * heads, 16, generator=draw).bfloat16(),
    )

    found = attend(inputs["q"], KVCache(inputs["k"], inputs["v"]), mask, KVCache(inputs["past_k"], inputs["past_v"]))
    keys, values = (torch.cat([exact["past_" + name], exact[name]], dim=1) for name in "kv")
    wanted = formula(exact["q"], keys, values, mask.bias)
    assert (found - wanted).norm() < 6e-3 * wanted.norm()
    found.backward(grad)
    wanted.backward(grad.double())
    for key, x in inputs.items():
        if x.requires_grad:
            assert (x.grad - exact[key].grad).norm() < 1.5e-2 * exact[key].grad.norm(), key
        else:
            assert x.grad is None


def test_scores_are_not_kept():
    """Catches attention that keeps its scores for the backward pass: a small network would not be asked, a full one
    would run out of memory."""
    q, k = torch.randn(1, 400, 8).bfloat16().requires_grad_(), torch.randn(1, 300, 8).bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        attend(q, KVCache(k, k))
    assert max(kept) <= 400 * 8


def test_written_out_only_where_nobody_looks(monkeypatch):
    """Catches attention that is written out where bfloat16 is slow or not meant, or hidden from a counter."""
    monkeypatch.setattr(cpu_linear, "BFLOAT16_IS_SLOW", False)
    fused = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: fused.append(1) or sdpa(*a, **k)
    )
    x = torch.randn(1, 4, 8).bfloat16()
    attend(x.float(), KVCache(x.float(), x.float()))
    with FlopCounterMode(display=False):
        attend(x, KVCache(x, x))
    assert len(fused) == 2
    attend(x, KVCache(x, x))
    assert (len(fused) == 2) == torch.backends.mkldnn.is_available()


@pytest.mark.parametrize("guide", [None, "identity", "vjp", "trained"])
def test_memory_behind_the_context(small, monkeypatch, guide):
    """Catches keys and values that are copied at each step, written to the wrong place, or left from the step before,
    and angles and masks that each step computes again."""
    options = {"rtc_config": RTCConfig(), "rtc_guidance": guide, "rtc_training_max_delay": 9} if guide else {}
    policy = small_policy(**options)
    shake(policy)
    batch, noise = make_batch(0, 2, CAMERAS), torch.randn(2, 50, 32)
    left = {"prev_chunk_left_over": torch.randn(2, 20, DIMS), "inference_delay": 3} if guide else {}

    angles, rotary = [], gemma.rotary_angles
    monkeypatch.setattr(gemma, "rotary_angles", lambda *args: angles.append(1) or rotary(*args))

    def copied() -> tuple[torch.Tensor, int]:
        """A chunk, and how often its steps copied a layer's context."""
        copies, cat = [], torch.cat
        with monkeypatch.context() as patch:
            patch.setattr(
                torch, "cat", lambda xs, dim=0: copies.append(dim == 1 and xs[0].ndim == 3) or cat(xs, dim=dim)
            )
            return policy.predict_action_chunk(batch, noise=noise, **left), sum(copies)

    preallocated, before = copied()
    assert len(angles) == 3  # of the VLM, of the state, and of the actions in all steps
    monkeypatch.setattr(sampling, "preallocate", lambda cache, tokens: list(cache))
    without, every = copied()
    assert torch.equal(preallocated, without)
    steps = 2 * policy.config.num_inference_steps * policy.config.architecture().expert.depth
    assert every - before == (0 if guide == "vjp" else steps)
