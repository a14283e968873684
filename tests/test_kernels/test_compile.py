"""Compilation: whole graphs, the same from chunk to chunk, with the numbers of the plain network. The backend is
`aot_eager`, which traces forward and backward as every backend's does and needs no compiler."""

import copy
import functools
import shutil

import pytest
import torch
from conftest import (
    CAMERAS,
    DIMS,
    assert_gradients_close,
    draws,
    gradients,
    make_batch,
    relative,
    shake,
    small_policy,
    tiny_config,
)
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.rollout.context import _wrap_predict_action_chunk_with_torch_compile
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode

from lerobot_pi0 import PI0Policy, kernels
from lerobot_pi0.configuration_pi0 import choices
from lerobot_pi0.control import guidance
from lerobot_pi0.control.sampling import Sampler
from lerobot_pi0.inputs.observation import bucket
from lerobot_pi0.network import solvers
from lerobot_pi0.network.pi0 import PI0, Observation
from lerobot_pi0.network.sizes import EXPERT_PRESETS, PALIGEMMA_PRESETS, Architecture


@pytest.fixture
def traced(small, monkeypatch):
    """Small presets, and policies whose compiled functions are traced by `aot_eager`."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """How many graphs have been compiled since the fixture began."""
    return counters["stats"]["unique_graphs"]


def policies(**options) -> tuple[PI0Policy, PI0Policy]:
    """A compiled policy, and one of the same weights that is not."""
    torch.manual_seed(0)
    options |= {"rtc_config": RTCConfig(), "num_inference_steps": 3}
    compiled = small_policy(compile_model=True, compile_mode="default", **options)
    shake(compiled)
    plain = small_policy(**options)
    plain.load_state_dict(compiled.state_dict())
    return compiled, plain


@pytest.mark.parametrize("guide", [None, *choices("rtc_guidance")])
def test_chunks(traced, guide):
    """Catches a graph break (they are errors here), a compiled function that differs, and chunks that are compiled
    anew: another prompt of the same bucket, other images, noise, leftovers and delay meet the graphs that are there."""
    compiled, plain = policies(rtc_guidance=guide, rtc_training_max_delay=9 if guide == "trained" else 0)
    for i, (prompt, delay, steps) in enumerate([((9,), 4, 10), ((5,), 2, 10), ((12,), 7, 3)]):
        batch, (noise, _) = make_batch(i, 1, prompt=prompt), draws(i, 1)
        how = {"noise": noise[:, 0]}
        if guide is not None:
            left = torch.randn(steps, DIMS, generator=torch.Generator().manual_seed(i))
            how |= {"inference_delay": delay, "prev_chunk_left_over": left}
        assert relative(compiled.predict_action_chunk(batch, **how), plain.predict_action_chunk(batch, **how)) < 1e-6
        assert graphs() == 2  # context, velocity
    assert not counters["graph_break"]


@pytest.mark.parametrize("solver", ["midpoint", "heun", "adaptive"])
def test_solvers(traced, solver):
    """Catches a solver whose steps are graphs of their own."""
    compiled, plain = policies(solver=solver)
    batch, (noise, _) = make_batch(batch_size=2), draws(0, 2)
    chunks = [p.predict_action_chunk(batch, noise=noise[:, 0]) for p in (compiled, plain)]
    assert relative(*chunks) < 1e-6
    assert graphs() == 2


@pytest.mark.parametrize("mode", ["inference_mode", "no_grad", "enable_grad"])
def test_lerobots_compilation_around_ours(traced, mode):
    """Catches `lerobot-rollout --use_torch_compile` compiling twice, or breaking: it wraps `predict_action_chunk`, with
    its checks of values, in a torch.compile of its own."""
    compiled, plain = policies()
    assert _wrap_predict_action_chunk_with_torch_compile(compiled, backend="aot_eager", mode="default")
    batch, (noise, _) = make_batch(batch_size=1), draws(0, 1)
    for _ in range(2):
        with getattr(torch, mode)():
            chunk = compiled.predict_action_chunk(batch, noise=noise[:, 0])
        assert relative(chunk, plain.predict_action_chunk(batch, noise=noise[:, 0])) < 1e-6
        compiled.reset()
        with getattr(torch, mode)():
            assert torch.equal(compiled.select_action(batch, noise=noise[:, 0]), chunk[:, 0])
    assert graphs() == 2


@pytest.mark.parametrize(
    "options",
    [
        {"train_expert_only": True},
        {"train_expert_only": False, "flow_samples": 2, "rtc_training_max_delay": 9},
        {"train_expert_only": True, "gradient_checkpointing": True},
    ],
    ids=["frozen", "all", "checkpointing"],
)
def test_training(traced, options):
    """Catches training that breaks under compilation, or learns something else: loss and every gradient."""
    compiled, plain = policies(**options)
    samples = options.get("flow_samples", 1)
    batch, (noise, time) = make_batch(prompt=(12, 7)), draws(0, 2, samples)
    delay = torch.tensor([[3], [5]]).expand(2, samples)
    losses = [p.train().forward(batch, noise=noise, time=time, delay=delay)[0] for p in (compiled, plain)]
    assert relative(losses[0].detach(), losses[1].detach()) < 1e-6
    for loss in losses:
        loss.backward()
    assert_gradients_close(gradients(compiled), gradients(plain))
    assert graphs() > 0


def test_training_and_control_in_turns(traced):
    """Catches weights that a compiled chunk remembers: after an optimiser step it is the new policy's."""
    compiled, plain = policies()
    batch, (noise, time) = make_batch(batch_size=1), draws(0, 1)
    chunks = []
    for policy in (compiled, plain):
        policy.predict_action_chunk(batch, noise=noise[:, 0])
        policy.train().forward(batch, noise=noise, time=time)[0].backward()
        torch.optim.SGD(policy.get_optim_params(), 0.1).step()
        chunks.append(policy.eval().predict_action_chunk(batch, noise=noise[:, 0]))
    assert relative(*chunks) < 1e-5


def test_a_copy_computes_with_its_own_weights(traced):
    """Catches a compiled method that is bound to the policy it was made for: a copy (an average of weights, say)
    would compute the original's chunks."""
    compiled, _ = policies()
    other = copy.deepcopy(compiled)
    shake(other, seed=1)
    batch, (noise, _) = make_batch(batch_size=1), draws(0, 1)
    chunks = [p.predict_action_chunk(batch, noise=noise[:, 0]) for p in (compiled, other)]
    assert relative(*chunks) > 1e-3


def test_saving_a_compiled_policy(traced, tmp_path):
    """Catches parameters that compilation renames (`_orig_mod.`), and an option that does not travel."""
    compiled, plain = policies()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    compiled.save_pretrained(tmp_path)
    loaded = PI0Policy.from_pretrained(tmp_path)
    assert loaded.config.compile_model
    batch, (noise, _) = make_batch(batch_size=1), draws(0, 1)
    chunks = [p.predict_action_chunk(batch, noise=noise[:, 0]) for p in (loaded, plain)]
    assert relative(*chunks) < 1e-6


@pytest.mark.parametrize(("length", "most", "expected"), [
    (1, 48, 16), (16, 48, 16), (17, 48, 32), (33, 48, 48), (48, 48, 48), (65, 128, 128), (9, 12, 12),
])  # fmt: skip
def test_buckets(length, most, expected):
    """Catches a bucket that cuts a prompt or exceeds the tokens that there are, and one for each length."""
    assert bucket(length, most) == expected
    assert len({bucket(n, 128) for n in range(1, 129)}) == 4


def fake_observation(arch: Architecture, cameras: int = 3, batch_size: int = 1) -> Observation:
    size = arch.vlm.vision.image_size
    return Observation(
        torch.rand(batch_size, cameras, 3, size, size),
        torch.randint(0, arch.vlm.vocab_size, (batch_size, 48)),
        torch.ones(batch_size, 48, dtype=torch.bool),
        torch.randn(batch_size, arch.state_dim),
    )


@pytest.mark.parametrize("guide", [None, *choices("rtc_guidance")])
@pytest.mark.parametrize("solver", solvers.FIXED)
def test_nothing_depends_on_values(guide, solver):
    """Catches an `.item()`, an `if` on a tensor or a shape made from values between observation and chunk, which a
    CUDA graph cannot capture and for which a GPU has to be waited for: fake tensors have no values. At full size."""
    arch = Architecture(PALIGEMMA_PRESETS["gemma_2b"], EXPERT_PRESETS["gemma_300m"])
    with FakeTensorMode(), torch.no_grad():
        model = PI0(arch, arch.vlm.vision.image_size).eval()
        kernels.install(model)
        noise = torch.randn(1, 1, 50, 32)
        found = None if guide is None else guidance.make_guide(guide, torch.randn(10, 6), 4, 10, noise)
        chunk = Sampler().chunk(model, fake_observation(arch), noise, found, solver=solver, steps=2)
    assert chunk.shape == (1, 1, 50, 32)


@pytest.mark.parametrize("delays", [False, True])
def test_training_depends_on_no_value_either(small, delays):
    """Catches the same between a batch's draws and its losses: what is compiled in training."""
    policy = small_policy(flow_samples=2, rtc_training_max_delay=9 if delays else 0).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, p in list(policy.model.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            setattr(policy.model.get_submodule(owner), leaf, torch.nn.Parameter(torch.empty(p.shape)))
        obs = fake_observation(policy.model.arch, batch_size=2)
        actions, noise, time = torch.randn(2, 1, 50, 32), torch.randn(2, 2, 50, 32), torch.rand(2, 2)
        delay = torch.randint(10, (2, 2)) if delays else None
        errors = policy.objective.errors(policy.model, obs, actions, noise, time, delay)
    assert errors.shape == (2, 2, 50, DIMS)


def test_fake_tensors_would_tell():
    """Catches a proof that proves nothing: the adaptive solver, which asks whether it has arrived, is found out."""
    arch = Architecture(PALIGEMMA_PRESETS["tiny"], EXPERT_PRESETS["tiny"])
    with FakeTensorMode(), torch.no_grad():
        model = PI0(arch, 64).eval()
        kernels.install(model)
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            Sampler().chunk(model, fake_observation(arch), torch.randn(1, 1, 50, 32), solver="adaptive")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile's own backend needs a C++ compiler")
@pytest.mark.parametrize("guide", [None, "vjp"])
def test_inductor(guide):
    """Catches code that the backend of users, Inductor, does not compile: the tiny preset, in both directions."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    options = {"rtc_config": RTCConfig(), "rtc_guidance": guide, "num_inference_steps": 3}
    compiled = PI0Policy(tiny_config(CAMERAS[:1], compile_model=True, compile_mode="default", **options))
    shake(compiled)
    plain = PI0Policy(tiny_config(CAMERAS[:1], **options))
    plain.load_state_dict(compiled.state_dict())
    batch, (noise, time) = make_batch(cameras=CAMERAS[:1], size=64), draws(0, 2)
    how = {"noise": noise[:, 0], "inference_delay": 4, "prev_chunk_left_over": torch.randn(10, DIMS)}
    chunks = [p.predict_action_chunk(batch, **how) for p in (compiled, plain)]
    assert relative(*chunks) < 1e-4
    for policy in (compiled, plain):
        policy.train().forward(batch, noise=noise, time=time)[0].backward()
    assert_gradients_close(gradients(compiled), gradients(plain), tolerance=1e-3)
    torch._dynamo.reset()
