"""Tasks for the arm: scenes, instructions, and criteria of success.

A scene depends on (split, seed) alone. The splits are separate streams of one seed sequence, so no scene of an
evaluation can be in the data, whatever seeds are used for the two.
"""

from dataclasses import dataclass

import numpy as np
from lerobot_env_so101.pick_place_env import PLACE_SUCCESS_DISTANCE

from .arm import Arm
from .constants import SPLITS
from .scene import CUBE_HALF, SceneSpec

REACH_SUCCESS_DISTANCE = 0.03  # m, grasp point to the centre of the cube's top, or to the point above it
HOVER_HEIGHT = 0.08  # m above the cube's top: an arm that reaches the cube is 5 cm outside the success distance
# The criterion of lerobot-env-so101's pick-and-place environment. Its numbers are private, so they are repeated here.
_MIN_CARRY_RISE = 0.03  # m above the table, which the cube has to reach: to push it does not count
_MAX_REST_SPEED = 0.01  # m/s
_MIN_OPENING = 50.0  # of 100: the jaws have let go

_HOME_POINT = (0.19, 0.0, 0.13)  # m, grasp point at the start
_HOME_NOISE = np.array([8.0, 6.0, 6.0, 6.0, 8.0, 8.0])  # half widths, degrees and gripper units
_HOME_GRIPPER = 15.0
# Starts anywhere above the table: a policy gets there when it is on its way, or lost.
_WIDE_LOW, _WIDE_HIGH = (0.14, -0.15, 0.075), (0.29, 0.15, 0.18)


@dataclass(frozen=True)
class Layout:
    """One scene: poses (x, y, yaw) of its cubes, goal (x, y), start of the arm, the cube that the instruction names
    (`target`), and another one (`other`)."""

    split: str
    seed: int
    cubes: dict[str, tuple[float, float, float]]
    target: str
    other: str
    phrase: int
    goal: tuple[float, float] | None = None
    start_point: tuple[float, float, float] = _HOME_POINT
    start_noise: tuple[float, ...] = (0.0,) * 6
    start_gripper: float = _HOME_GRIPPER

    def start(self, arm: Arm) -> np.ndarray:
        """Starting posture (6,), degrees and 0..100, within the joints' limits."""
        posture = arm.reach(np.array(self.start_point), self.start_gripper) + self.start_noise
        return np.clip(posture, arm.low, arm.high)


def scene_rng(split: str, seed: int) -> np.random.Generator:
    """The random generator of a scene. Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    return np.random.default_rng([SPLITS.index(split), seed])


def _start(rng: np.random.Generator, wide: bool) -> dict:
    """Starting posture around home, or anywhere above the table."""
    noise = tuple(rng.uniform(-_HOME_NOISE, _HOME_NOISE).tolist())
    if not wide:
        return {"start_noise": noise}
    point = tuple(rng.uniform(_WIDE_LOW, _WIDE_HIGH).tolist())
    return {"start_point": point, "start_noise": noise, "start_gripper": float(rng.uniform(0.0, 60.0))}


def _points_apart(rng: np.random.Generator, low, high, count: int, distance: float) -> list[np.ndarray]:
    """`count` points in a box, each at least `distance` from the others."""
    while True:  # a few rounds: the box holds far more than `count` such points
        points = rng.uniform(low, high, size=(count, 2))
        gaps = np.linalg.norm(points[:, None] - points[None], axis=-1) + np.eye(count)
        if gaps.min() >= distance:
            return list(points)


class Reach:
    """Move the grasp point to the cube that the instruction names; judged at the end of the episode."""

    name = "reach"
    spec = SceneSpec(cubes=("red", "green", "blue"))
    phrases = ("reach the {} cube", "go to the {} cube")
    ends_on_success = False
    height = 0.0  # m above the centre of the cube's top
    _LOW, _HIGH = (0.15, -0.13), (0.28, 0.13)
    _SPACING = 0.085

    def sample(self, split: str, seed: int, wide_start: bool = False) -> Layout:
        """Draw the scene of (split, seed): all three cubes, as evaluation has them."""
        rng = scene_rng(split, seed)
        points = _points_apart(rng, self._LOW, self._HIGH, len(self.spec.cubes), self._SPACING)
        yaws = rng.uniform(-np.pi / 4, np.pi / 4, size=len(points))
        cubes = {
            colour: (float(p[0]), float(p[1]), float(yaw))
            for colour, p, yaw in zip(self.spec.cubes, points, yaws, strict=True)
        }
        target, other = rng.choice(self.spec.cubes, size=2, replace=False)
        phrase = int(rng.integers(len(self.phrases)))
        start = _start(rng, wide_start) | {"start_gripper": 0.0}  # nearly closed: the expert begins by opening it
        return Layout(split, seed, cubes, str(target), str(other), phrase, **start)

    def instruction(self, colour: str, phrase: int) -> str:
        """The words, e.g. "reach the red cube"."""
        return self.phrases[phrase].format(colour)

    def begin(self, sim) -> None:
        """Nothing to remember between steps."""

    def observe(self, sim) -> None:
        """Nothing to remember between steps."""

    def distance(self, sim, colour: str) -> float:
        """Metres from the grasp point to the centre of a cube's top, or to the point `height` above it."""
        return float(np.linalg.norm(sim.arm.grasp_point - sim.cube(colour) - (0.0, 0.0, CUBE_HALF + self.height)))

    def success(self, sim, colour: str) -> bool:
        """Whether the grasp point is at that cube now."""
        return self.distance(sim, colour) < REACH_SUCCESS_DISTANCE


class Hover(Reach):
    """Stop above the cube that the instruction names: another task for a policy that has learned `Reach`.

    The scenes are those of `Reach`. The colour is at the same place of the sentence.
    """

    name = "hover"
    phrases = ("above the {} cube",)
    height = HOVER_HEIGHT


class PickPlace:
    """Carry the cube to the white disc and let go; the criterion of lerobot-env-so101's environment."""

    name = "pick_place"
    spec = SceneSpec(cubes=("red",), goal=True)
    phrases = ("put the {} cube on the white disc", "place the {} cube on the disc")
    ends_on_success = True
    _LOW, _HIGH = (0.15, -0.1), (0.28, 0.1)
    _SPACING = 0.08  # a goal nearer than that would overlap the cube before any motion

    def __init__(self):
        self._carried = False

    def sample(self, split: str, seed: int, wide_start: bool = False) -> Layout:
        """Draw the scene of (split, seed)."""
        rng = scene_rng(split, seed)
        cube, goal = _points_apart(rng, self._LOW, self._HIGH, 2, self._SPACING)
        phrase = int(rng.integers(len(self.phrases)))
        cubes = {"red": (float(cube[0]), float(cube[1]), 0.0)}
        goal = (float(goal[0]), float(goal[1]))
        return Layout(split, seed, cubes, "red", "red", phrase, goal, **_start(rng, wide_start))

    def instruction(self, colour: str, phrase: int) -> str:
        """The words, e.g. "put the red cube on the white disc"."""
        return self.phrases[phrase].format(colour)

    def begin(self, sim) -> None:
        """Forget the previous episode."""
        self._carried = False

    def observe(self, sim) -> None:
        """Remember that the cube was off the table; call after every step."""
        self._carried |= bool(sim.cube(self.spec.cubes[0])[2] - CUBE_HALF > _MIN_CARRY_RISE)

    def distance(self, sim, colour: str) -> float:
        """Metres between cube and goal, seen from above."""
        return float(np.linalg.norm((sim.cube(colour) - sim.data.mocap_pos[0])[:2]))

    def success(self, sim, colour: str) -> bool:
        """Whether the cube was carried, rests at the goal, and the jaws have let go."""
        return (
            self._carried
            and self.distance(sim, colour) < PLACE_SUCCESS_DISTANCE
            and sim.arm.state[-1] > _MIN_OPENING
            and sim.cube_speed(colour) < _MAX_REST_SPEED
        )


_TASKS = {task.name: task for task in (Reach, Hover, PickPlace)}


def make_task(name: str) -> Reach | PickPlace:
    """A task by name. Raises ValueError for an unknown one."""
    if name not in _TASKS:
        raise ValueError(f"task must be one of {', '.join(_TASKS)}, not {name!r}")
    return _TASKS[name]()
