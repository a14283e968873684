"""Cameras: which one goes into which slot, and whether their pictures suit the weights.

Axes: C cameras or colour channels.
"""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..data import some
from .subject import ERROR, FINE, WARNING, Finding, Subject, array, clearly_less, permutation


def cameras(subject: Subject) -> Iterable[Finding]:
    """Which camera goes into which slot, and which are missing."""
    expected = [key for key in subject.config.image_features if "empty_camera" not in key]
    missing = [key for key in expected if key not in subject.cameras]
    surplus = [key for key in subject.cameras if key not in expected]
    rename = "give --rename_map='{DATASET_KEY: POLICY_KEY}', here and to lerobot-train"
    if not subject.cameras:
        yield Finding(
            ERROR, "cameras", "the dataset has no camera", "π₀ needs at least one: record with --robot.cameras"
        )
    if missing and surplus:
        message = f"the policy knows {some(expected)}, the dataset has {some(list(subject.cameras))}"
        yield Finding(ERROR, "cameras", f"{message}: lerobot-train refuses this", rename)
    elif missing:
        yield Finding(
            WARNING, "cameras", f"{some(missing)} of the policy are not in the dataset", f"record them, or {rename}"
        )
    elif surplus:
        yield Finding(WARNING, "cameras", f"{some(surplus)} of the dataset are not seen by the policy", rename)
    if (map_ := subject.trained.rename_map) and map_ != subject.rename_map and {*map_} & {*subject.cameras.values()}:
        yield Finding(
            WARNING, "cameras", f"the weights were trained with --rename_map='{json.dumps(dict(map_))}', which is not "
            "the one given", "give the same for the same cameras, here, to lerobot-train and to lerobot-rollout",
        )  # fmt: skip
    trained = list(subject.trained.config.image_features) if subject.trained.config else []
    slots = [key for key in expected if key in subject.cameras]
    for i, key in enumerate(slots):
        was = f" (trained as {trained[i]})" if i < len(trained) and trained[i] != key else ""
        yield Finding(FINE, "cameras", f"slot {i + 1}{was} ← {subject.cameras[key]}")
    yield from wrist_in_front(slots, trained)


def wrist_in_front(slots: list[str], trained: list[str]) -> Iterable[Finding]:
    """Slots are filled in order: a wrist camera where the weights expect the scene, by the names."""
    wrist = [any(word in key.lower() for word in ("wrist", "hand", "gripper")) for key in slots]
    was = [any(word in key.lower() for word in ("wrist", "hand", "gripper")) for key in trained[: len(slots)]]
    if trained and slots != trained[: len(slots)] and any(a != b for a, b in zip(wrist, was, strict=False)):
        yield Finding(
            WARNING, "cameras", f"the order {some(slots)} does not suit the weights' {some(trained)}: wrist and scene "
            "cameras are mixed up", "order the cameras as the weights had them when recording, or rename them",
        )  # fmt: skip


def pictures_of_training(subject: Subject) -> Iterable[Finding]:
    """Whether each camera's pictures are most like those the weights knew under its name, and its colours too."""
    ours: dict[str, np.ndarray] = {}
    theirs: dict[str, np.ndarray] = {}
    for key, own in subject.cameras.items():
        mine, known = signature(subject.stats.get(own, {})), signature(subject.trained.stats.get(key, {}))
        if mine is not None and known is not None:
            ours[key], theirs[key] = mine, known
    if not (keys := list(ours)):
        return
    order = permutation(np.stack([ours[key] for key in keys]), np.stack([theirs[key] for key in keys]))
    if order is not None:
        pairs = [
            f"{key} looks like the weights' {keys[j]}" for j, key in zip(order, keys, strict=True) if keys[j] != key
        ]
        yield Finding(WARNING, "cameras", f"swapped? {some(pairs)}", "look at both, then --rename_map or record anew")
    for key in keys:
        straight, reversed_ = ours[key].reshape(-1, 3), ours[key].reshape(-1, 3)[:, ::-1]
        reference = theirs[key].reshape(-1, 3)
        if clearly_less(np.abs(reversed_ - reference).mean(), np.abs(straight - reference).mean(), floor=0.02):
            yield Finding(WARNING, "colours", f"{key}: red and blue look exchanged", "record RGB, not BGR")
    yield Finding(FINE, "cameras", f"compared with the pictures that {subject.trained.source} was trained on")


def signature(stats: dict[str, Any]) -> np.ndarray | None:
    """Quantiles of a camera's colours (3 quantiles × 3 channels), in [0, 1]; None where there are none.

    Not mean and deviation: lerobot-train writes ImageNet's in their place.
    """
    names = ("q10", "q50", "q90")
    if any(name not in stats or array(stats[name]).size != 3 for name in names):
        return None
    return np.concatenate([array(stats[name]) for name in names])
