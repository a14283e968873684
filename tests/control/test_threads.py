"""One policy in several threads, as LeRobot evaluates several tasks at a time: each thread executes its own chunk."""

import copy
import itertools
import pickle
import threading

import pytest
import torch
from conftest import make_batch, small_policy

from lerobot_pi0.control.player import Player

STEPS = 6


def alone(policy, batch: dict, noise: torch.Tensor) -> torch.Tensor:
    return policy.predict_action_chunk(dict(batch), noise=noise)[0]


@pytest.mark.parametrize("threads", [2, 5])
def test_each_thread_gets_its_own_actions(small, threads):
    """Catches a queue that threads share: each would execute actions that were made for another's observation."""
    policy = small_policy(chunk_size=STEPS, n_action_steps=STEPS)
    noise = torch.zeros(1, STEPS, 32)
    batches = [make_batch(seed, batch_size=1) for seed in range(threads)]
    expected = [alone(policy, batch, noise) for batch in batches]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.pairwise(expected))
    together, made = threading.Barrier(threads), [[] for _ in range(threads)]

    def episode(i: int) -> None:
        policy.reset()
        together.wait()
        for _ in range(2 * STEPS):
            made[i].append(policy.select_action(dict(batches[i]), noise=noise)[0])
            together.wait()

    running = [threading.Thread(target=episode, args=(i,)) for i in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    for i in range(threads):
        assert torch.allclose(torch.stack(made[i]), expected[i].repeat(2, 1), atol=1e-5), f"thread {i}"


def test_a_thread_that_watches_ends_the_chunk(small):
    """Catches a chunk that goes on after another thread, which runs no episode of its own, called reset()."""
    policy = small_policy(chunk_size=STEPS, n_action_steps=STEPS)
    noise = torch.zeros(1, STEPS, 32)
    first, second = (make_batch(seed, batch_size=1) for seed in range(2))
    policy.select_action(dict(first), noise=noise)
    watcher = threading.Thread(target=policy.reset)
    watcher.start()
    watcher.join()
    action = policy.select_action(dict(second), noise=noise)[0]
    assert torch.allclose(action, alone(policy, second, noise)[0], atol=1e-5)


def test_a_reset_of_one_episode_leaves_the_others(small):
    """Catches a reset between a thread's episodes that cuts the chunks of all other threads off."""
    policy = small_policy(chunk_size=STEPS, n_action_steps=STEPS)
    noise = torch.zeros(1, STEPS, 32)
    mine, theirs = (make_batch(seed, batch_size=1) for seed in range(2))
    policy.select_action(dict(mine), noise=noise)

    def other() -> None:
        for _ in range(2):
            policy.select_action(dict(theirs), noise=noise)
            policy.reset()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    action = policy.select_action(dict(mine), noise=torch.ones_like(noise))[0]  # not read: the chunk is there
    assert torch.allclose(action, alone(policy, mine, noise)[1], atol=1e-5)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on(small, again):
    """Catches queues of threads that cannot be copied with their policy, or copies that share one."""
    policy = small_policy(chunk_size=STEPS, n_action_steps=STEPS)
    noise, batch = torch.zeros(1, STEPS, 32), make_batch(0, batch_size=1)
    policy.select_action(dict(batch), noise=noise)
    player: Player = policy._player
    other = again(player.__getstate__()["_episodes"])
    assert len(other.queue) == STEPS - 1
    copied = copy.deepcopy(policy)
    expected = alone(policy, batch, noise)
    for made in (policy, copied):
        assert torch.allclose(made.select_action(dict(batch), noise=noise)[0], expected[1], atol=1e-5)
