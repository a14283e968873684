"""openpi's JAX checkpoints: from the leaves of its parameter tree to the tensors of the published names.

openpi keeps the layers of a stack in one array (`nn.scan`), and the action expert's parameters beside the VLM's with
the suffix `_1`. Axes of the patterns, of one layer: w width, f MLP width, n heads, d head dim, s two matrices in one
array, p patches, c channels, t tokens, i in, o out. Sources: openpi `models/gemma.py`, `models/siglip.py`,
`models/lora.py`, `models/pi0.py`.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import EinopsError, rearrange
from torch import Tensor

from ..checkpoints.errors import CheckpointError, CorruptCheckpointError, MismatchedCheckpointError
from ..checkpoints.names import NETWORK
from ..checkpoints.reading import Stored
from ..checkpoints.tensor_bytes import is_finite

logger = logging.getLogger(__name__)

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""NumPy's names of floating-point types, and safetensors'."""


class MissingExtraError(CheckpointError, ImportError):
    """A library that only this conversion needs is not installed."""


class Row(NamedTuple):
    """Where a leaf goes: the pattern of one layer, and a name for each part, with `{}` for the layer's number."""

    pattern: str
    names: tuple[str, ...]


def _gemma(suffix: str, stack: str) -> dict[str, Row]:
    """Rows of one stack of layers."""
    layer = stack + "layers.{}."
    return {
        f"layers/attn/q_einsum{suffix}/w": Row("n w d -> (n d) w", (layer + "self_attn.q_proj.weight",)),
        f"layers/attn/kv_einsum{suffix}/w": Row(
            "s 1 w d -> s d w", (layer + "self_attn.k_proj.weight", layer + "self_attn.v_proj.weight")
        ),
        f"layers/attn/attn_vec_einsum{suffix}/w": Row("n d w -> w (n d)", (layer + "self_attn.o_proj.weight",)),
        f"layers/mlp{suffix}/gating_einsum": Row(
            "s w f -> s f w", (layer + "mlp.gate_proj.weight", layer + "mlp.up_proj.weight")
        ),
        f"layers/mlp{suffix}/linear": Row("f w -> w f", (layer + "mlp.down_proj.weight",)),
        f"layers/pre_attention_norm{suffix}/scale": Row("w -> w", (layer + "input_layernorm.weight",)),
        f"layers/pre_ffw_norm{suffix}/scale": Row("w -> w", (layer + "post_attention_layernorm.weight",)),
        f"final_norm{suffix}/scale": Row("w -> w", (stack + "norm.weight",)),
    }


def _siglip(tower: str, projector: str) -> dict[str, Row]:
    """Rows of the vision tower and the projector."""
    layer = tower + "encoder.layers.{}."
    rows = {
        "embedding/kernel": Row("h w c o -> o c h w", (tower + "embeddings.patch_embedding.weight",)),
        "embedding/bias": Row("w -> w", (tower + "embeddings.patch_embedding.bias",)),
        "pos_embedding": Row("1 p w -> p w", (tower + "embeddings.position_embedding.weight",)),
        "Transformer/encoder_norm/scale": Row("w -> w", (tower + "post_layernorm.weight",)),
        "Transformer/encoder_norm/bias": Row("w -> w", (tower + "post_layernorm.bias",)),
        "head/kernel": Row("i o -> o i", (projector + "weight",)),
        "head/bias": Row("o -> o", (projector + "bias",)),
    }
    block = "Transformer/encoderblock/"
    for i in (0, 1):
        rows[f"{block}LayerNorm_{i}/scale"] = Row("w -> w", (f"{layer}layer_norm{i + 1}.weight",))
        rows[f"{block}LayerNorm_{i}/bias"] = Row("w -> w", (f"{layer}layer_norm{i + 1}.bias",))
        rows[f"{block}MlpBlock_0/Dense_{i}/kernel"] = Row("i o -> o i", (f"{layer}mlp.fc{i + 1}.weight",))
        rows[f"{block}MlpBlock_0/Dense_{i}/bias"] = Row("o -> o", (f"{layer}mlp.fc{i + 1}.bias",))
    attention = block + "MultiHeadDotProductAttention_0/"
    for theirs, ours in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        rows[f"{attention}{theirs}/kernel"] = Row("w n d -> (n d) w", (f"{layer}self_attn.{ours}.weight",))
        rows[f"{attention}{theirs}/bias"] = Row("n d -> (n d)", (f"{layer}self_attn.{ours}.bias",))
    rows[attention + "out/kernel"] = Row("n d w -> w (n d)", (layer + "self_attn.out_proj.weight",))
    rows[attention + "out/bias"] = Row("w -> w", (layer + "self_attn.out_proj.bias",))
    return rows


def table() -> dict[str, Row]:
    """Every leaf of openpi's π₀, by its path."""
    vlm = NETWORK + "paligemma.model."
    rows = {"embedder/input_embedding": Row("t w -> t w", (vlm + "language_model.embed_tokens.weight",))}
    rows |= _gemma("", vlm + "language_model.") | _gemma("_1", NETWORK + "gemma_expert.model.")
    rows = {f"PaliGemma/llm/{path}": row for path, row in rows.items()}
    siglip = _siglip(vlm + "vision_tower.vision_model.", vlm + "multi_modal_projector.linear.")
    rows |= {f"PaliGemma/img/{path}": row for path, row in siglip.items()}
    for name in ("state_proj", "action_in_proj", "action_time_mlp_in", "action_time_mlp_out", "action_out_proj"):
        rows[f"{name}/kernel"] = Row("i o -> o i", (f"model.{name}.weight",))
        rows[f"{name}/bias"] = Row("o -> o", (f"model.{name}.bias",))
    return rows


class JaxCheckpoint:
    """The parameters of an Orbax checkpoint, read leaf by leaf.

    The largest leaves come first: while a leaf is in memory beside the tensors made of it, most of the others are not
    there yet, so that the peak is the converted weights and little more.

    Args:
        folder: openpi's `params` folder.
        lora_scaling: alpha / rank of LoRA in attention, which openpi does not store; see `_delta`.

    Raises:
        CheckpointError: no Orbax checkpoint, or LoRA of a form that openpi does not have.
    """

    def __init__(self, folder: Path, lora_scaling: float = 1.0) -> None:
        self.folder, self.lora_scaling = folder, lora_scaling
        self._orbax, self._jax = _import_orbax()
        self._leaves, self._structure = self._metadata()
        self.found: dict[str, Stored] = {}
        self._rows: dict[str, Row] = {}
        rows = table()
        self.lora = {path for path in self._leaves if path.endswith(("lora_a", "lora_b"))}
        for path, leaf in self._leaves.items():
            if path in self.lora:
                continue
            shape, dtype = tuple(leaf.shape), str(leaf.dtype)
            stored = Stored(folder, path, shape, DTYPES.get(dtype, dtype))
            if (row := rows.get(path)) is None:
                self.found[path] = stored
                continue
            self._rows[path] = row
            for name, part in _parts(path, row, torch.empty(shape, device="meta")):
                self.found[name] = stored._replace(shape=tuple(part.shape))
        self._check_lora()

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """The network's tensors by name, contiguous, LoRA merged.

        Raises:
            CorruptCheckpointError: a leaf cannot be read, or is not finite.
        """
        for path in sorted(self._rows, key=lambda path: -self._numbers(path)):
            leaf = self._read(path)
            lora = self._lora_of(path)
            factors = (self._read(lora[0]), self._read(lora[1])) if lora else None
            for name, part in _parts(path, self._rows[path], leaf, factors, self.lora_scaling):
                yield name, torch.empty(part.shape, dtype=dtype).copy_(part)

    def _numbers(self, path: str) -> int:
        return int(torch.Size(self._leaves[path].shape).numel())

    def _lora_of(self, path: str) -> tuple[str, str] | None:
        """Paths of the two factors that belong to a leaf."""
        stem = path.removesuffix("/w") + ("/" if path.endswith("/w") else "_")
        return (stem + "lora_a", stem + "lora_b") if stem + "lora_a" in self.lora else None

    def _check_lora(self) -> None:
        pairs = {path: pair for path in self._rows if (pair := self._lora_of(path))}
        known = {name for pair in pairs.values() for name in pair}
        misfits = sorted(self.lora ^ known)
        for path, (a, b) in pairs.items():
            if not misfits:
                base, shape_a, shape_b = (tuple(self._leaves[name].shape) for name in (path, a, b))
                rank = shape_a[-1]
                if shape_a != (*base[:-1], rank) or shape_b != (*base[:-2], rank, base[-1]):
                    misfits = [f"{a} {shape_a} and {b} {shape_b} for {base}"]
        if misfits:
            raise MismatchedCheckpointError(
                f"{self.folder} holds LoRA that is not openpi's ({', '.join(misfits[:5])}), so how to merge it is "
                "unknown: merge it where it was trained"
            )

    def _metadata(self) -> tuple[dict[str, Any], Any]:
        """Leaves by path, and the tree that they come from."""
        try:
            with self._orbax.PyTreeCheckpointer() as reader:
                tree = reader.metadata(self.folder)
            tree = getattr(tree, "item_metadata", tree)
            tree = getattr(tree, "tree", tree)
            leaves, structure = self._jax.tree_util.tree_flatten_with_path(tree)
        except Exception as error:  # Orbax raises what its many layers raise; all of it means the same here
            raise CorruptCheckpointError(f"{self.folder} is no complete Orbax checkpoint: {error}") from error
        if not leaves:
            raise CorruptCheckpointError(f"{self.folder} names no parameters: is the download complete?")
        # openpi writes {"params": tree}; its training loop adds a level `value` under every leaf
        paths = ["/".join(str(getattr(key, "key", key)) for key in keys).removeprefix("params/") for keys, _ in leaves]
        if paths and all(path.endswith("/value") for path in paths):
            paths = [path.removesuffix("/value") for path in paths]
        self._position = {path: i for i, path in enumerate(paths)}
        return {path: leaf for path, (_, leaf) in zip(paths, leaves, strict=True)}, structure

    def _read(self, path: str) -> Tensor:
        """One leaf; the others are left on the disk."""
        import numpy as np

        count, i = len(self._position), self._position[path]
        leaves = [self._orbax.PLACEHOLDER] * count
        leaves[i] = self._leaves[path]
        unflatten = self._jax.tree_util.tree_unflatten
        args = self._orbax.args.PyTreeRestore(
            item=unflatten(self._structure, leaves),
            restore_args=unflatten(self._structure, [self._orbax.RestoreArgs(restore_type=np.ndarray)] * count),
        )
        try:
            with self._orbax.PyTreeCheckpointer() as reader:
                restored = self._jax.tree_util.tree_leaves(reader.restore(self.folder, args))[i]
        except Exception as error:
            raise CorruptCheckpointError(f"{path} of {self.folder} cannot be read: {error}") from error
        if restored.dtype.name == "bfloat16":  # ml_dtypes', which torch does not know
            tensor = torch.from_numpy(np.require(restored.view(np.int16), requirements="W")).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(np.require(restored, requirements="W"))
        if not is_finite(tensor):
            raise CorruptCheckpointError(f"{path} of {self.folder} holds NaN or infinity: training had diverged")
        return tensor


def _import_orbax() -> tuple[Any, Any]:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # or JAX would reserve the GPU's memory, for nothing
    try:
        import jax
        import orbax.checkpoint
    except ImportError as error:
        raise MissingExtraError(
            f"reading openpi's JAX checkpoints needs jax and orbax-checkpoint ({error}): "
            "pip install 'lerobot_policy_pi0[jax]'"
        ) from error
    logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax tells of every read
    # Orbax reads many leaves at once, and raises the first error. asyncio would tell of the others later, at any time,
    # with tracebacks.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    return orbax.checkpoint, jax


def _parts(
    path: str, row: Row, leaf: Tensor, lora: tuple[Tensor, Tensor] | None = None, scaling: float = 1.0
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a leaf holds, by name; views of it where nothing is merged."""
    layers = leaf if "{}" in row.names[0] else leaf[None]
    for i, layer in enumerate(layers):
        if lora is not None:
            layer = layer.float() + _delta(path, lora[0][i].float(), lora[1][i].float(), scaling)
        try:
            parts = rearrange(layer, row.pattern)
        except EinopsError as error:
            raise MismatchedCheckpointError(
                f"{path} has shape {tuple(leaf.shape)}, which is not π₀'s ({row.pattern} in each layer)"
            ) from error
        for name, part in zip(row.names, parts if len(row.names) > 1 else [parts], strict=True):
            yield name.format(i), part


def _delta(path: str, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """What LoRA adds to the matrices of one layer.

    Two traps of openpi's `lora.py`. Only attention scales by alpha / rank: the MLP adds a·b as it is. And the einsum
    of the attention's output sums over the heads between a and b (`BTNH,NHL->BTL`, then `BTL,NLD->BTD`), so that each
    head's a meets the sum of all heads' b.
    """
    if "/attn/" not in path:
        return a @ b
    if "attn_vec_einsum" in path:
        b = b.sum(dim=0)
    return scaling * (a @ b)
