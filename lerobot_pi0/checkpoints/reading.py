"""Reading safetensors files: each tensor goes straight into its final memory, dtype and device, checked on the way.

There is one pass over the numbers: a part is read, hashed, converted and checked while the CPU's cache still holds it.
Several tensors are read at a time. So loading takes the memory of the model, and the time of reading the file.
"""

import ctypes
import json
import mmap
import sys
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..kernels import absent, rounding
from .errors import CorruptCheckpointError, MismatchedCheckpointError
from .names import DIGESTS, EMBEDDING, EXPERT_HEAD, LM_HEAD, canonical_name
from .source import decode_json, not_whole
from .tensor_bytes import DTYPES, PART, bytes_of, hash_of, in_threads, is_finite

DIRECT = ("cpu",)
"""Devices whose memory a file is read into. For others, parts land in memory of the host."""

LANDING = 2**23
"""Bytes that are copied to such a device at a time: below, each copy costs more than what it copies."""

SERIAL = 2**15
"""Numbers that torch converts without threads of its own, which would only wait for ours."""

HUGE_PAGE = 2**21

META = torch.device("meta")


class Stored(NamedTuple):
    """Where a tensor of a checkpoint lies, and what its file says about it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0  # in the file, in bytes
    digest: str | None = None  # None where the file carries none


@contextmanager
def opened_safetensors(file: Path) -> Iterator[Any]:
    """A safetensors file, with the library's error made ours."""
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            yield opened
    except (SafetensorError, RuntimeError, OSError) as error:  # the last two where it has gone since
        raise not_whole(file, error) from error


def metadata_of(file: Path) -> dict[str, str]:
    """What a safetensors file says about itself."""
    with opened_safetensors(file) as opened:
        return opened.metadata() or {}


def index_tensors(files: Iterable[Path], prefix: str = "") -> dict[str, Stored]:
    """Every tensor of the files by its canonical name; no weight is read.

    Args:
        prefix: is put before the names, for files that hold a part of the network.

    Raises:
        CheckpointError: a file is broken, or two tensors are the same one of the network.
    """
    found: dict[str, Stored] = {}
    for file in files:
        with opened_safetensors(file) as opened:
            carried, offsets = (opened.metadata() or {}).get(DIGESTS, "{}"), _data_offsets(file)
            digests = decode_json(f"the metadata (digests) of {file}", carried)
            for name in opened.keys():  # noqa: SIM118  it is no mapping
                part, canonical = opened.get_slice(name), canonical_name(prefix + name)
                if canonical in found:
                    raise MismatchedCheckpointError(
                        f"{found[canonical].name} in {found[canonical].file} and {name} in {file} are the same tensor "
                        "of the network: take one of them out"
                    )
                digest = str(digests.get(name)) if digests else None  # "None" is no tensor's
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                found[canonical] = Stored(file, name, shape, dtype, offsets[name], digest)
    head = found.pop(LM_HEAD, None)  # the same matrix as the embedding, and sometimes the only copy
    if head is not None:
        found.setdefault(EMBEDDING, head)
    found.pop(EXPERT_HEAD, None)
    return found


def _data_offsets(file: Path) -> dict[str, int]:
    """Where the numbers of each tensor begin in a file whose header the library has found to be in order."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def fill(
    module: nn.Module,
    names: Iterable[str],
    found: Mapping[str, Stored],
    device: torch.device,
    hashed: Container[str] = (),
) -> dict[str, str]:
    """Put parameters of a module, which are on the `meta` device, into memory with the numbers of the files.

    Args:
        names: which parameters; those of a VLM that is left out (`kernels.absent`) stay, and are read for digests.
        found: where they are stored, by name.
        hashed: names whose digests are wanted; hashing costs time.

    Returns:
        Digests of those in `hashed`, of the numbers as the files hold them.

    Raises:
        CorruptCheckpointError: one is not what was written, or not finite.
    """
    parameters, rounded = dict(module.named_parameters()), rounding.layers(module)
    names, left_out = set(names), absent.names(module)

    def memory(name: str) -> Tensor:
        place = META if name in left_out else device
        return allocate(parameters[name].shape, parameters[name].dtype, place)

    def read_and_round(name: str) -> str:  # a few at a time: all of them unrounded are never in memory
        weight = memory(name)
        digest = _read(weight, found[name], name if name in hashed else None)
        rounded[name].put(weight)
        return digest

    targets = {name: memory(name) for name in names - rounded.keys()}
    digests = read_tensors(targets, found, hashed)
    module.load_state_dict(targets, strict=False, assign=True)
    last = sorted(names & rounded.keys())
    of_rounded = zip(last, in_threads(read_and_round, last, "rounding the VLM"), strict=True)
    return digests | {name: digest for name, digest in of_rounded if name in hashed}


def read_tensors(
    targets: Mapping[str, Tensor], found: Mapping[str, Stored], hashed: Container[str] = ()
) -> dict[str, str]:
    """Read tensors from files into memory that is there already; otherwise as `fill`."""

    def read(name: str) -> str:
        return _read(targets[name], found[name], name if name in hashed else None)

    names = sorted(targets, key=lambda name: -targets[name].numel())  # the largest last would leave one thread alone
    digests = dict(zip(names, in_threads(read, names, "reading weights"), strict=True))
    return {name: digest for name, digest in digests.items() if name in hashed}


def allocate(shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a tensor; on Linux in pages of 2 MiB, as filling those of 4 KiB takes longer than reading a file."""
    with torch.inference_mode(False):  # or only threads in that mode could write to it
        x = torch.empty(tuple(shape), dtype=dtype, device=device)
    if device.type == "cpu" and sys.platform == "linux":
        start = -(-x.data_ptr() // HUGE_PAGE) * HUGE_PAGE  # whole pages alone: no memory beyond the tensor's
        if (length := (x.data_ptr() + x.nbytes - start) // HUGE_PAGE * HUGE_PAGE) > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return x


def _read(target: Tensor, stored: Stored, digest_as: str | None) -> str:
    """Read one tensor, and return its digest under the name `digest_as`, if there is one."""
    dtype = DTYPES[stored.dtype]
    checked, asked = (hash_of(name, dtype, stored.shape) for name in (stored.name, digest_as or ""))
    hashes = [checked] * (stored.digest is not None) + [asked] * (digest_as is not None)
    try:
        finite = _read_numbers(target, stored.file, stored.offset, dtype, hashes)
    except OSError as error:
        raise CorruptCheckpointError(
            f"{stored.file} cannot be read where {stored.name} is: {error}. Copy or download it again"
        ) from error
    if stored.digest not in (None, checked.hexdigest()):
        raise CorruptCheckpointError(
            f"{stored.name} in {stored.file} is not what was written (its digest differs): copy or download it again"
        )
    if not finite:
        raise CorruptCheckpointError(f"{stored.name} in {stored.file} holds NaN or infinity: training had diverged")
    return asked.hexdigest()


def _read_numbers(target: Tensor, file: Path, offset: int, dtype: torch.dtype, hashes: Iterable[Any]) -> bool:
    """Fill a contiguous tensor from a file, converted to its dtype and brought to its device.

    Args:
        offset, dtype: where the first number is, and what the file's numbers are.
        hashes: are updated with the bytes of the file.

    Returns:
        Whether all numbers of `target` are finite.

    Raises:
        OSError: the file cannot be read, or ends before the tensor does.
    """
    converted = target.dtype != dtype
    length = SERIAL if converted else PART // dtype.itemsize
    source = torch.empty(min(length, target.numel()), dtype=dtype)
    finite = True
    with file.open("rb") as opened:
        opened.seek(offset)
        for landed in _landings(target.view(-1)):
            for final in landed.split(length):
                numbers = source[: len(final)] if converted else final
                if opened.readinto(bytes_of(numbers)) != numbers.nbytes:  # type: ignore[arg-type]
                    raise OSError("it ends too early")
                for hashed in hashes:
                    hashed.update(bytes_of(numbers))
                if converted:
                    final.copy_(numbers)
                finite = finite and is_finite(final)
    return finite


def _landings(target: Tensor) -> Iterator[Tensor]:
    """Memory of the host to be filled one after the other: the target's own, or what is copied to it when filled."""
    if target.device.type in DIRECT:
        yield target
        return
    length = min(LANDING // target.element_size(), target.numel())
    landing = torch.empty(length, dtype=target.dtype, pin_memory=target.device.type == "cuda")  # torch keeps such pages
    for part in target.split(max(1, length)):
        yield landing[: len(part)]
        part.copy_(landing[: len(part)])
