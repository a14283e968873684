"""The clock of the virtual servos and of the virtual cell: real time, or time that passes on request.

LeRobot waits 51 ms for a servo's reply, and on a busy machine a process may wait longer than that for a processor.
Time that passes on request gives the same result on every machine.
"""

import time


class Clock:
    """Seconds as `time.monotonic` counts them. A `stepped` clock begins at 0 and moves only in `elapse`."""

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
