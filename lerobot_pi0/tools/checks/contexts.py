"""Whether cached contexts (`context_cache`) are whole, and those of this policy and dataset."""

from collections.abc import Iterable
from dataclasses import asdict

import numpy as np
import torch
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE

from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.errors import CheckpointError
from ...checkpoints.names import VLM
from ...checkpoints.reading import read_tensors
from ...training.context_store import DATASET, ContextCache, ContextCacheError, compare
from ..cache import spread
from ..data import preprocessor_for
from ..show import network_parameters
from .subject import ERROR, FINE, Finding, Subject


def contexts(subject: Subject) -> Iterable[Finding]:
    """The contexts that `--policy.context_cache` names; the dataset is the recorded one."""
    config, source = subject.config, subject.trained.source
    if not config.context_cache:
        return
    again = "`lerobot-pi0 cache` makes them for these options"
    if source is None:
        yield Finding(ERROR, "contexts", "a VLM without weights has no contexts", "give --policy.pretrained_path")
        return
    try:
        cache = ContextCache(config.context_cache)
        own = {
            "cameras": [key for key in config.image_features if key in subject.cameras],
            "dataset_frames": len(subject.columns.episode),
        }
        compare(cache.folder, asdict(cache.manifest), own)
        weights = {name: p.detach() for name, p in network_parameters(config).items() if name.startswith(VLM)}
        checkpoint = Checkpoint.open(source, revision=config.pretrained_revision)
        cache.check(config, read_tensors(weights, checkpoint.tensors, weights))
        check_prompts(subject, cache)
    except (CheckpointError, ContextCacheError) as error:
        yield Finding(ERROR, "contexts", str(error), again)
        return
    frames, every = cache.manifest.frames, cache.manifest.every
    yield Finding(
        FINE, "contexts", f"{frames} contexts, every={every}, are this policy's and this dataset's: train with "
        f"--dataset.root={cache.folder / DATASET}",
    )  # fmt: skip


def check_prompts(subject: Subject, cache: ContextCache) -> None:
    """Compare the tokens of all cached frames with those that training's preprocessor makes of the dataset's tasks.

    Raises:
        ContextCacheError: a prompt differs; the message shows the first.
    """
    columns = subject.columns
    tasks = columns.task[spread(columns.episode, cache.manifest.every)]
    words = {int(i): str(task) for task, i in subject.dataset.meta.tasks["task_index"].items()}
    numbers, which = np.unique(tasks, return_inverse=True)
    preprocessor = preprocessor_for(subject.config, subject.stats, subject.rename_map)
    state = torch.from_numpy(columns.state_ND[0]).float()
    made = [preprocessor({OBS_STATE: state, "task": words[i]}) for i in numbers.tolist()]
    tokens, mask = (
        torch.cat([x[key] for x in made])[which] for key in (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK)
    )
    cache.check_prompts(range(len(tasks)), tokens, mask.bool())
