"""`scripts/setup.sh` and `browser.sh` on other systems, simulated by a PATH of our own; Python only logs its calls."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
TOOLS = ("sh", "dirname", "grep", "cat")  # what the script takes from every system
EGL = "\tlibEGL.so.1 (libc6,x86-64) => /lib/libEGL.so.1\n\tlibEGL_{}.so.0 (libc6,x86-64) => /lib/libEGL_{}.so.0\n"


@pytest.fixture
def setup(tmp_path):
    """Run a script with these programs in PATH, {name: body in sh}, and no others but TOOLS.

    Returns its status, what it printed, and the logged calls.
    """
    root, programs, calls = tmp_path / "project", tmp_path / "bin", tmp_path / "calls"
    (root / "scripts").mkdir(parents=True)
    for name in ("setup.sh", "browser.sh"):
        shutil.copy(SCRIPTS / name, root / "scripts")
    programs.mkdir()
    calls.touch()

    def write(file: Path, body: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f'#!/bin/sh\nnote() {{ echo "$@" >> {calls}; }}\n{body}\n')
        file.chmod(0o755)

    def run(venv: bool = True, script: str = "setup.sh", **fakes: str) -> tuple[int, str, list[str]]:
        for tool in TOOLS:
            (programs / tool).symlink_to(shutil.which(tool))
        for name, body in ({"id": "echo 0", "uname": "echo Linux"} | fakes).items():
            write(programs / name.replace("_", "-"), body)
        if venv:
            write(root / ".venv/bin/python", 'note python "$@"')
        done = subprocess.run(
            ["sh", root / "scripts" / script], env={"PATH": str(programs)}, capture_output=True, text=True, timeout=120
        )
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()

    return run


def installed(calls: list[str]) -> bool:
    """Whether the last call was the installation of the project."""
    return bool(calls) and calls[-1].startswith("python -m pip install") and "examples/virtual_so100" in calls[-1]


def test_macos(setup):
    """Catches a search for Debian's packages on macOS, which renders without them."""
    status, said, calls = setup(uname="echo Darwin")
    assert status == 0 and installed(calls) and len(calls) == 1
    assert "EGL" not in said and "apt-get" not in said


@pytest.mark.parametrize("vendor", ["mesa", "nvidia"])
def test_nothing_is_missing(setup, vendor):
    """Catches packages that are installed although the system has EGL, from Mesa or another vendor."""
    status, said, calls = setup(ldconfig=f"printf '{EGL.format(vendor, vendor)}'", apt_get='note apt-get "$@"')
    assert status == 0 and installed(calls) and len(calls) == 1
    assert "EGL" not in said


def test_debian(setup):
    """Catches missing Debian packages that are not installed, or a package index that is not updated before."""
    status, said, calls = setup(ldconfig="true", apt_get='note apt-get "$@"')
    assert status == 0 and installed(calls)
    assert calls[0] == "apt-get update -qq" and "libegl-mesa0" in calls[1] and len(calls) == 3
    assert "cannot render" not in said


@pytest.mark.parametrize("apt_get", [None, "exit 100"])
def test_no_egl_and_no_way_to_get_it(setup, apt_get):
    """Catches a script that installs nothing at all if there is no apt-get, or no right to use it."""
    fakes = {"ldconfig": "true"} | ({} if apt_get is None else {"apt_get": apt_get})
    status, said, calls = setup(**fakes)
    assert status == 0 and installed(calls)
    assert "cannot render" in said and "dnf install mesa-libEGL" in said and "pacman" in said


def test_python_is_missing(setup):
    """Catches an error of the shell in place of a message that says how to get Python 3.12."""
    status, said, calls = setup(venv=False, uname="echo Darwin", python3="exit 1")
    if any(os.access(f"{folder}/python3.12", os.X_OK) for folder in ("/opt/homebrew/bin", "/usr/local/bin")):
        pytest.skip("this system has a Python 3.12 in a folder that the script knows")
    assert status == 1 and not calls
    assert "brew install python@3.12" in said and "PYTHON312=" in said


def test_without_ldconfig(setup, tmp_path):
    """Catches an error if ldconfig is missing, and libraries that are then not searched for in their folders."""
    script = tmp_path / "project/scripts/setup.sh"
    text = script.read_text()
    lookup = "for ldconfig in ldconfig /sbin/ldconfig /usr/sbin/ldconfig"
    assert lookup in text and " /usr/lib*/libEGL*" in text
    text = text.replace(lookup, "for ldconfig in ldconfig").replace("in /lib*/libEGL*", f"in {tmp_path}/lib/libEGL*")
    script.write_text(text)
    (tmp_path / "lib").mkdir()
    for library in ("libEGL.so.1", "libEGL_mesa.so.0"):
        (tmp_path / "lib" / library).touch()
    status, said, calls = setup()
    assert status == 0 and installed(calls)
    assert "cannot render" not in said


# --- browser.sh: the step that only `make test-all` takes -------------------------------------------------------


def test_a_browser_that_is_there(setup):
    """Catches a package that is installed although the machine has a browser under another name."""
    status, said, calls = setup(script="browser.sh", google_chrome="exit 1", apt_get='note apt-get "$@"')
    assert (status, said, calls) == (0, "", [])


def test_a_browser_from_debian(setup):
    """Catches a package index that is not updated before."""
    status, _, calls = setup(script="browser.sh", apt_get='note apt-get "$@"')
    assert status == 0 and calls[0] == "apt-get update -qq" and calls[1].endswith(" chromium") and len(calls) == 2


@pytest.mark.parametrize("apt_get", [None, "exit 100"])
def test_no_browser_and_no_way_to_get_it(setup, apt_get):
    """Catches slow tests that all fail, or look as if they had passed, where there is no browser."""
    status, said, calls = setup(script="browser.sh", **({} if apt_get is None else {"apt_get": apt_get}))
    assert status == 0 and not calls
    assert "Chromium is missing" in said and "skips these" in said and "dnf install chromium" in said
