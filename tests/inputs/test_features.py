"""What is said of a dataset's features and of chunks beside its episodes."""

import logging
import re
from types import SimpleNamespace

import pytest
from conftest import stats, tiny_config
from lerobot.utils.constants import OBS_ENV_STATE, OBS_STATE

from lerobot_pi0 import PI0Config
from lerobot_pi0.inputs import features
from lerobot_pi0.inputs.features import LONG_CHUNK, long_chunk
from lerobot_pi0.inputs.statistics import check_dataset


@pytest.mark.parametrize("lengths", [[3], [40, 60], [100, 12, 31], [8], [16]])
@pytest.mark.parametrize("chunk", [1, 8, 16, 50])
def test_steps_beyond_the_end_are_counted(lengths, chunk):
    """Catches a share of repeated actions that is not the one of the samples that LeRobot makes."""
    steps = [i + t >= length for length in lengths for i in range(length) for t in range(chunk)]
    share = sum(steps) / len(steps)
    said = long_chunk(PI0Config(chunk_size=chunk, n_action_steps=1), lengths)
    assert (said is not None) == (share >= LONG_CHUNK)
    if said is not None:
        assert f"{share:.0%} of all steps" in said[0]


def test_a_run_is_told_what_is_not_read(caplog):
    """Catches a dataset's places of objects, or efforts, of which somebody believes that the policy sees them."""

    def told(**options) -> list[str]:
        caplog.clear()
        seen = [OBS_STATE, OBS_ENV_STATE, "observation.effort"]
        meta = SimpleNamespace(features=dict.fromkeys(seen), stats={}, camera_keys=())
        config = tiny_config(**options)
        check_dataset(config, stats(), meta)
        return [x.getMessage() for x in caplog.records if "are not read" in x.getMessage()]

    caplog.set_level(logging.WARNING)
    says = "of the dataset are not read: π₀ sees cameras, state and instruction"
    assert told() == [f"{OBS_ENV_STATE}, observation.effort {says}"]
    assert told(environment_state_weight=0.1) == [f"observation.effort {says}"]


def test_a_run_is_told_of_a_long_chunk(caplog):
    """Catches a warning that a run does not give, or that stays when its remedy was taken."""
    meta = SimpleNamespace(episodes={"length": [80, 90]})

    def told(**options) -> list[str]:
        caplog.clear()
        features.name_long_chunk(PI0Config(device="cpu", **options), meta)
        return [x.getMessage() for x in caplog.records if x.name == features.logger.name]

    caplog.set_level(logging.WARNING)
    (message,) = told(chunk_size=50)
    assert "chunk_size=50 is long beside the episodes (median 85 frames)" in message
    (remedy,) = re.findall("(--policy.chunk_size=.*),", message)  # which has to be one that a run takes
    assert told(**{name: int(x) for name, x in re.findall(r"--policy.(\w+)=(\d+)", remedy)}) == []
    assert told(chunk_size=21, n_action_steps=10) == told(chunk_size=50, mask_padded_actions=True) == []
