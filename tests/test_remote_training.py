"""`lerobot-train --job.target`: the train_config.json that LeRobot sends to another machine."""

import json

import pytest
from lerobot.configs.default import DatasetConfig, JobConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.jobs.hf import build_remote_config_file
from test_registration import finish, start

from lerobot_pi0 import PI0Config
from lerobot_pi0.configuration_pi0 import OPTIONS

READ = """
import sys
from lerobot.configs.train import TrainPipelineConfig
from lerobot.utils.import_utils import register_third_party_plugins
register_third_party_plugins()
for name, path in (argument.split("=") for argument in sys.argv[1:]):
    try:
        config = TrainPipelineConfig.from_pretrained(path)
        answers[name] = [type(config.policy).__module__, config.policy.n_action_steps, config.policy.train_expert_only]
    except Exception as error:
        answers[name] = str(error)
"""


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    """The files that LeRobot would send, for different options that were set."""
    folder, files = tmp_path_factory.mktemp("sent"), {}
    for name, options in {"plain": {}, "expert": {"train_expert_only": True}, "ours": {"flow_samples": 2}}.items():
        policy = PI0Config(device="cpu", n_action_steps=7, push_to_hub=False, **options)
        config = TrainPipelineConfig(DatasetConfig(repo_id="you/data"), policy=policy, job=JobConfig(target="a100"))
        files[name] = build_remote_config_file(config, "you/policy", folder / name / "train_config.json")
    return files


def read(files, **environment):
    arguments = [f"{name}={path.parent}" for name, path in files.items()]
    return finish(start(READ, *arguments, **environment))[0]


def test_unset_options_are_left_out(sent):
    """Catches a key of ours with null: LeRobot without the plugin refuses any unknown key, whatever its value."""
    keys = {name: json.loads(path.read_text())["policy"].keys() for name, path in sent.items()}
    assert not keys["plain"] & {*OPTIONS, "train_expert_only"}
    assert keys["expert"] - keys["plain"] == {"train_expert_only"}
    assert keys["ours"] - keys["plain"] == {"flow_samples"}
    assert {"type", "n_action_steps", "image_resolution"} <= keys["plain"]


def test_lerobot_without_the_plugin_reads_it(sent):
    """Catches a job that fails at once in LeRobot's image; if an option of ours is set, the error has to name it."""
    found = read(sent, LEROBOT_PI0_TAKEOVER="0")
    assert found["plain"] == ["lerobot.policies.pi0.configuration_pi0", 7, False]
    assert found["expert"] == ["lerobot.policies.pi0.configuration_pi0", 7, True]
    assert "flow_samples" in found["ours"]


def test_lerobot_with_the_plugin_reads_it(sent):
    """Catches an option that is lost on the way to an image with the plugin, or an unset one that becomes set."""
    found = read(sent)
    assert found["plain"] == found["ours"] == ["lerobot_pi0.configuration_pi0", 7, None]
    assert found["expert"] == ["lerobot_pi0.configuration_pi0", 7, True]
    config = TrainPipelineConfig.from_pretrained(sent["ours"].parent)
    assert config.policy.flow_samples == 2 and config.policy.ema_decay is None
