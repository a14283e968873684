"""MetaWorld's example in the simulation, and as a whole with two tasks."""

import json
import multiprocessing

import numpy as np
import pytest

pytest.importorskip("metaworld.policies", reason="pip install -e examples/metaworld (make test-all does)")

from lerobot.datasets import LeRobotDataset
from lerobot.envs.metaworld import MetaworldEnv
from lerobot_env_metaworld_small import learn, record
from lerobot_env_metaworld_small.configuration_metaworld_small import MetaworldSmallEnv
from lerobot_env_metaworld_small.demonstrations import Demonstrator, make_env
from lerobot_env_metaworld_small.env import Simulation
from lerobot_env_virtual_so100.scene import check_rendering

try:
    check_rendering()
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.slow  # MetaWorld is an extra of its example, which `make test-all` installs


def seen(image_size: int | None, zoom: float) -> dict:
    """What the second of two environments shows of scene 6."""
    config = MetaworldSmallEnv(task="pick-place-v3", image_size=image_size, zoom=zoom)
    env = config.create_envs(2)["pick-place-v3"][0]
    first, _ = env.reset(seed=[5, 6])
    assert first["pixels"].shape == (2, *config.features["pixels/top"].shape)
    again, _ = env.reset(seed=[5, 6])
    env.close()
    return {key: x[1] for key, x in again.items()}


def test_only_the_pictures_are_others():
    """Catches a cheap environment whose scenes, states or success are not LeRobot's, or that shows another part."""
    full, _ = MetaworldEnv("pick-place-v3", obs_type="pixels_agent_pos").reset(seed=6)
    for zoom, rows, columns in ((1, slice(0, 480), slice(0, 480)), (2, slice(120, 360), slice(168, 408))):
        part = full["pixels"][rows, columns]
        small, same = seen(64, zoom), seen(None, zoom)
        assert np.array_equal(small["agent_pos"], full["agent_pos"])
        assert np.array_equal(same["pixels"], part)
        expected, ours = (
            x.reshape(16, len(x) // 16, 16, len(x) // 16, 3).mean(axis=(1, 3)) for x in (part, small["pixels"])
        )
        assert np.abs(expected - ours).mean() < 20, "not the same scene, or not the same way up"


def test_processes_of_one_task_at_a_time():
    """Catches the processes of all tasks of a group, which begin at once: hundreds, each with its own MuJoCo."""
    envs = MetaworldSmallEnv(task="reach-v3,door-open-v3", image_size=32).create_envs(2, use_async_envs=True)
    assert len(multiprocessing.active_children()) == 0
    for (env,) in (tasks.values() for tasks in envs.values()):
        seen, _ = env.reset(seed=[5, 6])
        assert seen["pixels"].shape == (2, 32, 32, 3)
        assert len(multiprocessing.active_children()) == 2
        env.close()


def test_pictures_may_be_drawn_seldom():
    """Catches an old picture where a policy looks: at the first step of an episode, and at each third one here."""
    always, seldom = (
        MetaworldSmallEnv(task="reach-v3", image_size=32, draw_every=every).create_envs(1)["reach-v3"][0]
        for every in (1, 3)
    )
    for seed in (6, 7):
        expected, found = (env.reset(seed=[seed])[0] for env in (always, seldom))
        drawn = expected["pixels"]
        for step in range(1, 9):
            assert np.array_equal(found["pixels"], drawn) and np.array_equal(found["agent_pos"], expected["agent_pos"])
            action = np.random.default_rng(step).uniform(-1, 1, (1, 4)).astype(np.float32)
            expected, found = (env.step(action)[0] for env in (always, seldom))
            if step % 3 == 0:
                assert not np.array_equal(expected["pixels"], drawn)
                drawn = expected["pixels"]
            else:
                assert not np.array_equal(expected["pixels"], found["pixels"])
        # The second episode begins in the middle of a pause between two pictures.
    always.close(), seldom.close()


@pytest.mark.parametrize("task", ["pick-place-v3", "stick-pull-v3"])
def test_a_part_is_drawn_as_in_the_whole(task):
    """Catches a shape that is left out although it can be seen, also when the arm has moved."""
    part, whole = (Simulation(make_env(task, side, zoom)) for side, zoom in ((128, 2.0), (256, 1.0)))
    full, left_out, differences = part.reset(4), 0, []
    assert np.array_equal(full, whole.reset(4))
    for _ in range(6):
        for _ in range(12):
            action = part.expert(full)
            full, _ = part.step(action)
            seen, _ = whole.step(action)
        expected = whole.look(seen)[0][64:192, 90:218].astype(int)
        assert expected.std() > 10
        differences.append(np.abs(part.look(full)[0] - expected))
        left_out += int((~part._env._env.mujoco_renderer._may_be_seen()).sum())
    assert np.max(differences) <= 2 and np.mean(differences) < 0.01  # edges are rounded in another way
    assert left_out > 30


def test_a_demonstration():
    """Catches pushes that are recorded as the expert's actions, an end at the edge of success, another scene's seed."""
    plain, pushed = (Demonstrator("reach-v3", 32, 2.0, pushes, scatter=0, hold=20) for pushes in (0.0, 0.2))
    first, disturbed = plain.episode(3), pushed.episode(3)
    assert first.seed == disturbed.seed == 3 and first.instruction == "Reach a goal position"
    assert not np.array_equal(first.states[-1], disturbed.states[-1])
    goal = first.full_states[-1, -3:]
    errors = np.linalg.norm(first.states[:, :3] - goal, axis=1)
    assert errors[-1] < 0.03 < errors[-22]  # success is within 0.05 of the fingers
    for episode in (first, disturbed):
        wanted = goal - episode.full_states[:, :3]
        clear = np.abs(wanted) > 0.02
        assert (np.sign(episode.actions[:, :3]) == np.sign(wanted))[clear].all()
    assert first.images.shape == (len(first.actions), 32, 32, 3)


def test_pictures_of_failures_are_not_drawn(monkeypatch):
    """Catches pictures that are thrown away, which took most of a recording's time; another episode without them."""
    demonstrator, looks = Demonstrator("pick-place-v3", 32, 2.0, pushes=0.03, scatter=1, hold=10), []
    look = demonstrator._sim.look
    monkeypatch.setattr(demonstrator._sim, "look", lambda full: looks.append(full) or look(full))
    episode = demonstrator.episode(12)
    assert episode.seed == 1012, "the first seed of this episode no longer fails: take another episode"
    assert len(looks) == len(episode.actions) and np.array_equal(np.float32(looks), episode.full_states)


def test_experts_solve_what_random_actions_do_not():
    """Catches a control that is given the task's solution, or an expert that acts on another scene."""
    from lerobot_env_metaworld_small.evaluate import control

    assert control("reach-v3", range(20_000, 20_003), expert=True) == [True] * 3
    assert control("pick-place-v3", range(20_000, 20_002), expert=False) == [False] * 2
    sim = Simulation(make_env("reach-v3", None))
    assert np.array_equal(sim.reset(7), sim.reset(7)) and not np.array_equal(sim.reset(7), sim.reset(8))


def test_a_small_version(tmp_path, capsys):
    """Catches a step of the whole that does not fit the next: data, LeRobot's commands, their results, the report."""
    config = learn.LearnConfig(
        tasks="reach-v3,drawer-close-v3", episodes=6, steps=30, trials=2, saves=2, image_size=64, output=tmp_path
    )
    rows = learn.learn(config)
    assert rows.keys() == {"π₀", "ACT", "random actions"}
    assert all(row["all"]["trials"] == 4 for row in rows.values())
    assert "drawer-close-v3" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["curves"]["π₀"].keys() == {"15", "30"} and scores["scores"] == json.loads(json.dumps(rows))
    assert (tmp_path / "tasks.png").stat().st_size > 10_000 and (tmp_path / "curve.png").exists()
    dataset = LeRobotDataset("local/metaworld", root=config.recording().root)
    assert dataset.num_episodes == 12 and dataset.fps == 80
    scenes = [json.loads(line) for line in (dataset.root / record.SCENES_FILE).read_text().splitlines()]
    ends = ["reach-v3", "drawer-close-v3"]
    assert [scene["task"] for scene in scenes] == ["reach-v3"] * 5 + ["drawer-close-v3"] * 5 + ends


def test_a_small_full_version(tmp_path):
    """Catches a policy of the long version that cannot be trained or evaluated, which shows after hours."""
    config = learn.LearnConfig(
        tasks="drawer-close-v3", episodes=5, steps=4, trials=1, saves=1, image_size=64, full=True, output=tmp_path
    )
    rows = learn.learn(config)
    ours = [f"π₀, seed {seed}" for seed in (1000, 1001, 1002)]
    others = ["ACT", "Diffusion Policy", f"{ours[0]}, LeRobot's renderer", "expert", "random actions"]
    assert [*rows] == ours + others
    assert all(row["all"]["trials"] == 1 for row in rows.values())
    assert rows["expert"]["all"]["successes"] == 1
    again = learn.train(learn.LearnConfig(**vars(config) | {"resume": True}), learn.ours(config)[ours[0]])
    assert again == 0, "it is trained already"
