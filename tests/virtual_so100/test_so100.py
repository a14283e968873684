"""The whole way with two virtual SO-100 arms (examples/virtual_so100): LeRobot's commands, unmodified."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import stats, tiny_config

pytest.importorskip("lerobot_env_virtual_so100", reason="pip install -e examples/virtual_so100 (make setup does)")
pytest.importorskip("scservo_sdk", reason="pip install 'lerobot[feetech]'")
pytest.importorskip("zmq", reason="pip install 'lerobot[pyzmq-dep]'")

import needs_rendering  # noqa: F401
from lerobot.datasets import LeRobotDataset
from lerobot.motors import Motor, MotorCalibration, MotorNormMode
from lerobot.motors.feetech import FeetechMotorsBus
from lerobot.utils.constants import ACTION, OBS_STATE
from lerobot_env_virtual_so100 import audit, calibration, cell, constants, record
from lerobot_env_virtual_so100.commands import Command, CommandError
from lerobot_env_virtual_so100.faults import Faults
from lerobot_env_virtual_so100.simulation import Simulation
from lerobot_time import calibration_folder, follow_stepped_cell, real_time

from lerobot_pi0 import PI0Policy, make_pi0_pre_post_processors

CAMERAS = tuple(f"observation.images.{name}" for name in constants.CAMERAS)


@pytest.fixture(scope="module")
def virtual(tmp_path_factory):
    """A calibrated cell with the task reach, whose time passes when it is told to."""
    with cell.Cell(tmp_path_factory.mktemp("cell"), stepped=True) as running:
        yield running


@pytest.fixture(scope="module")
def real_cell(tmp_path_factory):
    """The same in real time."""
    with cell.Cell(tmp_path_factory.mktemp("cell")) as running:
        yield running


@pytest.fixture
def run(real_cell, monkeypatch):
    """Run one of LeRobot's commands in this process, which has imported it already; returns what main() raised."""
    calibration_folder(monkeypatch, real_cell.folder / "calibration")

    def call(main, *arguments) -> Exception | None:
        monkeypatch.setattr(sys, "argv", ["lerobot", *map(str, arguments)])
        handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
        try:
            main()
        except (RuntimeError, ConnectionError) as error:
            return error
        finally:
            logging.getLogger().handlers[:], logging.getLogger().level = handlers, level
        return None

    return call


def dataset_options(root: Path, name: str, seconds: float) -> list[str]:
    """One episode, images stored as images."""
    return [f"--dataset.repo_id=local/{name}", f"--dataset.root={root}", "--dataset.no_stamp=true",
            "--dataset.single_task=reach the red cube", "--dataset.num_episodes=1", f"--dataset.fps={constants.FPS}",
            f"--dataset.episode_time_s={seconds}", "--dataset.video=false", "--dataset.push_to_hub=false",
            "--play_sounds=false"]  # fmt: skip


@pytest.fixture(scope="module")
def recorded(virtual, tmp_path_factory):
    """An episode of `lerobot-record`: the person at the leader, in a scene of the train stream."""
    from lerobot.scripts.lerobot_record import main

    root = tmp_path_factory.mktemp("recorded") / "data"
    layout = virtual.task.sample("train", 3)
    virtual.load(layout)
    virtual.demonstrate()
    with pytest.MonkeyPatch.context() as patch:
        calibration_folder(patch, virtual.folder / "calibration")
        follow_stepped_cell(patch, virtual)
        patch.setattr(sys, "argv", ["lerobot-record", *virtual.robot, *virtual.teleop,
                                    *dataset_options(root, "recorded", 2.0)])  # fmt: skip
        main()
    return root, layout


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    """An untrained policy of the smallest preset, with processors, as lerobot-train would leave it."""
    torch.manual_seed(0)
    config = tiny_config(cameras=CAMERAS, n_action_steps=5)
    folder = tmp_path_factory.mktemp("policy")
    PI0Policy(config).save_pretrained(folder)
    for pipeline in make_pi0_pre_post_processors(config, dataset_stats=stats(cameras=CAMERAS)):
        pipeline.save_pretrained(folder)
    return folder


# The supervisor -------------------------------------------------------------------------------------------------


def command(tmp_path, code: str) -> Command:
    """A Python program in place of one of LeRobot's commands."""
    return Command([sys.executable, "-c", code], tmp_path / "log.txt", {})


def test_keys_are_pressed(tmp_path):
    """A command that has no keyboard: its prompts would wait for ever, its keys would do nothing."""
    asking = command(tmp_path, "import sys; print(sys.stdin.isatty(), input('Press ENTER'), flush=True)")
    asking.wait_for("Press ENTER")
    asking.press("yes\n")
    asking.wait_for("True yes")
    assert asking.finish() == 0


def test_what_was_said_is_waited_for_once(tmp_path):
    """The second episode taken to begin because the first one did."""
    talking = command(tmp_path, "print('begin'); print('end'); input(); print('begin'); print('last')")
    talking.wait_for("begin")
    assert not talking.says("begin")
    talking.press("\n")
    talking.wait_for("begin")
    talking.wait_for("last")
    talking.finish()


def test_a_command_that_fails_says_why(tmp_path):
    """A supervisor that waits for a dead command, or hides its error."""
    failing = command(tmp_path, "raise SystemExit('no such port')")
    with pytest.raises(CommandError, match="no such port"):
        failing.wait_for("Recording")
    with pytest.raises(CommandError, match="status 1"):
        failing.finish()
    stopped = command(
        tmp_path,
        "import time\ntry:\n print('on', flush=True); time.sleep(60)\nexcept KeyboardInterrupt:\n print('off')",
    )
    stopped.wait_for("on")
    stopped.interrupt()
    assert stopped.finish() == 0 and stopped.says("off")


# The audit ------------------------------------------------------------------------------------------------------


def write_log(path: Path, goals) -> None:
    lines = [json.dumps({"t": 0.0, "goal": {str(n + 1): int(v) for n, v in enumerate(goal)}}) for goal in goals]
    path.write_text("\n".join(lines) + "\n")


def test_audit_counts_ticks_as_lerobot_does(tmp_path):
    """An audit that would take LeRobot's own goals for strangers, or is blind to one of two ticks."""
    entries = calibration.calibration("follower")
    modes = dict.fromkeys(constants.JOINTS, MotorNormMode.DEGREES) | {"gripper": MotorNormMode.RANGE_0_100}
    motors = {name: Motor(entry["id"], "sts3215", modes[name]) for name, entry in entries.items()}
    bus = FeetechMotorsBus("none", motors, {name: MotorCalibration(**entry) for name, entry in entries.items()})
    actions = np.random.default_rng(0).uniform(-90, 110, size=(40, 6))
    sent = [list(bus._unnormalize(dict(enumerate(action.tolist(), start=1))).values()) for action in actions]
    log = tmp_path / "log.jsonl"
    write_log(log, sent)
    assert len(audit.unmeant(log, actions.astype(np.float32))) == 0
    write_log(log, sent[:5] + sent[9:])  # lost on the way
    assert len(audit.unmeant(log, actions)) == 0
    write_log(log, [*sent[:5], sent[2], *sent[5:]])  # an old one again
    assert len(audit.unmeant(log, actions)) == 1
    sent[7][3] += 2
    write_log(log, sent)
    assert len(audit.unmeant(log, actions)) == 1


# Same features --------------------------------------------------------------------------------------------------


def test_the_fast_path_writes_what_lerobot_record_writes(recorded, tmp_path):
    """A policy trained on the simulator's demonstrations that could not drive through the drivers, or the other way."""
    from lerobot.datasets.aggregate import aggregate_datasets

    root, _ = recorded
    fast = tmp_path / "fast"
    record.write_shard(record.RecordConfig(root=fast, episodes=3), fast, range(1), lambda _: None)
    by_driver, by_simulator = (json.loads((path / "meta/info.json").read_text()) for path in (root, fast))
    for key in ("features", "fps", "robot_type", "codebase_version"):
        assert by_driver[key] == by_simulator[key], key
    aggregate_datasets(["local/a", "local/b"], "local/both", roots=[root, fast], aggr_root=tmp_path / "both")
    both = LeRobotDataset("local/both", root=tmp_path / "both")
    assert both.num_episodes == 1 + by_simulator["total_episodes"]
    assert both[0][ACTION].dtype == both[len(both) - 1][ACTION].dtype


def test_recorded_units_and_colours(virtual, recorded):
    """Degrees that are radians, red that is blue, or a first frame that shows another scene than the one recorded."""
    root, layout = recorded
    data = LeRobotDataset("local/recorded", root=root)
    assert 2.0 <= len(data) / constants.FPS < 2.0 + 2 / constants.FPS
    simulation = Simulation(virtual.task.spec, constants.FPS)
    simulation.load(layout)
    first = data[0]
    np.testing.assert_allclose(first[OBS_STATE], simulation.arm.state, atol=15)  # the person may have begun
    for name, rendered in zip(constants.CAMERAS, simulation.images(64, 64), strict=True):
        seen = first[f"observation.images.{name}"].permute(1, 2, 0).numpy() * 255
        assert np.abs(seen - rendered).mean() < 12  # the arm may have moved; channels in another order are 20 off
    states, actions = (np.stack(data.hf_dataset[key]) for key in (OBS_STATE, ACTION))
    assert np.abs(states[5:] - actions[:-5]).mean() < np.abs(states - states[0]).mean()  # the follower follows
    assert len(audit.unmeant(virtual.log("follower"), actions)) == 0


# Faults while a policy drives -----------------------------------------------------------------------------------

# How each ends: LeRobot's own words, or nothing, when it recovers. It tries three times to read.
FAULTS = {
    "healthy": (Faults(), None),
    "some replies lost": (Faults(drop=0.05, limit=2, after=0.3), None),
    "some replies late": (Faults(late=0.05, delay=0.06, limit=2, after=0.3), None),
    "some replies corrupt": (Faults(corrupt=0.05, limit=2, after=0.3), None),
    "commands corrupt": (Faults(corrupt_commands=0.2, limit=2, after=0.3), None),
    "servo missing": (Faults(missing=3, after=0.5), "Failed to"),
    "shaft jammed": (Faults(jammed=1, after=0.3), None),
    "voltage error": (Faults(voltage=2, after=0.5), "Input voltage error"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_faults_during_a_rollout(real_cell, run, policy, tmp_path, name):
    """With each fault in `lerobot-rollout`: an action on the bus that the policy did not mean, an error that is not
    LeRobot's, or a dataset that nobody can read any more."""
    from lerobot.scripts.lerobot_rollout import main

    log, root = real_cell.log("follower"), tmp_path / "data"
    real_cell.load(real_cell.task.sample("test", 1))
    log.write_text("")
    faults, ends_with = FAULTS[name]
    real_cell.buses["follower"].inject(faults)
    with real_time():
        error = run(main, f"--policy.path={policy}", "--policy.device=cpu", "--task=reach the red cube",
                    f"--fps={constants.FPS}", *real_cell.robot, "--strategy.type=episodic",
                    "--return_to_initial_position=false", *dataset_options(root, "rollout_fault", 2.0))  # fmt: skip
        real_cell.buses["follower"].inject(Faults())
        assert (error is None) if ends_with is None else (ends_with in str(error)), error
        data = LeRobotDataset("local/rollout_fault", root=root)
        assert data.num_episodes == 1 and len(data) >= 3
        actions = audit.recorded_actions(root)
        assert len(audit.goals(log)) >= 3
        assert len(audit.unmeant(log, actions)) == 0
        if name == "healthy":
            assert len(audit.goals(log)) == len(actions)
        else:
            assert '"fault"' in log.read_text(), "nothing went wrong: nothing was tested"


# The whole way --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_way(tmp_path):
    """A command of LeRobot's that fails, waits for somebody, or leaves no success that can be counted."""
    from lerobot_env_virtual_so100 import so100

    config = so100.SO100Config(episodes=1, simulated=0, steps=3, scenes=1, output=tmp_path / "so100")
    with real_time():
        rows = so100.so100(config)
    assert rows["control: lerobot-replay"]["episodes"] == 1
    assert rows["π₀ through lerobot-rollout"]["episodes"] == rows["π₀ in the simulator (lerobot-eval)"]["episodes"] == 1
    assert rows["control: zero action"]["successes"] == 0
    for name, episodes in (("recorded", 1), ("rollout_episodic", 1), ("rollout_dagger", 1)):
        assert LeRobotDataset(f"local/{name}", root=config.output / name).num_episodes == episodes
    assert (config.output / "rollout.mp4").stat().st_size > 0
