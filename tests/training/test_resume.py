"""A run that is killed with SIGKILL and resumed is the run that was not: losses, weights, optimizer, schedule.

Six kinds of run: float32 with everything trained; bfloat16 with a frozen VLM, whose trained weights are float32
under autocast; one with openpi's recipe, which averages weights (a file holds the average, the optimizer both) and
augments images; one that averages them with an optimizer of 8 bits; the recipe for small networks, with Muon and a
second loss; and LoRA, whose checkpoints hold an adapter and no policy. Losses are compared in hexadecimal, since
LeRobot logs three digits of them.
"""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import CAMERAS, stats, tiny_config, write_dataset
from processes import finish, start
from safetensors.torch import load_file

from lerobot_pi0 import PI0Policy, make_pi0_pre_post_processors

STEPS, SAVED, KILLED = 12, 4, 7
"""The run is killed in its 7th step; the last checkpoint is of the 4th. An epoch has 6 steps."""

TINY = ["--policy.type=pi0", "--policy.paligemma_variant=tiny", "--policy.action_expert_variant=tiny"]
KINDS = {
    "float32": TINY,
    "bfloat16": [*TINY, "--policy.dtype=bfloat16", "--policy.train_expert_only=true", "--policy.flow_samples=2"],
    "openpi": [*TINY, "--policy.train_expert_only=true", "--policy.recipe=openpi", "--policy.ema_decay=0.9"],
    "8 bits": [*TINY, "--policy.train_expert_only=true", "--policy.ema_decay=0.9", "--policy.optimizer_8bit=true"],
    "small": [*TINY, "--policy.recipe=small"],
    "lora": ["--policy.path={base}", "--peft.method_type=LORA", "--peft.r=4"],
}

RUN = """
import sys, time
from pathlib import Path
import lerobot_policy_pi0
from accelerate.state import AcceleratorState
from lerobot.scripts.lerobot_train import main
from lerobot_pi0 import PI0Policy

forward = PI0Policy.forward

def train(losses, *arguments, stop_at=0):
    count = 0

    def recorded(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == stop_at:
            Path(losses).with_suffix(".stopped").touch()
            time.sleep(600)
        loss, out = forward(self, *args, **kwargs)
        with Path(losses).open("a") as file:
            print(float(loss).hex(), file=file)
        return loss, out

    PI0Policy.forward = recorded
    AcceleratorState._reset_state(reset_partial_state=True)  # runs of another precision share this process
    sys.argv = ["lerobot-train", *arguments]
    main()

"""

WHOLE_THEN_CUT = (
    RUN
    + """
stop_at, root, *options = sys.argv[1:]
common = [
    "--dataset.repo_id=test/tiny", f"--dataset.root={root}/../data", "--policy.device=cpu",
    "--policy.push_to_hub=false", "--batch_size=2", "--num_workers=0", "--steps=12", "--save_freq=4", "--log_freq=1",
    "--policy.optimizer_lr=1e-3", "--policy.scheduler_warmup_steps=3", "--policy.scheduler_decay_steps=12",
    "--wandb.enable=false", *options,
]
train(f"{root}/whole.txt", *common, f"--output_dir={root}/whole")
train(f"{root}/cut.txt", *common, f"--output_dir={root}/cut", stop_at=int(stop_at))
"""
)

RESUMED = (
    RUN
    + """
for root in sys.argv[1:]:
    last = f"{root}/cut/checkpoints/last/pretrained_model/train_config.json"
    train(f"{root}/resumed.txt", "--resume=true", f"--config_path={last}")
"""
)


def kill_in_the_middle(process: subprocess.Popen, mark: Path) -> None:
    """SIGKILL once the process has reached the step at which it waits."""
    until = time.monotonic() + 400
    while not mark.exists():
        assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < until, "the run did not get that far"
        time.sleep(0.1)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder per kind of run: `whole`, and `cut`, which was killed and then resumed; losses beside them."""
    folder = tmp_path_factory.mktemp("resume")
    write_dataset(folder / "data", environment=3)
    config = tiny_config(cameras=CAMERAS[:2])
    PI0Policy(config).save_pretrained(folder / "base")
    for pipeline in make_pi0_pre_post_processors(config, stats()):
        pipeline.save_pretrained(folder / "base")
    for kind, options in KINDS.items():
        (folder / kind).mkdir()
        process = start(
            WHOLE_THEN_CUT, str(KILLED), str(folder / kind), *(o.format(base=folder / "base") for o in options)
        )
        kill_in_the_middle(process, folder / kind / "cut.stopped")
    finish(start(RESUMED, *(str(folder / kind) for kind in KINDS)))
    return folder


pytestmark = pytest.mark.parametrize("kind", KINDS)


def losses(file: Path) -> list[str]:
    return file.read_text().split()


def checkpoint(run: Path, step: int = STEPS) -> Path:
    return run / "checkpoints" / f"{step:06d}"


def weights(run: Path, step: int = STEPS) -> Path:
    """The file of what was trained."""
    folder = checkpoint(run, step) / "pretrained_model"
    adapter = folder / "adapter_model.safetensors"
    return adapter if adapter.exists() else folder / "model.safetensors"


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    """Two safetensors files with equal bits."""
    tensors, expected = load_file(ours), load_file(theirs)
    assert tensors.keys() == expected.keys()
    assert len(tensors) > 0
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


def test_the_run_was_cut(runs, kind):
    """Catches a test that compares a run with itself: the kill has to come after one checkpoint, before the next."""
    cut = losses(runs / kind / "cut.txt")
    assert len(cut) == KILLED - 1
    assert cut == losses(runs / kind / "whole.txt")[: KILLED - 1]  # two runs of one seed agree to begin with
    assert len(set(cut)) == len(cut)


def test_losses_go_on_as_if_nothing_had_happened(runs, kind):
    """Catches other data, other noise, weights or moments rounded on their way to the disk, a step too few."""
    resumed = losses(runs / kind / "resumed.txt")
    assert resumed == losses(runs / kind / "whole.txt")[SAVED:]
    assert len(resumed) == STEPS - SAVED


def test_weights_are_the_same(runs, kind):
    """Catches a difference in the last update, which no loss shows."""
    assert_same_tensors(weights(runs / kind / "cut"), weights(runs / kind / "whole"))


def test_moments_are_the_same(runs, kind):
    """Catches an optimizer that starts again, or whose moments belong to other parameters."""
    whole, cut = (checkpoint(runs / kind / name) / "training_state" for name in ("whole", "cut"))
    assert_same_tensors(cut / "optimizer_state.safetensors", whole / "optimizer_state.safetensors")


@pytest.mark.parametrize(
    "file",
    [
        "training_state/scheduler_state.json",
        "training_state/training_step.json",
        "training_state/optimizer_param_groups.json",
        "pretrained_model/lerobot_pi0.json",
        "pretrained_model/policy_preprocessor.json",
        "pretrained_model/policy_postprocessor.json",
    ],
)
def test_schedule_step_and_settings_are_the_same(runs, kind, file):
    """Catches a schedule that starts again, and a setting that gets lost on resume and changes what follows."""
    whole, cut = (json.loads((checkpoint(runs / kind / name) / file).read_text()) for name in ("whole", "cut"))
    assert cut == whole


def test_the_config_is_the_same(runs, kind):
    """Catches an option that resuming settles otherwise, such as who is frozen."""
    whole, cut = (
        json.loads((checkpoint(runs / kind / name) / "pretrained_model/config.json").read_text())
        for name in ("whole", "cut")
    )
    assert str(whole.pop("pretrained_path")) == (str(runs / "base") if kind == "lora" else "None")
    assert Path(cut.pop("pretrained_path")).parts[-2:] == ("last", "pretrained_model")
    assert cut == whole


def test_the_run_trained(runs, kind):
    """Catches a run in which nothing moves, or what is frozen does: equal losses would then prove nothing."""
    first, last = (load_file(weights(runs / kind / "whole", step)) for step in (SAVED, STEPS))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert any("gemma_expert" in name for name in moved)
    assert any("vision_tower" in name for name in moved) is (kind in ("float32", "small"))
