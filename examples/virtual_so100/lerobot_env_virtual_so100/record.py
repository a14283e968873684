"""Recording of the scripted expert's demonstrations as a LeRobotDataset.

    python -m lerobot_env_virtual_so100.record --root=DIR --episodes=600

Features, names and units are those of `lerobot-record` with an SO-100 and two cameras (`--dataset.video=false`):
the same function of LeRobot makes them. Images are stored in many small parquet files, for
`lerobot-train --dataset.streaming=true`. This reads each frame once, and a sample takes 0.6 ms here. Without streaming,
LeRobot decodes the images of all 50 frames of an action chunk to get their actions (11 ms); from videos a sample takes
3.3 ms. In addition to LeRobot's own files, `meta/scenes.jsonl` describes the scene of each episode, so that it can be
replayed.
"""

import json
import logging
import multiprocessing
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate, count
from pathlib import Path

import draccus
from tqdm import tqdm

from .constants import CAMERAS, EPISODE_SECONDS, FPS, IMAGE_SIZE, JOINTS, SPLITS

logger = logging.getLogger(__name__)
DATA_FILE_MB = 2  # size at which a parquet file is full; small, because streaming shuffles and distributes whole files
VIDEO_FILE_MB = 16  # size at which a video file of a joined dataset is full: each part that is added rewrites the file
SCENES_FILE = "meta/scenes.jsonl"
ROBOT_TYPE = "so_follower"  # what `lerobot-record --robot.type=so100_follower` writes: the driver's class


@dataclass
class RecordConfig:
    """Write demonstrations of a scripted expert as a LeRobotDataset."""

    # Folder of the new dataset; it must not exist.
    root: Path
    # What is demonstrated: reach, hover or pick_place.
    task: str = "reach"
    # Number of episodes (rounded up to whole scenes: reach and hover give one for each cube that a scene shows).
    episodes: int = 600
    # Name of the dataset.
    repo_id: str = "local/virtual_so100"
    # Stream of scenes, train or validation. The test stream is for evaluation alone.
    split: str = "train"
    # First scene; scenes seed, seed + 1, ... are recorded.
    seed: int = 0
    # Control steps a second.
    fps: int = FPS
    # Height and width of the images in pixels.
    image_size: int = IMAGE_SIZE
    # Processes that simulate and write; the dataset is the same for any number.
    workers: int = 2

    def __post_init__(self):
        if self.split not in SPLITS[:2]:
            raise ValueError(f"--split must be train or validation (test is for evaluation), not {self.split!r}")
        if self.task not in EPISODE_SECONDS:
            raise ValueError(f"--task must be one of {', '.join(EPISODE_SECONDS)}, not {self.task!r}")
        if self.episodes < 1 or self.workers < 1:
            raise ValueError("--episodes and --workers must be at least 1")
        if self.root.exists():
            raise FileExistsError(f"--root={self.root} exists already: remove it or choose another folder")


def dataset_features(image_size: int) -> dict:
    """The features that `lerobot-record` writes for an SO-100 with these cameras, images stored as images."""
    from lerobot.utils.constants import ACTION, OBS_STR
    from lerobot.utils.feature_utils import hw_to_dataset_features

    joints = {f"{name}.pos": float for name in JOINTS}
    cameras = dict.fromkeys(CAMERAS, (image_size, image_size, 3))
    action = hw_to_dataset_features(joints, ACTION, use_video=False)
    return {**action, **hw_to_dataset_features({**joints, **cameras}, OBS_STR, use_video=False)}


def quiet() -> None:
    """Keep the progress display readable. To be called in every process, before LeRobot's dataset code is imported."""
    import datasets

    datasets.disable_progress_bars()  # otherwise one per episode
    logging.getLogger("lerobot.datasets").setLevel(logging.WARNING)  # otherwise one line per file
    # Otherwise two pages on a machine without ffmpeg's libraries, which a dataset without videos never needs.
    logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)


def write_shard(config: RecordConfig, root: Path, seeds: range, progress) -> None:
    """Simulate scenes and write them to a dataset of their own; `progress(1)` is called after each episode."""
    quiet()
    import torch
    from lerobot.datasets import LeRobotDataset

    from .demonstrations import Demonstrator

    torch.set_num_threads(1)  # one process per core
    dataset = LeRobotDataset.create(
        config.repo_id,
        fps=config.fps,
        features=dataset_features(config.image_size),
        root=root,
        robot_type=ROBOT_TYPE,
        use_videos=False,
        data_files_size_in_mb=DATA_FILE_MB,
    )
    demonstrator = Demonstrator(config.task, config.fps, config.image_size, config.split)
    scenes = []
    for seed in seeds:
        for episode in demonstrator.scene(seed):
            for step, (state, action) in enumerate(zip(episode.states, episode.actions, strict=True)):
                images = {f"observation.images.{name}": episode.images[name][step] for name in CAMERAS}
                frame = {"observation.state": state, "action": action, "task": episode.prompt, **images}
                dataset.add_frame(frame)
            dataset.save_episode()
            scenes.append({"task": config.task, **asdict(episode.layout)})
            progress(1)
    dataset.finalize()
    (root / SCENES_FILE).write_text("".join(json.dumps(scene) + "\n" for scene in scenes))


def _episodes(config: RecordConfig, seeds: Iterable[int]) -> Iterator[int]:
    """How many episodes each scene gives."""
    from .demonstrations import cubes_shown

    return (len(cubes_shown(config.task, config.split, seed)) for seed in seeds)


def _shards(config: RecordConfig) -> list[tuple[Path, range]]:
    """Folder and scenes of each worker. Scenes are consecutive, so the joined dataset is in the order of the seeds."""
    totals = accumulate(_episodes(config, count(config.seed)))
    scenes = next(i for i, total in enumerate(totals, start=1) if total >= config.episodes)
    workers = min(config.workers, scenes)
    bounds = [config.seed + scenes * worker // workers for worker in range(workers + 1)]
    folder = config.root.with_name(config.root.name + ".shards")
    return [(folder / str(i), range(*bounds[i : i + 2])) for i in range(workers)]


def draft(root: Path) -> Path:
    """Where a dataset is written until it is complete: a run that is killed leaves nothing at `root`."""
    return root.with_name(root.name + ".unfinished")


def join(repo_id: str, roots: list[Path], root: Path, notes: Mapping[str, str] | None = None) -> None:
    """Make one dataset of several with equal features, at `root`, which appears when it is complete.

    Args:
        notes: texts to write into it, by path.
    """
    from lerobot.datasets.aggregate import aggregate_datasets

    target = draft(root)
    shutil.rmtree(target, ignore_errors=True)  # may be left from an interrupted run
    # Keep the files as they are: packing them into larger ones would rewrite them again and again.
    aggregate_datasets(
        [repo_id] * len(roots),
        repo_id,
        roots=roots,
        aggr_root=target,
        data_files_size_in_mb=DATA_FILE_MB,
        video_files_size_in_mb=VIDEO_FILE_MB,
        concatenate_data=False,
    )
    for file in sorted((target / "meta" / "episodes").glob("chunk-*/file-*.parquet")):
        _correct_file_index(file)
    scenes = "".join((part / SCENES_FILE).read_text() for part in roots)
    for path, text in ({SCENES_FILE: scenes} | dict(notes or {})).items():
        (target / path).write_text(text)
    target.rename(root)


def _correct_file_index(file: Path) -> None:
    """Let each episode in a metadata file name this file. LeRobot packs episodes of several files into one, but lets
    them name files that do not exist, and then fails when such a dataset is joined with another."""
    import pandas

    episodes = pandas.read_parquet(file)
    for path, column in ((file.parent, "meta/episodes/chunk_index"), (file, "meta/episodes/file_index")):
        episodes[column] = int(path.stem.rpartition("-")[2])
    episodes.to_parquet(file, index=False)


def _run_workers(config: RecordConfig, shards: list[tuple[Path, range]], bar: tqdm) -> None:
    """Write the shards in parallel. Raises RuntimeError when a worker dies; its traceback is above."""
    context = multiprocessing.get_context("spawn")  # neither a GL context nor torch's threads survive a fork
    queue = context.Queue()
    workers = [context.Process(target=write_shard, args=(config, *shard, queue.put), daemon=True) for shard in shards]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers) or not queue.empty():
        while not queue.empty():
            bar.update(queue.get())
        if any(worker.exitcode for worker in workers):
            for worker in workers:
                worker.terminate()
            raise RuntimeError("a recording process failed: its error is printed above")
        time.sleep(0.2)


def record(config: RecordConfig) -> None:
    """Write the dataset that the options describe."""
    quiet()
    shards = _shards(config)
    folder = shards[0][0].parent
    shutil.rmtree(folder, ignore_errors=True)  # may be left from an interrupted run
    total = sum(sum(_episodes(config, seeds)) for _, seeds in shards)
    start = time.perf_counter()
    try:
        with tqdm(total=total, desc="demonstrations", unit="ep") as bar:
            if len(shards) == 1:
                write_shard(config, *shards[0], bar.update)
            else:
                _run_workers(config, shards, bar)
        join(config.repo_id, [root for root, _ in shards], config.root)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = time.perf_counter() - start
    logger.info("wrote %d episodes to %s in %.0f s", total, config.root, seconds)


@draccus.wrap()
def main(config: RecordConfig) -> None:
    """Command line."""
    record(config)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
