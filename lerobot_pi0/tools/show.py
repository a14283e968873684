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
from lerobot.utils.constants import ACTION, POLICY_PREPROCESSOR_DEFAULT_NAME
from safetensors import safe_open
from torch import nn

from ..checkpoints import checkpoint
from ..checkpoints.checkpoint import EMBEDDING, LM_HEAD, NETWORK, VLM, CheckpointError, Stored
from ..configuration_pi0 import BYTE_TOKENIZER, PI0Config

PARTS = {
    "vision tower": VLM + "model.vision_tower.",
    "projector": VLM + "model.multi_modal_projector.",
    "VLM": VLM,
    "action expert": NETWORK + "gemma_expert.",
    "projections": "",
}
"""Parts of the network by what the names of their tensors begin with; the first that fits has it."""

BUILTIN_VARIANTS = ("gemma_300m", "gemma_2b")
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"


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
    print(json.dumps(content, indent=2) if options.json else as_text(content))
    return 0 if content["this plugin"]["loads"] else 1


def describe(source: str, **hub: Any) -> dict[str, Any]:
    """Everything that `show` says, as JSON has it.

    Raises:
        CheckpointError: there is no such checkpoint, it is no π₀, or a file of it is broken.
    """
    hub["revision"] = checkpoint.revision_of(source, **hub)
    config = checkpoint.read_config(source, **hub)
    plugin = checkpoint.read_plugin_config(source, **hub)
    raw = checkpoint.check_config(source, **hub) or {}
    adapter = _read(source, ADAPTER_CONFIG_NAME, **hub)
    base = plugin.get("base")
    found = _tensors(source, adapter is not None, **hub)
    wanted = network_parameters(config)
    return {
        "source": str(source),
        "revision": hub["revision"],
        "kind": _kind(adapter, base),
        "start": plugin.get("start") if plugin else None,
        "updates": plugin.get("updates"),
        "training": _training(_read(source, TRAIN_CONFIG_NAME, **hub)),
        "features": _features(config),
        "options": _options(config, plugin),
        "processors": _processors(source, **hub),
        "parts": _parts(found),
        "this plugin": _verdict(_our_reasons(source, found, wanted, adapter, base, **hub)),
        "built-in": _verdict(_builtin_reasons(source, config, raw, found, wanted, adapter, base, **hub)),
    }


def network_parameters(config: PI0Config) -> dict[str, nn.Parameter]:
    """The network's parameters by published name, without memory (`meta` device)."""
    from ..network.pi0 import PI0

    with torch.device("meta"):
        network = PI0(config.architecture(), config.image_size)
    return {f"model.{name}": p for name, p in network.named_parameters()}


def _read(source: str, name: str, **hub: Any) -> dict[str, Any] | None:
    file = checkpoint.hub_or_local(source, name, **hub)
    return checkpoint.read_json(file) if file is not None else None


def _tensors(source: str, is_adapter: bool, **hub: Any) -> dict[str, Stored]:
    if not is_adapter:
        return checkpoint.index_tensors(checkpoint.weight_files(source, **hub))
    file = checkpoint.hub_or_local(source, ADAPTER_WEIGHTS_NAME, **hub)
    if file is None:
        return {}
    found = checkpoint.index_tensors([file], prefix="adapter.")  # PEFT's names are not the network's
    names = {s.name: s for s in found.values()}
    return {"model." + name.removeprefix("base_model.model.model."): s for name, s in names.items()}


def _kind(adapter: dict[str, Any] | None, base: checkpoint.Base | None) -> str:
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
    dataset = train.get("dataset") or {}
    return {
        "dataset": dataset.get("repo_id"),
        "episodes": dataset.get("episodes") or "all",
        "held out": dataset.get("eval_split", 0.0),
        "steps": train.get("steps"),
        "batch": train.get("batch_size"),
        "learning rate": (train.get("optimizer") or {}).get("lr"),
        "seed": train.get("seed"),
    }


def _features(config: PI0Config) -> dict[str, Any]:
    """Cameras by slot, state and actions."""
    vectors = {**(config.input_features or {}), **(config.output_features or {})}
    return {
        "cameras": {key: list(feature.shape) for key, feature in config.image_features.items()},
        **{key: list(f.shape) for key, f in vectors.items() if key not in config.image_features},
        "joints of the actions": config.action_feature_names,
        "actions": "relative to the state" if config.use_relative_actions else "absolute",
    }


def _options(config: PI0Config, plugin: dict[str, Any]) -> dict[str, Any]:
    """What decides about the network and how it is run, and what only this plugin has."""
    names = (
        "paligemma_variant", "action_expert_variant", "dtype", "max_state_dim", "max_action_dim", "image_resolution",
        "tokenizer_max_length", "chunk_size", "n_action_steps", "num_inference_steps",
    )  # fmt: skip
    own = {name: plugin.get(name) for name in checkpoint.PLUGIN_FIELDS if plugin.get(name) is not None}
    normalisation = {kind.lower(): mode.value for kind, mode in config.normalization_mapping.items()}
    return {name: getattr(config, name) for name in names} | {"normalisation": normalisation} | own


def _processors(source: str, **hub: Any) -> dict[str, Any] | None:
    """The tokenizer and whether it travels along, and which features have statistics."""
    content = _read(source, f"{POLICY_PREPROCESSOR_DEFAULT_NAME}.json", **hub)
    if content is None:
        return None
    steps = {step.get("registry_name") or step.get("class"): step for step in content.get("steps", [])}
    tokenizer, normalizer = steps.get("tokenizer_processor", {}), steps.get("normalizer_processor", {})
    file = normalizer.get("state_file") and checkpoint.hub_or_local(source, normalizer["state_file"], **hub)
    stored = checkpoint.index_tensors([file], prefix="model.") if file else {}
    return {
        "tokenizer": tokenizer.get("config", {}).get("tokenizer_name"),
        "tokenizer travels": _travels(source, tokenizer, **hub),
        "statistics of": sorted({s.name.rpartition(".")[0] for s in stored.values()}),
    }


def _travels(source: str, tokenizer: dict[str, Any], **hub: Any) -> bool:
    from ..inputs.steps import NOT_CARRIED

    if tokenizer.get("config", {}).get("tokenizer_name") == BYTE_TOKENIZER:
        return True  # it is made in place
    file = tokenizer.get("state_file") and checkpoint.hub_or_local(source, tokenizer["state_file"], **hub)
    names = {s.name for s in checkpoint.index_tensors([file]).values()} if file else set()
    return bool(names) and NOT_CARRIED not in names


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


def _our_reasons(
    source: str,
    found: dict[str, Stored],
    wanted: dict[str, nn.Parameter],
    adapter: dict[str, Any] | None,
    base: checkpoint.Base | None,
    **hub: Any,
) -> Iterable[str]:
    """Why this plugin would refuse the checkpoint."""
    if adapter is not None:
        return
    try:
        checkpoint.judge(source, wanted, checkpoint.with_base(found, base, **hub), strict=True)
    except CheckpointError as error:
        yield str(error)


def _builtin_reasons(
    source: str,
    config: PI0Config,
    raw: dict[str, Any],
    found: dict[str, Stored],
    wanted: dict[str, nn.Parameter],
    adapter: dict[str, Any] | None,
    base: checkpoint.Base | None,
    **hub: Any,
) -> Iterable[str]:
    """Why LeRobot's own π₀ would not load it, or, which is worse, would run with random weights."""
    for name in ("paligemma_variant", "action_expert_variant"):
        if (variant := getattr(config, name)) not in BUILTIN_VARIANTS:
            yield f"it has no {name}={variant}, only {' and '.join(BUILTIN_VARIANTS)}"
    if unknown := sorted(raw.keys() - {f.name for f in fields(BuiltinPI0Config)} - {"type"}):
        yield f"{CONFIG_NAME} holds {', '.join(unknown)}, which it does not know"
    if config.tokenizer == BYTE_TOKENIZER or (_processors(source, **hub) or {}).get("tokenizer") == BYTE_TOKENIZER:
        yield f"its processors cannot make the tokenizer {BYTE_TOKENIZER!r}"
    if adapter is not None:
        return
    if base is not None:
        yield "it has no way to take the frozen weights from another checkpoint; it would run with random weights"
        return
    if checkpoint.hub_or_local(source, SAFETENSORS_SINGLE_FILE, **hub) is None:
        yield f"it reads {SAFETENSORS_SINGLE_FILE} alone; it would run with random weights"
    stored = _stored_names({stored.file for stored in found.values()})
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
