"""The manifest: what was saved together is noticed when it no longer is, and named."""

import json
import logging
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CAMERAS, stats
from folders import POST, PRE, as_published
from lerobot.policies.factory import make_pre_post_processors
from safetensors.torch import load_file, save_file
from test_pipelines import build, edit

from lerobot_pi0 import PI0Policy
from lerobot_pi0.checkpoints.checkpoint import Checkpoint
from lerobot_pi0.checkpoints.errors import CheckpointConfigError, CheckpointError, CorruptCheckpointError

pytestmark = pytest.mark.usefixtures("micro")

MANIFEST, WEIGHTS = "lerobot_pi0_manifest.json", "model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A checkpoint with two cameras and its processors."""
    with pytest.MonkeyPatch.context() as patch:
        import conftest

        patch.setitem(conftest.configuration.PALIGEMMA_PRESETS, "tiny", conftest.MICRO_VLM)
        patch.setitem(conftest.configuration.EXPERT_PRESETS, "tiny", conftest.MICRO_EXPERT)
        from conftest import tiny_config

        from lerobot_pi0 import make_pi0_pre_post_processors

        folder = tmp_path_factory.mktemp("original") / "checkpoint"
        policy = PI0Policy(tiny_config(cameras=CAMERAS[:2]), dataset_stats=stats(cameras=CAMERAS[:2]))
        policy.save_pretrained(folder)
        for pipeline in make_pi0_pre_post_processors(policy.config, stats(cameras=CAMERAS[:2])):
            pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


def test_what_was_saved_loads_without_a_word(folder, caplog):
    """Catches a comparison that finds differences where there are none."""
    assert (folder / MANIFEST).is_file()
    PI0Policy.from_pretrained(folder)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("lerobot_pi0")]


@pytest.mark.parametrize("kind", ["flipped byte", "scaled", "exchanged joints", "of another checkpoint"])
@pytest.mark.parametrize("step", ["both", "_normalizer_processor", "unnormalizer_processor"])
def test_statistics_belong_to_the_weights(folder, tmp_path, kind, step):
    """Catches statistics that were changed, in one file or alike in both, where comparing the two finds nothing."""
    steps = ("_normalizer_processor", "unnormalizer_processor") if step == "both" else (step,)
    for name in steps:
        file = next(f for f in folder.iterdir() if f.name.endswith(f"{name}.safetensors"))
        if kind == "flipped byte":
            data = bytearray(file.read_bytes())
            data[random.Random(step).randrange(len(data) - 64, len(data))] ^= 1
            file.write_bytes(data)
            continue
        tensors = load_file(file)
        if kind == "scaled":
            tensors["action.std"] *= 1.5
        elif kind == "exchanged joints":
            tensors["observation.state.mean"] = tensors["observation.state.mean"].flip(0).contiguous()
        else:
            tensors |= {key: x + 1 for key, x in tensors.items() if x.is_floating_point()}
        save_file(tensors, file)
    with pytest.raises(CheckpointError):
        PI0Policy.from_pretrained(folder)


FIXED = {
    "a camera is renamed": lambda c: c["input_features"].update(x=c["input_features"].pop(CAMERAS[0])),
    "another normalisation": lambda c: c["normalization_mapping"].update(ACTION="IDENTITY"),
    "pictures of one channel": lambda c: c["input_features"][CAMERAS[0]].update(shape=[1, 64, 64]),
    "a state of other dims": lambda c: c["input_features"]["observation.state"].update(shape=[5]),
    "relative actions": lambda c: c.update(use_relative_actions=True),
    "another period": lambda c: c.update(min_period=0.01),
}


@pytest.mark.parametrize("fault", FIXED)
def test_what_weights_were_made_for_is_not_edited(folder, fault):
    """Catches an edit of config.json with which the same weights mean something else."""
    edit(folder / "config.json", FIXED[fault])
    with pytest.raises(CheckpointConfigError):
        PI0Policy.from_pretrained(folder)


def test_options_may_be_edited(folder, caplog):
    """Catches a refusal of what a user may change, or silence about it."""
    edit(folder / "config.json", lambda c: c.update(num_inference_steps=3))
    edit(folder / "lerobot_pi0.json", lambda c: c.update(solver="midpoint"))
    policy = PI0Policy.from_pretrained(folder)
    assert (policy.config.num_inference_steps, policy.config.solver) == (3, "midpoint")
    assert "config.json" in caplog.text
    assert "edited since it was saved: num_inference_steps" in caplog.text
    assert "edited since it was saved: solver" in caplog.text


def test_a_checkpoint_does_not_name_the_commit_of_its_base(folder, tmp_path):
    """Catches a policy that cannot be loaded once it is pushed: LeRobot asks for this commit in its own repository."""
    policy = PI0Policy.from_pretrained(folder)
    policy.config.pretrained_revision = "0" * 40
    policy.save_pretrained(tmp_path / "next")
    assert json.loads((tmp_path / "next" / "config.json").read_text())["pretrained_revision"] is None


def test_a_checkpoint_without_statistics_is_named(folder, tmp_path, caplog):
    """Catches a base that drives an arm to places around zero, in silence: its numbers are not in the robot's units."""
    said = "has no statistics of actions"
    policy = PI0Policy.from_pretrained(folder)
    assert said not in caplog.text
    policy.save_pretrained(tmp_path / "bare")
    for pipeline in make_pre_post_processors(policy.config, pretrained_path=str(folder)):
        for step in pipeline.steps:
            if hasattr(step, "stats"):
                step.stats, step._tensor_stats = {}, {}
        pipeline.save_pretrained(tmp_path / "bare")
    PI0Policy.from_pretrained(tmp_path / "bare")
    assert said in caplog.text


def test_the_size_of_pictures_may_be_edited(folder):
    """Catches a refusal of what changes nothing: a camera of another resolution, whose pictures are resized as well."""
    edit(folder / "config.json", lambda c: c["input_features"][CAMERAS[0]].update(shape=[3, 480, 640]))
    PI0Policy.from_pretrained(folder)


def test_sorted_keys_do_not_exchange_cameras(folder):
    """Catches cameras that change places when a program sorts the keys of config.json."""
    content = json.loads((folder / "config.json").read_text())
    content["input_features"] = dict(reversed(content["input_features"].items()))
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointConfigError, match=r"cameras in config.json.*order"):
        PI0Policy.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(content, sort_keys=True))  # alphabetical, as they were
    PI0Policy.from_pretrained(folder)


def test_weights_of_another_checkpoint(folder, tmp_path):
    """Catches weights that were copied over those that processors and options were saved with."""
    torch.manual_seed(7)
    other = build(tmp_path / "other")
    shutil.copy(other / WEIGHTS, folder / WEIGHTS)
    with pytest.raises(CorruptCheckpointError, match="not those"):
        PI0Policy.from_pretrained(folder)


def test_a_lost_plugin_file(folder, caplog):
    """Catches bounds and solver that vanish with a file that did not come along."""
    config = Checkpoint.open(folder).config()
    config.max_action_step = 3.0
    PI0Policy.from_pretrained(folder, config=config).save_pretrained(folder)
    (folder / "lerobot_pi0.json").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"lost lerobot_pi0.json.*max_action_step"):
        PI0Policy.from_pretrained(folder)


def test_a_lost_plugin_file_without_options(folder, caplog):
    """Catches a refusal where nothing that matters was lost, or silence about what is unknown."""
    (folder / "lerobot_pi0.json").unlink()
    PI0Policy.from_pretrained(folder)
    assert "has lost lerobot_pi0.json" in caplog.text


def test_a_save_that_ends_before_the_processors(folder, tmp_path):
    """Catches "tampered" said of a save that was cut off between weights and processors, or a mixture that loads."""
    torch.manual_seed(3)
    new = build(tmp_path / "new")
    for name in (WEIGHTS, "config.json", "lerobot_pi0.json", MANIFEST):  # new weights over the old processors
        shutil.copy(new / name, folder / name)
    edit(folder / MANIFEST, lambda m: m.update(processors=None, statistics="0" * 16))
    with pytest.raises(CorruptCheckpointError, match="unfinished"):
        PI0Policy.from_pretrained(folder)
    for file in folder.glob("policy_*"):
        file.unlink()
    PI0Policy.from_pretrained(folder)  # weights alone


def test_weights_saved_again_keep_their_processors(folder):
    """Catches a refusal of a policy that was loaded, changed and saved where it was, with the same statistics."""
    policy = PI0Policy.from_pretrained(folder)
    policy.save_pretrained(folder)
    assert json.loads((folder / MANIFEST).read_text())["processors"] is None
    PI0Policy.from_pretrained(folder)


def test_a_new_run_records_its_own_statistics(folder, tmp_path):
    """Catches a run with another dataset whose checkpoints are held to the statistics of the one it began with."""
    own = stats(cameras=CAMERAS[:2])
    for values in own.values():
        values["mean"] = values["mean"] + 1
    policy = PI0Policy.from_pretrained(folder, dataset_stats=own)
    pipelines = make_pre_post_processors(
        policy.config,
        str(folder),
        preprocessor_overrides={"normalizer_processor": {"stats": own}},
        postprocessor_overrides={"unnormalizer_processor": {"stats": own}},
    )
    policy.save_pretrained(tmp_path / "new")
    for pipeline in pipelines:
        pipeline.save_pretrained(tmp_path / "new")
    PI0Policy.from_pretrained(tmp_path / "new")
    bound = [json.loads((place / MANIFEST).read_text())["statistics"] for place in (folder, tmp_path / "new")]
    assert None not in bound
    assert bound[0] != bound[1]


def test_checkpoints_without_a_manifest(folder, caplog):
    """Catches a refusal of what version 0.1.0 wrote, or no word about what is not compared."""
    (folder / MANIFEST).unlink()
    PI0Policy.from_pretrained(folder)
    assert sum("0.1.0 wrote none" in r.getMessage() for r in caplog.records) == 1
    caplog.clear()
    PI0Policy.from_pretrained(as_published(folder))
    assert "0.1.0" not in caplog.text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"options": 3}', '{"options": {}, "cameras": []}', "[" * 10**5])
def test_a_broken_manifest(folder, text):
    """Catches an error of Python's own from a manifest that is cut or no manifest."""
    (folder / MANIFEST).write_text(text)
    with pytest.raises(CorruptCheckpointError, match=MANIFEST):
        PI0Policy.from_pretrained(folder)


@pytest.mark.parametrize("file", [PRE, POST])
def test_edited_steps(folder, file):
    """Catches a processor file that says something else than what was saved; the order of its keys says nothing."""
    text = json.dumps(json.loads((folder / file).read_text()), sort_keys=True)
    (folder / file).write_text(text)
    PI0Policy.from_pretrained(folder)
    edit(folder / file, lambda c: c["steps"][-1]["config"].update(eps=1e-3, device="meta"))
    with pytest.raises(CorruptCheckpointError, match=file):
        PI0Policy.from_pretrained(folder)


def test_one_file_of_the_processors_is_lost(folder, tmp_path):
    """Catches a file of the processors that nobody misses until the robot's first tick."""
    for name in sorted(f.name for f in folder.glob("policy_*")):
        place = Path(shutil.copytree(folder, tmp_path / name))
        (place / name).unlink()
        with pytest.raises(CorruptCheckpointError):
            PI0Policy.from_pretrained(place)
