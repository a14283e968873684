"""Episodes that a training run held out."""

import math
from pathlib import Path
from typing import Any

from lerobot.configs.train import TRAIN_CONFIG_NAME
from lerobot.datasets import LeRobotDatasetMetadata

from ...checkpoints.source import Source
from ...configuration_pi0 import PI0Config
from .. import ToolError
from ..data import DatasetOptions


def held_out(config: PI0Config, options: DatasetOptions, meta: LeRobotDatasetMetadata) -> tuple[list[int], str]:
    """Episodes that training did not see, and how that is known.

    Raises:
        ToolError: it is not known.
    """
    everything = list(range(meta.total_episodes))
    if options.episodes is not None:
        return sorted(options.episodes), "those that were named"
    train = Source(str(config.pretrained_path), revision=config.pretrained_revision).read_json(TRAIN_CONFIG_NAME) or {}
    trained = noted if isinstance(noted := train.get("dataset"), dict) else {}
    same_folder = trained.get("root") and Path(str(trained["root"])).resolve() == Path(meta.root).resolve()
    if trained.get("repo_id") not in (None, options.repo_id) and not same_folder:
        return everything, f"of another dataset than that of training ({trained['repo_id']}), or of one renamed"
    seen = [x for x in _list(trained.get("episodes")) if x in everything] or everything
    split = trained.get("eval_split")
    if isinstance(split, float) and 0 < split < 1:
        return _split(meta, seen, split), f"held out of training by eval_split={split}"
    if rest := sorted({*everything} - {*seen}):
        return rest, "those that training left out"
    last = everything[-max(1, len(everything) // 10) :]
    return last, "NOT held out: training may have seen them. Train with --dataset.eval_split=0.1, or name others"


def _list(x: Any) -> list[Any]:
    return x if isinstance(x, list) else []


def _split(meta: LeRobotDatasetMetadata, seen: list[int], split: float) -> list[int]:
    """The last episodes of each task, as LeRobot's `make_train_eval_datasets` holds them out.

    Raises:
        ToolError: the dataset does not say which task each episode shows.
    """
    by_task: dict[str, list[int]] = {}
    try:
        tasks = [list(x) for x in meta.episodes["tasks"]]
        for episode in seen:
            by_task.setdefault(tasks[episode][0] if tasks[episode] else "", []).append(episode)
    except (KeyError, TypeError, IndexError) as error:
        raise ToolError(
            f"which episodes eval_split={split} held out is not known, since meta/episodes does not name the tasks of "
            "all episodes: name episodes with --dataset.episodes"
        ) from error
    return sorted(e for group in by_task.values() for e in group[len(group) - math.ceil(len(group) * split) :])
