"""MetaWorld's example without MetaWorld: schema, seeds, blocks that are resumed, groups, intervals, commands."""

import json
import re
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from lerobot.configs import FeatureType
from lerobot.utils.feature_utils import dataset_to_policy_features
from lerobot_env_metaworld_small import evaluate, learn, policies, record, report, seeds, tasks, words
from lerobot_env_metaworld_small.configuration_metaworld_small import MetaworldSmallEnv
from lerobot_env_metaworld_small.record import RecordConfig
from transformers import PreTrainedTokenizerFast

from lerobot_pi0 import PI0Config
from lerobot_pi0.inputs.steps import PI0TokenizerStep
from lerobot_pi0.network.sizes import BYTE_VOCAB

TEN = [
    "peg-unplug-side-v3", "peg-insert-side-v3", "sweep-into-v3", "basketball-v3", "pick-out-of-hole-v3", "push-v3",
    "pick-place-v3", "stick-push-v3", "stick-pull-v3", "disassemble-v3",
]  # fmt: skip


def test_the_policy_knows_the_environments_observation_without_a_rename():
    """A name or shape in the data that LeRobot's environment does not have: lerobot-eval would ask for a rename."""
    env = MetaworldSmallEnv(image_size=32)
    shown = {env.features_map[key] for key in env.features}
    found = dataset_to_policy_features(record.features(32))
    assert {key: x.shape for key, x in found.items()} == {
        "observation.image": (3, 32, 32),
        "observation.state": (4,),
        "observation.environment_state": (39,),
        "action": (4,),
    }
    assert found.keys() - shown == {"observation.environment_state"}
    assert found["observation.environment_state"].type is FeatureType.ENV


def test_seeds_of_data_choosing_and_reporting_share_none():
    """A scene that is trained on and evaluated on: its success would not be that of an unseen scene."""
    assert not {*seeds.DATA} & {*seeds.CHOOSING} and not {*seeds.CHOOSING} & {*seeds.REPORTED}
    assert not {*seeds.DATA} & {*seeds.REPORTED}
    used = [seed for episode in range(seeds.MAX_EPISODES) for seed in seeds.of_episode(episode)]
    assert len(used) == len({*used}) and {*used} <= {*seeds.DATA}
    with pytest.raises(ValueError, match="at most 1000 episodes"):
        seeds.of_episode(seeds.MAX_EPISODES)


def test_every_task_has_one_difficulty():
    """A task that is in no group, or in two: means over groups would leave it out, or count it twice."""
    everything = tasks.parse("easy,medium,hard,very_hard")
    assert everything == tasks.parse("all") and len(everything) == 50
    assert sum(len(each) for _, each in tasks.by_difficulty(everything)) == 50
    assert tasks.parse("reach-v3, reach-v3,hard")[0] == "reach-v3" and len(tasks.parse("reach-v3,reach-v3")) == 1
    assert [name for name, _ in tasks.by_difficulty(tasks.parse(tasks.FIVE))] == ["easy", "hard"]
    with pytest.raises(ValueError, match="no task 'reach'"):
        tasks.parse("reach")


def test_a_task_may_have_its_own_number_of_episodes():
    """Hard tasks with as few demonstrations as easy ones; or a number that is lost because a group comes later."""
    found = tasks.demonstrations("reach-v3:12,easy, pick-place-v3 : 7", 3)
    assert (found["reach-v3"], found["door-open-v3"], found["pick-place-v3"], len(found)) == (12, 3, 7, 29)
    config = RecordConfig(Path("x"), tasks="reach-v3:12,push-v3", episodes=6)
    planned = [(block.task, len(block.episodes)) for block in record.blocks(config)]
    assert planned == [("reach-v3", 5), ("push-v3", 5), ("reach-v3", 5), ("push-v3", 1), ("reach-v3", 2)]
    for wrong in ("reach-v3:", "reach-v3:0", "reach-v3:x"):
        with pytest.raises(ValueError, match="number of episodes"):
            tasks.parse(wrong)
    with pytest.raises(ValueError, match="1001 episodes of push-v3"):
        RecordConfig(Path("x"), tasks="reach-v3,push-v3:1001")


def test_the_ten_tasks_stay():
    """Ten other tasks than those that were drawn before the first training: results could not be compared."""
    found = tasks.parse("ten")
    assert [(name, len(each)) for name, each in tasks.by_difficulty(found)] == [
        ("easy", 1), ("medium", 3), ("hard", 3), ("very_hard", 3),
    ]  # fmt: skip
    assert found == TEN


def test_tasks_are_recorded_in_turns(tmp_path):
    """Blocks task after task: a reader that shuffles near files would show one task for thousands of steps."""
    config = RecordConfig(tmp_path / "data", tasks="reach-v3,push-v3", episodes=7)
    found = list(record.blocks(config))
    assert [block.task for block in found] == ["reach-v3", "push-v3"] * 2
    assert [[*block.episodes] for block in found[::2]] == [[0, 1, 2, 3, 4], [5, 6]]


class Here:
    """A pool that works at once, in this process."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def shutdown(self, **_):
        pass

    def submit(self, function, *arguments):
        future: Future = Future()
        try:
            future.set_result(function(*arguments))
        except KeyboardInterrupt as error:
            future.set_exception(error)
        return future


def test_a_killed_recording_goes_on(tmp_path, monkeypatch):
    """A second start that records complete blocks again, or takes an unfinished one for complete."""
    config, written, joined = RecordConfig(tmp_path / "data", episodes=12), [], []

    def write(config, block):
        if len(written) == 2:
            (tmp_path / "data.parts" / "reach-v3_10_12.unfinished").mkdir()
            raise KeyboardInterrupt
        written.append(block.episodes)
        block.folder(config).mkdir()
        return len(block.episodes)

    def join(repo_id, roots, target, notes):
        joined.extend(root.name for root in roots)
        (target / "meta").mkdir(parents=True)
        for path, text in {record.SCENES_FILE: "", **notes}.items():
            (target / path).write_text(text)

    monkeypatch.setattr(record, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(record, "write_block", write)
    monkeypatch.setattr(record, "join", join)
    with pytest.raises(KeyboardInterrupt):
        record.record(config)
    with pytest.raises(ValueError, match="other options"):
        record.record(RecordConfig(tmp_path / "data", episodes=12, hold=5))
    written[:] = written[1:]  # the third block is written now
    record.record(config)
    assert [[*each] for each in written] == [[5, 6, 7, 8, 9], [10, 11]]
    assert joined == ["reach-v3_0_5", "reach-v3_5_10", "reach-v3_10_12"]
    record.record(config)  # complete: nothing is done
    assert len(written) == 2 and not (tmp_path / "data.parts").exists()
    for other in ({"episodes": 11}, {"zoom": 1.0}, {"tasks": "push-v3"}):
        with pytest.raises(ValueError, match=r"data was recorded with other options.*give those"):
            record.record(RecordConfig(tmp_path / "data", **{"episodes": 12, **other}))
    note = tmp_path / "data" / record.NOTE
    made = json.loads(note.read_text())
    del made["smooth"]  # no option brings back the pictures of version 0.4.0
    note.write_text(json.dumps(made))
    with pytest.raises(ValueError, match="pictures are those of another version: remove it"):
        record.record(config)
    note.unlink()
    with pytest.raises(ValueError, match="older version"):
        record.record(config)
    (tmp_path / "begun.parts" / "reach-v3_0_5").mkdir(parents=True)  # its pictures show something else
    with pytest.raises(ValueError, match=r"begun\.parts was recorded with other options \(of an older version\)"):
        record.record(RecordConfig(tmp_path / "begun", episodes=12))


def test_means_of_groups_and_their_interval():
    """A mean over tasks in place of groups: 28 easy tasks would outweigh 5 very hard ones."""
    found = {"reach-v3": [True] * 10, "door-open-v3": [True] * 10, "pick-place-v3": [False] * 10}
    row = report.summary(found)
    assert row["mean_of_groups"]["rate"] == 0.5 and row["all"]["rate"] == pytest.approx(2 / 3)
    assert row["groups"]["easy"]["successes"] == 20 and row["groups"]["hard"]["trials"] == 10
    mixed = {"reach-v3": [True] * 10 + [False] * 10, "pick-place-v3": [True] * 5 + [False] * 15}
    low, high = report.bootstrap(mixed)
    assert low < report.mean_of_groups(mixed) == 0.375 < high and high - low > 0.2
    text = report.table({"π₀": row, "random actions": row})
    assert "pick-place-v3" in text and "10/10 (72 – 100 %)" in text and "50.0%" in text


def test_shares_of_processes():
    """A task that no process evaluates, or two do."""
    whole = evaluate.Evaluation(("a", "b", "c"), 20, 0, 128, 2)
    assert [share.tasks for share in whole.shares()] == [("a", "c"), ("b",)]
    assert len(evaluate.Evaluation(("a",), 20, 0, 128, 2).shares()) == 1


def test_pictures_are_drawn_where_a_policy_looks(tmp_path):
    """Catches old pictures for a policy that looks more often than it begins a chunk, or at pictures of the past."""
    acting = {"type": "act", "n_action_steps": 10, "n_obs_steps": 1, "temporal_ensemble_coeff": None}
    for config, expected in (
        ({"type": "pi0", "n_action_steps": 7, "n_obs_steps": 1}, 7),
        (acting, 10),
        (acting | {"temporal_ensemble_coeff": 0.01, "n_action_steps": 1}, 1),
        ({"type": "diffusion", "n_action_steps": 8, "n_obs_steps": 2}, 1),
        ({"type": "somebodys", "n_action_steps": 8}, 1),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert evaluate.looks_every(tmp_path) == expected
    with pytest.raises(ValueError, match="draw_every=0"):
        MetaworldSmallEnv(task="reach-v3", draw_every=0)


def test_words_are_tokens(tmp_path):
    """Catches sentences that share their tokens, words in pieces, a text without tokens, ids beyond the network's."""
    sentences = [*map(tasks.instruction, tasks.parse("easy,medium,hard,very_hard"))]
    step = PI0TokenizerStep(tokenizer_name=str(words.save_tokenizer(sentences, tmp_path / "tokenizer")))
    found = [step.input_tokenizer(f"{sentence}\n")["input_ids"] for sentence in sentences]
    assert len({*map(tuple, found)}) == len({*sentences}) == 49
    assert all(len(ids) <= 1 + len(re.findall(r"\w+|[^\w ]", each)) for ids, each in zip(found, sentences, strict=True))
    assert max(map(max, found)) < BYTE_VOCAB and min(map(min, found)) > step.input_tokenizer.pad_token_id
    for text in ("open the Door\n", "öffne die Tür, 3 mal\n"):
        assert step.input_tokenizer.decode(step.input_tokenizer(text)["input_ids"]).strip() == text.lower().strip()
    carried = PI0TokenizerStep(tokenizer_name="nowhere")
    carried.load_state_dict(step.state_dict())
    assert carried.input_tokenizer(sentences[7]) == step.input_tokenizer(sentences[7])
    # Where there are more words than tokens, the most frequent ones are kept.
    few = PreTrainedTokenizerFast.from_pretrained(
        words.save_tokenizer([*sentences, *["zzz yyy"] * 60], tmp_path / "few", vocabulary=260)
    )
    assert {*few.get_vocab()} >= {"Ġzzz", "Ġyyy"} and "Ġdial" not in few.get_vocab() and len(few) == 260


def test_what_lerobot_eval_wrote():
    """Successes read under another task's name."""
    entries = [{"task_group": x, "task_id": 0, "metrics": {"successes": y}} for x, y in (("b", [0, 1]), ("a", [1, 1]))]
    assert evaluate.successes({"per_task": entries}, ("a", "b")) == {"a": [True, True], "b": [False, True]}
    with pytest.raises(ValueError, match="nothing of c"):
        evaluate.successes({"per_task": entries}, ("c",))


def test_what_cannot_be_trained_is_refused_before_anything_is_recorded():
    """Options at which lerobot-train stops, half an hour later."""
    for options, says in (
        ({"chunk_size": 4}, "--n_action_steps=5 has to be between 1 and --chunk_size=4"),
        ({"image_size": 100}, "take 96 or 112"),
    ):
        with pytest.raises(ValueError, match=says):
            learn.LearnConfig(**options)


@pytest.mark.parametrize("rate", [8e-4, 2.5e-4, 2.5e-5])
def test_the_learning_rate_is_the_one_that_was_chosen(rate, tmp_path):
    """LeRobot's defaults, which the recipe takes for nobody's choice."""
    options = policies.pi0(learn.LearnConfig(output=tmp_path).training("pi0"), rate)
    names = ("recipe", "optimizer_lr", "scheduler_decay_lr")
    config = PI0Config(**{name: options[f"policy.{name}"] for name in names})
    assert (config.optimizer_lr, config.scheduler_decay_lr) == pytest.approx((rate, rate / 100), rel=1e-12)


@pytest.mark.parametrize(("steps", "saves"), [(12000, 4), (12000, 7), (3, 4), (10, 3)])
def test_checkpoints_of_a_curve(steps, saves, tmp_path):
    """A checkpoint more than was asked for, a few steps before the last."""
    every = learn.LearnConfig(steps=steps, saves=saves, output=tmp_path).training("pi0").options()["save_freq"]
    assert len({*range(every, steps, every), steps}) <= saves


def test_an_interrupted_training_goes_on(tmp_path, monkeypatch):
    """A night's checkpoints that are removed, other options than those that were trained with, ACT's number of steps
    measured anew, or a finished run that is trained again."""
    told: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(learn, "run", lambda title, command, *_, **__: told.append((title, command)) or 7.0)

    def saved(run: str, step: int, **options) -> Path:
        folder = tmp_path / run / "checkpoints" / f"{step:06}" / "pretrained_model"
        folder.mkdir(parents=True)
        (folder / "train_config.json").write_text(json.dumps(options))
        return folder

    def options_of(**chosen) -> tuple[learn.LearnConfig, dict]:
        config = learn.LearnConfig(steps=500, output=tmp_path, resume=True, **chosen)
        return config, policies.pi0(config.training("pi0"), config.learning_rate)

    begun = {"steps": 500, "batch_size": 16, "seed": 1000}
    saved("pi0", 125, **begun)
    last = saved("pi0", 250, **begun)
    assert learn.train(*options_of()) == 7
    assert told.pop() == (
        "pi0: training steps 250 to 500",
        ["lerobot-train", f"--config_path={last / 'train_config.json'}", "--resume=true"],
    )
    with pytest.raises(ValueError, match="trained with seed=1000, and seed=1001 is asked for: leave --resume out"):
        learn.train(*options_of(seed=1001))
    saved("pi0", 500, **begun)
    assert learn.train(*options_of()) == 0
    saved("act", 90, steps=90, batch_size=8, seed=1000)
    assert learn.others(options_of()[0])["ACT"]["steps"] == 90
    assert told == []
    config, options = options_of()
    config.resume = False
    learn.train(config, options)
    assert told[0][0] == "pi0: 500 training steps"
    assert not (tmp_path / "pi0").exists()


def test_equal_time(tmp_path, monkeypatch):
    """Another policy that trains for more time than π₀: the comparison would be its own."""
    log = "step:20 loss:1 updt_s:0.500 data_s:0.100\nstep:40 loss:1 updt_s:{} data_s:0.050"
    config = learn.LearnConfig(steps=1000, output=tmp_path)
    ours = policies.pi0(config.training("pi0"), config.learning_rate)
    other = policies.act(config.training("act"))

    def train(config, options):
        text = log.format("0.150" if options["policy.type"] == "pi0" else "0.750")
        (tmp_path / "logs" / f"{options['output_dir'].name}.txt").write_text(text)

    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(learn, "train", train)
    assert learn.steps_in_equal_time(config, ours, other) == 250


def test_other_policies_are_not_given_what_the_environment_does_not_show(tmp_path):
    """ACT trained on places of objects: it would fail at its first step in LeRobot's environment, which has none."""
    training = learn.LearnConfig(output=tmp_path).training("act")
    for make in (policies.act, policies.diffusion):
        assert json.loads(make(training)["policy.input_features"]).keys() == {"observation.image", "observation.state"}


def test_somebody_elses_folder_is_left_as_it_is(tmp_path):
    """A dataset that this command has not written, lost because its folder was named."""
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text("{}")
    with pytest.raises(FileExistsError, match="no dataset of this command"):
        record.record(RecordConfig(root=tmp_path))
    assert (tmp_path / "meta" / "info.json").read_text() == "{}"


def test_the_picture_has_a_row_of_each_task(tmp_path):
    """Rows of one task under the names of others, if episodes are found by their order among the tasks."""
    (tmp_path / "meta").mkdir()
    lines = [json.dumps({"task": task, "seed": 0}) for task in ("b", "b", "a", "b")]
    (tmp_path / record.SCENES_FILE).write_text("\n".join(lines))
    assert report.first_episodes(tmp_path) == {"b": 0, "a": 2}


def test_curves_are_drawn(tmp_path):
    """A curve that cannot be drawn, after an hour of training."""
    points = {100: {"reach-v3": [True, False]}, 200: {"reach-v3": [True, True]}}
    report.plot_curves({"π₀": points}, tmp_path / "curve.png")
    assert np.fromfile(tmp_path / "curve.png", np.uint8).size > 1000


def test_curves_of_many_tasks_are_those_of_groups(tmp_path, monkeypatch):
    """Catches fifty lines in one picture, and the rate of a group that leaves tasks out."""
    import matplotlib.pyplot as plt

    points = {step: {task: [step > 1, task == "assembly-v3"] for task in tasks.parse("all")} for step in (1, 2)}
    drawn: list = []
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    report.plot_curves({"π₀": points}, tmp_path / "curve.png")
    found = {line.get_label(): list(line.get_ydata()) for line in drawn[0].axes[0].lines}
    assert list(found) == ["π₀, all tasks", *tasks.groups()] and found["easy"] == [0, 50]
    assert found["hard"] == pytest.approx([100 / 12, 50 + 100 / 12])
