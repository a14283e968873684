"""How pictures shrink: `image_resize` against what openpi computes, by jax and by Pillow."""

import json

import numpy as np
import pytest
import torch
from conftest import CAMERAS, make_batch, tiny_config
from PIL import Image

from lerobot_pi0 import PI0Policy
from lerobot_pi0.inputs.observation import ObservationMaker, resize_with_pad
from lerobot_pi0.tools import main

SIZES = [(480, 640), (640, 480), (720, 1280), (224, 224), (300, 226), (225, 224), (100, 90), (448, 448), (1, 500)]


def picture(size, seed: int = 0) -> np.ndarray:
    """8-bit noise over a slope, (H, W, 3): noise shows aliasing, the slope a shift."""
    slope = np.linspace(0, 100, size[1])[None, :, None] + np.linspace(0, 50, size[0])[:, None, None]
    return (slope + np.random.default_rng(seed).integers(0, 106, (*size, 3))).astype(np.uint8)


def placed(resize, image: np.ndarray, side: int = 224) -> np.ndarray:
    """openpi's `resize_with_pad`: a scale that is the same for both axes, whole pixels, centred on black."""
    ratio = max(image.shape[1] / side, image.shape[0] / side)
    height, width = int(image.shape[0] / ratio), int(image.shape[1] / ratio)
    made = np.zeros((side, side, 3), np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    if height and width:
        made[top : top + height, left : left + width] = resize(image, height, width)
    return made


def ours(image: np.ndarray, antialias: bool) -> np.ndarray:
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    return resize_with_pad(x, 224, antialias)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", SIZES[:-1])
def test_as_openpis_jax_model(size):
    """Catches another kernel, another centre or another place of the picture than openpi's `image_tools`, which calls
    jax.image.resize with its linear method: pixels would be those of another picture."""
    jax = pytest.importorskip("jax")

    def resize(image, height, width):
        return jax.image.resize(image.astype(np.float32) / 255, (height, width, 3), method="linear")

    assert np.abs(ours(picture(size), antialias=True) - placed(resize, picture(size))).max() < 1e-5


@pytest.mark.parametrize("size", SIZES[:-1])
def test_as_openpis_client(size):
    """Catches the same against openpi's transform of training data and its client, which call Pillow on 8-bit pictures:
    what is left is the rounding to 8 bits."""

    def resize(image, height, width):
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)) / 255

    assert np.abs(ours(picture(size), antialias=True) - placed(resize, picture(size))).max() < 1.6 / 255


def test_how_far_the_two_are_apart():
    """Catches an option that changes nothing, or that changes pictures which do not shrink; and the numbers of
    docs/checkpoints.md: noise keeps 67 % of its deviation, or 23 %."""
    noise = torch.from_numpy(np.random.default_rng(0).random((1, 3, 480, 640), np.float32))
    inner = slice(30, 190)
    plain, smooth = (resize_with_pad(noise, 224, x)[..., inner, :].std() / noise.std() for x in (False, True))
    assert abs(plain - 0.67) < 0.02
    assert abs(smooth - 0.235) < 0.02
    for size in ((100, 90), (224, 224), (64, 224)):
        small = torch.rand(1, 3, *size)
        assert torch.allclose(resize_with_pad(small, 224, True), resize_with_pad(small, 224, False), atol=1e-6)


def test_the_option(tmp_path, capsys):
    """Catches an option that the policy does not obey, that a checkpoint forgets, that `show` does not name, or a
    default that is not LeRobot's."""
    batch = make_batch(size=200, cameras=CAMERAS[:1])
    seen = {}
    for value in (None, "lerobot", "openpi"):
        policy = PI0Policy(tiny_config(CAMERAS[:1], image_resize=value))
        policy.save_pretrained(tmp_path / str(value))
        assert json.loads((tmp_path / str(value) / "lerobot_pi0.json").read_text())["image_resize"] == (
            value or "lerobot"
        )
        again = PI0Policy.from_pretrained(tmp_path / str(value))
        seen[value] = again.observe(batch, torch.device("cpu")).images_BNCHW
    expected = resize_with_pad(batch[CAMERAS[0]], 64, antialias=True) * 2 - 1
    assert torch.equal(seen["openpi"][:, 0], expected)
    assert torch.equal(seen[None], seen["lerobot"])
    assert (seen["lerobot"] - seen["openpi"]).abs().mean() > 0.02
    assert main(["show", "--source", str(tmp_path / "openpi")]) == 0
    assert any(line.split() == ["image_resize", "openpi"] for line in capsys.readouterr().out.splitlines())


def test_checkpoints_of_before(tmp_path):
    """Catches a checkpoint that was saved before there was a choice and is taken for the other kind."""
    policy = PI0Policy(tiny_config(CAMERAS[:1]))
    policy.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "lerobot_pi0.json").read_text())
    del saved["image_resize"]
    (tmp_path / "lerobot_pi0.json").write_text(json.dumps(saved))
    assert PI0Policy.from_pretrained(tmp_path).config.image_resize == "lerobot"
    assert ObservationMaker(tiny_config(CAMERAS[:1])).config.image_resize is None  # not built: as LeRobot, too
