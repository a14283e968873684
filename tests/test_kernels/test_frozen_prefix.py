"""A frozen VLM's part of a training step as a graph, proved on the CPU by the recorder."""

import functools

import pytest
import torch
from conftest import CAMERAS, PEFT_CLI, draws, gradients, make_batch, relative, shake, small_policy
from graph_recorder import Recorder, refuse

from lerobot_pi0.control import sampling
from lerobot_pi0.kernels import cpu_attention, cpu_linear, cuda_layers, frozen_prefix
from lerobot_pi0.kernels.cuda_graphs import CudaGraphs


@pytest.fixture(autouse=True)
def gpu(small, monkeypatch):
    """Small presets, the CPU in the place of a GPU, and the recorder in the place of CUDA's graphs."""
    monkeypatch.setattr(cuda_layers, "ON", ("cuda", "cpu"))
    monkeypatch.setattr(sampling, "CudaGraphs", functools.partial(CudaGraphs, Recorder))
    monkeypatch.setattr(Recorder, "made", 0)
    for module in (cpu_attention, cpu_linear):  # their kernels see the recorder, and a GPU has none of them
        monkeypatch.setattr(module, "fast_in_bfloat16", lambda *tensors: False)


def policies(**options):
    """A policy in training whose frozen VLM is recorded, and one of the same weights without graphs."""
    torch.manual_seed(0)
    options = {"train_expert_only": True} | options
    graphed = small_policy(**options)
    shake(graphed)
    plain = small_policy(cuda_graphs=False, **options)
    plain.load_state_dict(graphed.state_dict())
    return graphed.train(), plain.train()


def loss(policy, seed=0, samples=1, prompt=(9, 9), **options):
    noise, time = draws(seed, 2, samples)
    return policy.forward(make_batch(seed, prompt=prompt, **options), noise=noise, time=time)[0]


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "bfloat16"}, {"flow_samples": 3}, {"gradient_checkpointing": True}], ids=str
)
@pytest.mark.parametrize("prompt", [(9, 9), (9, 5)], ids=["even", "padded"])
def test_steps(options, prompt):
    """Catches a context that is that of another batch, a mask that the replay does not know, and gradients that end at
    the graph: losses and all gradients are the plain ones, bit for bit, and one graph serves all steps."""
    graphed, plain = policies(**options)
    samples = options.get("flow_samples", 1)
    for seed in range(3):
        found, expected = (loss(p, seed, samples, prompt) for p in (graphed, plain))
        assert torch.equal(found, expected)
        for x, policy in ((found, graphed), (expected, plain)):
            policy.zero_grad()
            x.backward()
        ours, theirs = gradients(graphed), gradients(plain)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert Recorder.made == 1


def test_two_losses_before_their_gradients():
    """Catches a replay that overwrites the context which an earlier loss still needs for its gradient."""
    graphed, plain = policies()
    for policy in (graphed, plain):
        (loss(policy, 0) + loss(policy, 1)).backward()
    ours, theirs = gradients(graphed), gradients(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and Recorder.made == 1


def test_a_vlm_that_is_trained(monkeypatch):
    """Catches a graph where gradients have to pass through the VLM: all of it is trained, or an adapter in it."""
    graphed, plain = policies(train_expert_only=False)
    assert torch.equal(loss(graphed), loss(plain))
    graphed, _ = policies(train_expert_only=False, use_peft=True)
    graphed.config.pretrained_path = "somewhere"
    graphed.wrap_with_peft(peft_cli_overrides=PEFT_CLI | {"r": 2})
    loss(graphed.train()).backward()
    assert Recorder.made == 0
    assert any("lora" in name and "language_model" in name for name in gradients(graphed))


def test_an_adapter_in_the_expert():
    """Catches a graph that is given up because of an adapter which it does not hold."""
    graphed, _ = policies(use_peft=True)
    graphed.config.pretrained_path = "somewhere"
    graphed.wrap_with_peft(peft_cli_overrides=PEFT_CLI | {"r": 2})
    losses = [loss(graphed.train(), seed) for seed in (0, 1)]
    assert Recorder.made == 1 and relative(losses[0].detach(), losses[1].detach()) > 1e-4


def test_large_batches(monkeypatch):
    """Catches a graph whose memory the backward pass of a large batch needs; the limit counts images and prompt."""
    graphed, _ = policies()
    tokens = 2 * (len(CAMERAS) * 16 + 9)
    monkeypatch.setattr(frozen_prefix, "LARGEST_PREFIX", tokens - 1)
    loss(graphed)
    assert Recorder.made == 0
    monkeypatch.setattr(frozen_prefix, "LARGEST_PREFIX", tokens)
    loss(graphed)
    assert Recorder.made == 1


def test_a_prefix_that_is_known():
    """Catches a graph of a VLM that is not in memory: an observation of cached contexts has its keys and values."""
    graphed, plain = policies()
    batch, (noise, time) = make_batch(prompt=(9, 9)), draws(0, 2)
    obs = plain.observe(batch, torch.device("cpu"))
    known = obs._replace(prefix=plain.model.encode_prefix(obs)[0])
    actions = plain.observe.actions(batch, torch.device("cpu"))[:, None]
    found = graphed.objective.errors(graphed.model, known, actions, noise, time)
    assert torch.equal(found, plain.objective.errors(plain.model, obs, actions, noise, time))
    assert Recorder.made == 0


def test_sharded_weights():
    """Catches a graph of weights that a process holds only while it computes a layer."""
    graphed, _ = policies()
    layer = graphed.model.vlm.layers[0]
    layer.__class__ = type("FSDPLayer", (type(layer),), {})
    loss(graphed)
    assert Recorder.made == 0


def test_an_error_in_capture(monkeypatch, caplog):
    """Catches a run that ends, or trains on half a context, because the VLM cannot be captured."""
    monkeypatch.setattr(sampling, "CudaGraphs", functools.partial(CudaGraphs, refuse))
    graphed, plain = policies()
    for seed in range(2):
        assert torch.equal(loss(graphed, seed), loss(plain, seed))
    assert caplog.text.count("no CUDA graph of a frozen VLM") == 1


def test_training_and_control_have_graphs_of_their_own():
    """Catches a chunk that is given the loss's graph, or pushes it out: a run samples chunks on held-out data."""
    graphed, plain = policies()
    batch, noise = make_batch(batch_size=1, prompt=(9,)), draws(0, 1)[0][:, 0]
    for seed in range(2):
        assert torch.equal(loss(graphed, seed), loss(plain, seed))
        chunks = [p.eval().predict_action_chunk(batch, noise=noise) for p in (graphed, plain)]
        assert torch.equal(*chunks)
        graphed.train(), plain.train()
    assert Recorder.made == 2
