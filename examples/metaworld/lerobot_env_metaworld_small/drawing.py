"""A renderer that a CPU can afford: small, smooth pictures of a part of what the camera sees, without shadows."""

import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

from .configuration_metaworld_small import SMOOTH

HIDDEN = 5  # a group of shapes that MuJoCo does not draw by default


class PartRenderer(MujocoRenderer):
    """Draws a square part of the camera's square picture, without shadows and reflections.

    Without a GPU most of the time goes into triangles. Those of shapes that cannot be seen in this part (most of the
    arm, if it is the middle half) are left out: at 128 pixels a picture then takes 5 ms in place of 8.5. Edges are
    smoothed by drawing twice as large, which takes less time than MuJoCo's multisampling (8 ms).

    Args:
        env: MetaWorld's environment, before its first picture.
        whole: side of the camera's picture, in pixels.
        rows, columns: the part of it, counted from its bottom and its left.
    """

    def __init__(self, env: MujocoEnv, whole: int, rows: range, columns: range) -> None:
        model, camera = env.model, env.mujoco_renderer.camera_id
        model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
        model.mat_reflectance[:] = 0  # no reflection can be seen from this camera, but drawing them takes time
        width, height = SMOOTH * len(columns), SMOOTH * len(rows)
        model.vis.global_.offwidth, model.vis.global_.offheight = width, height  # a larger buffer takes more time
        super().__init__(model, env.data, width=width, height=height, camera_id=camera)
        self._viewport = mujoco.MjrRect(*(SMOOTH * x for x in (-columns.start, -rows.start, whole, whole)))
        self._groups = model.geom_group.copy()
        edges = np.array([[each.start, each.stop] for each in (columns, rows)])
        self._edges = (2 * edges / whole - 1) * np.tan(np.radians(model.cam_fovy[self.camera_id]) / 2)

    def render(self, render_mode: str | None) -> np.ndarray:
        """The part of the picture, uint8 (rows, columns, 3); the only mode is "rgb_array"."""
        viewer = self._get_viewer(render_mode)
        viewer.cam.type, viewer.cam.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, self.camera_id
        self.model.geom_group[:] = np.where(self._may_be_seen(), self._groups, HIDDEN)
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self.model, self.data, viewer.vopt, viewer.pert, viewer.cam, everything, viewer.scn)
        self.model.geom_group[:] = self._groups  # for other renderers of this model
        mujoco.mjr_render(self._viewport, viewer.scn, viewer.con)
        drawn = np.empty((self.height, self.width, 3), np.uint8)
        mujoco.mjr_readPixels(drawn, None, viewer.viewport, viewer.con)
        total = sum(drawn[i::SMOOTH, j::SMOOTH].astype(np.uint16) for i in range(SMOOTH) for j in range(SMOOTH))
        return ((total + SMOOTH**2 // 2) // SMOOTH**2).astype(np.uint8)[::-1]  # MuJoCo begins at the bottom

    def _may_be_seen(self) -> np.ndarray:
        """True for each shape whose bounding sphere reaches into the part, and for shapes without one (planes)."""
        radius = self.model.geom_rbound
        pose = self.data.cam_xmat[self.camera_id].reshape(3, 3)
        right, up, back = ((self.data.geom_xpos - self.data.cam_xpos[self.camera_id]) @ pose).T
        seen = back < radius
        for place, (low, high) in zip((right, up), self._edges, strict=True):
            seen &= place + low * back >= -radius * np.hypot(1, low)
            seen &= place + high * back <= radius * np.hypot(1, high)
        return seen | (radius == 0)
