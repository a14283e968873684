"""Network cameras of the cell, in the format that LeRobot's ZMQ camera reads.

Every message is JSON with all cameras: `{"timestamps": {camera: s}, "images": {camera: base64 of a JPEG}}`. LeRobot
decodes without swapping channels, so RGB is encoded as it is. JPEG usually halves the resolution of the colour
channels; here it does not, because small cubes in pictures of 64 pixels would lose their colours.
"""

import base64
import contextlib
import json
import signal
import time
from dataclasses import dataclass

import cv2
import numpy as np
import zmq

from .constants import CAMERAS
from .scene import SceneSpec

HOST = "127.0.0.1"
_JPEG = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
_QUEUE = 2  # messages a slow reader may lag behind


class Publisher:
    """Publishes pictures on `port`, or on a free one."""

    def __init__(self, port: int | None = None):
        self._socket = zmq.Context.instance().socket(zmq.PUB)
        self._socket.setsockopt(zmq.SNDHWM, _QUEUE)
        self._socket.setsockopt(zmq.LINGER, 0)
        if port is None:
            port = self._socket.bind_to_random_port(f"tcp://{HOST}")
        else:
            self._socket.bind(f"tcp://{HOST}:{port}")
        self.port = port

    def send(self, pictures: dict[str, np.ndarray]) -> None:
        """Publish uint8 RGB pictures (H, W, 3) by camera."""
        now = time.time()
        encoded = {name: cv2.imencode(".jpg", picture, _JPEG)[1] for name, picture in pictures.items()}
        message = {
            "timestamps": dict.fromkeys(pictures, now),
            "images": {name: base64.b64encode(jpeg).decode() for name, jpeg in encoded.items()},
        }
        self._socket.send_string(json.dumps(message))

    def close(self) -> None:
        """Stop publishing."""
        self._socket.close()


def lerobot_cameras(port: int, size: int, fps: int) -> dict[str, dict]:
    """The value of `--robot.cameras` for these cameras."""
    common = {"type": "zmq", "server_address": HOST, "port": port, "width": size, "height": size, "fps": fps}
    return {name: {**common, "camera_name": name} for name in CAMERAS}


@dataclass
class View:
    """Shared memory with what the cameras see: the physics writes it, the cameras read it.

    A RawArray of doubles: a counter that is odd while it is written to, the number of the scene, the number of the
    scene that was last published, then `qpos` and the goal's place.
    """

    memory: object

    @classmethod
    def allocate(cls, context) -> "View":
        """Shared memory from a multiprocessing context."""
        return cls(context.RawArray("d", 3 + 3 + 64))

    @property
    def _array(self) -> np.ndarray:
        return np.frombuffer(self.memory)

    @property
    def scene(self) -> int:
        """Number of the current scene."""
        return int(self._array[1])

    @property
    def published(self) -> int:
        """Number of the newest scene of which a picture was published."""
        return int(self._array[2])

    @published.setter
    def published(self, scene: int) -> None:
        self._array[2] = scene

    def write(self, scene: int, data) -> None:
        """Show the state of an MjData."""
        array = self._array
        array[0] += 1
        array[1] = scene
        array[3:6] = data.mocap_pos[0] if len(data.mocap_pos) else 0.0
        array[6 : 6 + len(data.qpos)] = data.qpos
        array[0] += 1

    def read(self, data) -> int:
        """Copy what is shown into an MjData; returns the number of its scene."""
        array = self._array
        while True:
            before = array[0]
            whole = array.copy()
            if before % 2 == 0 and before == array[0]:
                break
            time.sleep(0.0002)
        data.qpos[:] = whole[6 : 6 + len(data.qpos)]
        if len(data.mocap_pos):
            data.mocap_pos[0] = whole[3:6]
        return int(whole[1])


def serve(pipe, view: View, spec: SceneSpec, size: int, fps: int) -> None:
    """Main function of the cameras' process: publish `fps` pictures a second until the pipe closes."""
    import mujoco

    from .scene import build_model, shared_rig

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    model = build_model(spec)
    data, rig, publisher = mujoco.MjData(model), shared_rig(spec, size, size), Publisher()
    pipe.send(publisher.port)
    due = time.monotonic()
    with contextlib.suppress(EOFError, OSError):
        while not pipe.poll(max(0.0, due - time.monotonic())):
            scene = view.read(data)
            mujoco.mj_kinematics(model, data)
            mujoco.mj_camlight(model, data)
            publisher.send(dict(zip(CAMERAS, rig.render(data), strict=True)))
            view.published = scene
            due = max(due + 1 / fps, time.monotonic())  # pictures that could not be made in time are left out
    publisher.close()
