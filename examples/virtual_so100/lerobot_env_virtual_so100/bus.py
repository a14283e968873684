"""Emulated servo bus of an arm on a pseudo-terminal: Feetech's protocol 0, in a process of its own.

Packets to the servos: FF FF id length instruction parameters… checksum; from them the same with an error byte in place
of the instruction. LeRobot waits 51 ms for a servo's reply and never flushes its input: if a reply comes later, LeRobot
takes it for the reply to its next request. So the bus has its own process, which nothing else can delay, and `late` is
one of the faults. A `stepped` bus does not depend on the load of the machine: its time passes only in
`VirtualBus.elapse`.
"""

import contextlib
import json
import multiprocessing
import os
import select
import signal
import tty
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from .clock import Clock
from .faults import Faults, Line
from .servo import Servo, Shafts

PING, READ, WRITE, REG_WRITE, ACTION, SYNC_READ, SYNC_WRITE = 1, 2, 3, 4, 5, 0x82, 0x83
BROADCAST = 254
_HEADER = b"\xff\xff"
_PACKET_TIMEOUT = 0.02  # s
_REGISTERS_LOGGED = {40: "torque", 42: "goal"}


def processes() -> multiprocessing.context.BaseContext:
    """The multiprocessing context for the processes of a cell: a fork server without threads and without MuJoCo.

    The server has imported this package: importing LeRobot takes 10 s, and a GL context does not survive a fork.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.bus"])
    return context


def at_once(priority: int) -> None:
    """Give the calling process real-time priority, if the system allows it.

    Real servos and gravity never wait for a processor. Servos have priority 2, the physics has 1.
    """
    with contextlib.suppress(OSError, AttributeError):  # macOS has no such function
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(priority))


def packet(number: int, code: int, parameters: bytes = b"") -> bytes:
    """A packet to a servo (`code` is the instruction) or from one (its error byte)."""
    body = bytes([number, len(parameters) + 2, code]) + parameters
    return _HEADER + body + bytes([~sum(body) & 0xFF])


class Receiver:
    """Splits the bytes that arrive into packets."""

    def __init__(self, clock: Callable[[], float]):
        """`clock` gives seconds."""
        self._clock = clock
        self._buffer = b""
        self._last = 0.0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Complete packets, from header to checksum; the checksum may still be wrong.

        A packet that stops halfway is dropped; otherwise a corrupt length would swallow the packets after it.
        """
        now = self._clock()
        self._buffer = data if now - self._last > _PACKET_TIMEOUT else self._buffer + data
        self._last = now
        while (start := self._buffer.find(_HEADER)) >= 0:
            self._buffer = self._buffer[start:].lstrip(b"\xff")  # an id is never FF: the last two are the header
            length = self._buffer[1] if len(self._buffer) > 1 else None
            if length is None or len(self._buffer) < length + 2:
                self._buffer = _HEADER + self._buffer
                return
            body, self._buffer = self._buffer[: length + 2], self._buffer[length + 2 :]
            yield _HEADER + body
        self._buffer = self._buffer[-1:]


def intact(raw: bytes) -> bool:
    """Whether a packet's checksum is right and its length possible."""
    return len(raw) >= 6 and ~sum(raw[2:-1]) & 0xFF == raw[-1]


class Servos:
    """The servos of one bus: what they do and answer when a packet reaches them."""

    def __init__(self, shafts: Shafts, clock: Callable[[], float], count: int = 6):
        self.shafts = shafts
        self.all = [Servo(i + 1, shafts, i, clock) for i in range(count)]
        self.silent: set[int] = set()

    def __getitem__(self, number: int) -> Servo:
        return next(servo for servo in self.all if servo.number == number)

    def _answering(self) -> dict[int, Servo]:
        return {servo.number: servo for servo in self.all if servo.number not in self.silent}

    def handle(self, number: int, instruction: int, parameters: bytes) -> list[bytes]:
        """Replies, in the order in which they are sent. Servos that do not exist or are silent do not reply."""
        servos = self._answering()
        if instruction == SYNC_READ:
            asked = [servos[n] for n in parameters[2:] if n in servos]
            return [packet(s.number, s.error, s.read(parameters[0], parameters[1])) for s in asked]
        if instruction == SYNC_WRITE:
            address, length, rest = parameters[0], parameters[1], parameters[2:]
            for at in range(0, len(rest), length + 1):
                if rest[at] in servos:
                    servos[rest[at]].write(address, rest[at + 1 : at + 1 + length])
            return []
        addressed = list(servos.values()) if number == BROADCAST else [servos[n] for n in (number,) if n in servos]
        replies = [packet(number if number != BROADCAST else s.number, *self._one(s, instruction, parameters))
                   for s in addressed]  # fmt: skip
        return replies if number != BROADCAST or instruction == PING else []

    @staticmethod
    def _one(servo: Servo, instruction: int, parameters: bytes) -> tuple[int, bytes]:
        """Error byte and data of one servo's reply."""
        data = b""
        if instruction == READ:
            data = servo.read(parameters[0], parameters[1])
        elif instruction == WRITE:
            servo.write(parameters[0], parameters[1:])
        elif instruction == REG_WRITE:
            servo.stage(parameters[0], parameters[1:])
        elif instruction == ACTION:
            servo.act()
        return servo.error, data


class _Port:
    """The bus's end of the pseudo-terminal, with the faults of the line and the log."""

    def __init__(self, servos: Servos, log: Path | None, clock: Clock):
        self._clock = clock
        self._servos, self._line, self._receiver = servos, Line(Faults()), Receiver(clock)
        self._master, self._slave = os.openpty()  # the slave stays open here: no hang-up when LeRobot closes it
        tty.setraw(self._slave)
        self.name = os.ttyname(self._slave)
        self._log = None if log is None else log.open("a", buffering=1)
        self._out: deque[tuple[float, bytes]] = deque()
        self._faults, self._first_goal, self._due = Faults(), None, False

    def fileno(self) -> int:
        """For select."""
        return self._master

    def inject(self, faults: Faults) -> None:
        """Set the faults that apply from now on, or from `faults.after` s after the next goal position."""
        self._faults, self._line, self._due, self._first_goal = faults, Line(Faults()), True, None
        self._servos.silent.clear()
        self._servos.shafts.jammed[:] = 0
        for servo in self._servos.all:
            servo.voltage_error = False
        self._start_faults()

    def _start_faults(self) -> None:
        """Start the faults if their time has come."""
        faults = self._faults
        if not self._due or (
            faults.after and (self._first_goal is None or self._clock() - self._first_goal < faults.after)
        ):
            return
        self._due, self._line = False, Line(faults)
        if faults.missing is not None:
            self._servos.silent.add(faults.missing)
        if faults.jammed is not None:
            self._servos.shafts.jammed[faults.jammed - 1] = 1
        if faults.voltage is not None:
            self._servos[faults.voltage].voltage_error = True
        if faults != Faults():
            self._write_log(fault="begins", faults=vars(faults))

    def _write_log(self, **entry) -> None:
        if self._log is not None:
            self._log.write(json.dumps({"t": self._clock(), **entry}) + "\n")

    def receive(self) -> None:
        """Read what LeRobot sent, and queue the replies."""
        for raw in self._receiver.feed(os.read(self._master, 4096)):
            self._start_faults()
            raw, fault = self._line.command(raw)
            if not intact(raw):
                self._write_log(fault=fault or "bad checksum", packet=raw.hex())
                continue
            number, instruction, parameters = raw[2], raw[4], raw[5:-1]
            self._log_writes(number, instruction, parameters)
            for reply in self._servos.handle(number, instruction, parameters):
                self._answer(reply)
        self.send()

    def elapse(self, seconds: float) -> float:
        """Let time pass, send what is due then, and return the time."""
        now = self._clock.elapse(seconds)
        self.send()
        return now

    def _answer(self, reply: bytes) -> None:
        arriving, delay, fault = self._line.reply(reply)
        if fault:
            self._write_log(fault=fault, servo=reply[2])
        due = max(self._clock() + delay, self._out[-1][0] if self._out else 0.0)  # replies keep their order
        self._out.append((due, arriving))

    def send(self) -> None:
        """Send what is due."""
        data = b""
        while self._out and self._out[0][0] <= self._clock():
            data += self._out.popleft()[1]
        if data:
            os.write(self._master, data)

    @property
    def wait(self) -> float | None:
        """Seconds of real time until the next reply is due; None if there is none, or if the bus is stepped."""
        return max(0.0, self._out[0][0] - self._clock()) if self._out and not self._clock.stepped else None

    def _log_writes(self, number: int, instruction: int, parameters: bytes) -> None:
        """Log written goals and torque: {"goal": {id: ticks}} as they were sent, before the servos' limits."""
        if self._log is None and self._first_goal is not None:
            return
        writes: dict[int, bytes] = {}
        if instruction == SYNC_WRITE:
            length, rest = parameters[1], parameters[2:]
            writes = {rest[at]: rest[at + 1 : at + 1 + length] for at in range(0, len(rest), length + 1)}
        elif instruction in (WRITE, REG_WRITE):
            writes = {number: parameters[1:]}
        name = _REGISTERS_LOGGED.get(parameters[0]) if writes else None
        if name is None:
            return
        if name == "goal" and self._first_goal is None:
            self._first_goal = self._clock()
        self._write_log(**{name: {n: int.from_bytes(data, "little") for n, data in writes.items()}})

    def close(self) -> None:
        """Close the pseudo-terminal."""
        os.close(self._master)
        os.close(self._slave)


def serve(pipe, shafts: Shafts, log: Path | None, stepped: bool) -> None:
    """Main function of a bus's process: serve the port until the pipe closes.

    Packets that were written to the port before an order was given are handled before it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # control-C is for the command at the other end
    at_once(2)
    clock = Clock(stepped)
    servos = Servos(shafts, clock)
    port = _Port(servos, log, clock)
    pipe.send(port.name)
    orders = {
        "inject": port.inject,
        "elapse": port.elapse,
        "registers": lambda number, address, length: servos[number].read(address, length),
        "program": lambda number, address, data: servos[number].program(address, data),
    }
    with contextlib.suppress(EOFError, OSError):
        while True:
            ready, _, _ = select.select([port, pipe], [], [], port.wait)
            if port in ready:
                port.receive()
            port.send()
            if pipe in ready:
                order, arguments = pipe.recv()
                while select.select([port], [], [], 0)[0]:
                    port.receive()
                if order == "close":
                    break
                pipe.send(orders[order](*arguments))
    port.close()


class VirtualBus:
    """One arm's bus, seen from outside: `port` is the value for `--robot.port` or `--teleop.port`.

    Use it as a context manager; its process also ends with the process that made it.
    """

    def __init__(
        self, shafts: Shafts | None = None, log: Path | None = None, link: Path | None = None, stepped: bool = False
    ):
        """Start the bus. Goals, torque and faults are written to the file `log`; `link` becomes a link to the port.

        `shafts` are allocated if not given. The time of a `stepped` bus passes only in `elapse`.
        """
        context = processes()
        self.shafts = shafts or Shafts.allocate(context)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self.shafts, log, stepped), daemon=True)
        self._process.start()
        theirs.close()
        self.port, self._link, self._stepped = self._pipe.recv(), link, stepped
        if link is not None:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(self.port)
            self.port = str(link)

    def _order(self, order: str, *arguments):
        self._pipe.send((order, arguments))
        return self._pipe.recv()

    def inject(self, faults: Faults) -> None:
        """Set the faults that apply from now on; `Faults()` removes them all."""
        self._order("inject", faults)

    def elapse(self, seconds: float) -> float:
        """Let time pass on a stepped bus, after everything that was sent before is handled; returns its time in s.

        Raises:
            RuntimeError: for a bus in real time.
        """
        if not self._stepped:
            raise RuntimeError(
                "real time passes by itself: make the bus or the cell with stepped=True to move its time"
            )
        return self._order("elapse", seconds)

    def registers(self, number: int, address: int, length: int = 1) -> bytes:
        """Bytes of a servo's memory."""
        return self._order("registers", number, address, length)

    def program(self, number: int, address: int, data: bytes) -> None:
        """Change a servo's memory without the bus, read-only registers too (for another model or firmware)."""
        self._order("program", number, address, data)

    def calibrate(self, registers: dict[int, dict[int, bytes]]) -> None:
        """Program {id: {address: bytes}}, such as `calibration.registers`."""
        for number, entries in registers.items():
            for address, data in entries.items():
                self.program(number, address, data)

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):  # it may have died
            self._pipe.send(("close", ()))
        self._process.join(timeout=5)
        self._pipe.close()
        if self._link is not None:
            self._link.unlink(missing_ok=True)

    def __enter__(self) -> "VirtualBus":
        return self

    def __exit__(self, *_) -> None:
        self.close()
