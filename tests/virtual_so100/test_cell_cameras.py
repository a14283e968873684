"""The virtual cell's cameras (examples/virtual_so100), read by LeRobot's ZMQ camera."""

import multiprocessing
import threading

import numpy as np
import pytest

pytest.importorskip("lerobot_env_virtual_so100", reason="pip install -e examples/virtual_so100 (make setup does)")
pytest.importorskip("zmq", reason="pip install 'lerobot[pyzmq-dep]'")

import needs_rendering  # noqa: F401
from lerobot.cameras.zmq import ZMQCamera, ZMQCameraConfig
from lerobot_env_virtual_so100 import camera
from lerobot_env_virtual_so100.constants import CAMERAS
from lerobot_env_virtual_so100.simulation import Simulation
from lerobot_env_virtual_so100.tasks import make_task


def lerobot_camera(port: int, name: str) -> ZMQCamera:
    """LeRobot's camera, as `--robot.cameras` would make it; its warm-up wants pictures all the time."""
    options = camera.lerobot_cameras(port, 64, 30)[name]
    assert options.pop("type") == "zmq"
    return ZMQCamera(ZMQCameraConfig(**options, warmup_s=0))


def read(pictures: dict, name: str) -> np.ndarray:
    """What LeRobot's camera makes of published pictures.

    They are published until it has disconnected: its disconnecting closes the socket under a waiting reader, which
    aborts the process, if no picture comes for 2 s.
    """
    publisher, over = camera.Publisher(), threading.Event()

    def publish():
        while not over.wait(0.02):
            publisher.send(pictures)

    thread = threading.Thread(target=publish)
    reader = lerobot_camera(publisher.port, name)
    thread.start()
    try:
        reader.connect(warmup=False)
        reader.async_read(timeout_ms=20_000)
        return reader.read_latest(max_age_ms=60_000)
    finally:
        reader.disconnect()
        over.set()
        thread.join()
        publisher.close()


def test_colours_and_names():
    """Red and blue exchanged, the other camera's picture, or colours that JPEG has washed out of small cubes."""
    pictures = {name: np.full((64, 64, 3), 40, np.uint8) for name in CAMERAS}
    pictures["front"][10:15, 20:25] = (220, 30, 20)
    pictures["left"][40:45, 30:35] = (20, 40, 230)
    for name in CAMERAS:
        seen = read(pictures, name).astype(int)
        assert seen.shape == (64, 64, 3)
        assert np.abs(seen - pictures[name]).mean() < 2
        where = np.s_[11:14, 21:24] if name == "front" else np.s_[41:44, 31:34]
        assert np.abs(seen[where] - pictures[name][where]).max() < 25


def test_pictures_are_those_of_the_simulator():
    """A policy trained on the fast path's pictures that sees others through the drivers."""
    task = make_task("reach")
    simulation = Simulation(task.spec, 10)
    simulation.load(task.sample("test", 3))
    rendered = dict(zip(CAMERAS, simulation.images(64, 64), strict=True))
    for name in CAMERAS:
        difference = np.abs(read(rendered, name).astype(int) - rendered[name])
        assert difference.mean() < 2 and difference.max() < 40


def test_view_is_never_half_written():
    """A picture of half a new and half an old scene: the reader must see one state or the other."""
    task = make_task("reach")
    written, seen = Simulation(task.spec, 10), Simulation(task.spec, 10)
    view = camera.View.allocate(multiprocessing.get_context("forkserver"))
    view.write(0, written.data)
    stop = threading.Event()

    def write():
        scene = 0
        while not stop.is_set():
            scene += 1
            written.data.qpos[:] = scene
            view.write(scene, written.data)

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(300):
        scene = view.read(seen.data)
        assert scene == 0 or set(seen.data.qpos) == {scene}
    stop.set()
    writer.join()
