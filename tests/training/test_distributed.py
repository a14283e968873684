"""More than one process: the losses, weights and checkpoints of one, over gloo and CPUs.

Two processes see the halves of the batches that one process sees. Noise is a function of the sample, so nothing differs
but the order in which gradients are summed. In float64 that is nothing; the real command trains in float32.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from conftest import (
    CAMERAS,
    make_batch,
    make_double,
    make_small,
    relative,
    small_policy,
    stats,
    take_step,
    tiny_config,
    write_dataset,
)
from lerobot.scripts.lerobot_train import update_policy
from lerobot.utils.constants import ACTION
from lerobot.utils.logging_utils import AverageMeter, MetricsTracker
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lerobot_pi0 import PI0Policy, make_pi0_pre_post_processors, tools

PROCESSES, BATCH, CHUNK = 2, 4, 10
OPTIONS = {
    "chunk_size": CHUNK, "n_action_steps": CHUNK, "optimizer_lr": 1e-3, "scheduler_decay_lr": 1e-4,
    "scheduler_warmup_steps": 2, "scheduler_decay_steps": 20, "flow_samples": 2,
}  # fmt: skip
MODES = {
    "VLM frozen": {"train_expert_only": True},
    "vision tower frozen": {"train_expert_only": False, "freeze_vision_encoder": True},
    "everything": {"train_expert_only": False, "gradient_checkpointing": True},
}


def member(rank: int, folder: Path, work: Callable[[int], object]) -> None:
    """One process of the group."""
    own, all_of_them = (
        ("RANK", "LOCAL_RANK"),
        ("WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    )  # accelerate reads them, as torchrun's
    os.environ |= dict.fromkeys(own, str(rank)) | dict.fromkeys(all_of_them, str(PROCESSES))
    patch = pytest.MonkeyPatch()
    make_small(patch)
    make_double(patch)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    assert dist.get_world_size() == PROCESSES
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


def in_group(folder: Path, work: Callable[[int], object]) -> list:
    """What `work(rank)` returns in each process of a group, new ones: autograd does not survive a fork."""
    folder.mkdir()
    spawn = multiprocessing.get_context("spawn")
    members = [spawn.Process(target=member, args=(rank, folder, work)) for rank in range(PROCESSES)]
    for process in members:
        process.start()
    for process in members:
        process.join(timeout=500)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in members] == [0] * PROCESSES
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


def batches(steps: int, rank: int | None = None) -> list[dict]:
    """Batches of LeRobot's samples with their index; of a rank, its share of them."""
    found = []
    for step in range(steps):
        batch = make_batch(step % 3, BATCH, CAMERAS[: 1 + step % 2], prompt=(5,), chunk=CHUNK, length=8)
        batch[ACTION] = batch[ACTION].cumsum(dim=1) / 3
        batch["index"] = torch.arange(BATCH) + BATCH * (step % 3)
        share = slice(None) if rank is None else slice(rank * BATCH // PROCESSES, (rank + 1) * BATCH // PROCESSES)
        found.append({key: x[share] for key, x in batch.items()})
    return found


def fresh(**options) -> PI0Policy:
    torch.manual_seed(0)
    return small_policy(**OPTIONS, **options).double()


def state_of(policy: PI0Policy) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in policy.state_dict().items()}


def learn(options: dict, steps: int, rank: int | None = None, find_unused: bool = True) -> dict:
    """Losses and weights of LeRobot's own training step, under accelerate; and what was sent per step."""
    policy = fresh(**options)
    config = policy.config
    kwargs = DistributedDataParallelKwargs(find_unused_parameters=find_unused)
    accelerator = Accelerator(step_scheduler_with_optimizer=False, cpu=True, kwargs_handlers=[kwargs])
    assert accelerator.num_processes == (1 if rank is None else PROCESSES)
    preset = config.get_optimizer_preset()
    optimizer = preset.build(policy.get_optim_params())
    schedule = config.get_scheduler_preset().build(optimizer, 20)
    model, optimizer, schedule = accelerator.prepare(policy, optimizer, schedule)
    sent: list[int] = []
    if rank is not None:
        model.register_comm_hook(sent, count_and_reduce)
    model.train()
    meters = {name: AverageMeter(name) for name in ("loss", "grad_norm", "lr", "update_s")}
    losses = []
    for batch in batches(steps, rank):
        tracker = MetricsTracker(BATCH, 30, 3, meters)
        tracker, _ = update_policy(tracker, model, batch, optimizer, preset.grad_clip_norm, accelerator, schedule)
        losses.append(tracker.loss.val)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    return {"losses": losses, "weights": state_of(policy), "sent": sum(sent) / steps, "trained": trained}


def count_and_reduce(sent: list[int], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's own reduction of gradients, and how many numbers it sends."""
    sent.append(bucket.buffer().numel())
    return dist.algorithms.ddp_comm_hooks.default_hooks.allreduce_hook(dist.group.WORLD, bucket)


def mean_losses(found: list[dict]) -> torch.Tensor:
    return torch.tensor([result["losses"] for result in found], dtype=torch.float64).mean(dim=0)


def assert_same_run(found: list[dict], alone: dict) -> None:
    """Losses and weights of the group are those of one process; in float64, up to the order of sums."""
    expected = torch.tensor(alone["losses"], dtype=torch.float64)
    assert ((mean_losses(found) - expected).abs() / expected).max() < 1e-9
    assert len(set(alone["losses"])) == len(expected)
    start = fresh().state_dict()
    for name, weight in alone["weights"].items():  # gradients of keys' biases are nothing but rounding
        moved = (weight - start[name]).norm()
        for result in found:
            assert (result["weights"][name] - weight).norm() <= 1e-6 * moved + 1e-9, name


def test_two_processes_learn_as_one(double, tmp_path):
    """Catches noise that depends on the process, gradients of another batch, and frozen weights that are sent."""
    alone = learn(MODES["VLM frozen"], 6)
    found = in_group(tmp_path / "group", partial(learn, MODES["VLM frozen"], 6))
    assert_same_run(found, alone)
    assert found[0]["losses"] != found[1]["losses"]  # each has samples of its own
    for result in found:
        assert result["sent"] == result["trained"] < sum(x.numel() for x in alone["weights"].values())


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_mode(double, tmp_path, mode):
    """Catches a mode whose curve differs, and trained weights that a step does not reach: DDP, which is not to look
    for them, would wait for their gradients."""
    alone = learn(MODES[mode], 20)
    found = in_group(tmp_path / "group", partial(learn, MODES[mode], 20, find_unused=False))
    assert_same_run(found, alone)
    for result in found:
        assert result["sent"] == result["trained"]


def shard(policy: PI0Policy) -> None:
    """Spread the weights over the group, a decoder layer at a time: the unit that accelerate's FSDP wraps too."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    model = policy.model
    for layer in (*model.vision.vision_model.encoder.layers, *model.vlm.layers, *model.expert.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)


def learn_sharded(options: dict, steps: int, folder: Path, rank: int | None = None) -> dict:
    """Losses of a run whose weights are spread, and a checkpoint from the gathered ones."""
    policy = fresh(**options).train()
    config = policy.config
    if rank is not None:
        shard(policy)
        assert all(p.to_local().numel() < p.numel() for p in policy.parameters() if p.ndim > 1)
    preset = config.get_optimizer_preset()
    optimizer = preset.build(policy.get_optim_params())
    losses = []
    for batch in batches(steps, rank):
        loss, _ = policy(batch)
        take_step(policy, loss, optimizer, preset)
        policy.update()
        losses.append(loss.item())
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(policy, options=whole)  # of all processes together, given to the first
    if not rank:
        policy.save_pretrained(folder, state_dict=state)
    return {"losses": losses}


@pytest.mark.parametrize(
    ("mode", "steps"),
    [("VLM frozen", 4), *(pytest.param(mode, 8, marks=pytest.mark.slow) for mode in MODES)],
)
def test_sharded_weights(double, tmp_path, mode, steps):
    """Catches a weight that is read outside of the forward pass of its unit, where it is not gathered, and a
    checkpoint that holds a shard."""
    alone = learn_sharded(MODES[mode], steps, tmp_path / "alone")
    found = in_group(tmp_path / "group", partial(learn_sharded, MODES[mode], steps, tmp_path / "sharded"))
    expected = torch.tensor(alone["losses"], dtype=torch.float64)
    assert ((mean_losses(found) - expected).abs() / expected).max() < 1e-9
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("sharded", "alone"))
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in theirs.items()}
    found, expected = (PI0Policy.from_pretrained(tmp_path / name).state_dict() for name in ("sharded", "alone"))
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-6, atol=1e-9, msg=name)


# --- the real command -----------------------------------------------------------------------------------------

STEPS, SAVED = 6, 2
"""Of three steps an epoch. Not at an epoch's end: a run that is resumed there sees the first epoch's order again."""
TINY = ["--policy.type=pi0", "--policy.paligemma_variant=tiny", "--policy.action_expert_variant=tiny"]
KINDS = {
    "float32": TINY,
    "bfloat16": [
        *TINY, "--policy.dtype=bfloat16", "--policy.train_expert_only=true", "--policy.gradient_checkpointing=true",
        "--policy.flow_samples=2", "--policy.augment_images=true", "--policy.ema_decay=0.9",
    ],
    "lora": ["--policy.path={base}", "--peft.method_type=LORA", "--peft.r=4"],
    "cached": [
        "--policy.path={base}", "--policy.train_expert_only=true", "--policy.context_cache={base}/../contexts",
        "--dataset.root={base}/../contexts/dataset",
    ],
}  # fmt: skip
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "lora": 1e-3, "cached": 1e-3}


LAUNCHERS = {
    None: [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"],
    "accelerate": [
        "-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={PROCESSES}", "--num_machines=1",
        "--mixed_precision=no", "--dynamo_backend=no",
    ],
}  # fmt: skip
"""How processes are started. `--multi_gpu` is how accelerate starts several on one machine, on CPUs too."""


def command(*program: str, launcher: str | None = None) -> subprocess.CompletedProcess:
    line = [sys.executable, *LAUNCHERS[launcher], *program]
    return subprocess.run(line, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=500)


def train(*options: str, launcher: str | None = None) -> str:
    """lerobot-train; what it logged."""
    done = command("-m", "lerobot.scripts.lerobot_train", *options, launcher=launcher)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def checkpoint(run: Path, step: int = STEPS) -> Path:
    return run / f"checkpoints/{step:06d}"


def trained(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """What a run has written of its weights."""
    folder = checkpoint(run, step) / "pretrained_model"
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else folder / "model.safetensors")


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A dataset, and a checkpoint for adapters to start from."""
    folder = tmp_path_factory.mktemp("base")
    write_dataset(folder / "data")
    config = tiny_config(cameras=CAMERAS[:2])
    torch.manual_seed(0)
    PI0Policy(config).save_pretrained(folder / "policy")
    for pipeline in make_pi0_pre_post_processors(config, stats()):
        pipeline.save_pretrained(folder / "policy")
    options = [
        f"--policy.path={folder / 'policy'}",
        f"--dataset.root={folder / 'data'}",
        f"--output={folder / 'contexts'}",
    ]
    assert tools.main(["cache", *options]) == 0
    return folder


def options_of(kind: str, base: Path) -> list[str]:
    return [
        "--dataset.repo_id=test/tiny", f"--dataset.root={base / 'data'}", "--policy.device=cpu",
        "--policy.push_to_hub=false", "--num_workers=0", f"--steps={STEPS}", f"--save_freq={SAVED}", "--log_freq=1",
        "--policy.optimizer_lr=1e-3", "--policy.scheduler_warmup_steps=3", "--policy.scheduler_decay_steps=12",
        "--wandb.enable=false", *(option.format(base=base / "policy") for option in KINDS[kind]),
    ]  # fmt: skip


BROKEN = """
import os, sys
import torch
import lerobot_policy_pi0
from lerobot.scripts.lerobot_train import main
from lerobot_pi0 import PI0Policy

forward, calls = PI0Policy.forward, []

def broken(self, batch, *args, **kwargs):
    calls.append(1)
    if (os.environ["RANK"], len(calls)) == ("1", 4):
        batch["action"][0, 0, 0] = torch.nan
    return forward(self, batch, *args, **kwargs)

PI0Policy.forward = broken
main()
"""


@pytest.mark.slow
def test_a_sample_of_one_process_that_is_not_finite(base, tmp_path):
    """Catches a process that waits for ever for another that has stopped, and weights that are written after it."""
    script = tmp_path / "train.py"
    script.write_text(BROKEN)
    options = [*options_of("float32", base), "--batch_size=2", f"--output_dir={tmp_path / 'run'}"]
    done = command(str(script), *options, launcher="torchrun")
    assert done.returncode != 0
    assert "DivergedError: the loss of the dataset's samples" in done.stderr
    assert "action of the batch hold NaN" in done.stderr
    assert [x.name for x in (tmp_path / "run/checkpoints").iterdir() if not x.is_symlink()] == ["000002"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "launcher"), [*((kind, "torchrun") for kind in KINDS), ("float32", "accelerate")])
def test_the_real_command(base, tmp_path, kind, launcher):
    """Catches whatever stands between `torchrun … lerobot-train` and one process's run, and a run in one process that
    is taken for two. Of a run in bfloat16, gradients are rounded to 8 bits before they are summed."""
    common = options_of(kind, base)
    one, two = tmp_path / "one", tmp_path / "two"
    train(*common, "--batch_size=4", f"--output_dir={one}")
    log = train(*common, "--batch_size=2", f"--output_dir={two}", launcher=launcher)
    assert "Effective batch size: 2 x 2 = 4" in log
    counted = json.loads((checkpoint(two) / "training_state" / "training_step.json").read_text())
    assert counted.get("num_processes", counted.get("dp_world_size")) == PROCESSES  # the key of LeRobot 0.6.1, or later
    expected, found = trained(one), trained(two)
    before = flat(trained(one, SAVED))
    assert relative(flat(found) - before, flat(expected) - before) < TOLERANCE[kind]
    moments = [load_file(checkpoint(run) / "training_state/optimizer_state.safetensors") for run in (two, one)]
    assert moments[0].keys() == moments[1].keys()
    assert all(moments[0][name].shape == x.shape for name, x in moments[1].items())
    if kind == "lora":
        return
    assert PI0Policy.from_pretrained(checkpoint(two) / "pretrained_model").config.updates == STEPS
    last = checkpoint(two, SAVED) / "pretrained_model/train_config.json"  # what two began, one can end
    train("--resume=true", f"--config_path={last}", "--batch_size=4")
    assert relative(flat(trained(two)) - before, flat(expected) - before) < TOLERANCE[kind]
