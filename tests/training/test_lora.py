"""What LoRA adapts: openpi's recipe by default, what is asked for otherwise, and nothing that is never read."""

import logging

import pytest
import torch
from conftest import CAMERAS, PEFT_CLI, make_batch, tiny_config

from lerobot_pi0 import PI0Policy
from lerobot_pi0.training.lora import PROJECTIONS

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    PI0Policy(tiny_config(CAMERAS[:1])).save_pretrained(folder)
    return folder


def adapted(base, overrides=(), **options):
    """A policy that LeRobot has wrapped for training."""
    config = tiny_config(CAMERAS[:1], pretrained_path=base, **options)
    policy = PI0Policy.from_pretrained(base, config=config)
    return policy.wrap_with_peft(peft_cli_overrides=PEFT_CLI | dict(overrides))


def ranks(model) -> dict[str, tuple[int, float]]:
    """Rank and scale of each adapted layer."""
    name = "base_model.model.model."
    return {
        key.removeprefix(name): (module.r["default"], module.scaling["default"])
        for key, module in model.named_modules()
        if hasattr(module, "lora_A") and len(module.lora_A)
    }


def test_openpis_recipe(base):
    """Catches layers that are left out or adapted in vain, other ranks, other scales, frozen projections."""
    model = adapted(base, train_expert_only=False)
    found = ranks(model)
    expert = {k: v for k, v in found.items() if ".gemma_expert." in k}
    vlm = {k: v for k, v in found.items() if ".language_model." in k}
    assert len(found) == len(expert) + len(vlm)
    assert len(expert) == 3 * len(LAYERS)
    assert len(vlm) == 2 * len(LAYERS) + 2  # of the last layer, keys and values alone are read
    assert set(expert.values()) == {(32, 1.0)}
    assert set(vlm.values()) == {(16, 1.0)}
    whole = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert {name.split(".modules_to_save")[0].split(".")[-1] for name in whole} == set(PROJECTIONS)


@pytest.mark.parametrize("frozen", [True, None])
def test_a_frozen_vlm(base, frozen):
    """Catches adapters in a VLM that is to stay frozen; frozen by default only, it is adapted."""
    found = ranks(adapted(base, train_expert_only=frozen))
    assert any(".language_model." in name for name in found) is (frozen is None)
    assert sum(".gemma_expert." in name for name in found) == 3 * len(LAYERS)


def test_what_is_asked_for(base):
    """Catches defaults that override `--peft.*`."""
    target = r".*\.gemma_expert\..*\.q_proj"
    found = ranks(adapted(base, {"target_modules": target, "r": 4, "lora_alpha": 8, "full_training_modules": []}))
    assert set(found.values()) == {(4, 2.0)}
    assert len(found) == 3
    assert set(ranks(adapted(base, {"r": 4})).values()) == {(4, 1.0), (8, 1.0)}


def test_nothing_to_train(base):
    """Catches a run of hours whose adapters have no effect."""
    last = r".*\.language_model\.layers\.2\.(self_attn\.(q|o)_proj|mlp\..*_proj)"
    model = adapted(base, {"target_modules": last, "full_training_modules": []})
    with pytest.raises(ValueError, match="nothing would be trained"):
        model.get_optim_params()


def test_dtypes_and_gradients(base, caplog):
    """Catches frozen weights that stay in float32, trained ones that are not, and adapters without a gradient."""
    from conftest import stats

    config = tiny_config(CAMERAS[:1], pretrained_path=base, dtype="bfloat16", train_expert_only=False)
    policy = PI0Policy.from_pretrained(base, config=config, dataset_stats=stats(cameras=CAMERAS[:1]))
    model = policy.wrap_with_peft(peft_cli_overrides=PEFT_CLI)
    with caplog.at_level(logging.INFO):
        model.train()
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name
    batch = make_batch(cameras=CAMERAS[:1], size=64)
    for _ in range(2):  # LoRA's second matrices begin at zero
        torch.optim.SGD(model.get_optim_params(), 0.1).zero_grad()
        model.forward(batch)[0].backward()
        torch.optim.SGD(model.get_optim_params(), 0.1).step()
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) is p.requires_grad, name
    line = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("trained: "))
    assert "vision tower 0.00 of" in line
    assert "VLM 0.0" in line
