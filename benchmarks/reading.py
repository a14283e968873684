"""CPU time of a sample from LeRobot's two readers of a dataset, in one process with one thread, as a worker has.

    python benchmarks/reading.py --root=DATA --chunk=20

`lerobot-train` takes the second with `--dataset.streaming=true`.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import draccus
import torch
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata, StreamingLeRobotDataset
from lerobot.utils.constants import ACTION

from lerobot_pi0.tools.folder import video_backend


@dataclass
class ReadingConfig:
    """Time the readers of a dataset."""

    # Folder of the dataset.
    root: Path
    # Actions of a chunk.
    chunk: int = 50
    # Samples to read with each.
    samples: int = 500


def milliseconds(samples: Iterable, count: int) -> float:
    """CPU time of a sample, the first one apart, in which files are opened and buffers are filled."""
    iterator: Iterator = iter(samples)
    next(iterator)
    started = time.process_time()
    for _ in range(count):
        next(iterator)
    return 1e3 * (time.process_time() - started) / count


@draccus.wrap()
def main(config: ReadingConfig) -> None:
    """Print a line for each reader."""
    torch.set_num_threads(1)
    meta = LeRobotDatasetMetadata("local/dataset", root=config.root)
    times = {ACTION: [i / meta.fps for i in range(config.chunk)]}
    options = {"root": config.root, "delta_timestamps": times}
    whole = LeRobotDataset("local/dataset", video_backend=video_backend(), **options)
    order = torch.randint(len(whole), (config.samples + 1,), generator=torch.Generator().manual_seed(0)).tolist()
    readers: dict[str, Iterable] = {"default": (whole[i] for i in order)}
    if any(len([*camera.glob("*/*.mp4")]) > 1 for camera in config.root.glob("videos/*")):
        print("streaming: left out, because LeRobot 0.6.1's stream reads videos of one file only")
    else:
        readers["streaming"] = StreamingLeRobotDataset("local/dataset", seed=0, **options)
    for name, samples in readers.items():
        taken = milliseconds(samples, config.samples)
        print(f"{name:10} {taken:7.2f} ms of CPU time a sample")


if __name__ == "__main__":
    main()
