"""LeRobot's commands, run as they are, with nobody at the keyboard: a pseudo-terminal presses the keys."""

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
    """Processes that are started here take control-C, even where this one was put in the background and does not."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


class CommandError(RuntimeError):
    """A command ended with an error, or did not say what it should have; the message ends with its last lines."""


class Command:
    """A running command. Its output goes to a file, which is also where its progress is read."""

    def __init__(self, arguments: list[str], log: Path, environment: dict[str, str]):
        """Start it. `environment` is added to this process's."""
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
        """All it has said so far."""
        return self.log.read_text(errors="replace")

    def press(self, key: str) -> None:
        """A key on its keyboard."""
        os.write(self._keyboard, key.encode())

    def says(self, text: str) -> bool:
        """Whether `text` has appeared since it was last waited for."""
        return text in self.output()[self._read :]

    def wait_for(self, text: str) -> None:
        """Wait until it says something that it has not yet been waited for to say.

        Raises:
            CommandError: it ended without.
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
        """Control-C."""
        self._process.send_signal(signal.SIGINT)

    def stop(self) -> None:
        """End it at once, if it still runs."""
        if self.running:
            self._process.kill()
        self._process.wait()

    def finish(self, check: bool = True) -> int:
        """Wait for its end; the exit status.

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
