"""The real commands on cached contexts: killed while caching, and while training, they end as without the kill."""

import json
from pathlib import Path

import pytest
import torch
from cached_world import write_world
from processes import finish, start
from safetensors.torch import load_file
from test_resume import KILLED, RESUMED, SAVED, STEPS, WHOLE_THEN_CUT, kill_in_the_middle

from lerobot_pi0 import PI0Policy
from lerobot_pi0.training.context_store import read_manifest

CACHE = """
import sys, time
from pathlib import Path
from lerobot_pi0.tools import main
from lerobot_pi0.training.context_store import ContextWriter

mark, stop_at, outputs, *arguments = sys.argv[1:]
write, count = ContextWriter.write, 0

def slow(self, *args):
    global count
    count += 1
    if count == int(stop_at):
        Path(mark).touch()
        time.sleep(600)
    write(self, *args)

ContextWriter.write = slow
for output in outputs.split(","):
    answers[Path(output).name] = main([*arguments, f"--output={output}"])
"""
BATCHES = 6
FILES = ("contexts.bin", "tokens.bin", "digests.bin", "contexts.json")

KINDS = {
    "expert": ["--policy.ema_decay=0.9", "--policy.optimizer_8bit=true", "--policy.flow_samples=2"],
    "lora": ["--peft.method_type=LORA", "--peft.r=4"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A policy and a dataset; `whole`, its contexts, and `cut`, whose caching was killed once and begun again."""
    folder = tmp_path_factory.mktemp("cached")
    write_world(folder)
    common = [
        "cache", f"--policy.path={folder / 'base'}", "--policy.device=cpu", "--dataset.repo_id=test/tiny",
        f"--dataset.root={folder / 'data'}", "--num_workers=0", "--batch_size=4",
    ]  # fmt: skip
    mark = folder / "cut.stopped"
    kill_in_the_middle(start(CACHE, str(mark), "3", str(folder / "cut"), *common), mark)
    (folder / "killed").write_bytes((folder / "cut/digests.bin").read_bytes())
    answers, _ = finish(start(CACHE, str(mark), "0", f"{folder / 'cut'},{folder / 'whole'}", *common))
    assert answers == {"cut": 0, "whole": 0}
    return folder


def test_caching_goes_on(world):
    """Catches frames that are computed again, left out, or other than without the kill."""
    killed = memoryview((world / "killed").read_bytes()).cast("Q").tolist()
    assert [x != 0 for x in killed] == [True] * 8 + [False] * 13
    for name in FILES:
        assert (world / "cut" / name).read_bytes() == (world / "whole" / name).read_bytes(), name


@pytest.fixture(scope="module")
def runs(world) -> Path:
    """A folder per kind with a run `whole` of lerobot-train, and `cut`, killed and resumed; losses beside them."""
    contexts = world / "cut"
    common = [
        f"--policy.path={world / 'base'}", "--policy.train_expert_only=true", f"--policy.context_cache={contexts}",
        f"--dataset.root={contexts / 'dataset'}",
    ]  # fmt: skip
    code = WHOLE_THEN_CUT.replace('f"--dataset.root={root}/../data", ', "")
    for kind, options in KINDS.items():
        folder = world / kind
        folder.mkdir()
        kill_in_the_middle(start(code, str(KILLED), str(folder), *common, *options), folder / "cut.stopped")
    finish(start(RESUMED, *(str(world / kind) for kind in KINDS)))
    return world


def last(run: Path, name: str) -> Path:
    return run / name / "checkpoints" / f"{STEPS:06d}"


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on(runs, kind):
    """Catches other samples, draws, weights, averages or moments after a kill; and a run that does not train."""
    run = runs / kind
    whole, cut, resumed = ((run / f"{name}.txt").read_text().split() for name in ("whole", "cut", "resumed"))
    assert cut == whole[: KILLED - 1] and resumed == whole[SAVED:] and len(set(whole)) == STEPS
    weights = "adapter_model" if kind == "lora" else "model"
    for file in (f"pretrained_model/{weights}", "training_state/optimizer_state"):
        ours, theirs = (load_file(last(run, name) / f"{file}.safetensors") for name in ("cut", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], x) for name, x in theirs.items()), file


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_out(runs, kind):
    """Catches a checkpoint that does not act without the contexts, or that holds more than was trained."""
    folder = last(runs / kind, "whole") / "pretrained_model"
    if kind == "lora":
        names = load_file(folder / "adapter_model.safetensors").keys()
        assert names and not any(".paligemma." in name for name in names)
        return
    names = load_file(folder / "model.safetensors").keys()
    assert names and not any(".paligemma." in name for name in names)
    policy = PI0Policy.from_pretrained(folder)
    base = PI0Policy.from_pretrained(runs / "base").state_dict()
    moved = {name for name, x in policy.state_dict().items() if not torch.equal(x, base[name])}
    assert any("gemma_expert" in name for name in moved) and not any(".paligemma." in name for name in moved)
    config = json.loads((folder / "config.json").read_text())
    assert config["output_features"]["action"]["shape"] == [6]
    assert list(config["input_features"])[:2] == read_manifest(runs / "cut").cameras
