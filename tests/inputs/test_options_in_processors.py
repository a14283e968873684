"""Options of a run that live in saved processors, and cameras and dims of a run that begins from a checkpoint."""

import gc
import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ACTION, CAMERAS, DIMS, OBS_STATE, features, micro_policy, stats, tiny_config
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies import make_pre_post_processors
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    DataProcessorPipeline,
    ProcessorStepRegistry,
    RelativeActionsProcessorStep,
    TokenizerProcessorStep,
)
from test_processor import PUBLISHED, TASK, sample, word_tokenizer
from transformers import AutoTokenizer

from lerobot_pi0 import PI0Config, PI0Policy, make_pi0_pre_post_processors, take_over
from lerobot_pi0.checkpoints.errors import CheckpointConfigError
from lerobot_pi0.inputs.joints import check_pairing
from lerobot_pi0.inputs.pipelines import artifact
from lerobot_pi0.inputs.steps import PI0TokenizerStep

pytestmark = pytest.mark.usefixtures("micro")

SIZES = {"max_state_dim": 8, "max_action_dim": 8, "chunk_size": 4, "n_action_steps": 2}
SLOTS = tuple(f"observation.images.{name}" for name in ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"))


def options(cameras=CAMERAS[:1], **others) -> PI0Config:
    """Options of a run at the size of the fixture `micro`."""
    made = features(cameras, DIMS, 16)
    return PI0Config(**made, paligemma_variant="tiny", action_expert_variant="tiny", device="cpu", **SIZES | others)


def saved(folder, cameras=CAMERAS[:1], **others) -> str:
    """A checkpoint with its processors."""
    policy = micro_policy(**others)
    if cameras != CAMERAS[:1]:
        policy.config.input_features = features(cameras, DIMS, 16)["input_features"]
    policy.save_pretrained(folder)
    for pipeline in make_pi0_pre_post_processors(policy.config, stats(cameras=cameras)):
        pipeline.save_pretrained(folder)
    return str(folder)


def saved_base(folder) -> str:
    """A checkpoint with the features and processors of lerobot/pi0_base: padded, for any robot, no statistics."""
    policy = micro_policy()
    policy.config.input_features = {key: PolicyFeature(FeatureType.VISUAL, (3, 16, 16)) for key in SLOTS} | {
        OBS_STATE: PolicyFeature(FeatureType.STATE, (8,))
    }
    policy.config.output_features = {ACTION: PolicyFeature(FeatureType.ACTION, (8,))}
    policy.save_pretrained(folder)
    steps = [step | {"config": dict(step["config"])} for step in PUBLISHED["steps"]]
    steps[3]["config"]["tokenizer_name"] = word_tokenizer(folder / "words")
    steps[4]["config"]["device"] = "cpu"
    after = [{"registry_name": "unnormalizer_processor", "config": steps[-1]["config"]}]
    after.append({"registry_name": "absolute_actions_processor", "config": {"enabled": False}})
    for name, content in (("pre", steps), ("post", after)):
        content = {"name": f"policy_{name}processor", "steps": content}
        (folder / f"policy_{name}processor.json").write_text(json.dumps(content))
    return str(folder)


def dataset(cameras=CAMERAS[:1], state=None, actions=None) -> SimpleNamespace:
    """What the policy sees of a dataset's metadata."""
    names = [f"joint_{i}" for i in range(DIMS)]
    vectors = {OBS_STATE: state or names, ACTION: actions or names}
    columns = {key: {"dtype": "float32", "shape": (len(x),), "names": x} for key, x in vectors.items()}
    image = {"dtype": "image", "shape": (16, 16, 3), "names": ["height", "width", "channels"]}
    return SimpleNamespace(
        features=columns | dict.fromkeys(cameras, image), stats=stats(cameras=cameras), camera_keys=list(cameras),
        root=None, repo_id="test/tiny",
    )  # fmt: skip


def begin(place: str, config: PI0Config, meta, rename_map=None, **overrides):
    """A training run that begins from a checkpoint: policy and pipelines, with the overrides of lerobot-train."""
    config.pretrained_path = place
    policy = PI0Policy.from_pretrained(place, config=config, dataset_stats=meta.stats, dataset_meta=meta)
    given = {"features": {**policy.config.input_features, **policy.config.output_features}}
    given |= {"norm_map": policy.config.normalization_mapping, "stats": meta.stats}
    pipelines = make_pre_post_processors(
        policy.config,
        pretrained_path=place,
        preprocessor_overrides={
            "rename_observations_processor": {"rename_map": rename_map or {}},
            "normalizer_processor": given,
            **overrides,
        },
        postprocessor_overrides={"unnormalizer_processor": given},
    )
    return policy, *pipelines


def step_of(pipeline: DataProcessorPipeline, kind: type):
    return next(step for step in pipeline.steps if isinstance(step, kind))


# --- options that live in processors ------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "expected"), [(None, 40), (128, 128), (60, 60)])
def test_length_of_prompts(tmp_path, asked, expected):
    """Catches prompts that are cut as before, whatever `tokenizer_max_length` says, and files that contradict."""
    place = saved(tmp_path / "first", tokenizer_max_length=40)
    policy, pre, _ = begin(place, options(tokenizer_max_length=asked), dataset())
    assert policy.config.tokenizer_max_length == expected
    assert pre(sample())["observation.language.tokens"].shape == (1, expected)
    policy.save_pretrained(tmp_path / "next")
    pre.save_pretrained(tmp_path / "next")
    files = [json.loads((tmp_path / "next" / f"{name}.json").read_text()) for name in ("config", "policy_preprocessor")]
    lengths = [x["config"]["max_length"] for x in files[1]["steps"] if x["registry_name"] == "tokenizer_processor"]
    assert files[0]["tokenizer_max_length"] == lengths[0] == expected


def test_relative_actions_are_the_runs(tmp_path):
    """Catches relative actions by absolute statistics: LeRobot hands `use_relative_actions` on where it is true."""
    place = saved(tmp_path, use_relative_actions=True, relative_exclude_joints=[])
    policy, pre, post = begin(place, options(), dataset())
    assert policy.config.use_relative_actions is False
    assert [
        x.enabled for x in (step_of(pre, RelativeActionsProcessorStep), step_of(post, AbsoluteActionsProcessorStep))
    ] == [False] * 2
    batch, known = sample(), stats()[ACTION]
    torch.testing.assert_close(pre(dict(batch))[ACTION], (batch[ACTION] - known["mean"]) / (known["std"] + 1e-8))


@pytest.mark.parametrize("how", ["option of the run", "override", "object"])
@pytest.mark.parametrize("start", ["carries its tokenizer", "names it"])
def test_another_tokenizer(tmp_path, how, start):
    """Catches a tokenizer that is asked for, and the checkpoint's in its place."""
    place = saved(tmp_path / "first", save_tokenizer=start == "carries its tokenizer", tokenizer_max_length=7,
                  text_tokenizer_name=word_tokenizer(tmp_path / "old"))  # fmt: skip
    new = tmp_path / "new"
    AutoTokenizer.from_pretrained(tmp_path / "old").train_new_from_iterator([TASK[::-1]], 12).save_pretrained(new)
    expected = AutoTokenizer.from_pretrained(new)(
        TASK + "\n", max_length=7, truncation=True, padding="max_length", padding_side="right"
    )["input_ids"]
    config, overrides = options(), {}
    if how == "option of the run":
        config = options(text_tokenizer_name=str(new))
    elif how == "override":
        overrides = {"tokenizer_processor": {"tokenizer_name": str(new)}}
    else:
        overrides = {"tokenizer_processor": {"tokenizer": AutoTokenizer.from_pretrained(new)}}
    _, pre, _ = begin(place, config, dataset(), **overrides)
    assert pre(sample())["observation.language.tokens"].tolist() == [expected]
    pre.save_pretrained(tmp_path / "next")
    if how == "object" and start == "names it":  # it has no name, and its files are not to travel
        with pytest.raises(ValueError, match="give it a tokenizer"):
            DataProcessorPipeline.from_pretrained(tmp_path / "next", config_filename="policy_preprocessor.json")
        return
    again = DataProcessorPipeline.from_pretrained(tmp_path / "next", config_filename="policy_preprocessor.json")
    assert step_of(again, PI0TokenizerStep)._tokenize_text([TASK + "\n"])["input_ids"].tolist() == [expected]


def saved_later(folder) -> str:
    """A checkpoint of LeRobot's π₀ after 0.6.1, whose tokenizer is in a folder that the step names."""
    place = saved(folder, text_tokenizer_name=word_tokenizer(folder / "tokenizer"), tokenizer_max_length=7)
    for file in folder.glob("lerobot_pi0*"):
        file.unlink()
    file = folder / "policy_preprocessor.json"
    content = json.loads(file.read_text())
    step = next(x for x in content["steps"] if x["registry_name"] == "tokenizer_processor")
    (folder / step.pop("state_file")).unlink()
    step["config"]["tokenizer_name"] = "tokenizer"
    step["artifacts"] = {"tokenizer_name": "tokenizer"}
    file.write_text(json.dumps(content))
    return place


@pytest.mark.parametrize("asked", [None, "another"])
def test_a_tokenizer_in_a_folder_of_the_checkpoint(tmp_path, asked):
    """Catches a checkpoint of LeRobot after 0.6.1 whose tokenizer is looked for on the Hub under the name of a folder,
    there, once it is moved, or in what is trained from it; and a tokenizer that is asked for and not taken."""
    saved_later(tmp_path / "first")
    place, other = str((tmp_path / "first").rename(tmp_path / "moved")), str(tmp_path / "another")
    words = AutoTokenizer.from_pretrained(word_tokenizer(tmp_path / "old"))
    words.train_new_from_iterator([TASK[::-1]], 12).save_pretrained(other)
    expected = AutoTokenizer.from_pretrained(other if asked else str(tmp_path / "old"))(
        TASK + "\n", max_length=7, truncation=True, padding="max_length", padding_side="right"
    )["input_ids"]
    policy, pre, post = begin(place, options(text_tokenizer_name=other if asked else None), dataset())
    assert pre(sample())["observation.language.tokens"].tolist() == [expected]
    for saves in (policy, pre, post):
        saves.save_pretrained(tmp_path / "next")
    name = policy.config.text_tokenizer_name
    assert name != "tokenizer"
    shutil.rmtree(place)
    _, pre, _ = begin(str(tmp_path / "next"), options(text_tokenizer_name=name), dataset())  # as a resumed run
    assert pre(sample())["observation.language.tokens"].tolist() == [expected]


@pytest.mark.parametrize("name", ["../tokenizer", "/tmp/tokenizer", "a/../../b", "..\\b"])
def test_folders_of_a_checkpoint_are_in_it(name):
    """Catches a checkpoint that has files read which are not its own."""
    with pytest.raises(ValueError, match="no folder of the checkpoint"):
        artifact("place", None, {}, name)


def test_normalisation_is_the_runs(tmp_path):
    """Catches a mode of normalisation that config.json names and the processors do not have."""
    place = saved(tmp_path)
    modes = {"VISUAL": NormalizationMode.IDENTITY} | dict.fromkeys(("STATE", "ACTION"), NormalizationMode.MIN_MAX)
    PI0Policy.from_pretrained(place, config=(config := options(normalization_mapping=modes)), dataset_stats=stats())
    pipelines = make_pre_post_processors(config, pretrained_path=place)  # without the overrides of lerobot-train
    found = pipelines[0](sample())[OBS_STATE]
    low, high = (stats()[OBS_STATE][name] for name in ("min", "max"))
    torch.testing.assert_close(found[0], 2 * (sample()[OBS_STATE] - low) / (high - low) - 1)
    torch.testing.assert_close(pipelines[1](torch.ones(1, DIMS))[0], stats()[ACTION]["max"])


MIN_MAX = dict.fromkeys(("STATE", "ACTION"), NormalizationMode.MIN_MAX)


@pytest.mark.parametrize("asked", [{"use_relative_actions": True}, {"normalization_mapping": MIN_MAX}])
def test_what_the_weights_learnt_cannot_be_changed_at_the_robot(tmp_path, asked):
    """Catches a policy that drives with numbers that it never learnt, or an option that is dropped in silence."""
    place = saved(tmp_path)
    with pytest.raises(CheckpointConfigError, match=rf"{next(iter(asked))}=.* leave --policy.{next(iter(asked))} out"):
        PI0Policy.from_pretrained(place, config=options(**asked))
    PI0Policy.from_pretrained(place, config=options())


def test_a_tokenizer_can_be_named_at_the_robot(tmp_path):
    """Catches the remedy that the error about a missing tokenizer names, without effect."""
    place = saved_base(tmp_path / "first")
    name = word_tokenizer(tmp_path / "words")
    policy = PI0Policy.from_pretrained(place, config=options(text_tokenizer_name=name))
    pre, _ = make_pre_post_processors(policy.config, pretrained_path=place)
    assert step_of(pre, PI0TokenizerStep).tokenizer_name == name


def test_a_checkpoint_that_contradicts_itself(tmp_path, caplog):
    """Catches a policy that takes config.json for what its weights have met: those met the processors."""
    place = saved(tmp_path, tokenizer_max_length=40)
    (tmp_path / "lerobot_pi0_manifest.json").unlink()  # which would refuse what follows
    file = tmp_path / "config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"tokenizer_max_length": 90, "use_relative_actions": True})
    )
    policy = PI0Policy.from_pretrained(place)
    assert (policy.config.tokenizer_max_length, policy.config.use_relative_actions) == (40, False)
    assert "the processors say 40" in caplog.text


def test_only_its_own_pipelines_follow_a_run(tmp_path):
    """Catches a run that changes the pipelines of another checkpoint, or those of a policy that is gone."""
    places = [saved(tmp_path / name, tokenizer_max_length=40) for name in ("a", "b")]
    config = options(tokenizer_max_length=90)
    policy = PI0Policy.from_pretrained(places[0], config=config, dataset_stats=stats())
    found = [make_pre_post_processors(config, pretrained_path=place)[0] for place in places]
    assert [step_of(x, PI0TokenizerStep).max_length for x in found] == [90, 40]
    del policy, config
    gc.collect()
    pre, _ = make_pre_post_processors(None, pretrained_path=places[0])
    assert step_of(pre, PI0TokenizerStep).max_length == 40


def test_other_policies_have_lerobots_steps(tmp_path):
    """Catches a tokenizer step of this plugin in another policy's pipeline, with its own ways of loading and saving."""
    step = TokenizerProcessorStep(tokenizer_name=word_tokenizer(tmp_path / "words"), max_length=7)
    pipeline = DataProcessorPipeline([step, RelativeActionsProcessorStep()], name="other")
    pipeline.save_pretrained(tmp_path / "other")
    take_over()
    again = DataProcessorPipeline.from_pretrained(tmp_path / "other", config_filename="other.json")
    assert [type(x) for x in again.steps] == [TokenizerProcessorStep, RelativeActionsProcessorStep]
    assert ProcessorStepRegistry.get("tokenizer_processor") is TokenizerProcessorStep


# --- cameras and dims ---------------------------------------------------------------------------------------


RENAMED = {CAMERAS[0]: SLOTS[0], CAMERAS[2]: SLOTS[1]}  # front, wrist


@pytest.mark.parametrize(("way", "names", "expected"), [
    ("path", RENAMED, SLOTS), ("pretrained_path", RENAMED, SLOTS[:2]),
    ("path", {}, (CAMERAS[2], CAMERAS[0])), ("pretrained_path", {}, (CAMERAS[2], CAMERAS[0])),
])  # fmt: skip
def test_four_ways_to_fine_tune_a_base(tmp_path, caplog, way, names, expected):
    """Catches a way to fine-tune that is refused, and cameras in other slots than `--rename_map` says."""
    caplog.set_level(logging.INFO)
    place = saved_base(tmp_path)
    meta = dataset((CAMERAS[2], CAMERAS[0]))  # the wrist first
    config = PI0Policy.from_pretrained(place).config if way == "path" else options(meta.camera_keys)
    config.output_features = features()["output_features"]  # as make_policy does
    policy, pre, post = begin(place, config, meta, names)
    assert tuple(policy.config.image_features) == expected
    assert policy.config.input_features[OBS_STATE].shape == (DIMS,)
    pictures = {key: torch.rand(3, 16, 16) for key in meta.camera_keys}
    batch = {**pictures, OBS_STATE: torch.randn(DIMS), ACTION: torch.randn(1, 4, DIMS), "task": TASK}
    policy.train()
    loss, _ = policy.forward(prepared := pre(batch))
    assert loss.isfinite()
    seen = policy.observe(prepared, torch.device("cpu")).images_BNCHW
    order = (CAMERAS[0], CAMERAS[2]) if names else (CAMERAS[2], CAMERAS[0])
    torch.testing.assert_close(seen[0], torch.stack([pictures[key] for key in order]) * 2 - 1)
    said = next(x for x in caplog.messages if x.startswith("cameras of the dataset"))
    for i, key in enumerate(order, 1):
        assert f"slot {i} ← {key}" in said
    assert f"empty, and left out of the network: {SLOTS[2] if names else SLOTS[0]}" in said
    for pipeline in (policy, pre, post):
        pipeline.save_pretrained(tmp_path / "next")
    again = PI0Policy.from_pretrained(tmp_path / "next")
    assert tuple(again.config.image_features) == expected


def test_a_state_is_not_renamed(tmp_path):
    """Catches a state in the robot's units among normalised numbers: statistics keep the dataset's name of it."""
    with pytest.raises(ValueError, match=r"--rename_map gives observation.joints another name.*rename cameras alone"):
        begin(saved(tmp_path, CAMERAS), options(CAMERAS), dataset(CAMERAS), {"observation.joints": OBS_STATE})


def test_cameras_keep_their_slots_in_another_order(tmp_path):
    """Catches a dataset whose order of cameras exchanges the slots that weights and dataset have in common."""
    place = saved(tmp_path, CAMERAS)
    policy, *_ = begin(place, options(CAMERAS[::-1]), dataset(CAMERAS[::-1]))
    assert tuple(policy.config.image_features) == CAMERAS


@pytest.mark.parametrize("renamed", [False, True], ids=["LeRobot 0.6.1", "later"])
def test_renamed_cameras_keep_their_slots(tmp_path, renamed):
    """Catches a run in which `--rename_map` names the slots, and the order of the dataset exchanges them. LeRobot after
    0.6.1 has renamed the policy's cameras before it loads the checkpoint."""
    place, names = saved_base(tmp_path), {CAMERAS[0]: SLOTS[0], CAMERAS[2]: SLOTS[1]}
    meta = dataset((CAMERAS[2], CAMERAS[0]))  # the wrist first
    config = options([names[key] for key in meta.camera_keys] if renamed else meta.camera_keys)
    policy, *_ = begin(place, config, meta, names)
    assert tuple(policy.config.image_features) == SLOTS[:2]


@pytest.mark.parametrize("names", [{}, {CAMERAS[0]: SLOTS[0]}], ids=["own names", "renamed"])
def test_a_depth_camera_takes_no_slot(tmp_path, caplog, names):
    """Catches a depth map among the cameras of a run that begins from a checkpoint: in a slot, as a camera that is
    lost, or in the way of `--rename_map`."""
    depth = f"{CAMERAS[0]}_depth"
    meta = dataset((depth, CAMERAS[0]))
    meta.features[depth] = meta.features[depth] | {"shape": (16, 16, 1)}
    config = options(meta.camera_keys)
    config.input_features[depth] = PolicyFeature(FeatureType.VISUAL, (1, 16, 16))
    policy, *_ = begin(saved_base(tmp_path), config, meta, names)
    assert list(policy.config.image_features) == [names.get(CAMERAS[0], CAMERAS[0])]
    assert caplog.text.count("depth cameras are left out") == 1
    assert "is not used" not in caplog.text


def test_a_mistyped_rename_target(tmp_path, caplog):
    """Catches a camera that is lost in silence, since no camera of the policy has that name."""
    place = saved_base(tmp_path)
    config = PI0Policy.from_pretrained(place).config
    config.output_features = features()["output_features"]
    begin(place, config, dataset(CAMERAS[:2]), {CAMERAS[0]: SLOTS[0], CAMERAS[1]: SLOTS[1].replace("wrist", "wirst")})
    assert f"camera {CAMERAS[1]} of the dataset" in caplog.text
    assert f"Is {SLOTS[1]} meant?" in caplog.text


def padded_checkpoint(folder) -> str:
    """What LeRobot's π₀ leaves of a base that it fine-tuned: features of the network's width, statistics of a robot."""
    words = word_tokenizer(folder / "words")
    place = saved(folder, use_relative_actions=True, relative_exclude_joints=[], text_tokenizer_name=words)
    (folder / "lerobot_pi0_manifest.json").unlink()  # LeRobot's π₀ writes none
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["input_features"][OBS_STATE]["shape"] = content["output_features"][ACTION]["shape"] = [8]
    file.write_text(json.dumps(content))
    return place


def test_padded_features_are_bounded_and_driven(tmp_path):
    """Catches a padded feature that is taken for the robot's dims: no bounds, wrong joints, actions of 8 dims."""
    place = padded_checkpoint(tmp_path)
    policy = PI0Policy.from_pretrained(place)
    policy.config.max_action_step = 0.5
    bounded = PI0Policy.from_pretrained(place, config=policy.config)
    pre, post = make_pre_post_processors(bounded.config, pretrained_path=place)
    state = torch.randn(DIMS)
    batch = pre({CAMERAS[0]: torch.rand(3, 16, 16), OBS_STATE: state, "task": TASK})
    action = post(bounded.select_action(batch))
    assert action.shape == (1, DIMS)
    assert ((action[0] - state).abs() <= 0.5 + 1e-4).all()


def test_a_base_without_statistics_stays_padded(tmp_path):
    """Catches a guess at the dims of a robot that nobody has named."""
    policy = PI0Policy.from_pretrained(saved_base(tmp_path))
    assert policy.config.output_features[ACTION].shape == policy.config.input_features[OBS_STATE].shape == (8,)


def test_a_checkpoint_for_a_robot_is_no_base(tmp_path):
    """Catches cameras that are put into slots by their order, since LeRobot's π₀ left the features of a checkpoint
    that it trained as wide as the base's: LeRobot refuses other names, and so a forgotten `--rename_map` is noticed."""
    config = PI0Policy.from_pretrained(place := padded_checkpoint(tmp_path)).config
    config.use_relative_actions = False
    config.output_features = features()["output_features"]
    policy, *_ = begin(place, config, dataset(CAMERAS[1:2]))
    assert tuple(policy.config.image_features) == CAMERAS[:1]


# --- joints by name, and what is not read -------------------------------------------------------------------


NAMES = ["pan", "lift", "gripper"]


@pytest.mark.parametrize(("state", "actions", "excluded", "message"), [
    (NAMES, NAMES, [], None),
    (NAMES, [*NAMES, "base"], [], "no base"),
    (["lift", "pan", "gripper"], NAMES, [], "pan relative to lift, lift relative to pan"),
    (["pan", "lift", "wrist"], NAMES, ["gripper"], None),  # the joint in question is absolute
    ([*NAMES, "wrist"], NAMES, [], None),
    (["x", "y", "z"], NAMES, [], "warning: pan relative to x"),
    (["state"], ["pan", "lift", "gripper"][:1], [], None),
])  # fmt: skip
def test_relative_actions_pair_joints_by_name(caplog, state, actions, excluded, message):
    """Catches a joint from which another joint's position is subtracted, and a traceback where there is none to
    subtract."""
    config = tiny_config(dims=len(actions), use_relative_actions=True, relative_exclude_joints=excluded)
    config.action_feature_names = actions
    if message is None or message.startswith("warning: "):
        check_pairing(config, dataset(state=state, actions=actions))
        assert (message or "").removeprefix("warning: ") in caplog.text
        assert bool(message) == bool(caplog.text) or state == ["state"]
    else:
        with pytest.raises(ValueError, match=message):
            check_pairing(config, dataset(state=state, actions=actions))
    config.use_relative_actions = False
    check_pairing(config, dataset(state=state, actions=actions))


def test_what_is_not_read_is_said_once(caplog):
    """Catches a sensor that somebody recorded for the policy, and that it ignores in silence."""
    meta = dataset()
    meta.features |= {"observation.effort": {"dtype": "float32", "shape": (DIMS,), "names": None}}
    PI0Policy(options(n_obs_steps=2), dataset_stats=meta.stats, dataset_meta=meta)
    assert caplog.text.count("observation.effort") == caplog.text.count("n_obs_steps=2") == 1
