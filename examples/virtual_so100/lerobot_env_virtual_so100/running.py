"""LeRobot's commands as subprocesses whose output is kept in a file and whose progress is shown."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RUN = {"checkpoints", "eval", "wandb"}  # what lerobot-train writes into the folder of a run
BETWEEN_LINES = 60  # seconds from one line of progress to the next where the output is no terminal
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
"""Variables with which glibc keeps what tensors free for the next ones, and does not ask the system for it anew in each
step. A training step of a small network takes 4 to 8 % less time, and the process no more memory."""


def lines(options: dict[str, Any]) -> list[str]:
    """Options as a command line has them: --name=value."""
    return [f"--{name}={value}" for name, value in options.items()]


def remove_run(folder: Path, repo_id: str) -> None:
    """Remove an earlier training run on this dataset, if there is one.

    Raises:
        SystemExit: there is something else in the folder.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    known = folder / "checkpoints" / "last" / "pretrained_model" / "train_config.json"
    trained = json.loads(known.read_text())["dataset"]["repo_id"] if known.is_file() else None
    if trained not in (None, repo_id) or {x.name for x in folder.iterdir()} - RUN:
        raise SystemExit(f"{folder} holds other things than an earlier run of this command: give another --output")
    shutil.rmtree(folder)


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

    On a terminal the bar moves. Elsewhere, as in a file, there is a line of it now and then.

    Raises:
        SystemExit: it failed; the message says where its output is.
    """
    print(f"\n== {title}\n   {' '.join(command)}", flush=True)
    shown = started = time.perf_counter()
    moves = sys.stdout.isatty()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as kept:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment() | variables
        )
        assert process.stdout is not None
        while chunk := process.stdout.read1():
            kept.write(chunk)
            kept.flush()
            text = _progress(chunk)
            if text and moves:
                print(f"\r   {text}".ljust(110), end="", flush=True)
            elif text and time.perf_counter() - shown > BETWEEN_LINES:
                print(f"   {text}", flush=True)
                shown = time.perf_counter()
    if process.wait():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"\n{command[0]} failed with status {process.returncode}; its output is in {log}:\n{tail}")
    seconds = time.perf_counter() - started
    done = f"   done in {seconds:.0f} s"
    print(f"\r{done}".ljust(110) if moves else done, flush=True)
    return seconds


def _progress(chunk: bytes) -> str:
    """The newest progress bar or training line in a command's output, or nothing."""
    text = ""
    for line in re.split(r"[\r\n]+", chunk.decode(errors="replace")):
        if "it/s" in line or "s/it" in line or "ep/s" in line or "s/ep" in line or "step/s" in line or "loss:" in line:
            text = line.strip().split("] ")[-1] if "loss:" in line else line.strip()
    return text[:105]
