"""Time in tests of the virtual arm: LeRobot's drivers on a clock that a busy machine cannot disturb, and real time."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from lerobot.cameras.zmq import ZMQCamera
from lerobot.scripts import lerobot_record
from lerobot_env_virtual_so100.bus import VirtualBus
from lerobot_env_virtual_so100.cell import Cell
from scservo_sdk import PortHandler

try:  # after 0.6.1 LeRobot's loop sleeps there
    from lerobot.utils import cycle_timer
except ImportError:
    cycle_timer = None

if sys.platform == "darwin":
    pytest.skip("macOS has no pseudo-terminals at 1 Mbaud, which LeRobot asks for: use Linux", allow_module_level=True)

PATIENCE_MS = 120_000  # what cameras may take; only a dead one takes longer
_POLL_SECONDS = 0.005  # that pass whenever LeRobot looks at the clock while it waits for a reply


def follow_stepped_buses(patch: pytest.MonkeyPatch, *buses: VirtualBus) -> None:
    """Let the Feetech SDK count its time limit on the stepped buses' clocks, and cameras be slow.

    The SDK asks for the time after each look for a reply, and each time the bus answers what it was asked and moves on
    by 5 ms. So LeRobot's 51 ms are 11 looks, whatever else the machine does meanwhile.
    """
    ports = {os.path.realpath(bus.port): bus for bus in buses}

    def milliseconds(port: PortHandler) -> float:
        return 1000 * ports[os.path.realpath(port.port_name)].elapse(_POLL_SECONDS)

    patch.setattr(PortHandler, "getCurrentTime", milliseconds)
    async_read, read_latest = ZMQCamera.async_read, ZMQCamera.read_latest
    patch.setattr(ZMQCamera, "async_read", lambda camera, timeout_ms=0: async_read(camera, PATIENCE_MS))
    patch.setattr(ZMQCamera, "read_latest", lambda camera, max_age_ms=0: read_latest(camera, PATIENCE_MS))


def follow_stepped_cell(patch: pytest.MonkeyPatch, cell: Cell) -> None:
    """Let `lerobot-record` run on a stepped cell's time too: its loop sleeps by letting the cell's time pass."""
    follow_stepped_buses(patch, *cell.buses.values())
    now = [0.0]

    def sleep(seconds: float) -> None:
        cell.elapse(seconds)
        now[0] += seconds

    for module in (lerobot_record, cycle_timer):
        if module is not None:
            patch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0], sleep=sleep))
            patch.setattr(module, "precise_sleep", sleep, raising=False)


def too_busy(load: float, cores: int) -> bool:
    """Whether so many running processes (mean of a minute) leave too little of a machine for real time."""
    return load > 2 * cores


@contextlib.contextmanager
def real_time() -> Iterator[None]:
    """For slow tests that need real time: a failure on a busy machine says that the machine was too busy."""
    try:
        yield
    except Exception as error:
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        if too_busy(load, cores):
            pytest.skip(
                f"machine too busy for real time: a load of {load:.1f} on {cores} cores; it failed with {error!r}"
            )
        raise


def calibration_folder(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let LeRobot look for calibration files here: it reads the environment when it is imported, not when it runs."""
    for module in ("lerobot.robots.robot", "lerobot.teleoperators.teleoperator", "lerobot.utils.constants"):
        patch.setattr(f"{module}.HF_LEROBOT_CALIBRATION", folder)
