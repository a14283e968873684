"""Processors: LeRobot's steps in LeRobot's order, a tokenizer without a network, statistics that are checked."""

import json
import logging
import shutil
from dataclasses import replace

import lerobot.policies.pi0.processor_pi0 as builtin
import pytest
import torch
from conftest import (
    ACTION,
    CAMERAS,
    DIMS,
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
    OBS_STATE,
    BuiltinPI0Config,
    PI0Config,
    features,
    stats,
    tiny_config,
)
from lerobot.configs import NormalizationMode
from lerobot.policies import make_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline, ProcessorStepRegistry
from raw_frames import TASK, sample, word_tokenizer
from safetensors.torch import load_file
from transformers import ByT5Tokenizer

from lerobot_pi0 import PI0Policy, make_pi0_pre_post_processors
from lerobot_pi0.inputs.statistics import check_statistics
from lerobot_pi0.inputs.steps import NOT_CARRIED, STEPS, PI0TokenizerStep

# The preprocessor of lerobot/pi0_base, as published.
PUBLISHED = json.loads("""
{"name": "policy_preprocessor", "steps": [
{"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
{"registry_name": "to_batch_processor", "config": {}},
{"registry_name": "pi0_new_line_processor", "config": {}},
{"registry_name": "tokenizer_processor", "config": {"max_length": 48, "task_key": "task", "padding_side": "right",
 "padding": "max_length", "truncation": true, "tokenizer_name": "google/paligemma-3b-pt-224"}},
{"registry_name": "device_processor", "config": {"device": "cuda", "float_dtype": null}},
{"registry_name": "relative_actions_processor", "config": {"enabled": false, "exclude_joints": ["gripper"],
 "action_names": null}},
{"registry_name": "normalizer_processor", "config": {"eps": 1e-08, "features": {},
 "norm_map": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}}}]}
""")


def saved_and_reloaded(pipelines, config, folder):
    """The pipelines as a checkpoint's user gets them."""
    for pipeline in pipelines:
        pipeline.save_pretrained(folder)
    return make_pre_post_processors(config, pretrained_path=str(folder))


# --- the steps ----------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer_from_the_hub(monkeypatch) -> list[str]:
    """Stands in for the Hub; holds the names that were asked for."""
    names: list[str] = []

    def from_pretrained(name, *args, **kwargs):
        names.append(str(name))
        return ByT5Tokenizer()

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_pretrained)
    return names


@pytest.mark.parametrize("relative", [False, True])
def test_steps_are_the_built_ins(tokenizer_from_the_hub, relative):
    """Catches another order, name or option of a step: each would change what published checkpoints see."""
    options = {"device": "cpu", "use_relative_actions": relative, "action_feature_names": list("abcdef")}
    ours = make_pi0_pre_post_processors(PI0Config(**features(), save_tokenizer=False, **options), stats())
    theirs = builtin.make_pi0_pre_post_processors(BuiltinPI0Config(**features(), **options), stats())
    for mine, reference in zip(ours, theirs, strict=True):
        config = mine.get_config()
        for step in config["steps"]:
            if step["registry_name"] == "tokenizer_processor":
                step.pop("state_file")  # LeRobot's has no state
        assert config == reference.get_config()
        state, expected = mine.state_dict(), reference.state_dict()
        state = {key: tensors for key, tensors in state.items() if "tokenizer" not in key}
        assert state.keys() == expected.keys()
        assert len(state) > 0
    names = [step["registry_name"] for step in ours[0].get_config()["steps"]]
    assert names == [step["registry_name"] for step in PUBLISHED["steps"]]
    assert set(tokenizer_from_the_hub) == {"google/paligemma-3b-pt-224"}


def test_default_tokenizer_is_paligemmas():
    """Catches a default that published weights were not trained with, and one that needs a network where none is."""
    assert PI0Config().tokenizer == "google/paligemma-3b-pt-224"
    assert PI0Config().tokenizer_max_length == 48
    assert tiny_config().tokenizer == "bytes"
    assert PI0Config(text_tokenizer_name="some/other").tokenizer == "some/other"


def test_a_published_preprocessor(tokenizer_from_the_hub, tmp_path):
    """Catches a registry in which published files no longer resolve, or resolve to another tokenizer step."""
    (tmp_path / "policy_preprocessor.json").write_text(json.dumps(PUBLISHED))
    pipeline = PolicyProcessorPipeline.from_pretrained(
        tmp_path,
        config_filename="policy_preprocessor.json",
        overrides={
            "device_processor": {"device": "cpu"},
            "normalizer_processor": {"features": features()["input_features"], "stats": stats()},
        },
    )
    assert [type(step)._registry_name for step in pipeline.steps] == [s["registry_name"] for s in PUBLISHED["steps"]]
    assert isinstance(pipeline.steps[3], PI0TokenizerStep)
    assert pipeline(sample())[OBS_LANGUAGE_TOKENS].shape == (1, 48)


def test_the_registry_is_lerobots():
    """Catches a step of this plugin in the pipelines of other policies, which LeRobot rebuilds from the registry."""
    for name, step in STEPS.items():
        assert ProcessorStepRegistry.get(name) in step.__mro__[1:]
        assert step._registry_name == name  # under which it is saved, so that LeRobot can load it


# --- the tokenizer ------------------------------------------------------------------------------------------


def test_byte_tokens():
    """Catches a prompt without its newline, a wrong mask, or padding on the left."""
    preprocessor, _ = make_pi0_pre_post_processors(tiny_config(), stats())
    batch = preprocessor(sample())
    tokens, mask = batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK].bool()
    assert tokens.shape == mask.shape == (1, 128)
    length = len(TASK) + 2  # newline and end of sequence
    assert torch.equal(mask[0], torch.arange(128) < length)
    assert ByT5Tokenizer().decode(tokens[0][mask[0]], skip_special_tokens=True) == TASK + "\n"
    assert tokens.max() < 384


def test_prompts_are_remembered_as_they_are(tmp_path, monkeypatch):
    """Catches a prompt that gets another one's tokens, or the tokens of a tokenizer that has been replaced."""
    monkeypatch.setattr("lerobot_pi0.inputs.steps.MANY_PROMPTS", 2)
    step = PI0TokenizerStep("bytes", max_length=9)
    prompts = ["red", "a green one", "red", "blue", ""]
    for texts in (prompts, prompts[::-1], ["more", "and", "more"], prompts, "red"):
        expected = ByT5Tokenizer()(
            texts, max_length=9, truncation=True, padding="max_length", padding_side="right", return_tensors="pt"
        )
        for key, tokens in step._tokenize_text(texts).items():
            assert torch.equal(tokens, expected[key])
    other = PI0TokenizerStep(word_tokenizer(tmp_path / "words"), max_length=9)
    step.load_state_dict(other.state_dict())
    assert torch.equal(step._tokenize_text(TASK)["input_ids"], other._tokenize_text(TASK)["input_ids"])


def test_byte_pipeline_survives_saving(tmp_path, monkeypatch):
    """Catches a checkpoint of a small preset that needs a network, or another file, to be loaded."""
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", None)
    config = tiny_config()
    before = make_pre_post_processors(config, dataset_stats=stats())
    after = saved_and_reloaded(before, config, tmp_path)
    a, b = before[0](sample()), after[0](sample())
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], key
    actions = torch.randn(1, DIMS)
    assert torch.equal(before[1](actions), after[1](actions))


def test_a_checkpoint_carries_its_tokenizer(tmp_path):
    """Catches a checkpoint that stops working when it is moved to a robot: the tokenizer's folder is gone."""
    name = word_tokenizer(tmp_path / "tokenizer")
    config = tiny_config(text_tokenizer_name=name, tokenizer_max_length=7)
    before = make_pre_post_processors(config, dataset_stats=stats())
    expected = before[0](sample())[OBS_LANGUAGE_TOKENS]
    assert expected.tolist() == [[2, 3, 4, 5, 0, 0, 0]]
    for pipeline in before:
        pipeline.save_pretrained(tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "tokenizer")
    moved = shutil.move(tmp_path / "checkpoint", tmp_path / "robot")
    after = make_pre_post_processors(config, pretrained_path=str(moved))
    assert torch.equal(after[0](sample())[OBS_LANGUAGE_TOKENS], expected)
    again = saved_and_reloaded(after, config, tmp_path / "again")
    assert torch.equal(again[0](sample())[OBS_LANGUAGE_TOKENS], expected)


def test_a_checkpoint_without_its_tokenizer(tmp_path):
    """Catches files of a gated tokenizer in a checkpoint whose owner said no, or in one that was made from it."""
    name = word_tokenizer(tmp_path / "tokenizer")
    config = tiny_config(text_tokenizer_name=name, save_tokenizer=False)
    pipelines = make_pi0_pre_post_processors(config, stats())
    again = saved_and_reloaded(pipelines, config, tmp_path / "checkpoint")
    again[0](sample())  # makes it look the tokenizer up
    saved_and_reloaded(again, config, tmp_path / "again")
    for folder in ("checkpoint", "again"):
        (file,) = (tmp_path / folder).glob("*tokenizer*")
        assert load_file(file).keys() == {NOT_CARRIED}


@pytest.mark.parametrize("carried", [True, False])
def test_whether_a_tokenizer_travels_is_the_runs(tmp_path, carried):
    """Catches a wish that is dropped: files of a gated tokenizer in a checkpoint whose owner said no, or a checkpoint
    for a robot without a network that lacks them, since the one that the run began with was of the other kind."""
    name = word_tokenizer(tmp_path / "tokenizer")
    config = tiny_config(text_tokenizer_name=name, save_tokenizer=carried)
    for saved in (PI0Policy(config), *make_pi0_pre_post_processors(config, stats())):
        saved.save_pretrained(tmp_path / "first")
    for asked in (None, not carried):
        policy = PI0Policy.from_pretrained(tmp_path / "first", config=tiny_config(save_tokenizer=asked))
        pipelines = make_pre_post_processors(policy.config, pretrained_path=str(tmp_path / "first"))
        tokens = pipelines[0](sample())[OBS_LANGUAGE_TOKENS]
        for saved in (policy, *pipelines):
            saved.save_pretrained(tmp_path / "next")
        (file,) = (tmp_path / "next").glob("*tokenizer*.safetensors")
        expected = carried if asked is None else asked
        assert (load_file(file).keys() != {NOT_CARRIED}) is expected
        assert json.loads((tmp_path / "next" / "lerobot_pi0.json").read_text())["save_tokenizer"] is expected
        again = make_pre_post_processors(PI0Policy.from_pretrained(tmp_path / "next").config, str(tmp_path / "next"))
        assert torch.equal(again[0](sample())[OBS_LANGUAGE_TOKENS], tokens)
        shutil.rmtree(tmp_path / "next")


def test_a_tokenizer_that_is_not_there():
    """Catches a stack of Hub errors in place of what to do: log in, name a folder, or take another checkpoint."""
    config = PI0Config(**features(), device="cpu")
    with pytest.raises(OSError, match=r"google/paligemma-3b-pt-224.*gated.*hf auth login.*text_tokenizer_name"):
        make_pi0_pre_post_processors(config, stats())


# --- statistics ---------------------------------------------------------------------------------------------


def spoilt(key: str, **changes) -> dict:
    """Statistics with some entries of one feature replaced; None takes them out."""
    entry = {name: value for name, value in (stats()[key] | changes).items() if value is not None}
    return stats() | {key: entry}


@pytest.mark.parametrize("given", [None, {}, spoilt(ACTION, std=None), spoilt(OBS_STATE, mean=None, std=None)])
def test_missing_statistics(given):
    """Catches pipelines that pass raw units on, which a policy learns or a robot executes."""
    with pytest.raises(ValueError, match=r"no (mean and )?(std )?.*is normalised by MEAN_STD.*recompute_stats"):
        make_pi0_pre_post_processors(tiny_config(), given)


@pytest.mark.parametrize("mode", ["QUANTILES", "MIN_MAX"])
def test_missing_statistics_of_other_modes(mode):
    """Catches a check of mean and std where others are what the normaliser reads."""
    config = tiny_config()
    config.normalization_mapping = dict(config.normalization_mapping, ACTION=NormalizationMode[mode])
    names = {"QUANTILES": ("q01", "q99"), "MIN_MAX": ("min", "max")}[mode]
    for name in names:
        given = dict.fromkeys(names, torch.ones(DIMS)) | {name: None}
        with pytest.raises(ValueError, match=rf"no {name} for 'action', .* {mode}"):
            check_statistics(config, spoilt(ACTION, **given))


def test_what_is_not_normalised_needs_no_statistics():
    """Catches a demand for statistics of images or of features that are passed on as they are."""
    config = tiny_config()
    config.normalization_mapping = dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)
    check_statistics(config, None)


@pytest.mark.parametrize("key", [OBS_STATE, ACTION])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite(key, value):
    """Catches NaN that every later batch would be made of."""
    with pytest.raises(ValueError, match=rf"{key}.*NaN"):
        check_statistics(tiny_config(), spoilt(key, std=torch.tensor([1, 1, value, 1, 1, 1])))


def near_constant(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "near-constant" in r.message]


def test_near_constant_dimensions_are_named(caplog):
    """Catches a joint that never moved in the data: a degree off becomes a thousand standard deviations."""
    names = ["pan", "lift", "elbow", "flex", "roll", "gripper"]
    given = spoilt(ACTION, std=torch.tensor([20.0, 20.0, 1e-6, 20.0, 0.0, 20.0]))
    make_pi0_pre_post_processors(tiny_config(action_feature_names=names), given)
    (message,) = near_constant(caplog)
    assert "'action'" in message
    assert [name for name in names if name in message] == ["elbow", "roll"]


def test_near_constant_dimensions_without_names(caplog):
    """Catches a check that relies on names, or on the state and the action having the same ones."""
    check_statistics(tiny_config(), spoilt(OBS_STATE, std=torch.tensor([1, 1, 1, 1, 1, 1e-6])))
    (message,) = near_constant(caplog)
    assert f"{OBS_STATE}[5]" in message


def test_ordinary_statistics_are_quiet(caplog):
    """Catches warnings about joints that move little but do move: a hundredth of the others' spread."""
    check_statistics(tiny_config(), spoilt(ACTION, std=torch.tensor([90.0, 40.0, 20.0, 1.0, 5.0, 30.0])))
    assert near_constant(caplog) == []


# --- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["MEAN_STD", "MIN_MAX", "IDENTITY"])
def test_normalising_there_and_back(mode):
    """Catches a postprocessor that does not undo the preprocessor: the robot would get other units."""
    config = tiny_config()
    config.normalization_mapping = dict(config.normalization_mapping, ACTION=NormalizationMode[mode])
    preprocessor, postprocessor = make_pi0_pre_post_processors(config, stats())
    raw = sample()
    normalised = preprocessor(raw)[ACTION]
    torch.testing.assert_close(postprocessor(normalised), raw[ACTION], rtol=1e-4, atol=1e-4)
    assert torch.equal(normalised, raw[ACTION]) is (mode == "IDENTITY")


def test_normalised_values():
    """Catches an exchange of mean and std, or images that are normalised too."""
    preprocessor, _ = make_pi0_pre_post_processors(tiny_config(), stats())
    raw, entry = sample(), stats()[OBS_STATE]
    batch = preprocessor(raw)
    torch.testing.assert_close(batch[OBS_STATE][0], (raw[OBS_STATE] - entry["mean"]) / (entry["std"] + 1e-8))
    assert all(torch.equal(batch[key][0], raw[key]) for key in CAMERAS)


def test_relative_actions_there_and_back():
    """Catches relative actions that are learnt relative to one state and executed relative to another."""
    names = ["pan", "lift", "elbow", "flex", "roll", "gripper"]
    config = tiny_config(use_relative_actions=True, action_feature_names=names)
    assert config.relative_exclude_joints == ["gripper"]
    preprocessor, postprocessor = make_pi0_pre_post_processors(config, stats())
    raw, entry = sample(), stats()[ACTION]
    normalised = preprocessor(raw)[ACTION]
    moved = raw[ACTION] - raw[OBS_STATE] * torch.tensor([1, 1, 1, 1, 1, 0])
    torch.testing.assert_close(normalised, (moved - entry["mean"]) / (entry["std"] + 1e-8))
    torch.testing.assert_close(postprocessor(normalised), raw[ACTION], rtol=1e-4, atol=1e-4)


def test_config_is_not_changed():
    """Catches a factory that edits the config it is given, which is saved afterwards."""
    config = tiny_config()
    before = replace(config)
    make_pi0_pre_post_processors(config, stats())
    assert config == before


# --- prompts ------------------------------------------------------------------------------------------------


DIRTY, CLEAN = " pick_up\nthe_cube\n", "pick up the cube\n"


def prompts_of(pipeline) -> list[str]:
    return pipeline(sample() | {"task": DIRTY})["task"]


@pytest.mark.parametrize("cleans", [True, False])
def test_clean_prompts(tmp_path, cleans):
    """Catches prompts that are read in one way in training and in another at the robot, or another cleaning."""
    config = tiny_config(clean_prompts=cleans)
    made = make_pi0_pre_post_processors(config, stats())
    expected = [CLEAN] if cleans else [DIRTY]
    assert prompts_of(made[0]) == expected
    for pipeline in made:
        pipeline.save_pretrained(tmp_path)
    assert prompts_of(make_pre_post_processors(config, pretrained_path=str(tmp_path))[0]) == expected
    for text in ("take the cube", "take_the cube", "\n a_b\nc "):  # openpi: PaligemmaTokenizer.tokenize
        assert prompts_of(made[0]) == expected
        if cleans:
            found = made[0](sample() | {"task": text})["task"]
            assert found == [text.strip().replace("_", " ").replace("\n", " ") + "\n"]


@pytest.mark.parametrize(("before", "asked", "after"), [
    (False, None, False), (False, True, True), (True, None, True), (True, False, False),
])  # fmt: skip
def test_clean_prompts_of_a_fine_tuned_checkpoint(tmp_path, before, asked, after):
    """Catches an option without effect where most runs begin: LeRobot rebuilds the checkpoint's pipeline."""
    config = tiny_config(clean_prompts=before)
    PI0Policy(config).save_pretrained(tmp_path)
    for pipeline in make_pi0_pre_post_processors(config, stats()):
        pipeline.save_pretrained(tmp_path)
    policy = PI0Policy.from_pretrained(tmp_path, config=tiny_config(clean_prompts=asked), dataset_stats=stats())
    assert policy.config.clean_prompts is after
    pipelines = make_pre_post_processors(policy.config, pretrained_path=str(tmp_path))
    assert prompts_of(pipelines[0]) == ([CLEAN] if after else [DIRTY])
    for pipeline in pipelines:
        pipeline.save_pretrained(tmp_path / "saved")
    pipeline, _ = make_pre_post_processors(policy.config, pretrained_path=str(tmp_path / "saved"))
    assert prompts_of(pipeline) == ([CLEAN] if after else [DIRTY])
