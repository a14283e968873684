"""The benchmark for GPUs, rehearsed on the CPU at the small size."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("gpu")
    for name in ("gpu", "gpu_bench", "gpu_parts", "measure", "subjects"):
        sys.modules.pop(name, None)


def run(gpu, folder, *arguments):
    return gpu.main(["--device", "cpu", "--size", "small", "--repeats", "1", "--out", str(folder), *arguments])


def test_an_error_is_a_line(gpu, tmp_path, monkeypatch):
    """Catches an error in one part that ends the whole run (a GPU may be available only once), and results that are
    written only at the end."""

    def broken(bench):
        yield {"what": "first"}
        assert "first" in (tmp_path / "gpu.jsonl").read_text()
        raise RuntimeError("no kernel image is available")

    monkeypatch.setitem(gpu.PARTS, "right", (broken, 60))
    rows = run(gpu, tmp_path, "--parts", "right", "attention")
    assert [row.get("what") for row in rows[:2]] == ["first", None]
    assert "no kernel image" in rows[1]["error"]
    assert any(row["part"] == "attention" and row.get("ms") for row in rows)
    table = (tmp_path / "gpu.md").read_text()
    assert "## right" in table and "## attention" in table
    assert json.loads((tmp_path / "gpu.json").read_text())[0] == rows[0]


def test_what_does_not_fit_is_not_begun(gpu, tmp_path):
    """Catches a run that is cut off in the middle of a part, because the remaining time was not checked."""
    rows = run(gpu, tmp_path, "--seconds", "0")
    assert [row["part"] for row in rows] == list(gpu.PARTS)
    assert all("left" in row["left out"] for row in rows)


def test_a_part_that_takes_longer_is_left(gpu, tmp_path, monkeypatch):
    """Catches a part that continues after the time is up: the machine may be gone before the table is written."""

    def endless(bench):
        while True:
            yield {"what": "one more"}

    now = iter(range(100))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(now))
    monkeypatch.setitem(gpu.PARTS, "right", (endless, 60))
    rows = run(gpu, tmp_path, "--parts", "right", "--seconds", "10")
    assert rows[-1]["left out"] == "the rest: the time is up" and 3 < len(rows) < 20
    assert "one more" in (tmp_path / "gpu.md").read_text()


def test_one_case_does_not_hide_the_others(gpu):
    """Catches a policy that does not fit on the GPU and ends the lines after it."""

    def fails():
        raise RuntimeError("CUDA out of memory")

    def cannot():
        raise sys.modules["gpu_bench"].LeftOutError("this card is too old")

    cases = [({"what": "a"}, fails), ({"what": "b"}, cannot), ({"what": "c"}, lambda: {"ms": 1.0})]
    first, second, third = gpu.Bench("cpu", "small", 1).lines(cases)
    assert "out of memory" in first["error"] and second == {"what": "b", "left out": "this card is too old"}
    assert third == {"what": "c", "ms": 1.0}


@pytest.mark.slow
def test_rehearsal(gpu, tmp_path):
    """Catches a part that does not run, a device with different results, and a missing line: a GPU may be available
    for only an hour."""
    rows = run(gpu, tmp_path)
    assert {row["part"] for row in rows} == set(gpu.PARTS)
    assert not [row for row in rows if "error" in row]
    judged = [row for row in rows if "good" in row]
    assert len(judged) >= 18 and all(row["good"] for row in judged)
    found = {(row["part"], row.get("what")) for row in rows}
    for name in ("ours, one graph", "ours, kernel by kernel", "built-in", "transformers"):
        assert ("chunk", name) in found
    assert {(part, name) for part in ("modes",) for name in ("heun", "adaptive", "vjp", "trained")} <= found
    left_out = {(row["part"], row.get("what")) for row in rows if "left out" in row}
    assert {("chunk", "ours, fp8"), ("products", "fp8")} <= left_out  # a CPU has no such products
    assert all(row["plan_gib"] > 0 for row in rows if row["part"] == "step" and row["what"] == "ours")
