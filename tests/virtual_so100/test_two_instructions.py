"""The README's moving picture: one policy, two instructions, the same scenes."""

import numpy as np
import pytest
from conftest import stats, tiny_config
from PIL import Image

pytest.importorskip("lerobot_env_virtual_so100", reason="pip install -e examples/virtual_so100 (make setup does)")

import needs_rendering  # noqa: F401
from lerobot_env_virtual_so100 import two_instructions
from lerobot_env_virtual_so100.constants import CAMERAS

from lerobot_pi0 import PI0Policy, make_pi0_pre_post_processors


@pytest.fixture
def checkpoint(tmp_path):
    cameras = [f"observation.images.{name}" for name in CAMERAS]
    policy = PI0Policy(tiny_config(cameras, n_action_steps=10))
    policy.save_pretrained(tmp_path / "policy")
    for pipeline in make_pi0_pre_post_processors(policy.config, stats(cameras=cameras)):
        pipeline.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def test_the_picture(checkpoint, tmp_path, monkeypatch):
    """Catches a picture that stands still, sides that begin differently or are told the same, and too large a file."""
    told = []

    def side(picture: np.ndarray, words: str) -> Image.Image:
        told.append((picture, words))
        return Image.fromarray(picture)

    monkeypatch.setattr(two_instructions, "side", side)
    config = two_instructions.PictureConfig(policy=str(checkpoint), output=tmp_path / "film.webp", scenes=1, size=64)
    two_instructions.film(config)
    frames = len(told) // 2
    left, right = told[:frames], told[frames:]
    assert {words for _, words in left}.isdisjoint(words for _, words in right)
    assert (left[0][0] == right[0][0]).all() and (left[0][0] != left[-1][0]).any()
    with Image.open(config.output) as film:
        assert film.is_animated and film.n_frames > frames // 2 and film.size == (2 * 64 + 8, 64)
    monkeypatch.setattr(two_instructions, "LARGEST", 100)
    with pytest.raises(ValueError, match="fewer --scenes"):
        two_instructions.film(config)


def test_a_side_shows_the_words():
    """Catches a caption that is not drawn: both sides of the film would say nothing."""
    frame = np.asarray(two_instructions.side(np.full((320, 320, 3), 200, np.uint8), "go to the green cube"))
    assert frame.shape == (320 + two_instructions.CAPTION, 320, 3)
    assert frame[: two_instructions.CAPTION].min() < 50 and (frame[two_instructions.CAPTION :] == 200).all()
