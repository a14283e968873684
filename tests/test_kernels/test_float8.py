"""A VLM in FP8: refused where no card multiplies it, as exact as rounding allows, in the layout that a card wants.
And int8 as a GPU computes it."""

import pytest
import torch
from conftest import draws, make_batch, relative, shake, small_policy
from lerobot.configs import PreTrainedConfig
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lerobot_pi0 import PI0Policy
from lerobot_pi0.checkpoints.checkpoint import Checkpoint
from lerobot_pi0.kernels import rounding
from lerobot_pi0.kernels.cpu_linear import Linear
from lerobot_pi0.kernels.rounding import LAYERS, float8_rows

CUDA = torch.device("cuda")


def a_layer(inputs: int = 64, outputs: int = 48, bias: bool = True) -> tuple[Linear, torch.Tensor]:
    """A layer whose channels differ in size, and tokens that do; one token is zero."""
    torch.manual_seed(0)
    layer = Linear(inputs, outputs, bias=bias).requires_grad_(False)
    layer.weight.mul_(torch.logspace(-3, 3, outputs)[:, None])
    x = torch.randn(24, inputs) * torch.logspace(-3, 3, 24)[:, None]
    x[5] = 0
    return layer, x


@pytest.mark.parametrize("bias", [True, False])
def test_no_further_off_than_rounding_allows(bias):
    """Catches a scale of the wrong axis, numbers beyond the largest of FP8, which become NaN, and a bias that is
    scaled: each factor is within a sixteenth of its own, or half a step at the bottom."""
    plain, x = a_layer(bias=bias)
    layer = LAYERS["fp8"](plain)
    layer.put(plain.weight)
    y, exact = layer(x[None])[0], plain(x)
    bottom = 2.0**-10
    w_off = plain.weight.abs() / 16 + plain.weight.abs().amax(dim=1, keepdim=True) / 448 * bottom
    x_off = x.abs() / 16 + x.abs().amax(dim=1, keepdim=True) / 448 * bottom
    allowed = x.abs() @ w_off.t() + x_off @ plain.weight.abs().t() + x_off @ w_off.t()
    assert y.isfinite().all() and ((y - exact).abs() <= 1.01 * allowed + exact.abs() / 128 + 1e-6).all()
    assert 1e-3 < relative(y, exact) < 0.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    """Catches a NaN that becomes a number, which the check of a chunk would not find; other tokens do not suffer."""
    plain, x = a_layer()
    layer = LAYERS["fp8"](plain)
    layer.put(plain.weight)
    x[2, 9] = bad
    y = layer(x)
    assert not y[2].isfinite().any() and y[[0, 1, *range(3, 24)]].isfinite().all()


class Products(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function._schema.name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


def on_fake_cuda(kind: str, tokens: int, outputs: int = 48) -> list[str]:
    with FakeTensorMode(), torch.no_grad():
        plain = Linear(64, outputs, device=CUDA, dtype=torch.bfloat16).requires_grad_(False)
        layer = LAYERS[kind](plain)
        layer.put(plain.weight)
        with Products() as products:
            y = layer(torch.empty(2, tokens, 64, device=CUDA, dtype=torch.bfloat16))
        assert y.shape == (2, tokens, outputs) and y.dtype == torch.bfloat16 and y.device.type == "cuda"
    return products.seen


def test_the_cards_product():
    """Catches operands in an order that `_scaled_mm` refuses (its shape check knows CUDA's rules), and a layer that
    multiplies in float32 where a card is there; sizes that the card refuses are emulated."""
    assert on_fake_cuda("fp8", 12).count("_scaled_mm") == 1
    assert "_scaled_mm" not in on_fake_cuda("fp8", 12, outputs=40)


def test_int8_without_copies():
    """Catches padding by nothing, which copies, and integers that are copied to where they are wanted."""
    seen = on_fake_cuda("int8", 12)
    assert seen.count("_int_mm") == 1 and "constant_pad_nd" not in seen and "copy_" not in seen
    assert "constant_pad_nd" in on_fake_cuda("int8", 4)


def test_int8_rounds_as_on_a_cpu(monkeypatch):
    """Catches a GPU's rounding that differs from the tested one: bit for bit."""
    x = a_layer()[1].bfloat16()
    expected = rounding.rounded_tokens(x)
    monkeypatch.setattr(rounding, "_on_cpu", lambda x: False)
    assert all(torch.equal(a, b) for a, b in zip(rounding.rounded_tokens(x), expected, strict=True))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_they_can_be_compiled(monkeypatch, kind):
    """Catches a layer that torch.compile cannot trace as a whole, on a GPU's path."""
    monkeypatch.setattr(rounding, "_on_cpu", lambda x: False)
    monkeypatch.setattr(rounding, "FLOAT8_MULTIPLE", 1000)  # a CPU's _scaled_mm is another one
    torch._dynamo.reset()
    plain, x = a_layer()
    layer = LAYERS[kind](plain.bfloat16())
    layer.put(plain.weight)
    with torch.no_grad():
        traced = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
        assert torch.equal(traced(x.bfloat16()), layer(x.bfloat16()))
    torch._dynamo.reset()


@pytest.mark.parametrize("card", [None, (8, 6), (8, 9), (9, 0)])
def test_cards(monkeypatch, card):
    """Catches a policy that is built for a card without products in FP8, where each call would fail, and one that is
    refused where there are."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A")
    with pytest.raises(ValueError, match="this is the device cpu: take int8"):
        rounding.check("fp8", torch.device("cpu"))
    if card is None or card < (8, 9):
        found = "the device cuda" if card is None else "NVIDIA A"
        with pytest.raises(ValueError, match=f"capability 8.9 or later .*, and this is {found}"):
            rounding.check("fp8", CUDA)
    else:
        rounding.check("fp8", CUDA)


def test_chunks(small, tmp_path, monkeypatch):
    """Catches a policy that is loaded in FP8 and keeps the VLM as it was, or whose chunk has lost its way."""
    torch.manual_seed(0)
    policy = small_policy(dtype="float32")
    shake(policy)
    policy.save_pretrained(tmp_path / "base")
    config = Checkpoint.open(tmp_path / "base").config()
    config.vlm_quantization = "fp8"
    with pytest.raises(ValueError, match="vlm_quantization=fp8 needs an NVIDIA card"):
        PI0Policy.from_pretrained(tmp_path / "base", config=config)
    monkeypatch.setattr(rounding, "check", lambda kind, device: None)
    rounded = PI0Policy.from_pretrained(tmp_path / "base", config=config)
    layers = rounding.layers(rounded)
    assert layers and all(x._rounded.dtype == torch.float8_e4m3fn for x in layers.values())
    batch, noise = make_batch(), draws(0, 2)[0][:, 0]
    chunks = [p.predict_action_chunk(batch, noise=noise) for p in (rounded, policy)]
    assert 1e-4 < relative(*chunks) < 0.1


@pytest.mark.parametrize(("kind", "device", "goes"), [
    ("fp8", "cuda", True), ("int8", "cuda", True), ("nf4", "cuda", False), ("int8", "cpu", False),
])  # fmt: skip
def test_compile_model(monkeypatch, kind, device, goes):
    """Catches `compile_model` refused where the layers can be traced, and taken where they cannot."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    make = PreTrainedConfig.get_known_choices()["pi0"]
    options = {"vlm_quantization": kind, "compile_model": True, "device": device}
    if goes:
        assert make(**options).compile_model
    else:
        with pytest.raises(ValueError, match=f"vlm_quantization={kind} on the device {device}"):
            make(**options)


def test_rows_use_the_whole_range():
    """Catches a scale that wastes FP8's range, or leaves it: the largest of each row becomes the largest number."""
    rows, scale = float8_rows(a_layer()[1])
    largest = rows.float().abs().amax(dim=1)
    assert (largest[scale[:, 0] > 1e-30] == 448).all() and largest[5] == 0
