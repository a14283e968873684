"""Saved processor pipelines of π₀, rebuilt with this plugin's steps and with the options of the run.

LeRobot rebuilds a checkpoint's pipelines from their files alone; they do not see the run's config. So when a policy is
loaded, `follow` remembers how its processors have to differ from the files, by the place of the checkpoint (a folder or
a Hub id). When LeRobot then rebuilds the pipelines of that place, `rewritten` puts these changes into their steps.

Only pipelines of π₀ are changed. Pipelines of other policies and LeRobot's registry of steps stay as they are.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import snapshot_download
from lerobot.configs import PolicyFeature
from lerobot.utils.constants import ACTION, OBS_STATE

from ..configuration_pi0 import PALIGEMMA_TOKENIZER, PI0Config
from .features import log_cameras, set_cameras
from .steps import STEPS, TOKENIZER

RENAME = "rename_observations_processor"
PROMPT = "pi0_new_line_processor"

Steps = dict[str, dict[str, Any]]
"""Arguments of processor steps, by the step's name in LeRobot's registry."""


@dataclass
class Run:
    """What the pipelines of a checkpoint need to know about the policy that was loaded from it."""

    config: "weakref.ref[PI0Config]"
    changes: Steps = field(default_factory=dict)
    """Arguments of steps that replace those in the files."""
    slots: tuple[str, ...] = ()
    """The checkpoint's cameras, in the order of its slots."""
    dataset: Mapping[str, PolicyFeature] | None = None
    """The cameras of the dataset that the policy is trained on; None if it is not trained."""
    of_dataset: bool = False
    """Whether the config's cameras were taken from the dataset, so that `--rename_map` renames them too."""
    instead_of: dict[str, PolicyFeature] | None = None
    """The checkpoint's own cameras, if the dataset's have replaced them; a `--rename_map` brings them back."""


_runs: dict[str, Run] = {}


def follow(place: str, run: Run) -> None:
    """From now on, pipelines of the checkpoint at `place` are rebuilt for this run, as long as its config exists."""
    for other in [key for key, old in _runs.items() if old.config() is None]:
        del _runs[other]
    _runs[_key(place)] = run


def run_of(place: str) -> Run | None:
    """The run that `follow` remembered last for this place; None if its config no longer exists."""
    run = _runs.get(_key(place))
    return run if run is not None and run.config() is not None else None


def _key(place: str) -> str:
    return str(Path(place).resolve()) if Path(place).is_dir() else place


def artifact(place: str, folder: Path | None, hub: Mapping[str, Any], name: str) -> str:
    """The path of a folder that LeRobot after 0.6.1 has saved next to a pipeline's file, such as a tokenizer's.

    Args:
        place: folder or Hub id of the checkpoint.
        folder: where the checkpoint's files are on this machine; some may not be there yet.
        hub: LeRobot's options for downloads.
        name: the folder's name in the pipeline's file.

    Raises:
        ValueError: the name leads out of the checkpoint.
    """
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
        raise ValueError(
            f"the processors of {place} name {name!r}, which is no folder of the checkpoint: do not load it"
        )
    if folder is None or not (folder / name).is_dir():
        folder = Path(snapshot_download(place, allow_patterns=f"{name}/*", **hub))
    return str(folder / name)


def rewritten(
    pipeline: dict[str, Any], overrides: Steps, place: str, fetch: Callable[[str], str]
) -> tuple[dict[str, Any], Steps]:
    """The pipeline and the overrides of its steps from which LeRobot has to rebuild it.

    The caller's overrides win over the run's changes, and these win over what was saved.

    Args:
        pipeline: the content of the pipeline's file.
        overrides: arguments that the caller gives, by step.
        place: folder or Hub id of the checkpoint.
        fetch: the path of a folder of the checkpoint, by its name.
    """
    run = run_of(place)
    steps = pipeline.get("steps", [])
    ours = run is not None or any(
        step.get("registry_name") == PROMPT or (step.get("registry_name") == TOKENIZER and "state_file" in step)
        for step in steps
    )
    if not ours:
        return pipeline, overrides
    if run is not None and any(step.get("registry_name") == RENAME for step in steps):
        overrides = _with_cameras(run, overrides)
    config = run.config() if run else None
    tokenizer = config.tokenizer if config is not None else PALIGEMMA_TOKENIZER
    made = [_step(step, overrides, run.changes if run else {}, fetch, tokenizer) for step in steps]
    taken = {name for step in steps if (name := step.get("registry_name")) in STEPS}
    return pipeline | {"steps": made}, {key: x for key, x in overrides.items() if key not in taken}


def _step(
    step: dict[str, Any], overrides: Steps, changes: Steps, fetch: Callable[[str], str], tokenizer: str
) -> dict[str, Any]:
    """The entry of one step, with this plugin's class if it has one; `tokenizer` is the name of the policy's own."""
    name = step.get("registry_name", "")
    saved = step.get("config", {})
    if name not in STEPS:
        return step | {"config": saved | changes.get(name, {})} if name in changes else step
    config = saved | changes.get(name, {}) | overrides.get(name, {})
    if name == TOKENIZER:
        same = config.get("tokenizer") is None and config.get("tokenizer_name") == saved.get("tokenizer_name")
        config["takes_files"] = same and "state_file" in step
        if same and (folder := step.get("artifacts", {}).get("tokenizer_name")):
            config |= {"folder": fetch(folder), "tokenizer_name": tokenizer}
    cls = STEPS[name]
    rest = {key: x for key, x in step.items() if key not in ("registry_name", "artifacts")}
    return rest | {"class": f"{cls.__module__}.{cls.__qualname__}", "config": config}


def _with_cameras(run: Run, overrides: Steps) -> Steps:
    """Set the policy's cameras, now that `--rename_map` is known; the normaliser's override holds them too."""
    config = rename_cameras(run, overrides.get(RENAME, {}).get("rename_map") or {})
    if config is None or "features" not in (given := overrides.get("normalizer_processor", {})):
        return overrides
    features = {**(config.input_features or {}), **(config.output_features or {})}
    return overrides | {"normalizer_processor": given | {"features": features}}


def rename_cameras(run: Run, names: Mapping[str, str]) -> PI0Config | None:
    """Give the policy the cameras that a batch of its dataset will have, and log their slots.

    Args:
        names: LeRobot's `--rename_map`, from the dataset's name of a camera to the policy's.

    Returns:
        The changed config; None if the policy is not trained.

    Raises:
        ValueError: it names a state or actions, whose statistics keep the dataset's name.
    """
    config = run.config()
    if config is None or run.dataset is None:
        return None
    if vectors := [own for own, name in names.items() if name in (OBS_STATE, ACTION) and own != name]:
        raise ValueError(
            f"--rename_map gives {', '.join(vectors)} another name, but statistics keep the dataset's, so the numbers "
            "would not be normalised: rename cameras alone, and these columns in the dataset (data/, meta/info.json, "
            "meta/stats.json)"
        )
    if names and run.instead_of is not None:
        set_cameras(config, run.instead_of, run.slots)
    elif names and run.of_dataset:
        set_cameras(config, {names.get(key, key): x for key, x in run.dataset.items()}, run.slots)
    log_cameras(config, run.dataset, names, run.slots)
    return config
