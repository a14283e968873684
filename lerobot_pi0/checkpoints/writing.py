"""Writing checkpoints: a safetensors file in one pass over the numbers, and a save that a crash cannot tear.

Everything is written beside the old files first, and forced to the disk. The new config.json is the commit: from the
moment it has its name, the rest is finished by whoever looks at the folder next (`finish_interrupted_save`). Whoever
changes the folder holds a lock on it, which the system takes back from a process that dies.
"""

import contextlib
import errno
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import xxhash
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from torch import Tensor

from . import manifest
from .errors import CheckpointError, CorruptCheckpointError
from .names import ACTING_OPTIONS, CONFIG_DIGEST, DIGESTS
from .reading import metadata_of
from .source import NEW
from .tensor_bytes import DTYPES, hash_of, in_threads, parts

if sys.platform != "win32":  # which has no such locks
    import fcntl

logger = logging.getLogger(__name__)

PART = ".part"

FINISHING = 500
"""How often to look, 10 ms apart, whether another process has finished its save."""


class FolderInUseError(CheckpointError):
    """Another process, or thread, is saving into the same folder."""


def save(
    folder: Path, configs: dict[str, dict[str, Any]], tensors: dict[str, Tensor], statistics: str | None = None
) -> None:
    """Write a checkpoint so that a crash at any moment leaves the old one or the new one.

    Args:
        configs: content of config.json and of lerobot_pi0.json, by file name.
        tensors: what goes into model.safetensors, by stored name.
        statistics: digest of the statistics that the policy was built with, if it was.

    Raises:
        FolderInUseError: somebody else is saving into the folder.
        OSError: the disk is full, or fails; what was written of the new checkpoint is removed.
    """
    with locked(folder):
        _finish(folder)  # one that was committed is the old checkpoint
        _remove_leftovers(folder, [*configs, manifest.MANIFEST_NAME, SAFETENSORS_SINGLE_FILE])
        try:
            _write_beside(folder, configs, tensors, statistics)
        except BaseException:
            _remove_leftovers(folder, [*configs, manifest.MANIFEST_NAME, SAFETENSORS_SINGLE_FILE])
            raise
        (folder / (CONFIG_NAME + NEW)).replace(folder / CONFIG_NAME)
        _finish(folder)


def _write_beside(
    folder: Path, configs: dict[str, dict[str, Any]], tensors: dict[str, Tensor], statistics: str | None
) -> None:
    texts = {name: json.dumps(content, indent=4) + "\n" for name, content in configs.items()}
    metadata = {"format": "pt", CONFIG_DIGEST: xxhash.xxh3_64_hexdigest(texts[CONFIG_NAME].encode())}
    metadata[ACTING_OPTIONS] = json.dumps(manifest.options_that_matter(configs))
    weights = folder / (SAFETENSORS_SINGLE_FILE + NEW)
    part = weights.with_name(weights.name + PART)
    digests = write_tensors(tensors, part, metadata, DIGESTS)
    _force_to_disk(part)
    # As a file says it: JSON knows no tuples.
    said = {name: json.loads(text) for name, text in texts.items()}
    whole = manifest.make(said, manifest.digest_of_weights(digests), statistics)
    texts[manifest.MANIFEST_NAME] = json.dumps(whole, indent=4) + "\n"
    for name, text in texts.items():
        _write_whole(folder / (name + NEW), partial(Path.write_text, data=text))
    part.replace(weights)  # last: over a config.json that stays the same it is the commit
    _force_to_disk(folder)


def _remove_leftovers(folder: Path, names: list[str]) -> None:
    for name in names:
        for file in (name + NEW, name + NEW + PART):
            (folder / file).unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only one who changes a folder. Where the file system knows no locks, nobody is kept out.

    Raises:
        FolderInUseError: somebody else is.
    """
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderInUseError(
                f"another process is saving into {folder} just now: save to a folder of your own, or wait for it"
            ) from error
        except OSError as error:  # some network file systems
            logger.debug("%s cannot be locked: %s", folder, error)
        yield
    finally:
        os.close(handle)  # which gives the lock back


def finish_interrupted_save(folder: Path) -> bool:
    """Put the files of a committed save in their places; leave those of one that was not committed.

    Returns:
        Whether such a save is left as it is, as the folder cannot be changed: its new files are then to be read under
        the names that they have.

    Raises:
        FolderInUseError: somebody else has begun to put them there, and does not go on.
    """
    for _ in range(FINISHING):
        if not _is_committed(folder):
            return False
        try:
            with locked(folder):
                _finish(folder)
            return False
        except FolderInUseError:
            time.sleep(0.01)  # renaming takes no longer
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            return True
    raise FolderInUseError(f"another process is saving into {folder}: wait for it, and load the checkpoint again")


def _is_committed(folder: Path) -> bool:
    """Whether the folder holds new weights to which its config.json belongs already.

    Weights that cannot be read were never committed: they are forced to the disk before config.json is.
    """
    weights, config = folder / (SAFETENSORS_SINGLE_FILE + NEW), folder / CONFIG_NAME
    try:
        return bool(metadata_of(weights).get(CONFIG_DIGEST) == xxhash.xxh3_64_hexdigest(config.read_bytes()))
    except (OSError, CorruptCheckpointError):
        return False


def _finish(folder: Path) -> None:
    if not _is_committed(folder):
        return
    for file in [*sorted(folder.glob("*.json" + NEW)), folder / (SAFETENSORS_SINGLE_FILE + NEW)]:
        file.replace(file.with_suffix(""))
    _force_to_disk(folder)


def _write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """`write` to a path, force it to the disk, and give it its name when it is whole."""
    part = file.with_name(file.name + PART)
    write(part)
    _force_to_disk(part)
    part.replace(file)


def _force_to_disk(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder.

    Without it a power cut could leave the new config.json over weights that were never written.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(handle)


def write_tensors(
    tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str], digests: str
) -> dict[str, str]:
    """Write a safetensors file in one pass over the numbers.

    The digests of the tensors are as long as their places in the header, and go there when the numbers are written.

    Args:
        digests: the key of the metadata to put them under, as JSON by name.

    Returns:
        The digests, by name.
    """
    kinds = list(DTYPES.values())
    names = sorted(tensors, key=lambda name: (kinds.index(tensors[name].dtype), name))
    begin = len(_header(names, tensors, {**metadata, digests: json.dumps(dict.fromkeys(names, "0" * 16))}))
    ends = list(accumulate(tensors[name].nbytes for name in names))
    offsets = dict(zip(names, [begin, *(begin + end for end in ends)], strict=False))
    with file.open("wb") as opened:
        opened.truncate(begin + (ends[-1] if ends else 0))
    written = in_threads(
        lambda name: _write_numbers(file, offsets[name], name, tensors[name]), names, "writing weights"
    )
    found = dict(zip(names, written, strict=True))
    with file.open("r+b") as opened:
        opened.write(_header(names, tensors, {**metadata, digests: json.dumps(found)}))
    return found


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
