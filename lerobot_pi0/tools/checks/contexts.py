"""Whether cached contexts (`context_cache`) are whole, and those of this policy and dataset."""

from collections.abc import Iterable
from dataclasses import asdict

from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.errors import CheckpointError
from ...checkpoints.names import VLM
from ...checkpoints.reading import read_tensors
from ...training.context_store import DATASET, ContextCache, ContextCacheError, compare
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
        cache.check(config, read_tensors(weights, Checkpoint.open(source).tensors, weights))
    except (CheckpointError, ContextCacheError) as error:
        yield Finding(ERROR, "contexts", str(error), again)
        return
    frames, every = cache.manifest.frames, cache.manifest.every
    yield Finding(
        FINE, "contexts", f"{frames} contexts, every={every}, are this policy's and this dataset's: train with "
        f"--dataset.root={cache.folder / DATASET}",
    )  # fmt: skip
