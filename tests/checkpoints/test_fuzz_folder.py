"""Mutated folders, over a thousand: processors, statistics, tokenizer, options, manifest and adapters.

What counts is what a robot would be sent: policy and processors are built from the folder as this plugin's commands do
it, and one observation goes through. The actions are those of the folder as it was, or somebody is told: by an error,
or, for options that may be edited, by a warning that names the file. What a checkpoint of others cannot show is in
`UNKNOWABLE`, and in docs/checkpoints.md.
"""

import logging
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from folders import ADAPTER, FOLDER, OURS, POST, PRE, STEPS, VALUES, act, make_originals

from lerobot_pi0.checkpoints.errors import CheckpointError
from lerobot_pi0.control.bounds import BoundsError
from lerobot_pi0.inputs.samples import ObservationError
from lerobot_pi0.inputs.steps import TokenizerError
from lerobot_pi0.tools import ToolError

pytestmark = pytest.mark.usefixtures("micro")

FEW, MANY = range(2), range(2, 26)
"""Seeds of the fast tests and of the slow ones."""


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, tuple[Path, torch.Tensor]]:
    """A folder of each kind, and the actions that it means."""
    return make_originals(tmp_path_factory.mktemp("originals"))


CASES = (
    [("own", kind) for kind in FOLDER | OURS]
    + [("published", kind) for kind in FOLDER]
    + [("adapter", kind) for kind in ADAPTER]
)

UNKNOWABLE = {
    "published": {
        "statistics of both", "statistics of others", "keys in another order", "config.json edited",
        "config.json flipped", f"{PRE} edited", f"{PRE} flipped", f"{POST} edited", f"{POST} flipped",
        *(f"{step} {kind}" for step in STEPS[::2] for kind in ("flipped", "of another type", "another number")),
    },
}  # fmt: skip
"""Where other actions may come of it in silence: a number, a name or an option that could as well be right."""

NAMED = (CheckpointError, ToolError, TokenizerError, ObservationError, BoundsError, FloatingPointError)
"""What names the file, or what is wrong with the sample."""


def outcome_of(folder: Path, expected: torch.Tensor, caplog) -> str:
    """What becomes of a mutated folder."""
    caplog.clear()
    try:
        found = act(folder)
    except NAMED as error:
        assert len(str(error)) > 20
        return "refused"
    if found.shape == expected.shape and torch.equal(found, expected):
        return "right"
    assert found.isfinite().all()
    told = [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("lerobot_pi0")]
    return "told" if told else "other"


def run(originals, tmp_path, caplog, origin: str, kind: str, seeds: range) -> None:
    source, expected = originals[origin]
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        folder = tmp_path / f"{seed}"
        shutil.copytree(source, folder)
        (FOLDER | OURS | ADAPTER)[kind](folder, random.Random(f"{origin} {kind} {seed}"))
        outcome = outcome_of(folder, expected, caplog)
        if outcome == "other":
            assert kind in UNKNOWABLE.get(origin, ()), f"seed {seed}: other actions, and no word"
        outcomes[outcome] += 1
        shutil.rmtree(folder)
    assert outcomes.total() == len(seeds)


@pytest.mark.parametrize(("origin", "kind"), CASES, ids=[" - ".join(case) for case in CASES])
def test_folders(originals, tmp_path, caplog, origin, kind):
    """Catches other actions, without a word, from a folder of which something was changed, lost or exchanged."""
    run(originals, tmp_path, caplog, origin, kind, FEW)


@pytest.mark.slow
@pytest.mark.parametrize(("origin", "kind"), CASES, ids=[" - ".join(case) for case in CASES])
def test_many_folders(originals, tmp_path, caplog, origin, kind):
    """Catches what the first mutations of each kind do not meet."""
    run(originals, tmp_path, caplog, origin, kind, MANY)


def test_there_are_enough_folders():
    """Catches a run that shrinks below what was promised: 1 000 mutations of own checkpoints and 500 of others'."""
    each = len(FEW) + len(MANY)
    assert sum(origin != "published" for origin, _ in CASES) * each >= 1000
    assert sum(origin == "published" for origin, _ in CASES) * each >= 500


def test_values_of_every_kind():
    """Catches edits that put in too little: each kind of JSON's values is among them."""
    assert {type(x) for x in VALUES} == {type(None), bool, int, float, str, list, dict}
