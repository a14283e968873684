"""Damaged datasets: `check`, `open-loop` and `plan` end with findings or a named error, never in a traceback."""

import json
import logging
import shutil

import numpy as np
import pytest
from conftest import ACTION, CAMERAS, DIMS, OBS_STATE, tiny_config
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from tools.damaged import POINTER, damage
from tools.seen import difference, seen

from lerobot_pi0 import PI0Policy, make_pi0_pre_post_processors
from lerobot_pi0.tools import main

FRONT, LEFT = CAMERAS[:2]
NAMES = [f"joint_{i}.pos" for i in range(DIMS)]
VIDEO = f"videos/{FRONT}/chunk-000/file-000.mp4"
DATA = "data/chunk-000/file-000.parquet"


@pytest.fixture(autouse=True)
def logs(monkeypatch, caplog) -> None:
    """The command sets logging up anew, which would take it away from pytest."""
    monkeypatch.setattr("lerobot_pi0.tools.init_logging", lambda: None)
    caplog.set_level(logging.INFO, "lerobot_pi0")


def build(root, episodes: int = 3, frames: int = 16, fps: int = 10, names=NAMES, dims: int = DIMS) -> None:
    """A dataset with one camera as video and one as images."""
    vector = {"dtype": "float32", "shape": (dims,), "names": names}
    video, image = (
        {"dtype": x, "shape": (32, 32, 3), "names": ["height", "width", "channels"]} for x in ("video", "image")
    )
    columns = {OBS_STATE: vector, ACTION: vector, FRONT: video, LEFT: image}
    dataset = LeRobotDataset.create("test/damaged", fps=fps, features=columns, root=root, use_videos=True)
    for episode in range(episodes):
        for i in range(frames):
            joints = np.sin(0.3 * i + episode + np.arange(dims)).astype(np.float32)
            picture = np.full((32, 32, 3), (200, 120, 60), np.uint8)
            picture[:, (2 * i + 5 * episode) % 28 :][:, :4] = 255
            frame = {OBS_STATE: joints, ACTION: joints + 0.1, FRONT: picture, LEFT: picture[:, ::-1].copy()}
            dataset.add_frame(frame | {"task": f"reach cube {episode % 2}"})
        dataset.save_episode()
    dataset.finalize()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A dataset without faults, and a policy for it."""
    root = tmp_path_factory.mktemp("whole")
    build(root / "data")
    meta = LeRobotDatasetMetadata("test/damaged", root=root / "data")
    options = {"chunk_size": 4, "n_action_steps": 4, "num_inference_steps": 1, "action_feature_names": NAMES}
    policy = PI0Policy(tiny_config(CAMERAS[:2], **options))
    policy.save_pretrained(root / "policy")
    split = DatasetConfig("test/damaged", eval_split=0.3)
    TrainPipelineConfig(dataset=split, policy=policy.config)._save_pretrained(root / "policy")
    for pipeline in make_pi0_pre_post_processors(policy.config, meta.stats):
        pipeline.save_pretrained(root / "policy")
    return root


def options(root, policy) -> list[str]:
    return [f"--policy.path={policy}", "--dataset.repo_id=test/damaged", f"--dataset.root={root}"]


def findings(capsys, root, policy) -> tuple[int, list[dict]]:
    status = main(["check", *options(root, policy), "--json", "--images=40"])
    return status, json.loads(capsys.readouterr().out)["findings"]


COMMANDS = {
    "check": ["--images=40", "--json"],
    "plan": ["--modes=[LoRA]", "--batch_size=1"],
    "open-loop": ["--observations=4", "--plots=1"],
}


def answer(verb: str, root, policy, output, capsys, caplog) -> tuple[int, str, list[str]]:
    """Exit status, what was printed (of open-loop the report's numbers), and errors, of a command."""
    page = output / f"{verb}.html"
    page.unlink(missing_ok=True)
    more = [f"--html={page}", *([f"--output_dir={output}"] if verb == "open-loop" else [])]
    caplog.clear()
    status = main([verb, *options(root, policy), *COMMANDS[verb], *more])
    assert page.is_file() or status == 1
    out = capsys.readouterr().out
    assert status in (0, 1) and "Traceback" not in out + caplog.text
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    if verb == "open-loop" and status == 0:
        content = json.loads((output / "report.json").read_text())
        out = json.dumps({name: content[name] for name in ("episodes", "error", "way", "error by joint")})
    return status, out, [x for x in errors if "Error: " in x]


def alarms(printed: str) -> set[tuple[str, str]]:
    """What `check` found, but for what could not be looked at, which is no answer."""
    found = json.loads(printed)["findings"] if printed.startswith("{") else []
    return {
        (x["about"], x["message"]) for x in found if x["grade"] != "fine" and "could not be done" not in x["message"]
    }


@pytest.fixture
def clean(whole, tmp_path, capsys, caplog) -> dict[str, str]:
    """What each command prints for the dataset without damage."""
    if not CLEAN:
        for verb in COMMANDS:
            CLEAN[verb] = answer(verb, whole / "data", whole / "policy", tmp_path / "clean", capsys, caplog)[1]
        CLEAN["seen"] = seen(whole / "data")
    return CLEAN


CLEAN: dict = {}


def ends_well(clean, done: str, root, policy, output, capsys, caplog) -> None:
    """Run the three commands. What changes for training has to be named; what changes nothing need not be."""
    changed = difference(clean["seen"], root)
    status, printed, errors = answer("check", root, policy, output, capsys, caplog)
    named = errors or alarms(printed) - alarms(clean["check"])
    assert status == 0 or named, f"{done}: an error that names nothing"
    assert named or not changed, f"{done}: {changed}"
    for verb in ("plan", "open-loop"):
        status, printed, errors = answer(verb, root, policy, output, capsys, caplog)
        assert errors if status else (named or printed == clean[verb]), f"{done}: {verb}: {printed}"


@pytest.mark.parametrize("seed", range(12))
def test_some_damage(whole, clean, tmp_path, capsys, caplog, seed):
    """Catches a traceback on a damaged dataset, and damage that training sees and `check` does not."""
    shutil.copytree(whole / "data", tmp_path / "data")
    done = damage(tmp_path / "data", seed)
    ends_well(clean, done, tmp_path / "data", whole / "policy", tmp_path / "report", capsys, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 420))
def test_much_damage(whole, clean, tmp_path, capsys, caplog, seed):
    """Catches the same: 320 more of them."""
    test_some_damage(whole, clean, tmp_path, capsys, caplog, seed)


MISSING = {
    "video": (VIDEO, "is missing"),
    "stats": ("meta/stats.json", "recompute_stats"),
    "tasks": ("meta/tasks.parquet", "is missing"),
    "episodes": ("meta/episodes/chunk-000/file-000.parquet", "meta/episodes"),
    "data": (DATA, "is missing"),
}


@pytest.mark.parametrize("pointer", [False, True], ids=["missing", "pointer"])
@pytest.mark.parametrize("name", MISSING)
def test_one_file(whole, tmp_path, capsys, caplog, name, pointer):
    """Catches one file that takes the other findings with it, a wrong remedy, and a folder that is asked for twice."""
    root = shutil.copytree(whole / "data", tmp_path / "data")
    file, said = MISSING[name]
    (root / file).unlink()
    if pointer:
        (root / file).write_text(POINTER)
    status, found = findings(capsys, root, whole / "policy")
    errors = [f"{x['message']} {x['remedy']}" for x in found if x["about"] == "files"]
    assert status == 1
    assert any((file in x and "git lfs pull" in x) if pointer else said in x for x in errors), errors
    assert {"cameras", "joints"} <= {x["about"] for x in found}
    if name != "data":
        assert "episodes" in {x["about"] for x in found}, "what the frames say is still said"
    assert "name its folder" not in json.dumps(found)
    assert main(["open-loop", *options(root, whole / "policy"), f"--output_dir={tmp_path}"]) == 1
    assert "is not whole" in caplog.text and "lerobot-pi0 check" in caplog.text


def test_a_video_that_is_cut_off(whole, tmp_path, capsys):
    """Catches a decoder's error that ends the command, and one that is not said by episode."""
    root = shutil.copytree(whole / "data", tmp_path / "data")
    data = (root / VIDEO).read_bytes()
    (root / VIDEO).write_bytes(data[: int(len(data) * 0.6)])
    status, found = findings(capsys, root, whole / "policy")
    assert status == 1 and any(VIDEO in x["message"] for x in found)
    assert {"joints", "statistics", "episodes", "prompts"} <= {x["about"] for x in found}


def change_info(root, **changes) -> None:
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | changes))


def test_declared_and_present(whole, tmp_path, capsys):
    """Catches episodes that info.json declares and nobody recorded, and a frame count that is another."""
    root = shutil.copytree(whole / "data", tmp_path / "data")
    change_info(root, total_episodes=5)
    _, found = findings(capsys, root, whole / "policy")
    assert any("declares 5 episodes, 2 have no frames: 3, 4" in x["message"] for x in found)
    change_info(root, total_episodes=3, total_frames=50)
    _, found = findings(capsys, root, whole / "policy")
    assert any("declares 50 frames, the data hold 48" in x["message"] for x in found)


def test_another_rate_than_declared(whole, tmp_path, capsys):
    """Catches time stamps off the grid that end the command, and a report that does not name the true rate."""
    root = shutil.copytree(whole / "data", tmp_path / "data")
    change_info(root, fps=15)
    status, found = findings(capsys, root, whole / "policy")
    said = [x for x in found if x["about"] == "time stamps"]
    assert status == 1 and "they are those of 10 fps" in said[0]["message"] and "set fps to 10" in said[0]["remedy"]


def test_other_versions_and_folders(whole, tmp_path, caplog):
    """Catches advice to push a private dataset, or to name a folder that was named."""
    root = shutil.copytree(whole / "data", tmp_path / "data")
    change_info(root, codebase_version="v2.1")
    for verb in ("check", "plan", "open-loop"):
        caplog.clear()
        assert main([verb, *options(root, whole / "policy")]) == 1
        assert f"--root={root} --push-to-hub=false" in caplog.text and "name the folder" not in caplog.text
    (root / "meta/info.json").write_text("{")
    caplog.clear()
    assert main(["check", *options(root, whole / "policy")]) == 1
    assert "info.json" in caplog.text and "cannot be read" in caplog.text
    caplog.clear()
    assert main(["check", *options(tmp_path / "nothing", whole / "policy")]) == 1
    assert "holds no dataset" in caplog.text and "--dataset.root=FOLDER" in caplog.text


def test_plan_reads_the_dataset(whole, capsys):
    """Catches a plan with two cameras of 480 × 640 and 48 tokens, whatever the dataset holds."""
    where = ["--dataset.repo_id=test/damaged", f"--dataset.root={whole / 'data'}", "--modes=[LoRA]", "--json"]
    tiny = ["--policy.type=pi0", "--policy.paligemma_variant=tiny", "--policy.action_expert_variant=tiny"]
    assert main(["plan", *tiny, *where]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["cameras"] == [[32, 32], [32, 32]] and content["prompt_tokens"] < 20
    assert main(["plan", *tiny, *where, "--cameras=1", "--prompt_tokens=7"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["cameras"] == [[480, 640]] and content["prompt_tokens"] == 7
