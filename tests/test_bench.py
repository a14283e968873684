"""The benchmark at its small size, counting only."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import NEEDS_VNNI

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("bench")
    for name in ("bench", "cached_steps", "measure", "subjects"):
        sys.modules.pop(name, None)


def test_accounting(bench, capsys):
    """Catches a benchmark that no longer runs, a missing line, and unneeded work that came back: layers
    whose output is not read, absent cameras, kept activations of frozen layers."""
    results = bench.main(["--size", "small", "--pairs", "1", "--accounting-only", "--dtype", "float32"])
    table = capsys.readouterr().out
    assert list(results) == [str(line) for line in bench.LINES]
    for line in bench.LINES:
        assert str(line) in table
        ours, theirs = (results[str(line)][subject] for subject in ("ours", "built-in"))
        if line.what == "tick":
            continue
        assert 0 < ours.flop < (0.9 if line.cameras == 3 else 0.5) * theirs.flop, line
        if line.training:
            assert 0 < ours.kept_bytes < (0.1 if line.what == "step-frozen" else 0.9) * theirs.kept_bytes, line
    three, one = (results[str(line)]["ours"] for line in bench.LINES[:2])
    assert one.flop < 0.5 * three.flop


@NEEDS_VNNI
def test_quantization(bench, capsys):
    """Catches an option that rounds nothing, or a comparison of a policy with itself."""
    what = ["--what", "step-frozen,chunk", "--quantization", "int8"]
    results = bench.main(["--size", "small", "--pairs", "1", "--no-peak", *what])
    assert all(row["ours"].seconds and row["built-in"].seconds for row in results.values())
    found = re.findall(r"int8 from bfloat16: (.*)% of the chunk, (.*)% of the context", capsys.readouterr().out)
    assert len(found) == 2 and all(0 < float(x) < 10 for pair in found for x in pair)


def test_beside_transformers(bench):
    """Catches a third policy (transformers') that computes something else, or less, than the others."""
    subjects = importlib.import_module("subjects")
    chunk, size = (
        ["--size", "small", "--pairs", "1", "--no-peak", "--what", "chunk"],
        importlib.import_module("presets").SIZES["small"],
    )
    results = bench.main([*chunk, "--beside", "transformers"])
    assert all(row["transformers"].seconds for row in results.values())
    with pytest.raises(SystemExit):
        bench.main(["--beside", "transformers", "--what", "tick"])
    weights = {}

    def make(name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Equal weights for equal parts, whose names differ there."""
        key = name.replace("model.paligemma_with_expert.paligemma.model.", "model.vlm.")
        key = key.replace("model.paligemma_with_expert.gemma_expert.model.", "model.dit.")
        key = key if ".vlm." in key or ".dit." in key else key.split(".", 1)[1]
        return weights.setdefault(key, subjects.RandomWeights(std=0.1)(name, shape, dtype))

    policies = [subject.build(size, make) for subject in (subjects.Ours, subjects.Transformers)]
    for cameras, prompt in ((3, 48), (1, 10)):
        batch, noise = subjects.batch_for(size, cameras, prompt), torch.randn(1, subjects.CHUNK, 32)
        ours, theirs = (policy.predict_action_chunk(batch, noise=noise) for policy in policies)
        assert (ours - theirs[..., : subjects.DIMS]).norm() < 1e-4 * ours.norm()


def test_flow_samples(bench):
    """Catches a comparison in which both use the same number of draws. (Here, unlike at full size, the expert is most
    of the work.)"""
    what = ["--what", "step-frozen", "--flow-samples", "8", "--beside", "K=1", "--accounting-only"]
    for row in bench.main(what).values():
        assert 2 < row["ours"].flop / row["K=1"].flop < 9


def test_cached_steps(bench, capsys):
    """Catches a benchmark of cached contexts that computes them, or whose fused optimizer gives other results."""
    found = bench.main(["--what", "step-cached", "--batch-size", "2", "--pairs", "1", "--frames", "4", "--bits", "8"])
    assert list(found) == ["3 cameras", "1 cameras"]
    for row in found.values():
        assert all(x > 0 for times in row["seconds"].values() for x in times)
        assert row["seconds"].keys() == {"read", "from disk", "computed", "built-in"}
        assert 0 < row["fused differs by"] < 1e-5
    assert capsys.readouterr().out.count("forward and backward: ") == 2


@pytest.mark.parametrize("cameras", [3, 1])
def test_breakdown(bench, capsys, cameras):
    """Catches a part of a chunk that is not timed, or counted twice: operations have to add up to torch's count."""
    module = importlib.import_module("breakdown")
    rows, counted = module.main(["--repeats", "1", f"--cameras={cameras}", "--prompt=10", "--dtype=float32"])
    assert sum(row["flop"] for row in rows.values()) == pytest.approx(counted, rel=1e-3)
    assert {f"{stack}: {part}" for stack in module.STACKS for part in module.PARTS} <= set(rows)
    assert all(row["seconds"] > 0 for row in rows.values())
    assert "| sum |" in capsys.readouterr().out
