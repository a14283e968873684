"""The frozen VLM in int8 and NF4: as exact as rounding allows, token by token, never mistaken for the real weights."""

import copy
import json
import logging
import sys
import weakref

import pytest
import torch
from accelerate.state import AcceleratorState
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from conftest import (
    CAMERAS,
    NEEDS_VNNI,
    PEFT_CLI,
    assert_gradients_close,
    draws,
    gradients,
    make_batch,
    relative,
    shake,
    small_policy,
    stats,
    subset,
    widen,
)
from lerobot.utils.constants import OBS_STATE
from progress import bars
from safetensors.torch import load_file

from lerobot_pi0 import PI0Policy
from lerobot_pi0.checkpoints import reading, tensor_bytes
from lerobot_pi0.checkpoints.checkpoint import Checkpoint
from lerobot_pi0.checkpoints.errors import CheckpointConfigError, MismatchedCheckpointError
from lerobot_pi0.checkpoints.writing import save
from lerobot_pi0.kernels import rounding
from lerobot_pi0.kernels.cpu_linear import Linear
from lerobot_pi0.kernels.rounding import LAYERS, RoundedLinear, packed_product, plain_product, rounded, rounded_tokens

pytestmark = [pytest.mark.usefixtures("small"), NEEDS_VNNI]
INT8 = {"vlm_quantization": "int8"}
TRAINING = INT8 | {"train_expert_only": True, "save_expert_only": True}


def layer_and_tokens(dtype: torch.dtype, bias: bool = True, tokens: int = 40) -> tuple[Linear, torch.Tensor]:
    """A layer whose channels differ in size, and tokens that do: some are outliers, one is zero."""
    torch.manual_seed(0)
    layer = Linear(136, 72, bias=bias)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-3, 3, 72)[:, None])
        x = torch.randn(tokens, 136) * torch.logspace(-3, 3, tokens)[:, None]
        x[::7, 5] *= 100
        x[3 % tokens] = 0
    return layer.to(dtype), x.to(dtype)


def in_int8(layer: Linear, kind: str = "int8") -> RoundedLinear:
    other = LAYERS[kind](copy.deepcopy(layer))
    other.put(layer.weight)
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_no_further_off_than_rounding_allows(dtype, bias):
    """Catches a scale of the wrong axis, integers that overflow or saturate, a zero point that is forgotten, and a bias
    that is scaled: each output against float64, within half a step of each weight and activation."""
    layer, x = layer_and_tokens(dtype, bias)
    with torch.no_grad():
        y = in_int8(layer)(x[None])[0]
        exact = layer.double()(x.double())
    assert y.dtype == dtype
    x, w = x.double(), layer.weight.detach()
    step_w = w.abs().amax(dim=1) / 127 / 2
    step_x = x.abs().amax(dim=1, keepdim=True) / 126 / 2 * (1 if dtype == torch.float32 else 1.5)  # rounded twice
    allowed = x.abs().sum(dim=1, keepdim=True) * step_w + step_x * w.abs().sum(dim=1) + step_x * step_w * 136
    eps = torch.finfo(dtype).eps
    assert ((y - exact).abs() <= 1.01 * allowed + 2 * eps * (exact.abs() + (layer.bias.abs() if bias else 0))).all()
    without_bias = exact - (layer.bias if bias else 0)
    token = ((y - exact) / step_w).norm(dim=1) / (without_bias / step_w).norm(dim=1).clamp(min=1e-30)
    loud = x.abs().amax(dim=1)
    assert token[(loud > 10) & (loud < 10 * x.abs().mean(dim=1))].max() < 0.02


@pytest.mark.parametrize("tokens", [1, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_products_are_the_same(dtype, tokens):
    """Catches the product for CUDA, which cannot run here, drifting from the one for CPUs: bit for bit."""
    layer, x = layer_and_tokens(dtype, tokens=tokens)
    whole, scale = rounded(layer.weight)
    tokens_MK, _ = rounded_tokens(x)
    packed = torch.ops.onednn.qlinear_prepack(whole, None)
    products = [f(tokens_MK, w, scale, dtype) for f, w in ((plain_product, whole), (packed_product, packed))]
    assert torch.equal(*products)


def test_tokens_do_not_see_each_other():
    """Catches a scale shared by tokens: with another one a thousand times as large, a token answers bit for bit."""
    layer, x = layer_and_tokens(torch.bfloat16)
    layer = in_int8(layer)
    loud = x.clone()
    loud[1::2] *= 1000
    with torch.no_grad():
        assert torch.equal(layer(loud)[::2], layer(x)[::2])
        torch.testing.assert_close(layer(x[7:8])[0], layer(x)[7], rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_stays_so(dtype, bad):
    """Catches a NaN that is rounded to an integer: the check of a chunk would find nothing."""
    layer, x = layer_and_tokens(dtype)
    x[2, 9] = bad
    with torch.no_grad():
        y = in_int8(layer)(x)
    assert not y[2].isfinite().any() and y[[0, 1, *range(3, 40)]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_nf4_is_the_nearest_of_16_levels(dtype, bias):
    """Catches scales of other blocks, levels out of order, a bias that is left out, and weights that stay as they were:
    the levels are those of the paper's table, the scale is a block's largest."""
    torch.manual_seed(0)
    layer, x = Linear(128, 72, bias=bias).to(dtype), torch.randn(3, 5, 128).to(dtype)
    levels = torch.tensor(
        [-1, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0, 0.07958, 0.16093, 0.24611, 0.33792, 0.44071,
         0.56262, 0.72296, 1]
    )  # fmt: skip
    blocks = layer.weight.detach().float().view(72, 2, 64)
    scale = blocks.abs().amax(-1, keepdim=True)
    nearest = levels[((blocks / scale)[..., None] - levels).abs().argmin(-1)] * scale
    expected = x.float() @ nearest.view(72, 128).t() + (layer.bias.float() if bias else 0)
    rounded = in_int8(layer, "nf4")
    with torch.no_grad():
        y = rounded(x)
    assert y.dtype == dtype and rounded._rounded.nbytes == layer.weight.numel() // 2
    assert relative(y.float(), expected) < (1e-3 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("kind", LAYERS)
def test_what_a_rounded_layer_refuses(kind):
    """Catches a gradient that ends without a word, and numbers that get in, out or elsewhere unnoticed."""
    plain, x = layer_and_tokens(torch.float32)
    layer = in_int8(plain, kind)
    with pytest.raises(RuntimeError, match="passes no gradient"):
        layer(x.requires_grad_())
    with pytest.raises(RuntimeError, match="no weights"):
        LAYERS[kind](plain)(x.detach())
    with pytest.raises(RuntimeError, match="from_pretrained"):
        layer.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="load the policy again"):
        layer.to(torch.bfloat16)
    assert not any(p.requires_grad for p in layer.parameters())
    assert layer.to("cpu").weight.is_meta and layer.weight.shape == plain.weight.shape
    assert torch.equal(copy.deepcopy(layer)(x.detach()), layer(x.detach()))


@pytest.fixture
def base(tmp_path):
    """A checkpoint in which every parameter matters."""
    torch.manual_seed(0)
    policy = small_policy(dtype="float32")
    shake(policy)
    policy.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder, training: bool = False, **options) -> PI0Policy:
    config = Checkpoint.open(folder).config()
    for name, value in options.items():
        setattr(config, name, value)
    return PI0Policy.from_pretrained(folder, config=config, dataset_stats=stats() if training else None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks(base, dtype):
    """Catches layers that are not rounded, or a chunk further off than int8 makes it."""
    batch, (noise, _) = make_batch(), draws(0, 2)
    policy = load(base, **INT8, dtype=dtype)
    linear = [
        m for part in (policy.model.vision, policy.model.vlm) for m in part.modules() if isinstance(m, torch.nn.Linear)
    ]
    assert not linear and len(rounding.layers(policy)) == 2 * 6 + 3 * 7
    assert not rounding.layers(policy.model.expert)
    exact, plain = (load(base, dtype=d) for d in ("float32", dtype))
    chunks = [p.predict_action_chunk(batch, noise=noise[:, 0]) for p in (policy, plain, exact)]
    error = relative(chunks[0], chunks[2])
    assert 1e-5 < error < 0.02 + relative(chunks[1], chunks[2])
    contexts = [p.model.context(p.observe(batch, torch.device("cpu"))) for p in (policy, exact)]
    for ours, theirs in zip(*(c.cache for c in contexts), strict=True):
        assert all(relative(a.detach(), b.detach()) < 0.05 for a, b in zip(ours, theirs, strict=True))


def test_neighbours_and_padding_change_nothing(base):
    """Catches scales that leak between the samples of a batch, or from padding: up to what is rounded the other way
    because the products before it were added in another order."""
    policy, batch, (noise, _) = load(base, **INT8), make_batch(batch_size=3, prompt=(3, 12, 7)), draws(0, 3)
    batch |= {key: batch[key] * torch.tensor([1.0, 0.01, 1.0])[:, None, None, None] for key in CAMERAS}
    chunks = policy.predict_action_chunk(batch, noise=noise[:, 0])
    for i in range(3):
        row = slice(i, i + 1)
        assert relative(policy.predict_action_chunk(subset(batch, row), noise=noise[row, 0]), chunks[row]) < 1e-3
    assert relative(policy.predict_action_chunk(widen(batch, 0, 9), noise=noise[:, 0]), chunks) < 1e-3
    other = {OBS_STATE: batch[OBS_STATE] + 1}
    assert relative(policy.predict_action_chunk(batch | other, noise=noise[:, 0]), chunks) > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training(base, tmp_path, dtype):
    """Catches training that is stopped by the rounding or learns something else, rounded weights that reach a
    checkpoint, and a checkpoint that rounds where nobody asked for it."""
    options = {"train_expert_only": True, "save_expert_only": True, "dtype": dtype}
    policies = [load(base, training=True, **options, **more).train() for more in (INT8, {})]
    batch, (noise, time) = make_batch(), draws(0, 2)
    for policy in policies:
        policy.forward(batch, noise=noise, time=time)[0].backward()
    ours, plain = map(gradients, policies)
    assert ours.keys() == plain.keys()
    assert all(relative(ours[name], plain[name]) < 0.1 for name in ours if plain[name].norm() > 1e-3)

    with torch.no_grad():
        for p in policies[0].get_optim_params():
            p.add_(torch.randn_like(p) * 0.01)
    policies[0].save_pretrained(tmp_path / "tuned")
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert "vlm_quantization" not in config
    assert not any("paligemma." in name for name in load_file(tmp_path / "tuned" / "model.safetensors"))
    tuned = PI0Policy.from_pretrained(tmp_path / "tuned")
    assert tuned.config.vlm_quantization is None and not rounding.layers(tuned)
    original = load(base, dtype=dtype)
    for name, p in original.model.paligemma.named_parameters():
        assert torch.equal(p, tuned.model.paligemma.get_parameter(name)), name
    again = load(tmp_path / "tuned", training=True, **TRAINING)  # a resumed run, or the next one
    again.save_pretrained(tmp_path / "again")
    assert len(rounding.layers(load(tmp_path / "again", **INT8))) == 33


def test_nf4_is_the_network_of_rounded_weights(base, tmp_path):
    """Catches layers that are not rounded, others that are, weights that are mixed up, gradients that get lost, and
    rounded weights in a checkpoint: NF4 leaves activations alone, so that rounding is all there is to it."""
    options = {"train_expert_only": True, "save_expert_only": True, "dtype": "float32"}
    ours, plain = (load(base, True, **options, vlm_quantization=kind).train() for kind in ("nf4", None))
    names = rounding.layers(ours)
    assert names.keys() == rounding.layers(load(base, **INT8)).keys()
    for name in names:
        weight = plain.get_parameter(name)
        weight.data = dequantize_4bit(*quantize_4bit(weight.data, blocksize=64, quant_type="nf4"))
    batch, (noise, time) = make_batch(), draws(0, 2)
    for policy in (ours, plain):
        policy.forward(batch, noise=noise, time=time)[0].backward()
    assert_gradients_close(gradients(ours), gradients(plain))
    chunks = [policy.eval().predict_action_chunk(batch, noise=noise[:, 0]) for policy in (ours, plain)]
    assert relative(*chunks) < 1e-5
    ours.save_pretrained(tmp_path / "tuned")
    assert not any("paligemma." in name for name in load_file(tmp_path / "tuned" / "model.safetensors"))
    exact, tuned = load(base), PI0Policy.from_pretrained(tmp_path / "tuned")
    assert all(torch.equal(exact.get_parameter(name), tuned.get_parameter(name)) for name in names)


def test_spread_weights_are_refused(base, monkeypatch):
    """Catches FSDP, which would want to make the rounded weights anew."""
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", "FSDP")
    with pytest.raises(ValueError, match="FSDP"):
        load(base, training=True, **TRAINING)


@pytest.mark.parametrize(
    ("options", "training", "message"),
    [
        ({"train_expert_only": False, "save_expert_only": True}, True, "train_expert_only=true"),
        ({"train_expert_only": True}, True, "save_expert_only=true"),
        ({"compile_model": True}, False, "compile_model"),
        ({"vlm_quantization": "int4"}, False, "not one of int8"),
        ({"device": "mps"}, False, "AVX512-VNNI"),
    ],
    ids=["VLM trained", "whole checkpoints", "compiled", "unknown", "device"],
)
def test_refusals(base, options, training, message):
    """Catches a combination that would fail later, hours into a run or silently."""
    with pytest.raises(ValueError, match=message):
        load(base, training, **INT8 | options)


def test_nf4_without_its_library(base, monkeypatch):
    """Catches an import that fails in the middle of a load, and a library that nobody names."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"lerobot_policy_pi0\[bitsandbytes\]"):
        load(base, vlm_quantization="nf4")


def test_a_push_that_would_fail_at_the_end(base):
    """Catches hours of training whose result cannot be pushed: nobody else has the frozen weights."""
    options = TRAINING | {"pretrained_path": str(base), "push_to_hub": True}
    with pytest.raises(ValueError, match=r"--policy\.push_to_hub=false"):
        load(base, training=True, **options, repo_id="you/pi0").get_optim_params()
    assert load(base, training=True, **options | {"push_to_hub": False}, repo_id="you/pi0").get_optim_params()


def test_it_needs_a_checkpoint_and_all_of_its_vlm(base):
    """Catches random weights that are rounded, and a first error that does not name what is missing."""
    for options in (INT8, TRAINING | {"train_expert_only": None}):
        with pytest.raises(ValueError, match=r"--policy\.path or --policy\.pretrained_path"):
            small_policy(**options)
    with pytest.raises(ValueError, match=r"train_expert_only=true and --policy\.save_expert_only=true"):
        load(base, training=True, **INT8, train_expert_only=False)
    torch.manual_seed(0)
    tensors = load_file(base / "model.safetensors")
    lost = next(name for name in tensors if ".paligemma." in name and name.endswith(".1.mlp.up_proj.weight"))
    del tensors[lost]
    save(base, {n: json.loads((base / n).read_text()) for n in ("config.json", "lerobot_pi0.json")}, tensors)
    with pytest.raises(MismatchedCheckpointError, match="does not round"):
        PI0Policy.from_pretrained(base, config=small_config(base), strict=False)


def small_config(folder):
    config = Checkpoint.open(folder).config()
    config.vlm_quantization = "int8"
    return config


def test_a_whole_checkpoint_is_refused(base, tmp_path):
    """Catches rounded weights, or none, under the names of the real ones."""
    policy = load(base, **INT8)
    with pytest.raises(ValueError, match="load the policy without"):
        policy.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole" / "model.safetensors").exists()


def test_lora(base):
    """Catches adapters around rounded weights; in the expert they are welcome."""
    policy = load(base, training=True, **TRAINING | {"train_expert_only": None}, pretrained_path=str(base))
    with pytest.raises(ValueError, match="expert alone"):
        policy.wrap_with_peft(peft_cli_overrides=PEFT_CLI)
    policy = load(base, training=True, **TRAINING, pretrained_path=str(base))
    policy.wrap_with_peft(peft_cli_overrides=PEFT_CLI).train()
    policy.forward(make_batch())[0].backward()
    assert any("lora_" in name for name in gradients(policy))
    policy = load(base, training=True, **TRAINING)
    policy.model.vlm.norm.weight.requires_grad_(True)
    policy.model.vlm.layers[0].input_layernorm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="a part of the VLM would be trained"):
        policy.get_optim_params()


@pytest.mark.parametrize("frozen", [False, True], ids=["in the VLM", "in the expert"])
def test_a_trained_adapter(base, tmp_path, frozen):
    """Catches an adapter of the VLM over rounded weights, which peft refuses in words of its own."""
    policy = load(base, training=True, train_expert_only=frozen, pretrained_path=str(base))
    policy.wrap_with_peft(peft_cli_overrides=PEFT_CLI).save_pretrained(tmp_path / "adapter")
    config = small_config(base)
    config.use_peft, config.pretrained_path = True, tmp_path / "adapter"
    if frozen:
        assert rounding.layers(PI0Policy.from_pretrained(base, config=config))
        return
    with pytest.raises(CheckpointConfigError, match="merge it first"):
        PI0Policy.from_pretrained(base, config=config)


def test_the_vlm_is_never_whole_in_memory(base, monkeypatch):
    """Catches a load that needs the memory of the weights as they were, and then that of int8."""
    alive: weakref.WeakSet = weakref.WeakSet()
    most = []
    allocate, put = reading.allocate, RoundedLinear.put
    shapes = {p.shape for p in rounding.layers(load(base, **INT8)).values() for p in [p.weight]}

    def counted(shape, *args):
        x = allocate(shape, *args)
        if x.shape in shapes:
            alive.add(x)
        return x

    def recorded(layer, weight):
        most.append(len(alive))
        put(layer, weight)

    before = len(alive)
    monkeypatch.setattr(reading, "allocate", counted)
    monkeypatch.setattr(RoundedLinear, "put", recorded)
    policy = load(base, **INT8)
    kept = sum(p.shape in shapes for p in policy.parameters() if not p.is_meta)
    assert before == 0 and len(most) == 33
    assert max(most) <= kept + 5  # one in each of four threads, and one that is being forgotten


def test_rounding_shows_its_progress(base, monkeypatch, capsys):
    """Catches a start of control that seems to hang, where rounding takes long."""
    monkeypatch.setattr(tensor_bytes, "PATIENCE", 0.0)
    load(base, **INT8)
    assert "rounding the VLM" in bars(capsys.readouterr().err)


@pytest.mark.parametrize("adapted", [False, True], ids=["expert", "LoRA"])
def test_several_processes(base, adapted):
    """Catches LeRobot's data-parallel training, which sends round every parameter at its start, stumbling over weights
    that have no numbers."""
    policy = load(base, training=True, **TRAINING, pretrained_path=str(base))
    policy = (policy.wrap_with_peft(peft_cli_overrides=PEFT_CLI) if adapted else policy).train()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(policy, find_unused_parameters=True)
        wrapped(make_batch())[0].backward()
    finally:
        torch.distributed.destroy_process_group()
    assert gradients(policy)


def test_show_names_it(base, tmp_path, capsys, monkeypatch):
    """Catches a checkpoint that does not say that its expert was trained over a rounded VLM."""
    from lerobot_pi0.tools import main

    monkeypatch.setattr("lerobot_pi0.tools.init_logging", lambda: logging.getLogger())
    load(base, training=True, **TRAINING).save_pretrained(tmp_path / "tuned")
    assert main(["show", f"--source={tmp_path / 'tuned'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["vlm_quantization"] == "int8"
