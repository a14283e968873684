"""Adapters (LoRA) and the base that they belong to: which weights it had, and whether it still has them."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from . import manifest
from .errors import CorruptCheckpointError
from .names import ADAPTER_WEIGHTS_NAME
from .reading import Stored
from .source import Source
from .tensor_bytes import PART, digest_of_digests


def identity(source: Source, own: Mapping[str, Stored]) -> dict[str, Any]:
    """What an adapter notes of its base: id, commit on the Hub, and a digest of the weights.

    The digest is of those that the files carry. Files of others carry none: on the Hub the commit says enough, and in a
    folder all bytes are read.
    """
    place = str(source.folder.resolve()) if source.folder is not None else source.place
    digest = _carried(own)
    if digest is None and source.folder is not None:
        digest = _of_files(own)
    return {"id": place, "revision": source.revision, "digest": digest}


def check_base(run: Source, base: Source, own: Mapping[str, Stored]) -> None:
    """Refuse an adapter over another base than it was trained with.

    Args:
        run: the adapter's folder or repository.
        base: that of the base, as PEFT's file names it.
        own: the tensors of the base's files.

    Raises:
        CorruptCheckpointError: the base has changed since.
    """
    known = manifest.read(run)
    wanted = None if known is None else known["base"]
    if not wanted or (base.revision is not None and base.revision == wanted.get("revision")):
        return
    digest = wanted.get("digest")
    found = _carried(own) or (_of_files(own) if digest is not None else None)
    if found is None or found != digest:
        raise CorruptCheckpointError(
            f"the adapter {run} was trained over {wanted.get('id')} (revision {wanted.get('revision')}, weights "
            f"{digest}), and its base {base} (revision {base.revision}) has the weights {found} now: put that base "
            "back, or name its commit as `revision` in adapter_config.json"
        )


def record(base: Source, own: Mapping[str, Stored], folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the manifest of an adapter that LeRobot and PEFT have just saved, or bring that of a checkpoint up to date.

    Args:
        base, own: the checkpoint that the weights are of, and its tensors.
        folder: where config.json was saved.
        configs: content of config.json and lerobot_pi0.json, which were written too.
    """
    adapter = folder / ADAPTER_WEIGHTS_NAME
    known = manifest.read(Source(folder)) if (folder / manifest.MANIFEST_NAME).is_file() else None
    if adapter.is_file():
        weights = manifest.digest_of_file(adapter)
        manifest.write(folder, manifest.make(configs, weights, None, identity(base, own)))
    elif known is not None:
        fresh = manifest.make(configs, known["weights"], known["statistics"], known["base"])
        manifest.write(folder, fresh | {"processors": known["processors"]})


def _carried(own: Mapping[str, Stored]) -> str | None:
    return manifest.digest_of_weights({stored.name: stored.digest for stored in own.values()})


def _of_files(own: Mapping[str, Stored]) -> str:
    files = sorted({stored.file for stored in own.values()})
    return digest_of_digests(
        {file.name: _of_file(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files}
    )


@functools.lru_cache(maxsize=64)
def _of_file(file: Path, size: int, changed: int) -> str:
    """Digest of all bytes of a file; size and time of change tell when it has to be read again."""
    hashed, part = xxhash.xxh3_64(), bytearray(PART)
    with file.open("rb") as opened:
        while length := opened.readinto(part):
            hashed.update(memoryview(part)[:length])
    return hashed.hexdigest()
