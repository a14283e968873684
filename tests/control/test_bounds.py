"""Bounds on actions: what leaves the postprocessor stays within them, and whoever is bounded is told."""

import json
import logging
from dataclasses import fields

import pytest
import torch
from conftest import ACTION, CAMERAS, DIMS, OBS_STATE, BuiltinPI0Config, features, make_batch, stats, tiny_config
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.policies import make_pre_post_processors
from raw_frames import sample

from lerobot_pi0 import PI0Policy, make_pi0_pre_post_processors
from lerobot_pi0.configuration_pi0 import PI0Config
from lerobot_pi0.control import bounds
from lerobot_pi0.control.bounds import ActionBounds

JOINTS = ["pan", "lift", "elbow", "flex", "roll", "gripper"]
MODES = ["MEAN_STD", "MIN_MAX", "QUANTILES", "IDENTITY"]


def statistics() -> dict:
    made = stats()
    for key in (ACTION, OBS_STATE):
        low, high = made[key]["min"], made[key]["max"]
        made[key] |= {"q01": low * 0.9, "q99": high * 0.8}
    return made


def bounds_of(mode: str = "MEAN_STD", **options) -> tuple[PI0Config, ActionBounds]:
    config = tiny_config(action_feature_names=JOINTS, **options)
    config.normalization_mapping = {"VISUAL": NormalizationMode.IDENTITY} | dict.fromkeys(
        ("STATE", "ACTION"), NormalizationMode[mode]
    )
    made = bounds.make_bounds(config, statistics)
    assert made is not None
    return config, made


def physical(config: PI0Config, state: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised state and actions in the robot's units, by the pipelines that a checkpoint would have."""
    preprocessor, postprocessor = make_pi0_pre_post_processors(config, statistics())
    pictures = {key: torch.zeros(len(state), 3, 64, 64) for key in CAMERAS}
    made = bounds_of_state(config, state)
    preprocessor(pictures | {OBS_STATE: made, "task": ["x"] * len(state)})  # relative actions remember the state
    return made, postprocessor(actions)


def bounds_of_state(config: PI0Config, state: torch.Tensor) -> torch.Tensor:
    mode, known = config.normalization_mapping["STATE"], statistics()[OBS_STATE]
    if mode is NormalizationMode.IDENTITY:
        return state
    if mode is NormalizationMode.MEAN_STD:
        return state * known["std"] + known["mean"]
    low, high = ("min", "max") if mode is NormalizationMode.MIN_MAX else ("q01", "q99")
    return (state + 1) / 2 * (known[high] - known[low]) + known[low]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("mode", MODES)
def test_distance_from_the_measured_joints(mode, relative):
    """Catches a bound in normalised units, one that forgets the state of relative actions, or that is off in a mode."""
    config, made = bounds_of(mode, max_action_step=0.4, use_relative_actions=relative)
    state, actions = draw(3, DIMS), draw(3, 1, DIMS, seed=1) * 3
    bounded = made.chunk(actions, state)
    measured, before = physical(config, state, actions)
    _, after = physical(config, state, bounded)
    distance = (after[:, 0] - measured).abs()
    assert distance.max() <= 0.4
    wanted = (before[:, 0] - measured).clamp(-0.4, 0.4)
    assert torch.allclose(after[:, 0] - measured, wanted, atol=1e-4)
    near = (before[:, 0] - measured).abs() < 0.4
    assert near.any() and (~near).any() and torch.equal(bounded[:, 0][near], actions[:, 0][near])


def test_a_chunk_moves_from_action_to_action():
    """Catches a chunk that is held at the first bound: each action may go on from the one before."""
    config, made = bounds_of(max_action_step=0.1)
    state, actions = draw(2, DIMS), draw(2, 20, DIMS, seed=1) * 5
    measured, after = physical(config, state, made.chunk(actions, state))
    path = torch.cat([measured[:, None], after], dim=1)
    assert path.double().diff(dim=1).abs().max() <= 0.1
    assert (after[:, -1] - measured).abs().max() > 0.2


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("mode", MODES)
def test_bounds_hold_to_the_last_digit(mode, seed, monkeypatch):
    """Catches a robot that is sent more than the bound because the processors round in float32."""
    made = statistics()
    spread = torch.logspace(-3, 3, DIMS)
    for key in (ACTION, OBS_STATE):
        made[key] = {name: x * spread + 180 * draw(DIMS, seed=seed) * (name != "std") for name, x in made[key].items()}
    monkeypatch.setattr(f"{__name__}.statistics", lambda: made)
    most = 0.1 * spread.max().item()
    config, bound = bounds_of(mode, max_action_step=most, action_range_margin=0.5 if seed % 2 else None)
    state, actions = draw(8, DIMS, seed=seed), draw(8, 12, DIMS, seed=seed + 1) * 20
    measured, after = physical(config, state, bound.chunk(actions, state))
    path = torch.cat([measured[:, None], after], dim=1).double()
    assert path.diff(dim=1).abs().max() <= most


@pytest.mark.parametrize("margin", [0.0, 0.25])
def test_range_of_the_data(margin):
    """Catches a range that is not that of the statistics, or a margin that is not a part of it."""
    config, made = bounds_of(action_range_margin=margin)
    known = statistics()[ACTION]
    room = margin * (known["max"] - known["min"])
    actions = draw(4, 6, DIMS) * 6
    _, after = physical(config, draw(4, DIMS), made.chunk(actions, draw(4, DIMS)))
    assert (after >= known["min"] - room).all() and (after <= known["max"] + room).all()
    assert torch.isclose(after.amax(dim=(0, 1)), known["max"] + room, atol=1e-4).any()


def test_no_bound_beside_another():
    """Catches an infinite step that makes actions NaN when the other bound is set, or the reverse."""
    _, free = bounds_of(max_action_step=float("inf"), action_range_margin=0.1)
    _, alone = bounds_of(action_range_margin=0.1)
    state, actions = draw(2, DIMS), draw(2, 3, DIMS) * 6
    assert torch.equal(free.chunk(actions, state), alone.chunk(actions, state))
    _, step = bounds_of(max_action_step=0.1, action_range_margin=float("inf"))
    _, alone = bounds_of(max_action_step=0.1)
    assert torch.equal(step.chunk(actions, state), alone.chunk(actions, state))


def test_the_measured_joints_have_the_last_word():
    """Catches an arm that is thrown into the range of the data when it stands outside."""
    config, made = bounds_of(max_action_step=0.1, action_range_margin=0.0)
    state = torch.full((1, DIMS), 40.0)
    measured, after = physical(config, state, made.step(torch.zeros(1, DIMS), state)[:, None])
    assert torch.allclose(after[:, 0], measured - 0.1, atol=1e-3)


def test_it_is_loud(caplog, monkeypatch):
    """Catches a bound that acts in silence, that names the wrong joint or amount, or that floods the terminal."""
    caplog.set_level(logging.WARNING, "lerobot_pi0")
    _, made = bounds_of("IDENTITY", max_action_step=1.0)
    now = 100.0
    monkeypatch.setattr("lerobot_pi0.control.bounds.time.monotonic", lambda: now)
    state, action = torch.zeros(1, DIMS), torch.zeros(1, DIMS)
    made.step(action, state)
    assert not caplog.records
    action[0, 2] = 3.5
    for _ in range(5):
        made.step(action, state)
    assert [r.getMessage() for r in caplog.records] == ["max_action_step=1 bounds actions: elbow 1 times, by up to 2.5"]
    now += 1.5
    action[0, 5] = -2
    made.step(action, state)
    assert caplog.records[-1].getMessage().endswith("elbow 5 times, by up to 2.5; gripper 1 times, by up to 1")


def saved(folder, **options) -> PI0Policy:
    torch.manual_seed(0)
    policy = PI0Policy(tiny_config(CAMERAS[:2], action_feature_names=JOINTS, chunk_size=6, n_action_steps=3, **options),
                       dataset_stats=statistics())  # fmt: skip
    policy.save_pretrained(folder)
    for pipeline in make_pi0_pre_post_processors(policy.config, statistics()):
        pipeline.save_pretrained(folder)
    return policy


def run(folder, *overrides: str) -> torch.Tensor:
    """Ten ticks of a control loop as lerobot-rollout makes them: measured and commanded joints (10, 2, dims)."""
    config = PreTrainedConfig.from_pretrained(folder, cli_overrides=[*overrides])
    config.pretrained_path = folder
    policy = PI0Policy.from_pretrained(folder, config=config)
    preprocessor, postprocessor = make_pre_post_processors(config, pretrained_path=str(folder))
    torch.manual_seed(3)
    joints, seen = torch.zeros(DIMS), []
    observation = {key: value for key, value in sample().items() if key != CAMERAS[2]}
    with torch.inference_mode():
        for _ in range(10):
            batch = preprocessor(observation | {OBS_STATE: joints})
            action = postprocessor(policy.select_action(batch))[0]
            seen.append(torch.stack([joints, action]))
            joints = joints + 0.5 * (action - joints)  # a robot that lags behind
    return torch.stack(seen)


def test_from_the_command_line(tmp_path, caplog):
    """Catches a bound that a checkpoint without it cannot be given, or that changes what it does not have to."""
    saved(tmp_path)
    free = run(tmp_path)
    assert (free[:, 1] - free[:, 0]).abs().max() > 0.2
    assert "bounds actions" not in caplog.text
    assert torch.equal(run(tmp_path, "--max_action_step=1e6", "--action_range_margin=1e6"), free)
    assert torch.equal(run(tmp_path, "--max_action_step=inf"), free)
    bounded = run(tmp_path, "--max_action_step=0.05")
    assert (bounded[:, 1] - bounded[:, 0]).double().abs().max() <= 0.05
    assert "max_action_step=0.05 bounds actions" in caplog.text
    assert any(joint in caplog.text for joint in JOINTS)


def test_a_checkpoint_keeps_its_bounds(tmp_path):
    """Catches bounds that are lost on the way, that cannot be lifted, or that the built-in could not read."""
    saved(tmp_path, max_action_step=0.05)
    keys = json.loads((tmp_path / "config.json").read_text()).keys()
    assert keys - {"type"} <= {f.name for f in fields(BuiltinPI0Config)}
    bounded = run(tmp_path)
    assert (bounded[:, 1] - bounded[:, 0]).double().abs().max() <= 0.05
    free = run(tmp_path, "--max_action_step=inf")
    assert (free[:, 1] - free[:, 0]).abs().max() > 0.2


def test_a_policy_without_a_state():
    """Catches a bound of the data's range that asks for a state, which this policy does not have."""
    config, known = tiny_config(CAMERAS[:1], action_range_margin=0.0), statistics()
    config.input_features[OBS_STATE] = PolicyFeature(FeatureType.STATE, (config.max_state_dim,))
    policy = PI0Policy(config, dataset_stats={ACTION: known[ACTION]}).eval()
    batch = {key: x for key, x in make_batch(cameras=CAMERAS[:1], size=64).items() if key != OBS_STATE}
    chunk = policy.predict_action_chunk(batch) * known[ACTION]["std"] + known[ACTION]["mean"]
    action = policy.select_action(batch) * known[ACTION]["std"] + known[ACTION]["mean"]
    for x in (chunk, action):
        assert (known[ACTION]["min"] - 1e-4 <= x).all()
        assert (x <= known[ACTION]["max"] + 1e-4).all()
    config.max_action_step = 1.0
    with pytest.raises(bounds.BoundsError, match=r"max_action_step compares.*use action_range_margin alone"):
        bounds.make_bounds(config, lambda: known)


def test_refusals(tmp_path):
    """Catches a bound that was asked for and cannot be kept, and a policy that runs without it."""
    for options in ({"max_action_step": 0.0}, {"action_range_margin": -0.1}, {"max_action_step": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(options))):
            tiny_config(**options)
    with pytest.raises(ValueError, match="no statistics of action, observation"):
        PI0Policy(tiny_config(max_action_step=1.0))
    PI0Policy(tiny_config()).save_pretrained(tmp_path)
    config = PreTrainedConfig.from_pretrained(tmp_path, cli_overrides=["--action_range_margin=0.1"])
    with pytest.raises(bounds.BoundsError, match="no statistics of"):
        PI0Policy.from_pretrained(tmp_path, config=config)
    known = statistics()
    without_range = known | {ACTION: {"mean": known[ACTION]["mean"], "std": known[ACTION]["std"]}}
    with pytest.raises(bounds.BoundsError, match="min and max"):
        bounds.make_bounds(tiny_config(action_range_margin=0.0), lambda: without_range)
    flat = known | {ACTION: known[ACTION] | {"std": known[ACTION]["std"] * torch.tensor([1, 1, 1, 1, 0, 1])}}
    with pytest.raises(bounds.BoundsError, match="cannot hold roll"):
        bounds.make_bounds(tiny_config(max_action_step=1.0, action_feature_names=JOINTS), lambda: flat)
    other = tiny_config(max_action_step=1.0)
    other.output_features = features(dims=4)["output_features"]
    with pytest.raises(bounds.BoundsError, match="max_action_step compares"):
        bounds.make_bounds(other, lambda: known)
