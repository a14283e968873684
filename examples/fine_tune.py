"""Fine-tuning of π₀ on a dataset from Python: what lerobot-train does with the same options.

    python examples/fine_tune.py --dataset=you/cubes --start=lerobot/pi0_base --device=cuda
    python examples/fine_tune.py --dataset=local/cubes --root=DATA          # a small network, on a CPU

The policy is then in OUTPUT/checkpoints/last/pretrained_model.
"""

from dataclasses import dataclass
from pathlib import Path

import draccus
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.scripts.lerobot_train import train

from lerobot_pi0 import PI0Config
from lerobot_pi0.checkpoints.checkpoint import Checkpoint

TINY = {"paligemma_variant": "tiny", "action_expert_variant": "tiny", "dtype": "float32"}
KEPT = ("paligemma_variant", "action_expert_variant", "max_state_dim", "max_action_dim", "chunk_size", "n_action_steps")


@dataclass
class Options:
    """Fine-tune a checkpoint, or train the small preset from random weights."""

    # Dataset: a Hub id, or any name if `root` is given.
    dataset: str
    # Folder of the dataset; with it, nothing is downloaded.
    root: Path | None = None
    # Checkpoint to start from: a Hub id or a folder. None trains the preset `tiny` from random weights.
    start: str | None = None
    # Folder to write; it must not exist.
    output: Path = Path("outputs/fine_tune")
    steps: int = 3000
    batch_size: int = 8
    # Processes that load data.
    workers: int = 2
    # Where to train: cuda, mps or cpu.
    device: str = "cpu"


@draccus.wrap()
def main(options: Options) -> None:
    network = TINY
    if options.start is not None:  # only its sizes: cameras and joints come from the dataset
        start = Checkpoint.open(options.start).config()
        network = {name: getattr(start, name) for name in KEPT} | {"dtype": "bfloat16"}
    policy = PI0Config(**network, pretrained_path=options.start, device=options.device, push_to_hub=False)
    run = TrainPipelineConfig(
        DatasetConfig(options.dataset, root=None if options.root is None else str(options.root)),
        policy=policy, output_dir=options.output, steps=options.steps, batch_size=options.batch_size,
        save_freq=options.steps, num_workers=options.workers,
    )  # fmt: skip
    train(run)


if __name__ == "__main__":
    main()
