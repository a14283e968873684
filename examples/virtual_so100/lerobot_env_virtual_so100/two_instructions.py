"""A moving picture of one policy that is told two different things in the same scenes, side by side.

    python -m lerobot_env_virtual_so100.two_instructions --policy=CHECKPOINT --output=two_instructions.webp

The scenes are the first of the test stream, in order: none is chosen for its outcome. Both sides begin alike, and only
the instruction differs.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import draccus
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .constants import FPS, INSTRUCTIONS

logger = logging.getLogger(__name__)

CAPTION = 28  # pixels above each side
PAUSE_MS = 1200  # the end of a scene stays to be looked at
LARGEST = 2 * 2**20  # bytes that a README should not load more than


@dataclass
class PictureConfig:
    """Film a policy of the task reach that is told two different things in the same scenes."""

    # Checkpoint of a policy that was trained on the task reach.
    policy: str
    # WebP file.
    output: Path = Path("two_instructions.webp")
    # Scenes, one after the other.
    scenes: int = 4
    # First scene of the test stream; 1000 is the first that `make demo` evaluates.
    seed: int = 1000
    # Height and width of each side in pixels.
    size: int = 320
    # Quality of the pictures, 0 to 100.
    quality: int = 75
    # Device of the policy.
    device: str = "cpu"


def load(place: str, device: str) -> Callable[[dict], np.ndarray]:
    """A function from an observation to an action (6,) in the robot's units; its `reset()` begins an episode."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies import get_policy_class, make_pre_post_processors
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    config = PreTrainedConfig.from_pretrained(place)
    config.device = device
    policy = get_policy_class(config.type).from_pretrained(place, config=config)
    where = {"device_processor": {"device": device}}
    preprocess, postprocess = make_pre_post_processors(config, place, preprocessor_overrides=where)

    def act(observation: dict) -> np.ndarray:
        with torch.inference_mode():
            return postprocess(policy.select_action(preprocess(observation)))[0].float().cpu().numpy()

    act.reset = policy.reset
    return act


def play(act: Callable[[dict], np.ndarray], env, seed: int, size: int) -> Iterator[np.ndarray]:
    """An episode as the first camera sees it: uint8 (size, size, 3), from the start to the end."""
    from lerobot.envs.utils import preprocess_observation

    act.reset()
    seen, _ = env.reset(seed=seed)
    over = False
    yield env.simulation.images(size, size)[0].copy()
    while not over:
        observation = preprocess_observation(seen) | {"task": [env.task_description]}
        seen, _, terminated, truncated, _ = env.step(act(observation))
        over = terminated or truncated
        yield env.simulation.images(size, size)[0].copy()


def side(picture: np.ndarray, instruction: str) -> Image.Image:
    """A frame under the words that the policy was given."""
    height, width = picture.shape[:2]
    frame = Image.new("RGB", (width, height + CAPTION), "white")
    frame.paste(Image.fromarray(picture), (0, CAPTION))
    place = (width // 2, CAPTION // 2)
    ImageDraw.Draw(frame).text(place, f"“{instruction}”", "black", ImageFont.load_default(16), anchor="mm")
    return frame


def beside(left: Image.Image, right: Image.Image, gap: int = 8) -> Image.Image:
    """Two frames side by side."""
    both = Image.new("RGB", (left.width + gap + right.width, left.height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + gap, 0))
    return both


def film(config: PictureConfig) -> None:
    """Play the scenes twice, and write what was seen.

    Raises:
        ValueError: the file is larger than a README should load.
    """
    from .env import VirtualSO100GymEnv

    act = load(config.policy, config.device)
    envs = [VirtualSO100GymEnv("reach", FPS, instruction=instruction) for instruction in INSTRUCTIONS]
    frames: list[Image.Image] = []
    durations: list[int] = []
    for seed in range(config.seed, config.seed + config.scenes):
        sides = []
        for env in envs:
            pictures = list(play(act, env, seed, config.size))
            sides.append([side(picture, env.task_description) for picture in pictures])
        frames += [beside(*both) for both in zip(*sides, strict=True)]
        durations += [1000 // FPS] * (len(sides[0]) - 1) + [PAUSE_MS]
    # Where moving pictures are stopped, the first frame is all that is seen: an end, with both arms at their cubes.
    frames, durations = frames[-1:] + frames[:-1], durations[-1:] + durations[:-1]
    config.output.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(
        config.output, save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=config.quality
    )
    if (size := config.output.stat().st_size) > LARGEST:
        raise ValueError(f"{config.output} has {size / 2**20:.1f} MB: fewer --scenes, or a smaller --size or --quality")
    logger.info("wrote %s: %d frames, %.2f MB", config.output, len(frames), size / 2**20)


@draccus.wrap()
def main(config: PictureConfig) -> None:
    """Command line."""
    film(config)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
