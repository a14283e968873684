"""`lerobot-pi0 open-loop`: would this policy have done what was recorded, and does it look and listen?

    lerobot-pi0 open-loop --policy.path=outputs/train/my_run/checkpoints/last/pretrained_model \\
        --dataset.repo_id=you/cubes --output_dir=outputs/open_loop
    lerobot-pi0 open-loop --policy.path=you/pi0_cubes --dataset.repo_id=you/cubes --observations=256

No robot moves. On episodes that were held out of training, chunks are predicted and compared with the recorded
actions, beside two policies that need no network: hold still, and always the mean action. Then inputs are exchanged
one by one, with everything else and the noise the same: the instruction by another, a camera's picture by black and
by one of another episode, the state by the episode's first and by another episode's. A policy whose chunk does not
move, or hardly and without an error that grows, ignores that input and is told so. For the episodes that are drawn, the
page shows what the actions look at. Writes report.html, which needs no other file and no network, and report.json.

Axes: N observations, T steps of a chunk, A joints.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from lerobot.configs import PreTrainedConfig
from lerobot.datasets.factory import resolve_delta_timestamps

from .. import __version__
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.quoting import plain
from . import ToolError
from .data import DatasetOptions, need_pi0, need_whole, open_dataset, open_meta
from .evaluation import attention, report
from .evaluation.held_out import held_out
from .evaluation.intervals import training_spread
from .evaluation.measure import by_resizing, measure
from .evaluation.predictions import Runner


@dataclass
class Options:
    """Compare a policy's chunks with recorded actions, and measure what it reacts to."""

    dataset: DatasetOptions
    # The policy: --policy.path=CHECKPOINT.
    policy: PreTrainedConfig | None = None
    # Folder for report.html and report.json.
    output_dir: Path = Path("outputs/open_loop")
    # The page in another file than report.html of that folder.
    html: Path | None = None
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
    # Renamed cameras: {dataset's key: policy's key}; by default as in training.
    rename_map: dict[str, str] = field(default_factory=dict)
    # Print the content of report.json too.
    json: bool = False


def run(options: Options) -> None:
    """Write the report.

    Raises:
        CheckpointError: the policy cannot be loaded.
        ToolError: there is no such dataset.
    """
    config = need_pi0(options.policy)
    if config.pretrained_path is None:
        raise ToolError("a policy without weights has nothing to show: give --policy.path=CHECKPOINT")
    checkpoint = Checkpoint.open(config.pretrained_path, revision=config.pretrained_revision)
    options.rename_map = options.rename_map or checkpoint.pipelines.rename_map
    meta = open_meta(options.dataset)
    need_whole(meta)
    episodes, origin = held_out(config, options.dataset, meta)
    options.dataset.episodes = episodes
    chunks = resolve_delta_timestamps(config, meta)
    dataset, recording = open_dataset(options.dataset, meta, delta_timestamps=chunks, return_uint8=True)
    runner = Runner(
        config, dataset, recording.columns, options.rename_map, options.observations, options.batch_size, options.seed
    )
    spread, still = training_spread(runner.postprocessor, recording.everything, bool(config.use_relative_actions))
    content, drawn = measure(runner, options.threshold, spread, still)
    content |= {
        "error by resizing": by_resizing(runner, drawn, spread, still),
        "policy": str(config.pretrained_path),
        "dataset": options.dataset.repo_id,
        "episodes": episodes,
        "episodes are": origin,
        "seed": options.seed,
        "version": __version__,
    }
    drawn["attention"] = attention.strips(runner, options.plots)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "report.json").write_text(json.dumps(content, indent=2) + "\n")
    report.page(content, drawn, options.plots).write(options.html or options.output_dir / "report.html")
    print(json.dumps(content, indent=2) if options.json else plain(report.as_text(content), keep="\n"))
