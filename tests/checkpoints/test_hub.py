"""To the Hub and back, against a server on loopback that speaks its protocol.

Two processes run LeRobot's own commands: one trains and pushes, one, with an empty cache, fine-tunes and resumes what
it finds there. What the Hub holds then is loaded here, in many ways and with many a thing gone wrong.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import CAMERAS, DIMS, stats, tiny_config, write_dataset
from hub_server import TOKEN, Hub, serve
from huggingface_hub import ModelCard, constants
from lerobot.policies import make_pre_post_processors
from lerobot.utils.constants import OBS_STATE
from processes import finish, start
from raw_frames import word_tokenizer
from safetensors.torch import load, load_file, save_file

from lerobot_pi0 import PI0Policy, make_pi0_pre_post_processors
from lerobot_pi0.checkpoints.checkpoint import Checkpoint
from lerobot_pi0.checkpoints.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError
from lerobot_pi0.checkpoints.tensor_bytes import digest
from lerobot_pi0.tools import read_config
from lerobot_pi0.tools.data import build_pipelines
from lerobot_pi0.tools.evaluation.predictions import load_policy

COMMAND = """
import sys
from lerobot.scripts.lerobot_train import main

(root,) = sys.argv[1:]
data = ["--dataset.repo_id=test/tiny", f"--dataset.root={root}/data"]
loop = ["--batch_size=2", "--num_workers=0", "--log_freq=1", "--save_freq=1", "--wandb.enable=false"]

def train(*arguments):
    sys.argv = ["lerobot-train", *arguments]
    main()
"""

PUSH = (
    COMMAND
    + """
train(
    *data, *loop, "--policy.type=pi0", "--policy.paligemma_variant=tiny", "--policy.action_expert_variant=tiny",
    "--policy.device=cpu", f"--policy.text_tokenizer_name={root}/tokenizer", "--policy.push_to_hub=true",
    "--policy.repo_id=me/scratch", "--save_checkpoint_to_hub=true", "--steps=2", f"--output_dir={root}/scratch",
)
"""
)

ROBOT = (
    COMMAND
    + """
train(
    *data, *loop, "--policy.path=me/scratch", "--policy.device=cpu", "--policy.push_to_hub=true",
    "--policy.repo_id=me/expert", "--policy.train_expert_only=true", "--policy.save_expert_only=true",
    "--steps=1", f"--output_dir={root}/expert",
)
train("--resume=true", f"--config_path={root}/expert/checkpoints/last/pretrained_model/train_config.json", "--steps=2")
train("--resume=true", "--config_path=me/scratch", "--steps=3", f"--output_dir={root}/from_hub")
"""
)


class Story:
    """What happened: the Hub, the folder of the runs, and the commit that the first process pushed."""

    def __init__(self, hub: Hub, root: Path, commit: str) -> None:
        self.hub, self.root, self.commit = hub, root, commit

    def run(self, name: str, step: int) -> Path:
        return self.root / name / "checkpoints" / f"{step:06d}" / "pretrained_model"


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    write_dataset(root / "data")
    word_tokenizer(root / "tokenizer")
    with serve(root / "storage") as hub:
        finish(start(PUSH, str(root), **hub.environment(root / "home")))
        commit = hub.repos["me/scratch"].refs["main"]
        shutil.rmtree(root / "tokenizer")  # the robot's machine never had it
        shutil.rmtree(root / "home")
        finish(start(ROBOT, str(root), **hub.environment(root / "robots_home")))
        yield Story(hub, root, commit)


@pytest.fixture
def online(monkeypatch, tmp_path):
    """Turns this process towards a Hub's address, without a token, with an empty cache; returns the turner."""

    def turn(url: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between one try and the next
    huggingface_hub.close_session()
    yield turn
    huggingface_hub.close_session()


@pytest.fixture
def hub(online, tmp_path):
    """An empty Hub of a test's own."""
    with serve(tmp_path / "storage") as served:
        online(served.url)
        yield served


def sample() -> dict:
    """An observation as a robot's loop has it."""
    draw = torch.Generator().manual_seed(2)
    pictures = {key: torch.rand(3, 64, 64, generator=draw) for key in CAMERAS[:2]}
    return pictures | {OBS_STATE: torch.randn(DIMS, generator=draw), "task": "reach cube 0"}


def actions_of(source, **revision) -> torch.Tensor:
    """From an observation to the robot's units, through policy and processors of a checkpoint."""
    policy = PI0Policy.from_pretrained(source, **revision)
    pretrained_revision = revision.get("revision")
    preprocessor, postprocessor = make_pre_post_processors(
        policy.config, pretrained_path=str(source), pretrained_revision=pretrained_revision
    )
    draw = torch.Generator().manual_seed(4)
    noise = torch.randn(1, policy.config.chunk_size, policy.config.max_action_dim, generator=draw)
    return postprocessor(policy.predict_action_chunk(preprocessor(sample()), noise=noise))


def tiny_checkpoint(folder: Path, **options) -> PI0Policy:
    """A checkpoint without processors."""
    policy = PI0Policy(tiny_config(**options))
    policy.save_pretrained(folder)
    return policy


def assert_same_weights(ours: PI0Policy, theirs: PI0Policy) -> None:
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in ours.state_dict().items())


# --- pushed, fetched ----------------------------------------------------------------------------------------


def test_everything_arrived(story):
    """Catches a repository that lacks what an empty machine needs: LeRobot pushes files of some kinds only."""
    files = story.hub.files("me/scratch", story.commit)
    processors = {
        "policy_preprocessor.json",
        "policy_preprocessor_step_3_tokenizer_processor.safetensors",
        "policy_preprocessor_step_6_normalizer_processor.safetensors",
        "policy_postprocessor.json",
        "policy_postprocessor_step_0_unnormalizer_processor.safetensors",
    }
    own = {"model.safetensors", "config.json", "lerobot_pi0.json", "train_config.json", "README.md"}
    own |= {"lerobot_pi0_manifest.json"}
    assert {path for path in files if not path.startswith("checkpoints/")} == own | processors
    for name in (own | processors) - {"README.md", "train_config.json", "lerobot_pi0_manifest.json"}:
        here = (story.run("scratch", 2) / name).read_bytes()
        if name.endswith(".json"):
            assert files[name] == here, name
        else:
            tensors, expected = load(files[name]), load(here)
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(x, tensors[key]) for key, x in expected.items()), name


def test_the_hub_runs_as_the_folder_does(story, online):
    """Catches weights, statistics or a tokenizer that the journey changes; the tokenizer's own folder is gone."""
    online(story.hub.url)
    expected = actions_of(story.run("scratch", 2))
    assert torch.equal(actions_of("me/scratch", revision=story.commit), expected)
    assert expected.abs().max() > 1  # degrees: what comes out is not normalised
    assert not torch.equal(actions_of("me/scratch"), expected)  # main has moved on


def test_tools_read_the_revision_that_was_asked_for(story, online):
    """Catches a tool that judges, or a server that drives a robot with, the newest weights in place of those."""
    online(story.hub.url)
    for revision in (None, story.commit):
        asked = [f"--pretrained_revision={revision}"] if revision else []
        config = read_config("me/scratch", ["--device=cpu", *asked])
        expected = PI0Policy.from_pretrained("me/scratch", revision=revision)
        assert_same_weights(load_policy(config), expected)
        preprocessor, postprocessor = build_pipelines(config)
        draw = torch.Generator().manual_seed(4)
        noise = torch.randn(1, config.chunk_size, config.max_action_dim, generator=draw)
        found = postprocessor(load_policy(config).predict_action_chunk(preprocessor(sample()), noise=noise))
        assert torch.equal(found, actions_of("me/scratch", **({"revision": revision} if revision else {})))


def test_once_fetched_no_network_is_needed(story, online):
    """Catches a robot's machine that asks the Hub at every start, for a file that was never there."""
    online(story.hub.url)
    first = PI0Policy.from_pretrained("me/scratch", revision=story.commit)
    requests = len(story.hub.log)
    again = PI0Policy.from_pretrained("me/scratch", revision=story.commit, local_files_only=True)
    assert len(story.hub.log) == requests
    assert_same_weights(again, first)


def test_nobody_else_is_asked(story, online):
    """Catches requests for other repositories, such as the tokenizer's, and a token that reaches another host."""
    online(story.hub.url)
    requests = len(story.hub.log)
    actions_of("me/scratch", revision=story.commit)
    for request in story.hub.log[requests:]:
        # huggingface_hub asks once a day which programs are agents
        assert request.split()[1].startswith(("/me/scratch/resolve/", "/cdn/", "/api/agent-harnesses")), request
    assert story.hub.leaked_tokens == []


def test_a_tokenizer_in_a_folder(hub, tmp_path):
    """Catches a checkpoint of LeRobot after 0.6.1 whose tokenizer's folder is not fetched, or not at its revision."""
    config = tiny_config(text_tokenizer_name=word_tokenizer(tmp_path / "at" / "tokenizer"))
    for saves in (PI0Policy(config), *make_pi0_pre_post_processors(config, stats())):
        saves.save_pretrained(tmp_path / "at")
    file = tmp_path / "at" / "policy_preprocessor.json"
    content = json.loads(file.read_text())
    step = next(x for x in content["steps"] if x["registry_name"] == "tokenizer_processor")
    (tmp_path / "at" / step.pop("state_file")).unlink()
    step["config"]["tokenizer_name"], step["artifacts"] = "tokenizer", {"tokenizer_name": "tokenizer"}
    file.write_text(json.dumps(content))
    for plugins in (tmp_path / "at").glob("lerobot_pi0*"):
        plugins.unlink()
    commit = hub.publish("me/later", tmp_path / "at")
    shutil.rmtree(tmp_path / "at" / "tokenizer")
    hub.publish("me/later", tmp_path / "at")
    assert actions_of("me/later", revision=commit).isfinite().all()


def test_fine_tuned_from_the_hub(story):
    """Catches a run that begins elsewhere than at the checkpoint: one step, and the frozen weights are its own."""
    saved = json.loads((story.run("expert", 1) / "lerobot_pi0.json").read_text())
    assert saved["start"] == "me/scratch"
    config = json.loads((story.run("expert", 1) / "config.json").read_text())
    assert config["train_expert_only"] is True
    assert saved["updates"] == 3  # two of the first run, one of this


def test_cards_tell_where_it_started(story):
    """Catches a base model that is made up, or that is forgotten when the run is resumed."""
    scratch, expert = (ModelCard(story.hub.files(repo)["README.md"].decode()) for repo in ("me/scratch", "me/expert"))
    assert scratch.data.base_model is None
    assert "trained from random weights" in scratch.text
    assert expert.data.base_model == "me/scratch"
    assert "fine-tuned from me/scratch" in expert.text
    assert "VLM 0 M of" in expert.text
    assert expert.data.license == scratch.data.license == "apache-2.0"


def test_resumed_from_the_hub(story):
    """Catches checkpoints on the Hub that cannot be resumed: step, updates and weights go on from the last one."""
    files = story.hub.files("me/scratch", story.commit)
    assert {path.split("/")[1] for path in files if path.startswith("checkpoints/")} == {"000001", "000002"}
    assert story.hub.repos["me/scratch"].refs.keys() >= {"000001", "000002", "main"}
    state = json.loads((story.run("from_hub", 3).parent / "training_state/training_step.json").read_text())
    assert state["step"] == 3
    saved = json.loads((story.run("from_hub", 3) / "lerobot_pi0.json").read_text())
    assert saved["updates"] == 3
    assert saved["start"] is None


# --- the trained weights alone ------------------------------------------------------------------------------


def test_the_base_is_fetched_at_its_revision(story, online):
    """Catches trained weights that are put over whatever the base's branch holds by now: it has moved on here."""
    online(story.hub.url)
    assert story.hub.repos["me/scratch"].refs["main"] != story.commit
    base = json.loads(story.hub.files("me/expert")["lerobot_pi0.json"])["base"]
    assert (base["id"], base["revision"]) == ("me/scratch", story.commit)
    sizes = {repo: len(story.hub.files(repo)["model.safetensors"]) for repo in ("me/scratch", "me/expert")}
    assert sizes["me/expert"] < sizes["me/scratch"]
    policy = PI0Policy.from_pretrained("me/expert")
    scratch = PI0Policy.from_pretrained("me/scratch", revision=story.commit).state_dict()
    frozen = {name for name, p in policy.named_parameters() if not p.requires_grad}
    assert len(frozen) > 0
    assert all(torch.equal(x, scratch[name]) is (name in frozen) for name, x in policy.named_parameters())
    assert torch.equal(actions_of("me/expert"), actions_of(story.run("expert", 2)))
    again = PI0Policy.from_pretrained("me/expert", local_files_only=True)
    assert_same_weights(again, policy)


def expert_over(hub: Hub, tmp_path: Path) -> str:
    """Pushes a base and a checkpoint of trained weights over it; the base's commit."""
    tiny_checkpoint(tmp_path / "base")
    commit = hub.publish("me/base", tmp_path / "base")
    config = tiny_config(train_expert_only=True, save_expert_only=True)
    policy = PI0Policy.from_pretrained("me/base", config=config)
    policy.save_pretrained(tmp_path / "expert")
    hub.publish("me/expert", tmp_path / "expert")
    shutil.rmtree(tmp_path / "cache")
    return commit


def test_a_base_that_changed_is_refused(hub, tmp_path):
    """Catches an expert over another VLM than it was trained with, behind the same id and revision."""
    commit = expert_over(hub, tmp_path)
    PI0Policy.from_pretrained("me/expert")
    shutil.rmtree(tmp_path / "cache")
    tensors = load_file(tmp_path / "base/model.safetensors")
    name = next(name for name in tensors if "vision_tower" in name)
    tensors[name] = tensors[name] + 1
    digests = {"lerobot_pi0.digests": json.dumps({k: digest(k, x) for k, x in tensors.items()})}
    save_file(tensors, tmp_path / "base/model.safetensors", metadata=digests | {"format": "pt"})
    changed = hub.publish("me/base", tmp_path / "base")
    hub.repos["me/base"].commits[commit] = hub.repos["me/base"].commits[changed]  # rewritten history
    with pytest.raises(CorruptCheckpointError, match=r"me/base \(revision [0-9a-f]{40}\).*changed since"):
        PI0Policy.from_pretrained("me/expert")


def test_a_base_that_is_gone(hub, tmp_path):
    """Catches an error that names the expert, which is there, and not the base, which is not."""
    expert_over(hub, tmp_path)
    del hub.repos["me/base"]
    with pytest.raises(CheckpointNotFoundError, match=r"me/base is not on the Hub"):
        PI0Policy.from_pretrained("me/expert")


def test_a_base_that_nobody_else_has(hub, tmp_path, monkeypatch, caplog):
    """Catches a push of trained weights over a folder of the trainer's: no one who fetches them could load them."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    tiny_checkpoint(tmp_path / "base")
    config = tiny_config(train_expert_only=True, save_expert_only=True, repo_id="me/pushed")
    policy = PI0Policy.from_pretrained(tmp_path / "base", config=config)
    run = SimpleNamespace(
        dataset=SimpleNamespace(repo_id="me/data"), save_pretrained=lambda _: None, optimizer=None,
        steps=1, batch_size=1, seed=1,
    )  # fmt: skip
    policy.push_model_to_hub(run)
    assert "pushing all weights" in caplog.text
    shutil.rmtree(tmp_path / "base")
    assert_same_weights(PI0Policy.from_pretrained("me/pushed"), policy)
    assert policy.config.save_expert_only is True  # checkpoints on this machine stay small
    assert str(tmp_path) not in hub.files("me/pushed")["lerobot_pi0.json"].decode()


# --- other repositories -------------------------------------------------------------------------------------


def shard(folder: Path) -> None:
    """Split model.safetensors in two, with an index, as transformers does with large ones."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, chosen in parts.items():
        save_file({name: tensors[name] for name in chosen}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, chosen in parts.items() for name in chosen}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("fetched_by", ["us", "hf download"])
@pytest.mark.parametrize("kind", ["ours", "sharded", "without lerobot_pi0.json"])
def test_kinds_of_repositories(hub, tmp_path, kind, fetched_by):
    """Catches a checkpoint that loads with a network and not without: what it lacks by right is no missing file."""
    policy = tiny_checkpoint(tmp_path / "there")
    if kind == "sharded":
        shard(tmp_path / "there")
    elif kind != "ours":
        (tmp_path / "there/lerobot_pi0.json").unlink()
    hub.publish("me/x", tmp_path / "there")
    if fetched_by == "us":
        assert_same_weights(PI0Policy.from_pretrained("me/x"), policy)
    else:
        huggingface_hub.snapshot_download("me/x")
    requests = len(hub.log)
    assert_same_weights(PI0Policy.from_pretrained("me/x", local_files_only=True), policy)
    assert len(hub.log) == requests


@pytest.mark.parametrize("kind", ["sharded", "without lerobot_pi0.json"])
def test_once_fetched_the_hub_may_be_down(hub, online, tmp_path, kind):
    """Catches a robot that does not start when the network is away, though all it needs is there."""
    policy = tiny_checkpoint(tmp_path / "there")
    if kind == "sharded":
        shard(tmp_path / "there")
    else:
        (tmp_path / "there/lerobot_pi0.json").unlink()
    hub.publish("me/x", tmp_path / "there")
    PI0Policy.from_pretrained("me/x")
    online("http://127.0.0.1:9")
    assert_same_weights(PI0Policy.from_pretrained("me/x"), policy)


def test_a_push_in_the_middle_of_a_download(hub, tmp_path, monkeypatch):
    """Catches a config of one commit over the weights of the next: every file is of the commit that was met first."""
    first = tiny_checkpoint(tmp_path / "first", chunk_size=10, n_action_steps=10)
    tiny_checkpoint(tmp_path / "second", chunk_size=20, n_action_steps=20)
    hub.publish("me/x", tmp_path / "first")
    monkeypatch.setattr(Checkpoint, "config", pushing(hub, tmp_path / "second"))
    policy = PI0Policy.from_pretrained("me/x")
    assert policy.config.chunk_size == 10
    assert_same_weights(policy, first)


def pushing(hub: Hub, folder: Path):
    """`Checkpoint.config`, with a push by somebody else right after it."""
    read_config = Checkpoint.config

    def read_and_push(checkpoint):
        config = read_config(checkpoint)
        hub.publish("me/x", folder)
        return config

    return read_and_push


# --- refused ------------------------------------------------------------------------------------------------


def test_an_unknown_repository(hub):
    """Catches random weights, or a stack of HTTP errors, for a name that is misspelt."""
    with pytest.raises(CheckpointNotFoundError, match=r"me/nobody is not on the Hub.*spelling.*hf auth login"):
        PI0Policy.from_pretrained("me/nobody")


def test_an_unknown_revision(hub, tmp_path):
    """Catches the newest weights in place of the ones that were asked for."""
    tiny_checkpoint(tmp_path / "there")
    hub.publish("me/x", tmp_path / "there")
    with pytest.raises(CheckpointNotFoundError, match=r"me/x is on the Hub, but has no revision 'v9'.*branches, tags"):
        PI0Policy.from_pretrained("me/x", revision="v9")


def test_a_gated_repository(hub, tmp_path):
    """Catches a gated checkpoint that is called missing, with no word of logging in; and one that a token opens not."""
    policy = tiny_checkpoint(tmp_path / "there")
    hub.publish("me/x", tmp_path / "there", gated=True)
    with pytest.raises(CheckpointNotFoundError, match=r"me/x is not on the Hub, or not for you.*hf auth login.*gated"):
        PI0Policy.from_pretrained("me/x")
    assert_same_weights(PI0Policy.from_pretrained("me/x", token=TOKEN), policy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "config.json of me/x is not in the local cache and the Hub cannot be reached.*Connect once"),
        ({"local_files_only": True}, "config.json of me/x is not in the local cache.*Connect once"),
        ({"force_download": True}, "me/x cannot be had from the Hub: Force download failed"),
    ],
)
def test_no_way_to_the_hub(online, options, message):
    """Catches an error that is no CheckpointError, and one that does not say what to do without a network."""
    online("http://127.0.0.1:9")  # the port of the discard service: nobody answers
    with pytest.raises(CheckpointNotFoundError, match=message):
        PI0Policy.from_pretrained("me/x", **options)


def test_a_repository_without_weights(hub, tmp_path):
    """Catches random weights for a push that was cut off before its weights."""
    tiny_checkpoint(tmp_path / "there")
    (tmp_path / "there/model.safetensors").unlink()
    hub.publish("me/x", tmp_path / "there")
    with pytest.raises(CheckpointNotFoundError, match=r"me/x holds no model.safetensors"):
        PI0Policy.from_pretrained("me/x")


def test_a_download_that_is_not_what_was_written(hub, tmp_path):
    """Catches weights that were damaged on the way: the Hub's own size is right, the content is not."""
    tiny_checkpoint(tmp_path / "there")
    file = tmp_path / "there/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    hub.publish("me/x", tmp_path / "there")
    with pytest.raises(CheckpointError, match="digest"):
        PI0Policy.from_pretrained("me/x")
