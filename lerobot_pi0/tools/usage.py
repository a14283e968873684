"""Help of `lerobot-pi0` and its verbs: one screen for each, and the nearest name to one that does not exist."""

import contextlib
import dataclasses
import difflib
import io
import re
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from draccus.wrappers.docstring import get_attribute_docstring
from lerobot.configs import parser

from ..configuration_pi0 import PI0Config

WIDTH = 110
INDENT = 28
HELP = ("-h", "--help")
EVERYTHING = "--help=all"


def overview(verbs: Mapping[str, str]) -> str:
    """The text of `lerobot-pi0 --help`."""
    width = max(map(len, verbs))
    lines = "\n".join(f"  {verb:{width}}  {line}" for verb, line in verbs.items())
    return (
        f"usage: lerobot-pi0 VERB [--option=value …]\n\n{lines}\n\n"
        "`lerobot-pi0 VERB --help` lists the options of a verb. Training, evaluation and robots are LeRobot's own\n"
        "commands: lerobot-train, lerobot-eval, lerobot-rollout with --policy.type=pi0."
    )


def screen(verb: str, does: str, module: Any) -> str:
    """The text of `lerobot-pi0 VERB --help`: what it does, two examples, a few words on each option."""
    lines = [f"usage: lerobot-pi0 {verb} [--option=value …]", "", f"{does[0].upper()}{does[1:]}."]
    for example in examples(module.__doc__)[:2]:
        lines += ["", *(f"    {line}" for line in example.splitlines())]
    lines += ["", *(line for name, text in described(module.Options) for line in _entry(name, text))]
    return "\n".join(
        [*lines, "", f"`lerobot-pi0 {verb} {EVERYTHING}` says how it works, and lists what stands behind …"]
    )


def everything(module: Any, args: list[str]) -> str:
    """How a verb works, and every option; of `--policy.…` and the like, those of the type that is given."""
    return f"{module.__doc__}\n{_lerobots_help(module.Options, args)}"


def examples(text: str) -> list[str]:
    """The commands in the docstring of a verb, each with its continued lines."""
    found = re.findall(r"^    (lerobot-pi0 (?:.*\\\n)*.*)$", text, re.MULTILINE)
    return [textwrap.dedent(re.sub(r"\n {4}", "\n", example)) for example in found]


def described(options: type, prefix: str = "", needed: bool = True) -> Iterator[tuple[str, str]]:
    """Options of a verb and what they are for. LeRobot's own groups of options are one line each."""
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        kinds = _kinds(hints[field.name])
        group = next((x for x in kinds if isinstance(x, type) and dataclasses.is_dataclass(x)), None)
        if group is not None and group.__module__.startswith(__package__):
            yield from described(group, f"{prefix}{field.name}.", needed=_is_required(field))
            continue
        text = " ".join(get_attribute_docstring(options, field.name).comment_above.split())
        grouped = group is not None or (field.name == "policy" and not prefix)
        name = f"--{prefix}{field.name}{'.…' if grouped else ''}"
        yield name, text if grouped else f"{text}{_default(field, needed)}"


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field, needed: bool) -> str:
    if _is_required(field):
        return " Required." if needed else ""
    make = field.default_factory
    value = field.default if isinstance(make, dataclasses._MISSING_TYPE) else make()
    return "" if value in (None, [], {}) else f" ({str(value).lower() if isinstance(value, bool) else value})"


def _entry(name: str, text: str) -> list[str]:
    lines = textwrap.wrap(text, WIDTH - INDENT) or [""]
    first = [f"  {name:{INDENT - 3}} {lines[0]}"] if len(name) < INDENT - 2 else [f"  {name} ", " " * INDENT + lines[0]]
    return [*first, *(" " * INDENT + line for line in lines[1:])]


def check_names(options: type, args: list[str]) -> None:
    """Refuse an option that does not exist, before argparse fills the screen with those that do.

    Raises:
        ValueError: with the nearest option that there is.
    """
    known = _known(options, args)
    for arg in args:
        name = arg.split("=")[0]
        if name.startswith("--") and name not in known:
            raise ValueError(f"there is no option {name}{nearest(name, known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence that suggests another name; empty if none is near."""
    near = difflib.get_close_matches(name, list(known), 1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def _known(options: type, args: list[str]) -> set[str]:
    """All names of options that a verb takes with these arguments."""
    found = {"--help", *re.findall(r"^ +(--[a-z][\w.]*)", _lerobots_help(options, args), re.MULTILINE)}
    if any(field.name == "policy" for field in dataclasses.fields(options)):
        found |= {"--policy.path", "--policy.type"}
        if parser.get_type_arg("policy", args) is None:  # a checkpoint's own, which another type has not
            found |= {f"--policy.{field.name}" for field in dataclasses.fields(PI0Config)}
    return found


def _lerobots_help(options: type, args: list[str]) -> str:
    """What LeRobot's commands print for `--help`."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        parser.print_scoped_help(options, args)
    return out.getvalue()
