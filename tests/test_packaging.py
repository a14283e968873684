"""The installed package: LeRobot finds plugins by the exact name in their metadata."""

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import lerobot_pi0

ROOT = Path(__file__).parent.parent
NAME = "lerobot_policy_pi0"


def test_installed_name():
    """Catches an installation (editable or not) that LeRobot does not find, for example as `lerobot-policy-pi0`."""
    names = [dist.metadata["Name"] for dist in importlib.metadata.distributions()]
    assert NAME in names
    assert importlib.metadata.version(NAME) == lerobot_pi0.__version__


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from the files that git tracks, in another folder, so that the tree stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.split("\0"):
        if name.startswith(("lerobot_pi0/", "lerobot_policy_pi0", "pyproject.toml", "README", "LICENSE")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (file,) = folder.glob("*.whl")
    return file


def test_wheel(wheel):
    """Catches a build back end that normalises the name, and modules or templates that are missing in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        (metadata,) = [name for name in files if name.endswith(".dist-info/METADATA")]
        fields = Parser().parsestr(archive.read(metadata).decode())
    assert fields["Name"] == NAME
    assert fields["Version"] == lerobot_pi0.__version__
    assert fields["License-Expression"] == "Apache-2.0"
    requirements = [line.replace(" ", "") for line in fields.get_all("Requires-Dist")]
    assert any(line.startswith("lerobot[") and "<0.6.2" in line and ">=0.6.1" in line for line in requirements)
    packed = {name for name in files if ".dist-info/" not in name}
    list_tracked = ["git", "ls-files", "lerobot_pi0", NAME]
    tracked = subprocess.run(list_tracked, cwd=ROOT, capture_output=True, text=True, check=True)
    assert packed == {*tracked.stdout.split()} > {f"{NAME}/__init__.py", "lerobot_pi0/tools/reports/report.html"}


def test_wheel_is_discovered(wheel, tmp_path):
    """Catches a wheel that can be installed but is not found by name, when this working tree is not there to help."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*install, tmp_path, wheel], check=True)
    program = (
        "import importlib.metadata as m, importlib.util as u;"
        f"print([d.metadata['Name'] for d in m.distributions(path=[{str(tmp_path)!r}])]);"
        f"print(u.find_spec({NAME!r}).origin)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.splitlines() == [f"['{NAME}']", str(tmp_path / NAME / "__init__.py")]
