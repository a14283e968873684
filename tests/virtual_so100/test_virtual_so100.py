"""The virtual SO-100 (examples/virtual_so100): environment, experts, data, scores."""

import importlib.metadata
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

package = pytest.importorskip(
    "lerobot_env_virtual_so100", reason="pip install -e examples/virtual_so100 (make setup does)"
)

import needs_rendering  # noqa: E402, F401
from lerobot.datasets import LeRobotDatasetMetadata  # noqa: E402
from lerobot.envs.factory import make_env, make_env_config  # noqa: E402
from lerobot.envs.utils import NEW_ROLLOUT_OPTION, env_to_policy_features  # noqa: E402
from lerobot_env_virtual_so100 import constants, demo, record, score, so100  # noqa: E402
from lerobot_env_virtual_so100.demonstrations import Demonstrator, cubes_shown  # noqa: E402
from lerobot_env_virtual_so100.env import VirtualSO100GymEnv  # noqa: E402
from lerobot_env_virtual_so100.experts import make_expert  # noqa: E402
from lerobot_env_virtual_so100.tasks import make_task  # noqa: E402
from progress import bars  # noqa: E402

SCENES = (0, 1)
EPISODES = sum(len(cubes_shown("reach", "train", seed)) for seed in SCENES)
DELTAS = {"action": [step / constants.FPS for step in range(50)]}


@pytest.fixture(scope="module")
def dataset_root(tmp_path_factory):
    """Two scenes of reach, written as two workers do it and joined (in this process: starting two takes long)."""
    root = tmp_path_factory.mktemp("data") / "reach"
    config = record.RecordConfig(root=root, episodes=EPISODES, workers=2)
    shards = record._shards(config)
    for shard in shards:
        record.write_shard(config, *shard, lambda _: None)
    record.join(config.repo_id, [folder for folder, _ in shards], root)
    return root


def expert_episode(env, seed):
    """Final info of an episode driven by the expert."""
    env.reset(seed=seed)
    expert = make_expert(env.task, env.simulation, constants.FPS)
    expert.reset(env.instructed)
    over = False
    while not over:
        _, _, terminated, truncated, info = env.step(expert.act())
        over = terminated or truncated
    return info


def test_discovered_and_cheap():
    """LeRobot looks for the literal prefix in metadata; an import that pulled in MuJoCo would slow every command."""
    assert importlib.metadata.metadata("lerobot_env_virtual_so100")["Name"] == "lerobot_env_virtual_so100"
    code = (
        "import sys, lerobot.envs.configs; had = set(sys.modules); import lerobot_env_virtual_so100;"
        "new = set(sys.modules) - had - set(sys.stdlib_module_names);"
        "assert {n.split('.')[0] for n in new} == {'lerobot_env_virtual_so100'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_seeds_decide_everything():
    """A scene that depends on anything but (split, seed), so that runs are compared on different scenes."""
    env = VirtualSO100GymEnv()
    observations = []
    for _ in range(2):
        env.reset(seed=7)
        for _ in range(3):
            observation, *_ = env.step(np.array([10.0, -20.0, 30.0, 80.0, 90.0, 40.0]))
        observations.append((observation, env.task_description))
        env.reset(seed=8)
        assert env.layout != observations and env.layout.seed == 8
    (first, words), (second, same_words) = observations
    assert words == same_words
    np.testing.assert_array_equal(first["agent_pos"], second["agent_pos"])
    for camera in constants.CAMERAS:
        np.testing.assert_array_equal(first["pixels"][camera], second["pixels"][camera])


def test_splits_share_no_scene():
    """Evaluation on scenes that were trained on: equal seeds must give different scenes in every split."""
    for name in constants.EPISODE_SECONDS:
        task = make_task(name)
        scenes = [json.dumps(task.sample(split, seed).cubes) for split in constants.SPLITS for seed in range(200)]
        assert len(set(scenes)) == len(scenes)
    with pytest.raises(ValueError, match="test is for evaluation"):
        record.RecordConfig(root="/nowhere", split="test")


def test_starts_are_within_the_joints_limits():
    """A posture that the person at the leader is to bring the arm to, for ever, because a joint does not go there."""
    env = VirtualSO100GymEnv(pixels=False)
    arm = env.simulation.arm
    for seed in range(10_000, 10_040):
        start = env._task.sample("train", seed).start(arm)
        assert (arm.low <= start).all() and (start <= arm.high).all(), seed


def test_cameras_see_what_they_must():
    """A camera that is dark, upside down or blind to a cube: each cube's colour shows in both pictures."""
    env = VirtualSO100GymEnv()
    observation, _ = env.reset(seed=0)
    for picture in observation["pixels"].values():
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
        rgb = picture.astype(int)
        for channel in range(3):
            others = np.delete(rgb, channel, axis=2).max(axis=2)
            assert (rgb[..., channel] > others + 60).sum() >= 6
        assert rgb[:6].mean() < rgb[-20:].mean()  # dark backdrop above, lit table below
    assert env.render().shape == (224, 448, 3)


def test_units_are_those_of_the_follower():
    """Radians or a -1..1 gripper leaking out: the arm holds a posture given in degrees and 0..100."""
    env = VirtualSO100GymEnv(pixels=False)
    env.reset(seed=0)
    posture = np.array([20.0, -15.0, 25.0, 70.0, 80.0, 30.0])
    for _ in range(25):
        observation, *_ = env.step(env.simulation.arm.hold(posture))
    np.testing.assert_allclose(observation["agent_pos"], posture, atol=1.0)
    joint = env.simulation.data.joint("shoulder_pan").qpos[0]
    assert np.degrees(joint) == pytest.approx(observation["agent_pos"][0], abs=1e-3)
    np.testing.assert_allclose(env.action_space.high[-1], 100.0)
    with pytest.raises(ValueError, match="finite"):
        env.step(np.full(6, np.nan))


@pytest.mark.parametrize(("task", "episodes"), [("reach", 8), ("hover", 8), ("pick_place", 3)])
def test_expert_succeeds_and_random_fails(task, episodes, capsys):
    """A task nobody can do or anybody does: no success rate on it would mean anything."""
    env = VirtualSO100GymEnv(task, pixels=False)
    assert all(expert_episode(env, seed)["is_success"] for seed in range(episodes))
    config = score.ScoreConfig(task=task, controls=["random"], episodes=3)
    assert score.score(config)["random"]["successes"] == 0
    assert "random actions" in bars(capsys.readouterr().err)


def test_swapped_instruction_names_another_cube(tmp_path):
    """An evaluation of grounding that prompts for the same cube, or judges success at the wrong one."""
    results = tmp_path / "results.jsonl"
    env = VirtualSO100GymEnv(instruction="swapped", pixels=False, results=str(results))
    info = expert_episode(env, 3)
    assert info["is_success"] and info["ended_at"] == info["instructed"] != info["target"]
    line = json.loads(results.read_text())
    assert line["seed"] == 3 and line["instructed"] in line["prompt"] and line["target"] not in line["prompt"]
    with pytest.raises(ValueError, match="more than one cube"):
        VirtualSO100GymEnv("pick_place", instruction="swapped")


def test_vector_environment_as_lerobot_uses_it():
    """Success told before the end (lerobot-eval takes any step's), or a scene that changes under the last frame."""
    config = make_env_config("virtual_so100", episode_length=4)
    vector = make_env(config, n_envs=2)[config.type][0]
    observation, _ = vector.reset(seed=[1, 2], options={NEW_ROLLOUT_OPTION: True})
    assert vector.call("_max_episode_steps")[0] == 4
    assert all("cube" in words for words in vector.call("task_description"))
    for step in range(6):
        observation, _, terminated, truncated, info = vector.step(observation["agent_pos"])
        assert not terminated.any() and not (truncated.any() and step < 3)
        assert not np.any(info["is_success"])
        if step == 3:
            assert truncated.all()
            last = observation["agent_pos"].copy()
    np.testing.assert_array_equal(observation["agent_pos"], last)
    vector.close()
    features = env_to_policy_features(config)
    assert features["observation.images.left"].shape == (3, 64, 64)
    assert features["observation.state"].shape == features["action"].shape == (6,)


def test_features_are_those_of_lerobot_record():
    """Names, order or shapes that a policy trained here could not take to a real arm."""
    from lerobot.cameras.opencv import OpenCVCameraConfig
    from lerobot.datasets import aggregate_pipeline_dataset_features, create_initial_features
    from lerobot.processor import make_default_processors
    from lerobot.robots.so_follower import SO100Follower, SO100FollowerConfig
    from lerobot.utils.feature_utils import combine_feature_dicts

    cameras = {
        name: OpenCVCameraConfig(index_or_path=i, width=64, height=64, fps=30)
        for i, name in enumerate(constants.CAMERAS)
    }
    robot = SO100Follower(SO100FollowerConfig(port="none", cameras=cameras))
    assert robot.name == record.ROBOT_TYPE and robot.config.use_degrees
    action_processor, _, observation_processor = make_default_processors()
    expected = combine_feature_dicts(
        aggregate_pipeline_dataset_features(
            action_processor, create_initial_features(action=robot.action_features), use_videos=False
        ),
        aggregate_pipeline_dataset_features(
            observation_processor,
            create_initial_features(observation=robot.observation_features),
            use_videos=False,
        ),
    )
    assert record.dataset_features(64) == expected


def test_recording_shows_its_progress(tmp_path, monkeypatch, capsys):
    """Catches an hour without a word."""
    monkeypatch.setattr(record, "write_shard", lambda config, root, seeds, progress: [progress(1) for _ in seeds])
    monkeypatch.setattr(record, "join", lambda *_: None)
    record.record(record.RecordConfig(root=tmp_path / "data", episodes=2, workers=1))
    assert bars(capsys.readouterr().err) == {"demonstrations"}


def test_dataset_reloads(dataset_root):
    """A dataset that LeRobot cannot read, or whose frames are not those of the simulator."""
    from lerobot.datasets import LeRobotDataset

    dataset = LeRobotDataset("local/virtual_so100", root=dataset_root, delta_timestamps=DELTAS)
    demonstrator = Demonstrator("reach", constants.FPS, 64, "train")
    episodes = [episode for seed in SCENES for episode in demonstrator.scene(seed)]
    assert (dataset.num_episodes, dataset.num_frames) == (EPISODES, sum(len(e.actions) for e in episodes))
    episode, at = episodes[0], 5
    left = len(episode.actions) - at
    item = dataset[at]
    assert item["task"] == episode.prompt
    torch.testing.assert_close(item["observation.state"], torch.from_numpy(episode.states[at]))
    torch.testing.assert_close(item["action"][:left], torch.from_numpy(episode.actions[at:]))
    assert item["action_is_pad"].tolist() == [False] * left + [True] * (50 - left)
    picture = torch.from_numpy(episode.images["left"][at]).permute(2, 0, 1) / 255
    torch.testing.assert_close(item["observation.images.left"], picture)


def test_what_was_joined_can_be_joined_again(dataset_root, tmp_path):
    """Episodes that name a metadata file which is not there, as LeRobot leaves them: joining fails, editing too."""
    from lerobot.datasets import LeRobotDataset

    record.join("local/twice", [dataset_root, dataset_root], tmp_path / "twice")
    twice = LeRobotDataset("local/twice", root=tmp_path / "twice")
    assert twice.num_episodes == 2 * EPISODES
    first, again = twice[0], twice[len(twice) // 2]
    assert torch.equal(first["action"], again["action"]) and first["task"] == again["task"]


def test_a_recording_that_is_killed_while_it_is_joined_leaves_nothing(dataset_root, tmp_path, monkeypatch):
    """Half a dataset, without statistics, where the next command looks for a whole one."""

    def kill(file):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(record, "_correct_file_index", kill)
        record.join("local/reach", [dataset_root], tmp_path / "reach")
    assert not (tmp_path / "reach").exists()
    record.join("local/reach", [dataset_root], tmp_path / "reach")
    assert LeRobotDatasetMetadata("local/reach", root=tmp_path / "reach").total_episodes == EPISODES
    assert [path.name for path in tmp_path.iterdir()] == ["reach"]


@pytest.mark.parametrize(
    ("written", "again"),
    [
        (["meta/info.json"], True),
        (["meta/info.json", "meta/scenes.jsonl"], False),
        (["meta/info.json", "meta/stats.json"], False),
    ],
    ids=["half joined", "complete", "somebody's own"],
)
def test_the_demo_records_again_what_is_not_complete(tmp_path, monkeypatch, written, again):
    """An older version joined in place: a demo that takes half of a dataset for a whole one fails in training. Or a
    dataset that is removed, because somebody put their own in the demo's place."""
    config = demo.DemoConfig(output=tmp_path)
    for name in written:
        (config.dataset / name).parent.mkdir(parents=True, exist_ok=True)
        (config.dataset / name).touch()
    runs = []
    monkeypatch.setattr(demo, "run", lambda title, command, log: runs.append(command) or 1.0)
    demo.record(config)
    assert len(runs) == again
    assert config.dataset.exists() != again


def test_each_scene_counts_once(tmp_path, monkeypatch):
    """Catches rates of the scenes that ended first, which are the solved ones: the last batch has more than were asked
    for."""
    solved = {seed: seed % 4 == 0 for seed in range(1000, 1050)}

    def run(title, command, log) -> float:
        order = sorted(solved, key=lambda seed: (seed >= 1025, not solved[seed]))
        rest = {"distance": 0.1, "ended_at": "red", "target": "red"}
        lines = [{"seed": seed, "is_success": solved[seed], **rest} for seed in order]
        (tmp_path / "named.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        return 1.0

    monkeypatch.setattr(demo, "run", run)
    found, _ = demo.evaluate(demo.DemoConfig(task="pick_place", scenes=30, output=tmp_path), "named")
    assert (found["successes"], found["episodes"]) == (sum(solved[seed] for seed in range(1000, 1030)), 30)


def test_nothing_of_somebody_elses_is_removed(tmp_path):
    """Catches a policy that is removed before it is rolled out, and a folder that is emptied because it was named."""
    policy = tmp_path / "train" / "pretrained_model"
    policy.mkdir(parents=True)
    (policy / "config.json").touch()
    with pytest.raises(ValueError, match=r"lies in --output=.*give another"):
        so100.SO100Config(policy=policy, output=tmp_path)
    with pytest.raises(SystemExit, match="holds other things than an earlier run"):
        so100.so100(so100.SO100Config(output=tmp_path))
    assert (policy / "config.json").exists()
    with pytest.raises(ValueError, match="--task must be one of reach, pick_place, not 'hover'"):
        so100.SO100Config(task="hover")


def test_streaming_gives_the_same_samples(dataset_root):
    """Streaming, which training uses for its speed, that repeats, drops or pads samples differently."""
    from lerobot.datasets import LeRobotDataset, StreamingLeRobotDataset

    mapped = LeRobotDataset("local/virtual_so100", root=dataset_root, delta_timestamps=DELTAS)
    streamed = StreamingLeRobotDataset("local/virtual_so100", root=dataset_root, delta_timestamps=DELTAS)
    items = {int(item["index"]): item for item in streamed}
    assert len(items) == len(mapped)
    for index in (0, 9, len(mapped) - 1):
        for key in ("action", "action_is_pad", "observation.state", "observation.images.front"):
            torch.testing.assert_close(items[index][key], mapped[index][key])


def test_scenes_show_all_their_instructions_and_replay(dataset_root):
    """One instruction a scene teaches to ignore words; episodes that do not replay show a hidden state."""
    scenes = [json.loads(line) for line in (dataset_root / record.SCENES_FILE).read_text().splitlines()]
    for seed in SCENES:
        shown = set(cubes_shown("reach", "train", seed))
        assert all(s["cubes"].keys() == shown for s in scenes if s["seed"] == seed)
        assert {s["target"] for s in scenes if s["seed"] == seed} == shown
        assert len({(*s["start_point"], *s["start_noise"]) for s in scenes if s["seed"] == seed}) == 1
    config = score.ScoreConfig(controls=["replay", "mean"], dataset=dataset_root, episodes=4)
    scores = score.score(config)
    assert scores["replay"]["successes"] == 4 and scores["mean"]["successes"] == 0


def test_wilson_interval():
    """An interval that is wrong where it matters, at no and at all successes (values of Wilson's formula)."""
    np.testing.assert_allclose(score.wilson(0, 100), (0.0, 0.0370), atol=5e-4)
    np.testing.assert_allclose(score.wilson(48, 50), (0.8654, 0.9890), atol=5e-4)
    with pytest.raises(ValueError, match="no trials"):
        score.wilson(0, 0)
