"""Real-time chunking: against LeRobot's own, against autograd, and by what has to follow from its equations."""

import copy
import itertools

import pytest
import torch
from conftest import (
    ACTION,
    CAMERAS,
    DIMS,
    copy_weights,
    draws,
    make_batch,
    relative,
    shake,
    small_builtin,
    small_policy,
)
from lerobot.configs import RTCAttentionSchedule
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from torch import Tensor

from lerobot_pi0 import PI0Policy
from lerobot_pi0.configuration_pi0 import choices
from lerobot_pi0.control import guidance
from lerobot_pi0.network import solvers

SCHEDULES = list(RTCAttentionSchedule)
CHUNK = 50
DELAYS = {"none": 0, "short": 3, "up to the horizon": 10, "past the horizon": 14, "past the chunk": 70}


def rtc(**options) -> RTCConfig:
    return RTCConfig(**{"execution_horizon": 10, **options})


def policy_with(mode: str | None, most: int = 0, **options) -> PI0Policy:
    """A small policy in which every parameter matters, guided as `mode` says; equal weights each time."""
    torch.manual_seed(0)
    policy = small_policy(rtc_config=rtc(), rtc_guidance=mode, rtc_training_max_delay=most, **options)
    shake(policy)
    return policy


def left_over(steps: int, batch_size: int | None = None, seed: int = 3) -> Tensor:
    """What a robot has still to do: (steps, DIMS) or (B, steps, DIMS)."""
    shape = (steps, DIMS) if batch_size is None else (batch_size, steps, DIMS)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def curved_field(x: Tensor) -> Tensor:
    """A velocity with a Jacobian that is not symmetric and differs from point to point."""
    return torch.sin(2 * x) + 0.5 * x.roll(1, dims=-1) * x.roll(1, dims=-2) - 0.3


# --- weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weights_are_lerobots(schedule):
    """Catches a ramp that is off by one, for each order of delay, horizon, leftovers and chunk."""
    theirs = RTCProcessor(rtc(prefix_attention_schedule=schedule))
    for delay, end in itertools.product([0, 1, 4, 9, 20], [0, 1, 4, 5, 12, 20]):
        ours = guidance.prefix_weights(schedule.value, delay, torch.tensor([[end]]), 20)
        torch.testing.assert_close(ours, theirs.get_prefix_weights(delay, end, 20)[None], rtol=0, atol=1e-6)


def test_weights_are_the_docstrings():
    """Catches a docstring that shows other weights than the function makes."""
    expected = {"ZEROS": [1, 1, 0, 0, 0, 0], "ONES": [1, 1, 1, 1, 1, 0], "LINEAR": [1, 1, 0.75, 0.5, 0.25, 0]}
    for schedule, row in expected.items():
        assert guidance.prefix_weights(schedule, 2, torch.tensor([[5]]), 6).tolist() == [row]


def test_strength_is_clipped():
    """Catches a weight without its bound: at t = 1 and t = 0 the paper's is infinite."""
    times = torch.tensor([1.0, 0.999, 0.9, 0.5, 0.1, 0.0])
    torch.testing.assert_close(guidance.strength(times, 5.0), torch.tensor([5.0, 5.0, 5.0, 2.0, 5.0, 5.0]))
    torch.testing.assert_close(guidance.strength(times[2:3], 50.0), torch.tensor([0.82 / 0.09]))


# --- identity: LeRobot's ------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", DELAYS.values(), ids=DELAYS.keys())
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 7, 10, 30, CHUNK])
def test_identity_is_lerobots(schedule, steps, delay):
    """Catches any difference to LeRobot's RTCProcessor at any of its ten times, and need of autograd: it runs under
    inference_mode, where LeRobot's raises."""
    config, left = rtc(prefix_attention_schedule=schedule), left_over(steps)
    x = torch.randn(1, CHUNK, 32)
    theirs = RTCProcessor(config)
    for t in solvers.fixed_times("euler", 10, x.device):
        expected = theirs.denoise_step(x, left, delay, t.item(), curved_field)
        with torch.inference_mode():
            guide = guidance.make_guide("identity", left, delay, 10, x[:, None], schedule.value, 10.0)
            found = guidance.guided(curved_field, x[:, None], t.reshape(1, 1, 1), guide)
        assert relative(found[:, 0], expected) < 1e-6


@pytest.mark.parametrize(("steps", "delay"), [(10, 4), (3, 2), (30, 12)])
def test_identity_chunks_are_the_built_ins(small, steps, delay):
    """Catches a guide that is not passed on, or is applied to another chunk: the whole chunk of the built-in."""
    torch.manual_seed(0)
    theirs, ours = small_builtin(rtc_config=rtc()), small_policy(rtc_config=rtc(), rtc_guidance="identity")
    copy_weights(theirs, ours)
    batch, (noise, _) = make_batch(batch_size=1), draws(0, 1)
    theirs.model.sample_noise = lambda shape, device: noise[:, 0]
    how = {"inference_delay": delay, "prev_chunk_left_over": left_over(steps)}
    expected = theirs.predict_action_chunk(batch, **how)
    assert relative(ours.predict_action_chunk(batch, noise=noise[:, 0], **how), expected) < 1e-5
    assert relative(ours.predict_action_chunk(batch, noise=noise[:, 0]), expected) > 1e-3


# --- vjp: the paper's ---------------------------------------------------------------------------------------


def reference_velocity(velocity, x: Tensor, t: float, left: Tensor, weights: Tensor, most: float) -> Tensor:
    """Equations 2 to 4 of arXiv 2506.07339 in its own direction of time, τ = 1 - t and v = -velocity, by autograd."""
    tau = 1 - t
    x = x.detach().requires_grad_(True)
    v = -velocity(x)
    final = x + (1 - tau) * v
    error = ((left - final) * weights).detach()
    correction = torch.autograd.grad(final, x, error)[0]
    r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
    weight = most if tau == 0 else min(most, (1 - tau) / (tau * r2))
    return -(v + weight * correction).detach()


@pytest.mark.parametrize("t", [1.0, 0.7, 0.3, 0.1])
def test_vjp_multiplies_by_the_jacobian(t):
    """Catches the Jacobian itself in place of its transpose, and a sign: against the matrix, written out."""
    x, weights = torch.randn(1, 1, 3, 2), torch.rand(1, 1, 3, 2)
    left = torch.randn(1, 1, 3, 2)
    guide = guidance.Guide("vjp", left, weights, 4.0)
    found = guidance.guided(curved_field, x, torch.full((1, 1, 1), t), guide)
    matrix = torch.eye(6) - t * torch.autograd.functional.jacobian(curved_field, x).reshape(6, 6)
    error = (weights * (left - (x - t * curved_field(x)))).flatten()
    strength = guidance.strength(torch.tensor(t), 4.0)
    torch.testing.assert_close(found.flatten(), curved_field(x).flatten() - strength * (matrix.T @ error))


@pytest.mark.parametrize(("schedule", "delay"), [("LINEAR", 0), ("EXP", 4), ("ONES", 14)])
def test_vjp_chunk_against_autograd(small, schedule, delay):
    """Catches a product that stops at the last layer, or one through another observation: ten steps of the network."""
    policy = policy_with("vjp")
    policy.config.rtc_config = rtc(prefix_attention_schedule=RTCAttentionSchedule(schedule), max_guidance_weight=5.0)
    batch, (noise, _), left = make_batch(batch_size=1), draws(0, 1), left_over(8)
    weights = torch.zeros(CHUNK, 32)
    own = RTCProcessor(policy.config.rtc_config).get_prefix_weights(delay, 8, CHUNK)
    weights[:, :DIMS] = own[:, None]
    target = torch.zeros(CHUNK, 32)
    target[:8, :DIMS] = left
    context = policy.model.context(policy.observe(batch, noise.device))
    x = noise
    for t in solvers.fixed_times("euler", 10, x.device):
        term = policy.model.embed_time(t)
        v = reference_velocity(
            lambda x, term=term: policy.model.velocity(x, term, context), x, t.item(), target, weights, 5.0
        )
        x = x - v / 10
    found = policy.predict_action_chunk(batch, noise=noise[:, 0], inference_delay=delay, prev_chunk_left_over=left)
    assert relative(found, x[:, 0, :, :DIMS]) < 1e-5
    assert relative(policy.predict_action_chunk(batch, noise=noise[:, 0]), found) > 1e-3


@pytest.mark.parametrize("mode", ["inference_mode", "no_grad", "enable_grad"])
@pytest.mark.parametrize("guide", choices("rtc_guidance"))
def test_contexts_of_the_callers(small, guide, mode):
    """Catches a differentiation that inference_mode forbids, one whose graph or gradients stay behind, and results
    that the caller cannot use: LeRobot's loops call under any of the three."""
    policy, batch, (noise, _) = policy_with(guide, 9), make_batch(batch_size=1), draws(0, 1)
    how = {"noise": noise[:, 0], "inference_delay": 4, "prev_chunk_left_over": left_over(10)}
    expected = policy.predict_action_chunk(batch, **how)
    with getattr(torch, mode)():
        observed = {key: value.clone() for key, value in batch.items()}  # made here, as the preprocessor's are
        found = policy.predict_action_chunk(observed, **how | {"prev_chunk_left_over": left_over(10)})
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert not found.is_inference()
    assert all(p.grad is None for p in policy.parameters())
    policy.train()
    policy.forward(batch)[0].backward()
    assert policy.model.action_in_proj.weight.grad.any()


@pytest.mark.parametrize("guide", choices("rtc_guidance"))
@pytest.mark.parametrize(
    "options",
    [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "train_expert_only": True}, {"gradient_checkpointing": True}],
    ids=["bfloat16", "mixed", "checkpointing"],
)
def test_guidance_in_every_precision(small, guide, options):
    """Catches a pullback that fails through autocast or checkpointed layers, as between two stages of training."""
    policy, full = policy_with(guide, 9, **options), policy_with(guide, 9)
    full.load_state_dict(policy.state_dict())
    if "train_expert_only" in options:
        policy.train().eval()  # trained weights are float32 from now on
    batch, (noise, _) = make_batch(batch_size=1), draws(0, 1)
    how = {"noise": noise[:, 0], "inference_delay": 4, "prev_chunk_left_over": left_over(10)}
    chunks = [p.predict_action_chunk(batch, **how) for p in (policy, full, policy)]
    assert relative(chunks[0], chunks[1]) < 0.03
    assert torch.equal(chunks[0], chunks[2])


# --- what is left over --------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", choices("rtc_guidance"))
def test_padding_does_not_guide(small, guide):
    """Catches a chunk drawn to the mean: LeRobot pads leftovers with zeros, up to the horizon or the chunk."""
    policy, batch, (noise, _) = policy_with(guide, 9), make_batch(batch_size=1), draws(0, 1)

    def chunk(left: Tensor | None) -> Tensor:
        return policy.predict_action_chunk(batch, noise=noise[:, 0], inference_delay=6, prev_chunk_left_over=left)

    left = left_over(4)
    for padding in (6, 46, 100):
        assert torch.equal(chunk(torch.cat([left, torch.zeros(padding, DIMS)])), chunk(left))
    middle = left.clone()
    middle[1] = 0  # an action of zeros with others after it is an action
    unlike = middle.clone()
    unlike[1] = 0.5
    assert not torch.allclose(chunk(middle), chunk(unlike))


@pytest.mark.parametrize("guide", choices("rtc_guidance"))
def test_nothing_left_over(small, guide):
    """Catches a first chunk, an empty queue or one of padding alone that is guided, or fails."""
    policy, batch, (noise, _) = policy_with(guide, 9), make_batch(batch_size=1), draws(0, 1)
    free = policy_with(None).predict_action_chunk(batch, noise=noise[:, 0])
    for left in (None, torch.zeros(0, DIMS), torch.zeros(10, DIMS), torch.zeros(1, 0, DIMS)):
        for delay in (None, 0, 5):
            chunk = policy.predict_action_chunk(
                batch, noise=noise[:, 0], inference_delay=delay, prev_chunk_left_over=left
            )
            torch.testing.assert_close(chunk, free, rtol=0, atol=1e-6)


@pytest.mark.parametrize("guide", choices("rtc_guidance"))
@pytest.mark.parametrize("delay", DELAYS.values(), ids=DELAYS.keys())
@pytest.mark.parametrize(("steps", "horizon"), [(1, 10), (5, 80), (CHUNK, 10), (70, 60)])
def test_any_lengths(small, guide, delay, steps, horizon):
    """Catches an index out of range: leftovers, delay and horizon may each be the longest, or pass the chunk's end."""
    policy, batch = policy_with(guide, CHUNK - 1, num_inference_steps=2), make_batch(batch_size=1)
    policy.config.rtc_config = rtc(execution_horizon=horizon)
    chunk = policy.predict_action_chunk(batch, inference_delay=delay, prev_chunk_left_over=left_over(steps))
    assert chunk.shape == (1, CHUNK, DIMS)


@pytest.mark.parametrize("guide", ["vjp", "identity"])
def test_guidance_closes_the_seam(small, guide):
    """Catches a correction of the wrong sign: the delayed actions come out nearer to what is executed."""
    policy, batch, (noise, _), left = policy_with(guide), make_batch(batch_size=1), draws(0, 1), left_over(10)
    free = policy.predict_action_chunk(batch, noise=noise[:, 0])
    drawn = policy.predict_action_chunk(batch, noise=noise[:, 0], inference_delay=5, prev_chunk_left_over=left)
    assert (drawn[0, :5] - left[:5]).norm() < 0.7 * (free[0, :5] - left[:5]).norm()


@pytest.mark.parametrize("guide", ["vjp", "identity"])
@pytest.mark.parametrize("how", ["argument", "config"])
def test_the_horizon_is_read(small, guide, how):
    """Catches a horizon that is not used: leftovers behind it do not change the chunk, those before it do."""
    policy, batch, (noise, _) = policy_with(guide), make_batch(batch_size=1), draws(0, 1)
    policy.config.rtc_config = rtc(execution_horizon=4 if how == "config" else 30)
    chunks = []
    for changed in (None, 2, 6):
        left = left_over(10)
        if changed is not None:
            left[changed] += 1
        chunks.append(
            policy.predict_action_chunk(
                batch,
                noise=noise[:, 0],
                inference_delay=1,
                prev_chunk_left_over=left,
                execution_horizon=4 if how == "argument" else None,
            )
        )
    assert torch.equal(chunks[2], chunks[0])
    assert relative(chunks[1], chunks[0]) > 1e-3


def test_dims_that_the_robot_lacks(small):
    """Catches errors of untrained outputs that the Jacobian carries to the robot's joints: they weigh nothing."""
    x = torch.zeros(1, 1, CHUNK, 32)
    guide = guidance.make_guide("vjp", left_over(10), 3, 10, x)
    assert guide.weights_BKTA[..., :3, :DIMS].eq(1).all()
    assert not guide.weights_BKTA[..., DIMS:].any()


def test_no_rtc_no_guidance(small):
    """Catches leftovers that guide although nobody asked for it, as LeRobot's own then does not."""
    batch, (noise, _) = make_batch(batch_size=1), draws(0, 1)
    how = {"inference_delay": 3, "prev_chunk_left_over": left_over(10)}
    for config in (None, rtc(enabled=False)):
        policy = policy_with("vjp")
        policy.config.rtc_config = config
        free = policy.predict_action_chunk(batch, noise=noise[:, 0])
        assert torch.equal(policy.predict_action_chunk(batch, noise=noise[:, 0], **how), free)


@pytest.mark.parametrize("shape", [(10, 33), (3, 10, DIMS), (DIMS,), (1, 1, 10, DIMS)])
def test_leftovers_of_another_shape(small, shape):
    """Catches a leftover that broadcasts into nonsense: the message names the argument and both shapes."""
    policy, batch = policy_with("identity"), make_batch(batch_size=2)
    with pytest.raises(ValueError, match=r"prev_chunk_left_over has shape .*expected \(steps, dims\) or \(2, "):
        policy.predict_action_chunk(batch, inference_delay=1, prev_chunk_left_over=torch.ones(shape))


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "adaptive"])
@pytest.mark.parametrize("guide", [None, *choices("rtc_guidance")])
def test_environments_are_independent(small, guide, solver):
    """Catches guidance, a prefix or a step size that is shared by a batch: each alone gets the same chunk."""
    policy = policy_with(guide, 9, solver=solver, num_inference_steps=5)
    batch, (noise, _) = make_batch(batch_size=3, prompt=(3, 12, 7)), draws(0, 3)
    left = left_over(10, batch_size=3)
    left[1, 2:] = 0  # an environment with less left over
    how = {"inference_delay": 4}
    together = policy.predict_action_chunk(batch, noise=noise[:, 0], prev_chunk_left_over=left, **how)
    for i in range(3):
        own = slice(i, i + 1)
        alone = policy.predict_action_chunk(
            {key: value[own] for key, value in batch.items()}, noise=noise[own, 0], prev_chunk_left_over=left[i], **how
        )
        assert relative(alone, together[own]) < 1e-5


@pytest.mark.parametrize("guide", choices("rtc_guidance"))
def test_reset_leaves_nothing(small, guide):
    """Catches a leftover, a guide or a queue that outlives an episode: after reset a policy is as good as new."""
    policy, batch, (noise, _) = policy_with(guide, 9, n_action_steps=3), make_batch(batch_size=2), draws(0, 2)
    new = copy.deepcopy(policy)
    policy.predict_action_chunk(batch, inference_delay=5, prev_chunk_left_over=left_over(10))
    policy.select_action(batch)
    policy.reset()
    for call in ("predict_action_chunk", "select_action", "select_action"):
        a, b = (getattr(p, call)(batch, noise=noise[:, 0]) for p in (policy, new))
        assert torch.equal(a, b)


def test_queues_are_not_guided(small):
    """Catches `select_action` that fails or is guided while RTC is on: LeRobot's sync loop uses the same config."""
    policy, batch, (noise, _) = policy_with("vjp", n_action_steps=2), make_batch(), draws(0, 2)
    chunk = policy.predict_action_chunk(batch, noise=noise[:, 0])
    assert torch.equal(policy.select_action(batch, noise=noise[:, 0]), chunk[:, 0])


# --- trained: the prefix is given ---------------------------------------------------------------------------


def test_a_given_prefix_stays(small):
    """Catches a prefix that the solver moves: what will have been executed comes back bit for bit."""
    for solver in ("euler", "midpoint", "heun", "adaptive"):
        policy, batch, left = policy_with("trained", 9, solver=solver), make_batch(batch_size=1), left_over(10)
        chunk = policy.predict_action_chunk(batch, inference_delay=4, prev_chunk_left_over=left)
        assert torch.equal(chunk[0, :4], left[:4])
        assert (chunk[0, 4:10] != left[4:]).all()


def test_only_the_delay_is_given(small):
    """Catches a prefix that is longer or shorter than the delay: later leftovers do not count, earlier ones all do."""
    policy, batch, (noise, _) = policy_with("trained", 9), make_batch(batch_size=1), draws(0, 1)
    chunks = []
    for changed in (None, 3, 4):
        left = left_over(10)
        if changed is not None:
            left[changed] += 1
        chunks.append(
            policy.predict_action_chunk(batch, noise=noise[:, 0], inference_delay=4, prev_chunk_left_over=left)
        )
    assert torch.equal(chunks[2], chunks[0])
    assert relative(chunks[1][:, 4:], chunks[0][:, 4:]) > 1e-4


def test_the_delay_is_at_most_the_trained_one(small, caplog):
    """Catches a prefix that the network has never seen the like of, given in silence; said once, not at each chunk."""
    policy, batch, left = policy_with("trained", 3), make_batch(batch_size=1), left_over(10)
    for _ in range(2):
        chunk = policy.predict_action_chunk(batch, inference_delay=6, prev_chunk_left_over=left)
        assert torch.equal(chunk[0, :3], left[:3])
        assert (chunk[0, 3:6] != left[3:6]).all()
    assert sum("6 actions late, the policy was trained for 3" in r.message for r in caplog.records) == 1


def test_training_and_control_see_the_same(small):
    """Catches a prefix that is trained in one way and given in another: at the noise and times of a training draw,
    the velocity in control is the one that the loss compares."""
    policy = policy_with("trained", 9)
    batch, (noise, time) = make_batch(batch_size=2), draws(0, 2)
    delay = torch.tensor([[4], [7]])
    errors = policy.losses(batch, noise, time, delay)
    left = [batch[ACTION][i, : delay[i]] for i in range(2)]
    for i, known in enumerate(left):
        own = {key: value[i : i + 1] for key, value in batch.items()}
        context = policy.model.context(policy.observe(own, noise.device))
        x = noise[i : i + 1]
        guide = guidance.make_guide("trained", known, len(known), 10, x)
        t = time[i].reshape(1, 1, 1)
        x_t = t[..., None] * x
        x_t[..., :DIMS] += (1 - t) * own[ACTION]
        term = policy.model.embed_time(guidance.token_times(t, guide))
        v = guidance.guided(
            lambda x, c=context, s=term: policy.model.velocity(x, s, c), guidance.begin(x_t, guide), t, guide
        )
        target = noise[i, 0, :, :DIMS] - own[ACTION][0]
        expected = (v[0, 0, :, :DIMS] - target).square()[len(known) :] * CHUNK / (CHUNK - len(known))
        assert relative(errors[i, 0, len(known) :], expected) < 1e-5
        assert not errors[i, 0, : len(known)].any()


def test_known_actions_are_clean(small):
    """Catches a prefix with noise in it: noise and target of known actions reach neither the loss nor its mean."""
    policy, batch, (noise, time) = policy_with("trained", 9, flow_samples=2), make_batch(), draws(0, 2, 2)
    delay = torch.tensor([[0, 5], [9, 2]])
    other = noise.clone()
    known = torch.arange(CHUNK) < delay[..., None]
    other[known] += 1
    assert torch.equal(policy.losses(batch, other, time, delay), policy.losses(batch, noise, time, delay))
    other[~known] += 1
    assert not torch.allclose(policy.losses(batch, other, time, delay), policy.losses(batch, noise, time, delay))


def test_no_delay_is_the_plain_loss(small):
    """Catches times per token that differ from one time per chunk: with no known action the losses are equal."""
    plain, trained = policy_with("identity"), policy_with("trained", 9)
    batch, (noise, time) = make_batch(), draws(0, 2)
    none = torch.zeros(2, 1, dtype=torch.long)
    assert relative(trained.losses(batch, noise, time, none), plain.losses(batch, noise, time)) < 1e-6


def test_the_mean_is_over_the_unknown(small):
    """Catches a loss that falls as more is known: with a network that answers 0 and errors of 1 it is 1, always."""
    policy, batch = policy_with("trained", 40), make_batch()
    torch.nn.init.zeros_(policy.model.action_out_proj.weight)
    torch.nn.init.zeros_(policy.model.action_out_proj.bias)
    batch[ACTION] = torch.zeros_like(batch[ACTION])
    for most in (0, 13, 40):
        loss, _ = policy.forward(
            batch, noise=torch.ones(2, 1, CHUNK, 32), time=torch.full((2, 1), 0.5), delay=torch.full((2, 1), most)
        )
        assert loss.item() == pytest.approx(1)


def test_delays_are_drawn(small):
    """Catches delays that are always the same, reach past the maximum, or do not repeat with the sample's number."""
    policy, batch = policy_with("trained", 5, flow_samples=4).train(), make_batch(batch_size=3)
    counts = set()
    for _ in range(6):
        losses = policy.losses(batch)
        counts |= set(losses.eq(0).all(dim=-1).sum(dim=-1).flatten().tolist())
    assert counts == {0, 1, 2, 3, 4, 5}
    batch["index"] = torch.tensor([4, 9, 11])
    policy.train()
    first = policy.losses(batch)
    assert torch.equal(policy.losses(batch), first)
    policy.update()
    assert not torch.equal(policy.losses(batch).eq(0), first.eq(0))


def test_a_trained_prefix_is_continued(small):
    """Catches training that does not reach its purpose: chunks that go on from the prefix. Of two ways to act, which
    only the prefix tells apart, the policy learns to take the one that has begun."""
    torch.manual_seed(0)
    policy = small_policy(
        CAMERAS[:1], rtc_config=rtc(), rtc_training_max_delay=9, chunk_size=10, n_action_steps=10, flow_samples=16
    ).train()
    batch = make_batch(batch_size=2, cameras=CAMERAS[:1], chunk=10)
    batch = {key: value[:1].expand_as(value).clone() for key, value in batch.items()}  # one observation, twice
    batch[ACTION] = torch.tensor([1.0, -1.0]).reshape(2, 1, 1).expand(2, 10, DIMS).clone()
    optimizer = torch.optim.Adam(policy.get_optim_params(), 2e-3)
    for _ in range(150):
        optimizer.zero_grad()
        policy.forward(batch)[0].backward()
        optimizer.step()
    policy.eval()
    one = {key: value[:1] for key, value in batch.items()}
    for way in (1.0, -1.0):
        for _ in range(4):
            chunk = policy.predict_action_chunk(
                one, inference_delay=3, prev_chunk_left_over=torch.full((10, DIMS), way)
            )
            assert (chunk[0, 3:] * way).mean() > 0.5


# --- options ------------------------------------------------------------------------------------------------


def test_guidance_follows_the_training(small):
    """Catches a trained prefix that is not used, or an explicit choice that is overruled."""
    assert policy_with(None).config.guidance == "identity"
    assert policy_with(None, 5).config.guidance == "trained"
    assert policy_with("vjp", 5).config.guidance == "vjp"
    with pytest.raises(ValueError, match="rtc_training_max_delay: train it so"):
        policy_with("trained")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("solver", "rk4", "euler, midpoint, heun, adaptive"),
        ("solver_tolerance", 0.0, "more than 0"),
        ("rtc_guidance", "soft", "vjp, identity, trained"),
        ("rtc_training_max_delay", 50, "from 0 to chunk_size - 1 = 49"),
        ("rtc_training_max_delay", -1, "from 0 to"),
        ("compile_mode", "fast", "default, reduce-overhead"),
    ],
)
def test_wrong_options(small, option, value, message):
    """Catches an option that is taken and then ignored, or that fails at the first chunk."""
    with pytest.raises(ValueError, match=f"{option}={value!r}.*{message}"):
        small_policy(**{option: value})


def test_options_travel(small, tmp_path):
    """Catches a checkpoint that forgets how it is to be run, or gives a policy other options than it was saved with."""
    chosen = {"solver": "heun", "solver_tolerance": 0.05, "rtc_guidance": "vjp", "rtc_training_max_delay": 7}
    small_policy(**chosen).save_pretrained(tmp_path / "a")
    small_policy().save_pretrained(tmp_path / "b")
    for folder, expected in (
        ("a", chosen),
        ("b", {"solver": "euler", "solver_tolerance": 0.01, "rtc_guidance": None, "rtc_training_max_delay": 0}),
    ):
        config = PI0Policy.from_pretrained(tmp_path / folder).config
        assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("horizon", [0, -3])
def test_a_horizon_of_nothing(small, horizon):
    """Catches a robot that moves before a senseless option is found: LeRobot calls this before it connects."""
    policy = policy_with("identity")
    policy.config.rtc_config = rtc(execution_horizon=horizon)
    with pytest.raises(ValueError, match=f"execution_horizon={horizon} "):
        policy.init_rtc_processor()
    policy.config.rtc_config = None
    policy.init_rtc_processor()
