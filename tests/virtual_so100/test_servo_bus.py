"""The virtual servo bus (examples/virtual_so100) under LeRobot's own drivers, healthy and with faults.

Its time is stepped and LeRobot's driver counts on it (`lerobot_time`), so that no machine is too busy for these tests.
"""

import json
import time

import numpy as np
import pytest

pytest.importorskip("lerobot_env_virtual_so100", reason="pip install -e examples/virtual_so100 (make setup does)")
pytest.importorskip("scservo_sdk", reason="pip install 'lerobot[feetech]'")

from lerobot.motors import MotorCalibration
from lerobot.robots.so_follower import SO100Follower, SO100FollowerConfig
from lerobot.teleoperators.so_leader import SO100Leader, SO100LeaderConfig
from lerobot_env_virtual_so100 import calibration, servo
from lerobot_env_virtual_so100.bus import Receiver, VirtualBus, packet
from lerobot_env_virtual_so100.clock import Clock
from lerobot_env_virtual_so100.constants import JOINTS
from lerobot_env_virtual_so100.faults import Faults
from lerobot_time import follow_stepped_buses, real_time, too_busy

POSTURE = np.array([20.0, -35.0, 42.5, 61.0, -88.0, 30.0])
TICK = 360 / 4095  # degrees


@pytest.fixture
def log(tmp_path):
    return tmp_path / "bus.jsonl"


@pytest.fixture
def bus(log, monkeypatch):
    """A calibrated follower's bus, its arm in the middle of all ranges."""
    with VirtualBus(log=log, stepped=True) as virtual:
        follow_stepped_buses(monkeypatch, virtual)
        virtual.calibrate(calibration.registers("follower"))
        virtual.shafts.encoder[:] = calibration.to_encoder(np.zeros(6), "follower")
        yield virtual


@pytest.fixture
def folder(tmp_path):
    """Folder with both arms' calibration files."""
    calibration.write_files(tmp_path)
    return tmp_path


def follower(bus, folder, **options) -> SO100Follower:
    """LeRobot's driver, not connected; input() would be called for a calibration that does not fit."""
    files = folder / calibration.FOLDERS["follower"]
    return SO100Follower(SO100FollowerConfig(port=bus.port, id="follower", calibration_dir=files, **options))


def action(posture=POSTURE) -> dict[str, float]:
    """A posture as LeRobot's robots take it."""
    return {f"{name}.pos": float(value) for name, value in zip(JOINTS, posture, strict=True)}


def state(observation: dict) -> np.ndarray:
    """Inverse of `action`."""
    return np.array([observation[f"{name}.pos"] for name in JOINTS])


def settle(bus) -> None:
    """Let the shafts be where the servos drive them."""
    bus.elapse(0.05)  # a sync write is not acknowledged
    bus.shafts.encoder[:] = bus.shafts.target


def entries(log, kind: str) -> list:
    """What the bus logged of one kind: goal, torque or fault."""
    return [e[kind] for e in map(json.loads, log.read_text().splitlines()) if kind in e]


# What a servo does, without a line ------------------------------------------------------------------------------


def make_servo(clock=lambda: 0.0) -> tuple[servo.Servo, servo.Shafts]:
    """One servo, its shaft at tick 1000."""
    import multiprocessing

    shafts = servo.Shafts.allocate(multiprocessing.get_context("forkserver"))
    shafts.encoder[0] = 1000
    return servo.Servo(1, shafts, 0, clock), shafts


def test_sign_and_magnitude():
    """Two's complement where Feetech has a sign bit: a homing offset of -1 would read as -2047."""
    assert servo.to_magnitude(-734, 11) == 734 | 1 << 11
    for value in (-2047, -1, 0, 1, 2047):
        assert servo.from_magnitude(servo.to_magnitude(value, 11), 11) == value
    with pytest.raises(ValueError, match="does not fit"):
        servo.to_magnitude(2048, 11)


def test_position_wraps_and_unwraps():
    """Present_Position = encoder - homing offset, within a turn unless the phase register says otherwise."""
    unit, _ = make_servo()
    unit.write(servo.PHASE, b"\x0c")
    unit.write(servo.HOMING, servo.to_magnitude(1500, 11).to_bytes(2, "little"))
    assert int.from_bytes(unit.read(servo.POSITION, 2), "little") == 1000 - 1500 + 4096
    unit.write(servo.PHASE, b"\x1c")
    word = int.from_bytes(unit.read(servo.POSITION, 2), "little")
    assert servo.from_magnitude(word, 15) == -500


def test_torque_stiffens_where_the_arm_stands():
    """An arm that jumps to an old goal when it is switched on."""
    unit, shafts = make_servo()
    unit.write(servo.GOAL, (3000).to_bytes(2, "little"))
    assert shafts.torque[0] == 0
    unit.write(servo.TORQUE_ENABLE, b"\x01")
    assert (shafts.torque[0], shafts.target[0]) == (1, 1000)
    unit.write(servo.TORQUE_LIMIT, (250).to_bytes(2, "little"))
    assert shafts.torque[0] == 0.25


def test_limits_and_mode():
    """A goal beyond the limits that is driven to, or a goal that acts in another mode than position."""
    unit, shafts = make_servo()
    unit.write(servo.MIN_LIMIT, (800).to_bytes(2, "little") + (2000).to_bytes(2, "little"))
    unit.write(servo.HOMING, (100).to_bytes(2, "little"))
    for goal, target in ((100, 900), (4000, 2100), (1200, 1300)):
        unit.write(servo.GOAL, goal.to_bytes(2, "little"))
        assert shafts.target[0] == target
    unit.write(servo.MODE, b"\x01")
    unit.write(servo.GOAL, (1500).to_bytes(2, "little"))
    assert shafts.target[0] == 1300


def test_read_only_registers_stay():
    """A write that changes the model number or the measured position."""
    unit, _ = make_servo()
    unit.write(servo.MODEL, b"\x01\x02")
    unit.write(servo.POSITION, b"\x01\x02")
    assert unit.word(servo.MODEL) == 777
    assert int.from_bytes(unit.read(servo.POSITION, 2), "little") == 1000


def test_overload():
    """A shaft held fast: no error bit, or no protection, or an error that a moving shaft gets too."""
    now = [0.0]
    unit, shafts = make_servo(lambda: now[0])
    unit.write(servo.PROTECTION_TIME, bytes([100]))  # 1 s
    unit.write(servo.TORQUE_ENABLE, b"\x01")
    unit.write(servo.GOAL, (2000).to_bytes(2, "little"))
    for step in range(20):
        now[0], shafts.encoder[0] = step / 10, 1000 + 10 * step
        unit.read(servo.POSITION, 2)
    assert unit.error == 0
    now[0] += 1.1
    unit.read(servo.POSITION, 2)
    assert unit.error == servo.ERROR_OVERLOAD
    assert shafts.torque[0] == pytest.approx(0.2)
    unit.write(servo.TORQUE_ENABLE, b"\x00")
    assert unit.error == 0


# The line -------------------------------------------------------------------------------------------------------


def test_receiver_finds_packets_in_anything():
    """Packets that come in pieces, in one piece, after noise, or after one with a spoilt length."""
    first, second = packet(1, 2, b"\x38\x02"), packet(254, 0x83, b"\x2a\x02\x01\xff\x07")
    clock = Clock(stepped=True)
    receiver = Receiver(clock)
    found = [raw for byte in b"\x00\xff" + first + second for raw in receiver.feed(bytes([byte]))]
    assert found == [first, second]
    assert list(receiver.feed(b"\xff" + first + second + first[:3])) == [first, second]
    assert list(receiver.feed(first[3:])) == [first]
    assert list(receiver.feed(first[:3] + b"\x90" + first[4:])) == []
    clock.elapse(0.05)
    assert list(receiver.feed(second)) == [second]


def test_calibration_is_that_of_the_model():
    """Ranges that are not the simulated arm's, or a zero that is not LeRobot's middle."""
    from lerobot_env_virtual_so100.scene import SceneSpec, build_model

    model = build_model(SceneSpec())
    for name, entry in calibration.calibration("follower").items():
        low, high = model.actuator(name).ctrlrange
        ends = (np.array([entry["range_min"], entry["range_max"]]) - 2047.5) * 2 * np.pi / 4096
        if name != "wrist_roll":  # a full turn for LeRobot
            np.testing.assert_allclose(ends, (low, high), atol=0.0016)  # a tick
        if name != "gripper":
            assert entry["range_min"] + entry["range_max"] == 4095
    for role in calibration.ROLES:
        angles = np.linspace(-1, 1, 6)
        np.testing.assert_allclose(calibration.to_radians(calibration.to_encoder(angles, role), role), angles)


def test_lerobot_reads_and_drives(bus, folder, log):
    """Homing offsets, units, limits or the order of joints not as LeRobot has them; a calibration that asks."""
    with_file = follower(bus, folder)
    with_file.connect()  # would call input() if the servos were not calibrated as the file says
    try:
        assert all(bus.shafts.torque == 1)
        with_file.send_action(action())
        settle(bus)
        radians = calibration.to_radians(bus.shafts.encoder, "follower")
        np.testing.assert_allclose(np.degrees(radians[:5]), POSTURE[:5], atol=1.1 * TICK)
        np.testing.assert_allclose(state(with_file.get_observation()), POSTURE, atol=1.1 * TICK)
        with_file.send_action(action(POSTURE + np.eye(6)[0] * 1000))
        settle(bus)
        highest = calibration.calibration("follower")["shoulder_pan"]["range_max"]
        assert with_file.bus.read("Present_Position", "shoulder_pan", normalize=False) == highest
    finally:
        with_file.disconnect()
    assert all(bus.shafts.torque == 0)
    sent = entries(log, "goal")
    assert len(sent) == 2 and sent[0].keys() == {"1", "2", "3", "4", "5", "6"}


def test_leader_follows_feedback_and_hand(folder, monkeypatch):
    """A leader whose torque stays on when a person takes it, or that does not move when a rollout hands over."""
    with VirtualBus(stepped=True) as bus:
        follow_stepped_buses(monkeypatch, bus)
        bus.calibrate(calibration.registers("leader"))
        files = folder / calibration.FOLDERS["leader"]
        leader = SO100Leader(SO100LeaderConfig(port=bus.port, id="leader", calibration_dir=files))
        bus.shafts.encoder[:] = calibration.to_encoder(np.radians(POSTURE), "leader")
        leader.connect()
        assert all(bus.shafts.torque == 0)
        np.testing.assert_allclose(state(leader.get_action())[:5], POSTURE[:5], atol=1.1 * TICK)
        leader.enable_torque()
        leader.send_feedback(action(-POSTURE))
        settle(bus)
        np.testing.assert_allclose(state(leader.get_action())[:5], -POSTURE[:5], atol=1.1 * TICK)
        leader.disable_torque()
        assert all(bus.shafts.torque == 0)
        leader.disconnect()


def test_calibrating_from_the_file(folder, monkeypatch):
    """`lerobot-calibrate` with a file: EPROM registers that do not keep what is written."""
    with VirtualBus(stepped=True) as bus:  # as from the factory
        follow_stepped_buses(monkeypatch, bus)
        device = follower(bus, folder)
        device.connect(calibrate=False)
        assert not device.is_calibrated
        monkeypatch.setattr("builtins.input", lambda _: "")  # ENTER: use the file
        device.calibrate()
        assert device.is_calibrated
        expected = {n: MotorCalibration(**entry) for n, entry in calibration.calibration("follower").items()}
        assert device.bus.read_calibration() == expected
        device.disconnect()


def test_half_turn_homing(bus, folder):
    """What an interactive calibration does: the present position becomes the middle of the turn."""
    device = follower(bus, folder)
    device.bus.connect()
    bus.shafts.encoder[:] = [300, 900, 1500, 2100, 2700, 3300]
    device.bus.disable_torque()
    offsets = device.bus.set_half_turn_homings()
    assert list(offsets.values()) == [encoder - 2047 for encoder in (300, 900, 1500, 2100, 2700, 3300)]
    assert set(device.bus.sync_read("Present_Position", normalize=False).values()) == {2047}
    device.bus.disconnect()


def test_pings_find_the_servos(bus, folder):
    """`lerobot-setup-motors` and port scans: a broadcast that only one servo answers."""
    device = follower(bus, folder)
    device.bus.connect(handshake=False)
    assert device.bus.broadcast_ping() == dict.fromkeys(range(1, 7), servo.MODEL_NUMBER)
    assert device.bus.ping(9) is None
    device.bus.disconnect(disable_torque=False)


@pytest.mark.parametrize(
    ("number", "address", "data", "complaint"),
    [
        (3, servo.MODEL, b"\x01\x05", "incorrect model numbers"),
        (4, servo.ID, b"\x09", "Missing motor IDs"),
        (5, servo.FIRMWARE_MINOR, b"\x63", "different firmware"),
    ],
)
def test_lerobot_refuses_other_servos(bus, folder, number, address, data, complaint):
    """Servos that LeRobot must refuse, taken for good ones because the bus tells it what it wants to hear."""
    bus.program(number, address, data)
    with pytest.raises(RuntimeError, match=complaint):
        follower(bus, folder).connect()


@pytest.mark.slow
def test_answers_at_once(folder):
    """Replies that take so long that a control loop at 30 Hz is held up, or the next read gets them; in real time."""
    with real_time(), VirtualBus() as bus:
        bus.calibrate(calibration.registers("follower"))
        device = follower(bus, folder)
        device.connect()
        times = []
        for _ in range(50):
            started = time.perf_counter()
            device.get_observation()
            times.append(time.perf_counter() - started)
        device.disconnect()
        assert np.median(times) < 0.02, times


def test_stepped_time_is_exact(bus, folder):
    """Time that also passes by itself, or not at all: a reply is taken up to LeRobot's limit and not beyond it."""
    device = follower(bus, folder)
    device.connect()
    began = bus.elapse(0)
    for delay, complaint in ((0.045, None), (0.06, "Failed to")):
        bus.inject(Faults(late=1.0, delay=delay, limit=1))
        if complaint is None:
            device.bus.read("Present_Position", "gripper")
        else:
            with pytest.raises(ConnectionError, match=complaint):
                device.bus.read("Present_Position", "gripper")
    bus.inject(Faults())
    assert 0.09 < bus.elapse(0) - began < 0.12  # 45 ms, and the limit of 51, in steps of 5
    bus.elapse(0.1)
    forget(device)
    device.disconnect()
    with VirtualBus() as real, pytest.raises(RuntimeError, match="stepped=True"):
        real.elapse(0.1)


def test_failures_are_blamed_on_busy_machines_alone(monkeypatch):
    """A slow test that hides a failure on an idle machine, or that fails where other work took the processor."""
    assert too_busy(4.1, 2) and not too_busy(3.9, 2)
    for load, outcome in ((0.1, AssertionError), (1000.0, pytest.skip.Exception)):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, load, load))
        with pytest.raises(outcome, match="late"), real_time():
            raise AssertionError("late")


# Faults ---------------------------------------------------------------------------------------------------------


def drive(device, log, steps: int = 30) -> tuple[list[np.ndarray], Exception | None]:
    """Read and send as a control loop does, actions different in each step; what was meant, and how it ended."""
    meant = []
    try:
        for step in range(steps):
            device.get_observation()
            meant.append(POSTURE * np.cos(step / 7))
            device.send_action(action(meant[-1]))
    except (ConnectionError, RuntimeError) as error:
        return meant, error
    return meant, None


def forget(device) -> None:
    """Empty LeRobot's input, as a new start of its command does: it takes old replies for new ones."""
    device.bus.port_handler.ser.reset_input_buffer()


def assert_nothing_unmeant(device, log, meant: list[np.ndarray]) -> None:
    """Every goal that reached the servos is one of the actions, whole and in their order."""
    expected = [list(device.bus._unnormalize(dict(enumerate(m, start=1))).values()) for m in meant]
    arrived = [list(goal.values()) for goal in entries(log, "goal")]
    left = iter(expected)
    assert all(goal in left for goal in arrived), "a goal that was not sent, or out of order"


FEW = {"limit": 2}  # a read is tried three times
FAULTS = {
    "some replies lost": (Faults(drop=0.1, **FEW), None),
    "some replies late": (Faults(late=0.1, delay=0.06, **FEW), None),
    "some replies corrupt": (Faults(corrupt=0.1, **FEW), None),
    "commands corrupt": (Faults(corrupt_commands=0.1, **FEW), None),
    "line dead": (Faults(drop=1.0), "after 3 tries"),
    "all replies corrupt": (Faults(corrupt=1.0), "after 3 tries"),
    "servo missing": (Faults(missing=4), "after 3 tries"),
    "shaft jammed": (Faults(jammed=2), None),
    "voltage error": (Faults(voltage=2), None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_no_action_that_was_not_meant(bus, folder, log, name):
    """With each fault: a goal on the wire that nobody sent, or an error that is not LeRobot's own."""
    faults, ends_with = FAULTS[name]
    device = follower(bus, folder)
    device.connect()
    bus.inject(faults)
    meant, error = drive(device, log)
    bus.inject(Faults())
    assert (error is None) if ends_with is None else (ends_with in str(error)), error
    assert_nothing_unmeant(device, log, meant)
    forget(device)
    if faults.limit is not None:
        assert len(entries(log, "fault")) == 1 + faults.limit, "nothing was spoilt: nothing was tested"
    device.disconnect()
    assert all(bus.shafts.torque == 0)


def test_a_late_reply_leaves_every_later_reading_old(bus, folder):
    """LeRobot never flushes its input: a retry after a late reply reads that one, and so on until it reconnects.

    If this fails LeRobot has changed, and the README's advice with it.
    """
    device = follower(bus, folder)
    device.connect()
    bus.inject(Faults(late=1.0, delay=0.08, limit=1))
    readings = []
    for degrees in (10, 20, 30, 40):
        bus.shafts.encoder[:] = calibration.to_encoder(np.radians(np.full(6, degrees)), "follower")
        readings.append(round(device.get_observation()["shoulder_pan.pos"]))
        bus.elapse(0.1)
    assert readings == [10, 10, 20, 30]
    bus.inject(Faults())
    forget(device)
    device.disconnect()


def test_voltage_error(bus, folder):
    """The error bit in replies: LeRobot's reads of all servos ignore it, a handshake takes the servo for missing."""
    device = follower(bus, folder)
    device.connect()
    bus.inject(Faults(voltage=2))
    device.get_observation()
    with pytest.raises(RuntimeError, match="Input voltage error"):
        device.bus.write("Torque_Enable", "shoulder_lift", 0)
    bus.inject(Faults())
    device.disconnect()
    bus.inject(Faults(voltage=2))
    with pytest.raises(RuntimeError, match="Missing motor IDs"):
        follower(bus, folder).connect()


def test_torque_stays_on_behind_a_servo_that_is_missing(bus, folder):
    """What the README warns of: LeRobot switches torque off one by one, and stops at a servo that does not answer."""
    device = follower(bus, folder)
    device.connect()
    bus.inject(Faults(missing=4))
    with pytest.raises(ConnectionError, match="Torque_Enable"):
        device.disconnect()
    assert bus.shafts.torque.tolist() == [0, 0, 0, 1, 1, 1]
    bus.inject(Faults())
    device.disconnect()
