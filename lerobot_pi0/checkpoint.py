"""Weights in and out: which files a checkpoint has, which tensor goes where, and what is refused.

A network is built on the `meta` device and each tensor is read straight into its final dtype and device, so
that loading takes the memory of the model and one tensor, and no weight is ever random by accident.
"""

import json
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE, SAFETENSORS_SINGLE_FILE
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .configuration_pi0 import PLUGIN_CONFIG_NAME

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message says what was found and what to do."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No such folder, repository or file."""


class CorruptCheckpointError(CheckpointError):
    """A file that is cut, unreadable, or holds numbers that are not finite."""


class MismatchedCheckpointError(CheckpointError):
    """Tensors that are missing, unexpected or of another shape than the network's."""


PREFIX = "model.paligemma_with_expert."
LM_HEAD = PREFIX + "paligemma.lm_head.weight"
EMBEDDING = PREFIX + "paligemma.model.language_model.embed_tokens.weight"
EXPERT_HEAD = PREFIX + "gemma_expert.lm_head.weight"

RENAMES = (
    # openpi writes the network without LeRobot's policy around it
    (re.compile(r"^(?!model\.)"), "model."),
    # transformers before 4.52 nested PaliGemma's parts the other way round
    (re.compile(r"\.paligemma\.language_model\.model\."), ".paligemma.model.language_model."),
    (re.compile(r"\.paligemma\.(vision_tower|multi_modal_projector)\."), r".paligemma.model.\1."),
    (re.compile(r"\.paligemma\.language_model\.lm_head\."), ".paligemma.lm_head."),
)


def canonical_name(name: str) -> str:
    """The name that published checkpoints use today for a tensor of an older or bare one."""
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    return name


def hub_or_local(source: str | Path, filename: str, **hub: Any) -> Path | None:
    """A file of a checkpoint folder or Hub repository; None where the checkpoint has no such file.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint, or no way to it.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder / filename if (folder / filename).is_file() else None
    if folder.is_absolute() or str(source).count("/") != 1:
        raise CheckpointNotFoundError(f"{source} is neither a folder nor a Hub id of the form owner/name")
    try:
        return Path(hf_hub_download(str(source), filename, **hub))
    except LocalEntryNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{filename} of {source} is not in the local cache and the Hub cannot be reached: connect once, or "
            "pass the path of a downloaded folder"
        ) from error
    except EntryNotFoundError:
        return None
    except HfHubHTTPError as error:
        raise CheckpointNotFoundError(
            f"{source} cannot be had from the Hub: {error}. Check the id, and `hf auth login` if it is private"
        ) from error


def weight_files(source: str | Path, **hub: Any) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that its index names.

    Raises:
        CheckpointNotFoundError: the checkpoint has no weights.
    """
    single = hub_or_local(source, SAFETENSORS_SINGLE_FILE, **hub)
    if single is not None:
        return [single]
    index = hub_or_local(source, SAFETENSORS_INDEX_FILE, **hub)
    if index is None:
        adapter = hub_or_local(source, "adapter_config.json", **hub)
        hint = (
            "; it is a PEFT adapter: load it with --policy.path and use_peft, over the base it names"
            if adapter
            else ""
        )
        raise CheckpointNotFoundError(f"{source} holds no {SAFETENSORS_SINGLE_FILE}{hint}")
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    files = [hub_or_local(source, shard, **hub) for shard in shards]
    missing = [shard for shard, file in zip(shards, files, strict=True) if file is None]
    if missing:
        raise CheckpointNotFoundError(f"{source} lacks {', '.join(missing)}, which its index names")
    return [file for file in files if file is not None]


def read_plugin_config(source: str | Path, **hub: Any) -> dict[str, Any]:
    """What only this plugin knows about a checkpoint; empty for checkpoints of others."""
    file = hub_or_local(source, PLUGIN_CONFIG_NAME, **hub)
    return {} if file is None else json.loads(file.read_text())


def tensors(files: list[Path]) -> Iterator[tuple[str, str, Any]]:
    """Canonical name, stored name and lazy slice of every tensor; nothing is read before it is asked for.

    Raises:
        CorruptCheckpointError: a file is cut or not safetensors.
    """
    for file in files:
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                for name in opened.keys():  # noqa: SIM118  safe_open is no mapping
                    yield canonical_name(name), name, opened
        except SafetensorError as error:
            raise CorruptCheckpointError(
                f"{file} is not a complete safetensors file ({error}): download or copy it again"
            ) from error


def load_weights(
    model: nn.Module, source: str | Path, device: torch.device, strict: bool = True, **hub: Any
) -> None:
    """Fill a policy that was built on the `meta` device, each parameter in the dtype it has there.

    Args:
        model: a module whose parameters are named as in published checkpoints (`model.…`).
        strict: False leaves parameters that the checkpoint lacks on `meta` and lists them.

    Raises:
        CheckpointError: one of its kinds; `model` is then of no use.
    """
    started = time.perf_counter()
    wanted = dict(model.named_parameters())
    loaded: dict[str, str] = {}
    unexpected, misshapen = [], []
    for name, stored, opened in tensors(weight_files(source, **hub)):
        if name == LM_HEAD:  # the same matrix as the embedding, and sometimes the only copy
            name = EMBEDDING
            if name in loaded:
                continue
        if name == EXPERT_HEAD:  # nothing reads it
            continue
        if name not in wanted:
            unexpected.append(stored)
            continue
        shape = tuple(opened.get_slice(stored).get_shape())
        if shape != tuple(wanted[name].shape):
            misshapen.append(f"{stored} is {shape}, expected {tuple(wanted[name].shape)}")
            continue
        tensor = opened.get_tensor(stored)
        if not is_finite(tensor):
            raise CorruptCheckpointError(f"{stored} in {source} holds NaN or infinity: the checkpoint is broken")
        parameter = wanted[name]
        set_parameter(model, name, tensor.to(device=device, dtype=parameter.dtype, copy=True))
        loaded[name] = stored
    missing = [name for name in wanted if name not in loaded]
    if misshapen or (strict and (missing or unexpected)):
        raise MismatchedCheckpointError(_mismatch(source, missing, unexpected, misshapen))
    if missing or unexpected:
        logger.warning(_mismatch(source, missing, unexpected, misshapen))
    count = sum(p.numel() for p in wanted.values())
    logger.info(
        "loaded %d of %d tensors (%.2f B parameters, %s) from %s in %.1f s",
        len(loaded),
        len(wanted),
        count / 1e9,
        " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in wanted.values()})),
        source,
        time.perf_counter() - started,
    )


def _mismatch(source: str | Path, missing: list[str], unexpected: list[str], misshapen: list[str]) -> str:
    parts = []
    for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            parts.append(f"{len(names)} {title}: {', '.join(names[:5])}{more}")
    return (
        f"the weights of {source} do not fit the network. {'; '.join(parts)}. Is it a π₀ checkpoint, of these "
        "variants (paligemma_variant, action_expert_variant)?"
    )


def is_finite(x: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity; one pass in the common case."""
    return bool(x.sum(dtype=torch.float32).isfinite()) or bool(x.isfinite().all())


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter by one of another device or dtype that is trained if the old one was."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, leaf, nn.Parameter(value, requires_grad=getattr(module, leaf).requires_grad))


def save_weights(state: dict[str, Tensor], folder: Path) -> None:
    """Write `model.safetensors` as published checkpoints have it, complete in the built-in's eyes.

    The embedding is stored under the language model's head, from which the built-in fills both; the expert's
    head, which nothing reads and the built-in nevertheless demands, is zeros. The file appears under its name
    when it is whole.
    """
    state = {name: x.detach().contiguous() for name, x in state.items()}
    embedding = state.pop(EMBEDDING)
    width = state[PREFIX + "gemma_expert.model.norm.weight"].shape[0]
    state[LM_HEAD] = embedding
    state[EXPERT_HEAD] = torch.zeros(embedding.shape[0], width, dtype=embedding.dtype)
    target = folder / SAFETENSORS_SINGLE_FILE
    part = target.with_suffix(".part")
    save_file(state, part, metadata={"format": "pt"})
    part.replace(target)
