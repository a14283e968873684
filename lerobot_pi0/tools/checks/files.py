"""Files of the dataset: which are missing or damaged, and whether all that is declared is there."""

from collections.abc import Iterable

import numpy as np

from ..data import some
from .subject import ERROR, WARNING, Finding, Subject


def files(subject: Subject) -> Iterable[Finding]:
    """Every file that cannot be used, and episodes and frames that `info.json` declares and nobody finds."""
    dataset, meta = subject.dataset, subject.dataset.meta
    dataset.look_at_videos()
    for damage in dataset.damage:
        yield Finding(ERROR, "files", f"{damage.file} {damage.problem}", damage.remedy)
    if not len(subject.columns.episode):
        yield Finding(ERROR, "files", "no frame can be read, so what is in them is not checked", "mend the files first")
    if not subject.all_episodes:
        return
    found = {int(x) for x in np.unique(subject.columns.episode)}
    declared = range(int(meta.total_episodes))
    remedy = "copy the dataset again; if it was made so, set the numbers in meta/info.json right"
    if missing := sorted({*declared} - found):
        message = f"info.json declares {meta.total_episodes} episodes, {len(missing)} have no frames: {some(missing)}"
        yield Finding(ERROR, "files", message, remedy)
    if surplus := sorted(found - {*declared}):
        message = f"info.json declares {meta.total_episodes} episodes, the data hold others too: {some(surplus)}"
        yield Finding(ERROR, "files", message, remedy)
    if not missing and not surplus and meta.total_frames != len(subject.columns.episode):
        message = f"info.json declares {meta.total_frames} frames, the data hold {len(subject.columns.episode)}"
        yield Finding(WARNING, "files", message, remedy)
