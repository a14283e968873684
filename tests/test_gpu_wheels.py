"""`make bench-gpu` with the wheels of `make gpu-wheels`, where only PyTorch is installed and there is no network.

The wheels are not downloaded here: they are packed from the installed distributions.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import bare_environment
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
OURS = ["lerobot_pi0", "lerobot_policy_pi0", "pyproject.toml", "README.md", "LICENSE"]
IMAGE = ["torch", "torchvision", "numpy"]
"""What an image for CUDA is sure to have."""


def gathered() -> list[str]:
    """Names of the distributions that the script collects."""
    script = (ROOT / "scripts" / "gpu_wheels.sh").read_text()
    return re.search('NEEDED = """(.*?)"""', script, re.DOTALL)[1].split()


def pack(name: str, folder: Path) -> Path:
    """Pack a wheel from an installed distribution."""
    distribution = importlib.metadata.distribution(name)
    wheel = folder / f"{name.replace('-', '_')}-{distribution.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in distribution.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts and file.name != "direct_url.json":
                archive.write(distribution.locate_file(file), str(file))
    return wheel


def test_everything_is_installed():
    """Catches a misspelt name in the script, which takes the versions that are installed here."""
    assert len(gathered()) > 10
    for name in gathered():
        assert importlib.metadata.version(name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_bench_gpu_from_wheels(tmp_path):
    """Catches a missing wheel: a GPU may be available for only an hour, and nothing can be downloaded there."""
    wheels = [pack(name, tmp_path) for name in gathered()]
    wheels.append(bare_environment.build_wheel(ROOT, OURS, tmp_path / "ours"))
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    bare_environment.link(packages, bare_environment.needed(map(Requirement, IMAGE)).values())
    python, target = environment / "bin" / "python", tmp_path / "gathered"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target]
    subprocess.run([*install, *wheels], check=True)

    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    bare = subprocess.run([python, "-c", "import lerobot"], env=outside, capture_output=True, text=True, cwd=tmp_path)
    assert "No module named 'lerobot'" in bare.stderr
    command = [python, ROOT / "benchmarks" / "gpu.py", "--device=cpu", "--size=small", "--repeats=1", "--out", tmp_path]
    done = subprocess.run(
        command, env=outside | {"PYTHONPATH": str(target)}, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert not [row for row in rows if "error" in row]
    assert {row["part"] for row in rows} >= {"card", "right", "chunk", "step", "load", "threads"}
    assert all(row["good"] for row in rows if "good" in row)
