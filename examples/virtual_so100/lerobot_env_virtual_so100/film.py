"""Video of the arm in a running cell, and picture of a cell.

python -m lerobot_env_virtual_so100.film --output=docs/cell.png
"""

import threading
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import draccus
import numpy as np

from .camera import View
from .scene import SceneSpec
from .tasks import make_task


@contextmanager
def film(view: View, spec: SceneSpec, path: Path, fps: int = 10, size: int = 224):
    """Film both cameras side by side, in real time, until the block ends, and write an MP4 file."""
    over, frames = threading.Event(), []

    def shoot() -> None:
        import mujoco

        from .scene import CameraRig, build_model

        model = build_model(spec)
        data = mujoco.MjData(model)
        with closing(CameraRig(model, size, size)) as rig:  # GL belongs to the thread, which has to free it
            due = time.monotonic()
            while not over.wait(max(0.0, due - time.monotonic())):
                view.read(data)
                mujoco.mj_kinematics(model, data)
                mujoco.mj_camlight(model, data)
                frames.append(np.hstack(rig.render(data)))
                due += 1 / fps

    thread = threading.Thread(target=shoot)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        if frames:
            _write(path, frames, fps)


def _write(path: Path, frames: list[np.ndarray], fps: int) -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as video:
        stream = video.add_stream("h264", rate=fps, options={"crf": "18"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            video.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        video.mux(stream.encode())


@dataclass
class PictureConfig:
    """A picture of the cell: both cameras side by side, the arm at the cube."""

    # PNG file.
    output: Path
    # What stands on the table: reach or pick_place.
    task: str = "reach"
    # Scene of the train stream.
    seed: int = 7
    # Height of the picture in pixels.
    size: int = 300


def picture(config: PictureConfig) -> None:
    """Let the expert go to the cube and take the picture there."""
    import cv2

    from .experts import make_expert
    from .simulation import Simulation

    task = make_task(config.task)
    simulation = Simulation(task.spec, 10)
    layout = task.sample("train", config.seed)
    simulation.load(layout)
    expert = make_expert(config.task, simulation, 10)
    expert.reset(layout.target)
    while not expert.settled:
        simulation.advance(expert.act())
    both = np.hstack(simulation.images(config.size, config.size * 4 // 3))
    config.output.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(config.output), cv2.cvtColor(both, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 9])


@draccus.wrap()
def main(config: PictureConfig) -> None:
    """Command line."""
    picture(config)


if __name__ == "__main__":
    main()
