"""Chunks that a policy predicts from recorded observations, as they are and with one input exchanged.

Axes: N observations, T steps of a chunk, A joints.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lerobot.datasets import LeRobotDataset
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm

from ...checkpoints.errors import CorruptCheckpointError
from ...configuration_pi0 import PI0Config
from ...inputs.features import colour_cameras
from .. import ToolError
from ..data import build_pipelines
from ..folder import Columns, short

Change = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
"""From a batch of observations, and one of others, to a batch in which one input is exchanged."""


GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, modulo 1, are spread evenly however many there are."""


class Runner:
    """A policy with its processors, and the observations that it is asked about."""

    def __init__(
        self,
        config: PI0Config,
        dataset: LeRobotDataset,
        columns: Columns,
        rename_map: dict[str, str],
        observations: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.config, self.dataset, self.batch_size, self.seed = config, dataset, batch_size, seed
        self.policy = load_policy(config)
        self.preprocessor, self.postprocessor = build_pipelines(
            config,
            device_processor={"device": str(config.device)},
            rename_observations_processor={"rename_map": rename_map},
        )
        self.columns = columns
        self.rows = spread_over(self.columns.episode, observations)
        self.items = [self._item(int(i)) for i in tqdm(self.rows, desc="frames", leave=False)]
        keys = [key for key in colour_cameras(dataset.meta) if rename_map.get(key, key) in config.image_features]
        self.cameras = {key: rename_map.get(key, key) for key in keys}

    def chunks(self, change: Change | None = None, others: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Predicted chunks: normalised, and in the robot's units; float64 (N, T, A).

        The noise depends on the seed and the frame alone.

        Args:
            change: what to exchange.
            others: for each observation, which one to exchange it with.
        """
        normalised, physical = [], []
        for start in tqdm(range(0, len(self.items), self.batch_size), desc="chunks", leave=False):
            chosen = range(start, min(start + self.batch_size, len(self.items)))
            batch = self._collate([self.items[i] for i in chosen])
            if change is not None and others is not None:
                batch = change(batch, self._collate([self.items[others[i]] for i in chosen]))
            noise = torch.stack([self._noise(int(self.rows[i])) for i in chosen])
            with torch.inference_mode():
                chunk = self.policy.predict_action_chunk(self.preprocessor(batch), noise=noise.to(self.config.device))
                normalised.append(chunk.double().cpu().numpy())
                physical.append(self.postprocessor(chunk).double().cpu().numpy())
        return np.concatenate(normalised), np.concatenate(physical)

    def batch(self, rows: Sequence[int]) -> tuple[dict[str, Any], Tensor]:
        """Any observations of the dataset, preprocessed, and the noise of their chunks (B, T, max_action_dim)."""
        noise = torch.stack([self._noise(row) for row in rows])
        return self.preprocessor(self._collate([self._item(row) for row in rows])), noise.to(self.config.device)

    def _item(self, row: int) -> dict[str, Any]:
        try:
            return dict(self.dataset[row])
        except Exception as error:  # what decoders raise for damaged data has many types
            episode, frame = int(self.columns.episode[row]), int(self.columns.frame[row])
            raise ToolError(
                f"frame {frame} of episode {episode} cannot be read ({short(error)}); `lerobot-pi0 check` says what is "
                "wrong. --dataset.episodes names others"
            ) from error

    def _collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return dict(default_collate(items))

    def _noise(self, row: int) -> Tensor:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + row)
        return torch.randn(self.config.chunk_size, self.config.max_action_dim, generator=draw)


def load_policy(config: PI0Config) -> Any:
    """The policy of a checkpoint, with its adapter if it is one."""
    from ...modeling_pi0 import PI0Policy

    path, revision = str(config.pretrained_path), config.pretrained_revision
    if not config.use_peft:
        return PI0Policy.from_pretrained(path, config=config, revision=revision).eval()
    from peft import PeftConfig, PeftModel

    with _named(path):
        adapter = PeftConfig.from_pretrained(path, revision=revision)
    base = PI0Policy.from_pretrained(adapter.base_model_name_or_path, config=config, revision=adapter.revision)
    with _named(path):
        return PeftModel.from_pretrained(base, path, config=adapter, revision=revision).eval()


@contextlib.contextmanager
def _named(adapter: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # PEFT's errors of a damaged file are of many kinds
        raise CorruptCheckpointError(
            f"the adapter {adapter} cannot be loaded ({short(error)}): copy or download adapter_config.json and "
            "adapter_model.safetensors again"
        ) from error


def spread_over(episode: np.ndarray, most: int) -> np.ndarray:
    """At most that many rows, equally many and evenly spaced in each episode (or in some, if there are too many).

    From episode to episode they begin at another part of the first step, so that few rows per episode, or a single one,
    still are spread over the whole time.
    """
    numbers = np.unique(episode)
    numbers = numbers[np.unique(np.linspace(0, len(numbers) - 1, min(len(numbers), most)).astype(int))]
    each = max(1, most // len(numbers))
    rows = []
    for i, number in enumerate(numbers):
        mine = np.flatnonzero(episode == number)
        begin = i * GOLDEN % 1
        rows.append(mine[np.unique(((np.arange(each) + begin) * len(mine) / each).astype(int))])
    return np.concatenate(rows)
