"""The card of a trained policy: what can be known about it, and nothing else. Written without a network."""

import math
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from lerobot.configs import FeatureType
from lerobot.utils.constants import ACTION

from .. import __version__
from ..configuration_pi0 import PALIGEMMA_TOKENIZER, PI0Config
from ..inputs.joints import is_numbered, joint_names
from .quoting import markdown, shell

GEMMA_TERMS = (
    "The weights derive from PaliGemma: their use is bound by the "
    "[Gemma Terms of Use](https://ai.google.dev/gemma/terms). Gemma is provided under and subject to these terms."
)

TEMPLATE = Path(__file__).with_name("model_card.md")


def make_card(
    config: PI0Config,
    parameters: dict[str, tuple[int, int]],
    base: str | None,
    dataset: str | None,
    train: Any = None,
    dataset_meta: Any = None,
) -> ModelCard:
    """A model card.

    Args:
        parameters: per part of the network, how many it has, and how many of them are trained.
        base: what training started from, or what the VLM came from (`vlm_path`): a Hub id or a folder; None: nothing.
        train, dataset_meta: LeRobot's TrainPipelineConfig and its dataset's metadata, if there are any.
    """
    tasks = [] if dataset_meta is None else [str(task) for task in dataset_meta.tasks.index]
    licence, terms = _licence(config)
    on_hub = base is not None and base.count("/") == 1 and not Path(base).is_absolute() and not Path(base).is_dir()
    facts = {
        "start": _start(config, base, on_hub),
        "trained": ", ".join(f"{part} {_millions(own)} M of {_millions(n)} M" for part, (n, own) in parameters.items()),
        "dataset": _dataset(dataset, dataset_meta),
        "training": _training(train, config),
        "instructions": _instructions(tasks),
        "normalisation": ", ".join(f"{k.lower()} {v.value}" for k, v in config.normalization_mapping.items()),
        "actions": _actions(config),
    }
    return ModelCard.from_template(
        _metadata(config, licence, dataset, base if on_hub else None),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=markdown(config.repo_id or "π₀"),
        version=__version__,
        facts="\n".join(f"| {name} | {markdown(value)} |" for name, value in facts.items()),
        repo_id=shell(config.repo_id or "FOLDER"),
        robot=shell(getattr(dataset_meta, "robot_type", None) or "ROBOT"),
        cameras=shell(_cameras(config)),
        task=shell(next(iter(tasks), "…")),
        features=_features(config, dataset_meta),
        licence=terms,
    )


def _licence(config: PI0Config) -> tuple[str, str]:
    """The Hub's name of the licence, and the sentences about it."""
    gemma = config.tokenizer == PALIGEMMA_TOKENIZER or config.paligemma_variant != "tiny"
    licence = config.license or ("gemma" if gemma else "apache-2.0")
    named = markdown(licence)
    return licence, f"{named}. {GEMMA_TERMS}" if gemma else f"{named}."


def _metadata(config: PI0Config, licence: str, dataset: str | None, base: str | None) -> ModelCardData:
    """What the Hub finds a policy by."""
    return ModelCardData(
        license=licence,
        library_name="lerobot",
        pipeline_tag="robotics",
        tags=sorted({*(config.tags or []), "robotics", "lerobot", "pi0"}),
        model_name="pi0",
        datasets=dataset,
        base_model=base,
    )


def _instructions(tasks: list[str]) -> str:
    return "; ".join(tasks[:10]) + (" …" if len(tasks) > 10 else "") if tasks else "unknown"


def _cameras(config: PI0Config) -> str:
    """The value of `--robot.cameras`, for the user to complete."""
    names = [key.removeprefix("observation.images.") for key in config.image_features]
    return "{" + ", ".join(f"{name}: {{type: opencv, index_or_path: …}}" for name in names) + "}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f}".rstrip("0").rstrip(".")


def _start(config: PI0Config, base: str | None, on_hub: bool) -> str:
    if base is None:
        return "trained from random weights: there is no base model"
    name = base if on_hub else f"a folder, …/{'/'.join(Path(base).parts[-3:])}"  # not where it was: cards are public
    if base == config.vlm_path:
        return f"the VLM alone is that of {name}; everything else was trained from random weights"
    part = (
        "; the frozen weights are not in this repository: they are loaded from there" if config.save_expert_only else ""
    )
    return f"fine-tuned from {name}{part}"


def _dataset(dataset: str | None, meta: Any) -> str:
    if meta is None:
        return dataset or "unknown"
    return f"{dataset}: {meta.total_episodes} episodes, {meta.total_frames} frames at {meta.fps} Hz, {meta.robot_type}"


def _training(train: Any, config: PI0Config) -> str:
    if train is None:
        return "unknown"
    optimizer = getattr(train.optimizer, "lr", None)
    contexts = ", on cached contexts: the VLM was frozen" if config.context_cache else ""
    return f"{train.steps} steps, batch {train.batch_size}, learning rate {optimizer}, seed {train.seed}{contexts}"


def _actions(config: PI0Config) -> str:
    kind = "absolute"
    if config.use_relative_actions:
        kept = ", ".join(config.relative_exclude_joints) or "none"
        kind = f"relative to the measured state (absolute: {kept})"
    return f"{kind}; chunks of {config.chunk_size}, of which {config.n_action_steps} are executed"


def _code(text: str) -> str:
    """As code, where that cannot end early."""
    quoted = markdown(text)
    return f"`{text}`" if quoted == text else quoted


def _features(config: PI0Config, meta: Any) -> str:
    rows = ["| feature | shape | in order |", "|---|---|---|"]
    for key, feature in {**(config.input_features or {}), **(config.output_features or {})}.items():
        stored = meta.features.get(key, {}).get("names") if meta is not None else None
        stored = stored or (config.action_feature_names if key == ACTION else None)
        names = joint_names(stored, math.prod(feature.shape), key)
        if feature.type is FeatureType.VISUAL:
            names = ["channels", "height", "width"]  # the dataset's names are in the order that it stores
        listed = "" if is_numbered(names, key) else ", ".join(names)
        rows.append(f"| {_code(key)} | {tuple(feature.shape)} | {markdown(listed)} |")
    return "\n".join(rows)
