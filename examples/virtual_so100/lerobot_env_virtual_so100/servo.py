"""Emulated servo, a Feetech STS3215: its registers, and their effect on the shaft.

Positions are ticks, 4096 a turn. The encoder sits on the shaft; what the servo calls its position is
`encoder - homing offset`, wrapped into one turn. 16-bit registers are little-endian, signed ones sign and magnitude.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

TICKS = 4096
MODEL_NUMBER = 777
FIRMWARE = (3, 10)

# Addresses, as in Feetech's memory table.
FIRMWARE_MAJOR, FIRMWARE_MINOR, MODEL, ID = 0, 1, 3, 5
RETURN_DELAY, STATUS_LEVEL, MIN_LIMIT, MAX_LIMIT = 7, 8, 9, 11
MAX_TORQUE, PHASE, P_GAIN, D_GAIN, PROTECTION_CURRENT = 16, 18, 21, 22, 28
HOMING, MODE, PROTECTIVE_TORQUE, PROTECTION_TIME = 31, 33, 34, 35
TORQUE_ENABLE, GOAL, TORQUE_LIMIT, LOCK = 40, 42, 48, 55
POSITION, VOLTAGE, TEMPERATURE, STATUS = 56, 62, 63, 65
MAX_ACCELERATION = 85

_READ_ONLY = (*range(ID), *range(POSITION, 80))
_WORDS = (MODEL, MIN_LIMIT, MAX_LIMIT, MAX_TORQUE, PROTECTION_CURRENT, HOMING, GOAL, TORQUE_LIMIT, POSITION)
_FACTORY = {
    FIRMWARE_MAJOR: FIRMWARE[0], FIRMWARE_MINOR: FIRMWARE[1], MODEL: MODEL_NUMBER, RETURN_DELAY: 250, STATUS_LEVEL: 1,
    MAX_LIMIT: TICKS - 1, MAX_TORQUE: 1000, PHASE: 0x1C, P_GAIN: 32, D_GAIN: 32, PROTECTION_CURRENT: 500,
    PROTECTIVE_TORQUE: 20, PROTECTION_TIME: 200, TORQUE_LIMIT: 1000, VOLTAGE: 74, TEMPERATURE: 30,
    MAX_ACCELERATION: 254,
}  # fmt: skip

HOMING_SIGN, POSITION_SIGN = 11, 15  # bits
_UNWRAPPED = 0x10  # bit of PHASE: positions continue beyond one turn
ERROR_VOLTAGE, ERROR_OVERLOAD = 0x01, 0x20
_BLOCKED_TICKS = 60  # if the goal is farther away than this, the servo pushes
_MOVED_TICKS = 3


def to_magnitude(value: int, sign_bit: int) -> int:
    """Sign and magnitude of an integer. Raises ValueError for one that does not fit."""
    if abs(value) >= 1 << sign_bit:
        raise ValueError(f"{value} does not fit into {sign_bit} bits and a sign")
    return abs(value) | (value < 0) << sign_bit


def from_magnitude(word: int, sign_bit: int) -> int:
    """Inverse of `to_magnitude`."""
    magnitude = word & ((1 << sign_bit) - 1)
    return -magnitude if word >> sign_bit & 1 else magnitude


@dataclass
class Shafts:
    """The mechanics of six servos, in memory that bus and cell share: rows of six float64.

    The cell writes `encoder`, where the shafts are (ticks). The bus writes the others: `target`, where the servos drive
    the shafts (ticks of the encoder); `torque`, with what fraction of their strength, 0 for limp; `jammed`, 1 where a
    fault holds the shaft; `goals`, how often a goal arrived.
    """

    memory: object  # a RawArray of 30 doubles: processes share it, while a numpy array would be copied

    @classmethod
    def allocate(cls, context) -> "Shafts":
        """Shared memory from a multiprocessing context, all shafts in the middle of their turn."""
        shafts = cls(context.RawArray("d", 30))
        shafts.encoder[:] = shafts.target[:] = TICKS / 2
        return shafts

    def _row(self, index: int) -> np.ndarray:
        return np.frombuffer(self.memory).reshape(5, 6)[index]

    encoder = property(lambda self: self._row(0))
    target = property(lambda self: self._row(1))
    torque = property(lambda self: self._row(2))
    jammed = property(lambda self: self._row(3))
    goals = property(lambda self: self._row(4))


class Servo:
    """One servo: registers, and its shaft (column `index` of `shafts`)."""

    def __init__(self, number: int, shafts: Shafts, index: int, clock: Callable[[], float] = time.monotonic):
        """`clock` gives seconds."""
        self._shafts, self._index, self._clock = shafts, index, clock
        self._memory = bytearray(256)
        for address, value in {**_FACTORY, ID: number}.items():
            self._poke(address, value)
        self.voltage_error = False
        self._rested = (float(shafts.encoder[index]), self._clock())
        self._pending: tuple[int, bytes] | None = None

    @property
    def number(self) -> int:
        """The servo's id on the bus."""
        return self._memory[ID]

    @property
    def error(self) -> int:
        """Error byte of its replies."""
        return self._memory[STATUS] | ERROR_VOLTAGE * self.voltage_error

    def word(self, address: int) -> int:
        """Unsigned 16-bit value at an address."""
        return int.from_bytes(self._memory[address : address + 2], "little")

    def _poke(self, address: int, value: int) -> None:
        self._memory[address : address + 1 + (address in _WORDS)] = value.to_bytes(1 + (address in _WORDS), "little")

    @property
    def _homing(self) -> int:
        return from_magnitude(self.word(HOMING), HOMING_SIGN)

    @property
    def position(self) -> int:
        """Present position in ticks."""
        position = round(float(self._shafts.encoder[self._index])) - self._homing
        return position if self._memory[PHASE] & _UNWRAPPED else position % TICKS

    def read(self, address: int, length: int) -> bytes:
        """Bytes of the memory table, with the values measured now."""
        self._watch_load()
        self._poke(POSITION, to_magnitude(self.position, POSITION_SIGN))
        return bytes(self._memory[address : address + length])

    def write(self, address: int, data: bytes) -> None:
        """Write registers and apply their effects; read-only registers are not changed."""
        self._watch_load()
        was_on = self._memory[TORQUE_ENABLE]
        for offset, value in enumerate(data):
            if address + offset not in _READ_ONLY:
                self._memory[address + offset] = value
        written = range(address, address + len(data))
        if TORQUE_ENABLE in written:
            self._switch(bool(was_on))
        if GOAL in written:
            self._aim()
            self._shafts.goals[self._index] += 1
        if TORQUE_LIMIT in written:
            self._apply_torque()

    def program(self, address: int, data: bytes) -> None:
        """Change the memory, read-only registers too, without any effect on the shaft."""
        self._memory[address : address + len(data)] = data

    def stage(self, address: int, data: bytes) -> None:
        """Keep a write until `act`."""
        self._pending = (address, data)

    def act(self) -> None:
        """Do what was staged."""
        if self._pending is not None:
            self.write(*self._pending)
            self._pending = None

    def _switch(self, was_on: bool) -> None:
        """Torque on: hold the present position, whatever the goal was. Off: go limp, and clear an overload error."""
        if self._memory[TORQUE_ENABLE] and not was_on:
            self._poke(GOAL, to_magnitude(self.position, POSITION_SIGN))
            self._aim()
        self._memory[STATUS] = 0
        self._rest()
        self._apply_torque()

    def _aim(self) -> None:
        """Drive to the goal, within the limits (both zero: no limits); only in position mode."""
        goal, low, high = from_magnitude(self.word(GOAL), POSITION_SIGN), self.word(MIN_LIMIT), self.word(MAX_LIMIT)
        if self._memory[MODE] == 0:
            self._shafts.target[self._index] = (min(max(goal, low), high) if low or high else goal) + self._homing

    def _apply_torque(self) -> None:
        strength = self.word(TORQUE_LIMIT) / 1000
        if self._memory[STATUS] & ERROR_OVERLOAD:
            strength = min(strength, self._memory[PROTECTIVE_TORQUE] / 100)
        self._shafts.torque[self._index] = strength * bool(self._memory[TORQUE_ENABLE])

    def _rest(self) -> None:
        self._rested = (float(self._shafts.encoder[self._index]), self._clock())

    def _watch_load(self) -> None:
        """Overload protection: if the servo has pushed for long without moving, set an error bit and reduce torque."""
        encoder, target = float(self._shafts.encoder[self._index]), float(self._shafts.target[self._index])
        place, since = self._rested
        pushing = self._memory[TORQUE_ENABLE] and abs(target - encoder) > _BLOCKED_TICKS
        if not pushing or abs(encoder - place) > _MOVED_TICKS:
            self._rest()
        elif self._clock() - since > self._memory[PROTECTION_TIME] / 100:  # the register counts 10 ms
            self._memory[STATUS] |= ERROR_OVERLOAD
            self._apply_torque()
