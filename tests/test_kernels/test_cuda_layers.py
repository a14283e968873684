"""Layers in fewer launches, on the CPU in the place of a GPU."""

import copy

import pytest
import torch
from conftest import draws, make_batch, relative, shake, small_policy

from lerobot_pi0 import kernels
from lerobot_pi0.kernels import cuda_layers


@pytest.fixture
def gpu(small, monkeypatch):
    """Small presets, and the CPU in the place of a GPU."""
    monkeypatch.setattr(cuda_layers, "ON", ("cuda", "cpu"))


def chunk(policy):
    return policy.predict_action_chunk(make_batch(batch_size=2, prompt=(9, 5)), noise=draws(0, 2)[0][:, 0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks(small, monkeypatch, dtype):
    """Catches a fused layer that computes something else (a residual lost, queries turned by another's angle, the
    state's token seen by nobody); bfloat16 is as near to float32 as the plain layers are."""
    policy = small_policy(num_inference_steps=3)
    shake(policy)
    exact = chunk(policy)
    policy.to(getattr(torch, dtype))
    policy.config.dtype = dtype
    plain = chunk(policy)
    monkeypatch.setattr(cuda_layers, "ON", ("cuda", "cpu"))
    split = chunk(policy)
    kernels.join(policy.model)
    whole = chunk(policy)
    assert not torch.equal(split, plain)  # or the plain layers have answered
    if dtype == "float32":
        assert relative(split, exact) < 1e-5 and relative(whole, exact) < 1e-5
    else:
        assert relative(split, exact) < 1.5 * relative(plain, exact)
        assert relative(whole, exact) < 1.5 * relative(plain, exact)


def attention_of(policy):
    attention = policy.model.expert.layers[0].self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def test_weights_side_by_side(gpu):
    """Catches a join that changes numbers or names, that nobody uses, or that goes on being used when it no longer
    holds: a weight that was swapped, a copy of the policy."""
    policy = small_policy()
    shake(policy)
    before = {name: x.clone() for name, x in policy.state_dict().items()}
    policy.to(torch.float64).to(torch.float32)  # each weight in memory of its own
    assert cuda_layers.joined(attention_of(policy)) is None
    kernels.join(policy.model)
    after = policy.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    whole = cuda_layers.joined(attention_of(policy))
    assert torch.equal(whole, torch.cat([layer.weight for layer in attention_of(policy)]))
    other = copy.deepcopy(policy)
    shake(other, seed=1)
    assert relative(chunk(other), chunk(policy)) > 1e-3
    k_proj = attention_of(policy)[1]
    k_proj.weight.data = k_proj.weight.data.clone()
    assert cuda_layers.joined(attention_of(policy)) is None


def test_weights_of_the_same_rows_elsewhere(gpu):
    """Catches neighbours in another order, and a gap between them, taken for one weight."""
    layers = [kernels.Linear(8, 4, bias=False) for _ in range(2)]
    memory = torch.randn(12, 8)
    for layer, start in zip(layers, (4, 0), strict=True):
        layer.weight.data = memory[start : start + 4]
    assert cuda_layers.joined(layers) is None
    assert torch.equal(cuda_layers.joined(layers[::-1]), memory[:8])
    layers[0].weight.data = memory[8:]
    assert cuda_layers.joined(layers[::-1]) is None


def test_training_is_not_touched(small, monkeypatch):
    """Catches fused layers under autograd, whose `out=` it refuses, and a frozen context that differs in training."""
    policy = small_policy(train_expert_only=True).train()
    batch, (noise, time) = make_batch(), draws(0, 2)
    losses = []
    for on in (("cuda",), ("cuda", "cpu")):
        monkeypatch.setattr(cuda_layers, "ON", on)
        losses.append(policy.forward(batch, noise=noise, time=time)[0])
        losses[-1].backward()
    assert relative(losses[1].detach(), losses[0].detach()) < 1e-5
