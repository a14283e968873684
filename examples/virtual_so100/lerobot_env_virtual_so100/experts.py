"""Scripted experts, whose motions are recorded as demonstrations.

A policy without memory has to be able to imitate them. So an action depends only on the joint positions and the scene
(in pick-and-place also on the phase, but each change of phase is visible in the joints or in the cube). Steps are
bounded: far from the goal the action gives the direction, near it the goal itself. Targets compensate for the sag of
the motors under gravity, so the arm reaches the goal and comes to rest there.
"""

import numpy as np
from lerobot_env_so101.scripted.pick_place import Phase, PickPlaceController, phase_target

from .scene import CUBE_HALF
from .tasks import HOVER_HEIGHT

_DESCEND_INNER, _DESCEND_OUTER = 0.012, 0.06  # m of horizontal distance between which the arm descends
_REACH_SPEED = 180.0  # degrees/s
_TRAVEL_RANGE = 0.03  # m of horizontal distance
_ARRIVED = 0.006  # m between the grasp point and where it should be
_HOLD_SECONDS = 0.2
_OPEN_FAR, _OPEN_NEAR, _OPEN_RANGE = 24.0, 55.0, 0.12  # gripper positions; m of horizontal distance in which it opens
_OPEN_ENOUGH = 20.0  # gripper position at which the arm begins to move
_OPENING_SPEED = 30.0  # gripper units / s until then


def _step_towards(arm, goal: np.ndarray, max_step: float) -> np.ndarray:
    """Joint targets (6,) one step nearer to a posture: no joint moves more than `max_step` degrees."""
    state = arm.state
    gap = goal - state
    step = gap * min(1.0, max_step / max(np.abs(gap[:-1]).max(), 1e-6))
    posture = state + step
    posture[-1] = goal[-1]
    return arm.hold(posture)


class ReachExpert:
    """Moves to a posture above the named cube: comes down from above, and opens the jaws on the way.

    Before it moves, it rests and opens its jaws a little. In these frames only images and instruction tell where to go;
    once the arm moves, its posture soon tells it too. With few such frames, a small policy never learns to use the
    images. The jaws show how long the rest will last. If nothing showed it, a policy without memory could only guess
    when the arm starts, and each step of a chunk would guess another moment.
    """

    clearance = 0.014  # m above the cube's top: the fingertips, 7 mm below the grasp point, touch nothing
    travel = 0.055  # m above the cube's top before the arm is above it: higher than all cubes

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
        self._point = top + np.array([0.0, 0.0, self.clearance])
        self._low = self._sim.arm.reach(self._point, _OPEN_NEAR)
        self._high = self._sim.arm.reach(top + np.array([0.0, 0.0, self.travel]), _OPEN_NEAR)

    @property
    def settled(self) -> bool:
        """Whether the arm has stayed at the goal for a moment. A longer rest would not help: the way there shows what
        an instruction means, and chunks that reach beyond the episode repeat its last action anyway."""
        return self._held >= self._hold_steps

    @property
    def travelling(self) -> bool:
        """Whether the arm may be disturbed: not at rest, and not near the end, which has to be shown undisturbed."""
        return not self.resting and self._horizontal_distance() > _TRAVEL_RANGE

    @property
    def resting(self) -> bool:
        """Whether the arm still rests and opens its jaws."""
        return bool(self._sim.arm.state[-1] < _OPEN_ENOUGH)

    def _horizontal_distance(self) -> float:
        """Remaining horizontal distance in m."""
        return float(np.linalg.norm((self._point - self._sim.arm.grasp_point)[:2]))

    def act(self) -> np.ndarray:
        """Joint targets (6,) for the current state."""
        if self.resting:
            posture = self._sim.arm.state
            posture[-1] = min(posture[-1] + self._opening_step, _OPEN_FAR)
            return self._sim.arm.hold(posture)
        distance = self._horizontal_distance()
        self._held += bool(np.linalg.norm(self._point - self._sim.arm.grasp_point) < _ARRIVED)
        height = np.clip((distance - _DESCEND_INNER) / (_DESCEND_OUTER - _DESCEND_INNER), 0.0, 1.0)
        goal = self._low + height * (self._high - self._low)
        goal[-1] = _OPEN_NEAR + (_OPEN_FAR - _OPEN_NEAR) * min(1.0, distance / _OPEN_RANGE)
        return _step_towards(self._sim.arm, goal, self._max_step)


class HoverExpert(ReachExpert):
    """Moves as `ReachExpert` does, but stays above the named cube."""

    clearance = travel = HOVER_HEIGHT


# Offset in m of the cube between the open jaws, away from the fixed jaw, which would otherwise come down on the cube's
# edge. The closing jaw then pushes the cube against the fixed one.
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

    Its controller decides the phase and where the grasp point should go. Its Cartesian increments are not used, since
    they add up to a target that no camera shows. Between descending and closing, the open jaws wait around the cube,
    so that closing starts from an image of its own.
    """

    resting = False

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
        """Whether the arm may be disturbed: only on the way to the cube or the goal, never near a contact."""
        far = np.abs(self._posture - self._sim.arm.state)[:-1].max() > _TRAVEL_DEGREES
        return bool(far) and self._controller.phase in (Phase.HOVER, Phase.TRAVERSE)

    def act(self) -> np.ndarray:
        """Joint targets (6,) for the current state; goes to the next phase when the goal of this one is reached."""
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
        return _step_towards(sim.arm, self._posture, speed / self._fps)


def make_expert(task: str, sim, fps: int) -> ReachExpert | PickPlaceExpert:
    """The expert of a task, driving `sim` at `fps` control steps a second."""
    return {"reach": ReachExpert, "hover": HoverExpert, "pick_place": PickPlaceExpert}[task](sim, fps)
