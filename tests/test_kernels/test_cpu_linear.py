"""The linear layer that multiplies bfloat16 weights in float32 where the CPU is faster at that."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lerobot_pi0.kernels import cpu_linear
from lerobot_pi0.kernels.cpu_linear import MANY_TOKENS, Linear


@pytest.fixture
def no_amx(monkeypatch):
    """Behave as on a CPU without AMX, whatever this one has."""
    monkeypatch.setattr(cpu_linear, "BFLOAT16_IS_SLOW", True)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_widened_product_is_the_more_accurate_one(no_amx, bias, autocast):
    """Catches a buffer that is too small, shared wrongly between shapes, or a product that autocast narrows again."""
    torch.manual_seed(0)
    layers = [Linear(48, 80, bias=bias).bfloat16(), Linear(80, 16, bias=bias).bfloat16()]
    x = torch.randn(MANY_TOKENS, 48).bfloat16()
    exact = x.double()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for layer in layers:
            y = layer(exact.bfloat16())
            exact = torch.nn.functional.linear(
                exact.bfloat16().double(), layer.weight.double(), layer.bias.double() if bias else None
            )
            assert y.dtype == torch.bfloat16
            assert torch.equal(y, exact.float().bfloat16()) or (y - exact).norm() < 2e-3 * exact.norm()


def test_only_where_it_pays(no_amx, monkeypatch):
    """Catches widening where it costs: few tokens, float32 weights, or a product that has to be differentiated."""
    monkeypatch.setattr(cpu_linear, "_widened", lambda weight: pytest.fail("widened"))
    narrow = Linear(8, 8).bfloat16()
    with torch.no_grad():
        narrow(torch.randn(MANY_TOKENS - 1, 8).bfloat16())
        Linear(8, 8)(torch.randn(MANY_TOKENS, 8))
    narrow(torch.randn(MANY_TOKENS, 8).bfloat16()).sum().backward()
    assert narrow.weight.grad is not None
    monkeypatch.setattr(cpu_linear, "BFLOAT16_IS_SLOW", False)
    with torch.no_grad():
        narrow(torch.randn(MANY_TOKENS, 8).bfloat16())


def test_a_buffer_of_inference_mode_serves_all(no_amx):
    """Catches a buffer that a caller's inference mode made, with which every later product of this thread fails."""
    torch.manual_seed(0)
    layer, x = Linear(160, 160).bfloat16(), torch.randn(MANY_TOKENS, 160).bfloat16()
    if hasattr(cpu_linear._scratch, "buffer"):
        del cpu_linear._scratch.buffer
    with torch.inference_mode():
        first = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), first)


def test_not_where_nothing_is_computed(no_amx):
    """Catches a buffer with numbers among tensors that have none, with which `lerobot-pi0 plan` computes."""
    layer = Linear(48, 80).bfloat16()
    with torch.no_grad():
        layer(torch.randn(MANY_TOKENS, 48).bfloat16())
        with FakeTensorMode():
            fake = Linear(48, 16, dtype=torch.bfloat16)
            assert fake(torch.randn(MANY_TOKENS, 48).bfloat16()).shape == (MANY_TOKENS, 16)


@pytest.mark.parametrize(
    ("dtype", "slow", "width", "told"),
    [
        ("bfloat16", True, 8, True),
        ("bfloat16", False, 8, False),
        ("float32", True, 8, False),
        ("bfloat16", True, 2**14, False),
    ],
)
def test_a_small_network_is_advised_to_leave_bfloat16(monkeypatch, caplog, dtype, slow, width, told):
    """Catches a policy that was trained where bfloat16 is fast, and creeps elsewhere without a word; and a large one,
    which needs bfloat16 for its memory, that is told to leave it."""
    monkeypatch.setattr(cpu_linear, "BFLOAT16_IS_SLOW", slow)
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight = torch.nn.Parameter(torch.zeros(1, dtype=getattr(torch, dtype)).expand(width, width))  # one number
    cpu_linear.advise(model)
    assert ("--policy.dtype=float32" in caplog.text) == told


@pytest.fixture
def fast_bfloat16(monkeypatch):
    """Behave as on a CPU with products of bfloat16. oneDNN emulates them on CPUs with AVX512; for others, on which the
    code under test never runs, it has no such kernels."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 kernels for this CPU")
    monkeypatch.setattr(cpu_linear, "BFLOAT16_IS_SLOW", False)


@pytest.mark.parametrize("tokens", [1, 200])
def test_fused_is_the_more_accurate_one(fast_bfloat16, tokens):
    """Catches a fusion with the other GELU, without the bias, or that multiplies before it activates."""
    torch.manual_seed(0)
    gate, up, biased = (Linear(64, 96, bias=bias).bfloat16() for bias in (False, False, True))
    x = (4 * torch.randn(1, tokens, 64)).bfloat16()
    with torch.no_grad():
        fused = [cpu_linear.gated(gate, up, x), cpu_linear.gelu_linear(biased, x)]
        exact = [gelu_of(gate, x) * up.double()(x.double()), gelu_of(biased, x)]
        for layer in (gate, up, biased):
            layer.bfloat16()
    plain = [cpu_linear.gated(gate, up, x), cpu_linear.gelu_linear(biased, x)]
    assert plain[0].requires_grad and not fused[0].requires_grad
    for a, b, c in zip(fused, plain, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - c).norm() <= (b - c).norm() and (a - c).norm() < 5e-3 * c.norm()


def gelu_of(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    """In float64."""
    return torch.nn.functional.gelu(layer.double()(x.double()), approximate="tanh")


def test_fused_only_where_nobody_looks(fast_bfloat16):
    """Catches a fusion that passes over an adapter, a gradient or a counter of operations."""
    layer, x = Linear(64, 96).bfloat16(), torch.randn(2, 64).bfloat16()
    assert not cpu_linear.can_fuse(layer, x)
    with torch.no_grad():
        assert cpu_linear.can_fuse(layer, x) == torch.backends.mkldnn.is_available()
        assert not cpu_linear.can_fuse(layer, x.float())
        assert not cpu_linear.can_fuse(Linear(64, 96), x)
        assert not cpu_linear.can_fuse(torch.nn.Sequential(layer), x)
        with FlopCounterMode(display=False) as counter:
            cpu_linear.gated(layer, layer, x)
        assert counter.get_total_flops() == 2 * 2 * 2 * 64 * 96


def change_in_place(layer: Linear) -> None:
    with torch.no_grad():
        layer.weight[0, 0] += 1


def change_behind_autograds_back(layer: Linear) -> None:
    layer.weight.data[3, 5] += 1


def change_storage(layer: Linear) -> None:
    layer.weight.data = -layer.weight.data


def exchange_rows(layer: Linear) -> None:
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(0).clone())


def exchange_words(layer: Linear) -> None:
    """What a sum of 64-bit words does not see."""
    layer.weight.data.copy_(layer.weight.data.view(torch.int64).flip(1).view(torch.bfloat16))


def step_of_an_optimizer(layer: Linear) -> None:
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=0.5).step()
    layer.weight.grad = None


def fused_step(layer: Linear) -> None:
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.AdamW([layer.weight], lr=0.5, fused=True).step()
    layer.weight.grad = None


def exchange_data(layer: Linear) -> None:
    """Two tensors in turn, as averages are deployed: the memory may be one that was packed before."""
    layer.weight.data, layer.other = getattr(layer, "other", layer.weight.data.flip(1).contiguous()), layer.weight.data


CHANGES = [
    change_in_place, change_behind_autograds_back, change_storage, exchange_rows, exchange_words, step_of_an_optimizer,
    fused_step, exchange_data,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_packed_weights_are_the_weights(fast_bfloat16, change):
    """Catches a packed copy that outlives its weight, in whatever way that was changed, or the block it is for."""
    torch.manual_seed(0)
    layer, other, x = Linear(64, 96).bfloat16(), Linear(64, 96, bias=False).bfloat16(), torch.randn(3, 64).bfloat16()
    net = torch.nn.ModuleList([layer, other])
    for _ in range(2):
        with torch.no_grad():
            plain = [layer(x), cpu_linear.gelu_linear(layer, x), cpu_linear.gated(layer, other, x)]
            with cpu_linear.packed(net):
                assert (layer.packed is not None) == torch.backends.mkldnn.is_available()
                found = [layer(x), cpu_linear.gelu_linear(layer, x), cpu_linear.gated(layer, other, x)]
        for a, b in zip(found, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
        assert layer.packed is None
        change(layer)
    assert not torch.allclose(plain[0].float(), torch.nn.functional.linear(x, layer.weight, layer.bias).float())


@pytest.mark.parametrize("change", [exchange_rows, exchange_words])
def test_packed_weights_of_inference_mode(fast_bfloat16, change):
    """Catches a copy that is held to a version counter, which tensors of inference mode do not have."""
    with torch.inference_mode():
        layer, x = Linear(64, 96).bfloat16(), torch.randn(3, 64).bfloat16()
        layer.weight = torch.nn.Parameter(torch.randn(96, 64).bfloat16(), requires_grad=False)
        assert layer.weight.is_inference()
        for _ in range(2):
            plain = layer(x)
            with cpu_linear.packed(layer):
                torch.testing.assert_close(layer(x), plain, rtol=1e-2, atol=1e-2)
            change(layer)


def test_packed_layers_are_copied_and_differentiated(fast_bfloat16):
    """Catches a packed weight that stands in the way of a copy, of a gradient, or of a product in float32."""
    layer, x = Linear(64, 96).bfloat16(), torch.randn(3, 64).bfloat16()
    with cpu_linear.packed(layer):
        layer(x).sum().backward()
        with torch.no_grad():
            layer(x)
    assert layer.weight.grad is not None
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    with cpu_linear.packed(layer.float()), torch.no_grad():
        assert layer.packed is None
        assert layer(x.float()).dtype == torch.float32
