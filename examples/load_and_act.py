"""Inference with a trained policy: actions in the robot's units, as lerobot-rollout computes them at each tick.

    python examples/load_and_act.py --policy=you/pi0_cubes --dataset=you/cubes --frame=40

The observation is a frame of a dataset; on a robot it is what `robot.get_observation()` returns. The recorded actions
are printed next to the policy's.
"""

from dataclasses import dataclass
from pathlib import Path

import draccus
from lerobot.datasets import LeRobotDataset
from lerobot.policies import make_pre_post_processors
from lerobot.utils.constants import ACTION

from lerobot_pi0 import PI0Policy
from lerobot_pi0.checkpoints.checkpoint import Checkpoint


@dataclass
class Options:
    """Print a chunk of actions for one frame of a dataset."""

    # Checkpoint: a Hub id, or a folder such as outputs/train/…/checkpoints/last/pretrained_model.
    policy: str
    # Dataset with the frame: a Hub id, or any name if `root` is given.
    dataset: str
    # Folder of the dataset; with it, nothing is downloaded.
    root: Path | None = None
    # Index of the frame in the dataset.
    frame: int = 0
    # Device, such as cuda or cpu; by default the checkpoint's, or another one if this machine does not have it.
    device: str | None = None


@draccus.wrap()
def main(options: Options) -> None:
    config = Checkpoint.open(options.policy).config()
    config.device = options.device or config.device
    policy = PI0Policy.from_pretrained(options.policy, config=config)
    place = {"device_processor": {"device": str(config.device)}}
    preprocess, postprocess = make_pre_post_processors(config, options.policy, preprocessor_overrides=place)

    dataset = LeRobotDataset(options.dataset, root=options.root)
    frame = dataset[options.frame]
    observation = {key: frame[key] for key in config.input_features if key in frame} | {"task": frame["task"]}
    policy.reset()  # discards actions that are left from an earlier chunk
    print(f"{frame['task']!r}, frame {options.frame}: policy | recorded")
    end = dataset.meta.episodes[int(frame["episode_index"])]["dataset_to_index"]
    for now in range(options.frame, min(options.frame + min(5, config.n_action_steps), end)):
        action, recorded = postprocess(policy.select_action(preprocess(observation)))[0], dataset[now][ACTION]
        print("  ".join(f"{ours:8.2f} | {theirs:8.2f}" for ours, theirs in zip(action, recorded, strict=True)))


if __name__ == "__main__":
    main()
