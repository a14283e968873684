"""LeRobot's commands as subprocesses whose output is kept in a file and whose progress is shown."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
"""Variables with which glibc keeps what tensors free for the next ones, and does not ask the system for it anew in each
step. A training step of a small network takes 4 to 8 % less time, and the process no more memory."""


def lines(options: dict[str, Any]) -> list[str]:
    """Options as a command line has them: --name=value."""
    return [f"--{name}={value}" for name, value in options.items()]


def uses_egl() -> bool:
    """Whether MuJoCo has to draw with EGL: MUJOCO_GL asks for it, or Linux has no display, where MuJoCo would look for
    one."""
    is_dark = sys.platform.startswith("linux") and "DISPLAY" not in os.environ
    return os.environ.get("MUJOCO_GL", "egl" if is_dark else "").lower() == "egl"


def environment() -> dict[str, str]:
    """Environment variables of the commands: offline, no display, and this interpreter's folder first in PATH."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if sys.platform != "darwin":  # macOS renders without a display by itself
        quiet["MUJOCO_GL"] = os.environ.get("MUJOCO_GL", "egl")
    return {**os.environ, **quiet, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def run(title: str, command: list[str], log: Path, **variables: str) -> float:
    """Run a command, keep its output in a file, show its progress bar. Returns seconds.

    Raises:
        SystemExit: it failed; the message says where its output is.
    """
    print(f"\n== {title}\n   {' '.join(command)}", flush=True)
    started = time.perf_counter()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as kept:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment() | variables
        )
        assert process.stdout is not None
        while chunk := process.stdout.read1():
            kept.write(chunk)
            kept.flush()
            _show_progress(chunk)
    if process.wait():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"\n{command[0]} failed with status {process.returncode}; its output is in {log}:\n{tail}")
    seconds = time.perf_counter() - started
    print(f"\r   done in {seconds:.0f} s".ljust(110), flush=True)
    return seconds


def _show_progress(chunk: bytes) -> None:
    """Show the newest progress bar or training line of a command's output, in place of the one before."""
    for line in re.split(r"[\r\n]+", chunk.decode(errors="replace")):
        if "it/s" in line or "s/it" in line or "ep/s" in line or "s/ep" in line or "step/s" in line or "loss:" in line:
            text = line.strip().split("] ")[-1] if "loss:" in line else line.strip()
            print(f"\r   {text[:105]}".ljust(110), end="", flush=True)
