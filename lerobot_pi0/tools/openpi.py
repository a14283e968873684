"""openpi's checkpoints, of JAX or of PyTorch: what they hold, and how to read it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.constants import CONFIG_NAME
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.errors import CheckpointNotFoundError
from ..checkpoints.reading import Stored, read_tensors
from ..checkpoints.source import read_json
from . import ToolError


class OpenpiCheckpoint(NamedTuple):
    """A checkpoint of openpi."""

    root: Path
    found: dict[str, Stored]
    tensors: Callable[[torch.dtype], Iterator[tuple[str, Tensor]]]
    has_lora: bool

    def size(self, name: str, axis: int) -> int | None:
        """Size of a published tensor along an axis; None where it is not there."""
        stored = self.found.get(f"model.{name}")
        return stored.shape[axis] if stored is not None and len(stored.shape) > axis else None


def open_source(root: Path, lora_scaling: float) -> OpenpiCheckpoint:
    """Tell JAX from PyTorch, and look at what is there without reading weights.

    Args:
        root: the folder, or its `params`.
        lora_scaling: alpha / rank of LoRA in attention (JAX).

    Raises:
        CheckpointError: it is neither, or not a complete checkpoint.
        ToolError: it is LeRobot's already, or holds several checkpoints.
    """
    if not root.is_dir():
        raise CheckpointNotFoundError(f"{root} is not a folder: download the checkpoint first")
    if root.name == "params" and _is_orbax(root):
        root = root.parent
    if _is_orbax(root / "params"):
        from .openpi_jax import JaxCheckpoint

        jax = JaxCheckpoint(root / "params", lora_scaling)
        return OpenpiCheckpoint(root, jax.found, jax.tensors, bool(jax.lora))
    content = read_json(root / CONFIG_NAME) if (root / CONFIG_NAME).is_file() else {}
    if "type" in content:
        raise ToolError(f"{root} is a checkpoint of LeRobot already (type={content['type']!r} in {CONFIG_NAME})")
    steps = sorted(x.name for x in root.iterdir() if x.is_dir() and x.name.isdigit())
    if steps and not list(root.glob("*.safetensors")):
        raise ToolError(f"{root} holds the steps {', '.join(steps)} of a run: name one, --source={root / steps[-1]}")
    try:
        found = Checkpoint.open(root).own
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{root} is no checkpoint of openpi: it holds neither `params` (JAX) nor model.safetensors (PyTorch)"
        ) from error

    def tensors(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        state = {name: torch.empty(stored.shape, dtype=dtype) for name, stored in found.items()}
        read_tensors(state, found)
        yield from state.items()

    return OpenpiCheckpoint(root, found, tensors, has_lora=False)


def _is_orbax(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"))
