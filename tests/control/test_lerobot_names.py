"""What LeRobot's commands, examples and tests call on its own π₀, on ours; debug data beside LeRobot's own."""

import inspect

import pytest
import torch
from conftest import copy_weights, draws, make_batch, make_small, micro_policy, relative, small_builtin, small_policy
from lerobot.policies.factory import make_policy_config
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.rtc.modeling_rtc import RTCProcessor

from lerobot_pi0 import PI0Policy, take_over
from lerobot_pi0.control.lerobot_names import CHUNK_ARGUMENTS

HOW = {"inference_delay": 3, "prev_chunk_left_over": torch.linspace(-1, 1, 12 * 6).reshape(12, 6)}


@pytest.fixture(scope="module")
def both():
    """LeRobot's policy and ours with the same weights, ours guided as LeRobot computes it."""
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        theirs, ours = small_builtin(), small_policy(rtc_guidance="identity")
        copy_weights(theirs, ours)
        yield theirs.eval(), ours


def set_rtc(policies, **options) -> None:
    """As `examples/rtc/eval_dataset.py` does."""
    for policy in policies:
        policy.config.rtc_config = RTCConfig(**options)
        policy.init_rtc_processor()


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_num_steps_is_obeyed(both, num_steps):
    """Catches `num_steps` that is ignored: a caller gets the ten steps of the config in silence, at their cost."""
    batch, (noise, _) = make_batch(), draws(0, 2)
    theirs, ours = (p.predict_action_chunk(batch, noise=noise[:, 0], num_steps=num_steps) for p in both)
    assert relative(ours, theirs) < 1e-4
    assert relative(ours, both[1].predict_action_chunk(batch, noise=noise[:, 0])) > 1e-3


def test_no_step_is_refused(both):
    """Catches a chunk of pure noise."""
    with pytest.raises(ValueError, match="at least 1"):
        both[1].predict_action_chunk(make_batch(), num_steps=0)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("num_step", "num_steps"),
        ("delay", "inference_delay"),
        ("prev_chunk", "prev_chunk_left_over"),
        ("nois", "noise"),
    ],
)
@pytest.mark.parametrize("call", ["predict_action_chunk", "select_action"])
def test_a_mistyped_argument_is_named(micro, call, wrong, near):
    """Catches an argument that is swallowed, in the middle of a chunk too: a robot that is driven without guidance."""
    policy = micro_policy()
    batch = make_batch(cameras=("observation.images.front",), size=16, chunk=4)
    batch["observation.language.tokens"] %= 24
    policy.select_action(batch)
    with pytest.raises(TypeError, match=f"no argument '{wrong}': did you mean {near}?"):
        getattr(policy, call)(batch, **{wrong: 1})


def test_all_that_lerobots_policy_takes():
    """Catches a keyword of LeRobot's own π₀ that ours does not know."""
    from lerobot.policies.pi0.modeling_pi0 import ActionSelectKwargs, PI0Pytorch

    lerobots = {*ActionSelectKwargs.__annotations__, "noise", "num_steps"}
    lerobots &= {*ActionSelectKwargs.__annotations__, *inspect.signature(PI0Pytorch.sample_actions).parameters}
    ours = inspect.signature(PI0Policy.predict_action_chunk).parameters
    assert lerobots <= {*CHUNK_ARGUMENTS} <= {*ours}


def test_names_without_options(micro):
    """Catches a policy without real-time chunking on which LeRobot's examples and tests fail."""
    policy = micro_policy()
    assert policy.rtc_processor is None and policy.model.rtc_processor is None and policy._rtc_enabled() is False
    torch.manual_seed(3)
    noise = policy.model.sample_noise((2, 4, 8), torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(noise, torch.randn(2, 4, 8)) and noise.dtype == torch.float32


def test_the_processor_has_the_options(micro):
    """Catches options of the config that a new policy has and its processor has not."""
    options = RTCConfig(execution_horizon=7)
    policy = micro_policy(rtc_config=options)
    assert isinstance(policy.rtc_processor, RTCProcessor) and policy.rtc_processor.rtc_config is options
    assert policy.model.rtc_processor is policy.rtc_processor and policy._rtc_enabled() is True
    set_rtc([policy], enabled=False)
    assert policy._rtc_enabled() is False and policy.rtc_processor is not None


@pytest.mark.parametrize("enabled", [False, True])
def test_debug_data_are_lerobots(both, enabled):
    """Catches debug data that are missing or mean something else: LeRobot's plots of them would be empty or wrong."""
    batch, (noise, _) = make_batch(batch_size=1), draws(0, 1)
    set_rtc(both, enabled=enabled, debug=True, execution_horizon=10)
    found = []
    for policy in both:
        policy.rtc_processor.reset_tracker()
        policy.predict_action_chunk(batch, noise=noise[:, 0].clone(), execution_horizon=10, **(HOW if enabled else {}))
        found.append(policy.rtc_processor.get_all_debug_steps())
    assert len(found[0]) == len(found[1]) == 10
    names = ["x_t", "v_t", *(["x1_t", "err", "correction", "weights", "guidance_weight"] if enabled else [])]
    for theirs, ours in zip(*found, strict=True):
        assert round(ours.time, 5) == round(theirs.time, 5)
        assert (ours.inference_delay, ours.execution_horizon) == (theirs.inference_delay, theirs.execution_horizon)
        for name in names:
            expected, given = torch.as_tensor(getattr(theirs, name)), torch.as_tensor(getattr(ours, name))
            assert given.shape == expected.shape, name
            assert relative(given, expected) < 1e-3, name


def test_debug_data_change_nothing(both):
    """Catches a chunk that is another one because it was watched."""
    batch, (noise, _) = make_batch(batch_size=1), draws(0, 1)
    for guide in ("identity", "vjp"):
        policy, chunks = both[1], []
        policy.config.rtc_guidance = guide
        for debug in (False, True):
            set_rtc([policy], debug=debug)
            chunks.append(policy.predict_action_chunk(batch, noise=noise[:, 0], **HOW))
        assert torch.equal(*chunks)
    policy.config.rtc_guidance = "identity"


def test_dropped_actions_are_not_executed(micro):
    """Catches a new instruction that takes effect when the old chunk is over, on LeRobot after 0.6.1."""
    policy = micro_policy()
    batch = make_batch(cameras=("observation.images.front",), size=16, chunk=4)
    batch["observation.language.tokens"] %= 24
    noise = [torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    first, second = (policy.predict_action_chunk(batch, noise=n) for n in noise)
    assert torch.equal(policy.select_action(batch, noise=noise[0]), first[:, 0])
    policy.drop_queued_actions()
    assert torch.equal(policy.select_action(batch, noise=noise[1]), second[:, 0])


TRAINED = {"rtc_training_max_delay": 1}


@pytest.mark.parametrize(
    ("options", "horizon", "says"),
    [
        ({}, 2, "trained with rtc_training_max_delay"),
        (TRAINED | {"rtc_guidance": "identity"}, 2, "rtc_guidance=identity"),
        (TRAINED, 4, "from rtc_training_max_delay=1 to chunk_size - rtc_training_max_delay = 3"),
        (TRAINED, 2, None),
    ],
)
def test_the_mode_trained(micro, options, horizon, says):
    """Catches LeRobot's mode `trained`, which it has after 0.6.1, for a policy that cannot do it, or refused for one
    that can."""
    policy = micro_policy(**options)
    policy.config.rtc_config = RTCConfig(execution_horizon=horizon)
    policy.config.rtc_config.mode = "trained"  # 0.6.1 has no such field
    if says is None:
        policy.init_rtc_processor()
        assert policy.rtc_processor.rtc_config.mode == "trained"
    else:
        with pytest.raises(ValueError, match=says):
            policy.init_rtc_processor()


def test_the_mode_trained_is_not_refused_by_type(micro, monkeypatch):
    """Catches `lerobot-rollout` after 0.6.1, which lets no type but pi05 through, and other types let through too."""
    from lerobot.rollout import context

    def refuse(policy_config, inference_config):
        raise ValueError(f"requires a PI05 checkpoint; got {policy_config.type}")

    name = "_validate_trained_rtc_rollout_config"
    monkeypatch.setattr(context, name, refuse, raising=False)
    for _ in range(2):
        take_over()
    check = getattr(context, name)
    check(micro_policy().config, None)
    assert check.without_pi0 is refuse
    with pytest.raises(ValueError, match="got act"):
        check(make_policy_config("act", device="cpu"), None)
