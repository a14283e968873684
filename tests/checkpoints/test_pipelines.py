"""Processor files of checkpoints: nothing in them is executed, and what is not π₀'s is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CAMERAS, make_batch, stats, tiny_config, write_dataset
from folders import POST, PRE, as_published
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import ProcessorStep, ProcessorStepRegistry
from safetensors.torch import load_file, save_file

from lerobot_pi0 import PI0Policy, make_pi0_pre_post_processors
from lerobot_pi0.checkpoints.checkpoint import Checkpoint
from lerobot_pi0.checkpoints.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError
from lerobot_pi0.inputs.steps import PI0TokenizerStep, TokenizerError
from lerobot_pi0.tools import main

pytestmark = pytest.mark.usefixtures("micro")


@pytest.fixture
def folder(tmp_path) -> Path:
    return build(tmp_path / "checkpoint")


def build(folder: Path, **options) -> Path:
    """A checkpoint with its processors."""
    policy = PI0Policy(tiny_config(cameras=CAMERAS[:1], **options))
    policy.save_pretrained(folder)
    for pipeline in make_pi0_pre_post_processors(policy.config, stats(cameras=CAMERAS[:1])):
        pipeline.save_pretrained(folder)
    return folder


def edit(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_state(folder: Path, step: str, change) -> None:
    file = next(folder.glob(f"*_{step}.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


HARM = {
    "a program": lambda mark: {"class": "subprocess.Popen", "config": {"args": ["touch", str(mark)]}},
    "a class of LeRobot": lambda mark: {"class": "lerobot.processor.DeviceProcessorStep", "config": {}},
    "a class beside a name": lambda mark: {"registry_name": "device_processor", "class": "os.system", "config": {}},
    "code of the Hub": lambda mark: {"registry_name": "action_tokenizer_processor", "config": {}},
    "trust": lambda mark: {"registry_name": "device_processor", "config": {"deep": [{"trust_remote_code": True}]}},
    "a file elsewhere": lambda mark: {"registry_name": "device_processor", "state_file": "../x.safetensors"},
}


@pytest.mark.parametrize("file", [PRE, POST])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("harm", HARM)
def test_nothing_is_executed(folder, tmp_path, file, place, harm):
    """Catches a step that LeRobot would import and call: the policy, which its commands build first, refuses."""
    mark = tmp_path / "executed"
    edit(folder / file, lambda content: content["steps"].insert(place, HARM[harm](mark)))
    with pytest.raises(UnsafeCheckpointError):
        PI0Policy.from_pretrained(folder)
    assert not mark.exists()


@pytest.mark.parametrize("verb", ["check", "open-loop", "show"])
def test_no_verb_executes(folder, tmp_path, verb, capsys):
    """Catches a verb that builds pipelines before anything has looked at them."""
    mark = tmp_path / "executed"
    edit(folder / PRE, lambda content: content["steps"].insert(0, HARM["a program"](mark)))
    write_dataset(tmp_path / "data", cameras=CAMERAS[:1])
    place = [f"--policy.path={folder}", "--dataset.repo_id=test/tiny", f"--dataset.root={tmp_path}/data"]
    assert main([verb, *([f"--source={folder}"] if verb == "show" else place)]) == 1
    assert not mark.exists()


def test_training_executes_nothing(folder, tmp_path):
    """Catches a run that replaces statistics, and therefore looks at nothing of the checkpoint's processors."""
    mark = tmp_path / "executed"
    edit(folder / PRE, lambda content: content["steps"].insert(0, HARM["a program"](mark)))
    with pytest.raises(UnsafeCheckpointError):
        PI0Policy.from_pretrained(folder, dataset_stats=stats(cameras=CAMERAS[:1]))


def test_a_step_of_a_plugin_is_named(tmp_path, caplog):
    """Catches a refusal of steps that a user's own plugin has registered, or silence about them."""
    folder = as_published(build(tmp_path / "there"))

    class Own(ProcessorStep):
        def __call__(self, transition):
            return transition

        def transform_features(self, features):
            return features

    edit(folder / PRE, lambda content: content["steps"].insert(2, {"registry_name": "own_step", "config": {}}))
    with pytest.raises(CheckpointError, match=r"own_step.*not registered"):
        PI0Policy.from_pretrained(folder)
    ProcessorStepRegistry.register("own_step")(Own)
    try:
        policy = PI0Policy.from_pretrained(folder)
        assert sum("own_step" in record.getMessage() for record in caplog.records) == 1
        pre, _ = make_pre_post_processors(policy.config, str(folder))
        assert any(isinstance(step, Own) for step in pre.steps)
    finally:
        ProcessorStepRegistry.unregister("own_step")


STEPS = {
    "no prompt step": (PRE, lambda steps: steps.pop(2)),
    "no tokenizer": (PRE, lambda steps: steps.pop(3)),
    "no normaliser": (PRE, lambda steps: steps.pop(-1)),
    "normalised before relative": (PRE, lambda steps: steps.insert(-1, steps.pop(-2)) or steps.reverse()),
    "normalised twice": (PRE, lambda steps: steps.append(steps[-1])),
    "unnormalised before the policy": (PRE, lambda steps: steps.append({"registry_name": "unnormalizer_processor"})),
    "never unnormalised": (POST, lambda steps: steps.pop(0)),
    "absolute before unnormalised": (POST, lambda steps: steps.insert(0, steps.pop(1))),
    "relative alone": (POST, lambda steps: steps[1]["config"].update(enabled=True)),
    "no steps": (PRE, lambda steps: steps.clear()),
}


@pytest.mark.parametrize("fault", STEPS)
def test_steps_are_those_of_pi0(tmp_path, fault):
    """Catches steps that are missing, doubled or exchanged in a checkpoint of others, which carries no digests."""
    folder = as_published(build(tmp_path / "there"))
    PI0Policy.from_pretrained(folder)
    file, change = STEPS[fault]
    edit(folder / file, lambda content: change(content["steps"]))
    with pytest.raises(CheckpointError):
        PI0Policy.from_pretrained(folder)


STATISTICS = {
    "NaN": lambda t: t["action.std"].fill_(float("nan")),
    "one NaN": lambda t: t["action.mean"][2:3].fill_(float("nan")),
    "infinite": lambda t: t["observation.state.std"][1:2].fill_(float("inf")),
    "negative": lambda t: t["action.std"].neg_(),
    "other dims": lambda t: t.update({"action.std": t["action.std"][:-1].clone()}),
    "no spread": lambda t: t.pop("action.std"),
    "other values": lambda t: t["action.mean"].add_(1),
    "joints exchanged": lambda t: t.update({"action.mean": t["action.mean"].flip(0).contiguous()}),
}


@pytest.mark.parametrize("fault", STATISTICS)
@pytest.mark.parametrize("step", ["normalizer_processor", "unnormalizer_processor"])
def test_statistics_of_others(tmp_path, fault, step):
    """Catches statistics of a published checkpoint that are no numbers, of other dims, or not the same twice."""
    folder = as_published(build(tmp_path / "there"))
    edit_state(folder, step, STATISTICS[fault])
    with pytest.raises(CorruptCheckpointError):
        PI0Policy.from_pretrained(folder)


def test_a_new_run_replaces_statistics(folder):
    """Catches a refusal of statistics that nobody will use: a run with a dataset puts the dataset's in their place."""
    as_published(folder)
    for step in ("_normalizer_processor", "unnormalizer_processor"):
        edit_state(folder, step.lstrip("_"), STATISTICS["NaN"])
    PI0Policy.from_pretrained(folder, dataset_stats=stats(cameras=CAMERAS[:1]))


def test_nan_does_not_leave_the_postprocessor(folder):
    """Catches NaN that is sent to a robot: from statistics that were put in by hand, or a pose that is not a number."""
    policy = PI0Policy.from_pretrained(folder)
    made = stats(cameras=CAMERAS[:1])
    made["action"]["std"] = made["action"]["std"].clone()
    made["action"]["std"][3] = float("nan")
    _, post = make_pre_post_processors(
        policy.config, str(folder), postprocessor_overrides={"unnormalizer_processor": {"stats": made}}
    )
    with pytest.raises(FloatingPointError, match="dim 3"):
        post(torch.zeros(1, 6))


@pytest.mark.parametrize("bound", [{"max_action_step": 0.05}, {"action_range_margin": 0.0}])
@pytest.mark.parametrize("tick", [0, 1, 7])
def test_a_joint_that_is_not_measured_stops_a_bounded_policy(folder, bound, tick):
    """Catches a bound that is skipped in the middle of a chunk, where nothing else looks at the state."""
    config = Checkpoint.open(folder).config()
    for name, value in bound.items():
        setattr(config, name, value)
    policy = PI0Policy.from_pretrained(folder, config=config)
    batch = make_batch(0, batch_size=1, cameras=CAMERAS[:1], size=16)
    batch["observation.language.tokens"] %= 24  # the small vocabulary
    for _ in range(tick):
        policy.select_action(dict(batch))
    batch["observation.state"][0, 2] = float("nan")
    if "max_action_step" in bound or tick == 0:
        with pytest.raises((FloatingPointError, ValueError), match=r"action\[2\]|NaN"):
            policy.select_action(dict(batch))
    else:
        assert policy.select_action(dict(batch)).isfinite().all()  # the range of the data needs no state


@pytest.mark.parametrize("name", ["tokenizer.py", "../../x", "pytorch_model.bin", "tokenizer.pkl", ""])
def test_files_of_a_tokenizer_are_those_of_a_list(name):
    """Catches a program, a pickle or a path that a checkpoint carries as a file of its tokenizer."""
    step = PI0TokenizerStep(tokenizer_name="x")
    with pytest.raises(TokenizerError, match="no tokenizer of its kind"):
        step.load_state_dict({name: torch.zeros(3, dtype=torch.uint8)})


def test_a_tokenizer_runs_no_code(tmp_path):
    """Catches a tokenizer's configuration that names a program of its repository."""
    text = json.dumps({"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"})
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Own: pass\n")
    step = PI0TokenizerStep(tokenizer_name="x")
    with pytest.raises(TokenizerError):
        step.load_state_dict({"tokenizer_config.json": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)})
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(TokenizerError):
        _ = PI0TokenizerStep(tokenizer_name=str(tmp_path)).input_tokenizer
    assert not (tmp_path / "executed").exists()


def test_half_a_copy(folder):
    """Catches a folder that has one of two processor files, as a copy or a save that was cut off leaves it."""
    as_published(folder)
    for name in (PRE, POST):
        copy = folder.with_name(name)
        shutil.copytree(folder, copy)
        (copy / name).unlink()
        with pytest.raises(CorruptCheckpointError, match="cut off"):
            PI0Policy.from_pretrained(copy)
