"""Training compared with LeRobot's own π₀: equal weights, data and noise give the same curve of losses.

This is done in float64, where rounding stays small for hundreds of steps. Both networks compute norms, rotations and
times in float32, whatever the dtype of their weights. The fixture makes those float64 too; otherwise the curves would
differ by rounding alone.
"""

import pytest
import torch
from conftest import CAMERAS, copy_weights, make_batch, small_builtin, small_policy, take_step
from lerobot.utils.constants import ACTION
from torch.optim.lr_scheduler import LRScheduler

CHUNK, BATCH, BATCHES = 10, 2, 8
OPTIONS = {
    "chunk_size": CHUNK, "n_action_steps": CHUNK, "optimizer_lr": 1e-3, "scheduler_decay_lr": 1e-4,
    "scheduler_warmup_steps": 10, "scheduler_decay_steps": 200,
}  # fmt: skip
MODES = {"VLM frozen": {"train_expert_only": True}, "everything": {"train_expert_only": False}}


def their_loss(policy, batch: dict, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """LeRobot's loss for given draws."""
    policy.model.sample_noise = lambda shape, device: noise[:, 0]
    policy.model.sample_time = lambda batch_size, device: time[:, 0]
    return policy.forward(batch)[0]


def our_loss(policy, batch: dict, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    return policy.forward(batch, noise=noise, time=time)[0]


def learn(policy, loss_of, steps: int) -> list[float]:
    """Losses of a training run as in LeRobot: with its presets of optimizer and schedule, and clipped gradients."""
    config = policy.config
    preset = config.get_optimizer_preset()
    optimizer = preset.build(policy.train().get_optim_params())
    schedule: LRScheduler = config.get_scheduler_preset().build(optimizer, 200)
    losses = []
    for step in range(steps):
        draw = torch.Generator().manual_seed(step % BATCHES)
        batch = make_batch(step % BATCHES, BATCH, CAMERAS[: 1 + step % 3], prompt=(4, 7), chunk=CHUNK, length=8)
        batch[ACTION] = batch[ACTION].cumsum(dim=1) / 3  # smooth, so that there is something to learn
        noise = torch.randn(BATCH, 1, CHUNK, 32, generator=draw, dtype=torch.float64)
        time = torch.rand(BATCH, 1, generator=draw, dtype=torch.float64) * 0.99 + 0.005
        loss = loss_of(policy, batch, noise, time)
        take_step(policy, loss, optimizer, preset)
        schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", MODES)
def test_the_same_curve(double, mode, steps):
    """Catches a gradient, a frozen part, a weight decay or a schedule that differs: small errors add up over a run."""
    torch.manual_seed(0)
    theirs, ours = (make(**MODES[mode], **OPTIONS).double() for make in (small_builtin, small_policy))
    copy_weights(theirs, ours)
    before = {name: p.clone() for name, p in theirs.named_parameters()}
    expected, found = (
        torch.tensor(learn(policy, loss_of, steps), dtype=torch.float64)
        for policy, loss_of in ((theirs, their_loss), (ours, our_loss))
    )
    assert ((found - expected).abs() / expected).max() < 1e-7
    assert expected[-BATCHES:].mean() < expected[:BATCHES].mean()  # it is learning, not standing still
    after = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if p.requires_grad:  # LeRobot's decay moves what nothing reads, too
            moved = (after[name] - before[name]).norm()
            assert moved > 0, name
            assert (p - after[name]).norm() <= 1e-5 * moved, name
