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
    for name in ("gpu", "measure", "subjects"):
        sys.modules.pop(name, None)


def run(gpu, folder, *arguments):
    return gpu.main(["--device", "cpu", "--size", "small", "--repeats", "1", "--out", str(folder), *arguments])


def test_an_error_is_a_line(gpu, tmp_path, monkeypatch):
    """Catches a part whose error ends the run on a card that is there once, and results that are kept until the end."""

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
    """Catches a run that is cut off in the middle of a part because the time was not looked at."""
    rows = run(gpu, tmp_path, "--seconds", "0")
    assert [row["part"] for row in rows] == list(gpu.PARTS)
    assert all("left" in row["left out"] for row in rows)


@pytest.mark.slow
def test_rehearsal(gpu, tmp_path):
    """Catches a part that does not run, a device that computes something else, and a line that is missing: a card may
    be there for an hour."""
    rows = run(gpu, tmp_path)
    assert {row["part"] for row in rows} == set(gpu.PARTS)
    assert not [row for row in rows if "error" in row]
    judged = [row for row in rows if "good" in row]
    assert len(judged) >= 12 and all(row["good"] for row in judged)
    found = {(row["part"], row.get("what")) for row in rows}
    for name in ("ours, one graph", "ours, kernel by kernel", "built-in", "transformers"):
        assert ("chunk", name) in found
    assert all(row["plan_gib"] > 0 for row in rows if row["part"] == "step" and row["what"] == "ours")
