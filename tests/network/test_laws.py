"""What π₀'s structure guarantees, checked by changing one thing and comparing."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from conftest import (
    CAMERAS,
    DIMS,
    assert_gradients_close,
    draws,
    gradients,
    make_batch,
    relative,
    shake,
    small_policy,
    subset,
    widen,
)
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_TOKENS, OBS_STATE

from lerobot_pi0 import PI0Policy
from lerobot_pi0.network.init import initialise_vision
from lerobot_pi0.network.pi0 import Context, block_mask
from lerobot_pi0.network.siglip import VisionTower
from lerobot_pi0.network.sizes import PALIGEMMA_PRESETS

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("small")


def shaken_policy(cameras=CAMERAS, **options) -> PI0Policy:
    """A small policy in which every parameter matters; equal options of the network give equal weights."""
    torch.manual_seed(0)
    policy = small_policy(cameras, **options)
    shake(policy)
    return policy


def context_of(policy: PI0Policy, batch: dict) -> Context:
    return policy.model.context(policy.observe(batch, CPU))


@pytest.mark.parametrize(("left", "right"), [(0, 0), (0, 9), (4, 0)], ids=["other", "more", "left"])
def test_padding_changes_nothing(left, right):
    """Catches padding that is attended to, or that takes a position."""
    policy, batch, (noise, time) = shaken_policy(), make_batch(prompt=(9, 5)), draws(0, 2)
    padded = widen(batch, left, right)
    assert relative(policy.losses(padded, noise, time), policy.losses(batch, noise, time)) < 1e-6
    chunk = policy.predict_action_chunk(batch, noise=noise[:, 0])
    assert relative(policy.predict_action_chunk(padded, noise=noise[:, 0]), chunk) < 1e-6


def test_padding_is_not_computed():
    """Catches the cost of a 48-token prompt paid for ten tokens."""
    context = context_of(shaken_policy(), make_batch(prompt=(7, 3), length=12))
    assert context.mask_BS.shape[1] == len(CAMERAS) * 16 + 7 + 1
    assert {x.shape[1] for kv in context.cache for x in kv} == {context.mask_BS.shape[1]}


@pytest.mark.parametrize("present", [CAMERAS[:1], CAMERAS[1:], CAMERAS[::2]], ids=["1st", "2nd, 3rd", "1st, 3rd"])
def test_absent_cameras_change_nothing(present):
    """Catches a black image that is seen, or a slot that takes positions: as if the config had no such camera."""
    policy, without = shaken_policy(), shaken_policy(present)
    batch, (noise, time) = make_batch(cameras=present), draws(0, 2)
    assert torch.equal(policy.losses(batch, noise, time), without.losses(batch, noise, time))
    chunks = [p.predict_action_chunk(batch, noise=noise[:, 0]) for p in (policy, without)]
    assert torch.equal(*chunks)


def test_empty_cameras_change_nothing(caplog):
    """Catches LeRobot's `empty_cameras` slots being computed, or warned about."""
    policy, without = shaken_policy(empty_cameras=2), shaken_policy()
    assert len(policy.config.image_features) == len(CAMERAS) + 2
    batch, (noise, time) = make_batch(), draws(0, 2)
    assert torch.equal(policy.losses(batch, noise, time), without.losses(batch, noise, time))
    assert not [r for r in caplog.records if "absent" in r.message]


def test_batch_neighbours_change_nothing():
    """Catches anything shared across a batch: a mask row, a norm, the length of the longest prompt."""
    policy, batch, (noise, time) = shaken_policy(), make_batch(batch_size=3, prompt=(3, 12, 7)), draws(0, 3)
    chunks = policy.predict_action_chunk(batch, noise=noise[:, 0])
    losses = policy.losses(batch, noise, time)
    for i in range(3):
        alone, row = subset(batch, slice(i, i + 1)), slice(i, i + 1)
        assert relative(policy.predict_action_chunk(alone, noise=noise[row, 0]), chunks[row]) < 1e-5
        assert relative(policy.losses(alone, noise[row], time[row]), losses[row]) < 1e-5


def test_prefix_does_not_see_the_state():
    """Catches a state token in the prefix's block: the prefix could then not be computed without it."""
    policy, batch = shaken_policy(), make_batch()
    other = batch | {OBS_STATE: batch[OBS_STATE] + 1}
    for a, b in zip(context_of(policy, batch).cache, context_of(policy, other).cache, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x[:, :-1], y[:, :-1])
            assert not torch.allclose(x[:, -1], y[:, -1])


def test_prefix_sees_all_of_itself():
    """Catches a causal mask: the first image's keys depend on the prompt, the last prompt token's on the image."""
    policy, batch = shaken_policy(), make_batch(prompt=(12,))
    tokens, image = batch[OBS_LANGUAGE_TOKENS].clone(), batch[CAMERAS[0]].clone()
    tokens[:, -1] = tokens[:, -1] % 299 + 1
    image[..., :8, :8] = 1 - image[..., :8, :8]
    base = context_of(policy, batch).cache[-1][0]
    by_prompt = context_of(policy, batch | {OBS_LANGUAGE_TOKENS: tokens}).cache[-1][0]
    by_image = context_of(policy, batch | {CAMERAS[0]: image}).cache[-1][0]
    for other in (by_prompt, by_image):
        assert (base != other).any(dim=-1).all()


def test_context_does_not_see_actions():
    """Catches a velocity that writes into the context, which serves every Euler step and flow sample."""
    policy, (noise, time) = shaken_policy(), draws(0, 2)
    with torch.no_grad():
        context = context_of(policy, make_batch())
        before = [(k.clone(), v.clone()) for k, v in context.cache], context.mask_BS.clone()
        time_BKTW = policy.model.embed_time(time)[:, :, None]
        first = policy.model.velocity(noise, time_BKTW, context)
        policy.model.velocity(noise * 2, time_BKTW, context)
        assert torch.equal(policy.model.velocity(noise, time_BKTW, context), first)
    assert torch.equal(context.mask_BS, before[1])
    for now, then in zip(context.cache, before[0], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(now, then, strict=True))


@pytest.mark.parametrize("samples", [1, 3])
def test_state_runs_ahead_or_with_the_actions(samples):
    """Catches a state token that has other positions, masks or gradients where it shares the actions' pass."""
    policy, batch, (noise, time) = shaken_policy().double(), make_batch(prompt=(9, 5)), draws(0, 2, samples)
    velocities, gradients = [], []
    for ahead in (True, False):
        policy.zero_grad()
        context = policy.model.context(policy.observe(batch, CPU), ahead)
        velocities.append(policy.model.velocity(noise, policy.model.embed_time(time)[:, :, None], context))
        velocities[-1].square().sum().backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*velocities)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)  # norms and rotations are float32


@pytest.mark.parametrize("step", [0, 25, 49])
def test_actions_see_each_other(step):
    """Catches a causal mask among the actions: each changes the velocity of all, earlier ones included."""
    policy, (noise, time) = shaken_policy(), draws(0, 2)
    other = noise.clone()
    other[:, :, step] += 1
    with torch.no_grad():
        context, time_BKTW = context_of(policy, make_batch()), policy.model.embed_time(time)[:, :, None]
        a, b = (policy.model.velocity(x, time_BKTW, context) for x in (noise, other))
    assert (a != b).any(dim=-1).all()


def test_everything_is_seen():
    """Catches an input that reaches no action: each camera, the prompt, the state."""
    policy, batch, (noise, _) = shaken_policy(), make_batch(), draws(0, 2)
    base = policy.predict_action_chunk(batch, noise=noise[:, 0])
    changed = {key: 1 - batch[key] for key in CAMERAS}
    changed |= {OBS_STATE: batch[OBS_STATE] + 1, OBS_LANGUAGE_TOKENS: batch[OBS_LANGUAGE_TOKENS] % 299 + 1}
    for key, value in changed.items():
        assert relative(policy.predict_action_chunk(batch | {key: value}, noise=noise[:, 0]), base) > 1e-5, key


@pytest.mark.parametrize("frozen", [False, True], ids=["everything trained", "VLM frozen"])
@pytest.mark.parametrize("samples", [2, 5])
def test_flow_samples_are_separate_draws(samples, frozen):
    """Catches samples that share a position, a time or a mask row: loss and gradients are K draws' mean."""
    options = {"train_expert_only": frozen}
    many, one = shaken_policy(flow_samples=samples, **options), shaken_policy(**options)
    batch, (noise, time) = make_batch(), draws(0, 2, samples)
    losses = many.losses(batch, noise, time)
    losses.mean().backward()
    for k in range(samples):
        alone = one.losses(batch, noise[:, k : k + 1], time[:, k : k + 1])
        assert relative(losses[:, k], alone[:, 0]) < 1e-6
        (alone.mean() / samples).backward()
    assert_gradients_close(gradients(many), gradients(one))


def test_flow_samples_do_not_see_each_other():
    """Catches a block mask with a leak: another draw in sample 1 leaves samples 0 and 2 bitwise as they were."""
    policy, batch, (noise, time) = shaken_policy(flow_samples=3), make_batch(), draws(0, 2, 3)
    other_noise, other_time = noise.clone(), time.clone()
    other_noise[:, 1], other_time[:, 1] = 3.0, 0.5
    a, b = policy.losses(batch, noise, time), policy.losses(batch, other_noise, other_time)
    assert torch.equal(a[:, ::2], b[:, ::2])
    assert not torch.allclose(a[:, 1], b[:, 1])


def test_random_draws_are_one_per_sample():
    """Catches K samples that share noise or time, which would be one sample computed K times."""
    policy, batch = shaken_policy(flow_samples=4), make_batch(batch_size=3)
    losses = policy.losses(batch)
    assert losses.shape == (3, 4, 50, DIMS)
    assert len(set(losses.mean(dim=(2, 3)).flatten().tolist())) == 12


@contextlib.contextmanager
def saved_numbers() -> Iterator[list[int]]:
    """Sizes of what autograd keeps for the backward pass, inside the block."""
    sizes: list[int] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch.nn.Parameter):
            sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield sizes


def saved_by_the_vlm(policy: PI0Policy, monkeypatch) -> list[int]:
    """What autograd keeps between the start of `prefix` and the end of `vlm.cache` in one training step."""
    sizes: list[int] = []
    for owner, name in ((policy.model, "prefix"), (policy.model.vlm, "cache")):
        original = getattr(owner, name)

        def counted(*args, original=original, **kwargs):
            with saved_numbers() as now:
                result = original(*args, **kwargs)
            sizes.extend(now)
            return result

        monkeypatch.setattr(owner, name, counted)
    policy.train()
    policy.losses(make_batch(), *draws(0, 2)).mean().backward()
    return sizes


def test_a_frozen_vlm_keeps_no_activations(monkeypatch):
    """Catches a frozen VLM that autograd walks through, as the built-in's joint attention makes it do."""
    policy = shaken_policy(train_expert_only=True)
    assert saved_by_the_vlm(policy, monkeypatch) == []
    assert all(p.grad is None for p in policy.model.paligemma.parameters())
    assert saved_by_the_vlm(shaken_policy(train_expert_only=False), monkeypatch)


def test_a_frozen_vision_tower_is_not_walked_through():
    """Catches `freeze_vision_encoder` that stops at the tower but cuts the projector or the language model."""
    policy = shaken_policy(freeze_vision_encoder=True)
    policy.losses(make_batch(), *draws(0, 2)).mean().backward()
    assert all(p.grad is None for p in policy.model.vision.parameters())
    assert policy.model.paligemma["multi_modal_projector"]["linear"].weight.grad.any()
    assert policy.model.vlm.layers[0].mlp.up_proj.weight.grad.any()


def test_thawing_after_construction():
    """Catches a frozen mode decided once: PEFT adds trained matrices to the VLM later."""
    policy = shaken_policy(train_expert_only=True)
    thawed = [policy.model.vision.vision_model.encoder.layers[0].mlp.fc1, policy.model.vlm.layers[0].mlp.up_proj]
    for module in thawed:
        module.weight.requires_grad_(True)
    policy.losses(make_batch(), *draws(0, 2)).mean().backward()
    assert all(module.weight.grad.any() for module in thawed)


@pytest.mark.parametrize("frozen", [False, True], ids=["everything trained", "VLM frozen"])
def test_gradient_checkpointing_changes_nothing(frozen):
    """Catches a checkpointed layer that is not run again as it was, or that is not checkpointed at all."""
    plain = shaken_policy(train_expert_only=frozen).train()
    saving = shaken_policy(train_expert_only=frozen, gradient_checkpointing=True).train()
    batch, (noise, time) = make_batch(), draws(0, 2)
    kept, losses = [], []
    for policy in (plain, saving):
        with saved_numbers() as sizes:
            loss = policy.losses(batch, noise, time)
        loss.mean().backward()
        kept.append(sum(sizes))
        losses.append(loss)
    assert torch.equal(*losses)
    assert_gradients_close(gradients(saving), gradients(plain), tolerance=1e-6)
    assert kept[1] < kept[0] / 2


def test_gradient_checkpointing_at_inference():
    """Catches checkpointing that warns or fails where there is nothing to differentiate."""
    batch, (noise, _) = make_batch(), draws(0, 2)
    chunks = [
        shaken_policy(gradient_checkpointing=on).predict_action_chunk(batch, noise=noise[:, 0]) for on in (False, True)
    ]
    assert torch.equal(*chunks)


@pytest.mark.parametrize("heads", [1, 3])
def test_block_mask_example(heads):
    """Catches a mask that is not the one its docstring draws: rows are queries, each repeated per head."""
    context = torch.tensor([[True, True, False]])
    expected = [[1, 1, 0, 1, 1, 0, 0]] * 2 + [[1, 1, 0, 0, 0, 1, 1]] * 2
    rows = torch.tensor(expected, dtype=torch.bool).repeat_interleave(heads, dim=0)
    assert torch.equal(block_mask(context, 2, 2, heads), rows[None])
    behind = [[1, 1, 0, 1, 0, 0, 0, 0]] + [[1, 1, 0, 1, 1, 1, 0, 0]] * 2 + [[1, 1, 0, 1, 0, 0, 1, 1]] * 2
    rows = torch.tensor(behind, dtype=torch.bool).repeat_interleave(heads, dim=0)
    assert torch.equal(block_mask(context, 2, 2, heads, with_state=True), rows[None])
    assert torch.equal(block_mask(context, 1, 2, heads), torch.tensor([[[True, True, False, True, True]]]))


def test_padded_action_dims_are_not_learnt():
    """Catches a loss over the zeros behind the robot's dims: it would fall by filling in padding."""
    policy, batch, (noise, time) = shaken_policy(), make_batch(), draws(0, 2)
    losses = policy.losses(batch, noise, time)
    assert losses.shape == (2, 1, 50, DIMS)
    losses.mean().backward()
    assert policy.model.action_out_proj.weight.grad[:DIMS].any(dim=1).all()
    assert not policy.model.action_out_proj.weight.grad[DIMS:].any()


def test_loss_is_the_squared_error_of_the_velocity():
    """Catches a target of the wrong sign: with a network that answers 0 the loss is (ε - a)², at any time."""
    policy, batch, (noise, time) = shaken_policy(), make_batch(), draws(0, 2)
    torch.nn.init.zeros_(policy.model.action_out_proj.weight)
    torch.nn.init.zeros_(policy.model.action_out_proj.bias)
    expected = (noise[..., :DIMS] - batch[ACTION][:, None]).square()
    torch.testing.assert_close(policy.losses(batch, noise, time), expected)


def test_the_small_presets_stem():
    """Catches a stem whose patches are off the grid that positions are for, or that depends on light and contrast."""
    torch.manual_seed(0)
    tower = VisionTower(PALIGEMMA_PRESETS["tiny"].vision, 64)
    initialise_vision(tower)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        tokens = tower(images)
        assert tokens.shape == (2, 16, 128)
        torch.testing.assert_close(tower(images * 0.4 - 0.3), tokens, rtol=1e-3, atol=1e-3)
        changed = images.clone()
        changed[:, :, :16, 48:] = torch.rand(2, 3, 16, 16)  # the patch at the right end of the first row
        embed = tower.vision_model.embeddings
        assert ((embed(changed) - embed(images)).norm(dim=-1).argmax(dim=1) == 3).all()
