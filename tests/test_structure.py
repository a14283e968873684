"""Rules of the package's structure, checked in the source: lengths, and which room (folder) imports which.

    root → training, control, checkpoints → inputs, kernels → network

Each rule is a function that finds violations in a package's folder. So it can be tested with a planted violation.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "lerobot_pi0"

FILE, FUNCTION, METHODS = 350, 40, 24

BELOW = {
    "network": set(),
    "kernels": {"network"},
    "inputs": {"network", "kernels"},
    "checkpoints": {"network", "kernels", "inputs"},
    "training": {"network", "kernels", "inputs"},
    "control": {"network", "kernels", "inputs", "checkpoints"},
}
"""Room → rooms that it may import, besides itself. tools/ and the root may import every room."""

OPTIONS = "configuration_pi0"
"""The only module of the root that rooms may import; network/ and kernels/ may not import even this one."""

APART = {"training", "control", "checkpoints"}
"""Rooms that only modeling_pi0.py and tools/ may import together."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Import(NamedTuple):
    """One name that a file imports: absolute and dotted, or None if it is computed."""

    line: int
    name: str | None
    is_relative: bool


def sources(package: Path, room: str = "") -> Iterator[tuple[Path, ast.Module]]:
    """The Python files of a package or of one of its rooms, parsed."""
    for file in sorted((package / room).rglob("*.py")):
        yield file, ast.parse(file.read_text())


def room_of(file: Path, package: Path) -> str:
    """The room that a file is in, "" for the root."""
    parts = file.relative_to(package).parts
    return parts[0] if len(parts) > 1 else ""


def absolute(name: str, level: int, file: Path, package: Path) -> str:
    """The absolute name for `level` dots and a name in this file; outside of the package it begins with a dot."""
    here = (package.name, *file.relative_to(package).parent.parts)
    return ".".join([*here[: len(here) + 1 - level], name]) if level <= len(here) else f".{name}"


def imports(file: Path, tree: ast.Module, package: Path) -> Iterator[Import]:
    """Everything that a file imports, at any place in it: statements, `__import__` and `import_module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}" if node.module else alias.name
                name = absolute(name, node.level, file, package) if node.level else name
                yield Import(node.lineno, name, node.level > 0)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("__import__", "import_module"):
            given = node.args[0] if node.args else next((k.value for k in node.keywords if k.arg == "name"), None)
            if not (isinstance(given, ast.Constant) and isinstance(given.value, str)):
                yield Import(node.lineno, None, False)
                continue
            name = given.value.lstrip(".")
            level = len(given.value) - len(name)
            yield Import(node.lineno, absolute(name, level, file, package) if level else name, level > 0)


def own_imports(file: Path, tree: ast.Module, package: Path) -> Iterator[tuple[int, str]]:
    """Lines, and what they import from this package: a room, a module of the root, or "" for the root itself.

    Every file may import the version.
    """
    for line, name, _ in imports(file, tree, package):
        first, *rest = (name or ".").split(".")
        if first == package.name and rest != ["__version__"]:
            target = rest[0] if rest else ""
            yield line, target if (package / target).is_dir() or (package / f"{target}.py").is_file() else ""


# --- rules ------------------------------------------------------------------------------------------------------


def long_files(package: Path) -> Iterator[str]:
    for file in sorted(package.rglob("*.py")):
        if (lines := len(file.read_text().splitlines())) > FILE:
            yield f"{file.relative_to(package)}: {lines} lines"


def long_functions(package: Path) -> Iterator[str]:
    for file, tree in sources(package):
        for node in ast.walk(tree):
            if isinstance(node, Function) and (lines := node.end_lineno - node.lineno + 1) > FUNCTION:
                yield f"{file.relative_to(package)}:{node.lineno} {node.name}: {lines} lines"


def large_classes(package: Path) -> Iterator[str]:
    for file, tree in sources(package):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and (n := sum(isinstance(x, Function) for x in node.body)) > METHODS:
                yield f"{file.relative_to(package)}:{node.lineno} {node.name}: {n} methods"


def imports_of_the_network(package: Path) -> Iterator[str]:
    """Imports in network/ of anything but torch, einops, the standard library, and (relatively) network/ itself: a copy
    of it has to run alone."""
    allowed = {"torch", "einops", *sys.stdlib_module_names}
    for file, tree in sources(package, "network"):
        for line, name, is_relative in imports(file, tree, package):
            inside = is_relative and f"{name}.".startswith(f"{package.name}.network.")
            if name is None or not (inside or (not is_relative and name.split(".")[0] in allowed)):
                yield f"{file.relative_to(package)}:{line} imports {name or 'a computed name'}"


def imports_against_the_grain(package: Path) -> Iterator[str]:
    """Imports of a room above, of a room on the same level, or of a module of the root other than the options."""
    for file, tree in sources(package):
        room = room_of(file, package)
        if room in ("network", "tools"):  # network/ has a rule of its own
            continue
        for line, target in own_imports(file, tree, package):
            allowed = BELOW.get(room, set()) | {room} | ({OPTIONS} if room != "kernels" else set())
            if target == "tools" or (room and target not in allowed):
                yield f"{file.relative_to(package)}:{line} imports {target or 'the root'}"


def rooms_that_meet(package: Path) -> Iterator[str]:
    for file, tree in sources(package):
        if room_of(file, package) == "tools" or file == package / "modeling_pi0.py":
            continue
        found = {target for _, target in own_imports(file, tree, package)} & APART
        if len(found) > 1:
            yield f"{file.relative_to(package)} imports {', '.join(sorted(found))}"


def policies_of_any_type(package: Path) -> Iterator[str]:
    """Arguments named policy without a type, or with `Any`, with which a lower room could use a higher one."""
    for room in ("network", "kernels", "checkpoints"):
        for file, tree in sources(package, room):
            for node in (n for n in ast.walk(tree) if isinstance(n, Function)):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                for argument in arguments:
                    written = ast.unparse(argument.annotation) if argument.annotation else "Any"
                    if argument.arg == "policy" and "Any" in written:
                        yield f"{file.relative_to(package)}:{node.lineno} {node.name}"


RULES = [
    long_files, long_functions, large_classes, imports_of_the_network, imports_against_the_grain, rooms_that_meet,
    policies_of_any_type,
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(rule):
    """Catches changes that a review of a few lines would miss: a room that grows too large, or a wrong import."""
    assert list(rule(PACKAGE)) == []


def test_the_house_has_the_rooms():
    """Catches rules for folders that were renamed, which would never find anything."""
    rooms = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    assert rooms == BELOW.keys() | {"tools"}
    assert all(any(True for _ in sources(PACKAGE, room)) for room in rooms)
    assert all((PACKAGE / f"{name}.py").is_file() for name in (OPTIONS, "modeling_pi0"))


# --- the rules themselves ---------------------------------------------------------------------------------------


def methods(n: int) -> str:
    return "class A:\n" + "".join(f"    def f{i}(self): ...\n" for i in range(n))


def function(lines: int, head: str = "def f():") -> str:
    return f"{head}\n" + "    x = 1\n" * (lines - 1)


LONG = [("root.py", "x = 1\n" * 351), ("network/a.py", "\n" * 351), ("tools/checks/a.py", "x = 1\n" * 350 + "x = 2")]
FUNCTIONS = [
    ("a.py", function(41)),
    ("control/a.py", "class A:\n" + "    def f(self):\n" + "        x = 1\n" * 40),
    ("tools/a.py", function(41, "async def f():")),
]
CLASSES = [("a.py", methods(25)), ("tools/a.py", methods(25).replace("def f0", "async def f0"))]
NETWORK = [
    ("network/a.py", text)
    for text in (
        "import numpy",
        "import transformers.models",
        "import torch, lerobot",
        "from lerobot.configs import PreTrainedConfig",
        "def f():\n    import transformers",
        "def f():\n    from ..kernels import linear",
        "from ..kernels.linear import Linear",
        "from .. import kernels",
        "from .. import configuration_pi0",
        "from ... import other",
        "import lerobot_pi0.training.ema",
        "from lerobot_pi0.network import b",
        "if TYPE_CHECKING:\n    from safetensors import safe_open",
        "import importlib\nimportlib.import_module('transformers')",
        "from importlib import import_module\nimport_module(name='lerobot')",
        "import importlib\nimportlib.import_module('..kernels', __package__)",
        "import importlib\nimportlib.import_module(name)",
        "__import__('lerobot.policies')",
    )
] + [("network/inside/a.py", "from ...inputs import observation")]
GRAIN = [
    ("kernels/a.py", "from ..inputs import observation"),
    ("kernels/a.py", "from ..configuration_pi0 import PI0Config"),
    ("inputs/a.py", "def f():\n    from ..training.ema import Ema"),
    ("inputs/a.py", "import lerobot_pi0.control"),
    ("checkpoints/a.py", "from .. import training"),
    ("checkpoints/a.py", "import importlib\nimportlib.import_module('lerobot_pi0.control.calls')"),
    ("training/a.py", "from ..checkpoints.checkpoint import save"),
    ("training/a.py", "from ..modeling_pi0 import PI0Policy"),
    ("control/a.py", "from lerobot_pi0.training import ema"),
    ("control/a.py", "from lerobot_pi0 import PI0Policy"),
    ("control/a.py", "from ..tools import show"),
    ("processor_pi0.py", "from .tools.show import show"),
]
MEET = [
    ("processor_pi0.py", "from .training import ema\nfrom .control import calls"),
    ("configuration_pi0.py", "from .training.ema import Ema\ndef f():\n    import lerobot_pi0.checkpoints.checkpoint"),
    ("__init__.py", "from . import checkpoints, control"),
]
ANY = [
    (f"{room}/a.py", text)
    for room in ("network", "kernels", "checkpoints")
    for text in (
        "def f(x, policy: Any): ...",
        "class A:\n    def f(self, *, policy: typing.Any | None = None): ...",
        "async def f(policy): ...",
    )
]
PLANTED = [
    pytest.param(rule, *case, id=f"{rule.__name__}-{i}")
    for rule, cases in zip(RULES, (LONG, FUNCTIONS, CLASSES, NETWORK, GRAIN, MEET, ANY), strict=True)
    for i, case in enumerate(cases)
]

CLEAN = {
    "__init__.py": "import importlib\n\ndef f(name):\n    return importlib.import_module(name, __name__)",
    "modeling_pi0.py": "from .training import ema\nfrom .control import calls\nfrom .checkpoints import checkpoint",
    "processor_pi0.py": "from .training import ema\nfrom .inputs import observation\n" + methods(24),
    "configuration_pi0.py": "from .training import ema\n" + function(40) + "x = 1\n" * 309,
    "network/__init__.py": '"""import lerobot"""',
    "network/a.py": "import math\nimport torch.nn.functional as F\nfrom einops import rearrange\nfrom . import b\n"
    "from .b import c\nfrom torch import nn\nimport importlib\nimportlib.import_module('.b', __package__)",
    "network/inside/a.py": "from ..b import c\nfrom . import d",
    "network/b.py": "def f(policy: nn.Module, other: Any): ...",
    "kernels/a.py": "from ..network import a\nfrom .b import c\nimport triton",
    "inputs/a.py": "from ..configuration_pi0 import PI0Config\nfrom ..kernels import a\nimport lerobot.configs",
    "training/a.py": "from ..inputs import a\nfrom ..configuration_pi0 import PI0Config\ndef f(policy: Any): ...",
    "control/a.py": "from ..checkpoints import a",
    "checkpoints/a.py": "from .. import __version__\nfrom ..kernels import a\nfrom ..network.b import c",
    "tools/a.py": "from ..training import a\nfrom ..control import a\nfrom .. import checkpoints, PI0Policy",
}


def write(package: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return package


@pytest.mark.parametrize(("rule", "name", "text"), PLANTED)
def test_a_planted_breach_is_found(rule: Callable[[Path], Iterator[str]], name, text, tmp_path):
    """Catches a rule that always passes: a planted violation has to be found, with its place."""
    package = write(tmp_path / PACKAGE.name, CLEAN)
    assert list(rule(package)) == []
    (breach,) = rule(write(package, {name: text}))
    assert breach.startswith(name)


def test_a_clean_house_breaks_no_rule(tmp_path):
    """Catches a rule that refuses what is allowed: the longest file, function and class, and every allowed import."""
    package = write(tmp_path / PACKAGE.name, CLEAN)
    assert [breach for rule in RULES for breach in rule(package)] == []
    assert len((package / "configuration_pi0.py").read_text().splitlines()) == FILE
