"""A Python environment with built wheels and their requirements, and nothing else.

`pip install` of the wheels would download gigabytes that this environment has already. So the new environment gets
links to the installed distributions that the wheels require, directly or indirectly. A requirement that a wheel forgets
is missing there, and so is the working tree.
"""

import importlib.metadata
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def build_wheel(root: Path, parts: Iterable[str], folder: Path) -> Path:
    """A wheel built from the files that git tracks under `parts` of `root`, in a copy, so that the tree stays clean."""
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-z", *parts], cwd=root, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((root / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def requirements(wheel: Path, extras: Iterable[str] = ()) -> list[Requirement]:
    """The requirements in the metadata of a wheel, with these extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        fields = Parser().parsestr(archive.read(name).decode())
    return _asked([*map(Requirement, fields.get_all("Requires-Dist") or [])], extras)


def _asked(requirements: Iterable[Requirement], extras: Iterable[str]) -> list[Requirement]:
    names = ("", *extras)
    return [r for r in requirements if r.marker is None or any(r.marker.evaluate({"extra": name}) for name in names)]


def needed(roots: Iterable[Requirement]) -> dict[str, importlib.metadata.Distribution]:
    """The installed distributions that are required, directly or indirectly. Those that are not installed are
    left out: they belong to extras of LeRobot that this project's environment does not have."""
    found, seen, todo = {}, set(), list(roots)
    while todo:
        requirement = todo.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key in seen:
            continue
        seen.add(key)
        try:
            distribution = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        version = distribution.version
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}, and {version} is installed"
        found[key[0]] = distribution
        todo += _asked(map(Requirement, distribution.requires or ()), requirement.extras)
    return found


def link(packages: Path, distributions: Iterable[importlib.metadata.Distribution]) -> None:
    """Let installed distributions be found in this folder of packages."""
    for distribution in distributions:
        tops = {PurePosixPath(file).parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
        for top in tops:
            if not top.endswith(".pth") and not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))


def make(folder: Path, wheels: dict[Path, Iterable[str]]) -> Path:
    """Make a new environment with these wheels, each with its extras; returns the folder of its programs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    roots = [requirement for wheel, extras in wheels.items() for requirement in requirements(wheel, extras)]
    linked = needed(roots)
    link(packages, linked.values())
    programs, python = folder / "bin", folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, *wheels], check=True)
    for entry in linked["lerobot"].entry_points.select(group="console_scripts"):
        script = programs / entry.name
        script.write_text(
            f"#!{python}\nimport sys\nfrom {entry.module} import {entry.attr}\nsys.exit({entry.attr}())\n"
        )
        script.chmod(0o755)
    return programs
