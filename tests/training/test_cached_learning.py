"""A run on cached contexts learns as a run that computes them: 200 steps of the small preset.

The measure is what the order of the samples alone changes: two runs without a cache, of equal weights and draws.
"""

from itertools import chain, islice, repeat
from pathlib import Path

import pytest
import torch
from cached_world import cache, run_of, write_world
from conftest import take_step
from torch.utils.data import DataLoader

STEPS, WINDOW, BATCH = 200, 20, 4
RATE = {"optimizer_lr": 1e-3, "scheduler_decay_lr": 1e-4, "scheduler_warmup_steps": 10, "scheduler_decay_steps": STEPS}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A policy, a dataset, and its contexts, which are computed in other batches than those of training."""
    folder = tmp_path_factory.mktemp("learning")
    write_world(folder)
    assert cache(folder, "float32") == 0
    assert cache(folder, "8bits", "--bits=8") == 0
    return folder


def curve(world: Path, order: int, name: str | None = None) -> torch.Tensor:
    """Losses of a run whose samples come in one of many orders, with its contexts computed or cached."""
    root, options = ("data", {}) if name is None else (f"{name}/dataset", {"context_cache": str(world / name)})
    policy, dataset, prepare = run_of(world / "base", world / root, **RATE, **options)
    preset = policy.config.get_optimizer_preset()
    optimizer = preset.build(policy.get_optim_params())
    schedule = policy.config.get_scheduler_preset().build(optimizer, STEPS)
    shuffled = torch.Generator().manual_seed(order)
    loader = DataLoader(dataset, BATCH, shuffle=True, generator=shuffled, drop_last=True)
    losses = []
    for batch in islice(chain.from_iterable(repeat(loader)), STEPS):
        loss, _ = policy.forward(prepare(batch))
        take_step(policy, loss, optimizer, preset)
        schedule.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def windows(losses: torch.Tensor) -> torch.Tensor:
    """Means of consecutive losses, without the noise of single batches."""
    return losses.unflatten(0, (-1, WINDOW)).mean(dim=1)


@pytest.mark.slow
def test_the_curve(world):
    """Catches contexts with which a run learns otherwise: an error too small for one step, which adds up over many.

    In the same order, the curve is the uncached one but for rounding; in another order it is apart from the uncached
    one by no more than that order is without a cache.
    """
    first, second = curve(world, order=0), curve(world, order=1)
    spread = (windows(first) - windows(second)).abs()
    assert windows(first)[-1] < 0.7 * windows(first)[0]  # it is learning
    for name, bound in (("float32", 1e-3), ("8bits", 0.1)):
        for order, uncached in enumerate((first, second)):
            apart = (windows(curve(world, order, name)) - windows(uncached)).abs()
            assert apart.square().mean() < bound**2 * spread.square().mean(), name
