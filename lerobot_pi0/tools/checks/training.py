"""A training run: its first sample, its weights, and the memory of its steps."""

import copy
from collections.abc import Iterable

import torch
from lerobot.datasets.utils import DEFAULT_TASKS_PATH as TASKS

from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.errors import CheckpointError
from ...inputs.observation import ObservationMaker
from .. import ToolError
from ..data import preprocessor_for
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
        ObservationMaker(config)(preprocessor(item), torch.device("cpu"))
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        yield Finding(ERROR, "sample", f"the policy would not take the first frame: {error}", "see the errors above")
        return
    yield Finding(FINE, "sample", "the first frame goes through the processors, and the policy takes it")


def weights(subject: Subject) -> Iterable[Finding]:
    """The checkpoint's tensors are those of the network that the options ask for."""
    source, config = subject.trained.source, subject.config
    if source is None or config.use_peft:
        return
    try:
        Checkpoint.open(source).check(network_parameters(config), config=config)
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
