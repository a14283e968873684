"""The card of a trained policy tells the truth: where it started, what was trained, on what, for which robot."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import CAMERAS, features, small_policy, stats, tiny_config, write_dataset
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.utils.constants import ACTION, OBS_STATE
from safetensors.torch import save_file

from lerobot_pi0 import PI0Config, PI0Policy
from lerobot_pi0.checkpoints import source
from lerobot_pi0.checkpoints.names import VLM

DATASET = "me/cubes"
JOINTS = [f"joint_{i}" for i in range(6)]


@pytest.fixture(autouse=True)
def no_network(monkeypatch) -> None:
    """A card that needs the Hub fails, as it would at the end of a night's training on a robot's machine."""

    def refuse(*_, **__):
        raise AssertionError("the card asked for the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> LeRobotDatasetMetadata:
    """Two episodes of a robot with two cameras and six joints."""
    root = tmp_path_factory.mktemp("card") / "data"
    write_dataset(root)
    return LeRobotDatasetMetadata("test/tiny", root=root)


def card_of(policy: PI0Policy, dataset=None, train=None) -> ModelCard:
    """The card as LeRobot's push asks for it, written and read again as the Hub would."""
    card = policy.generate_model_card(
        DATASET, "pi0", policy.config.license, policy.config.tags, cfg=train, dataset_meta=dataset
    )
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    assert again.text.strip() == card.text.strip()
    return again


def fact(card: ModelCard, name: str) -> str:
    """A row of the card's table."""
    (value,) = re.findall(rf"^\| {name} \| (.*) \|$", card.text, re.MULTILINE)
    return value


def millions(text: str) -> dict[str, tuple[float, float]]:
    """Trained and all parameters of each part, in millions, as the card says."""
    rows = re.findall(r"([\w ]+?) ([\d.,]+) M of ([\d.,]+) M", text)
    return {name.strip(): (float(own.replace(",", "")), float(n.replace(",", ""))) for name, own, n in rows}


def a_hub_with_a_vlm(folder: Path) -> Callable[..., str]:
    """A Hub whose only repository is a PaliGemma of the small size, as transformers writes it."""
    folder.mkdir()
    weights = {name: p.detach() for name, p in small_policy().named_parameters() if name.startswith(VLM)}
    save_file({name.removeprefix(VLM): x for name, x in weights.items()}, folder / "model.safetensors")

    def download(repo: str, filename: str, **kwargs) -> str:
        if not (folder / filename).is_file():
            raise EntryNotFoundError(filename)
        return str(folder / filename)

    return download


# --- where it started ---------------------------------------------------------------------------------------


def test_from_scratch_there_is_no_base_model():
    """Catches the built-in's card, which names lerobot/pi0_base as base of whatever was trained."""
    card = card_of(PI0Policy(tiny_config()))
    assert fact(card, "start") == "trained from random weights: there is no base model"
    assert card.data.base_model is None
    assert "base_model" not in yaml.safe_load(card.content.split("---")[1])


def test_a_new_run_from_a_checkpoint_in_a_folder(tmp_path):
    """Catches a folder on the trainer's disk in the metadata, or its whole path on a public page."""
    PI0Policy(tiny_config()).save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "lerobot_pi0.json").unlink()  # as LeRobot's own would be
    card = card_of(PI0Policy.from_pretrained(tmp_path / "theirs"))
    assert fact(card, "start").startswith("fine-tuned from a folder, …/")
    assert fact(card, "start").endswith("/theirs")
    assert str(tmp_path) not in card.content
    assert card.data.base_model is None


def test_a_relative_folder_is_no_hub_id(tmp_path, monkeypatch):
    """Catches `outputs/run`, which is spelt like owner/name, as a base model on the Hub."""
    monkeypatch.chdir(tmp_path)
    PI0Policy(tiny_config()).save_pretrained("outputs/run")
    (tmp_path / "outputs/run/lerobot_pi0.json").unlink()
    policy = PI0Policy.from_pretrained("outputs/run")
    policy.save_pretrained(tmp_path / "again")
    monkeypatch.chdir("/")  # where no such folder is
    for each in (policy, PI0Policy.from_pretrained(tmp_path / "again")):
        card = card_of(each)
        assert card.data.base_model is None
        assert "fine-tuned from a folder" in fact(card, "start")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("resumed", [False, True])
def test_only_the_vlm_came_from_paligemma(tmp_path, monkeypatch, resumed):
    """Catches "fine-tuned from PaliGemma" for a policy whose action expert began with random weights."""
    monkeypatch.setattr(source, "hf_hub_download", a_hub_with_a_vlm(tmp_path / "paligemma"))
    policy = small_policy(vlm_path="google/paligemma-3b-pt-224")
    if resumed:
        policy.save_pretrained(tmp_path)
        policy = PI0Policy.from_pretrained(tmp_path)
    card = card_of(policy)
    assert fact(card, "start") == (
        "the VLM alone is that of google/paligemma-3b-pt-224; everything else was trained from random weights"
    )
    assert card.data.base_model == "google/paligemma-3b-pt-224"
    assert card.data.license == "gemma"


def test_a_resumed_run_keeps_its_start(tmp_path):
    """Catches a run from random weights that becomes a fine-tuned one by being resumed."""
    PI0Policy(tiny_config()).save_pretrained(tmp_path)
    assert "random weights" in fact(card_of(PI0Policy.from_pretrained(tmp_path)), "start")


# --- what was trained ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({}, {"vision tower", "VLM", "action expert", "projections"}),
        ({"freeze_vision_encoder": True}, {"VLM", "action expert", "projections"}),
        ({"train_expert_only": True}, {"action expert", "projections"}),
    ],
)
def test_parameters_trained_per_part(options, trained):
    """Catches a part that is counted twice or not at all, and a frozen one that is said to be trained."""
    policy = PI0Policy(tiny_config(**options))
    said = millions(fact(card_of(policy), "trained"))
    assert said.keys() == {"vision tower", "VLM", "action expert", "projections"}
    assert {name for name, (own, _) in said.items() if own > 0} == trained
    total = sum(p.numel() for p in policy.parameters()) / 1e6
    own = sum(p.numel() for p in policy.parameters() if p.requires_grad) / 1e6
    assert sum(n for _, n in said.values()) == pytest.approx(total, abs=0.03)
    assert sum(n for n, _ in said.values()) == pytest.approx(own, abs=0.03)


# --- data and robot -----------------------------------------------------------------------------------------


def test_dataset_cameras_and_joints_in_order(dataset):
    """Catches a list of cameras or joints in another order than the network's: a robot moves the wrong joint."""
    policy = PI0Policy(tiny_config(cameras=CAMERAS[:2]), dataset_stats=stats(), dataset_meta=dataset)
    card = card_of(policy, dataset)
    assert card.data.datasets == DATASET
    assert fact(card, "dataset").startswith(f"{DATASET}: 2 episodes, 12 frames at 10 Hz")
    assert fact(card, "instructions") == "reach cube 0; reach cube 1"
    rows = re.findall(r"^\| `(\S+)` \| (.*) \| (.*) \|$", card.text, re.MULTILINE)
    joints = ", ".join(JOINTS)
    image = ("(3, 64, 64)", "channels, height, width")
    assert rows == [
        (CAMERAS[0], *image),
        (CAMERAS[1], *image),
        (OBS_STATE, "(6,)", joints),
        (ACTION, "(6,)", joints),
    ]


def test_names_of_actions_without_a_dataset():
    """Catches a card without the joints' names where the configuration alone knows them."""
    card = card_of(PI0Policy(tiny_config(action_feature_names=JOINTS)))
    assert f"| `{ACTION}` | (6,) | {', '.join(JOINTS)} |" in card.text
    assert fact(card, "instructions") == "unknown"
    assert fact(card, "dataset") == DATASET


def test_a_slower_camera_is_not_left_out():
    """Catches a command that starts fewer cameras than the policy sees, or one under another name."""
    visual = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, 64, 64)) for name in ("b", "a")}
    config = tiny_config()
    config.input_features = visual | {OBS_STATE: config.input_features[OBS_STATE]}
    (command,) = re.findall(r"--robot.cameras='(.*?)'", card_of(PI0Policy(config)).text)
    assert list(yaml.safe_load(command)) == ["b", "a"]


def test_the_command_is_for_this_policy_and_robot(dataset, monkeypatch):
    """Catches a command of another robot, repository or instruction than the policy was trained for."""
    monkeypatch.setitem(dataset.info if isinstance(dataset.info, dict) else vars(dataset.info), "robot_type", "my_arm")
    policy = PI0Policy(tiny_config(cameras=CAMERAS[:2], repo_id="me/x"), dataset_stats=stats(), dataset_meta=dataset)
    text = card_of(policy, dataset).text
    assert "--policy.path=me/x --robot.type=my_arm " in text
    assert "--task='reach cube 0'" in text
    assert "# me/x" in text
    unknown = card_of(PI0Policy(tiny_config())).text
    assert "--policy.path=FOLDER --robot.type=ROBOT " in unknown


def test_training():
    """Catches a schedule of another run."""
    train = SimpleNamespace(steps=30, batch_size=4, seed=7, optimizer=SimpleNamespace(lr=2e-5))
    assert fact(card_of(PI0Policy(tiny_config()), train=train), "training") == (
        "30 steps, batch 4, learning rate 2e-05, seed 7"
    )
    assert fact(card_of(PI0Policy(tiny_config())), "training") == "unknown"


# --- numbers ------------------------------------------------------------------------------------------------


def test_normalisation():
    """Catches a default that is printed whatever was set."""
    config = tiny_config()
    said = fact(card_of(PI0Policy(config)), "normalisation")
    assert said == "visual IDENTITY, state MEAN_STD, action MEAN_STD"
    config.normalization_mapping = dict(config.normalization_mapping, ACTION=NormalizationMode.QUANTILES)
    assert fact(card_of(PI0Policy(config)), "normalisation").endswith("action QUANTILES")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "absolute; chunks of 50, of which 50 are executed"),
        ({"chunk_size": 20, "n_action_steps": 5}, "absolute; chunks of 20, of which 5 are executed"),
        (
            {"use_relative_actions": True, "action_feature_names": [*JOINTS[:5], "gripper"]},
            "relative to the measured state (absolute: gripper); chunks of 50, of which 50 are executed",
        ),
        (
            {"use_relative_actions": True, "relative_exclude_joints": []},
            "relative to the measured state (absolute: none); chunks of 50, of which 50 are executed",
        ),
    ],
)
def test_actions(options, expected):
    """Catches relative actions that are sold as absolute ones: a robot that jumps to the origin."""
    assert fact(card_of(PI0Policy(tiny_config(**options))), "actions") == expected


# --- licence ------------------------------------------------------------------------------------------------


def test_tiny_owes_gemma_nothing(tmp_path):
    """Catches terms of Google's on weights that never saw theirs, from scratch or after fine-tuning one's own."""
    scratch = PI0Policy(tiny_config())
    scratch.save_pretrained(tmp_path)
    tuned = PI0Policy.from_pretrained(tmp_path)
    tuned.origin.start = "me/tiny"
    for policy in (scratch, tuned):
        card = card_of(policy)
        assert card.data.license == "apache-2.0"
        assert "Gemma" not in card.text
    assert card.data.base_model == "me/tiny"
    assert fact(card, "start") == "fine-tuned from me/tiny"


@pytest.mark.usefixtures("small")
def test_gemma_terms():
    """Catches weights of PaliGemma's that are given away as apache-2.0, as the built-in's card does."""
    card = card_of(small_policy())
    assert card.data.license == "gemma"
    assert "https://ai.google.dev/gemma/terms" in card.text
    config = PI0Config(**features(), device="cpu", image_resolution=(32, 32), license="other")
    assert card_of(PI0Policy(config)).data.license == "other"


def test_front_matter():
    """Catches metadata by which the Hub does not find the policy, or that is no YAML."""
    card = card_of(PI0Policy(tiny_config(repo_id="me/x", tags=["so100", "a: b"])))
    data = yaml.safe_load(card.content.split("---\n")[1])
    assert data == {
        "datasets": DATASET,
        "library_name": "lerobot",
        "license": "apache-2.0",
        "model_name": "pi0",
        "pipeline_tag": "robotics",
        "tags": ["a: b", "lerobot", "pi0", "robotics", "so100"],
    }
