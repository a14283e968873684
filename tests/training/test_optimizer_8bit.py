"""The 8-bit optimizer against AdamW, and its states there and back.

That a killed run goes on with the same bits is in `test_resume.py`, what its states take in `test_plan.py`.
"""

import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import CAMERAS, make_batch, tiny_config
from lerobot.optim import AdamWConfig, OptimizerConfig, load_optimizer_state, save_optimizer_state

from lerobot_pi0 import PI0Policy
from lerobot_pi0.training.ema import Ema, Trained
from lerobot_pi0.training.optimizers import AdamW8bitConfig, AveragedAdamW8bitConfig

PRESET = tiny_config(optimizer_8bit=True, optimizer_lr=1e-3).get_optimizer_preset()
AVERAGED = tiny_config(optimizer_8bit=True, optimizer_lr=1e-3, ema_decay=0.9).get_optimizer_preset()
SHAPES = ((64, 128), (100, 43), (64,))
"""Whole blocks of 256, a last block that is not whole, and one of those that are left in float32."""


def parameters() -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]


def step(own, optimizer, seeds) -> None:
    for seed in seeds:
        draw = torch.Generator().manual_seed(100 + seed)
        for p in own:
            p.grad = torch.randn(p.shape, generator=draw)
        optimizer.step()
        if isinstance(own, Ema):
            own.update()


def test_it_steps_as_adamw_does():
    """Catches another weight decay, bias correction or rate, and moments that are not what they are said to be."""
    ours, theirs = parameters(), parameters()
    optimizer = PRESET.build(ours)
    step(ours, optimizer, range(20))
    step(theirs, AdamWConfig(**vars(PRESET)).build(theirs), range(20))
    for p, expected, start in zip(ours, theirs, parameters(), strict=True):
        distance = (p - expected).norm() / (start - expected).norm()
        assert distance < (0.05 if p.numel() >= 4096 else 1e-5)
    assert [optimizer.state[p]["state1"].dtype for p in ours] == [torch.uint8, torch.uint8, torch.float32]


@pytest.mark.parametrize("preset", [PRESET, AVERAGED], ids=["alone", "averaged"])
def test_there_and_back(tmp_path, preset):
    """Catches states that safetensors do not take, that come back as other numbers, or hooks that are not called."""

    def make():
        own = Ema(parameters(), 0.9) if preset is AVERAGED else parameters()
        return own, preset.build(own)

    (own, optimizer), (other, resumed) = make(), make()
    resumed.load_state_dict(resumed.state_dict())  # before the first step there is none
    step(own, optimizer, range(3))
    save_optimizer_state(optimizer, tmp_path)
    with torch.no_grad():
        for p, saved in zip(other, own, strict=True):
            p.copy_(saved)
    load_optimizer_state(resumed, tmp_path)
    resumed.load_state_dict(resumed.state_dict())  # accelerate does that
    for p, saved in zip(other, own, strict=True):
        expected = optimizer.state[saved]
        assert resumed.state[p].keys() == expected.keys()
        for name, x in expected.items():
            found = resumed.state[p][name]
            assert torch.equal(found, x) if isinstance(x, torch.Tensor) else (found, type(found)) == (x, type(x)), name
    step(own, optimizer, range(3, 6))
    step(other, resumed, range(3, 6))
    assert all(map(torch.equal, other, own))
    if preset is AVERAGED:
        assert all(map(torch.equal, other.averages, own.averages))


def test_the_choice():
    """Catches a type that `train_config.json` cannot name, options that get lost on the way, and an average too."""
    plain = tiny_config(optimizer_lr=1e-3).get_optimizer_preset()
    assert type(plain) is AdamWConfig and vars(plain) == vars(PRESET) == vars(AVERAGED)
    for preset, kind in ((PRESET, AdamW8bitConfig), (AVERAGED, AveragedAdamW8bitConfig)):
        assert type(preset) is kind is OptimizerConfig.get_choice_class(preset.type)
    with pytest.raises(ValueError, match="ema_decay is not set"):
        AVERAGED.build(Trained(parameters()))


@pytest.mark.parametrize("asked", [True, False])
def test_another_optimizer_than_is_asked_for(asked):
    """Catches a run that is resumed with the optimizer it has, though it is told to change, and a config that lies."""
    policy = PI0Policy(tiny_config(CAMERAS[:1], optimizer_8bit=asked)).train()
    own = policy.get_optim_params()
    policy.forward(make_batch(cameras=CAMERAS[:1], size=64))[0].backward()
    optimizer = AdamWConfig(grad_clip_norm=0).build(own) if asked else PRESET.build(own)
    with pytest.raises(ValueError, match=f"optimizer_8bit={asked}, but the optimizer is AdamW.*keeps its optimizer"):
        optimizer.step()


def test_refusals(monkeypatch):
    """Catches states that a checkpoint of spread weights would not hold, and a missing library that is not named."""
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", "FSDP")
    with pytest.raises(ValueError, match="optimizer_8bit does not go together with FSDP"):
        PRESET.build(parameters())
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", "MULTI_GPU")
    PRESET.build(parameters())
    monkeypatch.delitem(sys.modules, "lerobot_pi0.training.bitsandbytes_adamw")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"lerobot_policy_pi0\[bitsandbytes\]"):
        PRESET.build(parameters())
