"""Runs and numbers that version 0.1.0 left behind, and how to make them again: shared by `make.py`, which ran with the
code of 0.1.0, and by the tests, which run today's.

So only names appear here that both versions have: the three that `lerobot_pi0` exports, the options, the parameters'
published names and the methods that LeRobot calls. Weights, images and joints come from NumPy's generator, whose
numbers do not depend on the CPU, and images have the size that the network sees: how pictures are resized is not what
is compared.

Axes: B batch, K flow samples, T steps of a chunk, A action dims.
"""

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from accelerate.state import AcceleratorState
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.datasets import LeRobotDataset
from lerobot.policies import make_pre_post_processors
from lerobot.scripts import lerobot_train
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"
ROOT = "{root}"
"""Stands in the files for the folder in which the runs were made; 0.1.0 writes absolute paths."""

DIMS, CHUNK, WIDEST = 6, 10, 8
STEPS, SAVED = 7, 3
"""A run has 7 steps; its checkpoint is of the 3rd."""

TINY = ["--policy.type=pi0", "--policy.paligemma_variant=tiny", "--policy.action_expert_variant=tiny",
        f"--policy.chunk_size={CHUNK}", f"--policy.n_action_steps={CHUNK}", f"--policy.max_state_dim={WIDEST}",
        f"--policy.max_action_dim={WIDEST}"]  # fmt: skip
TUNED = ["--policy.path={root}/base"]
FROZEN = [*TUNED, "--policy.train_expert_only=true"]
RUNS = {
    "all": TINY,
    "frozen": FROZEN,
    "bfloat16": [*FROZEN, "--policy.dtype=bfloat16", "--policy.flow_samples=2"],
    "lora": [*TUNED, "--peft.method_type=LORA", "--peft.r=4"],
    "average": [*FROZEN, "--policy.ema_decay=0.9"],
    "openpi": [*FROZEN, "--policy.recipe=openpi"],
    "8bit": [*FROZEN, "--policy.optimizer_8bit=true"],
    "8bit_average": [*FROZEN, "--policy.optimizer_8bit=true", "--policy.ema_decay=0.9"],
    "expert_only": [*FROZEN, "--policy.save_expert_only=true"],
    "int8": [*FROZEN, "--policy.save_expert_only=true", "--policy.vlm_quantization=int8"],
}
"""Options of lerobot-train by the name of the run."""


# --- a small π₀, its data ---------------------------------------------------------------------------------------


@contextmanager
def sizes(package: str, preset: str, expert_preset: str, vision: dict, vlm: dict, expert: dict, vocab: int) -> Iterator:
    """Let two presets have these sizes. Their classes are not named: they may have other names one day."""
    config = sys.modules[f"{package}.configuration_pi0"]
    whole, stack = config.PALIGEMMA_PRESETS[preset], config.EXPERT_PRESETS[expert_preset]
    whole = replace(whole, vision=replace(whole.vision, stem=(), **vision), gemma=replace(whole.gemma, **vlm))
    with (
        mock.patch.dict(config.PALIGEMMA_PRESETS, {preset: replace(whole, vocab_size=vocab)}),
        mock.patch.dict(config.EXPERT_PRESETS, {expert_preset: replace(stack, **expert)}),
    ):
        yield


def micro(package: str = "lerobot_pi0", expert_mlp: int = 24):
    """The preset `tiny` made smaller still."""
    attention = {"depth": 2, "heads": 2, "head_dim": 8}
    vision = {"width": 8, "depth": 1, "mlp_dim": 8, "heads": 1, "patch_size": 8, "image_size": 16}
    stacks = {"width": 8, "mlp_dim": 16} | attention, {"width": 16, "mlp_dim": expert_mlp} | attention
    return sizes(package, "tiny", "tiny", vision, *stacks, 384)


def small(package: str = "lerobot_pi0"):
    """`gemma_2b` and `gemma_300m` made small, with the eight heads of the real ones."""
    attention = {"depth": 3, "heads": 8, "head_dim": 16}
    vision = {"width": 32, "depth": 2, "mlp_dim": 48, "heads": 4, "patch_size": 8, "image_size": 32}
    stacks = {"width": 48, "mlp_dim": 64} | attention, {"width": 32, "mlp_dim": 40} | attention
    return sizes(package, "gemma_2b", "gemma_300m", vision, *stacks, 300)


def normal(*shape: int, seed: int) -> Tensor:
    """Normal numbers, float32; the same everywhere."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def uniform(*shape: int, seed: int) -> Tensor:
    """Numbers from 0 to 1, float32; the same everywhere."""
    return torch.from_numpy(np.random.default_rng(seed).random(shape).astype(np.float32))


@torch.no_grad()
def put_weights(policy: nn.Module) -> None:
    """Give every parameter numbers that depend on its place in the order of names and on its shape."""
    for seed, (name, p) in enumerate(sorted(policy.named_parameters())):
        x = normal(*p.shape, seed=seed)
        if p.ndim > 1:
            x *= p[0].numel() ** -0.5
        else:
            x *= 0.1
            x += float("vision_tower" in name and "norm" in name and name.endswith("weight"))
        p.copy_(x)


def features(cameras: int, side: int) -> dict:
    """Config arguments of a robot with so many cameras."""
    names = ("front", "left", "wrist")[:cameras]
    visual = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, side, side)) for name in names}
    return {
        "input_features": visual | {OBS_STATE: PolicyFeature(FeatureType.STATE, (DIMS,))},
        "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (DIMS,))},
    }


def write_dataset(root: Path) -> None:
    """Two episodes of six random frames, with images of the size that the network sees."""
    vector = {"dtype": "float32", "shape": (DIMS,), "names": [f"joint_{i}" for i in range(DIMS)]}
    image = {"dtype": "image", "shape": (16, 16, 3), "names": ["height", "width", "channels"]}
    columns = {OBS_STATE: vector, ACTION: vector, "observation.images.front": image}
    dataset = LeRobotDataset.create("test/v010", fps=10, features=columns, root=root, use_videos=False)
    draw = np.random.default_rng(0)
    for episode in range(2):
        for _ in range(6):
            joints = {key: draw.standard_normal(DIMS).astype(np.float32) * 30 for key in (OBS_STATE, ACTION)}
            picture = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            dataset.add_frame(joints | {"observation.images.front": picture, "task": f"reach cube {episode}"})
        dataset.save_episode()
    dataset.finalize()


def write_base(folder: Path, dataset_root: Path) -> None:
    """The checkpoint that the runs begin with."""
    from lerobot_pi0 import PI0Config, PI0Policy

    config = PI0Config(
        **features(1, 16), paligemma_variant="tiny", action_expert_variant="tiny", device="cpu", chunk_size=CHUNK,
        n_action_steps=CHUNK, max_state_dim=WIDEST, max_action_dim=WIDEST, save_tokenizer=False,
    )  # fmt: skip
    policy = PI0Policy(config)
    put_weights(policy)
    policy.save_pretrained(folder)
    statistics = LeRobotDataset("test/v010", root=dataset_root).meta.stats
    for pipeline in make_pre_post_processors(config, dataset_stats=statistics):
        pipeline.save_pretrained(folder)


# --- runs -------------------------------------------------------------------------------------------------------


def size_of(run: str):
    """Sizes of a run: the optimizer with 8 bits leaves weights of fewer than 4096 numbers alone."""
    return micro(expert_mlp=256 if run.startswith("8bit") else 24)


def base_of(run: str) -> str:
    """Name of the checkpoint that a run begins with."""
    return "base_wide" if run.startswith("8bit") else "base"


def train(*arguments: str) -> list[float]:
    """Call lerobot-train's main() and return the losses of its steps."""
    from lerobot_pi0 import PI0Policy

    losses, forward = [], PI0Policy.forward

    def recorded(self, *args, **kwargs):
        loss, info = forward(self, *args, **kwargs)
        losses.append(float(loss.detach()))
        return loss, info

    AcceleratorState._reset_state(reset_partial_state=True)  # runs of another precision share this process
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    try:
        with (
            mock.patch.object(PI0Policy, "forward", recorded),
            mock.patch.object(sys, "argv", ["lerobot-train", *arguments]),
        ):
            lerobot_train.main()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        logging.getLogger().handlers[:] = handlers  # LeRobot sets up a log of its own
        logging.getLogger().setLevel(level)
    return losses


def begin(run: str, root: Path) -> list[float]:
    """The whole run, with a checkpoint on the way: losses."""
    options = [option.replace(f"{ROOT}/base", f"{root}/{base_of(run)}") for option in RUNS[run]]
    return train(
        "--dataset.repo_id=test/v010", f"--dataset.root={root}/dataset", "--policy.device=cpu",
        "--policy.push_to_hub=false", "--batch_size=2", "--num_workers=0", f"--steps={STEPS}", f"--save_freq={SAVED}",
        "--log_freq=1", "--policy.optimizer_lr=1e-3", "--policy.scheduler_warmup_steps=2",
        f"--policy.scheduler_decay_steps={STEPS}", "--wandb.enable=false", f"--output_dir={root}/runs/{run}", *options,
    )  # fmt: skip


def checkpoint(run: str, root: Path) -> Path:
    """Folder of the run's checkpoint."""
    return root / "runs" / run / "checkpoints" / f"{SAVED:06d}"


def resume(run: str, root: Path) -> list[float]:
    """Resume the run at its checkpoint: the losses of what follows."""
    config = checkpoint(run, root) / "pretrained_model" / "train_config.json"
    return train("--resume=true", f"--config_path={config}")


def load(folder: Path) -> nn.Module:
    """The policy of a checkpoint or of an adapter, as LeRobot loads it for a robot."""
    from lerobot_pi0 import PI0Policy

    config = PreTrainedConfig.from_pretrained(folder)
    if not config.use_peft:
        return PI0Policy.from_pretrained(folder)
    config.pretrained_path = folder
    adapter = PeftConfig.from_pretrained(folder)
    policy = PI0Policy.from_pretrained(adapter.base_model_name_or_path, config=config)
    return PeftModel.from_pretrained(policy, folder, config=adapter).eval()


def act(folder: Path) -> Tensor:
    """A chunk in the robot's units for a fixed observation and fixed noise, (1, T, A): processors and policy."""
    policy = load(folder)
    overrides = {"device_processor": {"device": "cpu"}}
    before, after = make_pre_post_processors(
        policy.config, pretrained_path=str(folder), preprocessor_overrides=overrides
    )
    observation = {
        OBS_STATE: normal(DIMS, seed=11) * 30,
        "observation.images.front": uniform(3, 16, 16, seed=12),
        "task": "reach cube 1",
    }
    return after(policy.predict_action_chunk(before(observation), noise=normal(1, CHUNK, WIDEST, seed=13)))


def move(folder: Path, old: str, new: str) -> None:
    """Replace a folder's name in all JSON files below `folder`, as after a move to another place."""
    for file in folder.rglob("*.json"):
        file.write_text(file.read_text().replace(old, new))


def unpack(root: Path) -> None:
    """Put the runs of 0.1.0, the checkpoints that they began with and their dataset into `root`."""
    shutil.copytree(DATA, root, dirs_exist_ok=True)
    move(root, ROOT, str(root))
    write_dataset(root / "dataset")


# --- numbers of the network -------------------------------------------------------------------------------------

STATISTICS = {
    key: {"mean": torch.zeros(DIMS), "std": torch.ones(DIMS), "min": -torch.ones(DIMS), "max": torch.ones(DIMS)}
    for key in (OBS_STATE, ACTION)
}


def make_batch() -> dict[str, Tensor]:
    """What the preprocessor would hand to the policy: three cameras, prompts of 9 and 5 tokens."""
    images = {key: uniform(2, 3, 32, 32, seed=20 + i) for i, key in enumerate(features(3, 32)["input_features"])}
    del images[OBS_STATE]
    return images | {
        OBS_STATE: normal(2, DIMS, seed=30),
        ACTION: normal(2, 50, DIMS, seed=31),
        OBS_LANGUAGE_TOKENS: torch.from_numpy(np.random.default_rng(32).integers(1, 300, (2, 12))),
        OBS_LANGUAGE_ATTENTION_MASK: torch.arange(12) < torch.tensor([[9], [5]]),
    }


def make_small(package: str, training: bool, dtype: str, **options) -> nn.Module:
    """A policy of the size `small`, with weights in the dtypes of training or of control."""
    module = sys.modules[package]
    config = module.PI0Config(
        **features(3, 32), device="cpu", dtype=dtype, image_resolution=(32, 32), tokenizer_max_length=12, **options
    )
    policy = module.PI0Policy(config, **({"dataset_stats": STATISTICS} if training else {}))
    put_weights(policy)
    return policy.train(training)


def losses_and_gradients(policy: nn.Module, samples: int = 1) -> dict[str, Tensor]:
    """The loss of each sample and the gradient of each trained parameter, by name."""
    noise, time = normal(2, samples, 50, 32, seed=40), uniform(2, samples, seed=41) * 0.99 + 0.005
    with torch.autocast("cpu", torch.bfloat16, enabled=policy.config.dtype == "bfloat16"):  # accelerate's
        losses, _ = policy.forward(make_batch(), reduction="none", noise=noise, time=time)
    losses.mean().backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return {"losses": losses.detach()} | gradients


def chunk(policy: nn.Module, **known) -> dict[str, Tensor]:
    """A chunk from fixed noise, normalised, (B, T, A)."""
    return {"chunk": policy.predict_action_chunk(make_batch(), noise=normal(2, 50, 32, seed=42), **known)}


def trained(samples: int = 1, **options) -> Callable[[str, str, Path], dict[str, Tensor]]:
    """A setting that trains."""

    def setting(package: str, dtype: str, folder: Path) -> dict[str, Tensor]:
        policy = make_small(package, True, dtype, flow_samples=samples, **options)
        return losses_and_gradients(policy, samples)

    return setting


def guided(mode: str | None, **options) -> Callable[[str, str, Path], dict[str, Tensor]]:
    """A setting that makes a chunk; with a mode of real-time chunking it continues another one."""

    def setting(package: str, dtype: str, folder: Path) -> dict[str, Tensor]:
        from lerobot.policies.rtc.configuration_rtc import RTCConfig

        if mode is None:
            return chunk(make_small(package, False, dtype, **options))
        most = 5 if mode == "trained" else None
        rtc = {"rtc_config": RTCConfig(execution_horizon=10), "rtc_guidance": mode, "rtc_training_max_delay": most}
        left = {"prev_chunk_left_over": normal(2, 20, DIMS, seed=43), "inference_delay": 3}
        return chunk(make_small(package, False, dtype, **rtc), **left)

    return setting


def rounded(training: bool) -> Callable[[str, str, Path], dict[str, Tensor]]:
    """A setting with the VLM in int8, which is rounded when a checkpoint is loaded."""

    def setting(package: str, dtype: str, folder: Path) -> dict[str, Tensor]:
        module, place = sys.modules[package], folder / f"{package}-{dtype}"
        if not place.exists():
            make_small(package, False, dtype).save_pretrained(place)
        config = PreTrainedConfig.from_pretrained(place)
        config.device, config.vlm_quantization, config.train_expert_only = "cpu", "int8", True
        config.save_expert_only = True
        statistics = STATISTICS if training else None
        policy = module.PI0Policy.from_pretrained(place, config=config, dataset_stats=statistics).train(training)
        return losses_and_gradients(policy) if training else chunk(policy)

    return setting


SETTINGS = {
    "frozen": trained(train_expert_only=True),
    "all": trained(train_expert_only=False),
    "K = 3": trained(3, train_expert_only=False),
    "gradient checkpointing": trained(train_expert_only=False, gradient_checkpointing=True),
    "int8, training": rounded(True),
    "chunk": guided(None),
    "rtc vjp": guided("vjp"),
    "rtc identity": guided("identity"),
    "rtc trained": guided("trained"),
    "int8, chunk": rounded(False),
}
"""By name: (package, dtype, an empty folder) -> tensors by name. To be called inside `small(package)`."""


def numbers(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
    """What of a setting's tensors is kept in a file: losses and chunks whole, of gradients their norms by name."""
    return {
        name: (x if name in ("losses", "chunk") else x.norm()[None]).double().flatten().tolist()
        for name, x in tensors.items()
    }


def write_json(file: Path, content: dict) -> None:
    """Floats as hexadecimal: bit for bit."""
    file.write_text(json.dumps(content, indent=0, default=str) + "\n")
