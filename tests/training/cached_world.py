"""A policy, a dataset and their cached contexts, for tests of `context_cache`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from conftest import CAMERAS, DIMS, shake, stats, tiny_config, write_dataset
from lerobot.datasets import LeRobotDataset
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.policies import make_policy
from torch.utils.data import DataLoader

from lerobot_pi0 import PI0Policy, make_pi0_pre_post_processors
from lerobot_pi0.tools import main
from lerobot_pi0.tools.data import preprocessor_for

CHUNK = 5
EPISODES, FRAMES = 3, 7
SIZES = {"chunk_size": CHUNK, "n_action_steps": CHUNK}


def write_world(folder: Path, seed: int = 0, **options: Any) -> None:
    """A dataset `data` of three tasks, and a policy `base` that fits it."""
    write_dataset(folder / "data", episodes=EPISODES, frames=FRAMES)
    write_policy(folder / "base", seed, **options)


def write_policy(folder: Path, seed: int = 0, **options: Any) -> None:
    config = tiny_config(CAMERAS[:2], DIMS, **SIZES | options)
    torch.manual_seed(seed)
    policy = PI0Policy(config)
    shake(policy, seed)
    policy.save_pretrained(folder)
    for pipeline in make_pi0_pre_post_processors(config, stats()):
        pipeline.save_pretrained(folder)


def cache(world: Path, name: str = "contexts", *more: str) -> int:
    """`lerobot-pi0 cache`; returns its status."""
    return main(
        [
            "cache", f"--policy.path={world / 'base'}", "--policy.device=cpu", "--dataset.repo_id=test/tiny",
            f"--dataset.root={world / 'data'}", f"--output={world / name}", "--num_workers=0", *more,
        ]
    )  # fmt: skip


def run_of(base: Path, root: Path, seed: int = 0, **options: Any) -> tuple[PI0Policy, LeRobotDataset, Any]:
    """A policy in training, the dataset that LeRobot would open for it, and its preprocessor, as lerobot-train does."""
    config = tiny_config(CAMERAS[:2], DIMS, **SIZES | {"train_expert_only": True} | options)
    config.pretrained_path = base
    plain = LeRobotDataset("test/tiny", root=root)
    chunks = resolve_delta_timestamps(config, plain.meta)
    dataset = LeRobotDataset("test/tiny", root=root, delta_timestamps=chunks, return_uint8=True)
    torch.manual_seed(seed)
    policy = make_policy(config, ds_meta=dataset.meta).train()
    return policy, dataset, preprocessor_for(config, dataset.meta.stats, {})


def batches(dataset: LeRobotDataset, preprocessor: Any, size: int) -> Iterator[dict[str, Any]]:
    for batch in DataLoader(dataset, batch_size=size):
        yield preprocessor(batch)


def step(policy: PI0Policy, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a batch under the autocast that accelerate puts around a step, and its gradients."""
    policy.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=policy.config.dtype == "bfloat16"):
        loss, _ = policy.forward(batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def norm(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([g.norm() for g in gradients.values()]).norm()
