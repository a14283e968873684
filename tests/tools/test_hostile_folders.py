"""Every verb over damaged folders: an error that says what is wrong, never a traceback, and nothing is executed."""

import json
import logging
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import CAMERAS, write_dataset
from folders import ADAPTER, FOLDER, OURS, Mutation, make_originals

from lerobot_pi0.tools import main

pytestmark = pytest.mark.usefixtures("micro")

FILES = (
    "config.json", "lerobot_pi0.json", "lerobot_pi0_manifest.json", "model.safetensors", "policy_preprocessor.json",
    "policy_postprocessor.json",
)  # fmt: skip


def not_a_file(folder: Path, draw: random.Random) -> None:
    """A folder, a link to nowhere or to itself where a file is expected."""
    file = folder / draw.choice(FILES)
    file.unlink()
    draw.choice([file.mkdir, lambda: file.symlink_to("nowhere"), lambda: file.symlink_to(file.name)])()


def deep(folder: Path, draw: random.Random) -> None:
    """JSON that is nested so deeply that reading it, or writing it again, runs out of stack."""
    file = folder / draw.choice([name for name in FILES if name.endswith(".json")])
    content = json.loads(file.read_text())
    depth = draw.choice([500, 990, 2000, 5000, 9000])
    nested = "[" * depth + "]" * depth
    content[draw.choice(["x", *content])] = "DEEP"
    file.write_text(json.dumps(content).replace('"DEEP"', nested))


def training_notes(folder: Path, draw: random.Random) -> None:
    """A train_config.json that is not LeRobot's."""
    texts = ["[]", "{", '{"dataset": 3, "optimizer": []}', '{"dataset": {"episodes": "x", "eval_split": "half"}}']
    (folder / "train_config.json").write_text(draw.choice(texts))


def nothing(folder: Path, draw: random.Random) -> None:
    for file in folder.iterdir():
        file.unlink()


def other_policy(folder: Path, draw: random.Random) -> None:
    kinds = ["act", "pi05", "pi0_fast", "smolvla", "", None, 3, ["pi0"], "x" * 10**5]
    (folder / "config.json").write_text(json.dumps({"type": draw.choice(kinds)}))


DAMAGE: dict[str, Mutation] = {
    **FOLDER, **OURS, "not a file": not_a_file, "deep": deep, "training notes": training_notes, "nothing": nothing,
    "another policy": other_policy,
}  # fmt: skip


def serve(folder: Path) -> int:
    """What the server does when a client names this checkpoint; what it raises is answered by name."""
    server = pytest.importorskip("lerobot_pi0.tools.serving.server")
    from lerobot.async_inference.configs import PolicyServerConfig
    from lerobot.async_inference.helpers import RemotePolicyConfig

    from lerobot_pi0.checkpoints.errors import CheckpointError
    from lerobot_pi0.tools import ToolError

    specs = RemotePolicyConfig("pi0", str(folder), {}, 4, "cpu")
    policy_server = server.RolloutServer(PolicyServerConfig())
    policy_server.shutdown_event.clear()
    context = SimpleNamespace(peer=lambda: "test")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server, "read_pickle", lambda data, kind: specs)
            policy_server.SendPolicyInstructions(SimpleNamespace(data=b""), context)
        return 0
    except (CheckpointError, ToolError, ValueError) as error:
        assert len(str(error)) > 20
        return 1


def command(verb: str, folder: Path, root: Path) -> list[str]:
    data = ["--dataset.repo_id=test/tiny", f"--dataset.root={root}/data"]
    return {
        "show": ["show", f"--source={folder}"],
        "check": ["check", f"--policy.path={folder}", *data, "--images=2"],
        "open-loop": ["open-loop", f"--policy.path={folder}", *data, "--observations=2", f"--output_dir={root}/out"],
        "plan": ["plan", f"--policy.path={folder}", "--modes=[frozen VLM]", "--batch_size=1"],
        "convert": ["convert", f"--source={folder}", f"--output={root}/converted"],
    }[verb]


VERBS = ("show", "check", "open-loop", "plan", "convert", "serve")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return make_originals(tmp_path_factory.mktemp("originals"))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_dataset(folder / "data", cameras=CAMERAS[:2])
    return folder


def sweep(originals, root, tmp_path, caplog, capsys, kind: str, verbs: tuple[str, ...], seeds: range) -> None:
    origin = "adapter" if kind in ADAPTER else "own"
    for seed in seeds:
        folder = tmp_path / str(seed)
        shutil.copytree(originals[origin][0], folder)
        (DAMAGE | ADAPTER)[kind](folder, random.Random(f"{kind} {seed}"))
        for verb in verbs:
            caplog.clear()
            try:
                status = serve(folder) if verb == "serve" else main(command(verb, folder, root))
            except (Exception, SystemExit) as error:
                pytest.fail(f"{verb}, seed {seed}: {type(error).__name__}: {str(error)[:500]}")
            said = capsys.readouterr()
            assert status in (0, 1, 2)
            assert status != 1 or verb in ("serve", "show", "check") or caplog.text
            assert "Traceback" not in said.out + said.err + caplog.text
            shutil.rmtree(root / "converted", ignore_errors=True)
        shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def logs(monkeypatch, caplog) -> None:
    """The command sets logging up anew, which would take it away from pytest."""
    monkeypatch.setattr("lerobot_pi0.tools.init_logging", lambda: None)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # a handler of an earlier test may have a closed stream
    caplog.set_level(logging.INFO, "lerobot_pi0")


KINDS = [*DAMAGE, *ADAPTER]


@pytest.mark.parametrize("kind", KINDS)
def test_a_verb_over_damage(originals, root, tmp_path, caplog, capsys, kind):
    """Catches a traceback where a file is damaged: each kind meets two verbs here, and all of them in the slow test."""
    first = KINDS.index(kind) % len(VERBS)
    verbs = (VERBS[first], "show")
    sweep(originals, root, tmp_path, caplog, capsys, kind, verbs, range(1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_verbs_over_damage(originals, root, tmp_path, caplog, capsys, kind):
    """Catches a traceback from any verb over any kind of damage."""
    sweep(originals, root, tmp_path, caplog, capsys, kind, VERBS, range(1, 2))


def test_serving_executes_nothing(originals, tmp_path):
    """Catches a server that builds the pipelines of a checkpoint, which its client names, before it looks at them."""
    folder, mark = Path(shutil.copytree(originals["own"][0], tmp_path / "own")), tmp_path / "executed"
    file = folder / "policy_preprocessor.json"
    content = json.loads(file.read_text())
    content["steps"].insert(0, {"class": "subprocess.Popen", "config": {"args": ["touch", str(mark)]}})
    file.write_text(json.dumps(content))
    assert serve(folder) == 1
    assert not mark.exists()
