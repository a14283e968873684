"""Numbers between safetensors files and memory, in parts that are hashed and checked while the cache still holds them.

At full size each pass over the weights through main memory costs seconds, and so do a copy of them and the making of
small memory pages. What is read goes straight where it stays; several tensors are under way at a time, since reading,
hashing and checking leave Python's lock to others.
"""

import ctypes
import json
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""safetensors' names of the types that weights come in; in its files the wider come first, so that all are aligned."""

PART = 2**20
"""Bytes handled at a time: they fit the cache, and calls from Python cost nothing beside them."""

SERIAL = 2**15
"""Numbers that torch converts without threads of its own, which would only wait for ours."""

HUGE_PAGE = 2**21


def in_threads[T, R](work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Results in the order of `items`. The first error is raised, and what has not begun then never does."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(work, items))


def empty(shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a tensor; on Linux in pages of 2 MiB, as filling those of 4 KiB takes longer than reading a file."""
    with torch.inference_mode(False):  # or only threads in that mode could write to it
        x = torch.empty(tuple(shape), dtype=dtype, device=device)
    if device.type == "cpu" and sys.platform == "linux":
        start = -(-x.data_ptr() // HUGE_PAGE) * HUGE_PAGE  # whole pages alone: no memory beyond the tensor's
        if (length := (x.data_ptr() + x.nbytes - start) // HUGE_PAGE * HUGE_PAGE) > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return x


def data_offsets(file: Path) -> dict[str, int]:
    """Where the numbers of each tensor begin in a file whose header the library has found to be in order."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def read(target: Tensor, file: Path, offset: int, dtype: torch.dtype, hashes: Iterable[Any]) -> bool:
    """Fill a contiguous tensor from a file, converted to its dtype and brought to its device.

    Args:
        offset, dtype: where the first number is, and what the file's numbers are.
        hashes: are updated with the bytes of the file.

    Returns:
        Whether all numbers of `target` are finite.

    Raises:
        OSError: the file cannot be read, or ends before the tensor does.
    """
    at_home = target.device.type == "cpu"
    converted = target.dtype != dtype
    length = SERIAL if converted else PART // dtype.itemsize
    source, landing = (torch.empty(min(length, target.numel()), dtype=d) for d in (dtype, target.dtype))
    finite = True
    with file.open("rb") as opened:
        opened.seek(offset)
        for part in target.view(-1).split(length):
            final = part if at_home else landing[: len(part)]
            numbers = source[: len(part)] if converted else final
            if opened.readinto(_bytes(numbers)) != numbers.nbytes:  # type: ignore[arg-type]
                raise OSError("it ends too early")
            for hashed in hashes:
                hashed.update(_bytes(numbers))
            if converted:
                final.copy_(numbers)
            finite = finite and is_finite(final)
            if not at_home:
                part.copy_(final)
    return finite


def _bytes(x: Tensor) -> np.ndarray:
    """The bytes of a contiguous tensor on the CPU, without a copy."""
    return x.detach().reshape(-1).view(torch.uint8).numpy()


def parts(x: Tensor) -> Iterator[np.ndarray]:
    """The bytes of any tensor in order, some rows at a time: only those are copied if it is elsewhere or strided."""
    rows = x.detach().reshape(1) if x.ndim == 0 else x.detach()
    row = max(1, math.prod(rows.shape[1:]) * x.element_size())
    for part in rows.split(max(1, PART // row)):
        yield _bytes(part.cpu().contiguous())


def hash_of(name: str, dtype: torch.dtype, shape: Iterable[int]) -> Any:
    """XXH3, begun with what a tensor is, that is to be updated with its bytes."""
    return xxhash.xxh3_64(f"{name} {dtype} {tuple(shape)}".encode())


def digest(name: str, x: Tensor) -> str:
    """XXH3 of a tensor under its name: finds flipped bytes, swapped tensors and a changed dtype or shape."""
    hashed = hash_of(name, x.dtype, x.shape)
    for part in parts(x):
        hashed.update(part)
    return hashed.hexdigest()


def _largest_bits(dtype: torch.dtype) -> int:
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return int.from_bytes(_bytes(torch.tensor(largest, dtype=dtype)).tobytes(), sys.byteorder)


LARGEST = {dtype: _largest_bits(dtype) for dtype in DTYPES.values()}


def is_finite(x: Tensor) -> bool:
    """Whether a tensor holds no NaN, no infinity and nothing beyond float32.

    Numbers of one sign are in the order of their bits, infinity and NaN come after all of them, and signed and
    unsigned maxima of the bits find the last of either sign: twice as fast as torch's `aminmax`.
    """
    if x.numel() == 0:
        return True
    bits, size, largest = _bytes(x.cpu().contiguous()), x.element_size(), LARGEST[x.dtype]
    return bool(bits.view(f"i{size}").max() <= largest and bits.view(f"u{size}").max() <= largest + 2 ** (8 * size - 1))


def write(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str], digests: str) -> None:
    """Write a safetensors file in one pass over the numbers.

    The digests of the tensors are as long as their places in the header, and go there when the numbers are written.

    Args:
        digests: the key of the metadata to put them under, as JSON by name.
    """
    kinds = list(DTYPES.values())
    names = sorted(tensors, key=lambda name: (kinds.index(tensors[name].dtype), name))
    begin = len(_header(names, tensors, {**metadata, digests: json.dumps(dict.fromkeys(names, "0" * 16))}))
    ends = list(accumulate(tensors[name].nbytes for name in names))
    offsets = dict(zip(names, [begin, *(begin + end for end in ends)], strict=False))
    with file.open("wb") as opened:
        opened.truncate(begin + (ends[-1] if ends else 0))
    written = in_threads(lambda name: _write_numbers(file, offsets[name], name, tensors[name]), names)
    with file.open("r+b") as opened:
        opened.write(_header(names, tensors, {**metadata, digests: json.dumps(dict(zip(names, written, strict=True)))}))


def _header(names: list[str], tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Its length, then JSON: what the tensors are and where each begins and ends after the header."""
    content: dict[str, Any] = {"__metadata__": metadata}
    kinds, end = {dtype: kind for kind, dtype in DTYPES.items()}, 0
    for name in names:
        x, start = tensors[name], end
        end += x.nbytes
        content[name] = {"dtype": kinds[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_numbers(file: Path, offset: int, name: str, x: Tensor) -> str:
    """Write a tensor from `offset` on, and return its digest. Zeros are left out: a file reads as zeros there."""
    hashed = hash_of(name, x.dtype, x.shape)
    with file.open("r+b") as opened:
        for part in parts(x):
            hashed.update(part)
            if part.any():
                opened.seek(offset)
                opened.write(part)
            offset += len(part)
    return hashed.hexdigest()
