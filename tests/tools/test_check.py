"""`lerobot-pi0 check`: finds each planted fault, and nothing in a dataset without one."""

import json
import logging
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CAMERAS, DIMS, tiny_config
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.utils.constants import ACTION, OBS_STATE
from progress import bars
from raw_frames import word_tokenizer

from lerobot_pi0 import PI0Policy, make_pi0_pre_post_processors
from lerobot_pi0.tools import main

FRONT, LEFT = CAMERAS[:2]
NAMES = [f"joint_{i}.pos" for i in range(DIMS)]
EPISODES, FRAMES, FPS = 4, 32, 10


@pytest.fixture(autouse=True)
def logs(monkeypatch, caplog) -> None:
    """The command sets logging up anew, which would take it away from pytest."""
    monkeypatch.setattr("lerobot_pi0.tools.init_logging", lambda: None)
    caplog.set_level(logging.INFO, "lerobot_pi0")


def clean_frame(episode: int, i: int) -> dict:
    """Six joints in radians, each about its own middle; a bright red camera and a dark blue one, with a moving bar."""
    phase = 0.2 * i + episode + np.arange(DIMS)
    joints = (np.arange(DIMS) - 2) * 0.5 + 0.3 * (1 + np.arange(DIMS) / 4) * np.sin(phase)
    pictures = {}
    for key, base in ((FRONT, (200, 120, 60)), (LEFT, (20, 60, 90))):
        picture = np.full((64, 64, 3), base, np.uint8)
        picture[:, (3 * i + 7 * episode) % 56 :][:, :8] = 255
        pictures[key] = picture
    vectors = {OBS_STATE: joints.astype(np.float32), ACTION: (joints + 0.05 * np.cos(phase)).astype(np.float32)}
    return pictures | vectors | {"task": f"reach cube {episode % 2}"}


def build(
    root, change=lambda frame, episode, i: frame, frames=lambda episode: FRAMES, names=NAMES, size=64, video=False
) -> None:
    """Record a dataset with LeRobot's own writer, so that its statistics are of what is in it."""
    vector = {"dtype": "float32", "shape": (DIMS,), "names": names}
    image = {"dtype": "video" if video else "image", "shape": (size, size, 3), "names": ["height", "width", "channels"]}
    columns = {OBS_STATE: vector, ACTION: vector, FRONT: image, LEFT: image}
    dataset = LeRobotDataset.create("test/checked", fps=FPS, features=columns, root=root, use_videos=video)
    for episode in range(EPISODES):
        for i in range(frames(episode)):
            dataset.add_frame(change(clean_frame(episode, i), episode, i))
        dataset.save_episode()
    dataset.finalize()


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A dataset without faults, and a policy that was trained on it, as far as its processors know."""
    root = tmp_path_factory.mktemp("clean")
    build(root / "data")
    meta = LeRobotDatasetMetadata("test/checked", root=root / "data")
    policy = PI0Policy(tiny_config(CAMERAS[:2], chunk_size=8, n_action_steps=4, action_feature_names=NAMES))
    policy.save_pretrained(root / "policy")
    for pipeline in make_pi0_pre_post_processors(policy.config, meta.stats):
        pipeline.save_pretrained(root / "policy")
    return root


def findings(capsys, root, policy, *more: str) -> tuple[int, list[dict]]:
    where = [policy] if str(policy).startswith("--") else [f"--policy.path={policy}"]
    where += ["--dataset.repo_id=test/checked", f"--dataset.root={root}"]
    status = main(["check", *where, "--json", f"--html={root}.html", *more])
    found = json.loads(capsys.readouterr().out)["findings"]
    page = ET.fromstring(Path(f"{root}.html").read_text(encoding="utf-8"))
    assert len(page.findall(".//section/div[@class='note error']")) == sum(x["grade"] == "error" for x in found)
    return status, found


def serious(found: list[dict]) -> dict[str, str]:
    messages: dict[str, str] = {}
    for x in found:
        if x["grade"] != "fine":
            name = f"{x['grade']} {x['about']}"
            messages[name] = f"{messages[name]}; {x['message']}" if name in messages else x["message"]
    return messages


def test_clean(clean, capsys):
    """Catches a false alarm: nothing is wrong, and it says so with the exit status 0; and silence meanwhile."""
    status, found = findings(capsys, clean / "data", clean / "policy")
    assert (status, serious(found)) == (0, {})
    assert {"cameras", "joints", "units", "statistics", "prompts", "episodes", "sample"} <= {x["about"] for x in found}
    assert main([
        "check", f"--policy.path={clean / 'policy'}", "--dataset.repo_id=x", f"--dataset.root={clean / 'data'}"
    ]) == 0  # fmt: skip
    said = capsys.readouterr()
    assert "0 error, 0 warning" in said.out
    assert bars(said.err) >= {f"{key}, {what}" for key in (FRONT, LEFT) for what in ("samples", "runs")}


def exchange(a, b):
    return lambda frame, episode, i: frame | {a: frame[b], b: frame[a]}


def scale(*keys, by):
    return lambda frame, episode, i: frame | {key: frame[key] * np.float32(by) for key in keys}


def hold(joint):
    def change(frame, episode, i):
        frame[ACTION][joint] = frame[OBS_STATE][joint] = 0.25
        return frame

    return change


def prompt(text, only):
    return lambda frame, episode, i: frame | ({"task": text} if episode == only else {})


def picture_of(when, key=LEFT):
    """One camera shows the picture of another frame of the episode."""
    return lambda frame, episode, i: frame | {key: clean_frame(episode, when(episode, i))[key]}


def spike(frame, episode, i):
    if (episode, i) == (2, 17):
        frame[ACTION][3] += 1000
    return frame


def nan(frame, episode, i):
    if (episode, i) == (2, 6):
        frame[OBS_STATE][3] = np.nan
    return frame


def roll(frame, episode, i):
    return frame | {key: np.roll(frame[key], 1) for key in (OBS_STATE, ACTION)}


def pictures(change):
    return lambda frame, episode, i: frame | {key: change(frame[key]) for key in (FRONT, LEFT)}


PLANTED = {
    "swapped cameras": ({"change": exchange(FRONT, LEFT)}, "warning cameras", "swapped?"),
    "degrees for radians": ({"change": scale(OBS_STATE, ACTION, by=57.3)}, "warning units", "degrees"),
    "actions in degrees, state in radians": ({"change": scale(ACTION, by=57.3)}, "error units", "are mixed"),
    "a constant joint": ({"change": hold(4)}, "warning constant", "joint_4.pos"),
    "a cut prompt": ({"change": prompt("please " * 30, 1)}, "warning prompts", "cut after 128 tokens"),
    "an empty prompt": ({"change": prompt(" ", 2)}, "error prompts", "episodes 2"),
    "a camera that hangs": (
        {"change": picture_of(lambda e, i: min(i, 9) if e == 1 else i)}, "error images", "episode 1 from frame 10",
    ),
    "a camera of half the rate": ({"change": picture_of(lambda e, i: i - i % 2)}, "warning images", "repeat the one"),
    "a short episode": ({"frames": lambda e: 5 if e == 3 else FRAMES}, "warning episodes", "1 of 4 episodes"),
    "another order of joints": ({"names": NAMES[::-1]}, "error joints", "in another order"),
    "another order under the same names": ({"change": roll}, "warning joints", "joint_1.pos like joint_0.pos"),
    "an outlier": ({"change": spike}, "warning outliers", "joint_3.pos in episode 2, frame 17"),
    "NaN": ({"change": nan}, "error outliers", "joint_3.pos in episode 2, frame 6"),
    "images divided by 255 twice": ({"change": pictures(lambda x: x // 255)}, "error images", "is black"),
    "blue for red": ({"change": pictures(lambda x: x[..., ::-1].copy())}, "warning colours", "red and blue"),
    "few pixels": ({"change": pictures(lambda x: x[::2, ::2].copy()), "size": 32}, "warning images", "enlarged to 64"),
}  # fmt: skip


@pytest.mark.parametrize(("how", "about", "said"), PLANTED.values(), ids=PLANTED)
def test_planted_at_recording(clean, tmp_path, capsys, how, about, said):
    """Catches a fault of the recording that is not found, under another name, or with the wrong exit status."""
    build(tmp_path / "data", **how)
    status, found = findings(capsys, tmp_path / "data", clean / "policy")
    assert said in serious(found).get(about, ""), serious(found)
    assert "of these episodes" not in str(found), "the dataset has the statistics that LeRobot gave it"
    assert status == int(any(x["grade"] == "error" for x in found))
    assert all(x["remedy"] for x in found if x["grade"] != "fine")


def edit_frames(root, change) -> None:
    file = next((root / "data").rglob("*.parquet"))
    table = pd.read_parquet(file)
    change(table)
    table.to_parquet(file, index=False)


def edit_stats(root, change) -> None:
    stats = json.loads((root / "meta/stats.json").read_text())
    change(stats)
    (root / "meta/stats.json").write_text(json.dumps(stats))


def late(table) -> None:
    table.loc[40:, "timestamp"] += np.float32(0.02)


def test_a_finding_is_no_warning_in_the_log_too(clean, tmp_path, capsys, caplog):
    """Catches a joint that never moves and is told of four times, under another name than the dataset's."""
    build(tmp_path / "data", change=hold(4))
    _, found = findings(capsys, tmp_path / "data", clean / "policy")
    assert "joint_4.pos" in serious(found)["warning constant"]
    assert "near-constant" not in caplog.text


DAMAGED = {
    "time stamps": (lambda root: edit_frames(root, late), "error time stamps", "episode 1, frame 8 (20.0 ms)"),
    "frames are missing": (
        lambda root: edit_frames(root, lambda t: t.drop(index=[50, 51], inplace=True)), "error episodes", "lengths",
    ),
    "statistics are missing": (
        lambda root: edit_stats(root, lambda s: s[ACTION].pop("std")), "error statistics", "no std",
    ),
    "statistics of another dataset": (
        lambda root: edit_stats(root, lambda s: s[ACTION].update(mean=[5.0] * DIMS)), "error statistics", "not those",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "about", "said"), DAMAGED.values(), ids=DAMAGED)
def test_planted_afterwards(clean, tmp_path, capsys, damage, about, said):
    """Catches damage to the files of a dataset that is not found."""
    shutil.copytree(clean / "data", tmp_path / "data")
    damage(tmp_path / "data")
    status, found = findings(capsys, tmp_path / "data", clean / "policy")
    assert said in serious(found).get(about, ""), serious(found)
    assert status == 1


def test_video(tmp_path, capsys):
    """Catches what a codec adds being taken for motion, and a lossy picture for one that stands still."""
    build(tmp_path / "clean", video=True)
    status, found = findings(capsys, tmp_path / "clean", "--policy.type=pi0", *SCRATCH)
    assert (status, serious(found)) == (0, {})
    build(tmp_path / "hangs", change=picture_of(lambda e, i: min(i, 9) if e == 1 else i), video=True)
    status, found = findings(capsys, tmp_path / "hangs", "--policy.type=pi0", *SCRATCH)
    assert status == 1 and re.search("left is frozen .* episode 1 from frame 1[01]$", serious(found)["error images"])


def test_several_files_of_video(tmp_path, capsys):
    """Catches a dataset that LeRobot's stream cannot read, of which nobody is told before."""
    build(tmp_path / "data", video=True)
    file = next((tmp_path / "data/meta/episodes").rglob("*.parquet"))
    for video in [*(tmp_path / "data/videos").rglob("*.mp4")]:
        shutil.copy(video, video.with_name("file-001.mp4"))
    table = pd.read_parquet(file)
    table.loc[1:, [name for name in table if name.startswith("videos/") and name.endswith("/file_index")]] = 1
    table.to_parquet(file, index=False)
    status, found = findings(capsys, tmp_path / "data", "--policy.type=pi0", *SCRATCH)
    told = [x["message"] for x in found if x["about"] == "reading"]
    assert (status, serious(found)) == (0, {})
    assert told and all("in 2 files of video" in message and "--dataset.streaming=true" in message for message in told)


SCRATCH = ["--policy.paligemma_variant=tiny", "--policy.action_expert_variant=tiny", "--policy.chunk_size=8",
           "--policy.n_action_steps=8"]  # fmt: skip


def test_a_policy_that_is_yet_to_be_made(clean, capsys, tmp_path):
    """Catches a check that needs a checkpoint, or does not see what the options of training do to the data."""
    status, found = findings(capsys, clean / "data", "--policy.type=pi0", *SCRATCH)
    assert (status, serious(found)) == (0, {})
    status, found = findings(capsys, clean / "data", "--policy.type=pi0", *SCRATCH, "--policy.max_state_dim=4")
    assert status == 1 and "room for 4" in serious(found)["error dims"]
    relative = [*SCRATCH, "--policy.use_relative_actions=true"]
    status, found = findings(capsys, clean / "data", "--policy.type=pi0", *relative)
    assert status == 1 and "absolute actions" in serious(found)["error statistics"]
    remedy = next(x["remedy"] for x in found if x["about"] == "statistics")
    assert "lerobot-edit-dataset" in remedy and "--operation.relative_action=true" in remedy
    name = f"--policy.text_tokenizer_name={word_tokenizer(tmp_path)}"
    status, found = findings(
        capsys, clean / "data", "--policy.type=pi0", *SCRATCH, name, "--policy.tokenizer_max_length=2"
    )
    assert "cut after 2 tokens" in serious(found)["warning prompts"]
    status, found = findings(capsys, clean / "data", "--policy.type=pi0", *SCRATCH, "--policy.text_tokenizer_name=x/y")
    assert "not counted" in serious(found)["warning prompts"]


def test_what_training_would_only_show_later(tmp_path, capsys):
    """Catches a slow reader, a chunk that is long beside the episodes, or a feature that is not read, in silence."""
    big = {"change": pictures(lambda x: np.repeat(np.repeat(x, 4, 0), 4, 1)), "size": 256}
    build(tmp_path / "data", frames=lambda episode: 12, **big)
    info = json.loads((tmp_path / "data/meta/info.json").read_text())
    info["features"]["observation.environment_state"] = info["features"][OBS_STATE]
    (tmp_path / "data/meta/info.json").write_text(json.dumps(info))
    edit_frames(tmp_path / "data", lambda table: table.insert(0, "observation.environment_state", table[OBS_STATE]))
    _, found = findings(capsys, tmp_path / "data", "--policy.type=pi0", *SCRATCH)
    said = serious(found)
    assert "decodes them 8 times for each sample" in said["warning reading"]
    assert "=convert_image_to_video" in next(x["remedy"] for x in found if x["about"] == "reading")
    assert "chunk_size=8 is long beside the episodes (median 12 frames)" in said["warning episodes"]
    assert "observation.environment_state not read" in said["warning features"]
    assert "--policy.recipe=small" in next(x["remedy"] for x in found if x["about"] == "features")
    _, found = findings(capsys, tmp_path / "data", "--policy.type=pi0", "--policy.recipe=small", *SCRATCH)
    assert "warning features" not in serious(found)


@pytest.mark.parametrize("frames", [6, 12], ids=["shorter than a chunk", "hardly longer"])
def test_a_run_that_goes_on_is_not_warned_of_its_chunks(tmp_path, capsys, frames):
    """Catches a warning of chunks that the weights have learnt from already; and silence where the data is another."""
    build(tmp_path / "data", frames=lambda episode: frames)
    meta = LeRobotDatasetMetadata("test/checked", root=tmp_path / "data")
    policy = PI0Policy(tiny_config(CAMERAS[:2], chunk_size=8, n_action_steps=4, action_feature_names=NAMES))
    other = {key: {name: 1.5 * x for name, x in values.items()} for key, values in meta.stats.items()}
    for folder, stats in {"same": meta.stats, "other": other}.items():
        policy.save_pretrained(tmp_path / folder)
        for pipeline in make_pi0_pre_post_processors(policy.config, stats):
            pipeline.save_pretrained(tmp_path / folder)
    _, found = findings(capsys, tmp_path / "data", tmp_path / "same")
    assert serious(found) == {}
    for which in ([tmp_path / "other"], ["--policy.type=pi0", *SCRATCH], [tmp_path / "same", "--policy.chunk_size=9"]):
        _, found = findings(capsys, tmp_path / "data", *which)
        assert "warning episodes" in serious(found), which


def test_other_cameras(clean, tmp_path, capsys):
    """Catches cameras that lerobot-train will refuse, and a rename_map that is not followed."""
    shutil.copytree(clean / "policy", tmp_path / "policy")
    (tmp_path / "policy" / "lerobot_pi0_manifest.json").unlink()  # the change is meant
    for file in tmp_path.rglob("*.json"):
        file.write_text(file.read_text().replace(FRONT, "observation.images.base_0_rgb"))
    status, found = findings(capsys, clean / "data", tmp_path / "policy")
    assert status == 1 and "refuses" in serious(found)["error cameras"]
    renamed = "--rename_map={" + f"{FRONT}: observation.images.base_0_rgb" + "}"
    status, found = findings(capsys, clean / "data", tmp_path / "policy", renamed)
    assert (status, serious(found)) == (0, {})
    wrist = shutil.copytree(clean / "policy", tmp_path / "wrist")
    (wrist / "lerobot_pi0_manifest.json").unlink()
    for file in wrist.rglob("*.json"):
        file.write_text(file.read_text().replace(FRONT, "observation.images.wrist"))
    fresh = [*SCRATCH, f"--policy.pretrained_path={wrist}"]
    _, found = findings(capsys, clean / "data", "--policy.type=pi0", *fresh)
    assert "mixed up" in serious(found)["warning cameras"]


def test_weights(clean, capsys):
    """Catches a checkpoint of another size that passes here and stops the training, and one that fits and does not."""
    start = f"--policy.pretrained_path={clean / 'policy'}"
    status, found = findings(capsys, clean / "data", "--policy.type=pi0", start, *SCRATCH)
    assert "error weights" not in serious(found)
    assert any(x["about"] == "weights" for x in found)
    status, found = findings(capsys, clean / "data", "--policy.type=pi0", start, *SCRATCH, "--policy.max_action_dim=40")
    assert status == 1 and "made with --policy.max_action_dim=32" in serious(found)["error weights"]


def test_memory(clean, capsys):
    """Catches a card that is too small and passes, one that is large enough and does not, and a silent answer."""
    batch, said = ("--batch_size=4",), {}
    for card in (16, 1):  # of the smaller one nothing is left
        status, found = findings(capsys, clean / "data", clean / "policy", f"--card_gb={card}", "--images=40", *batch)
        said[status] = next(x for x in found if x["about"] == "memory")
    assert said[0]["grade"] == "fine" and "the largest batch is" in said[0]["message"]
    assert said[1]["grade"] == "error" and "gradient_checkpointing" in said[1]["remedy"]
    assert "a step of 4 samples" in said[1]["message"]


def test_robot(clean, tmp_path, capsys):
    """Catches a robot whose joints, cameras or units are not the dataset's, and one that fits and is refused."""
    joints = ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"]
    build(tmp_path / "data", names=[f"{name}.pos" for name in joints], change=scale(OBS_STATE, ACTION, by=57.3))
    camera = "{type: opencv, index_or_path: 0, width: 64, height: 64, fps: 30}"
    robot = ["--robot.type=so100_follower", "--robot.port=none", "--robot.id=none"]
    cameras = [f"--robot.cameras={{front: {camera}, left: {camera}}}"]
    status, found = findings(capsys, tmp_path / "data", "--policy.type=pi0", *SCRATCH, *robot, *cameras)
    assert (status, serious(found)) == (0, {})
    assert "robot" in {x["about"] for x in found}
    renamed = f"--rename_map={{{FRONT}: observation.images.base_0_rgb}}"
    _, found = findings(capsys, tmp_path / "data", "--policy.type=pi0", *SCRATCH, *robot, *cameras, renamed)
    assert "error robot" not in serious(found), "the robot's cameras have the dataset's names, not the policy's"
    status, found = findings(
        capsys, tmp_path / "data", "--policy.type=pi0", *SCRATCH, *robot, cameras[0].replace("left", "side")
    )
    assert status == 1 and LEFT in serious(found)["error robot"]
    status, found = findings(
        capsys, tmp_path / "data", "--policy.type=pi0", *SCRATCH, *robot, *cameras, "--robot.use_degrees=false"
    )
    assert status == 1 and "speaks of -100" in serious(found)["error robot"]
    status, found = findings(capsys, clean / "data", clean / "policy", *robot, *cameras)
    assert status == 1 and "shoulder_pan" in serious(found)["error robot"]


def test_what_cannot_be_checked(tmp_path, clean, caplog, capsys):
    """Catches a traceback where there is no dataset, no policy, or another policy."""
    data = ["--dataset.repo_id=x/y", f"--dataset.root={clean / 'data'}"]
    assert main(["check", *data]) == 1
    assert main(["check", *data, "--policy.type=act"]) == 1
    assert main(["check", *data, f"--policy.path={tmp_path}"]) == 1
    assert main(["check", "--dataset.repo_id=x/y", f"--dataset.root={tmp_path / 'no'}", "--policy.type=pi0"]) == 1
    for said in ("no policy", "another policy", "config.json", "cannot be read"):
        assert said in caplog.text
    assert main(["check", "--policy.type=pi0"]) == 2
    assert main(["check", "--help"]) == 0
    assert "--rename_map" in capsys.readouterr().out


def test_the_order_of_rows_is_found_only_where_it_is_clear():
    """Catches a swap that is called on data which merely differ, such as another light."""
    from lerobot_pi0.tools.checks.subject import permutation

    draw = torch.Generator().manual_seed(0)
    rows = torch.rand(4, 9, generator=draw).numpy()
    order = [2, 0, 1, 3]
    assert permutation(rows[order] + 0.01, rows) == order
    assert permutation(rows + 0.01, rows) is None
    assert permutation(torch.rand(4, 9, generator=draw).numpy(), rows) is None
