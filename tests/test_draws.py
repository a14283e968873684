"""Repeatable random draws of training, which depend on seed, update and sample alone."""

import itertools

import pytest
import scipy.stats
import torch
from conftest import make_batch, small_policy

from lerobot_pi0.network import flow
from lerobot_pi0.training import draws

CPU = torch.device("cpu")


def test_draws_belong_to_their_samples():
    """Catches draws that depend on the order or size of the batch: a resumed or distributed run would have others."""
    shape, time = (2, 50, 32), flow.BetaTime()
    drawn = draws.repeatable_draws(7, 3, [5, 8, 13], shape, time, 20)
    assert [x.shape for x in drawn] == [(3, *shape), (3, 2), (3, 2)]
    for all_three, two in zip(drawn, draws.repeatable_draws(7, 3, [13, 5], shape, time, 20), strict=True):
        assert torch.equal(two, all_three[[2, 0]])
    others = [draws.repeatable_draws(*key, [5, 8, 13], shape, time, 20) for key in ((8, 3), (7, 4))]
    assert len(torch.cat([drawn[1], *(times for _, times, _ in others)]).unique()) == 18
    assert all(not torch.equal(delays, drawn[2]) for _, _, delays in others)


def test_repeatable_draws_are_distributed_alike():
    """Catches neighbouring seeds that give correlated draws: Kolmogorov-Smirnov over the first of each sample."""
    noise, times, delays = draws.repeatable_draws(0, 0, range(4000), (1, 1, 1), flow.BetaTime(), 7)
    assert scipy.stats.kstest(noise.flatten().double().numpy(), scipy.stats.norm.cdf).pvalue > 0.01
    uniform = (times.flatten().double() - 0.001) / 0.999
    assert scipy.stats.kstest(uniform.numpy(), scipy.stats.beta(1.5, 1).cdf).pvalue > 0.01
    assert scipy.stats.chisquare(torch.bincount(delays.flatten(), minlength=8)).pvalue > 0.01
    for a, b in itertools.combinations((noise, times, delays), 2):
        assert abs(scipy.stats.pearsonr(a.flatten(), b.flatten()).statistic) < 0.05


def test_delays_leave_the_other_draws_alone():
    """Catches delays that change other draws: noise, times, or those of torch's own generator."""
    plain, delayed = (draws.repeatable_draws(7, 3, [5, 8], (2, 50, 32), flow.BetaTime(), most) for most in (0, 9))
    assert torch.equal(plain[0], delayed[0])
    assert torch.equal(plain[1], delayed[1])
    assert not plain[2].any()
    state = torch.random.get_rng_state()
    assert not draws.sample_delay((100,), 0, CPU).any()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert draws.sample_delay((1000,), 3, CPU).unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("update", "near_noise"), [(0, True), (4, True), (5, False), (90, False)])
def test_times_are_near_the_noise_at_first(small, monkeypatch, update, near_noise):
    """Catches `time_sampling_warmup_steps` that is not read, never ends, or ends one step too early or too late."""
    policy = small_policy(flow_samples=16, time_sampling_warmup_steps=5).train()
    policy.config.updates = update
    seen, draw = [], draws.repeatable_draws
    monkeypatch.setattr(draws, "repeatable_draws", lambda *args: seen.append(draw(*args)) or seen[-1])
    batch = make_batch(0, batch_size=4)
    policy.losses(batch | {"index": torch.arange(4)})
    assert (seen[0][1].median() > 0.9) == near_noise
