"""The average of the weights against the definition, and where it must not be.

That a killed run goes on with both sets is in `test_resume.py`.
"""

from copy import deepcopy

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import CAMERAS, make_batch, stats, tiny_config
from lerobot.optim import load_optimizer_state, save_optimizer_state
from safetensors.torch import load_file

from lerobot_pi0 import PI0Policy
from lerobot_pi0.training.ema import Trained
from lerobot_pi0.training.optimizers import AveragedAdamWConfig

DECAY = 0.6


def averaging_policy(**options) -> PI0Policy:
    torch.manual_seed(0)
    config = tiny_config(CAMERAS[:1], ema_decay=DECAY, optimizer_lr=1e-2, **options)
    return PI0Policy(config, dataset_stats=stats(cameras=CAMERAS[:1]))


def batch_of(seed: int) -> dict:
    return make_batch(seed, cameras=CAMERAS[:1], size=64) | {"index": torch.tensor([seed, seed + 50])}


def learn(policy, optimizer, seeds) -> None:
    for seed in seeds:
        policy.train().forward(batch_of(seed))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        policy.update()


def by_hand(policy, optimizer, seeds) -> dict[str, torch.Tensor]:
    """Trains, and averages in float64 by the definition."""
    average = {name: p.detach().double() for name, p in policy.named_parameters()}
    for seed in seeds:
        learn(policy, optimizer, [seed])
        for name, p in policy.named_parameters():
            average[name] = DECAY * average[name] + (1 - DECAY) * p.detach().double()
    return average


def saved(policy, folder) -> dict[str, torch.Tensor]:
    """Parameters as a checkpoint has them."""
    policy.save_pretrained(folder)
    return dict(PI0Policy.from_pretrained(folder).named_parameters())


def assert_close(tensors: dict, expected: dict) -> None:
    for name, x in expected.items():
        torch.testing.assert_close(tensors[name].detach().double(), x, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("mode", [{"train_expert_only": True}, {}], ids=["VLM frozen", "everything"])
def test_what_is_deployed(tmp_path, mode):
    """Catches another average than the definition's: an update too many or few, the wrong weight, a wrong start."""
    policy = averaging_policy(**mode)
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
    average = by_hand(policy, optimizer, range(4))
    weights = {name: p.detach().clone() for name, p in policy.named_parameters()}
    assert_close(saved(policy, tmp_path / "while training"), average)
    assert_close(dict(policy.eval().named_parameters()), average)
    assert_close(saved(policy, tmp_path / "in evaluation"), average)
    chunk = policy.predict_action_chunk(batch_of(0), noise=torch.zeros(2, 50, 32))
    alone = PI0Policy.from_pretrained(tmp_path / "while training")
    assert torch.equal(alone.predict_action_chunk(batch_of(0), noise=torch.zeros(2, 50, 32)), chunk)
    assert alone.config.ema_decay == 0  # a deployed policy averages nothing
    for name, p in policy.train().named_parameters():
        assert torch.equal(p, weights[name]), name  # training goes on with its own weights
    assert any((average[name] - w.double()).norm() > 1e-3 for name, w in weights.items())


@pytest.mark.parametrize("evaluating", [False, True])
def test_both_sets_travel_with_the_optimizer(tmp_path, evaluating):
    """Catches a set that is lost, swapped, or taken for a moment by AdamW, when a run is saved and resumed."""
    policy = averaging_policy()
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
    learn(policy, optimizer, range(3))
    policy.train(not evaluating).save_pretrained(tmp_path)
    save_optimizer_state(optimizer, tmp_path)
    other = PI0Policy.from_pretrained(
        tmp_path, config=deepcopy(policy.config), dataset_stats=stats(cameras=CAMERAS[:1])
    )
    resumed = AveragedAdamWConfig(**vars(policy.config.get_optimizer_preset())).build(other.get_optim_params())
    load_optimizer_state(resumed, tmp_path)
    for p in resumed.param_groups[0]["params"]:
        assert set(resumed.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
    resumed.load_state_dict(resumed.state_dict())  # accelerate does that
    expected = by_hand(policy, optimizer, range(3, 5))
    learn(other, resumed, range(3, 5))
    weights = dict(policy.named_parameters())
    for name, p in other.named_parameters():
        assert torch.equal(p, weights[name]), name
    policy.eval(), other.eval()
    for name, p in other.named_parameters():
        assert torch.equal(p, weights[name]), name
    assert len(expected) == len(weights)
    assert len(load_file(tmp_path / "optimizer_state.safetensors")) == 5 * len(policy.get_optim_params())


def test_a_loop_that_does_not_tell(tmp_path):
    """Catches a loop of one's own, without LeRobot's `update`, that saves the weights it began with."""
    policies = averaging_policy(), averaging_policy()
    optimizers = [policy.config.get_optimizer_preset().build(policy.get_optim_params()) for policy in policies]
    for seed in range(3):
        learn(policies[0], optimizers[0], [seed])
        policies[1].train().forward(batch_of(seed))[0].backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
    expected = {name: x.double() for name, x in saved(policies[0], tmp_path / "lerobot's").items()}
    assert_close(saved(policies[1], tmp_path / "own"), expected)


def test_asked_twice(tmp_path):
    """Catches an average that loses its optimizer when the parameters are asked for again, to be counted, and a policy
    that cannot be saved before it has one."""
    policy = averaging_policy()
    before = {name: p.detach().double() for name, p in policy.named_parameters()}
    parameters = policy.get_optim_params()
    assert_close(saved(policy, tmp_path / "untrained"), before)
    optimizer = policy.config.get_optimizer_preset().build(parameters)
    assert policy.get_optim_params() is parameters
    expected = by_hand(policy, optimizer, [0, 1])
    assert_close(saved(policy, tmp_path / "trained"), expected)


def test_refusals(monkeypatch, tmp_path):
    """Catches an average that is kept where it would be lost in silence."""
    policy = averaging_policy()
    with pytest.raises(ValueError, match="use_policy_training_preset"):  # LeRobot hands it all parameters then
        learn(policy, torch.optim.SGD(policy.parameters(), 0.1), [0])
    optimizer = torch.optim.SGD(policy.get_optim_params(), 0.1)
    with pytest.raises(ValueError, match="use_policy_training_preset"):
        learn(policy, optimizer, [0])
    with pytest.raises(ValueError, match="ema_decay is not set"):
        policy.config.get_optimizer_preset().build(Trained(policy.parameters()))
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", "FSDP")
    with pytest.raises(ValueError, match="FSDP"):
        policy.get_optim_params()
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", "NO")
    policy.get_optim_params()
    with pytest.raises(ValueError, match="ema_decay"):
        policy.save_pretrained(tmp_path, state_dict=policy.state_dict())  # gathered from processes: no averages
    policy.config.use_peft = True
    with pytest.raises(ValueError, match="adapters"):
        policy.get_optim_params()
    with pytest.raises(ValueError, match=r"ema_decay=1\.0"):
        tiny_config(ema_decay=1.0)
