"""Scripted experts: what the demonstrations show.

They are made to be imitated by a policy without memory. An action is a function of the joint positions and the
scene (of the phase too, in pick-and-place, where every change of phase is visible in the joints or in the cube);
steps are bounded, so far from the goal the action says the direction and near it the goal itself; targets
include what the motors sag under gravity, so the goal is reached and held with no residual motion.
"""

import numpy as np
from lerobot_env_so101.scripted.pick_place import Phase, PickPlaceController, phase_target

from .scene import CUBE_HALF

_REACH_CLEARANCE = 0.014  # m above the cube's top: the fingertips, 7 mm below the grasp point, touch nothing
_REACH_HOVER = 0.055  # m above the cube's top while still aside of it: clear of all cubes
_DESCEND_INNER, _DESCEND_OUTER = 0.012, 0.06  # m aside of the cube between which height is lost
_REACH_SPEED = 180.0  # degrees/s
_TRAVEL_RANGE = 0.03  # m aside of the cube
_ARRIVED = 0.006  # m between the grasp point and where it should be
_HOLD_SECONDS = 0.2
_OPEN_FAR, _OPEN_NEAR, _OPEN_RANGE = 24.0, 55.0, 0.12  # gripper, and m aside over which it opens
_OPEN_ENOUGH, _OPENING_SPEED = 20.0, 30.0  # gripper from which the arm moves, and gripper / s until then


def _towards(arm, goal: np.ndarray, max_step: float) -> np.ndarray:
    """Joint targets (6,) one step nearer to a posture: no joint moves more than `max_step` degrees."""
    state = arm.state
    gap = goal - state
    step = gap * min(1.0, max_step / max(np.abs(gap[:-1]).max(), 1e-6))
    posture = state + step
    posture[-1] = goal[-1]
    return arm.hold(posture)


class ReachExpert:
    """To a posture above the named cube, coming down on it from above and opening the jaws on the way.

    Before it moves, it rests and opens its jaws a little. What is seen then, and nothing but that, tells where the arm
    will go: its posture does not, and does soon when it moves. Where such frames are few, a small policy never learns
    to look. The jaws show how long it will still rest: a rest that nothing shows ends at a moment that a policy without
    memory can only guess, and the steps of its chunks then guess different moments.
    """

    def __init__(self, sim, fps: int):
        self._sim = sim
        self._max_step, self._opening_step = _REACH_SPEED / fps, _OPENING_SPEED / fps
        self._hold_steps = round(_HOLD_SECONDS * fps)
        self._held = 0
        self._point = np.zeros(3)
        self._low = self._high = np.zeros(6)

    def reset(self, colour: str) -> None:
        """Begin an episode that names this cube."""
        self._held = 0
        top = self._sim.cube(colour) + np.array([0.0, 0.0, CUBE_HALF])
        self._point = top + np.array([0.0, 0.0, _REACH_CLEARANCE])
        self._low = self._sim.arm.reach(self._point, _OPEN_NEAR)
        self._high = self._sim.arm.reach(top + np.array([0.0, 0.0, _REACH_HOVER]), _OPEN_NEAR)

    @property
    def settled(self) -> bool:
        """Whether the end was shown for a moment. No longer: what tells the instructions apart is the way there, and
        chunks that reach beyond the episode repeat its last action anyway."""
        return self._held >= self._hold_steps

    @property
    def travelling(self) -> bool:
        """Whether there is room for a disturbance: not at rest, nor near the end, which has to be shown clean."""
        return not self._resting and self._aside() > _TRAVEL_RANGE

    @property
    def _resting(self) -> bool:
        return bool(self._sim.arm.state[-1] < _OPEN_ENOUGH)

    def _aside(self) -> float:
        """Horizontal distance to go in m."""
        return float(np.linalg.norm((self._point - self._sim.arm.grasp_point)[:2]))

    def act(self) -> np.ndarray:
        """Joint targets (6,) for the present state."""
        if self._resting:
            posture = self._sim.arm.state
            posture[-1] = min(posture[-1] + self._opening_step, _OPEN_FAR)
            return self._sim.arm.hold(posture)
        aside = self._aside()
        self._held += bool(np.linalg.norm(self._point - self._sim.arm.grasp_point) < _ARRIVED)
        height = np.clip((aside - _DESCEND_INNER) / (_DESCEND_OUTER - _DESCEND_INNER), 0.0, 1.0)
        goal = self._low + height * (self._high - self._low)
        goal[-1] = _OPEN_NEAR + (_OPEN_FAR - _OPEN_NEAR) * min(1.0, aside / _OPEN_RANGE)
        return _towards(self._sim.arm, goal, self._max_step)


# The cube stands this far from the fixed jaw when it is straddled: the closing jaw pushes it home. Without
# it the fixed jaw would come down on the cube's edge.
_STRADDLE = np.array([0.0, -0.007, 0.0])
_GRIPPER_OPEN, _GRIPPER_CLOSED = 75.0, 0.0
_FAST, _CAREFUL = 90.0, 35.0  # degrees/s
_TRAVEL_DEGREES = 10.0
_DWELL_SECONDS = 0.4
_SETTLE_SECONDS = 0.6
_CAREFUL_PHASES = (Phase.DESCEND, Phase.LIFT, Phase.LOWER)
_CLOSED_PHASES = (Phase.CLOSE, Phase.LIFT, Phase.TRAVERSE, Phase.LOWER)
_STRADDLED_PHASES = (Phase.HOVER, Phase.DESCEND)


class PickPlaceExpert:
    """lerobot-env-so101's phases (hover, descend, close, lift, traverse, lower, open, retreat) in joint targets.

    Its controller says which phase it is and where the grasp point should go; its Cartesian increments are not
    used, since they accumulate a hidden target that no camera shows. Between descending and closing the open
    jaws dwell around the cube, so that closing starts from a picture of its own.
    """

    def __init__(self, sim, fps: int):
        self._sim, self._fps = sim, fps
        self._controller = PickPlaceController()
        self._dwell = 0
        self._done_steps = 0
        self._posture = np.zeros(6)

    def reset(self, colour: str) -> None:
        """Begin an episode that names this cube."""
        self._colour = colour
        self._controller.reset()
        self._dwell = round(_DWELL_SECONDS * self._fps)
        self._done_steps = 0
        self._posture = self._sim.arm.state

    @property
    def settled(self) -> bool:
        """Whether the retreat is over and held for a moment."""
        return self._done_steps >= round(_SETTLE_SECONDS * self._fps)

    @property
    def travelling(self) -> bool:
        """Whether there is room for a disturbance: only on the way to the cube, nowhere near a contact."""
        far = np.abs(self._posture - self._sim.arm.state)[:-1].max() > _TRAVEL_DEGREES
        return bool(far) and self._controller.phase in (Phase.HOVER, Phase.TRAVERSE)

    def act(self) -> np.ndarray:
        """Joint targets (6,) for the present state; advances the phase when its goal is met."""
        sim = self._sim
        grasp, cube = sim.arm.grasp_point, sim.cube(self._colour)
        goal = np.array([*sim.data.mocap_pos[0, :2], CUBE_HALF])
        phase = self._controller.phase
        dwelling = phase is Phase.CLOSE and self._dwell > 0
        if dwelling:
            self._dwell -= 1
        else:
            aim = cube + _STRADDLE if phase in _STRADDLED_PHASES else cube
            self._controller.act(grasp, aim, goal)
            phase = self._controller.phase
            dwelling = phase is Phase.CLOSE and self._dwell > 0
        self._done_steps += phase is Phase.DONE
        closed = phase in _CLOSED_PHASES and not dwelling
        gripper = _GRIPPER_CLOSED if closed else _GRIPPER_OPEN
        if phase not in (Phase.CLOSE, Phase.OPEN, Phase.DONE):
            aim = cube + _STRADDLE if phase in _STRADDLED_PHASES else cube
            point = phase_target(phase, grasp, aim, goal, CUBE_HALF)
            self._posture = sim.arm.reach(point, gripper, near=sim.arm.state)
        self._posture[-1] = gripper
        speed = _CAREFUL if phase in _CAREFUL_PHASES else _FAST
        return _towards(sim.arm, self._posture, speed / self._fps)


def make_expert(task: str, sim, fps: int) -> ReachExpert | PickPlaceExpert:
    """The expert of a task, driving `sim` at `fps` control steps a second."""
    return {"reach": ReachExpert, "pick_place": PickPlaceExpert}[task](sim, fps)
