"""Files of a checkpoint, from a folder or from the Hugging Face Hub."""

import contextlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_INDEX_FILE, SAFETENSORS_SINGLE_FILE
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load
from torch import Tensor

from .errors import CheckpointNotFoundError, CorruptCheckpointError

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
"""Options of `hf_hub_download` that a checkpoint can be opened with."""


NEW = ".new"
"""Ending of a file that a save has written and not yet put in its place."""


class Source:
    """A folder, or a Hub repository at one commit: all files come from the same one, whoever pushes meanwhile.

    Args:
        place: path of the folder, or Hub id.
        hub: `HUB_OPTIONS`. A folder ignores them.

    Raises:
        CheckpointNotFoundError: there is no such repository or revision, or no way to it.
    """

    def __init__(self, place: str | Path, **hub: Any) -> None:
        if not isinstance(place, str | Path) or not str(place):
            raise CheckpointNotFoundError(
                f"{place!r} names no checkpoint; if an adapter is loaded, base_model_name_or_path in its "
                "adapter_config.json has to"
            )
        self.place = str(place)
        self._hub = hub
        self._known: dict[str, bytes | None] = {}
        self._paths: dict[str, Path] = {}
        self.reads_new = False  # of a committed save that nobody may finish, in a read-only folder
        self.folder = Path(place) if Path(place).is_dir() else None
        if self.folder is None and (snapshot := self.file(CONFIG_NAME)) is not None:
            self._hub = hub | {"revision": snapshot.parent.name}

    def __str__(self) -> str:
        return self.place

    @property
    def revision(self) -> str | None:
        """The commit on the Hub; None for a folder."""
        return None if self.folder is not None else self._hub.get("revision")

    @property
    def identity(self) -> tuple[str, str | None]:
        """What it is for others: a folder by where it really is, a repository by id and commit."""
        return str(self.folder.resolve()) if self.folder is not None else self.place, self.revision

    def other(self, place: str | Path, revision: str | None) -> "Source":
        """Another folder or repository, with the same options of the Hub."""
        return Source(place, **self._hub | {"revision": revision})

    def file(self, name: str) -> Path | None:
        """Path of a file, downloaded if need be; None where the checkpoint has no such file.

        Raises:
            CheckpointNotFoundError: there is no such checkpoint, or no way to it.
        """
        if self.folder is not None:
            new = self.folder / (name + NEW)
            if self.reads_new and new.is_file():
                return new
            return self.folder / name if (self.folder / name).is_file() else None
        try:
            return Path(hf_hub_download(self.place, name, **self._hub))
        except LocalEntryNotFoundError as error:
            if self._is_known_to_lack(name):
                return None
            raise CheckpointNotFoundError(
                f"{name} of {self} is not in the local cache and the Hub cannot be reached (or offline mode is on); "
                "if it is meant to be a folder, there is none. Connect once, or pass the path of a downloaded folder"
            ) from error
        except EntryNotFoundError:
            return None
        except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
            raise CheckpointNotFoundError(self._explain(error)) from error

    def read(self, name: str, again: bool = False) -> bytes | None:
        """The content of a file that is no weights; None where the checkpoint has no such file.

        A file is read once, so that all who ask see the same, whatever is written meanwhile.

        Args:
            again: read it anew.

        Raises:
            CheckpointError: there is no way to the file, or it cannot be read.
        """
        if name in self._known and not again:
            return self._known[name]
        file = self.file(name)
        content = None if file is None else _bytes_of(file)
        if not again:
            self._known[name], self._paths[name] = content, file or Path(name)
        return content

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file, as `read`.

        Raises:
            CheckpointError: there is no way to the file, it is cut, or it holds no object.
        """
        data = self.read(name)
        return None if data is None else decode_json(self._paths[name], data)

    def read_tensors(self, name: str) -> dict[str, Tensor] | None:
        """The tensors in a safetensors file that is no weights, as `read`.

        Raises:
            CheckpointError: there is no way to the file, or it is cut.
        """
        data = self.read(name)
        try:
            return None if data is None else load(data)
        except Exception as error:  # the library's own, and those of names, types and shapes that there are not
            raise not_whole(self._paths[name], error) from error

    def has_changed(self) -> bool:
        """Whether a file of the folder is another than the one that was read, or has gone or come since."""
        return self.folder is not None and any(self.read(name, again=True) != x for name, x in self._known.items())

    def weight_files(self) -> list[Path]:
        """The safetensors files of the weights: one, or the shards that the index names; empty where there are none.

        Raises:
            CheckpointError: the index is broken, or a shard is not there.
        """
        if (single := self.file(SAFETENSORS_SINGLE_FILE)) is not None:
            return [single]
        if (index := self.read_json(SAFETENSORS_INDEX_FILE)) is None:
            return []
        places = index.get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) and name for name in places.values()):
            raise CorruptCheckpointError(
                f"{SAFETENSORS_INDEX_FILE} of {self} does not say which file holds which tensor: download or copy it "
                "again"
            )
        files = {name: self.file(name) for name in sorted(set(places.values()))}
        if missing := [name for name, file in files.items() if file is None]:
            raise CheckpointNotFoundError(f"{self} lacks {', '.join(missing)}, which its index names")
        return [file for file in files.values() if file is not None]

    def _explain(self, error: Exception) -> str:
        """What an error of the Hub means for a user."""
        if isinstance(error, HFValidationError):
            return f"{self} is neither a folder nor a Hub id of the form owner/name"
        if isinstance(error, GatedRepoError | RepositoryNotFoundError):
            return (
                f"{self} is not on the Hub, or not for you: check the spelling, and `hf auth login` for what is "
                "private or gated"
            )
        if isinstance(error, RevisionNotFoundError):
            return (
                f"{self} is on the Hub, but has no revision {self._hub.get('revision')!r}: name one of its branches, "
                "tags or commits, such as --policy.pretrained_revision=main; if you named none, its config.json does"
            )
        return f"{self} cannot be had from the Hub: {error}"

    def _is_known_to_lack(self, name: str) -> bool:
        """Whether the cache tells that the repository has no such file.

        Once the Hub has said so, the cache remembers; `hf download` leaves no such note, but a snapshot that has its
        configuration counts as complete where the user asks for no network.
        """
        where = {"cache_dir": self._hub.get("cache_dir"), "revision": self._hub.get("revision")}
        if try_to_load_from_cache(self.place, name, **where) is _CACHED_NO_EXIST:
            return True
        offline = self._hub.get("local_files_only") or is_offline_mode()
        has_config = isinstance(try_to_load_from_cache(self.place, CONFIG_NAME, **where), str)
        return bool(offline and name != CONFIG_NAME and has_config)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CorruptCheckpointError: the file is cut or holds no object.
    """
    return decode_json(file, _bytes_of(file))


def not_whole(file: Path, error: Exception) -> CorruptCheckpointError:
    size = 0
    with contextlib.suppress(OSError):  # it may have gone since
        size = file.stat().st_size
    return CorruptCheckpointError(
        f"{file} ({size} bytes) is not a complete safetensors file: {error}. Download or copy it again"
    )


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CorruptCheckpointError(f"{file} cannot be read ({error}): copy or download it again") from error


def decode_json(file: str | Path, data: bytes | str) -> dict[str, Any]:
    """As `read_json`, of what a file holds."""
    try:
        content = json.loads(data if isinstance(data, str) else data.decode())
    except (ValueError, RecursionError) as error:  # also what is no text, and numbers and nesting without end
        raise CorruptCheckpointError(f"{file} is no JSON ({error}): download or copy it again") from error
    if not isinstance(content, dict):
        raise CorruptCheckpointError(f"{file} holds a {type(content).__name__} where an object was expected")
    return content
