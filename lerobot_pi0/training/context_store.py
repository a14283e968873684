"""Files of cached contexts: keys and values of images and prompt, which a frozen VLM computes once for each frame.

A folder:

    contexts.json   what the contexts were made from (`Manifest`)
    contexts.bin    a record for each frame, in the order of `dataset/`
    tokens.bin      int32: the prompt of each frame, padded with -1
    digests.bin     uint64: XXH3 of each record; 0 until the record is complete
    dataset/        a LeRobot dataset of these frames: states, chunks of actions, tasks, and images of one black pixel

All records have the same length, so a frame is one contiguous read at a place that follows from its `index`. Records
can be written in any order, which safetensors' library does not allow. The file is mapped into memory: the part that
fits stays in the system's page cache, which all processes of a run share.

Axes: B batch, L layers, S tokens of the prefix, D head dim.
"""

import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
import xxhash
from torch import Tensor

from ..configuration_pi0 import OPTIONS, PI0Config
from ..network.attention import KVCache

MANIFEST, RECORDS, TOKENS, DIGESTS = "contexts.json", "contexts.bin", "tokens.bin", "digests.bin"
DATASET = "dataset"
FORMAT = 1
LARGEST = 127
"""The largest 8-bit number. Each channel has its own scale, which all tokens share: trained keys have a few channels
with large numbers, and with a scale for each token the others would lose precision. For values both are as good."""

VLM = ".paligemma."
"""All names of the VLM's parameters contain this."""


class ContextCacheError(ValueError):
    """A folder of contexts is missing, incomplete, or does not belong to this run; the message says what differs."""


@dataclass(frozen=True)
class Manifest:
    """What the contexts of a folder were made from, and how they are stored."""

    vlm_digest: str  # of all its weights
    cameras: list[str]  # in the order in which the network sees them
    image_size: int
    image_resize: str
    dtype: str
    bits: int | None  # 8: rounded; None: as computed
    layers: int
    head_dim: int
    image_tokens: int  # of all cameras
    prompt_tokens: int  # of the longest prompt
    chunk_size: int
    frames: int
    every: int
    batch_size: int  # of the frames that were computed together
    dataset: str
    dataset_frames: int
    checkpoint: str
    format: int = FORMAT

    @property
    def name(self) -> str:
        """A digest of all fields. The dataset stores it, so that it can be matched with its contexts."""
        return _digest_of_json(asdict(self))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of a record's numbers: layers, keys and values, tokens, head dim."""
        return self.layers, 2, self.image_tokens + self.prompt_tokens, self.head_dim

    @property
    def numbers_bytes(self) -> int:
        return math.prod(self.shape) * (1 if self.bits else getattr(torch, self.dtype).itemsize)

    @property
    def record_bytes(self) -> int:
        return record_bytes(self.shape, self.dtype, self.bits)


def record_bytes(shape: tuple[int, int, int, int], dtype: str, bits: int | None) -> int:
    """Bytes of a frame: its numbers, and with 8 bits a float32 scale for each channel of a layer's keys and values."""
    layers, both, _, head_dim = shape
    numbers, scales = math.prod(shape), 4 * layers * both * head_dim
    return numbers + scales if bits else numbers * getattr(torch, dtype).itemsize


def context_shape(config: PI0Config, cameras: int, prompt: int) -> tuple[int, int, int, int]:
    """Shape of a frame's context: layers, keys and values, tokens, head dim."""
    vlm = config.architecture().vlm
    patches = vlm.vision.patches(config.image_size) ** 2
    return vlm.gemma.depth, 2, cameras * patches + prompt, vlm.gemma.head_dim


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        ContextCacheError: there is no cache, or another version has written it.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text())
        if content.get("format") != FORMAT:
            raise ContextCacheError(
                f"the contexts in {folder} have format {content.get('format')}, this version reads {FORMAT}: cache "
                "them again, into another folder"
            )
        return Manifest(**content)
    except FileNotFoundError as error:
        raise ContextCacheError(
            f"context_cache={folder} holds no {MANIFEST}: `lerobot-pi0 cache --output={folder}` makes it"
        ) from error
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ContextCacheError):
            raise
        raise ContextCacheError(f"{folder / MANIFEST} cannot be read ({error}): cache the contexts again") from error


def digest_of_vlm(digests: Mapping[str, str]) -> str:
    """One digest of the VLM's weights, from the digests of all of a policy's weights by name."""
    return _digest_of_json({name: x for name, x in digests.items() if VLM in name})


def _digest_of_json(content: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())


# --- records --------------------------------------------------------------------------------------------------------


def pack(prefix: Sequence[KVCache], mask_BS: Tensor, manifest: Manifest) -> np.ndarray:
    """Contexts as records, uint8 (B, bytes). Padding is set to zero, so that records do not depend on the batch.

    Args:
        prefix, mask_BS: as `PI0.encode_prefix` returns them.
    """
    x_BL2SD = torch.stack([torch.stack(list(layer), dim=1) for layer in prefix], dim=1)
    x_BL2SD = torch.where(mask_BS[:, None, None, :, None], x_BL2SD, 0)
    x_BL2SD = F.pad(x_BL2SD, (0, 0, 0, manifest.shape[2] - x_BL2SD.shape[3]))
    parts = [x_BL2SD.to(getattr(torch, manifest.dtype))]
    if manifest.bits:
        scale = (x_BL2SD.float().abs().amax(dim=3) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        parts = [(x_BL2SD / scale[:, :, :, None]).round().to(torch.int8), scale]
    return torch.cat([x.flatten(1).contiguous().view(torch.uint8) for x in parts], dim=1).cpu().numpy()


def unpack(records: Tensor, manifest: Manifest, tokens: int) -> list[KVCache]:
    """Keys and values per layer, each (B, S, D), of the first `tokens` tokens of records, uint8 (B, bytes)."""
    dtype, (layers, _, stored, head_dim) = getattr(torch, manifest.dtype), manifest.shape
    numbers, rest = records.tensor_split([manifest.numbers_bytes], dim=1)
    x_BL2SD = numbers.view(torch.int8 if manifest.bits else dtype).unflatten(1, manifest.shape)[:, :, :, :tokens]
    found = list(x_BL2SD.unbind(1))
    if manifest.bits:
        scale = rest.contiguous().view(torch.float32).view(-1, layers, 2, 1, head_dim)
        found = [(x * scale[:, i]).to(dtype) for i, x in enumerate(found)]
    if tokens > stored:  # a compiled network sees prompts of few lengths
        found = [F.pad(x, (0, 0, 0, tokens - stored)) for x in found]
    return [KVCache(*x_B2SD.unbind(1)) for x_B2SD in found]


class ContextWriter:
    """Writes the records of a folder, in any order. A record is complete when its digest is there, written last."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Begin a folder, or continue one that was begun with the same manifest.

        Raises:
            ContextCacheError: the folder holds other contexts; the message says what differs.
            OSError: the folder cannot be written.
        """
        self.manifest = manifest
        folder.mkdir(parents=True, exist_ok=True)
        sizes = {RECORDS: manifest.record_bytes, TOKENS: 4 * manifest.prompt_tokens, DIGESTS: 8}
        if (folder / MANIFEST).exists():
            self.manifest = read_manifest(folder)  # it may name another place of the same checkpoint
            wanted = {key: x for key, x in asdict(manifest).items() if key != "checkpoint"}
            compare(folder, asdict(self.manifest), wanted)
        else:
            for name, size in sizes.items():
                with (folder / name).open("wb") as file:
                    file.truncate(size * manifest.frames)
            part = folder / f"{MANIFEST}.part"
            part.write_text(json.dumps(asdict(manifest), indent=4) + "\n")
            part.replace(folder / MANIFEST)
        self._files = {name: (folder / name).open("r+b") for name in sizes}

    def is_whole(self, slot: int) -> bool:
        """Whether a record is there and undamaged: when a machine stops, data that is not on the disk yet is lost."""
        known = int.from_bytes(self._read(DIGESTS, slot, 8), "little")
        return known != 0 and known == _digest(self._read(RECORDS, slot, self.manifest.record_bytes))

    def _read(self, name: str, slot: int, size: int) -> bytes:
        self._files[name].seek(size * slot)
        return self._files[name].read(size)

    def write(self, slot: int, records: np.ndarray, tokens: np.ndarray) -> None:
        """Write consecutive records.

        Args:
            slot: index of the first record.
            records: as `pack` makes them.
            tokens: tokens of their prompts, int32 (B, at most `prompt_tokens`), -1 on padding.
        """
        width = self.manifest.prompt_tokens
        wide = np.full((len(tokens), width), -1, np.int32)
        wide[:, : tokens.shape[1]] = tokens[:, :width]
        digests = np.array([_digest(record) for record in records], np.uint64)
        sizes = (self.manifest.record_bytes, 4 * width, 8)
        for name, content, size in zip((RECORDS, TOKENS, DIGESTS), (records, wide, digests), sizes, strict=True):
            self._files[name].seek(size * slot)
            self._files[name].write(np.ascontiguousarray(content).data)
            self._files[name].flush()

    def close(self) -> None:
        """Write everything to the disk, and close the files."""
        for file in self._files.values():
            os.fsync(file.fileno())
            file.close()


def _digest(record: Any) -> int:
    return xxhash.xxh3_64_intdigest(record) or 1  # 0 means: no record


def compare(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ContextCacheError if contexts were not made from what is wanted; the message says what differs."""
    differing = [f"{key} {found[key]!r}, wanted {x!r}" for key, x in wanted.items() if found[key] != x]
    if differing:
        raise ContextCacheError(
            f"the contexts in {folder} are others: they have {'; '.join(differing)}. Give the options, the checkpoint "
            "and the dataset that they were made with, or cache anew, into another folder (lerobot-pi0 cache)"
        )


class ContextCache:
    """The contexts of a folder, for reading. Copies of this object, also in other processes, open the folder again."""

    def __init__(self, folder: str | Path) -> None:
        """Open a folder.

        Raises:
            ContextCacheError: there is no cache, or frames are missing.
        """
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        frames, size = self.manifest.frames, self.manifest.record_bytes
        self._digests = self._numbers(DIGESTS, np.uint64, 1)[:, 0]
        self._tokens = self._numbers(TOKENS, np.int32, self.manifest.prompt_tokens)
        if missing := int((self._digests == 0).sum()):
            raise ContextCacheError(
                f"{missing} of the {frames} contexts in {folder} are missing: caching was interrupted. The same "
                "`lerobot-pi0 cache` goes on where it stopped"
            )
        self._verified = np.zeros(frames, bool)
        with (self.folder / RECORDS).open("rb") as file:
            self._map = mmap.mmap(file.fileno(), frames * size, access=mmap.ACCESS_READ)
        self._records = np.frombuffer(self._map, np.uint8).reshape(frames, size)

    def __reduce__(self) -> tuple[Any, ...]:
        return ContextCache, (self.folder,)

    def _numbers(self, name: str, dtype: Any, width: int) -> np.ndarray:
        try:
            return np.fromfile(self.folder / name, dtype).reshape(self.manifest.frames, width)
        except (OSError, ValueError) as error:
            raise ContextCacheError(f"{self.folder / name} is missing or cut: cache the contexts again") from error

    def read(self, slots: Sequence[int], prompt: int, device: torch.device) -> list[KVCache]:
        """Keys and values per layer of some frames, each (B, S, D), with `prompt` tokens of the prompt.

        Raises:
            ContextCacheError: there is no such frame, or its record is damaged.
        """
        size = self.manifest.record_bytes
        records = torch.empty(len(slots), size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for slot in slots:
            if not 0 <= slot < self.manifest.frames:
                raise ContextCacheError(
                    f"sample {slot} is not among the {self.manifest.frames} contexts in {self.folder}: train on "
                    f"--dataset.root={self.folder / DATASET}"
                )
            start = slot * size // mmap.PAGESIZE * mmap.PAGESIZE
            if hasattr(mmap, "MADV_WILLNEED"):  # the disk reads all records while the first are copied
                self._map.madvise(mmap.MADV_WILLNEED, start, (slot + 1) * size - start)
        for row, slot in zip(records.numpy(), slots, strict=True):
            np.copyto(row, self._records[slot])
            if not self._verified[slot] and _digest(row) != int(self._digests[slot]):
                raise ContextCacheError(
                    f"context {slot} in {self.folder} is not what was written: the same `lerobot-pi0 cache` finds such "
                    "frames and computes them again"
                )
            self._verified[slot] = True
        return unpack(records.to(device, non_blocking=True), self.manifest, self.manifest.image_tokens + prompt)

    def check_prompts(self, slots: Sequence[int], tokens_BL: Tensor, mask_BL: Tensor) -> None:
        """Refuse prompts that are not those of the contexts.

        Raises:
            ContextCacheError: prompts differ; the message shows the first.
        """
        given = torch.where(mask_BL, tokens_BL, -1).cpu().numpy()
        stored = self._tokens[np.asarray(slots)]
        wide = max(given.shape[1], stored.shape[1])
        given, stored = (np.pad(x, ((0, 0), (0, wide - x.shape[1])), constant_values=-1) for x in (given, stored))
        wrong = np.flatnonzero((given != stored).any(axis=1))
        if len(wrong):
            first = wrong[0]
            raise ContextCacheError(
                f"the prompt of sample {slots[first]} has the tokens {given[first][given[first] >= 0].tolist()}, its "
                f"context in {self.folder} was made from {stored[first][stored[first] >= 0].tolist()}: the tokenizer, "
                "clean_prompts or the task is another one than when it was cached"
            )

    def check(self, config: PI0Config, digests: Mapping[str, str]) -> None:
        """Refuse contexts that were made from another VLM, or for other options.

        Args:
            config: the options of the run, all of them resolved.
            digests: digests of the weights that are not saved but left in the base checkpoint, by name.

        Raises:
            ContextCacheError: the message says what differs.
        """
        compare(self.folder, asdict(self.manifest), made_from(config) | {"vlm_digest": digest_of_vlm(digests)})


def made_from(config: PI0Config) -> dict[str, Any]:
    """The fields of a manifest that depend on a config's options."""
    gemma = config.architecture().vlm.gemma
    return {
        "dtype": config.dtype,
        "image_size": config.image_size,
        "image_resize": config.image_resize or OPTIONS["image_resize"].default,
        "layers": gemma.depth,
        "head_dim": gemma.head_dim,
        "chunk_size": config.chunk_size,
    }
