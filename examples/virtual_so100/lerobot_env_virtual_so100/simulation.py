"""Physics simulation of one cell with MuJoCo: its state, its arm, its cubes, and its cameras' images."""

import mujoco
import numpy as np

from .arm import Arm
from .scene import CUBE_HALF, PHYSICS_DT, SceneSpec, build_model, shared_rig
from .tasks import Layout

_AWAY = 3.0  # m; cubes that are not in a scene are put here, where no camera sees them


class Simulation:
    """Physics of one cell. Reset with a layout, then advance with joint targets."""

    def __init__(self, spec: SceneSpec, fps: int):
        """`fps`: control steps a second. Physics runs at 500 Hz; a control step is rounded to whole physics steps."""
        self.spec = spec
        self._substeps = round(1.0 / (fps * PHYSICS_DT))
        if fps < 1 or self._substeps < 1:
            raise ValueError(f"fps must be between 1 and {round(1 / PHYSICS_DT)}, not {fps}")
        self.model = build_model(spec)
        self.data = mujoco.MjData(self.model)
        self.arm = Arm(self.model, self.data)

    def load(self, layout: Layout) -> None:
        """Place cubes and goal as the layout says, and the arm at rest in its starting posture."""
        mujoco.mj_resetData(self.model, self.data)
        self.arrange(layout)
        self.arm.place(layout.start(self.arm))
        mujoco.mj_forward(self.model, self.data)

    def arrange(self, layout: Layout) -> None:
        """Place only cubes and goal, at rest; the arm stays as it is."""
        for i, colour in enumerate(self.spec.cubes):
            x, y, yaw = layout.cubes.get(colour, (_AWAY + i, _AWAY, 0.0))
            quat = (np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2))
            self.data.joint(colour).qpos[:] = (x, y, CUBE_HALF, *quat)
            self.data.joint(colour).qvel[:] = 0.0
        if layout.goal is not None:
            self.data.mocap_pos[0, :2] = layout.goal
        mujoco.mj_forward(self.model, self.data)

    def advance(self, target: np.ndarray) -> None:
        """Move towards joint targets (6,), degrees and 0..100, for one control step."""
        self.arm.command(target)
        mujoco.mj_step(self.model, self.data, nstep=self._substeps)

    def cube(self, colour: str) -> np.ndarray:
        """Centre of a cube (3,) in m."""
        return self.data.body(colour).xpos.copy()

    def cube_speed(self, colour: str) -> float:
        """Linear speed of a cube in m/s."""
        return float(np.linalg.norm(self.data.joint(colour).qvel[:3]))

    def images(self, height: int, width: int) -> list[np.ndarray]:
        """One uint8 image (H, W, 3) for each of CAMERAS."""
        return shared_rig(self.spec, height, width).render(self.data)
