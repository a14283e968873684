"""What version 0.1.0 left behind still loads, acts, resumes and computes the same.

`data/` was made by `make.py` with the code of 0.1.0: checkpoints of half-done runs, the losses of each run that was not
interrupted, chunks, and the network's losses, gradient norms and chunks. No other test would notice a change that old
and new code inside one commit share. Tolerances are those of another CPU, whose sums have another order.
"""

import json

import pytest
import recording
import torch
from conftest import NEEDS_VNNI
from safetensors.torch import load_file, save_file

import lerobot_pi0.configuration_pi0  # noqa: F401  `recording` looks it up by name

EXPECTED = json.loads((recording.DATA / "runs.json").read_text())
RUNS = [pytest.param(run, marks=NEEDS_VNNI if run == "int8" else ()) for run in recording.RUNS]
ROUNDED = {"bfloat16": 2e-2, "int8": 1e-4, "8bit": 1e-4, "8bit_average": 1e-4}
"""Tolerances of runs in which a number that falls on the other side of a boundary is rounded to a neighbour."""

NETWORK = json.loads((recording.DATA / "network.json").read_text())
SETTINGS = [pytest.param(key, marks=NEEDS_VNNI if "int8" in key else ()) for key in NETWORK]


def floats(words: list[str]) -> torch.Tensor:
    return torch.tensor([float.fromhex(word) for word in words], dtype=torch.float64)


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """‖ours - theirs‖ / ‖theirs‖."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The runs in a folder of their own, with the names of the folders in their files changed to it."""
    folder = tmp_path_factory.mktemp("v010")
    recording.unpack(folder)
    return folder


@pytest.mark.parametrize("run", RUNS)
def test_a_checkpoint_of_010_acts(root, run):
    """Catches a tensor, an option, a statistic or an adapter of 0.1.0 that is read as something else or not at all."""
    with recording.size_of(run):
        actions = recording.act(recording.checkpoint(run, root) / "pretrained_model")
    expected = floats(EXPECTED[run]["chunk"])
    assert expected.norm() > 1
    assert distance(actions.double().flatten(), expected) < ROUNDED.get(run, 1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_a_half_done_run_of_010_goes_on(root, run):
    """Catches moments, averages, a schedule, draws or a base that a resumed run does not find where 0.1.0 put them."""
    with recording.size_of(run):
        losses = recording.resume(run, root)
    expected = floats(EXPECTED[run]["losses"])[recording.SAVED :]
    assert len(losses) == len(expected) == recording.STEPS - recording.SAVED
    found = torch.tensor(losses, dtype=torch.float64)
    assert ((found - expected).abs() / expected).max() < ROUNDED.get(run, 1e-5), (found, expected)


@pytest.mark.parametrize("run", ["frozen", "8bit_average"])
def test_losses_depend_on_the_optimizers_state(root, run, tmp_path):
    """Catches a comparison that a run which forgot its moments would pass as well."""
    recording.unpack(tmp_path)
    file = recording.checkpoint(run, tmp_path) / "training_state" / "optimizer_state.safetensors"
    state = {name: x.clone() if "step" in name else torch.zeros_like(x) for name, x in load_file(file).items()}
    save_file(state, file)
    with recording.size_of(run):
        losses = torch.tensor(recording.resume(run, tmp_path), dtype=torch.float64)
    expected = floats(EXPECTED[run]["losses"])[recording.SAVED :]
    assert ((losses - expected).abs() / expected).max() > 10 * ROUNDED.get(run, 1e-5)


def test_the_fixtures_are_what_they_say(root):
    """Catches fixtures without what they are there for: averages, moments of 8 bits, an adapter, weights left out."""

    def files(run: str) -> dict[str, set]:
        folder = recording.checkpoint(run, root)
        state = load_file(folder / "training_state" / "optimizer_state.safetensors")
        return {"dtypes": {x.dtype for x in state.values()}, "names": {name.split("/")[-1] for name in state}}

    frozen, averaged = files("frozen"), files("average")
    assert averaged["names"] > frozen["names"]
    assert torch.uint8 not in frozen["dtypes"]
    assert all(torch.uint8 in files(run)["dtypes"] for run in ("8bit", "8bit_average"))
    weights = {run: recording.checkpoint(run, root) / "pretrained_model" for run in recording.RUNS}
    assert (weights["lora"] / "adapter_model.safetensors").exists()
    assert not (weights["lora"] / "model.safetensors").exists()
    chunks = {run: floats(EXPECTED[run]["chunk"]) for run in ("int8", "expert_only")}
    assert distance(chunks["int8"], chunks["expert_only"]) > 2 * ROUNDED["int8"]
    whole = load_file(weights["frozen"] / "model.safetensors").keys()
    for run in ("expert_only", "int8"):
        assert load_file(weights[run] / "model.safetensors").keys() < whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("small")


@pytest.mark.parametrize("key", SETTINGS)
def test_the_network_computes_what_010_did(folder, key):
    """Catches a change of the mathematics that the rewritten code and the rewritten tests agree on."""
    dtype, _, setting = key.partition(", ")
    with recording.small():
        found = recording.numbers(recording.SETTINGS[setting]("lerobot_pi0", dtype, folder))
    expected = {name: floats(words.split()) for name, words in NETWORK[key].items()}
    tolerance = 2e-2 if dtype == "bfloat16" else 1e-3 if "int8" in setting else 1e-5
    assert found.keys() == expected.keys()
    floor = max(norm.max() for name, norm in expected.items()) * tolerance / 10
    for name, value in expected.items():  # keys' biases have gradients of zero but for rounding
        off = (torch.tensor(found[name], dtype=torch.float64) - value).norm()
        assert off < tolerance * value.norm() + (floor if name not in ("losses", "chunk") else 0), name


def test_settings_differ():
    """Catches settings that are recorded twice under two names: an option that does nothing proves nothing."""
    for dtype in ("float32", "bfloat16"):
        chunks = [v["chunk"] for key, v in NETWORK.items() if key.startswith(dtype) and "chunk" in v]
        assert len(chunks) == len(set(chunks)) == 5
        losses = {key.partition(", ")[2]: v for key, v in NETWORK.items() if key.startswith(dtype) and "losses" in v}
        assert losses["K = 3"]["losses"] != losses["all"]["losses"] != losses["int8, training"]["losses"]
        assert losses["frozen"].keys() < losses["all"].keys() == losses["gradient checkpointing"].keys()
