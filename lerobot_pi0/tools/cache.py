"""`lerobot-pi0 cache`: compute the contexts of a dataset's frames once, so that training needs no VLM.

    lerobot-pi0 cache --policy.type=pi0 --policy.pretrained_path=lerobot/pi0_base --policy.dtype=bfloat16 \\
        --dataset.repo_id=you/cubes --output=contexts
    lerobot-train --policy.type=pi0 --policy.pretrained_path=lerobot/pi0_base --policy.dtype=bfloat16 \\
        --policy.context_cache=contexts --dataset.repo_id=you/cubes --dataset.root=contexts/dataset
    lerobot-pi0 cache --policy.path=you/pi0_cubes --dataset.repo_id=you/cubes --gb=100

A context is what the VLM makes of the pictures and the prompt of a frame: keys and values of each layer. A frozen VLM
makes the same ones in every epoch. The folder gets a record for each frame, and a LeRobot dataset of these frames
without pictures, on which `lerobot-train` then trains the expert. A command that was interrupted goes on where it
stopped when it is given again.
"""

import logging
import math
import shlex
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDataset
from lerobot.policies import make_policy
from lerobot.utils.collate import lerobot_collate_fn
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..checkpoints.writing import locked
from ..configuration_pi0 import PI0Config
from ..kernels.cuda_attention import attention_order
from ..network.attention import KVCache
from ..training.context_store import (
    DATASET,
    ContextCacheError,
    ContextWriter,
    Manifest,
    context_shape,
    digest_of_vlm,
    made_from,
    pack,
)
from . import ToolError
from .cached_dataset import write_dataset
from .data import DatasetOptions, need_pi0, need_whole, open_dataset, open_meta, preprocessor_for
from .folder import Columns, short

logger = logging.getLogger(__name__)

GB = 10**9


@dataclass
class Options:
    """Compute contexts and write them into a folder."""

    dataset: DatasetOptions
    # The policy, as lerobot-train will get it: --policy.type=pi0 --policy.pretrained_path=CHECKPOINT, or --policy.path.
    policy: PreTrainedConfig | None = None
    # Folder for the contexts and their dataset.
    output: Path = Path("contexts")
    # Every n-th frame of an episode; by default all of them, or as many as fit --gb.
    every: int | None = None
    # Disk space for the contexts, in units of 10⁹ bytes, where --every is not given.
    gb: float = 100.0
    # 8: half the space of bfloat16, rounded. By default contexts are stored as they were computed.
    bits: int | None = None
    # Frames at a time.
    batch_size: int = 8
    # Processes that decode pictures.
    num_workers: int = 2
    # Renamed cameras, as lerobot-train takes it: {dataset's key: policy's key}.
    rename_map: dict[str, str] = field(default_factory=dict)


def run(options: Options) -> None:
    """Compute what is missing.

    Raises:
        CheckpointError: the policy cannot be loaded.
        ToolError: the dataset cannot be read, the folder holds other contexts, or the disk is too small.
    """
    config = checked(options)
    meta = open_meta(options.dataset)
    need_whole(meta)
    dataset, recording = open_dataset(options.dataset, meta, return_uint8=True)
    columns = recording.columns
    device, config.device = torch.device(str(config.device)), "cpu"  # the VLM alone goes to the device
    try:
        policy = make_policy(config, ds_meta=dataset.meta, rename_map=options.rename_map).eval()
        preprocessor = preprocessor_for(config, dataset.meta.stats, options.rename_map)
        known, rows = planned(options, config, dataset, columns, preprocessor)
        manifest = Manifest(**known, vlm_digest=digest_of_vlm(policy.origin.digests))
        check_disk(options.output, manifest)
        options.output.mkdir(parents=True, exist_ok=True)
        with locked(options.output):
            writer = ContextWriter(options.output, manifest)
            write_dataset(options.output / DATASET, dataset, columns, rows, writer.manifest)
            policy.model.paligemma.to(device)
            fill(writer, policy, preprocessor, dataset, rows, options.num_workers, device)
    except (ContextCacheError, OSError, ValueError) as error:
        raise ToolError(str(error)) from error
    logger.info(
        "%d contexts are in %s. Train on them: lerobot-train … --policy.context_cache=%s --dataset.root=%s",
        manifest.frames, *(shlex.quote(str(x)) for x in (options.output, options.output, options.output / DATASET)),
    )  # fmt: skip


def checked(options: Options) -> PI0Config:
    """The options of the policy, as training on contexts settles them.

    Raises:
        ToolError: something cannot be cached.
    """
    config = need_pi0(options.policy)
    if config.pretrained_path is None:
        raise ToolError("a VLM without weights has no contexts: give --policy.pretrained_path or --policy.path")
    if config.use_peft:
        raise ToolError("an adapter may change the VLM: merge it first (examples/merge_adapter.py), and cache that")
    if config.vlm_quantization:
        raise ToolError("contexts are those of the VLM itself: leave --policy.vlm_quantization out")
    if options.dataset.episodes is not None:
        raise ToolError("all episodes are cached: choose among them with lerobot-train --dataset.episodes")
    if options.bits not in (None, 8):
        raise ToolError(f"--bits={options.bits}: give 8, or leave it out")
    for name, value in (("every", options.every), ("batch_size", options.batch_size)):
        if value is not None and value < 1:
            raise ToolError(f"--{name}={value} has to be at least 1")
    config.train_expert_only = config.save_expert_only = True
    config.augment_images = config.compile_model = False
    config.augment_shift = 0
    return config


def planned(
    options: Options, config: PI0Config, dataset: LeRobotDataset, columns: Columns, preprocessor: Any
) -> tuple[dict[str, Any], np.ndarray]:
    """The manifest but for the digest of the VLM, and the frames to compute.

    Raises:
        ToolError: not even a frame of each episode fits.
    """
    sample = {key: x for key, x in dataset[0].items() if key != ACTION}
    batches = [preprocessor({**sample, "task": task}) for task in dataset.meta.tasks.index]
    cameras = [key for key in config.image_features if key in batches[0]]
    known = made_from(config) | {
        "cameras": cameras,
        "bits": options.bits,
        "image_tokens": context_shape(config, len(cameras), prompt=0)[2],
        "prompt_tokens": max(int(batch[OBS_LANGUAGE_ATTENTION_MASK].sum()) for batch in batches),
        "batch_size": options.batch_size,
        "dataset": options.dataset.repo_id,
        "dataset_frames": len(columns.episode),
        "checkpoint": str(config.pretrained_path),
    }
    size = Manifest(**known, vlm_digest="", frames=1, every=1).record_bytes
    every = options.every or fitting(columns.episode, int(options.gb * GB // size))
    rows = spread(columns.episode, every)
    logger.info(
        "%d of %d frames (every=%d), %.2f MB each: %.1f GB", len(rows), len(columns.episode), every, size / 1e6,
        len(rows) * size / GB,
    )  # fmt: skip
    return known | {"frames": len(rows), "every": every}, rows


def spread(episode: np.ndarray, every: int) -> np.ndarray:
    """Every n-th frame of each episode; episodes begin with another one each, so that together they miss no phase."""
    chosen = []
    for i, number in enumerate(np.unique(episode)):
        mine = np.flatnonzero(episode == number)
        chosen.append(mine[i % min(every, len(mine)) :: every])
    return np.concatenate(chosen)


def fitting(episode: np.ndarray, most: int) -> int:
    """The smallest `every` with which there are at most so many frames.

    Raises:
        ToolError: there is none.
    """
    longest = int(np.unique(episode, return_counts=True)[1].max())
    every = max(1, math.ceil(len(episode) / max(most, 1)))
    while every < longest and len(spread(episode, every)) > most:
        every += 1
    if len(spread(episode, every)) > most:
        raise ToolError(f"--gb is room for {most} frames, which is less than one of each episode: give more")
    return every


def check_disk(folder: Path, manifest: Manifest) -> None:
    """Raises ToolError where the disk has no room for what is missing."""
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    begun = sum(getattr(file.stat(), "st_blocks", 0) * 512 for file in folder.glob("*.bin"))
    needed, free = manifest.frames * manifest.record_bytes - begun, shutil.disk_usage(there).free
    if needed > free:
        raise ToolError(
            f"{folder} needs {needed / GB:.1f} GB more, and {free / GB:.1f} are free: give --output on another disk, "
            "--bits=8, or a larger --every"
        )


def fill(
    writer: ContextWriter,
    policy: Any,
    preprocessor: Any,
    dataset: LeRobotDataset,
    rows: np.ndarray,
    workers: int,
    device: torch.device,
) -> None:
    """Compute the records that are not there yet, always in the same batches, and say how long it will take.

    Raises:
        ToolError: a picture cannot be decoded.
    """
    size = writer.manifest.batch_size
    starts = [
        start for start in range(0, len(rows), size)
        if not all(writer.is_whole(slot) for slot in range(start, min(start + size, len(rows))))
    ]  # fmt: skip
    loader = DataLoader(
        dataset,
        batch_sampler=[rows[start : start + size].tolist() for start in starts],
        num_workers=workers,
        collate_fn=lerobot_collate_fn if dataset.meta.has_language_columns else None,
    )
    missing = sum(len(rows[start : start + size]) for start in starts)
    with tqdm(total=len(rows), initial=len(rows) - missing, desc="contexts", unit="frame") as progress:
        for start, batch in zip(starts, decoded(loader), strict=True):
            prefix, mask, tokens = contexts(policy, preprocessor(batch), device)
            writer.write(start, pack(prefix, mask, writer.manifest), tokens.int().cpu().numpy())
            progress.update(len(tokens))
    writer.close()


def decoded(loader: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Batches without actions, whose frames LeRobot has decoded."""
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:  # what decoders raise for damaged data has many types
            raise ToolError(
                f"a frame cannot be read ({short(error)}); `lerobot-pi0 check` says what is wrong"
            ) from error
        yield {key: x for key, x in batch.items() if key != ACTION}


@torch.no_grad()
def contexts(policy: Any, batch: dict[str, Any], device: torch.device) -> tuple[list[KVCache], Tensor, Tensor]:
    """Keys and values as a training step computes them, which tokens exist (B, S), and the prompts, -1 on padding."""
    obs = policy.observe(batch, device)
    rounds = policy.config.dtype == "bfloat16"
    with torch.autocast(device.type, torch.bfloat16, enabled=rounds), attention_order(device):
        prefix, mask = policy.model.encode_prefix(obs)
    return list(prefix), mask, torch.where(obs.token_mask_BL, obs.tokens_BL, -1)
