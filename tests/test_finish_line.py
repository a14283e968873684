"""The finish line: the package as a user gets it, from its wheel, in a user's whole workflow."""

import os
import subprocess
import sys
from pathlib import Path

import bare_environment
import pytest

pytest.importorskip("lerobot_env_virtual_so100", reason="pip install -e examples/virtual_so100 (make setup does)")
pytest.importorskip("scservo_sdk", reason="pip install 'lerobot[feetech]'")
pytest.importorskip("zmq", reason="pip install 'lerobot[pyzmq-dep]'")
pytest.importorskip("grpc", reason="pip install 'lerobot[grpcio-dep]'")

ROOT = Path(__file__).parent.parent
OURS = ["lerobot_pi0", "lerobot_policy_pi0", "pyproject.toml", "README.md", "LICENSE"]


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """The programs of an environment with the wheels of the package and of the virtual arm."""
    folder = tmp_path_factory.mktemp("bare")
    package = bare_environment.build_wheel(ROOT, OURS, folder / "package")
    arm = bare_environment.build_wheel(ROOT / "examples" / "virtual_so100", ["."], folder / "arm")
    return bare_environment.make(folder / "environment", {package: ["serve"], arm: []})


def outside() -> dict[str, str]:
    """Environment variables without any path into the working tree."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


@pytest.mark.slow
def test_the_wheel_asks_for_what_it_imports(programs, tmp_path):
    """Catches a module that imports a package that is not a requirement: it works here, but on no other machine."""
    code = (
        "import pkgutil, importlib, lerobot_pi0\n"
        "for _, name, _ in pkgutil.walk_packages(lerobot_pi0.__path__, 'lerobot_pi0.'):\n"
        "    try: importlib.import_module(name)\n"
        "    except ModuleNotFoundError as error: print(error.name.split('.')[0])\n"
    )
    command = [programs / "python", "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=outside())
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {"jax", "orbax", "bitsandbytes"}, done.stdout  # extras


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no pseudo-terminals at 1 Mbaud")
def test_the_finish_line(programs, tmp_path):
    """Catches a package that passes its tests in a developer's tree, but fails when a user installs it."""
    from lerobot_env_virtual_so100.scene import check_rendering

    try:
        check_rendering()
    except RuntimeError as error:
        pytest.skip(str(error))
    command = [programs / "python", "-P", ROOT / "tests" / "finish_line.py", tmp_path / "line"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=outside())
    print(done.stdout)
    busy = f"the arm needs real time; load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-6000:]}\n{busy}"
