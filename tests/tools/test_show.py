"""`lerobot-pi0 show`: what it says about a checkpoint is what loading it finds."""

import json
import logging

import pytest
from conftest import (
    CAMERAS,
    DIMS,
    micro_policy,
    relative,
    small_builtin,
    small_policy,
    stats,
    tiny_config,
    without_plugin,
)
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.policies.pi0.modeling_pi0 import PI0Policy as BuiltinPI0Policy
from safetensors.torch import load_file, save_file

from lerobot_pi0 import PI0Policy, make_pi0_pre_post_processors
from lerobot_pi0.checkpoints.checkpoint import Checkpoint
from lerobot_pi0.tools import main
from lerobot_pi0.tools.show import describe


@pytest.fixture(autouse=True)
def logs(monkeypatch, caplog) -> None:
    """The command sets logging up anew, which would take it away from pytest."""
    monkeypatch.setattr("lerobot_pi0.tools.init_logging", lambda: None)
    caplog.set_level(logging.INFO, "lerobot_pi0")


def shown(capsys, *args: str) -> dict:
    assert main(["show", *args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_it_says(tmp_path, capsys):
    """Catches a description that is not of this checkpoint: features, options, parts, dtypes, statistics."""
    policy = PI0Policy(tiny_config(CAMERAS[:2], dtype="bfloat16", chunk_size=7, n_action_steps=3, flow_samples=2))
    policy.update()
    policy.save_pretrained(tmp_path)
    for pipeline in make_pi0_pre_post_processors(policy.config, stats()):
        pipeline.save_pretrained(tmp_path)
    content = shown(capsys, f"--source={tmp_path}")
    assert list(content["features"]["cameras"]) == list(CAMERAS[:2])
    assert content["features"]["action"] == [DIMS]
    assert (content["options"]["chunk_size"], content["options"]["flow_samples"]) == (7, 2)
    assert (content["start"], content["updates"]) == (None, 1)
    assert {dtype for part in content["parts"] for dtype in part["dtypes"]} == {"BF16"}
    assert sum(part["parameters"] for part in content["parts"]) == sum(p.numel() for p in policy.parameters())
    assert {"action", "observation.state"} <= {*content["processors"]["statistics of"]}
    assert content["processors"]["tokenizer"] == "bytes"
    assert main(["show", f"--source={tmp_path}"]) == 0
    text = capsys.readouterr().out
    assert "vision tower" in text and "this plugin     yes" in text and "random weights" in text


VERDICTS = {
    "complete": (lambda folder: None, True, True),
    "a tensor is missing": (lambda folder: edit(folder, drop="model.action_in_proj.weight"), False, False),
    "no head of the expert": (
        lambda folder: edit(folder, drop="model.paligemma_with_expert.gemma_expert.lm_head.weight"), True, True,
    ),
    "older spelling": (lambda folder: edit(folder, spell=(".model.vision_tower.", ".vision_tower.")), True, False),
    "an option of another version": (lambda folder: add_option(folder), False, False),
}  # fmt: skip


def edit(folder, drop: str = "", spell: tuple[str, str] = ("", "")) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({k.replace(*spell): v for k, v in tensors.items() if k != drop}, folder / "model.safetensors")


def add_option(folder) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_window": 3}))


@pytest.mark.parametrize(("damage", "ours", "builtins"), VERDICTS.values(), ids=VERDICTS)
def test_who_loads_it(small, tmp_path, damage, ours, builtins):
    """Catches a verdict that is wrong: both policies are then really loaded, and their weights compared."""
    policy = small_policy()
    policy.save_pretrained(tmp_path)
    damage(tmp_path)
    try:
        content = describe(str(tmp_path))
        said = content["this plugin"]["loads"], content["built-in"]["loads"]
    except ValueError:
        said = False, False
    assert said == (ours, builtins)
    try:
        loaded = same(PI0Policy.from_pretrained(tmp_path), policy)
    except ValueError:
        loaded = False
    assert loaded == ours
    try:
        with without_plugin():
            loaded = same(BuiltinPI0Policy.from_pretrained(tmp_path, strict=True), policy)
    except Exception:  # draccus raises what it likes
        loaded = False
    assert loaded == builtins


def same(theirs, ours) -> bool:
    state = theirs.state_dict()
    return all(relative(state[name].float(), p.float()) < 1e-6 for name, p in ours.named_parameters())


def test_the_built_ins_own(small, tmp_path):
    """Catches a checkpoint of LeRobot's that is called incomplete, or taken for one of ours."""
    policy = small_builtin()
    with without_plugin():
        policy.save_pretrained(tmp_path)
    content = describe(str(tmp_path))
    assert content["built-in"] == content["this plugin"] == {"loads": True, "why not": []}
    assert content["start"] is content["updates"] is None


def test_trained_weights_alone(micro, tmp_path):
    """Catches a checkpoint over a base that is shown as complete, or as one that the built-in could run."""
    micro_policy().save_pretrained(tmp_path / "base")
    config = Checkpoint.open(tmp_path / "base").config()
    config.train_expert_only = config.save_expert_only = True
    PI0Policy.from_pretrained(tmp_path / "base", config=config).save_pretrained(tmp_path / "expert")
    content = describe(str(tmp_path / "expert"))
    assert "base" in content["kind"]
    assert content["this plugin"]["loads"] and not content["built-in"]["loads"]
    assert "VLM" not in {part["part"] for part in content["parts"]}


def test_refusals(tmp_path, caplog):
    """Catches a traceback, or silence, where there is no checkpoint or one of another policy."""
    assert main(["show", f"--source={tmp_path / 'nowhere'}"]) == 1
    assert "CheckpointNotFoundError" in caplog.text
    (tmp_path / "config.json").write_text('{"type": "act"}')
    assert main(["show", f"--source={tmp_path}"]) == 1
    assert "expected 'pi0'" in caplog.text


def test_what_it_was_trained_on(micro, tmp_path):
    """Catches a run whose dataset, length or held-out part is not found in what LeRobot notes about it."""
    policy = micro_policy(action_feature_names=[f"joint_{i}" for i in range(DIMS)])
    policy.save_pretrained(tmp_path)
    data = DatasetConfig("you/cubes", episodes=[0, 1, 5], eval_split=0.2)
    TrainPipelineConfig(dataset=data, policy=policy.config, steps=70, seed=3)._save_pretrained(tmp_path)
    content = describe(str(tmp_path))
    assert content["training"] == {
        "dataset": "you/cubes", "episodes": [0, 1, 5], "held out": 0.2, "steps": 70, "batch": 8, "learning rate": None,
        "seed": 3,
    }  # fmt: skip
    assert content["features"]["joints of the actions"] == policy.config.action_feature_names
    assert not content["built-in"]["loads"]
