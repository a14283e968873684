"""Flow matching against what is known in closed form."""

import itertools
import math

import pytest
import scipy.stats
import torch
from lerobot.policies.common.flow_matching import euler_integrate

from lerobot_pi0.configuration_pi0 import choices
from lerobot_pi0.network import flow, solvers

CPU = torch.device("cpu")


def solve(field, x: torch.Tensor, steps: int = 10, **options) -> torch.Tensor:
    """`integrate` a field of x and t, in whatever dtype it answers."""
    return solvers.integrate(
        lambda x, time, term: field(x, time[..., None]), lambda time: time, x, steps=steps, **options
    )


@pytest.mark.parametrize("steps", [1, 3, 10, 50])
def test_euler_on_a_linear_field(steps):
    """Catches a wrong step, sign or count: v = x shrinks x by (1 - 1/N) in each of N steps."""
    x = torch.randn(2, 1, 5, 3)
    torch.testing.assert_close(solve(lambda x, t: x, x, steps), x * (1 - 1 / steps) ** steps)


@pytest.mark.parametrize("solver", choices("solver"))
@pytest.mark.parametrize("steps", [1, 7, 10])
def test_a_constant_field(steps, solver):
    """Catches steps that do not add up to the whole way: the true velocity ε - a leads to a exactly."""
    actions, noise = torch.randn(2, 4, 1, 5, 3)
    torch.testing.assert_close(solve(lambda x, t: noise - actions, noise, steps, solver=solver), actions)


def test_euler_is_lerobots():
    """Catches other numbers than LeRobot's default solver gives: its own integrator, on a field of x and t."""
    noise = torch.randn(2, 1, 5, 3)

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * x) + t

    theirs = euler_integrate(lambda x, t: field(x, t[:, None, None, None]), noise, 10)
    torch.testing.assert_close(solve(field, noise), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("solver", "expected"),
    [("euler", [1.0, 0.75, 0.5, 0.25]), ("midpoint", [1.0, 0.75, 0.5, 0.25]), ("heun", [1.0, 0.5, 0.5, 0.0])],
)
def test_times_are_asked_for_in_order(solver, expected):
    """Catches a field evaluated at other times than it was embedded for, and terms made one by one."""
    asked, embedded = [], []

    def field(x: torch.Tensor, time: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
        assert torch.equal(term, 2 * time)
        asked.append(time.item())
        return torch.zeros_like(x)

    def embed(time: torch.Tensor) -> torch.Tensor:
        embedded.append(len(time))
        return 2 * time

    solvers.integrate(field, embed, torch.zeros(1, 1, 1, 1), solver, 4 if solver == "euler" else 2)
    assert asked == expected
    assert embedded == [4]


def riccati(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """dx/dt = -2·t·x², whose solution is x = 1 / (t² + c)."""
    return -2 * t * x**2


START = torch.tensor([0.4, 0.5]).reshape(2, 1, 1, 1)
EXACT = 1 / (1 / START - 1)


@pytest.mark.parametrize(
    ("solver", "order", "options"),
    [("euler", 1, {}), ("midpoint", 2, {}), ("heun", 2, {}), ("adaptive", 3, {"tolerance": 1e-30})],
)
def test_order_of_convergence(solver, order, options):
    """Catches a wrong coefficient: half the step has to leave a 2ᵖ-th of the error, on a field of x and of t. A
    tolerance that cannot be kept makes all of the adaptive solver's steps equal."""
    counts = (4, 8, 16) if order == 3 else (8, 16, 32)
    ends = [solve(riccati, START, n, solver=solver, **options) for n in counts]
    errors = [(end - EXACT).abs().max().item() for end in ends]
    found = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert found == pytest.approx([order, order], abs=0.25)


def test_adaptive_follows_its_tolerance():
    """Catches an error estimate that is none: a smaller tolerance costs more steps, and leaves less error."""
    errors, counts = [], []
    for tolerance in (1e-2, 1e-3, 1e-4, 1e-5):
        calls: list[int] = []

        def field(x: torch.Tensor, t: torch.Tensor, calls=calls) -> torch.Tensor:
            calls.append(1)
            return riccati(x, t)

        end = solve(field, START, 40, solver="adaptive", tolerance=tolerance)
        errors.append((end - EXACT).abs().max().item())
        counts.append(len(calls))
        assert errors[-1] < 10 * tolerance
    assert errors == sorted(errors, reverse=True)
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] < 121


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("stiffness", [1.0, 300.0])
def test_adaptive_is_bounded(steps, stiffness):
    """Catches a solver that runs out of steps before t = 0, or that never ends, on a field it cannot follow."""
    asked = []

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        asked.append(t.max().item())
        return torch.sin(stiffness * t) * stiffness + x

    end = solve(field, torch.randn(3, 1, 2, 2), steps, solver="adaptive", tolerance=1e-6)
    assert len(asked) <= 3 * steps + 1
    assert asked[-1] == 0
    assert end.isfinite().all()


def test_adaptive_steps_belong_to_their_observation():
    """Catches a step size shared by a batch: a neighbour with a stiff field would change the chunk. Bit for bit."""
    speed = torch.tensor([0.1, 3.0, 40.0]).reshape(3, 1, 1, 1)
    start = torch.randn(3, 1, 5, 2)

    def chunks(rows: slice) -> torch.Tensor:
        own = speed[rows]
        return solve(
            lambda x, t: torch.cos(own * t) * own * x, start[rows], solver="adaptive", tolerance=1e-3
        )  # fmt: skip

    together = chunks(slice(None))
    for i in range(3):
        assert torch.equal(chunks(slice(i, i + 1)), together[i : i + 1])


def test_adaptive_measures_the_robots_dims():
    """Catches steps that follow what the network answers to dims that the robot lacks, which nobody trained."""
    wild = torch.tensor([0.0, 0.0, 1e3, 1e3])
    counts = []
    for dims in (2, None):
        calls: list[int] = []

        def field(x: torch.Tensor, t: torch.Tensor, calls=calls) -> torch.Tensor:
            calls.append(1)
            return torch.sin(50 * t) * wild + x

        solve(field, torch.zeros(1, 1, 2, 4), solver="adaptive", dims=dims)
        counts.append(len(calls))
    assert counts[0] < 15
    assert counts[1] == 31


@pytest.mark.parametrize("solver", choices("solver"))
def test_nan_is_not_integrated_away(solver):
    """Catches a refused step that hides a network which answers NaN: the chunk would look like noise, and be sent."""
    x = torch.randn(2, 1, 3, 2)
    end = solve(lambda x, t: torch.where(t < 0.5, torch.nan, x), x, solver=solver)
    assert end.isnan().all()


@pytest.mark.parametrize("solver", choices("solver"))
def test_the_sum_is_float32(solver):
    """Catches a sum in the network's dtype: ten bfloat16 steps would lose the small ones."""
    x = torch.full((1, 1, 2, 2), 100.0)
    end = solve(lambda x, t: torch.full_like(x, 0.25, dtype=torch.bfloat16), x.bfloat16(), solver=solver)
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
