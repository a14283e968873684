"""Faults between a computer and its servos, as options: lost, late and corrupt packets, and broken servos."""

import random
from dataclasses import dataclass


@dataclass
class Faults:
    """Faults of one bus. With the defaults there are none.

    Attributes:
        drop: share of the servos' replies that are lost.
        late: share of the replies that come `delay` s late. The replies after them wait behind them.
        corrupt: share of the replies with a flipped bit.
        corrupt_commands: share of the packets to the servos with a flipped bit.
        missing: id of a servo that falls silent, as with a loose cable.
        jammed: id of a servo whose shaft cannot turn.
        voltage: id of a servo that reports an input voltage error.
        after: the faults begin this many s after the next goal position, so that a command can connect first.
        limit: largest number of replies and commands with a fault.
        seed: seed of the random draws.
    """

    drop: float = 0.0
    late: float = 0.0
    delay: float = 0.08
    corrupt: float = 0.0
    corrupt_commands: float = 0.0
    missing: int | None = None
    jammed: int | None = None
    voltage: int | None = None
    after: float = 0.0
    limit: int | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("drop", "late", "corrupt", "corrupt_commands"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"fault {name} is a share from 0 to 1, not {getattr(self, name)}")
        if self.delay < 0 or self.after < 0:
            raise ValueError("faults' delay and after are seconds, 0 or more")


class Line:
    """The wires between computer and servos, which lose, delay and corrupt packets as `faults` say."""

    def __init__(self, faults: Faults):
        self.faults = faults
        self._random = random.Random(faults.seed)
        self._left = faults.limit

    def _strikes(self, share: float) -> bool:
        hit = self._left != 0 and self._random.random() < share
        if hit and self._left is not None:
            self._left -= 1
        return hit

    def _flip(self, packet: bytes) -> bytes:
        """The packet with one random bit flipped, not in the header."""
        spoilt = bytearray(packet)
        spoilt[self._random.randrange(2, len(spoilt))] ^= 1 << self._random.randrange(8)
        return bytes(spoilt)

    def command(self, packet: bytes) -> tuple[bytes, str | None]:
        """A packet as the servos receive it, and its fault, if any."""
        if self._strikes(self.faults.corrupt_commands):
            return self._flip(packet), "corrupt command"
        return packet, None

    def reply(self, packet: bytes) -> tuple[bytes, float, str | None]:
        """What arrives of a servo's reply (maybe nothing), its delay in s, and its fault, if any."""
        if self._strikes(self.faults.drop):
            return b"", 0.0, "dropped reply"
        if self._strikes(self.faults.late):
            return packet, self.faults.delay, "late reply"
        if self._strikes(self.faults.corrupt):
            return self._flip(packet), 0.0, "corrupt reply"
        return packet, 0.0, None
