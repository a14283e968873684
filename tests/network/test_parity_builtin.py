"""The network against LeRobot's own π₀, in float32: losses, gradients and chunks from equal weights and noise."""

import pytest
import torch
from conftest import CAMERAS, copy_weights, draws, make_batch, small_builtin, small_policy

CASES = [
    pytest.param(0, 1, CAMERAS, (12,), id="one sample, all cameras, full prompt"),
    pytest.param(1, 3, CAMERAS[:1], (4, 9, 7), id="one camera, uneven prompts"),
    pytest.param(2, 2, CAMERAS[1:], (5, 11), id="first camera absent"),
]


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """‖ours - theirs‖ / ‖theirs‖."""
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


def their_losses(policy, batch, noise, time) -> torch.Tensor:
    """LeRobot's loss per element for given draws, (B, T, dims)."""
    images, masks = policy._preprocess_images(batch)
    tokens, token_mask = batch["observation.language.tokens"], batch["observation.language.attention_mask"]
    state, actions = policy.prepare_state(batch), policy.prepare_action(batch)
    losses = policy.model.forward(images, masks, tokens, token_mask, state, actions, noise[:, 0], time[:, 0])
    return losses[..., : batch["action"].shape[-1]]


@pytest.mark.parametrize(("seed", "batch_size", "cameras", "prompt"), CASES)
def test_loss_per_element(small, seed, batch_size, cameras, prompt):
    """Catches any wrong equation of the forward pass: a mask, a position, a norm, a scale."""
    torch.manual_seed(seed)
    theirs, ours = small_builtin(), small_policy()
    copy_weights(theirs, ours)
    batch, (noise, time) = make_batch(seed, batch_size, cameras, prompt), draws(seed, batch_size)
    assert relative(ours.losses(batch, noise, time)[:, 0], their_losses(theirs, batch, noise, time)) < 1e-5


@pytest.mark.parametrize("frozen", [False, True], ids=["everything trained", "VLM frozen"])
@pytest.mark.parametrize(("seed", "batch_size", "cameras", "prompt"), CASES)
def test_gradients(small, seed, batch_size, cameras, prompt, frozen):
    """Catches a path that autograd does not see, as a `no_grad` that covers too much would cut."""
    torch.manual_seed(seed)
    theirs, ours = small_builtin(train_expert_only=frozen), small_policy(train_expert_only=frozen)
    copy_weights(theirs, ours)
    batch, (noise, time) = make_batch(seed, batch_size, cameras, prompt), draws(seed, batch_size)
    ours.losses(batch, noise, time).mean().backward()
    their_losses(theirs, batch, noise, time).mean().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    trained = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert set(trained) == {name for name, grad in expected.items() if "lm_head" not in name and grad.any()}
    for name, grad in trained.items():
        assert grad is not None, name
        # biases of keys have gradients of exactly zero but for rounding, so the floor is the network's scale
        floor = 1e-6 * max(g.norm() for g in expected.values())
        assert (grad - expected[name]).norm() <= 1e-5 * expected[name].norm() + floor, name


@pytest.mark.parametrize(("seed", "batch_size", "cameras", "prompt"), CASES)
def test_chunk(small, seed, batch_size, cameras, prompt):
    """Catches an integration that differs: the order of times, the step, the direction."""
    torch.manual_seed(seed)
    theirs, ours = small_builtin(), small_policy()
    copy_weights(theirs, ours)
    batch, (noise, _) = make_batch(seed, batch_size, cameras, prompt), draws(seed, batch_size)
    theirs.model.sample_noise = lambda shape, device: noise[:, 0]
    chunk = ours.predict_action_chunk(batch, noise=noise[:, 0])
    assert relative(chunk, theirs.predict_action_chunk(batch)) < 1e-5


def test_images_of_another_shape(small):
    """Catches a resize that differs from LeRobot's: padding side, antialiasing, rounding of the size."""
    torch.manual_seed(0)
    theirs, ours = small_builtin(), small_policy()
    copy_weights(theirs, ours)
    batch, (noise, time) = make_batch(), draws(0, 2)
    for key, size in zip(CAMERAS, [(48, 64), (33, 20), (32, 32)], strict=True):
        batch[key] = torch.rand(2, 3, *size)
    assert relative(ours.losses(batch, noise, time)[:, 0], their_losses(theirs, batch, noise, time)) < 1e-5
