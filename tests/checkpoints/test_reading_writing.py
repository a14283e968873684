"""Numbers between files and memory: the library reads what is written and the other way round, without copies."""

import ctypes
import gc
import json
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from progress import bars
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from lerobot_pi0.checkpoints import reading, tensor_bytes
from lerobot_pi0.checkpoints.errors import CorruptCheckpointError
from lerobot_pi0.checkpoints.reading import SERIAL, Stored, fill, index_tensors, read_tensors
from lerobot_pi0.checkpoints.tensor_bytes import DTYPES, PART, digest, is_finite
from lerobot_pi0.checkpoints.writing import write_tensors

CPU = torch.device("cpu")
MIB = 2**20


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def network(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> nn.Module:
    """A module on the `meta` device with parameters of these shapes."""
    module = nn.Module()
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")))
    return module


def loaded(files: list[Path], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What is read from files whose names are those of a bare network (`model.` is in front of the canonical ones)."""
    found = {name.removeprefix("model."): stored for name, stored in index_tensors(files).items()}
    module = network({name: stored.shape for name, stored in found.items()}, dtype)
    fill(module, found, found, CPU)
    return {name: p.detach() for name, p in module.named_parameters()}


SHAPES = [(), (1,), (0,), (0, 3), (3,), (7, 5), (SERIAL + 1,), (PART // 2 + 3,), (3, PART // 4, 1), (2, 0, 4)]


@pytest.mark.parametrize("source", DTYPES.values(), ids=str)
@pytest.mark.parametrize("final", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_reading_is_the_librarys(tmp_path, source, final, shift):
    """Catches a wrong offset or rounding, a last part that is dropped or read twice, and numbers that are supposed to
    lie at multiples of their size: a header of odd length moves all of them by some bytes."""
    tensors = {f"t{i}": numbers(*shape, dtype=source, seed=i) for i, shape in enumerate(SHAPES)}
    data = save(tensors, {"format": "pt"})
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end] + b" " * shift
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    found = loaded([tmp_path / "a.safetensors"], final)
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert found[name].dtype == final
        assert torch.equal(found[name], x.to(final))


def test_types_may_differ_in_a_file_and_between_shards(tmp_path):
    """Catches one dtype, or one file's offsets, that is taken for all."""
    tensors = {f"t{i}": numbers(i + 2, 3, dtype=dtype, seed=i) for i, dtype in enumerate([*DTYPES.values()] * 2)}
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    save_file({name: x for name, x in tensors.items() if name < "t5"}, files[0])
    write_tensors({name: x for name, x in tensors.items() if name >= "t5"}, files[1], {}, "lerobot_pi0.digests")
    found = loaded(files)
    assert all(torch.equal(found[name], x.float()) for name, x in tensors.items())


def test_what_takes_long_shows_its_progress(tmp_path, monkeypatch, capsys):
    """Catches a disk that is slow and a command that seems to hang; and bars that flash by where nothing takes long."""
    tensors = {"a": torch.ones(3), "b": torch.ones(5)}
    for patience, shown in ((0.0, {"writing weights", "reading weights"}), (60.0, set())):
        monkeypatch.setattr(tensor_bytes, "PATIENCE", patience)
        write_tensors(tensors, tmp_path / "1.safetensors", {}, "lerobot_pi0.digests")
        loaded([tmp_path / "1.safetensors"])
        assert bars(capsys.readouterr().err) == shown


def split(data: bytes) -> tuple[dict, bytes]:
    """Header and numbers of a file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def test_writing_is_the_librarys(tmp_path):
    """Catches a file that only this plugin can read: header and numbers are what the library writes."""
    tensors = {f"{dtype} {i}": numbers(*shape, dtype=dtype, seed=i)
               for dtype in DTYPES.values() for i, shape in enumerate(SHAPES)}  # fmt: skip
    tensors["zeros inside"] = numbers(3 * PART // 4) * (torch.arange(3 * PART // 4) // (PART // 4) != 1)
    tensors["zeros at the end"] = torch.zeros(PART, dtype=torch.bfloat16)
    digests = {name: digest(name, x) for name, x in tensors.items()}
    write_tensors(tensors, tmp_path / "ours", {"format": "pt", "é": "π"}, "digests")
    expected = save(tensors, {"format": "pt", "é": "π", "digests": json.dumps(digests)})
    (header, body), (library_header, library_body) = map(split, ((tmp_path / "ours").read_bytes(), expected))
    assert json.loads(header["__metadata__"].pop("digests")) == json.loads(
        library_header["__metadata__"].pop("digests")
    )
    assert header == library_header
    assert body == library_body
    assert len(body) % 8 == (tmp_path / "ours").stat().st_size % 8


STRIDED = {
    "transposed": lambda x: x.T,
    "every other": lambda x: x[::2, 1::3],
    "repeated": lambda x: x[:, :1].expand(-1, 40),
    "one number": lambda x: x[0, 0].expand(33, 1000),
    "part of a graph": lambda x: x.requires_grad_(),
}


@pytest.mark.parametrize("kind", STRIDED)
def test_any_layout_is_written(tmp_path, kind):
    """Catches memory that is written as it lies: a state dict may hold views."""
    x = STRIDED[kind](numbers(2000, 300))
    write_tensors({"x": x}, tmp_path / "file", {}, "digests")
    assert torch.equal(load_file(tmp_path / "file")["x"], x)
    assert digest("x", x) == digest("x", x.detach().clone(memory_format=torch.contiguous_format))


def test_zeros_take_no_place(tmp_path):
    """Catches half a GiB of zeros, the expert's head, that is written at every save."""
    write_tensors(
        {"zeros": torch.zeros(()).expand(1000, 4 * MIB // 1000), "one": torch.ones(1)}, tmp_path / "file", {}, "d"
    )
    status = (tmp_path / "file").stat()
    assert status.st_size > 15 * MIB
    assert status.st_blocks * 512 < MIB


# --- judging ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_finite_exhaustively(dtype):
    """Catches a comparison of bits that is wrong for a sign, a denormal, the largest number or one kind of NaN."""
    every = torch.arange(2**16).to(torch.uint16).view(dtype)
    for i in range(0, 2**16, 64):
        parts = every[i : i + 64].split(64 if every[i].abs() < 1 else 1)  # one by one where it matters
        for j, x in enumerate(parts):
            beside = torch.cat([x, torch.tensor([-1.0 if j % 2 else 1.0], dtype=dtype)])
            assert is_finite(beside) == bool(x.isfinite().all()), (i, j)


EDGE = torch.finfo(torch.float32).max
FINITE = [0.0, -0.0, 1e-45, -1e-45, EDGE, -EDGE, 1.0, -1.0]
BEYOND = [float("inf"), float("-inf"), float("nan"), -float("nan")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_finite_at_the_edges(dtype):
    """Catches a number beyond float32 that a wider file holds, which would become infinite on its way."""
    beyond = [*BEYOND, 1e39, -1e39] if dtype == torch.float64 else BEYOND
    for i in range(40):
        x = torch.tensor(FINITE * 5, dtype=dtype)
        assert is_finite(x)
        for value in beyond:
            x[i] = value
            assert not is_finite(x), value
    assert is_finite(torch.empty(0, dtype=dtype))


def test_what_overflows_on_its_way_is_refused(tmp_path):
    """Catches a weight that is finite in the file and infinite in the network's dtype."""
    save_file({"x": torch.tensor([1.0, 3.4e38])}, tmp_path / "file")
    assert loaded([tmp_path / "file"])["x"].isfinite().all()
    with pytest.raises(CorruptCheckpointError, match=r"x in .*file holds NaN or infinity"):
        loaded([tmp_path / "file"], torch.bfloat16)


@pytest.fixture
def many(tmp_path) -> tuple[Path, dict[str, Stored]]:
    """A file of 200 tensors with digests, and what its index says."""
    write_tensors({f"t{i:03d}": numbers(50, seed=i) for i in range(200)}, tmp_path / "many", {}, "lerobot_pi0.digests")
    return tmp_path / "many", index_tensors([tmp_path / "many"])


@pytest.mark.parametrize(
    ("value", "digests", "message"),
    [(np.nan, False, "NaN or infinity"), (3, True, "digest differs"), (np.nan, True, "digest differs")],
    ids=["not finite", "changed", "both"],
)
def test_many_errors_at_once_are_one(many, value, digests, message):
    """Catches an error in a thread that gets lost or has no name, and threads that outlive it."""
    file, found = many
    read_tensors({name: torch.empty(50) for name in found}, found)
    with file.open("r+b") as opened:
        for stored in found.values():
            opened.seek(stored.offset)
            opened.write(np.array([value], np.float32).tobytes())
    if not digests:
        found = {name: stored._replace(digest=None) for name, stored in found.items()}
    before = threading.active_count()
    with pytest.raises(CorruptCheckpointError, match=f"t[0-9]* in {file} .*{message}"):
        read_tensors({name: torch.empty(50) for name in found}, found)
    assert threading.active_count() == before


def test_a_file_that_shrinks_meanwhile(many):
    """Catches a bus error, or old memory taken for weights, where a file is cut after its header was judged."""
    file, found = many
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(CorruptCheckpointError, match="cannot be read where t199 is: it ends too early"):
        read_tensors({name: torch.empty(50) for name in found}, found)
    file.unlink()
    with pytest.raises(CorruptCheckpointError, match=r"cannot be read where .*No such file"):
        read_tensors({name: torch.empty(50) for name in found}, found)


def test_in_inference_mode(many):
    """Catches memory made in inference mode, which the threads, which are not in it, may not write."""
    file, _ = many
    with torch.inference_mode():
        tensors = loaded([file], torch.bfloat16)
    assert all(torch.equal(x, y.bfloat16()) for x, y in zip(tensors.values(), load_file(file).values(), strict=True))


# --- memory -------------------------------------------------------------------------------------------------


def growth_in_a_child(action: Callable[[], object]) -> int:
    """By how many bytes a forked process grows at its peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what this process has freed must not serve the other
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            kept = action()
            os.write(sink, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before).encode())
            del kept
            os._exit(0)
        finally:
            os._exit(1)
    os.close(sink)
    with os.fdopen(source) as answer:
        text = answer.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return int(text)


BIG = {f"t{i}": (64, MIB // 4) for i in range(4)}
LIBRARIES = 28 * MIB
"""A fork's memory does not count the libraries' pages before it uses them; a bfloat16 tensor of `BIG` takes more."""

pages_count = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of memory")


@pages_count
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("final", [torch.float32, torch.bfloat16], ids=str)
def test_loading_takes_the_models_memory(tmp_path, source, final):
    """Catches a state dict beside the model, a whole tensor before its conversion, and pages of a mapped file."""
    write_tensors({name: numbers(*shape, dtype=source) for name, shape in BIG.items()}, tmp_path / "file", {}, "d")
    grown = growth_in_a_child(lambda: loaded([tmp_path / "file"], final))
    model = 64 * MIB * final.itemsize
    assert model <= grown < model + LIBRARIES


@pages_count
def test_saving_takes_no_memory(tmp_path):
    """Catches a copy of the numbers on their way into the file, and the zeros of a head that nothing reads."""
    tensors = {name: numbers(*shape).T for name, shape in BIG.items()}
    tensors["zeros"] = torch.zeros(()).expand(MIB // 16, 1024)
    assert growth_in_a_child(lambda: write_tensors(tensors, tmp_path / "file", {}, "d")) < 64 * MIB  # one of them
    assert torch.equal(load_file(tmp_path / "file")["t3"], tensors["t3"])


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
def test_other_devices_are_filled_in_large_parts(tmp_path, monkeypatch, source):
    """Catches a copy to a GPU for each part that is read, and a last part that is not copied: a CPU in its place."""
    monkeypatch.setattr(reading, "DIRECT", ())
    monkeypatch.setattr(reading, "LANDING", 16 * SERIAL)
    tensors = {f"t{i}": numbers(*shape, dtype=source, seed=i) for i, shape in enumerate(SHAPES)}
    save_file(tensors, tmp_path / "a.safetensors")
    landed: list[int] = []

    def landings(target):
        for x in plain(target):
            landed.append(x.numel())
            yield x

    plain = reading._landings
    monkeypatch.setattr(reading, "_landings", landings)
    found = loaded([tmp_path / "a.safetensors"], torch.float32)
    assert all(torch.equal(found[name], x.float()) for name, x in tensors.items())
    assert max(landed) == 4 * SERIAL and sum(landed) == sum(x.numel() for x in tensors.values())
