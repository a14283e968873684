"""Bounds under every form of joint names and every way to control: two chunks are driven, and nothing raises."""

import logging

import pytest
import torch
from conftest import ACTION, CAMERAS, DIMS, OBS_STATE, stats, tiny_config
from inputs.test_joints import EVERY, NAMES, as_in_a_config, readable
from lerobot.policies.rtc import RTCConfig

from lerobot_pi0 import PI0Policy, make_pi0_pre_post_processors

WAYS = {
    "sync": {},
    "rtc": {"rtc_config": RTCConfig(execution_horizon=4)},
    "relative": {"use_relative_actions": True},
    "relative, rtc": {"use_relative_actions": True, "rtc_config": RTCConfig(execution_horizon=4)},
}


def observation(seed: int) -> dict:
    draw = torch.Generator().manual_seed(seed)
    pictures = {key: torch.rand(3, 64, 64, generator=draw) for key in CAMERAS[:1]}
    return pictures | {OBS_STATE: torch.rand(DIMS, generator=draw), "task": "reach the cube"}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("stored", EVERY.values(), ids=EVERY)
def test_two_chunks(stored, options, caplog):
    """Catches a form of names with which an arm stops in the middle of a motion, at the first bounded action."""
    names = as_in_a_config(stored)
    config = tiny_config(
        CAMERAS[:1], chunk_size=8, n_action_steps=4, num_inference_steps=1, action_feature_names=names,
        max_action_step=1e-3, action_range_margin=0.0, **options,
    )  # fmt: skip
    known = stats(cameras=CAMERAS[:1])
    frames = 100
    for key, count in ((OBS_STATE, frames), (ACTION, frames * (8 if config.use_relative_actions else 1))):
        known[key] |= {"count": torch.tensor([count])}  # by which statistics of relative actions are known
    try:
        policy = PI0Policy(config, dataset_stats=known).eval()
        before, after = make_pi0_pre_post_processors(config, known)
    except ValueError as error:  # names of which LeRobot would make other joints absolute
        assert config.use_relative_actions and not readable(names) and "relative_exclude_joints" in str(error)
        return
    left, sent = None, []
    caplog.set_level(logging.WARNING, "lerobot_pi0")
    with torch.no_grad():
        for tick in range(8):
            batch = before(observation(tick))
            if config.rtc_config is None:
                sent.append(after(policy.select_action(batch)))
            elif tick % 4 == 0:
                chunk = policy.predict_action_chunk(batch, inference_delay=1, prev_chunk_left_over=left)
                left = chunk[0, 4:]
                sent += after(chunk)[:, :4].unbind(1)
    assert len(sent) == 8 and all(x.shape == (1, DIMS) and x.isfinite().all() for x in sent)
    said = [record.getMessage() for record in caplog.records if "bounds actions" in record.getMessage()]
    named = any(stored is x for x in EVERY.values()) and names in (NAMES, tuple(NAMES))
    assert said and (f"{ACTION}[" in said[0] or any(name in said[0] for name in NAMES))
    assert not named or f"{ACTION}[" not in said[0]
