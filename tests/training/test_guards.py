"""Numbers that can be trusted: steps that are not finite, losses by joint, and what is said of held-out samples."""

import copy
import logging

import pytest
import torch
from accelerate import Accelerator
from conftest import ACTION, CAMERAS, DIMS, make_batch, small_policy, stats
from lerobot.scripts.lerobot_train import update_policy
from lerobot.utils.logging_utils import AverageMeter, MetricsTracker

from lerobot_pi0 import PI0Policy
from lerobot_pi0.inputs.observation import ObservationError
from lerobot_pi0.network import flow
from lerobot_pi0.training import draws
from lerobot_pi0.training.guards import DivergedError
from lerobot_pi0.training.objective import HELD_OUT_SAMPLES

pytestmark = pytest.mark.usefixtures("small")
INDEX = torch.tensor([41, 7, 12])
PAD = f"{ACTION}_is_pad"


def batch_of(**changes) -> dict:
    batch = make_batch(batch_size=3, cameras=CAMERAS[:1]) | {"index": INDEX}
    return batch | changes


def policy_of(**options):
    torch.manual_seed(0)
    return small_policy(CAMERAS[:1], **options)


def lerobots_step(policy, optimizer, batch, clip: float = 1.0) -> MetricsTracker:
    """One training step, by LeRobot's own code."""
    accelerator = Accelerator(cpu=True)
    meters = {name: AverageMeter(name) for name in ("loss", "grad_norm", "lr", "update_s")}
    tracker = MetricsTracker(3, 30, 3, meters)
    return update_policy(tracker, policy, batch, optimizer, clip, accelerator)[0]


def weights_of(policy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


def assert_unchanged(policy, before: dict[str, torch.Tensor]) -> None:
    for name, p in policy.named_parameters():
        assert torch.equal(p, before[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_loss_that_is_not_finite(value, clip):
    """Catches a broken frame that ruins the weights, or an error that does not say which frame it is."""
    policy = policy_of().train()
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
    before, batch = weights_of(policy), batch_of()
    batch[ACTION][1, 3, 2] = value
    with pytest.raises(DivergedError, match=r"samples \[7\] is not finite.*action of the batch hold NaN"):
        lerobots_step(policy, optimizer, batch, clip)
    assert_unchanged(policy, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_gradient_that_is_not_finite(value, clip):
    """Catches a gradient that overflows though the loss does not: LeRobot clips it, which spreads it, and steps."""
    policy = policy_of().train()
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
    before = weights_of(policy)
    policy.model.expert.norm.weight.register_hook(lambda grad: torch.full_like(grad, value))
    with pytest.raises(DivergedError, match=r"samples \[41, 7, 12\].*observation\.state"):
        lerobots_step(policy, optimizer, batch_of(), clip)
    assert_unchanged(policy, before)


def test_other_optimizers_are_left_alone():
    """Catches a hook, which torch calls for every optimizer of the process, that judges gradients of other models."""
    policy, other = policy_of().train(), torch.nn.Linear(2, 2)
    policy.forward(batch_of())[0].backward()
    policy.model.expert.norm.weight.grad[0] = float("nan")
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), 0.1).step()
    other.weight.grad[0, 0] = float("nan")
    torch.optim.SGD(other.parameters(), 0.1).step()  # another model's affair
    with pytest.raises(DivergedError):
        torch.optim.SGD(policy.parameters(), 0.1).step()


def test_weights_that_are_not_finite():
    """Catches advice to repair a dataset in which nothing is wrong."""
    policy = policy_of().train()
    policy.model.expert.norm.weight.data[0] = float("nan")
    with pytest.raises(DivergedError, match=r"samples \[41, 7, 12\].*lower the learning rate"):
        policy.forward(batch_of())


def test_loss_by_joint():
    """Catches joints in another order, dims of the padding among them, or numbers that LeRobot does not log."""
    policy = policy_of(flow_samples=2, action_feature_names=[f"joint_{i}.pos" for i in range(DIMS)]).train()
    optimizer = torch.optim.SGD(policy.get_optim_params(), 0.0)
    batch = batch_of()
    metrics = lerobots_step(policy, optimizer, batch).to_dict()
    policy.config.updates -= 1  # LeRobot has counted the step; now its draws again
    losses = policy.losses(batch)
    for i in range(DIMS):
        assert metrics[f"loss_joint_{i}.pos"] == pytest.approx(losses[..., i].mean().item(), rel=1e-5)
    assert metrics["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert not any(f"_{DIMS}" in name for name in metrics)


def held_out(policy, batches) -> list[dict]:
    """What LeRobot does with held-out batches."""
    policy.eval()
    with torch.no_grad():
        infos = [policy.forward(batch)[1] for batch in batches]
    policy.train()
    return infos


def test_held_out_chunks(caplog):
    """Catches an error of chunks that counts padding or joints wrongly, or that nobody gets to see."""
    policy = policy_of(action_feature_names=[f"joint_{i}" for i in range(DIMS)]).train()
    batches = [make_batch(seed, 2, CAMERAS[:1]) | {"index": torch.tensor([seed, 9])} for seed in (1, 2)]
    for batch in batches:
        batch[PAD] = torch.arange(50) >= torch.tensor([[50], [20]])
    with caplog.at_level(logging.INFO):
        infos = held_out(policy, batches)
    errors, steps = torch.zeros(DIMS), 0
    chunks: list[torch.Tensor] = []
    shown: list[torch.Tensor] = []
    for batch, info in zip(batches, infos, strict=True):
        shape = (HELD_OUT_SAMPLES, 50, 32)
        noise, *_ = draws.repeatable_draws(0, -1, batch["index"].tolist(), shape, flow.BetaTime(), 0)
        chunk = policy.eval().predict_action_chunk(batch, noise=noise[:, 0])
        squares = (chunk - batch[ACTION]).square()
        chunks += [chunk[0], chunk[1, :20]]
        shown += [batch[ACTION][0], batch[ACTION][1, :20]]
        valid = torch.cat([squares[0], squares[1, :20]])
        assert info["chunk_error"] == pytest.approx(valid.mean().item(), rel=1e-5)
        errors, steps = errors + valid.sum(dim=0), steps + len(valid)
    line = next(r.getMessage() for r in caplog.records if "held out" in r.message)
    assert f"chunks {errors.mean() / steps:.4f} over 4 samples" in line
    for i in range(DIMS):
        assert f"joint_{i} {errors[i] / steps:.4f}" in line
    sampled = torch.cat([torch.diff(x, n=3, dim=0) for x in chunks]).square().mean(dim=0).sqrt()
    recorded = torch.cat([torch.diff(x, n=3, dim=0) for x in shown]).square().mean(dim=0).sqrt()
    line = next(r.getMessage() for r in caplog.records if "held out: roughness" in r.message)
    for i in range(DIMS):
        assert f"joint_{i} {sampled[i]:.3f} {recorded[i]:.3f}" in line
    rattling = [f"joint_{i}" for i in range(DIMS) if sampled[i] > 1.5 * (recorded[i] ** 2 + 20 * 0.01**2).sqrt()]
    assert line.endswith(f"rattling: {', '.join(rattling) or 'no joint'}")


def test_held_out_numbers_repeat():
    """Catches draws that depend on the run, on its options, or on earlier evaluations: numbers of two runs would not
    compare."""
    batches = [batch_of(**{PAD: torch.arange(50) >= torch.tensor([[50], [20], [1]])})]
    first = policy_of().train()
    again = policy_of(flow_samples=3, time_sampling_beta_beta=0.2, rtc_training_max_delay=9, mask_padded_actions=True)
    again.config.max_action_step = 0.01
    torch.manual_seed(0)
    again = PI0Policy(again.config, dataset_stats=stats(cameras=CAMERAS[:1])).train()
    again.config.updates = 100
    expected, found = held_out(first, batches)[0], held_out(again, batches)[0]
    assert found == pytest.approx(expected, rel=1e-5)
    assert held_out(first, batches)[0] == expected


def test_held_out_loss_is_of_the_steps_there_are():
    """Catches steps after the end of an episode that count, or that make the others count less."""
    policy, batch = policy_of(), batch_of()
    with torch.no_grad():
        every = policy.losses(batch)
        batch[PAD] = torch.arange(50) >= torch.tensor([[50], [20], [1]])
        found = policy.losses(batch).mean(dim=(1, 2, 3))
    for i, steps in enumerate((50, 20, 1)):
        assert found[i] == pytest.approx(every[i, :, :steps].mean().item(), rel=1e-5)


def test_a_loop_that_does_not_tell(caplog):
    """Catches draws that repeat because nobody called `update`, and steps that are counted twice where LeRobot did."""
    policies, batch = [policy_of(augment_images=True).train() for _ in range(2)], batch_of()
    losses: list[list[float]] = [[], []]
    for policy, found in zip(policies, losses, strict=True):
        optimizer = torch.optim.SGD(policy.get_optim_params(), 0.0)
        for _ in range(3):
            loss = policy.forward(batch)[0]
            loss.backward()
            optimizer.step()
            found.append(loss.item())
            if policy is policies[0]:
                policy.update()
    assert losses[0] == losses[1] and len(set(losses[0])) == 3
    assert [policy.train(False).config.updates for policy in policies] == [3, 3]
    assert sum("update() was not called" in record.message for record in caplog.records) == 1


def test_a_copy_is_watched_too():
    """Catches a copy of a policy that takes steps which the first would refuse."""
    policy = copy.deepcopy(policy_of()).train()
    policy.forward(batch_of())[0].backward()
    policy.model.expert.norm.weight.grad[0] = float("nan")
    with pytest.raises(DivergedError):
        torch.optim.SGD(policy.parameters(), 0.1).step()


def test_a_network_that_is_exchanged():
    """Catches losses, chunks or guards of a network that the policy no longer has: adapters, copies and compilation
    exchange it."""
    policy, other, batch = policy_of().train(), small_policy(CAMERAS[:1]).train(), batch_of()
    noise = torch.randn(3, 50, 32)
    before = policy.forward(batch)[0]
    policy.model = copy.deepcopy(other.model)
    loss = policy.forward(batch)[0]
    assert torch.equal(loss, other.forward(batch)[0]) and not torch.equal(loss, before)
    loss.backward()
    policy.model.expert.norm.weight.grad[0] = float("nan")
    with pytest.raises(DivergedError):
        torch.optim.SGD(policy.parameters(), 0.1).step()
    chunks = [x.eval().predict_action_chunk(batch, noise=noise) for x in (policy, other)]
    assert torch.equal(*chunks)


def test_padded_actions():
    """Catches steps after the end of an episode that are learned, weights that differ by batch, or K that is lost."""
    policy, masked = policy_of(flow_samples=2).train(), policy_of(flow_samples=2, mask_padded_actions=True).train()
    batch = batch_of()
    batch[PAD] = torch.arange(50) >= torch.tensor([[50], [20], [1]])
    losses, found = policy.losses(batch), masked.losses(batch)
    assert torch.equal(found, losses * ~batch[PAD][:, None, :, None])
    batch[ACTION] = torch.where(batch[PAD][..., None], batch[ACTION] + 1, batch[ACTION])
    other = masked.losses(batch)
    assert torch.equal(other[0], found[0])
    assert not other[1][:, 20:].any()
    for padded in (batch[PAD][:1], batch[PAD][0]):  # broadcast in silence
        with pytest.raises(ObservationError, match=r"action_is_pad.*expected \(batch, steps\) = \(3, 50\)"):
            masked.losses(batch | {PAD: padded})
    del batch[PAD]
    with pytest.raises(ObservationError, match="no 'action_is_pad'"):
        masked.losses(batch)
