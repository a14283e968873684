"""Writing checkpoints: a safetensors file in one pass over the numbers, and a save that a crash cannot tear.

Everything is written beside the old files first. The new config.json is the commit: from the moment it has its name,
the rest is finished by whoever looks at the folder next (`finish_interrupted_save`).
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import xxhash
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from torch import Tensor

from .names import CONFIG_DIGEST, DIGESTS
from .reading import opened_safetensors
from .tensor_bytes import DTYPES, hash_of, in_threads, parts

NEW = ".new"


def save(folder: Path, configs: dict[str, dict[str, Any]], tensors: dict[str, Tensor]) -> None:
    """Write a checkpoint so that a crash at any moment leaves the old one or the new one.

    Args:
        configs: content of config.json and of the other JSON files, by file name.
        tensors: what goes into model.safetensors, by stored name.
    """
    finish_interrupted_save(folder)  # one that was committed is the old checkpoint
    texts = {name: json.dumps(content, indent=4) + "\n" for name, content in configs.items()}
    metadata = {"format": "pt", CONFIG_DIGEST: xxhash.xxh3_64_hexdigest(texts[CONFIG_NAME].encode())}
    for name in (*texts, SAFETENSORS_SINGLE_FILE):
        (folder / (name + NEW)).unlink(missing_ok=True)  # of an earlier save that was cut off
    for name, text in texts.items():
        _write_whole(folder / (name + NEW), partial(Path.write_text, data=text))
    _write_whole(folder / (SAFETENSORS_SINGLE_FILE + NEW), lambda part: write_tensors(tensors, part, metadata, DIGESTS))
    (folder / (CONFIG_NAME + NEW)).replace(folder / CONFIG_NAME)
    finish_interrupted_save(folder)


def finish_interrupted_save(folder: Path) -> None:
    """Put the files of a committed save in their places; leave those of one that was not committed."""
    weights = folder / (SAFETENSORS_SINGLE_FILE + NEW)
    config = folder / CONFIG_NAME
    if not (weights.exists() and config.exists()):
        return
    try:
        with opened_safetensors(weights) as opened:
            written_with = (opened.metadata() or {}).get(CONFIG_DIGEST)
    except FileNotFoundError:  # another process was faster
        return
    if written_with == xxhash.xxh3_64_hexdigest(config.read_bytes()):
        for file in [*folder.glob("*.json" + NEW), weights]:
            with contextlib.suppress(FileNotFoundError):  # another process may be doing the same
                file.replace(file.with_suffix(""))


def _write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """`write` to a path and give it its name when it is whole.

    Nothing is forced to the disk, which would double the time: a file that a power cut tears is found by its digests.
    """
    part = file.with_name(file.name + ".part")
    write(part)
    part.replace(file)


def write_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str], digests: str) -> None:
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
