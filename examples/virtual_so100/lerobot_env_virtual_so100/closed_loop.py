"""Success rates through LeRobot's drivers: a policy, and controls on the same scenes.

The policy drives the virtual follower through `lerobot-rollout`; the controls use the same serial port and LeRobot's
own driver class. The simulator judges each episode at the moment when the arm loses its torque.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .cell import IDS, Cell
from .constants import JOINTS, episode_steps
from .tasks import Layout
from .way import Way


def follower(cell: Cell):
    """LeRobot's driver of the virtual follower, connected; without cameras, which the controls do not use."""
    from lerobot.robots.so_follower import SO100Follower, SO100FollowerConfig

    from .calibration import FOLDERS

    robot = SO100Follower(
        SO100FollowerConfig(
            port=cell.buses["follower"].port,
            id=IDS["follower"],
            calibration_dir=cell.folder / "calibration" / FOLDERS["follower"],
        )
    )
    robot.connect()
    return robot


def drive(cell: Cell, layout: Layout, act: Callable[[int], np.ndarray], fps: int) -> dict:
    """Send the actions (6,) of one episode through LeRobot's driver at `fps`; returns the judgement."""
    cell.load(layout)
    robot = follower(cell)
    try:
        due = time.monotonic()
        for step in range(episode_steps(cell.task.name, fps)):
            action = act(step)
            robot.send_action({f"{name}.pos": float(value) for name, value in zip(JOINTS, action, strict=True)})
            due += 1 / fps
            time.sleep(max(0.0, due - time.monotonic()))
    finally:
        robot.disconnect()
    return cell.status()["judgement"]


def _zero(cell: Cell, layout: Layout) -> Callable[[int], np.ndarray]:
    return lambda step: np.zeros(6)


def _random(cell: Cell, layout: Layout) -> Callable[[int], np.ndarray]:
    from .calibration import calibration

    rng = np.random.default_rng(layout.seed)
    ranges = [(entry["range_min"], entry["range_max"]) for entry in calibration("follower").values()]
    half = np.array([(high - low) / 2 * 360 / 4095 for low, high in ranges])
    low, high = np.append(-half[:-1], 0.0), np.append(half[:-1], 100.0)
    return lambda step: rng.uniform(low, high)


CONTROLS = {"zero action": _zero, "random action": _random}


def controls(cell: Cell, layouts: list[Layout], fps: int) -> dict[str, list[dict]]:
    """Judgements by control. Controls are policies that cannot know the task."""
    return {
        name: [drive(cell, layout, prepare(cell, layout), fps) for layout in tqdm(layouts, desc=name, unit="ep")]
        for name, prepare in CONTROLS.items()
    }


def policy(way: Way, layouts: list[Layout], path: Path, *options: str) -> list[dict]:
    """Judgements of a policy; each scene is a run of `lerobot-rollout`."""
    return [way.rollout(layout, path, *options) for layout in tqdm(layouts, desc="lerobot-rollout", unit="ep")]


def replays(way: Way, root: Path, repo_id: str, episodes: int) -> list[dict]:
    """Judgements of recorded episodes; each is a run of `lerobot-replay`."""
    return [way.replay(root, repo_id, index) for index in tqdm(range(episodes), desc="lerobot-replay", unit="ep")]
