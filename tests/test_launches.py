"""Limits for kernel launches, waits, copies and dtypes on a GPU, counted on fake CUDA tensors at full size."""

import importlib
import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lerobot_pi0.control import guidance
from lerobot_pi0.inputs.observation import ObservationMaker
from lerobot_pi0.network.pi0 import PI0

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def launches(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("launches")
    for name in ("launches", "measure", "schedule", "subjects"):
        sys.modules.pop(name, None)


@pytest.fixture
def size(launches):
    return launches.SIZES["full"]


class NoFloat64(TorchDispatchMode):
    """Refuses float64 on the device, which Apple's devices do not have."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64 and x.device.type == "cuda":
                raise TypeError(f"{function} makes float64 on the policy's device")
        return out


def whole_and_step(launches, chunk) -> tuple[object, int]:
    """The counts of a whole chunk with ten steps, and the launches from one velocity to the next."""
    sampler, seen = launches.Sampler(), []
    velocity = sampler.velocity

    def counted(*args):
        out = velocity(*args)
        seen.append(mode.total)
        return out

    sampler.velocity = counted
    with chunk.gpu.count() as mode, torch.no_grad():
        sampler.chunk(chunk.policy.model, chunk.obs, chunk.noise, steps=10)
    steps = [b - a for a, b in itertools.pairwise(seen)]
    assert len(steps) == 9 and len(set(steps)) == 1
    return mode, steps[0]


def test_chunk(launches, size):
    """Catches additional launches in the layers, a mask that hides nothing, and a value or a copy for which the host
    waits between observation and chunk."""
    with NoFloat64():
        whole, per_step = whole_and_step(launches, launches.OurChunk(size, cameras=3))
    assert 100 < per_step <= 450
    assert 9 * per_step + 1000 < whole.total <= 5600
    assert not whole.waits and not whole.copies
    assert whole.launches["_scaled_dot_product_efficient_attention"] == 18  # the step in which the state sees no action


def test_compiled_chunk(launches, size):
    """Catches a layer that Inductor splits into many kernels, and compiled layers that are not called."""
    compiled = launches.OurChunk(size, cameras=3).compiled(steps=10)
    assert 1000 < compiled.launches["compiled"] < compiled.total <= 3000
    assert not compiled.waits and not compiled.copies


@pytest.mark.parametrize("mode", ["identity", "trained"])
def test_guided_chunk(launches, mode):
    """Catches a copy, a wait or float64 in a mode of real-time chunking; vjp's backward pass needs a driver."""
    chunk = launches.OurChunk(launches.SIZES["small"], cameras=1)
    with chunk.gpu.mode:
        left = torch.empty(10, 6, device="cuda")
        guide = guidance.make_guide(mode, left, 4, 10, chunk.noise)
    with NoFloat64():
        counted = chunk.count(2, guide=guide)
    assert counted.total and not counted.waits and not counted.copies


def test_weights_that_lie_apart(launches, size, monkeypatch):
    """Catches a fast path that needs joined weights: with weights that an average or an adapter has moved, a chunk
    must still have far fewer launches than the plain layers."""
    monkeypatch.setattr(launches.kernels, "join", lambda model: None)
    whole, per_step = whole_and_step(launches, launches.OurChunk(size, cameras=3))
    assert 450 < per_step <= 520
    assert whole.total <= 6500


def test_step(launches, size):
    """Catches in training an additional wait for the device, float64, products of the VLM that are split, and an AdamW
    with many kernels."""
    with NoFloat64():
        forward, backward, update = launches.step(launches.Ours, size, batch_size=8)
    assert 1000 < forward.total + backward.total + update.total <= 3500
    assert forward.waits == ["tolist", "tolist"] and update.waits == ["__bool__"] and not backward.waits
    assert 0 < forward.frozen_products <= 121
    assert update.launches["_fused_adamw_"] == 1


@pytest.mark.parametrize(("name", "value"), [("augment_images", True), ("augment_shift", 0.1)])
def test_augmented_step_waits_no_more(launches, name, value):
    """Catches draws of the augmentation that need a copy or a wait of their own."""
    on_gpu = launches.Step(launches.Ours, launches.SIZES["small"], 2, 3, "cuda")
    setattr(on_gpu.policy.config, name, value)
    with NoFloat64():
        _, counted = on_gpu.forward()
    assert counted.waits == ["tolist", "tolist"]
    assert len(counted.copies) == 2  # the draws of the loss and of the augmentation; nobody waits for them


def test_graph(launches):
    """Catches a part of the chunk that is launched outside of the CUDA graph."""
    found = launches.graph_counts(launches.SIZES["small"], cameras=3, steps=2)
    eager = launches.OurChunk(launches.SIZES["small"], 3).count(2).total
    assert found == {"captured": eager, "outside": 7, "graphs": 1}  # 5 inputs, the replay, the result


@pytest.mark.parametrize("part", ["heun", "adaptive", "held out"])
def test_no_float64_beside_the_network(launches, part):
    """Catches float64 on the device in a solver, and in the error and the roughness of held-out chunks."""
    small = launches.SIZES["small"]
    chunk = launches.OurChunk(small, cameras=1)
    host = launches.batch_for(small, 1) | {"index": torch.arange(1)}
    answers = launches.Answers()
    answers.learn(chunk.policy.observe, host)
    batch = chunk.gpu.take(host)
    sampler = launches.Sampler()

    def sample(model, obs, noise):
        return sampler.chunk(model, obs, noise[:, None], steps=2)[:, 0, :, :6]

    with NoFloat64(), chunk.gpu.count(answers), torch.no_grad():
        if part == "held out":
            assert chunk.policy.objective.chunk_error(chunk.policy.model, batch, sample) is not None
        else:
            sampler.chunk(chunk.policy.model, chunk.obs, chunk.noise, solver=part, steps=2)


def read_a_value(self, x_BKTA, *args):
    if x_BKTA.sum().item() == 0:
        raise ValueError
    return read_a_value.plain(self, x_BKTA, *args)


def copy_from_the_host(self, x_BKTA, *args):
    return copy_from_the_host.plain(self, x_BKTA + torch.zeros(1, device="cpu").to(x_BKTA.device), *args)


def compute_in_float64(self, x_BKTA, *args):
    return compute_in_float64.plain(self, x_BKTA.double(), *args)


@pytest.mark.parametrize("mistake", [read_a_value, copy_from_the_host, compute_in_float64])
def test_the_count_would_tell(launches, monkeypatch, mistake):
    """Catches a count that misses a read value, a copy from the host or float64, which this test adds on purpose."""
    chunk = launches.OurChunk(launches.SIZES["small"], cameras=1)
    monkeypatch.setattr(mistake, "plain", PI0.velocity, raising=False)
    monkeypatch.setattr(PI0, "velocity", mistake)
    if mistake is compute_in_float64:
        with NoFloat64(), pytest.raises(TypeError, match="float64"):
            chunk.count(1)
        return
    counted = chunk.count(1)
    assert counted.waits == (["item"] if mistake is read_a_value else ["cpu to cuda"])
    assert len(counted.copies) == (mistake is copy_from_the_host)


def test_control_reads_values_once(launches):
    """Catches a tick that waits for the device more than once before the chunk, or needs float64."""
    gpu, small = launches.FakeGPU(), launches.SIZES["small"]
    policy, host = gpu.build(launches.Ours, small), launches.batch_for(small, 3)
    answers = launches.Answers()
    answers.learn(policy.observe, host)
    batch = gpu.take(host)
    with NoFloat64(), gpu.count(answers) as counter, torch.no_grad():
        obs = ObservationMaker(policy.config)(batch, torch.device("cuda"))
    assert isinstance(obs.images_BNCHW, FakeTensor) and obs.padded is False
    assert counter.waits == ["tolist"]


def test_main(launches, capsys, monkeypatch):
    """Catches a command that no longer runs, or JSON without the keys that other programs read."""
    monkeypatch.setattr(launches, "EULER", 2)
    found = launches.main(["--size", "small", "--json", "--cameras", "1", "--batches", "2"])
    assert capsys.readouterr().out.startswith("{")
    for name in ("ours", "built-in"):
        assert {"eager", "compiled", "graph", "per_step"} <= found[name]["chunk"]["1"].keys()
        assert {"launches", "waits", "frozen_products"} <= found[name]["step"]["2"].keys()
    ours, builtin = (found[name]["chunk"]["1"] for name in ("ours", "built-in"))
    assert ours["compiled"] < ours["eager"] < builtin["eager"]
    assert builtin["compiled"] is None and builtin["why"]
