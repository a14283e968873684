"""`lerobot-pi0 show`: what a checkpoint is, without reading its weights.

    lerobot-pi0 show --source=lerobot/pi0_base
    lerobot-pi0 show --source=outputs/train/my_run/checkpoints/last/pretrained_model --json

Says what it was trained on, what it expects of a robot, which parts it has and in which dtypes, and whether this
plugin and LeRobot's built-in π₀ would load it. The exit status is 1 where this plugin would not.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from lerobot.configs.train import TRAIN_CONFIG_NAME
from lerobot.policies.pi0.configuration_pi0 import PI0Config as BuiltinPI0Config
from lerobot.utils.constants import ACTION
from safetensors import safe_open
from torch import nn

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.errors import CheckpointError
from ..checkpoints.names import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, EMBEDDING, LM_HEAD, NETWORK, VLM
from ..checkpoints.origin import Base
from ..checkpoints.pipelines import PREPROCESSOR
from ..checkpoints.quoting import plain
from ..checkpoints.reading import Stored, index_tensors
from ..configuration_pi0 import BYTE_TOKENIZER, PLUGIN_FIELDS, PI0Config
from ..inputs.joints import names_in_config
from ..inputs.steps import NOT_CARRIED, TOKENIZER

PARTS = {
    "vision tower": VLM + "model.vision_tower.",
    "projector": VLM + "model.multi_modal_projector.",
    "VLM": VLM,
    "action expert": NETWORK + "gemma_expert.",
    "projections": "",
}
"""Parts of the network by what the names of their tensors begin with; the first that fits has it."""

BUILTIN_VARIANTS = ("gemma_300m", "gemma_2b")


@dataclass
class Options:
    """Show a checkpoint: its origin, features, parts and dtypes, and who can load it."""

    # Folder of a checkpoint (`pretrained_model`), or its Hub id. Without a network, what is in the cache.
    source: str
    # A branch, tag or commit of the Hub repository; by default the newest.
    revision: str | None = None
    # Print JSON.
    json: bool = False


def run(options: Options) -> int:
    """Print a checkpoint's description; 1 where this plugin would not load it.

    Raises:
        CheckpointError: there is no such checkpoint, or it is no π₀.
    """
    content = describe(options.source, revision=options.revision)
    print(json.dumps(content, indent=2) if options.json else plain(as_text(content), keep="\n"))
    return 0 if content["this plugin"]["loads"] else 1


def describe(source: str, **hub: Any) -> dict[str, Any]:
    """Everything that `show` says, as JSON has it.

    Raises:
        CheckpointError: there is no such checkpoint, it is no π₀, or a file of it is broken.
    """
    checkpoint = Checkpoint.open(source, **hub)
    config, saved = checkpoint.config(), checkpoint.saved()
    adapter = checkpoint.source.read_json(ADAPTER_CONFIG_NAME)
    wanted = network_parameters(config)
    found = checkpoint.own if adapter is None else _adapter_tensors(checkpoint)
    return {
        "source": str(source),
        "revision": checkpoint.source.revision,
        "kind": _kind(adapter, saved.get("base")),
        "start": saved.get("start"),
        "updates": saved.get("updates"),
        "training": _training(checkpoint.source.read_json(TRAIN_CONFIG_NAME)),
        "features": _features(config),
        "options": _options(config, saved),
        "processors": _processors(checkpoint),
        "parts": _parts(found),
        "this plugin": _verdict(_our_reasons(checkpoint, config, wanted if adapter is None else None)),
        "built-in": _verdict(_builtin_reasons(checkpoint, wanted, is_adapter=adapter is not None)),
    }


def network_parameters(config: PI0Config) -> dict[str, nn.Parameter]:
    """The network's parameters by published name, without memory (`meta` device)."""
    from ..network.pi0 import PI0

    with torch.device("meta"):
        network = PI0(config.architecture(), config.image_size)
    return {f"model.{name}": p for name, p in network.named_parameters()}


def _adapter_tensors(checkpoint: Checkpoint) -> dict[str, Stored]:
    """The tensors of a PEFT adapter, by names like the network's."""
    file = checkpoint.source.file(ADAPTER_WEIGHTS_NAME)
    if file is None:
        return {}
    found = index_tensors([file], prefix="adapter.")  # PEFT's names are not the network's
    names = {s.name: s for s in found.values()}
    return {"model." + name.removeprefix("base_model.model.model."): s for name, s in names.items()}


def _kind(adapter: dict[str, Any] | None, base: Base | None) -> str:
    if adapter is not None:
        return (
            f"a PEFT adapter ({adapter.get('peft_type')}, rank {adapter.get('r')}) over "
            f"{adapter.get('base_model_name_or_path')}"
        )
    if base is not None:
        return f"the trained weights alone, over the frozen ones of {base.id}" + (
            f" (revision {base.revision})" if base.revision else ""
        )
    return "a complete checkpoint"


def _training(train: dict[str, Any] | None) -> dict[str, Any] | None:
    """What LeRobot noted about the run; None for checkpoints that no lerobot-train wrote."""
    if train is None:
        return None
    dataset, optimizer = (x if isinstance(x := train.get(name), dict) else {} for name in ("dataset", "optimizer"))
    return {
        "dataset": dataset.get("repo_id"),
        "episodes": dataset.get("episodes") or "all",
        "held out": dataset.get("eval_split", 0.0),
        "steps": train.get("steps"),
        "batch": train.get("batch_size"),
        "learning rate": optimizer.get("lr"),
        "seed": train.get("seed"),
    }


def _features(config: PI0Config) -> dict[str, Any]:
    """Cameras by slot, state and actions."""
    vectors = {**(config.input_features or {}), **(config.output_features or {})}
    named = config.action_feature_names and ACTION in vectors
    return {
        "cameras": {key: list(feature.shape) for key, feature in config.image_features.items()},
        **{key: list(f.shape) for key, f in vectors.items() if key not in config.image_features},
        "joints of the actions": names_in_config(config, ACTION) if named else None,
        "actions": "relative to the state" if config.use_relative_actions else "absolute",
    }


def _options(config: PI0Config, saved: dict[str, Any]) -> dict[str, Any]:
    """What decides about the network and how it is run, and what only this plugin has."""
    names = (
        "paligemma_variant", "action_expert_variant", "dtype", "max_state_dim", "max_action_dim", "image_resolution",
        "tokenizer_max_length", "chunk_size", "n_action_steps", "num_inference_steps",
    )  # fmt: skip
    own = {name: saved.get(name) for name in PLUGIN_FIELDS if saved.get(name) is not None}
    normalisation = {kind.lower(): mode.value for kind, mode in config.normalization_mapping.items()}
    return {name: getattr(config, name) for name in names} | {"normalisation": normalisation} | own


def _processors(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The tokenizer and whether it travels along, and which features have statistics; None without processors."""
    try:
        pipelines = checkpoint.pipelines
        if PREPROCESSOR not in pipelines.steps:
            return None
        name = pipelines.arguments.get(TOKENIZER, {}).get("tokenizer_name")
        carried = pipelines.state_of(TOKENIZER)
    except CheckpointError as error:
        return {"cannot be used": str(error)}
    return {
        "tokenizer": name,
        "tokenizer travels": name == BYTE_TOKENIZER or bool(carried and NOT_CARRIED not in carried),
        "statistics of": sorted(pipelines.normalisation.statistics if pipelines.normalisation else ()),
    }


def _parts(found: dict[str, Stored]) -> list[dict[str, Any]]:
    """Tensors, parameters and dtypes of each part."""
    groups: dict[str, list[Stored]] = {part: [] for part in PARTS}
    for name, stored in found.items():
        part = next(part for part, prefix in PARTS.items() if name.startswith(prefix))
        groups[part].append(stored)
    return [
        {
            "part": part,
            "tensors": len(group),
            "parameters": sum(torch.Size(s.shape).numel() for s in group),
            "dtypes": sorted({s.dtype for s in group}),
        }
        for part, group in groups.items()
        if group
    ]


def _verdict(reasons: Iterable[str]) -> dict[str, Any]:
    listed = list(reasons)
    return {"loads": not listed, "why not": listed}


def _our_reasons(checkpoint: Checkpoint, config: PI0Config, wanted: dict[str, nn.Parameter] | None) -> Iterable[str]:
    """Why this plugin would not load it; `wanted` is None for an adapter."""
    for look in (lambda: wanted and checkpoint.check(wanted), lambda: checkpoint.check_processors(config)):
        try:
            look()
        except CheckpointError as error:
            yield str(error)


def _builtin_reasons(checkpoint: Checkpoint, wanted: dict[str, nn.Parameter], is_adapter: bool) -> Iterable[str]:
    """Why LeRobot's own π₀ would not load it, or, which is worse, would run with random weights."""
    config = checkpoint.config()
    for name in ("paligemma_variant", "action_expert_variant"):
        if (variant := getattr(config, name)) not in BUILTIN_VARIANTS:
            yield f"it has no {name}={variant}, only {' and '.join(BUILTIN_VARIANTS)}"
    raw = checkpoint.raw_config() or {}
    if unknown := sorted(raw.keys() - {f.name for f in fields(BuiltinPI0Config)} - {"type"}):
        yield f"{CONFIG_NAME} holds {', '.join(unknown)}, which it does not know"
    if BYTE_TOKENIZER in (config.tokenizer, (_processors(checkpoint) or {}).get("tokenizer")):
        yield f"its processors cannot make the tokenizer {BYTE_TOKENIZER!r}"
    if is_adapter:
        return
    if checkpoint.saved().get("base") is not None:
        yield "it has no way to take the frozen weights from another checkpoint; it would run with random weights"
        return
    if checkpoint.source.file(SAFETENSORS_SINGLE_FILE) is None:
        yield f"it reads {SAFETENSORS_SINGLE_FILE} alone; it would run with random weights"
    stored = _stored_names({stored.file for stored in checkpoint.own.values()})
    if LM_HEAD in stored:  # it fills the embedding from the head
        stored.add(EMBEDDING)
    if random := sorted(wanted.keys() - stored):
        yield f"{len(random)} tensors stay random in it, such as {random[0]}: it does not know them by their names here"


def _stored_names(files: Iterable[Path]) -> set[str]:
    """Every tensor's name as the built-in reads it: heads too, and no spelling corrected but the bare one."""
    names: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names |= {name if name.startswith("model.") else f"model.{name}" for name in opened.keys()}  # noqa: SIM118
    return names


def as_text(content: dict[str, Any]) -> str:
    """A description as a person reads it."""
    lines = [f"{content['source']}: {content['kind']}", ""]
    parameters = sum(part["parameters"] for part in content["parts"])
    lines += [f"  parameters      {parameters:,}", f"  began with      {_start(content)}"]
    if content["updates"] is not None:
        lines.append(f"  updates         {content['updates']}")
    training = content["training"] or {"training": "no train_config.json: not known"}
    lines += _section("trained", training)
    lines += _section("features", content["features"])
    lines += _section("options", content["options"])
    lines += _section("processors", content["processors"] or {"processors": "none: LeRobot cannot run it"})
    lines += ["", "parts"]
    for part in content["parts"]:
        lines.append(
            f"  {part['part']:14}  {part['parameters']:>13,} parameters in {part['tensors']} tensors, "
            f"{' and '.join(part['dtypes'])}"
        )
    lines += ["", "who loads it"]
    for who in ("this plugin", "built-in"):
        verdict = content[who]
        lines.append(f"  {who:14}  {'yes' if verdict['loads'] else 'no: ' + '; '.join(verdict['why not'])}")
    return "\n".join(lines)


def _start(content: dict[str, Any]) -> str:
    return content["start"] or ("random weights" if content["updates"] is not None else "not known")


def _section(title: str, content: dict[str, Any]) -> list[str]:
    width = max(map(len, content))
    return ["", title, *(f"  {name:{width}}  {_value(name, value)}" for name, value in content.items())]


def _value(name: str, value: Any) -> str:
    if name == "cameras":
        return ", ".join(f"{i}: {key} {tuple(shape)}" for i, (key, shape) in enumerate(value.items(), 1))
    if name == ACTION or isinstance(value, list | tuple):
        return " × ".join(map(str, value)) if all(isinstance(x, int) for x in value) else ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return str(value)
