"""The clock of the virtual servos and of the virtual cell: real time, or time that passes on request.

Real arms need real time, and a busy machine has none to give: LeRobot waits 51 ms for a reply, and a process may wait
longer than that for a processor. What passes on request is the same on every machine.
"""

import time


class Clock:
    """Seconds as `time.monotonic` counts them; a `stepped` clock begins at 0 and moves in `elapse` alone."""

    def __init__(self, stepped: bool = False):
        self.stepped = stepped
        self._now = 0.0

    def __call__(self) -> float:
        """The time now, in s."""
        return self._now if self.stepped else time.monotonic()

    def elapse(self, seconds: float) -> float:
        """Let `seconds` pass on a stepped clock, and return the time then."""
        self._now += seconds
        return self._now
