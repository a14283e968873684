"""The simulated arm in the units of LeRobot's `so100_follower`: six joint positions, six joint targets, kinematics.

The units are those that `lerobot-record` writes with the follower's default `use_degrees=True`: degrees for the five
arm joints, zero in the middle of the calibrated range, and 0 (closed) to 100 (open) for the gripper. MuJoCo itself
uses radians.
"""

import mujoco
import numpy as np
from lerobot_env_so101.ik_control import compute_ik_levenberg_marquardt, control_point
from lerobot_env_so101.mujoco_env import grasp_point_offset

from .constants import JOINTS

_SITE = "gripperframe"
_APPROACH_AXIS = 0  # of that site: x runs along the fingers
_WRIST, _ROLL = 3, 4  # indices of wrist_flex and wrist_roll
_PAN_AXIS_X = 0.0388  # m, where the pan axis stands
_IK_DAMPING, _IK_ITERATIONS = 1e-4, 15
_IK_TILT_WEIGHT = 0.03  # m of position error that count as much as 1 rad of tilt: position matters more
_IK_SEED = np.radians([0.0, -30.0, 40.0, 70.0, 0.0])  # elbow up, fingers down: solutions stay of this kind


class Arm:
    """Joint positions, targets and kinematics of the arm in one MuJoCo simulation."""

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData):
        self.model, self.data = model, data
        ids = [model.joint(name).id for name in JOINTS]
        self._qpos = model.jnt_qposadr[ids]
        self._dofs = model.jnt_dofadr[ids]
        self._ctrl = np.array([model.actuator(name).id for name in JOINTS])
        self._range = model.actuator_ctrlrange[self._ctrl]
        self._stiffness = model.actuator_gainprm[self._ctrl, 0]
        self._site = model.site(_SITE).id
        self._point = grasp_point_offset(model, self._site)
        self._scratch = mujoco.MjData(model)  # for the kinematics of other postures

    # Units ---------------------------------------------------------------------------------------------------

    def to_units(self, radians: np.ndarray) -> np.ndarray:
        """(6,) joint angles -> (6,) degrees and gripper opening 0..100."""
        units = np.degrees(radians)
        low, high = self._range[-1]
        units[-1] = 100.0 * (radians[-1] - low) / (high - low)
        return units

    def to_radians(self, units: np.ndarray) -> np.ndarray:
        """Inverse of `to_units`."""
        radians = np.radians(np.asarray(units, np.float64))
        low, high = self._range[-1]
        radians[-1] = low + units[-1] / 100.0 * (high - low)
        return radians

    @property
    def low(self) -> np.ndarray:
        """Lower joint limits (6,), degrees and 0."""
        return self.to_units(self._range[:, 0])

    @property
    def high(self) -> np.ndarray:
        """Upper joint limits (6,), degrees and 100."""
        return self.to_units(self._range[:, 1])

    # State and control ----------------------------------------------------------------------------------------

    @property
    def state(self) -> np.ndarray:
        """Measured joint positions (6,), degrees and 0..100."""
        return self.to_units(self.data.qpos[self._qpos])

    @property
    def grasp_point(self) -> np.ndarray:
        """World position (3,) in m of the point between the fingertips."""
        return control_point(self.data, self._site, self._point)

    def place(self, units: np.ndarray) -> None:
        """Put the arm at rest in a posture (6,), its motors holding it against gravity."""
        self.data.qpos[self._qpos] = np.clip(self.to_radians(units), self._range[:, 0], self._range[:, 1])
        self.data.qvel[self._dofs] = 0.0
        self.command(self.hold(self.state))

    def command(self, target: np.ndarray) -> None:
        """Set motor targets (6,), clipped to the joints' ranges as the servos' limits do."""
        self.data.ctrl[self._ctrl] = np.clip(self.to_radians(target), self._range[:, 0], self._range[:, 1])

    def hold(self, units: np.ndarray) -> np.ndarray:
        """Targets (6,) that hold the arm in a posture against gravity: motors sag by torque / stiffness."""
        scratch = self._pose(self.to_radians(units))
        sag = np.degrees(scratch.qfrc_bias[self._dofs] / self._stiffness)
        return np.asarray(units) + np.append(sag[:-1], 0.0)

    # Kinematics -----------------------------------------------------------------------------------------------

    def _pose(self, radians: np.ndarray) -> mujoco.MjData:
        self._scratch.qpos[:] = self.data.qpos
        self._scratch.qvel[:] = 0.0
        self._scratch.qpos[self._qpos] = radians
        mujoco.mj_kinematics(self.model, self._scratch)
        mujoco.mj_comPos(self.model, self._scratch)
        mujoco.mj_rne(self.model, self._scratch, 0, self._scratch.qfrc_bias)
        return self._scratch

    def reach(self, point: np.ndarray, gripper: float, near: np.ndarray | None = None) -> np.ndarray:
        """Posture (6,) with the grasp point at `point` (3,) m, fingers down, jaws along y, `gripper` 0..100.

        `near` (6,) is a posture from which the search starts, which makes it quick along a path. The wrist cannot
        point the fingers straight down above 0.07 m: there the point is kept and the gripper tilts. Jaws are
        aligned with the world's y axis to a few degrees, to straddle axis-aligned cubes.
        """
        pan = -np.arctan2(point[1], point[0] - _PAN_AXIS_X)
        seed = np.append(_IK_SEED, 0.0) if near is None else self.to_radians(near)
        seed[0], seed[_ROLL] = pan, pan + np.pi / 2  # fingers down, the roll axis is parallel to the pan axis
        seed[:_ROLL] = self._solve(point, seed, _ROLL, approach_axis=_APPROACH_AXIS)
        # Position alone, wrist locked: lerobot-env-so101's solver does not compensate for a joint at its limit.
        seed[:_WRIST] = self._solve(point, seed, _WRIST)
        return np.append(np.degrees(seed[:-1]), gripper)

    def _solve(self, point: np.ndarray, seed: np.ndarray, joints: int, **axis: int) -> np.ndarray:
        """Angles of the first `joints` joints that bring the grasp point to `point`, the others as in `seed`."""
        return compute_ik_levenberg_marquardt(
            self.model,
            self._pose(seed),
            self._site,
            self._dofs[:joints],  # the arm's joints come first in the model: dof and qpos addresses agree
            np.asarray(point, np.float64),
            seed[:joints],
            damping=_IK_DAMPING,
            max_iterations=_IK_ITERATIONS,
            point_offset=self._point,
            orientation_weight=_IK_TILT_WEIGHT,
            **axis,
        )
