"""Adapters (LoRA) and the base that they belong to: which weights it had, and whether it still has them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import manifest
from .errors import CorruptCheckpointError
from .names import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from .reading import Stored
from .source import Source
from .tensor_bytes import digest_of_file, digest_of_json


def check_base(run: Source, base: Source, own: Mapping[str, Stored]) -> None:
    """Refuse an adapter over another base than it was trained with.

    Args:
        run: the adapter's folder or repository.
        base: that of the base, as PEFT's file names it.
        own: the tensors of the base's files.

    Raises:
        CorruptCheckpointError: the base has changed since.
    """
    wanted = (manifest.read(run) or {}).get("base")
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


def record(
    base: tuple[str, str | None],
    own: Mapping[str, Stored],
    folder: Path,
    configs: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write the manifest of an adapter that LeRobot and PEFT have just saved, or bring that of a checkpoint up to date.

    The base is known by a digest of the weights that its files carry. Files of others carry none: on the Hub the
    commit says enough, and in a folder all bytes are read. The adapter then loads its base at this commit, whatever its
    owner pushes later.

    Args:
        base, own: the checkpoint that the weights are of (`Source.identity`), and its tensors.
        folder: where config.json was saved.
        configs: content of config.json and lerobot_pi0.json, which were written too.
    """
    place, revision = base
    adapter, known = folder / ADAPTER_WEIGHTS_NAME, manifest.read(Source(folder))
    if adapter.is_file():
        digest = _carried(own) or (_of_files(own) if revision is None else None)
        identity = {"id": place, "revision": revision, "digest": digest}
        both = {**configs, ADAPTER_CONFIG_NAME: _pinned(folder, revision)}
        manifest.write(folder, manifest.make(both, digest_of_file(adapter), None, identity))
    elif known is not None:
        fresh = manifest.make(configs, known["weights"], known["statistics"], known["base"])
        manifest.write(folder, fresh | {"processors": known["processors"]})


def _pinned(folder: Path, revision: str | None) -> dict[str, Any]:
    """PEFT's file in this folder, in which the base has this commit now, if it has one and nobody chose another."""
    content = Source(folder).read_json(ADAPTER_CONFIG_NAME) or {}
    if revision is not None and content and content.get("revision") is None:
        content["revision"] = revision
        (folder / ADAPTER_CONFIG_NAME).write_text(json.dumps(content, indent=2, sort_keys=True))
    return content


def _carried(own: Mapping[str, Stored]) -> str | None:
    return manifest.digest_of_weights({stored.name: stored.digest for stored in own.values()})


def _of_files(own: Mapping[str, Stored]) -> str:
    return digest_of_json({file.name: digest_of_file(file) for file in {stored.file for stored in own.values()}})
