"""LeRobot's commands as subprocesses, unchanged and without a person: keys are pressed through a pseudo-terminal."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 600.0  # s that anything may take on a busy machine


@contextmanager
def _control_c_works() -> Iterator[None]:
    """Processes started in this block react to control-C, even if this process runs in the background and does not."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


class CommandError(RuntimeError):
    """A command failed, or did not print what was expected. The message ends with the last lines of its output."""


class Command:
    """A running command. Its output goes to a file, from which its progress is read too."""

    def __init__(self, arguments: list[str], log: Path, environment: dict[str, str]):
        """Start it. `environment` is added to the environment variables of this process."""
        self.arguments, self.log = arguments, log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._keyboard, terminal = pty.openpty()
        inherited = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "PATH": path}
        with log.open("wb") as output, _control_c_works():
            self._process = subprocess.Popen(
                arguments, stdin=terminal, stdout=output, stderr=subprocess.STDOUT,
                env={**inherited, **offline, **environment}, start_new_session=True,
            )  # fmt: skip
        os.close(terminal)
        self._read = 0

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def output(self) -> str:
        """All its output so far."""
        return self.log.read_text(errors="replace")

    def press(self, key: str) -> None:
        """Press a key on its keyboard."""
        os.write(self._keyboard, key.encode())

    def says(self, text: str) -> bool:
        """Whether `text` has appeared after the text that `wait_for` found last."""
        return text in self.output()[self._read :]

    def wait_for(self, text: str) -> None:
        """Wait until `text` appears in the output, after the text that was found last.

        Raises:
            CommandError: the command ended, or ran for too long, without printing it.
        """
        until = time.monotonic() + PATIENCE
        while not self.says(text):
            if not self.running and not self.says(text):
                raise self.failure(f"ended with status {self._process.returncode} before it said {text!r}")
            if time.monotonic() > until:
                self.stop()
                raise self.failure(f"did not say {text!r} in {PATIENCE:.0f} s")
            time.sleep(0.02)
        self._read = self.output().index(text, self._read) + len(text)

    def interrupt(self) -> None:
        """Send control-C."""
        self._process.send_signal(signal.SIGINT)

    def stop(self) -> None:
        """End it at once, if it still runs."""
        if self.running:
            self._process.kill()
        self._process.wait()

    def finish(self, check: bool = True) -> int:
        """Wait for its end; returns the exit status.

        Raises:
            CommandError: the status is not 0, unless `check` is off.
        """
        try:
            status = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.stop()
            raise self.failure(f"did not end in {PATIENCE:.0f} s") from None
        finally:
            os.close(self._keyboard)
        if status and check:
            raise self.failure(f"failed with status {status}")
        return status

    def failure(self, what: str) -> CommandError:
        """An error with the last lines of the output."""
        tail = "\n".join(self.output().splitlines()[-15:])
        return CommandError(f"{self.arguments[0]} {what}; its output is in {self.log}:\n{tail}")
