"""Muon and AdamW as one optimizer: what each does, what is saved, and who is told what."""

import json

import pytest
import torch
from conftest import CAMERAS, make_batch, stats, tiny_config, train
from lerobot.optim import AdamWConfig
from lerobot.optim.optimizers import load_optimizer_state, save_optimizer_state

from lerobot_pi0 import PI0Policy
from lerobot_pi0.kernels import cpu_linear
from lerobot_pi0.training import muon, optimizers
from lerobot_pi0.training.ema import Ema, Trained


def make(**options) -> PI0Policy:
    torch.manual_seed(0)
    config = tiny_config(CAMERAS[:1], optimizer_lr=1e-3, chunk_size=6, n_action_steps=3, **options)
    return PI0Policy(config, dataset_stats=stats(cameras=CAMERAS[:1]))


def batch_of() -> dict:
    batch = make_batch(batch_size=4, cameras=CAMERAS[:1], size=64, chunk=6, vocab_size=250)
    return batch | {"index": torch.arange(4)}


def weights(policy: PI0Policy) -> dict:
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


def test_matrices_of_layers_move_in_all_directions_and_the_rest_as_with_adamw():
    """Embeddings that Muon trains, or matrices that AdamW does; or a step that is not as long as AdamW's."""
    before, after = {}, {}
    for by in (False, True):
        policy = make(optimizer_muon=by, optimizer_weight_decay=0.0)
        before = weights(policy)
        train(policy, batch_of(), 1)
        after[by] = weights(policy)
    moved = {name: after[True][name] - x for name, x in before.items() if not torch.equal(after[True][name], x)}
    by_muon = {name for name in moved if ".layers." in name and moved[name].ndim == 2}
    assert len(by_muon) > 30
    for name, change in moved.items():
        if name not in by_muon:
            torch.testing.assert_close(after[True][name], after[False][name], msg=name)
            continue
        rank, size = min(change.shape), change.square().mean().sqrt().item()
        assert size < 0.3 * 1e-3 * 1.1, name
        if "language_model.layers.1.mlp" in name:  # its gradient has its full rank
            values = torch.linalg.svdvals(change)
            assert values[rank // 2] > 0.3 * values[0], name


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_run_that_is_resumed_goes_on_as_it_was(tmp_path, average):
    """Momentum, moments or averages that are lost, through the files in which LeRobot saves an optimizer."""
    whole = make(optimizer_muon=True, ema_decay=average)
    optimizer, _ = train(whole, batch_of(), 3)
    save_optimizer_state(optimizer, tmp_path)
    half = make(optimizer_muon=True, ema_decay=average)
    half.train()
    fresh = half.config.get_optimizer_preset().build(half.get_optim_params())
    with torch.no_grad():
        for mine, theirs in zip(half.parameters(), whole.parameters(), strict=True):
            mine.copy_(theirs)
    half.config.updates = whole.config.updates
    load_optimizer_state(fresh, tmp_path)
    train(whole, batch_of(), 2, optimizer), train(half, batch_of(), 2, fresh)
    for name, x in weights(whole).items():
        assert torch.equal(x, weights(half)[name]), name


def test_its_name_in_a_run_s_config():
    """A run that LeRobot cannot resume, because the optimizer has no name there."""
    for average, name in ((0.0, "pi0_muon"), (0.9, "pi0_averaged_muon")):
        preset = tiny_config(recipe="small", ema_decay=average).get_optimizer_preset()
        assert preset.type == name
        assert (preset.lr, preset.betas) == (8e-4, (0.9, 0.999))
        json.dumps(vars(preset))
    assert type(tiny_config(recipe="small", optimizer_muon=False).get_optimizer_preset()) is AdamWConfig


def test_who_is_told_what(monkeypatch):
    """An option that another optimizer ignores in silence; an error without a remedy."""
    with pytest.raises(ValueError, match=r"optimizer_8bit and optimizer_muon.*false"):
        tiny_config(optimizer_8bit=True, optimizer_muon=True)
    policy = make(optimizer_muon=True)
    with pytest.raises(
        ValueError, match=r"optimizer_muon=True, but the optimizer is AdamW.*use_policy_training_preset"
    ):
        train(policy, batch_of(), 2, torch.optim.AdamW(policy.get_optim_params()))
    policy = make()
    other = optimizers.MuonConfig(lr=1e-3).build(policy.get_optim_params())
    with pytest.raises(ValueError, match=r"optimizer_muon=False, but the optimizer is MuonAdamW"):
        train(policy, batch_of(), 2, other)
    for kind in (optimizers.MuonConfig, optimizers.AveragedAdamWConfig, optimizers.AveragedMuonConfig):
        with pytest.raises(ValueError, match=r"leave --use_policy_training_preset at true"):
            kind().build(policy.parameters())  # as LeRobot does where the run sets --optimizer.type
    monkeypatch.setattr(optimizers, "sharding", lambda: "FSDP")
    with pytest.raises(ValueError, match=r"optimizer_muon does not go together with FSDP.*optimizer_muon=false"):
        optimizers.MuonConfig().build(policy.get_optim_params())


@pytest.mark.parametrize("slow", [True, False])
def test_muon_is_torchs(slow, monkeypatch):
    """A momentum, a length or a transposition of our own, beside torch's Muon, which rounds to bfloat16. Ours does so
    where that is fast."""
    monkeypatch.setattr(cpu_linear, "BFLOAT16_IS_SLOW", slow)
    draw, shapes = torch.Generator().manual_seed(0), [(8, 12), (8, 12), (12, 8), (6, 6)]
    start = [torch.randn(shape, generator=draw) for shape in shapes]
    both = [[torch.nn.Parameter(x.clone()) for x in start] for _ in range(2)]
    ours = muon.Muon(both[0], lr=0.02, weight_decay=0.1)
    theirs = torch.optim.Muon(both[1], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for pair in zip(*both, strict=True):
            gradient = torch.randn(pair[0].shape, generator=draw)
            for p in pair:
                p.grad = gradient.clone()
        ours.step(), theirs.step()
    for p, other, before in zip(*both, start, strict=True):
        torch.testing.assert_close(p - before, other - before, rtol=0.05, atol=2e-3)


def test_without_matrices_or_without_others():
    """torch refuses an optimizer without parameters: an adapter has nothing but matrices."""
    matrix = torch.nn.Parameter(torch.ones(2, 2))
    for matrices in ({id(matrix)}, set()):
        optimizer = optimizers.MuonConfig(lr=0.1).build(Trained([matrix], matrices))
        matrix.grad = torch.eye(2)
        before = matrix.detach().clone()
        optimizer.step()
        assert not torch.equal(matrix, before)
    assert Ema([matrix], 0.9, {id(matrix)}).parted() == ([matrix], [])
