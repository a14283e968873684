"""`lerobot-pi0 open-loop`: what it says about policies of which it is known what they learned.

The data are of a robot with three joints: the first goes where the instruction says, the second where the brightness
of the front camera says, the third where that of the left one says, and each a little where it stands.
"""

import json
import logging
import math
import re

import numpy as np
import pytest
import torch
from conftest import ACTION, CAMERAS, OBS_STATE, features
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from progress import bars

import lerobot_pi0.configuration_pi0 as configuration
from lerobot_pi0 import PI0Config, PI0Policy, make_pi0_pre_post_processors
from lerobot_pi0.network.sizes import GemmaSize, PaliGemmaSize, VisionSize
from lerobot_pi0.tools import main
from lerobot_pi0.tools.data import DatasetOptions
from lerobot_pi0.tools.evaluation.held_out import held_out
from lerobot_pi0.tools.evaluation.measure import by_step, partners, recorded_chunks, rms
from lerobot_pi0.tools.evaluation.predictions import spread_over
from lerobot_pi0.tools.evaluation.verdicts import ignored, verdicts

FRONT, LEFT = CAMERAS[:2]
TASKS = ("go to left", "stop right")  # of equal length: a policy without words could still count tokens
JOINTS, CHUNK, SIDE = 3, 4, 16
EPISODES, FRAMES = 20, 6

VLM = PaliGemmaSize(
    VisionSize(width=32, depth=1, mlp_dim=32, heads=2, patch_size=8, image_size=SIDE),
    GemmaSize(width=32, depth=2, mlp_dim=64, heads=4, head_dim=16),
    vocab_size=384,
)
EXPERT = GemmaSize(width=32, depth=2, mlp_dim=64, heads=4, head_dim=16)


@pytest.fixture(autouse=True)
def logs(monkeypatch, caplog) -> None:
    """The command sets logging up anew, which would take it away from pytest."""
    monkeypatch.setattr("lerobot_pi0.tools.init_logging", lambda: None)
    caplog.set_level(logging.INFO, "lerobot_pi0")


@pytest.fixture(autouse=True)
def presets(monkeypatch) -> None:
    monkeypatch.setitem(configuration.PALIGEMMA_PRESETS, "tiny", VLM)
    monkeypatch.setitem(configuration.EXPERT_PRESETS, "tiny", EXPERT)


def draw(count: int, seed: int) -> dict[str, torch.Tensor]:
    """What decides about the actions of so many scenes."""
    source = torch.Generator().manual_seed(seed)
    return {
        "word": torch.randint(0, 2, (count,), generator=source),
        FRONT: torch.rand(count, generator=source),
        LEFT: torch.rand(count, generator=source),
        OBS_STATE: torch.rand(count, JOINTS, generator=source) * 2 - 1,
    }


def target(scene: dict[str, torch.Tensor]) -> torch.Tensor:
    """Where the joints go, (scenes, joints)."""
    wanted = torch.stack([scene["word"] * 2 - 1.0, scene[FRONT] * 3 - 1.5, scene[LEFT] * 3 - 1.5], dim=1)
    return wanted + 0.5 * scene[OBS_STATE]


def grey(value: torch.Tensor) -> torch.Tensor:
    return value[:, None, None, None].expand(-1, 3, SIDE, SIDE).contiguous()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A recorded dataset, a scene per episode; the state wanders a little."""
    root = tmp_path_factory.mktemp("open_loop") / "data"
    names = ["pan", "lift", "grip"]
    vector = {"dtype": "float32", "shape": (JOINTS,), "names": names}
    image = {"dtype": "image", "shape": (SIDE, SIDE, 3), "names": ["height", "width", "channels"]}
    columns = {OBS_STATE: vector, ACTION: vector, FRONT: image, LEFT: image}
    dataset = LeRobotDataset.create("test/grey", fps=10, features=columns, root=root, use_videos=False)
    scenes = draw(EPISODES, seed=5)
    for episode in range(EPISODES):
        for i in range(FRAMES):
            scene = {key: x[episode : episode + 1] for key, x in scenes.items()}
            scene[OBS_STATE] = scene[OBS_STATE] + 0.1 * math.sin(i + episode)
            pictures = {
                key: (grey(scene[key])[0] * 255).round().byte().permute(1, 2, 0).numpy() for key in (FRONT, LEFT)
            }
            vectors = {OBS_STATE: scene[OBS_STATE][0].numpy(), ACTION: target(scene)[0].numpy()}
            dataset.add_frame(pictures | vectors | {"task": TASKS[int(scene["word"])]})
        dataset.save_episode()
    dataset.finalize()
    return root


def make_policy(seed: int = 0) -> PI0Policy:
    torch.manual_seed(seed)
    config = PI0Config(
        **features((FRONT, LEFT), JOINTS, SIDE), paligemma_variant="tiny", action_expert_variant="tiny", device="cpu",
        max_state_dim=4, max_action_dim=4, chunk_size=CHUNK, n_action_steps=CHUNK, tokenizer_max_length=16,
        num_inference_steps=5,
    )  # fmt: skip
    return PI0Policy(config, dataset_stats=UNIT)


UNIT = {key: {"mean": torch.zeros(JOINTS), "std": torch.ones(JOINTS)} for key in (OBS_STATE, ACTION)}


def save(policy: PI0Policy, folder, **training) -> None:
    policy.save_pretrained(folder)
    for pipeline in make_pi0_pre_post_processors(policy.config, UNIT):
        pipeline.save_pretrained(folder)
    data = DatasetConfig("test/grey", **{"eval_split": 0.4, **training})
    TrainPipelineConfig(dataset=data, policy=policy.config)._save_pretrained(folder)


def open_loop(policy, data, output, *more: str) -> dict:
    where = ["--dataset.repo_id=test/grey", f"--dataset.root={data}", f"--policy.path={policy}"]
    assert main(["open-loop", *where, f"--output_dir={output}", *more]) == 0
    return json.loads((output / "report.json").read_text())


# --- four policies ------------------------------------------------------------------------------------------


def train(folder, steps: int, shuffled: str | None = None) -> None:
    """A policy that has seen `steps` batches; what is shuffled among their scenes tells it nothing."""
    policy = make_policy()
    preprocessor, _ = make_pi0_pre_post_processors(policy.config, UNIT)
    policy.train()
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        scene = draw(32, seed=1000 + step)
        actions = target(scene)[:, None].expand(-1, CHUNK, -1)
        if shuffled is not None:
            scene[shuffled] = scene[shuffled].roll(1)
        batch = {key: grey(scene[key]) for key in (FRONT, LEFT)} | {OBS_STATE: scene[OBS_STATE], ACTION: actions}
        loss, _ = policy.forward(preprocessor(batch | {"task": [TASKS[i] for i in scene["word"]]}))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    save(policy.eval(), folder)


FOUR = {
    "good": (400, None, ["good"]),
    "blind": (400, LEFT, ["ignores the camera left"]),
    "deaf": (400, "word", ["ignores the instruction"]),
    "untrained": (1, None, ["has not learned"]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "shuffled", "said"), FOUR.values(), ids=FOUR)
def test_which_is_which(data, tmp_path, steps, shuffled, said):
    """Catches a policy that is told it is good and is not, or the other way round: all four are really trained."""
    torch.set_num_threads(1)
    train(tmp_path / "policy", steps, shuffled)
    content = open_loop(tmp_path / "policy", data, tmp_path / "report")
    print(json.dumps({k: content[k] for k in ("error", "way", "reactions", "verdicts")}))
    found = [verdict for verdict in content["verdicts"] if verdict.startswith(("good", "ignores", "has not"))]
    if steps > 1:
        assert [verdict.split(":")[0] for verdict in found] == said
    else:
        assert found[0].startswith(*said)


# --- policies without an input ------------------------------------------------------------------------------


def without_words(policy: PI0Policy) -> None:
    policy.model.vlm.embed_tokens.weight.zero_()


def without_pictures(policy: PI0Policy) -> None:
    policy.model.paligemma["multi_modal_projector"]["linear"].weight.zero_()


def without_state(policy: PI0Policy) -> None:
    policy.model.state_proj.weight.zero_()


CUT = {
    "instruction": (without_words, {"instruction"}),
    "cameras": (without_pictures, {"camera front", "camera left", "camera front, black", "camera left, black"}),
    "state": (without_state, {"state", "state, frozen"}),
}


@pytest.mark.parametrize(("cut", "dead"), CUT.values(), ids=CUT)
def test_what_is_cut_is_ignored(data, tmp_path, cut, dead):
    """Catches an exchange that exchanges something else, or noise that differs: dead inputs move nothing at all."""
    policy = make_policy()
    with torch.no_grad():
        cut(policy)
    save(policy, tmp_path / "policy")
    content = open_loop(tmp_path / "policy", data, tmp_path / "report", "--observations=27")
    moved = {name for name, reaction in content["reactions"].items() if reaction["moves"] > 0}
    assert {*content["reactions"]} - moved == dead
    for name in dead:
        assert "," in name or any(verdict.startswith(f"ignores the {name}") for verdict in content["verdicts"])
        assert content["reactions"][name]["error"] == pytest.approx(content["error"]["policy"])


def test_the_report(data, tmp_path, capsys):
    """Catches a page without a chart, numbers of no episode or that differ from run to run, and silence meanwhile."""
    save(make_policy(), tmp_path / "policy")
    content = open_loop(tmp_path / "policy", data, tmp_path / "a", "--plots=2", "--observations=18", "--json")
    said = capsys.readouterr()
    assert json.loads(said.out) == content
    assert bars(said.err) >= {"frames", "chunks", "exchanged inputs", "ways to shrink pictures"}
    page = (tmp_path / "a/report.html").read_text()
    assert page.count("<svg") == 1 + 2 * JOINTS and page.count('class="bar"') == len(content["reactions"]) - 1
    rough = content["roughness"]
    for joint in ("pan", "lift", "grip"):
        assert f"<td>{joint}</td><td>{rough[joint]['sampled']:.3g}</td><td>{rough[joint]['recorded']:.3g}</td>" in page
    shown = [str(e) for e in content["episodes"][:2]]
    assert re.findall(r"<h3>Episode (\d+)</h3>", page) == 2 * shown, "where it looks, and what it predicts"
    assert page.count("data:image/png") == page.count("<figcaption>frame ") == 2 * FRAMES
    assert len(content["error by step"]["policy"]) == CHUNK and {*content["error by joint"]} == {"pan", "lift", "grip"}
    again = open_loop(tmp_path / "policy", data, tmp_path / "b", "--plots=2", "--observations=18", "--batch_size=4")
    for name in ("error", "way", "reactions"):
        flat = [json.dumps(x[name]) for x in (content, again)]
        numbers = [np.array(re.findall(r"\d+\.\d+(?:e-\d+)?", x), float) for x in flat]
        assert np.allclose(*numbers, rtol=1e-3, atol=1e-5), name
    other = open_loop(tmp_path / "policy", data, tmp_path / "c", "--seed=1", "--observations=18")
    assert other["error"]["policy"] != content["error"]["policy"]
    assert other["error"]["hold still"] == content["error"]["hold still"]


def test_baselines(data, tmp_path):
    """Catches a baseline that is not what its name says: both are computed here from the dataset's columns."""
    save(make_policy(), tmp_path / "policy")
    content = open_loop(tmp_path / "policy", data, tmp_path / "report", "--dataset.episodes=[3,7]", "--observations=4")
    dataset = LeRobotDataset("test/grey", root=data, episodes=[3, 7])
    table = dataset.hf_dataset.with_format("numpy")[:]
    action, state, episode = (np.stack(table[key]) for key in (ACTION, OBS_STATE, "episode_index"))
    scale, still, mean = 1.0, [], []  # the policy's processors say that the actions of training had the deviation 1
    for row in [0, 3, 7, 10]:  # two per episode; in the second episode, 0.618 of a step later
        for step in range(CHUNK):
            if row + step < len(action) and episode[row + step] == episode[row]:
                still.append(((state[row] - action[row + step]) / scale) ** 2)
                mean.append(((action.mean(axis=0) - action[row + step]) / scale) ** 2)
    assert content["error"]["hold still"] == pytest.approx(np.sqrt(np.mean(still)), rel=1e-4)
    assert content["error"]["mean action"] == pytest.approx(np.sqrt(np.mean(mean)), rel=1e-4)


def test_held_out(data, tmp_path):
    """Catches episodes of training that are passed off as held out."""
    policy = make_policy()
    options = DatasetOptions("test/grey", str(data))
    meta = LeRobotDatasetMetadata("test/grey", root=data)
    by_task: dict[str, list[int]] = {}
    for episode in range(EPISODES):
        by_task.setdefault(meta.episodes["tasks"][episode][0], []).append(episode)
    expected = sorted(e for group in by_task.values() for e in group[len(group) - math.ceil(0.4 * len(group)) :])
    save(policy, tmp_path / "split")
    for name, training, episodes, origin in (
        ("split", {}, expected, "eval_split=0.4"),
        ("subset", {"eval_split": 0.0, "episodes": list(range(18))}, [18, 19], "left out"),
        ("all", {"eval_split": 0.0}, [18, 19], "NOT held out"),
    ):
        save(policy, tmp_path / name, **training)
        policy.config.pretrained_path = tmp_path / name
        found, said = held_out(policy.config, options, meta)
        assert found == episodes and origin in said
    other = DatasetOptions("test/other", str(data))
    found, said = held_out(policy.config, other, meta)
    assert found == list(range(EPISODES)) and "another dataset than that of training (test/grey)" in said
    save(policy, tmp_path / "rooted", root=str(data / "meta" / ".."))
    policy.config.pretrained_path = tmp_path / "rooted"
    assert held_out(policy.config, other, meta)[0] == expected, "any name goes with a folder"


def test_actions_of_one_dim():
    """Catches chunks of scalars, which LeRobot makes of actions of one dim, and which are spread over all steps."""
    items = [{ACTION: torch.arange(3.0), f"{ACTION}_is_pad": torch.zeros(3, dtype=torch.bool)}] * 2
    chunks, valid = recorded_chunks(items)
    assert chunks.shape == (2, 3, 1) and valid.shape == (2, 3)


# --- parts --------------------------------------------------------------------------------------------------


def test_steps_that_were_not_recorded_do_not_count():
    """Catches an error that the padding at the end of an episode adds to."""
    squares = np.array([[[4.0], [9.0]], [[16.0], [1e6]]])
    valid = np.array([[True, True], [True, False]])
    assert rms(squares, valid) == pytest.approx(math.sqrt(29 / 3))
    assert by_step(squares, valid) == pytest.approx([math.sqrt(10), 3])


def test_observations_are_spread_and_exchanged_between_episodes():
    """Catches observations of one episode alone, and an exchange with the same scene."""
    episode = np.repeat([4, 5, 9], [10, 20, 3])
    rows = spread_over(episode, 9)
    assert [int((episode[rows] == e).sum()) for e in (4, 5, 9)] == [3, 3, 3]
    assert len({*rows.tolist()}) == 9
    assert (episode[rows][partners(episode[rows], 0)] != episode[rows]).all()
    assert len({*spread_over(np.arange(1000), 7).tolist()}) == 7
    alone = partners(np.zeros(5), 0)
    assert (alone != np.arange(5)).all()


def test_verdicts():
    """Catches a threshold that is compared the wrong way round, and a silent policy that only holds still."""
    reactions = {
        name: {"of everything": x, "error": 0.5, "moves": x}
        for name, x in (("everything", 1.0), ("instruction", 0.19), ("camera a, black", 0.0), ("state", 0.2))
    }
    content = {
        "error": {"policy": 0.3, "hold still": 1.0, "mean action": 0.9}, "way": 0.9, "threshold": 0.05,
        "reactions": reactions, "ignored": [], "episodes seen": 8, "ratio": 0.33,
        "interval": (0.3, 0.4), "delay": (0, 1.0), "rattling": [], "roughness": {"pan": {"times": 2.34}},
    }  # fmt: skip
    assert ignored(content) == []
    assert verdicts(content)[0].startswith("good")
    still = verdicts(content | {"way": 0.1, "error": content["error"] | {"policy": 0.88}, "interval": (0.95, 1.0)})
    assert [verdict.split(":")[0] for verdict in still] == ["has not learned these movements", "barely moves"]
    reactions["instruction"]["error"] = 0.3
    assert ignored(content) == ["instruction"]
    reactions["instruction"] |= {"of everything": 0.21}
    assert ignored(content) == []
    reactions["instruction"] |= {"of everything": 0.04, "error": 0.5}
    assert ignored(content) == ["instruction"]
    assert (
        "ignores the instruction: exchanged, it moves the chunk by 4.0%"
        in verdicts(content | {"ignored": ["instruction"]})[0]
    )
    rough = verdicts(content | {"rattling": ["pan"]})
    assert [verdict.split(":")[0] for verdict in rough] == ["good", "rattles"]
    assert "by a factor of pan 2.3." in rough[1]
    del reactions["instruction"]
    assert [verdict.split(":")[0] for verdict in verdicts(content)] == ["good", "cannot be asked whether it listens"]


def test_refusals(data, tmp_path, caplog):
    """Catches a traceback, or minutes of work, before it is said that a report cannot be made."""
    save(make_policy(), tmp_path)
    where = ["--dataset.repo_id=test/grey", f"--dataset.root={data}"]
    assert main(["open-loop", *where, "--policy.type=pi0"]) == 1
    assert "without weights" in caplog.text
    assert main(["open-loop", *where, f"--policy.path={tmp_path}", "--dataset.episodes=[99]"]) == 1
