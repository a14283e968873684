"""Flow matching against what is known in closed form."""

import pytest
import scipy.stats
import torch

from lerobot_pi0 import flow

CPU = torch.device("cpu")


@pytest.mark.parametrize("steps", [1, 3, 10, 50])
def test_euler_on_a_linear_field(steps):
    """Catches a wrong step, sign or count: v = x shrinks x by (1 - 1/N) in each of N steps."""
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(flow.euler(lambda x, i: x, x, steps), x * (1 - 1 / steps) ** steps)


@pytest.mark.parametrize("steps", [1, 7, 10])
def test_euler_on_a_constant_field(steps):
    """Catches steps that do not add up to the whole way: the true velocity ε - a leads to a exactly."""
    actions, noise = torch.randn(2, 4, 5, 3)
    torch.testing.assert_close(flow.euler(lambda x, i: noise - actions, noise, steps), actions)


def test_euler_asks_for_its_times_in_order():
    """Catches a field evaluated at other times than those that `euler_times` embeds: Σ t_i / N of v = t."""
    times = flow.euler_times(10, CPU)
    torch.testing.assert_close(times, torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]))
    asked = []
    end = flow.euler(lambda x, i: asked.append(i) or times[i].expand_as(x), torch.zeros(1), 10)
    assert asked == list(range(10))
    torch.testing.assert_close(end, torch.tensor([-0.55]))


def test_euler_sums_in_float32():
    """Catches a sum in the network's dtype: ten bfloat16 steps would lose the small ones."""
    x = torch.full((4,), 100.0)
    end = flow.euler(lambda x, i: torch.full((4,), 0.25, dtype=torch.bfloat16), x.bfloat16(), 10)
    assert end.dtype == torch.float32
    torch.testing.assert_close(end, x - 0.25)


@pytest.mark.parametrize(
    ("alpha", "beta"), [(1.5, 1.0), (1.5, 1.0 + 1e-9), (2.0, 3.0)], ids=["power", "gammas", "other"]
)
def test_time_is_beta(alpha, beta):
    """Catches the reversed distribution (more draws near the data) and a wrong branch: Kolmogorov-Smirnov."""
    time = flow.BetaTime(alpha, beta).sample((200, 100), CPU, torch.Generator().manual_seed(0))
    assert time.dtype == torch.float32
    assert time.shape == (200, 100)
    draws = (time.flatten().double() - 0.001) / 0.999
    assert scipy.stats.kstest(draws.numpy(), scipy.stats.beta(alpha, beta).cdf).pvalue > 0.01


def test_time_range():
    """Catches t = 0, where there is nothing to learn, and t > 1: t is in [0.001, 1]."""
    time = flow.BetaTime().sample((100_000,), CPU, torch.Generator().manual_seed(1))
    assert 0.001 <= time.min() < 0.01
    assert 0.999 < time.max() <= 1.0


def test_interpolate():
    """Catches a flow that runs the other way: t = 1 is noise, t = 0 is data, u = dx_t/dt everywhere."""
    actions, noise = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    for time, expected in ((0.0, actions), (1.0, noise), (0.25, 0.25 * noise + 0.75 * actions)):
        x, u = flow.interpolate(actions, noise, torch.tensor(time, dtype=torch.float64))
        torch.testing.assert_close(x, expected)
        torch.testing.assert_close(x - time * u, actions)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_draws_repeat(beta):
    """Catches a draw that does not use the generator: resuming a run would not repeat it."""

    def drawn(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        noise = flow.sample_noise((3, 4), CPU, generator)
        return [noise, flow.BetaTime(beta=beta).sample((3, 4), CPU, generator)]

    for a, b, c in zip(drawn(7), drawn(7), drawn(8), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_noise_is_standard_normal():
    """Catches noise of another scale than the one the integration starts from."""
    noise = flow.sample_noise((200, 100), CPU, torch.Generator().manual_seed(2)).flatten()
    assert scipy.stats.kstest(noise.double().numpy(), scipy.stats.norm.cdf).pvalue > 0.01


def test_draws_belong_to_their_samples():
    """Catches draws that depend on the batch's order or size: a resumed or distributed run would see others."""
    shape, time = (2, 50, 32), flow.BetaTime()
    noise, times = flow.repeatable_draws(7, 3, [5, 8, 13], shape, time)
    assert noise.shape == (3, *shape)
    assert times.shape == (3, 2)
    other_noise, other_times = flow.repeatable_draws(7, 3, [13, 5], shape, time)
    assert torch.equal(other_noise, noise[[2, 0]])
    assert torch.equal(other_times, times[[2, 0]])
    values = [times] + [flow.repeatable_draws(*key, [5, 8, 13], shape, time)[1] for key in ((8, 3), (7, 4))]
    assert len(torch.cat(values).unique()) == 18


def test_repeatable_draws_are_distributed_alike():
    """Catches neighbouring seeds that give correlated draws: Kolmogorov-Smirnov over the first of each sample."""
    noise, times = flow.repeatable_draws(0, 0, range(4000), (1, 1, 1), flow.BetaTime())
    assert scipy.stats.kstest(noise.flatten().double().numpy(), scipy.stats.norm.cdf).pvalue > 0.01
    draws = (times.flatten().double() - 0.001) / 0.999
    assert scipy.stats.kstest(draws.numpy(), scipy.stats.beta(1.5, 1).cdf).pvalue > 0.01
    assert abs(scipy.stats.pearsonr(noise.flatten(), times.flatten()).statistic) < 0.05
