"""The virtual cell (examples/virtual_so100): physics, person and scoring, driven through LeRobot's own drivers.

Its time is stepped (`lerobot_time`): it passes when a test says so, and no machine is too busy.
"""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lerobot_env_virtual_so100", reason="pip install -e examples/virtual_so100 (make setup does)")
pytest.importorskip("scservo_sdk", reason="pip install 'lerobot[feetech]'")
pytest.importorskip("zmq", reason="pip install 'lerobot[pyzmq-dep]'")

import needs_rendering  # noqa: F401
from lerobot.cameras.zmq import ZMQCameraConfig
from lerobot.robots.so_follower import SO100Follower, SO100FollowerConfig
from lerobot.teleoperators.so_leader import SO100Leader, SO100LeaderConfig
from lerobot_env_virtual_so100 import calibration, cell
from lerobot_env_virtual_so100.camera import lerobot_cameras
from lerobot_env_virtual_so100.constants import CAMERAS, JOINTS
from lerobot_env_virtual_so100.faults import Faults
from lerobot_env_virtual_so100.simulation import Simulation
from lerobot_time import follow_stepped_buses

SECONDS = 60  # of the cell's time, within which everything has happened


@pytest.fixture(scope="module")
def virtual(tmp_path_factory):
    """A calibrated cell with the task reach."""
    with cell.Cell(tmp_path_factory.mktemp("cell"), stepped=True) as running, pytest.MonkeyPatch.context() as patch:
        follow_stepped_buses(patch, *running.buses.values())
        yield running


def files(virtual, role: str) -> Path:
    """Folder of an arm's calibration file."""
    return virtual.folder / "calibration" / calibration.FOLDERS[role]


def connected_follower(virtual) -> SO100Follower:
    """LeRobot's follower with its two cameras."""
    cameras = lerobot_cameras(virtual._camera_port, 64, 30)
    configs = {name: ZMQCameraConfig(**{k: v for k, v in c.items() if k != "type"}) for name, c in cameras.items()}
    config = SO100FollowerConfig(
        port=virtual.buses["follower"].port, id=cell.IDS["follower"], calibration_dir=files(virtual, "follower"),
        cameras=configs,
    )  # fmt: skip
    robot = SO100Follower(config)
    robot.connect()
    return robot


def connected_leader(virtual) -> SO100Leader:
    """LeRobot's leader."""
    leader = SO100Leader(
        SO100LeaderConfig(
            port=virtual.buses["leader"].port, id=cell.IDS["leader"], calibration_dir=files(virtual, "leader")
        )
    )
    leader.connect()
    return leader


def joints(observation: dict) -> np.ndarray:
    return np.array([observation[f"{name}.pos"] for name in JOINTS])


def teleoperate(virtual, robot, leader, seen=lambda observation: None) -> None:
    """What `lerobot-teleoperate` does, until the person has nothing left to do."""
    until = virtual.status()["seconds"] + SECONDS
    while virtual.status()["busy"]:
        assert virtual.status()["seconds"] < until, "the person is still busy"
        seen(robot.get_observation())
        robot.send_action(leader.get_action())
        virtual.elapse(0.03)


def newest_pictures(robot) -> dict[str, np.ndarray]:
    """Pictures that were published after this call: the first that LeRobot's thread hands out may be older."""
    for camera in robot.cameras.values():
        for _ in range(2):
            camera.async_read()
    return {name: camera.async_read() for name, camera in robot.cameras.items()}


@pytest.mark.parametrize("seed", [4, 11])
def test_the_person_reaches_the_cube_through_both_drivers(virtual, seed):
    """Units, homing offsets, physics, scoring and cameras that do not fit together: the leader would not lead there."""
    layout = virtual.task.sample("test", seed)
    virtual.load(layout)
    robot, leader = connected_follower(virtual), connected_leader(virtual)
    try:
        start = joints(robot.get_observation())
        np.testing.assert_allclose(start, virtual.status()["follower"], atol=0.2)
        assert virtual.status()["held"] and not virtual.status()["judgement"]
        np.testing.assert_allclose(joints(leader.get_action()), start, atol=0.2)
        virtual.demonstrate()
        first = newest_pictures(robot)
        teleoperate(virtual, robot, leader)
        last = newest_pictures(robot)
    finally:
        robot.disconnect()
        leader.disconnect()
    judgement = virtual.status()["judgement"]
    assert judgement["is_success"] and judgement["ended_at"] == layout.target and judgement["seed"] == seed
    assert all(np.abs(first[name].astype(int) - last[name]).mean() > 1 for name in CAMERAS)  # it moved in the pictures
    virtual.elapse(0.5)
    assert virtual.status()["judgement"] == judgement  # as it was when the arm lost its torque


def test_scenes_change_before_anybody_looks(virtual):
    """A first frame that shows the scene before: `load` must return after the cameras have published the new one."""
    simulation = Simulation(virtual.task.spec, 10)
    robot = connected_follower(virtual)
    try:
        for seed in (21, 22, 23):
            layout = virtual.task.sample("test", seed)
            virtual.load(layout)
            picture = newest_pictures(robot)["front"].astype(int)
            simulation.load(layout)
            assert np.abs(picture - simulation.images(64, 64)[0]).mean() < 2
    finally:
        robot.disconnect()


def test_the_arm_holds_sinks_and_is_brought_back(virtual):
    """Torque that does nothing, an arm that falls through without it, or a person who cannot reset the scene."""
    layout = virtual.task.sample("test", 30)
    virtual.load(layout)
    robot, leader = connected_follower(virtual), connected_leader(virtual)
    try:
        posture = virtual.status()["follower"]
        robot.send_action({f"{n}.pos": float(v) for n, v in zip(JOINTS, posture, strict=True)})
        virtual.elapse(0.5)
        assert not virtual.status()["held"]
        assert np.abs(virtual.status()["follower"] - posture).max() < 6  # position motors sag a little
        robot.bus.disable_torque()
        until = virtual.status()["seconds"] + SECONDS
        while np.abs(virtual.status()["follower"] - posture).max() < 10:
            assert virtual.status()["seconds"] < until, "the arm has no torque and does not sink"
            virtual.elapse(0.1)
        robot.bus.enable_torque()
        virtual.bring()
        teleoperate(virtual, robot, leader)
        assert np.abs(virtual.status()["follower"] - layout.start(Simulation(virtual.task.spec, 10).arm)).max() < 8
    finally:
        robot.disconnect()
        leader.disconnect()


def test_a_jammed_joint_stays(virtual):
    """A stall that the physics does not show: the goal goes on and the joint does not."""
    virtual.load(virtual.task.sample("test", 31))
    robot = connected_follower(virtual)
    try:
        before = joints(robot.get_observation())
        virtual.buses["follower"].inject(Faults(jammed=1))
        robot.send_action({f"{n}.pos": float(v) for n, v in zip(JOINTS, before + 15, strict=True)})
        until = virtual.status()["seconds"] + SECONDS
        while abs(joints(robot.get_observation())[4] - before[4]) < 10:
            assert virtual.status()["seconds"] < until, "the other joints do not move"
            virtual.elapse(0.05)
        assert abs(joints(robot.get_observation())[0] - before[0]) < 0.5
    finally:
        virtual.buses["follower"].inject(Faults())
        robot.disconnect()
