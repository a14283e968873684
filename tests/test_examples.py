"""The scripts of examples/, each in its own process as a user runs it, and a small run of `make demo`."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import make_batch, relative, write_dataset
from hub_server import serve
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.policies import make_policy
from lerobot.utils.constants import ACTION
from safetensors.torch import load_file

from lerobot_pi0 import PI0Policy

ROOT = Path(__file__).parent.parent
LAST = "checkpoints/last/pretrained_model"


def start(script: str, *options: str, **environment: str) -> subprocess.Popen:
    """Start a script of examples/ in the root folder, as the pages say."""
    return subprocess.Popen(
        [sys.executable, f"examples/{script}", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    """Wait for its end; returns what it printed."""
    out, log = process.communicate(timeout=550)
    assert process.returncode == 0, log[-4000:]
    return out


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """A folder with a dataset, and a policy trained on it from random weights for two steps."""
    root = tmp_path_factory.mktemp("examples")
    write_dataset(root / "data")
    options = ["--dataset=test/tiny", f"--root={root}/data", "--batch_size=2", "--workers=0"]
    finish(start("fine_tune.py", *options, "--steps=2", f"--output={root}/scratch"))
    return root


def test_from_a_checkpoint(tuned):
    """Catches a fine-tuning that does not start from the checkpoint, or takes only its sizes and not its weights."""
    options = ["--dataset=test/tiny", f"--root={tuned}/data", "--batch_size=2", "--workers=0"]
    first = tuned / "scratch" / LAST
    finish(start("fine_tune.py", *options, f"--start={first}", "--steps=1", f"--output={tuned}/again"))
    before, after = (load_file(folder / "model.safetensors") for folder in (first, tuned / "again" / LAST))
    assert before.keys() == after.keys()
    assert [n for n, x in before.items() if not torch.allclose(x, after[n].float(), rtol=1e-2, atol=1e-4)] == []
    trained = {name for name, x in after.items() if x.dtype == torch.float32}  # what is frozen is held in bfloat16
    assert any("action_out_proj" in name for name in trained)
    assert not any("language_model" in name or "vision_tower" in name for name in trained)


def test_load_and_act(tuned):
    """Catches actions that are not in the robot's units, or are printed next to those of another frame or episode."""
    first = tuned / "scratch" / LAST
    said = finish(
        start("load_and_act.py", f"--policy={first}", "--dataset=test/tiny", f"--root={tuned}/data", "--frame=2")
    )
    title, *lines = said.strip().splitlines()
    assert title.startswith("'reach cube 0', frame 2")
    numbers = np.array([re.findall(r"-?\d+\.\d+", line) for line in lines], dtype=float).reshape(4, 6, 2)
    data = LeRobotDataset("test/tiny", root=tuned / "data")
    recorded = np.stack([data[2 + step][ACTION] for step in range(4)])
    assert np.allclose(numbers[..., 1], recorded, atol=0.01)
    assert np.abs(numbers[..., 0]).max() > 5  # the data's deviation is 30: these are no normalised numbers


def test_merge_adapter(tuned, tmp_path):
    """Catches a merged policy with other actions, or without its processors, options or joints."""
    run, base = tmp_path / "lora", tmp_path / "base"
    shutil.copytree((tuned / "scratch" / LAST).resolve(), base)
    subprocess.run(
        [
            sys.executable, "-m", "lerobot.scripts.lerobot_train", f"--policy.path={base}",
            "--policy.save_expert_only=true",  # which would leave the VLM's weights to the base, unmerged
            "--policy.push_to_hub=false", "--policy.device=cpu", "--peft.method_type=LORA", "--peft.r=2",
            "--policy.flow_samples=3", "--policy.optimizer_lr=1e-2", "--dataset.repo_id=test/tiny",
            f"--dataset.root={tuned / 'data'}", "--batch_size=2", "--num_workers=0", "--steps=2",
            f"--output_dir={run}",
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    said = finish(start("merge_adapter.py", f"--adapter={run / LAST}", f"--output={tmp_path / 'merged'}"))
    assert f"--policy.path={tmp_path / 'merged'}" in said
    config = PreTrainedConfig.from_pretrained(run / LAST)
    meta = LeRobotDatasetMetadata("test/tiny", root=tuned / "data")
    config.pretrained_path = run / LAST
    adapted, merged = make_policy(config, ds_meta=meta), PI0Policy.from_pretrained(tmp_path / "merged")
    assert merged.config.flow_samples == 3
    draw = torch.Generator().manual_seed(0)
    batch = make_batch(cameras=list(merged.config.image_features), size=64)
    noise = torch.randn(2, merged.config.chunk_size, merged.config.max_action_dim, generator=draw)
    chunks = [policy.eval().predict_action_chunk(batch, noise=noise) for policy in (adapted, merged)]
    assert relative(chunks[1], chunks[0]) < 1e-2
    plain = PI0Policy.from_pretrained(tuned / "scratch" / LAST).predict_action_chunk(batch, noise=noise)
    assert relative(plain, chunks[0]) > 10 * relative(chunks[1], chunks[0])
    for file in (tuned / "scratch" / LAST).glob("policy_*.json"):
        assert (tmp_path / "merged" / file.name).read_text() == (run / LAST / file.name).read_text()
    other = PI0Policy.from_pretrained(base)
    with torch.no_grad():
        other.model.action_out_proj.bias += 1
    other.save_pretrained(base)
    with pytest.raises(AssertionError, match="was trained over"):
        finish(start("merge_adapter.py", f"--adapter={run / LAST}", f"--output={tmp_path / 'again'}"))
    assert not (tmp_path / "again").exists()


def test_push(tuned, tmp_path):
    """Catches a repository that lacks files that a robot needs, or has the model card of another policy."""
    first = tuned / "scratch" / LAST
    with serve(tmp_path / "storage") as hub:
        said = finish(
            start("push.py", f"--policy={first}", "--repo_id=me/pushed", **hub.environment(tmp_path / "home"))
        )
        files = hub.files("me/pushed")
    assert "--policy.path=me/pushed" in said
    expected = {file.name for file in first.iterdir()} | {"README.md"}
    assert expected <= files.keys()
    assert json.loads(files["config.json"])["repo_id"] == "me/pushed"
    assert "# me/pushed" in files["README.md"].decode() and "test/tiny" in files["README.md"].decode()
    for name in ("policy_preprocessor.json", "lerobot_pi0.json"):
        assert json.loads(files[name]) == json.loads((first / name).read_text())


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda file: file.name)
def test_they_are_short(script):
    """Catches an example that has become too long."""
    assert len(script.read_text().splitlines()) <= 60


def test_the_picture(tmp_path):
    """Catches a picture with another mask or other work than the code's, by counting what the page says about it."""
    drawing = runpy.run_path(str(ROOT / "docs/architecture.py"))
    seen = drawing["masks"](drawing["observation"](drawing["FEW"], cameras=2, prompt=4, padding=1), 2)
    prefix, state = 2 * 4 + 3, 12
    assert seen.shape == (21, 21)
    assert (seen[:state].sum(axis=1) == prefix).all() and not seen[:, 11].any()
    assert seen[state].sum() == prefix + 1 and (seen[13:].sum(axis=1) == prefix + 1 + 4).all()
    drawing["draw"](tmp_path / "drawn.png")
    drawn, kept = (matplotlib.image.imread(file) for file in (tmp_path / "drawn.png", ROOT / "docs/architecture.png"))
    if drawn.shape == kept.shape:  # other fonts, other sizes
        assert np.abs(drawn - kept).mean() < 0.02


@pytest.mark.slow
def test_the_demo(tmp_path):
    """Catches a stage of `make demo` that fails with the results of the one before. (Three steps teach nothing.)"""
    sizes = ["--episodes=6", "--steps=3", "--batch_size=2", "--scenes=2"]
    command = [sys.executable, "-m", "lerobot_env_virtual_so100.demo", *sizes, f"--output={tmp_path}/demo"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert "control: expert" in finish(process)
    scores = json.loads((tmp_path / "demo/scores.json").read_text())["scores"]
    assert scores["control: expert"]["successes"] == 2
    assert {row["episodes"] for row in scores.values()} == {2}
