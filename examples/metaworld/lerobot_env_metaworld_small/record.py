"""Recording of MetaWorld's scripted experts as a LeRobotDataset.

    python -m lerobot_env_metaworld_small.record --root=DIR --tasks=door-open-v3,reach-v3 --episodes=50

Features, names and rate are those with which a policy is evaluated by `lerobot-eval --env.type=metaworld` without a
rename. Pictures are stored as videos: LeRobot's reader would decode stored images for every action of a chunk. A
recording that was killed goes on with the same command: blocks of episodes that are complete are kept. In addition to
LeRobot's own files, `meta/scenes.jsonl` has the task and the seed of each episode.
"""

import json
import logging
import multiprocessing
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import draccus
from lerobot_env_virtual_so100.record import SCENES_FILE, draft, join, quiet
from tqdm import tqdm

from . import constants, seeds
from .configuration_metaworld_small import IMAGE_SIZE, SMOOTH, ZOOM, shown_size
from .tasks import demonstrations

logger = logging.getLogger(__name__)
BLOCK = 5  # episodes that are written, and kept after a kill, together
NOTE = "meta/recording.json"  # with which options a dataset, or its blocks, are made
CRF = 12  # quality of the videos: LeRobot's 30 would smear goals of three pixels


@dataclass
class RecordConfig:
    """Write demonstrations of MetaWorld's experts as a LeRobotDataset."""

    # Folder of the dataset. One that is complete is left as it is.
    root: Path
    # Names of tasks, of groups (easy, medium, hard, very_hard), ten or all, with commas; reach-v3:250 has 250.
    tasks: str = "reach-v3"
    # Episodes of each task that names no number.
    episodes: int = 50
    # Name of the dataset.
    repo_id: str = "local/metaworld"
    # Height and width of the pictures in pixels, drawn without shadows.
    image_size: int = IMAGE_SIZE
    # How many times larger things are than in the camera's whole picture; only its middle is shown.
    zoom: float = ZOOM
    # Draw as LeRobot does instead: 480 pixels, shadows, multisampling. 24 times slower on a CPU.
    lerobot_renderer: bool = False
    # How likely a step begins a push of the hand that the expert has to correct; 0 for undisturbed demonstrations.
    pushes: float = 0.03
    # How likely an episode begins with the hand elsewhere than in an evaluation.
    scatter: float = 1.0
    # Steps recorded after the task is solved.
    hold: int = 10
    # Processes that simulate and write; the dataset is the same for any number.
    processes: int = 2

    def __post_init__(self) -> None:
        for task, episodes in self.plan.items():
            if not 1 <= episodes <= seeds.MAX_EPISODES:
                raise ValueError(f"{episodes} episodes of {task}: there have to be 1 to {seeds.MAX_EPISODES}")
        for name, least in {"processes": 1, "image_size": 16, "hold": 0, "pushes": 0, "scatter": 0, "zoom": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name}={getattr(self, name)} has to be at least {least}")

    @property
    def plan(self) -> dict[str, int]:
        """How many episodes each task has."""
        return demonstrations(self.tasks, self.episodes)

    @property
    def pixels(self) -> int | None:
        """Side of the pictures; None with LeRobot's own renderer."""
        return None if self.lerobot_renderer else self.image_size


def features(image_size: int) -> dict:
    """The dataset's features. With these names, a policy needs no rename in LeRobot's environment."""
    from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_IMAGE, OBS_STATE

    image = {"dtype": "video", "shape": (image_size, image_size, 3), "names": ["height", "width", "channel"]}
    names = {
        OBS_STATE: list(constants.STATE),
        OBS_ENV_STATE: [f"full_{i}" for i in range(constants.FULL_STATE)],
        ACTION: list(constants.ACTION),
    }
    return {OBS_IMAGE: image} | {
        key: {"dtype": "float32", "shape": (len(each),), "names": each} for key, each in names.items()
    }


@dataclass(frozen=True)
class Block:
    """Consecutive episodes of a task, recorded and kept together."""

    task: str
    episodes: range

    def folder(self, config: RecordConfig) -> Path:
        """Where it is once it is complete."""
        return parts(config) / f"{self.task}_{self.episodes.start}_{self.episodes.stop}"


def parts(config: RecordConfig) -> Path:
    """Folder of the blocks, beside the dataset."""
    return config.root.with_name(config.root.name + ".parts")


def blocks(config: RecordConfig) -> Iterator[Block]:
    """All blocks, task after task in turns: a reader that shuffles files nearby mixes the tasks."""
    for first in range(0, max(config.plan.values()), BLOCK):
        for task, episodes in config.plan.items():
            if first < episodes:
                yield Block(task, range(first, min(first + BLOCK, episodes)))


def write_block(config: RecordConfig, block: Block) -> int:
    """Record the episodes of a block; returns how many. Its folder appears when it is complete."""
    quiet()
    import torch
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets import LeRobotDataset

    from .demonstrations import Demonstrator

    torch.set_num_threads(1)  # one process per core
    root = draft(block.folder(config))
    shutil.rmtree(root, ignore_errors=True)
    demonstrator = Demonstrator(block.task, config.pixels, config.zoom, config.pushes, config.scatter, config.hold)
    dataset = LeRobotDataset.create(
        config.repo_id,
        fps=constants.FPS,
        features=features(shown_size(config.pixels, config.zoom)),
        root=root,
        robot_type="metaworld",
        rgb_encoder=RGBEncoderConfig(vcodec="h264", pix_fmt="yuv444p", crf=CRF),
        streaming_encoding=True,
        encoder_threads=1,
    )
    scenes = []
    for index in block.episodes:
        episode = demonstrator.episode(index)
        columns = zip(episode.images, episode.states, episode.full_states, episode.actions, strict=True)
        for frame in columns:
            dataset.add_frame({**dict(zip(dataset_keys(), frame, strict=True)), "task": episode.instruction})
        dataset.save_episode()
        scenes.append({"task": block.task, "seed": episode.seed})
    dataset.finalize()
    demonstrator.close()
    (root / SCENES_FILE).write_text("".join(json.dumps(scene) + "\n" for scene in scenes))
    root.rename(block.folder(config))
    return len(block.episodes)


def dataset_keys() -> list[str]:
    """Names of the features in their order."""
    return list(features(IMAGE_SIZE))


def options_of(config: RecordConfig) -> dict[str, object]:
    """What each episode depends on."""
    names = ("image_size", "zoom", "lerobot_renderer", "pushes", "scatter", "hold")
    drawn = {} if config.lerobot_renderer else {"smooth": SMOOTH}
    return {name: getattr(config, name) for name in names} | drawn


def check_same(note: Path, options: dict[str, object]) -> None:
    """Compare options with those of what is there.

    Raises:
        ValueError: they differ, or an older version made it, whose options are not known or whose pictures are others.
    """
    before = json.loads(note.read_text()) if note.exists() else "of an older version"
    if before != options:
        folder = note.parent.parent
        older = "smooth" in options and "smooth" not in before
        remedy = "its pictures are those of another version: remove it" if older else "give those, or remove it"
        raise ValueError(f"{folder} was recorded with other options ({before}): {remedy}")


def record(config: RecordConfig) -> None:
    """Write the dataset that the options describe, or what is missing of it.

    Raises:
        ExpertFailedError: an expert does not succeed.
        FileExistsError: there is something else in its place.
        ValueError: it, or a part of it, was recorded with other options.
    """
    if (config.root / SCENES_FILE).exists():
        check_same(config.root / NOTE, options_of(config) | {"episodes": config.plan})
        logger.info("%s is there already", config.root)
        return
    if config.root.exists():
        raise FileExistsError(f"--root={config.root} is no dataset of this command: remove it or choose another folder")
    quiet()
    note = parts(config) / NOTE
    if parts(config).exists():
        check_same(note, options_of(config))
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(options_of(config)) + "\n")
    wanted = list(blocks(config))
    missing = [block for block in wanted if not block.folder(config).exists()]
    done = sum(len(block.episodes) for block in wanted) - sum(len(block.episodes) for block in missing)
    context = multiprocessing.get_context("spawn")  # neither a GL context nor torch's threads survive a fork
    with (
        tqdm(total=sum(config.plan.values()), initial=done, desc="demonstrations", unit="ep") as bar,
        ProcessPoolExecutor(min(config.processes, max(1, len(missing))), context) as pool,
    ):
        for future in as_completed([pool.submit(write_block, config, block) for block in missing]):
            if future.exception():
                pool.shutdown(wait=False, cancel_futures=True)
            bar.update(future.result())
    made = {NOTE: json.dumps(options_of(config) | {"episodes": config.plan}) + "\n"}
    join(config.repo_id, [block.folder(config) for block in wanted], config.root, made)
    shutil.rmtree(parts(config))


@draccus.wrap()
def main(config: RecordConfig) -> None:
    """Command line."""
    record(config)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
