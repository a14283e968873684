"""Layers that are compiled once for a stack: the numbers of the plain ones, and few graphs. The backend is `aot_eager`,
which traces as every backend does and needs no compiler."""

import functools

import pytest
import torch
from conftest import draws, make_batch, relative, shake, small_policy
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from torch._dynamo.utils import counters

from lerobot_pi0 import kernels
from lerobot_pi0.control import sampling
from lerobot_pi0.kernels import compiled_layers, cuda_layers
from lerobot_pi0.kernels.cuda_graphs import CudaGraphs


class Runs:
    """In the place of a CUDA graph: runs the function again with what its inputs hold now."""

    def __init__(self, function) -> None:
        self._function, self.out = function, function()

    def replay(self) -> None:
        self.out = self._function()


@pytest.fixture(autouse=True)
def gpu(small, monkeypatch):
    """Small presets, the CPU in the place of a GPU, and graphs by `aot_eager`."""
    monkeypatch.setattr(cuda_layers, "ON", ("cuda", "cpu"))
    monkeypatch.setattr(sampling, "CudaGraphs", functools.partial(CudaGraphs, Runs))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled_layers._compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    yield
    compiled_layers._compiled.cache_clear()
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def policies(**options):
    """A policy of compiled layers, and one of the same weights that compiles nothing."""
    torch.manual_seed(0)
    options |= {"num_inference_steps": 3}
    compiled = small_policy(compile_model=True, compile_mode="default", **options)
    shake(compiled)
    plain = small_policy(cuda_graphs=False, **options)
    plain.load_state_dict(compiled.state_dict())
    kernels.join(compiled.model)
    return compiled, plain


STACKS = 4
"""A layer of SigLIP, one of the VLM, and the expert's with the state's token and without."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks(dtype):
    """Catches a compiled layer that computes something else, one that is compiled for each layer or each chunk, a graph
    break, and layers that nobody calls."""
    compiled, plain = policies(dtype=dtype)
    for seed in range(3):
        batch, noise = make_batch(seed, 1, prompt=(9 - seed,)), draws(seed, 1)[0][:, 0]
        chunks = [p.predict_action_chunk(batch, noise=noise) for p in (compiled, plain)]
        assert relative(*chunks) < (1e-5 if dtype == "float32" else 3e-2)
        assert graphs() == STACKS
    assert not counters["graph_break"]


def test_weights_that_lie_apart():
    """Catches a compiled layer that needs joined weights, which an average or an adapter has moved."""
    compiled, plain = policies()
    compiled.to(torch.float64).to(torch.float32)
    batch, noise = make_batch(0, 1, prompt=(9,)), draws(0, 1)[0][:, 0]
    assert relative(*(p.predict_action_chunk(batch, noise=noise) for p in (compiled, plain))) < 1e-5
    assert graphs() == STACKS


@pytest.mark.parametrize("mode", ["identity", "vjp", "trained"])
def test_guided_chunks(mode):
    """Catches a mode of real-time chunking that compiled layers do not survive; vjp differentiates plain ones."""
    options = {"rtc_training_max_delay": 9} if mode == "trained" else {}
    compiled, plain = policies(rtc_config=RTCConfig(), rtc_guidance=mode, **options)
    batch, noise = make_batch(0, 1, prompt=(9,)), draws(0, 1)[0][:, 0]
    how = {"inference_delay": 3, "prev_chunk_left_over": torch.randn(10, 6, generator=torch.Generator().manual_seed(0))}
    chunks = [p.predict_action_chunk(batch, noise=noise, **how) for p in (compiled, plain)]
    assert relative(*chunks) < 1e-5 and graphs()


def test_an_adapter():
    """Catches a compiled layer that goes on without the adapter that was attached after it was compiled."""
    compiled, _ = policies(train_expert_only=True, use_peft=True)
    batch, noise = make_batch(0, 1, prompt=(9,)), draws(0, 1)[0][:, 0]
    without = compiled.predict_action_chunk(batch, noise=noise)
    compiled.config.pretrained_path = "somewhere"
    adapted = compiled.wrap_with_peft(peft_cli_overrides={"method_type": "LORA", "r": 2, "init_lora_weights": False})
    adapted.eval()
    inner = adapted.get_base_model() if hasattr(adapted, "get_base_model") else compiled
    assert relative(inner.predict_action_chunk(batch, noise=noise), without) > 1e-4
    with adapted.disable_adapter():
        assert relative(inner.predict_action_chunk(batch, noise=noise), without) < 1e-5


def test_what_is_not_captured_is_compiled_whole():
    """Catches the adaptive solver or a large batch, which have no graph, losing what `compile_model` promises."""
    compiled, plain = policies(solver="adaptive")
    batch, noise = make_batch(0, 1, prompt=(9,)), draws(0, 1)[0][:, 0]
    assert relative(*(p.predict_action_chunk(batch, noise=noise) for p in (compiled, plain))) < 1e-5
    assert graphs() == 2  # context, velocity


def test_modes_have_no_graphs_of_their_own():
    """Catches torch.compile making CUDA graphs inside of ours, which CUDA refuses."""
    compiled, _ = policies()
    for mode, inner in (("max-autotune", "max-autotune-no-cudagraphs"), ("reduce-overhead", "default")):
        kernels.compile_layers(compiled.model, mode)
        assert compiled.model.expert.layers[0].compile_mode == inner
