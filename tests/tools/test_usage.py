"""Help of `lerobot-pi0`: one screen for each verb, and the nearest name to one that does not exist."""

import importlib
import shlex

import pytest

from lerobot_pi0.tools import VERBS, main, usage

LINES = 50


@pytest.fixture(autouse=True)
def logs(monkeypatch) -> None:
    """The command sets logging up anew, which would take it away from pytest."""
    monkeypatch.setattr("lerobot_pi0.tools.init_logging", lambda: None)


def module_of(verb: str):
    return importlib.import_module(f"lerobot_pi0.tools.{verb.replace('-', '_')}")


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_fits_a_screen(verb, capsys):
    """Catches help that scrolls away, does not say whose it is, has no examples, and an option without a word on it."""
    assert main([verb, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"usage: lerobot-pi0 {verb} [--option=value …]"
    assert len(lines) <= LINES and max(map(len, lines)) <= 120
    assert sum(line.startswith(f"    lerobot-pi0 {verb} ") for line in lines) == 2
    for name, text in usage.described(module_of(verb).Options):
        assert len(text) > 10, name


@pytest.mark.parametrize("verb", VERBS)
def test_two_examples(verb):
    """Catches an example that is cut at the end of its line, or has an option that was renamed."""
    found = usage.examples(module_of(verb).__doc__)
    assert len(found) >= 2
    for example in found:
        words = shlex.split(example.replace("\\\n", " "))
        assert words[:2] == ["lerobot-pi0", verb] and len(words) > 2
        usage.check_names(module_of(verb).Options, words[2:])


def test_what_is_required():
    """Catches a group that may be left out, whose own options are called required."""
    plan, check = (dict(usage.described(module_of(verb).Options))["--dataset.repo_id"] for verb in ("plan", "check"))
    assert "Required." not in plan and check.endswith("Required.")


def test_everything_is_there_for_who_asks(capsys):
    """Catches options of a policy that no help of ours lists any more."""
    assert main(["plan", "--policy.type=pi0", "--help=all"]) == 0
    shown = capsys.readouterr().out
    assert "--policy.flow_samples" in shown and "--peft.r" in shown and "tensors that have shapes" in shown


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["plan", "--batchsize=2"], "--batch_size"),
        (["plan", "--policy.type=pi0", "--policy.flow_sample=2"], "--policy.flow_samples"),
        (["open-loop", "--policy.pth=x", "--dataset.repo_id=y"], "--policy.path"),
        (["open-loop", "--policy.path=x", "--policy.solvr=heun"], "--policy.solver"),
        (["show", "--sorce", "x"], "--source"),
        (["serve", "--policy.vlm_quantisation=int8"], "--policy.vlm_quantization"),
        (["paln"], "plan"),
        (["openloop"], "open-loop"),
    ],
)
def test_a_typing_error_is_answered_with_what_was_meant(words, meant, capsys):
    """Catches the forty lines of argparse, in whose last the mistake stands."""
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"(did you mean {meant}?)" in error and len(error.splitlines()) < 20


def test_a_name_like_no_other_gets_no_advice(capsys):
    """Catches advice that is drawn by lot."""
    assert main(["show", "--qqqqqqqq=1"]) == 2
    assert "did you mean" not in capsys.readouterr().err
