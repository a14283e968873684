"""A training run: its first sample, its weights, and the memory of its steps."""

import copy
from collections.abc import Iterable

import numpy as np
import torch
from lerobot.datasets.utils import DEFAULT_TASKS_PATH as TASKS
from lerobot.utils.constants import OBS_ENV_STATE

from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.errors import CheckpointError
from ...inputs.features import padded, unread_features
from ...inputs.observation import ObservationMaker
from .. import ToolError
from ..data import preprocessor_for, some
from ..recording import PictureError
from ..show import network_parameters
from .subject import ERROR, FINE, WARNING, Finding, Subject


def one_batch(subject: Subject) -> Iterable[Finding]:
    """One sample goes through the processors and is accepted by the policy, weights apart."""
    if subject.trained.tokenizer is None or TASKS in {damage.file for damage in subject.dataset.damage}:
        return
    config = subject.config
    try:
        item = subject.dataset.first_item()
    except PictureError:  # which `images` reports
        return
    try:
        preprocessor = preprocessor_for(config, subject.stats, subject.rename_map)
        observe = ObservationMaker(config)
        observe.padded = padded(config, subject.stats)
        observe(preprocessor(item), torch.device("cpu"))
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        yield Finding(ERROR, "sample", f"the policy would not take the first frame: {error}", "see the errors above")
        return
    yield Finding(FINE, "sample", "the first frame goes through the processors, and the policy takes it")


MANY_PIXELS = 500_000
"""Pixels that a sample decodes in vain, from which on reading is slow: about 15 ms of a CPU core."""


def reading(subject: Subject) -> Iterable[Finding]:
    """Whether LeRobot's reader decodes more pictures than it uses: of images, those of all steps of a chunk.

    Videos are decoded at the times that are asked for, and chunks of a context cache need no other frame.
    """
    features, chunk = subject.dataset.meta.features, len(subject.config.action_delta_indices or ())
    stored = [key for key in subject.dataset.cameras if features[key]["dtype"] == "image"]
    if not stored or chunk < 2:
        return
    message = (
        f"pictures of {some(stored)} are stored as images: to get the {chunk} actions of a chunk, LeRobot's reader "
        f"decodes them {chunk} times for each sample"
    )
    if chunk * sum(np.prod(features[key]["shape"][:2]) for key in stored) < MANY_PIXELS:
        yield Finding(FINE, "reading", f"{message}, which is quick with these small ones")
        return
    yield Finding(
        WARNING, "reading", message,
        "store them as videos: lerobot-edit-dataset --operation.type=convert_image_to_video "
        "--operation.output_dir=FOLDER (--operation.rgb_encoder.crf=12 keeps small things sharp). Or train with "
        "--dataset.streaming=true --num_workers=1, which decodes each once, but shuffles only 1000 neighbours",
    )  # fmt: skip


def stream(subject: Subject) -> Iterable[Finding]:
    """Whether LeRobot's stream can read the videos: it counts frames as if a camera had one file of video."""
    meta = subject.dataset.meta
    for key in meta.video_keys:
        found = (meta.video(episode, key) for episode in np.unique(subject.columns.episode).tolist())
        if (files := len({each[0] for each in found if each is not None})) > 1:
            message = (
                f"pictures of {key} are in {files} files of video. LeRobot's default reader finds them; its stream "
                "(--dataset.streaming=true) looks for them at wrong times, and stops with 'Invalid frame index'"
            )
            yield Finding(FINE, "reading", message)


def unread(subject: Subject) -> Iterable[Finding]:
    """What the dataset holds and π₀ has no input for."""
    if keys := unread_features(subject.config, subject.dataset.meta.features):
        simulated = (
            ". A small network learns sooner where to look if it has to tell the environment state in training: "
            "--policy.environment_state_weight=0.1, which --policy.recipe=small sets"
        )
        yield Finding(
            WARNING, "features", f"{some(keys)} not read: π₀ sees cameras, state and instruction",
            "nothing to do if the policy is to act on what it sees; else record these numbers in observation.state"
            + (simulated if OBS_ENV_STATE in keys else ""),
        )  # fmt: skip


def weights(subject: Subject) -> Iterable[Finding]:
    """The checkpoint's tensors are those of the network that the options ask for."""
    source, config = subject.trained.source, subject.config
    if source is None or config.use_peft:
        return
    try:
        Checkpoint.open(source, revision=config.pretrained_revision).check(network_parameters(config), config=config)
    except CheckpointError as error:
        yield Finding(ERROR, "weights", str(error), "training would stop with the same message")
        return
    yield Finding(FINE, "weights", f"names and shapes of {source}'s tensors are the network's")


def memory(subject: Subject) -> Iterable[Finding]:
    """Whether a step of training fits the card."""
    if subject.card_gb is None:
        return
    from ..plan import (
        GIB,
        RESERVE_GB,
        counted,
        dataset_load,
        largest_batch,
    )  # the network, which no other question needs

    config, batch, tokenizer = copy.deepcopy(subject.config), subject.batch_size, subject.trained.tokenizer
    shapes = [subject.dataset.meta.features[key]["shape"] for key in subject.cameras.values()]
    load = dataset_load(config, shapes, list(subject.dataset.meta.tasks.index), tokenizer)
    try:
        counts, trained = counted(config, load, batch)
    except ToolError as error:
        yield Finding(WARNING, "memory", str(error), "try the batch size in a short run")
        return
    largest = largest_batch(counts, (subject.card_gb - RESERVE_GB) * GIB)
    takes = (
        f"a step of {batch} samples that trains {trained / 1e6:.1f} M weights takes {counts[batch].peak / GIB:.1f} GiB "
        f"at its peak, of {subject.card_gb:g}; {RESERVE_GB:g} of them stay free for CUDA and kernels"
    )
    if batch <= largest:
        yield Finding(FINE, "memory", f"{takes}; the largest batch is {largest}")
        return
    less = f"--batch_size={largest}, or " if largest else ""
    remedy = (
        f"{less}--policy.gradient_checkpointing=true, --policy.train_expert_only=true, --policy.dtype=bfloat16, "
        "--policy.optimizer_8bit=true; `lerobot-pi0 plan` lists what fits, LoRA too"
    )
    yield Finding(ERROR, "memory", takes, remedy)
