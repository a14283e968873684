"""`lerobot-pi0 open-loop`: would this policy have done what was recorded, and does it look and listen?

    lerobot-pi0 open-loop --policy.path=outputs/train/my_run/checkpoints/last/pretrained_model \\
        --dataset.repo_id=you/cubes --output_dir=outputs/open_loop

No robot moves. On episodes that were held out of training, chunks are predicted and compared with the recorded
actions, beside two policies that need no network: hold still, and always the mean action. Then inputs are exchanged
one by one, with everything else and the noise the same: the instruction by another, a camera's picture by black and
by one of another episode, the state by the episode's first and by another episode's. A policy whose chunk does not
move, or hardly and without an error that grows, ignores that input and is told so. Writes report.html, which needs no
other file, and report.json.

Axes: N observations, T steps of a chunk, A joints.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.configs.train import TRAIN_CONFIG_NAME
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.policies import make_pre_post_processors
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm

from .. import __version__
from ..checkpoints.source import Source
from ..configuration_pi0 import PI0Config
from ..inputs.statistics import NEAR_CONSTANT
from . import ToolError
from .data import DatasetOptions, dim_names, need_pi0, open_dataset, open_meta, read_columns

logger = logging.getLogger(__name__)

Change = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
"""From a batch of observations, and one of others, to a batch in which one input is exchanged."""

NOTHING_LOST = 1.01
"""Exchanging an input costs nothing if the error is less than this many times what it was: chance does as much."""

BARELY = 0.3
"""A policy that moves less than this part of the recorded way is told so."""


@dataclass
class Options:
    """Compare a policy's chunks with recorded actions, and measure what it reacts to."""

    dataset: DatasetOptions
    # The policy: --policy.path=CHECKPOINT.
    policy: PreTrainedConfig | None = None
    # Folder for report.html and report.json.
    output_dir: Path = Path("outputs/open_loop")
    # Observations to predict from, spread evenly over the episodes.
    observations: int = 64
    # Episodes to draw.
    plots: int = 3
    # Observations at a time.
    batch_size: int = 8
    # Part of the reaction to a wholly different observation below which an input counts as ignored; up to four times
    # that if, beside, nothing is lost when the input is exchanged.
    threshold: float = 0.05
    # Seed of the noise and of which observations are exchanged: equal seeds, equal reports.
    seed: int = 0
    # Renamed cameras, as in training: {dataset's key: policy's key}.
    rename_map: dict[str, str] = field(default_factory=dict)
    # Print the content of report.json too.
    json: bool = False


def run(options: Options) -> None:
    """Write the report.

    Raises:
        CheckpointError: the policy cannot be loaded.
        ToolError: there is no such dataset, or matplotlib is missing.
    """
    from . import report

    report.need_matplotlib()
    config = need_pi0(options.policy)
    if config.pretrained_path is None:
        raise ToolError("a policy without weights has nothing to show: give --policy.path=CHECKPOINT")
    meta = open_meta(options.dataset)
    episodes, origin = held_out(config, options.dataset, meta)
    options.dataset.episodes = episodes
    chunks = resolve_delta_timestamps(config, meta)
    dataset = open_dataset(options.dataset, delta_timestamps=chunks, return_uint8=True)
    runner = Runner(config, dataset, options)
    content, drawn = measure(runner, options)
    content |= {
        "policy": str(config.pretrained_path),
        "dataset": options.dataset.repo_id,
        "episodes": episodes,
        "episodes are": origin,
        "seed": options.seed,
        "version": __version__,
    }
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "report.json").write_text(json.dumps(content, indent=2) + "\n")
    (options.output_dir / "report.html").write_text(report.as_html(content, drawn))
    print(json.dumps(content, indent=2) if options.json else report.as_text(content))
    logger.info("wrote %s", options.output_dir / "report.html")


def held_out(config: PI0Config, options: DatasetOptions, meta: LeRobotDatasetMetadata) -> tuple[list[int], str]:
    """Episodes that training did not see, and how that is known."""
    everything = list(range(meta.total_episodes))
    if options.episodes is not None:
        return sorted(options.episodes), "those that were named"
    train = Source(str(config.pretrained_path)).read_json(TRAIN_CONFIG_NAME) or {}
    trained = train.get("dataset") or {}
    if trained.get("repo_id") not in (None, options.repo_id):
        return everything, f"of another dataset than that of training ({trained['repo_id']})"
    seen = trained.get("episodes") or everything
    if split := trained.get("eval_split"):
        return _split(meta, seen, split), f"held out of training by eval_split={split}"
    if rest := sorted({*everything} - {*seen}):
        return rest, "those that training left out"
    last = everything[-max(1, len(everything) // 10) :]
    return last, "NOT held out: training may have seen them. Train with --dataset.eval_split=0.1, or name others"


def _split(meta: LeRobotDatasetMetadata, seen: list[int], split: float) -> list[int]:
    """The last episodes of each task, as LeRobot's `make_train_eval_datasets` holds them out."""
    by_task: dict[str, list[int]] = {}
    for episode in seen:
        tasks = meta.episodes["tasks"][episode]
        by_task.setdefault(tasks[0] if tasks else "", []).append(episode)
    return sorted(e for group in by_task.values() for e in group[len(group) - math.ceil(len(group) * split) :])


class Runner:
    """A policy with its processors, and the observations that it is asked about."""

    def __init__(self, config: PI0Config, dataset: LeRobotDataset, options: Options) -> None:
        self.config, self.dataset, self.options = config, dataset, options
        self.policy = load_policy(config)
        self.preprocessor, self.postprocessor = make_pre_post_processors(
            config,
            pretrained_path=str(config.pretrained_path),
            preprocessor_overrides={
                "device_processor": {"device": str(config.device)},
                "rename_observations_processor": {"rename_map": options.rename_map},
            },
        )
        self.columns = read_columns(dataset)
        self.rows = spread_over(self.columns.episode, options.observations)
        self.items = [dataset[int(i)] for i in tqdm(self.rows, desc="frames", leave=False)]
        keys = [key for key in dataset.meta.camera_keys if options.rename_map.get(key, key) in config.image_features]
        self.cameras = {key: options.rename_map.get(key, key) for key in keys}

    def chunks(self, change: Change | None = None, others: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Predicted chunks: normalised, and in the robot's units; float64 (N, T, A).

        The noise depends on the seed and the frame alone.

        Args:
            change: what to exchange.
            others: for each observation, which one to exchange it with.
        """
        normalised, physical = [], []
        for start in range(0, len(self.items), self.options.batch_size):
            chosen = range(start, min(start + self.options.batch_size, len(self.items)))
            batch = self._collate([self.items[i] for i in chosen])
            if change is not None and others is not None:
                batch = change(batch, self._collate([self.items[others[i]] for i in chosen]))
            noise = torch.stack([self._noise(int(self.rows[i])) for i in chosen])
            with torch.inference_mode():
                chunk = self.policy.predict_action_chunk(self.preprocessor(batch), noise=noise.to(self.config.device))
                normalised.append(chunk.double().cpu().numpy())
                physical.append(self.postprocessor(chunk).double().cpu().numpy())
        return np.concatenate(normalised), np.concatenate(physical)

    def _collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return dict(default_collate(items))

    def _noise(self, row: int) -> Tensor:
        draw = torch.Generator().manual_seed(self.options.seed * 1_000_003 + row)
        return torch.randn(self.config.chunk_size, self.config.max_action_dim, generator=draw)


def load_policy(config: PI0Config) -> Any:
    """The policy of a checkpoint, with its adapter if it is one."""
    from ..modeling_pi0 import PI0Policy

    path = str(config.pretrained_path)
    if not config.use_peft:
        return PI0Policy.from_pretrained(path, config=config).eval()
    from peft import PeftConfig, PeftModel

    adapter = PeftConfig.from_pretrained(path)
    base = PI0Policy.from_pretrained(adapter.base_model_name_or_path, config=config, revision=adapter.revision)
    return PeftModel.from_pretrained(base, path, config=adapter).eval()


def spread_over(episode: np.ndarray, most: int) -> np.ndarray:
    """At most that many rows, equally many and evenly spaced in each episode (or in some, if there are too many)."""
    numbers = np.unique(episode)
    numbers = numbers[np.unique(np.linspace(0, len(numbers) - 1, min(len(numbers), most)).astype(int))]
    each = max(1, most // len(numbers))
    rows = []
    for number in numbers:
        mine = np.flatnonzero(episode == number)
        rows.append(mine[np.unique(np.arange(each) * len(mine) // each)])
    return np.concatenate(rows)


def measure(runner: Runner, options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """All numbers of the report, and what its plots need beside them."""
    items, rows = runner.items, runner.rows
    recorded = np.stack([item[ACTION].double().numpy() for item in items])
    valid = np.stack([~item[f"{ACTION}_is_pad"].numpy() for item in items])
    actions, state = runner.columns.action_ND, runner.columns.state_ND[rows]
    spread = actions.std(axis=0)
    scale = np.maximum(spread, max(NEAR_CONSTANT * spread.max(), 1e-9))
    still = state if state.shape[1] == actions.shape[1] else actions[np.maximum(rows - 1, 0)]
    normalised, predicted = runner.chunks()
    guesses = {
        "policy": predicted,
        "hold still": np.broadcast_to(still[:, None], recorded.shape),
        "mean action": np.broadcast_to(actions.mean(axis=0), recorded.shape),
    }
    squares = {name: ((guess - recorded) / scale) ** 2 for name, guess in guesses.items()}
    names = dim_names(runner.dataset, ACTION)
    content: dict[str, Any] = {
        "observations": len(rows),
        "error": {name: rms(x, valid) for name, x in squares.items()},
        "error by step": {name: by_step(x, valid) for name, x in squares.items()},
        "error by joint": {
            joint: {name: rms(x[..., i], valid) for name, x in squares.items()} for i, joint in enumerate(names)
        },
        "way": rms(((predicted - still[:, None]) / scale) ** 2, valid)
        / max(rms(((recorded - still[:, None]) / scale) ** 2, valid), 1e-9),
        "reactions": reactions(runner, normalised, recorded, scale, valid),
        "threshold": options.threshold,
    }
    content["ignored"] = ignored(content)
    content["verdicts"] = verdicts(content)
    drawn = {"predicted": predicted, "valid": valid, "rows": rows, "columns": runner.columns, "joints": names,
             "plots": options.plots}  # fmt: skip
    return content, drawn


def rms(squares: np.ndarray, valid_NT: np.ndarray) -> float:
    """Root of the mean over what was recorded; `squares` is (N, T) or (N, T, A)."""
    return float(np.sqrt(squares[valid_NT].mean()))


def by_step(squares_NTA: np.ndarray, valid_NT: np.ndarray) -> list[float]:
    """The same for each step of the chunk, as far as any observation has one."""
    steps = [t for t in range(valid_NT.shape[1]) if valid_NT[:, t].any()]
    return [rms(squares_NTA[:, t : t + 1], valid_NT[:, t : t + 1]) for t in steps]


def reactions(
    runner: Runner, normalised_NTA: np.ndarray, recorded_NTA: np.ndarray, scale_A: np.ndarray, valid_NT: np.ndarray
) -> dict[str, dict[str, float]]:
    """How far the normalised chunk moves when an input is exchanged, and how large its error is then.

    `moves` is in deviations of the actions; `of everything` is its part of what a wholly different observation does.
    """
    others = partners(runner.columns.episode[runner.rows], runner.options.seed)
    found: dict[str, dict[str, float]] = {}
    changes = dict(changes_of(runner))
    for name, change in tqdm(changes.items(), desc="exchanged inputs", leave=False):
        moved, physical = runner.chunks(change, others)
        found[name] = {
            "moves": float(np.sqrt(((moved - normalised_NTA) ** 2).mean())),
            "error": rms(((physical - recorded_NTA) / scale_A) ** 2, valid_NT),
        }
    everything = max(found["everything"]["moves"], 1e-9)
    return {name: x | {"of everything": x["moves"] / everything} for name, x in found.items()}


def partners(episode_N: np.ndarray, seed: int) -> np.ndarray:
    """For each observation another one, of another episode where there is one."""
    draw = np.random.default_rng(seed)
    everyone = np.arange(len(episode_N))
    found = []
    for i in everyone:
        candidates = everyone[episode_N != episode_N[i]]
        found.append(draw.choice(candidates if len(candidates) else everyone[everyone != i]))
    return np.array(found)


def changes_of(runner: Runner) -> Iterator[tuple[str, Change]]:
    """What is exchanged, by name; each takes a batch and one of partners."""
    first = first_states(runner)
    tasks = [str(task) for task in runner.dataset.meta.tasks.index]

    def another_task(batch: dict[str, Any], _: dict[str, Any]) -> dict[str, Any]:
        return batch | {"task": [tasks[(tasks.index(x) + 1) % len(tasks)] for x in batch["task"]]}

    def frozen(batch: dict[str, Any], _: dict[str, Any]) -> dict[str, Any]:
        return batch | {OBS_STATE: torch.stack([first[int(e)] for e in batch["episode_index"]])}

    def taken(*keys: str) -> Change:
        return lambda batch, other: batch | {key: other[key] for key in keys}

    def black(key: str) -> Change:
        return lambda batch, _: batch | {key: torch.zeros_like(batch[key])}

    yield "everything", taken(OBS_STATE, "task", *runner.cameras)
    if len(tasks) > 1:
        yield "instruction", another_task
    for key, name in runner.cameras.items():
        camera = name.removeprefix("observation.images.")
        yield f"camera {camera}", taken(key)
        yield f"camera {camera}, black", black(key)
    yield "state", taken(OBS_STATE)
    yield "state, frozen", frozen


def first_states(runner: Runner) -> dict[int, Tensor]:
    """The state with which each episode begins."""
    numbers, rows = np.unique(runner.columns.episode, return_index=True)
    states = torch.from_numpy(runner.columns.state_ND[rows]).float()
    return dict(zip(numbers.tolist(), states, strict=True))


def ignored(content: dict[str, Any]) -> list[str]:
    """Inputs that the policy does not use.

    A trained network never quite ignores an input: one to which the instruction had told nothing still moved by 7 %, at
    random. So a small reaction counts as none if the chunk is as near to what was recorded without it. What no robot
    would show, a black picture and a frozen state, is not judged.
    """
    threshold, error = content["threshold"], content["error"]["policy"]
    return [
        name
        for name, x in content["reactions"].items()
        if "," not in name
        and (
            x["of everything"] < threshold
            or (x["of everything"] < 4 * threshold and x["error"] <= NOTHING_LOST * error)
        )
    ]


def verdicts(content: dict[str, Any]) -> list[str]:
    """What the numbers say, in words; "good" if nothing is to be said against the policy."""
    error, found = content["error"], []
    best = min((name for name in error if name != "policy"), key=error.__getitem__)
    if error["policy"] > 0.9 * error[best]:
        found.append(
            f"has not learned these movements: it errs by {error['policy']:.2f}, {best!r} by {error[best]:.2f}"
        )
    if content["way"] < BARELY:
        found.append(f"barely moves: {content['way']:.0%} of the recorded way")
    for name in content["ignored"]:
        reaction = content["reactions"][name]
        found.append(
            f"ignores the {name}: exchanged, it moves the chunk by {reaction['of everything']:.1%} of what another "
            f"observation does, and the error goes from {error['policy']:.2f} to {reaction['error']:.2f}"
        )
    found = found or ["good: better than holding still and than the mean action, and it uses what was exchanged"]
    if "instruction" not in content["reactions"]:
        found.append("cannot be asked whether it listens: the dataset has one instruction")
    return found
