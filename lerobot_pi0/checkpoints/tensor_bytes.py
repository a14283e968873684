"""Bytes of tensors: digests, a check for NaN and infinity, and threads that work on several tensors at a time.

At full size each pass over the weights through main memory costs seconds. So bytes are handled in parts that the CPU's
cache holds, and hashing and checking leave Python's lock to other threads.
"""

import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from tqdm import tqdm

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""safetensors' names of the types that weights come in; in its files the wider come first, so that all are aligned."""

PART = 2**20
"""Bytes handled at a time: they fit the cache, and a call from Python costs little compared with the work on them."""

PATIENCE = 2.0
"""Seconds after which work on many tensors shows its progress."""

SURE = 10**9
"""Nanoseconds after which another change of a file surely has another time."""


def in_threads[T, R](work: Callable[[T], R], items: Sequence[T], doing: str) -> list[R]:
    """Results in the order of `items`. The first error is raised, and what has not begun then never does.

    Args:
        doing: what the progress bar says, of work that takes longer than `PATIENCE`.
    """
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        results = pool.map(work, items)
        return list(tqdm(results, doing, len(items), unit="tensor", delay=PATIENCE, leave=False))


def bytes_of(x: Tensor) -> np.ndarray:
    """The bytes of a contiguous tensor on the CPU, without a copy."""
    return x.detach().reshape(-1).view(torch.uint8).numpy()


def parts(x: Tensor) -> Iterator[np.ndarray]:
    """The bytes of any tensor in order, some rows at a time: only those are copied if it is elsewhere or strided."""
    rows = x.detach().reshape(1) if x.ndim == 0 else x.detach()
    row = max(1, math.prod(rows.shape[1:]) * x.element_size())
    for part in rows.split(max(1, PART // row)):
        yield bytes_of(part.cpu().contiguous())


def hash_of(name: str, dtype: torch.dtype, shape: Iterable[int]) -> Any:
    """XXH3 that begins with a tensor's name, dtype and shape, and is then to be updated with its bytes."""
    return xxhash.xxh3_64(f"{name} {dtype} {tuple(shape)}".encode())


def digest(name: str, x: Tensor) -> str:
    """XXH3 of a tensor under its name: finds flipped bytes, swapped tensors and a changed dtype or shape."""
    hashed = hash_of(name, x.dtype, x.shape)
    for part in parts(x):
        hashed.update(part)
    return hashed.hexdigest()


def digest_of_json(content: Any) -> str:
    """One digest of what JSON says, such as the digests of many tensors, whatever the order of its keys."""
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())


@functools.lru_cache(maxsize=64)
def _digest_of_file(file: Path, size: int, changed: int) -> str:
    hashed, part = xxhash.xxh3_64(), bytearray(PART)
    with file.open("rb") as opened:
        while length := opened.readinto(part):
            hashed.update(memoryview(part)[:length])
    return hashed.hexdigest()


def digest_of_file(file: Path) -> str:
    """Digest of all bytes of a file; size and time of change tell when an old one has to be read again."""
    found = file.stat()
    is_new = time.time_ns() - found.st_mtime_ns < SURE  # the next change may get the same time
    return (_digest_of_file.__wrapped__ if is_new else _digest_of_file)(file, found.st_size, found.st_mtime_ns)


def _largest_bits(dtype: torch.dtype) -> int:
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return int.from_bytes(bytes_of(torch.tensor(largest, dtype=dtype)).tobytes(), sys.byteorder)


LARGEST = {dtype: _largest_bits(dtype) for dtype in DTYPES.values()}


def is_finite(x: Tensor) -> bool:
    """Whether a tensor holds no NaN, no infinity and nothing beyond float32.

    Numbers of one sign are in the order of their bits, infinity and NaN come after all of them, and signed and
    unsigned maxima of the bits find the last of either sign: twice as fast as torch's `aminmax`.
    """
    if x.numel() == 0:
        return True
    bits, size, largest = bytes_of(x.cpu().contiguous()), x.element_size(), LARGEST[x.dtype]
    return bool(bits.view(f"i{size}").max() <= largest and bits.view(f"u{size}").max() <= largest + 2 ** (8 * size - 1))
