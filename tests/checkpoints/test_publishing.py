"""Saving and publishing, as LeRobot 0.6.1 calls it and as its later versions do."""

from types import SimpleNamespace

import pytest
import torch
from conftest import MICRO_VLM, micro_policy
from lerobot.common import train_utils
from safetensors.torch import load_file

from lerobot_pi0 import PI0Policy
from lerobot_pi0.checkpoints import publishing


def test_gathered_weights_are_written(micro, tmp_path):
    """Catches LeRobot after 0.6.1, whose `save_pretrained` ignores the state that it is given."""
    policy = micro_policy()
    gathered = {name: x + 1 for name, x in policy.state_dict().items()}
    policy.save_pretrained(tmp_path, state_dict=gathered)
    written = load_file(tmp_path / "model.safetensors")
    assert torch.equal(written["model.action_in_proj.bias"], gathered["model.action_in_proj.bias"])
    with pytest.raises(ValueError, match="written to a folder"):
        policy.save_pretrained(tmp_path, state_dict=gathered, push_to_hub=True)


@pytest.mark.parametrize(("main", "sharded"), [(True, False), (False, False), (True, True), (False, True)])
def test_one_process_writes(micro, tmp_path, monkeypatch, main, sharded):
    """Catches processes that write over each other, or sharded weights that are written as they are: LeRobot after
    0.6.1 saves in every process, and its functions say which one writes and what."""
    policy, gathered = micro_policy(), []

    def gather(module):
        gathered.append(module)
        return {name: x + 1 for name, x in module.state_dict().items()} if main else {}

    modules = {
        "lerobot.distributed.checkpoint": SimpleNamespace(
            is_sharded_module=lambda module: sharded, full_model_state_dict=gather
        ),
        "lerobot.distributed.utils": SimpleNamespace(is_main_process=lambda: main),
    }
    find = publishing.importlib.import_module
    monkeypatch.setattr(publishing.importlib, "import_module", lambda name: modules.get(name) or find(name))
    policy.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists() is main
    assert gathered == ([policy] if sharded else [])
    if main:
        written = load_file(tmp_path / "model.safetensors")["model.action_in_proj.bias"]
        assert torch.equal(written, policy.model.action_in_proj.bias + sharded)


@pytest.fixture
def cards(monkeypatch):
    """The function that LeRobot after 0.6.1 writes cards with; where it is missing, one with its arguments."""

    def theirs(model_cfg, cfg=None, dataset_meta=None):
        return f"base model lerobot/{model_cfg.type}_base"

    monkeypatch.setattr(train_utils, "generate_model_card", theirs, raising=False)
    return lambda *args, **kwargs: train_utils.generate_model_card(*args, **kwargs)


def test_the_card_that_is_written_from_a_config(micro, cards, tmp_path):
    """Catches cards that name lerobot/pi0_base as the base model of a policy that was trained from random weights."""
    policy = micro_policy()
    policy.get_optim_params()
    policy.get_optim_params()
    run = SimpleNamespace(dataset=SimpleNamespace(repo_id="you/cubes"), optimizer=None, steps=7, batch_size=2, seed=1)
    card = cards(policy.config, cfg=run, dataset_meta=None)
    assert card.data.base_model is None and card.data.datasets == "you/cubes"
    assert "trained from random weights" in card.text and "7 steps, batch 2" in card.text
    assert "action expert" in card.text
    policy.save_pretrained(tmp_path)
    again = PI0Policy.from_pretrained(tmp_path)
    again.origin.start = "you/base"
    again.get_optim_params()
    assert cards(again.config).data.base_model == "you/base"
    assert cards(policy.config).data.base_model is None
    assert cards(SimpleNamespace(type="act")) == "base model lerobot/act_base"


def test_units_of_sharding(micro):
    """Catches the name of a class that is none: LeRobot after 0.6.1 shards a policy by the classes that it names."""
    policy = micro_policy()
    assert {*policy._fsdp_wrap_modules} <= {type(module).__name__ for module in policy.modules()}
    layers = [module for module in policy.modules() if type(module).__name__ in policy._fsdp_wrap_modules]
    vlm, expert = policy.model.vlm, policy.model.expert
    assert len(layers) == sum(stack.cfg.depth for stack in (vlm, expert)) + MICRO_VLM.vision.depth
