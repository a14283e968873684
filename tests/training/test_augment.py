"""Augmentation against transforms whose result is known, and its draws against what they may depend on."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import CAMERAS, make_batch, relative, small_policy

from lerobot_pi0.training.augment import Change, apply, change_of, draw, shift

SIDE = 40


def picture(batch: int = 1, cameras: int = 1) -> torch.Tensor:
    """Smooth colours, different everywhere: (B, N, 3, H, W) in [0.2, 0.8]."""
    y, x = torch.meshgrid(torch.linspace(0, 3, SIDE), torch.linspace(0, 2, SIDE), indexing="ij")
    waves = torch.stack([(x + k * y + k).sin() * 0.3 + 0.5 for k in range(3 * batch * cameras)])
    return waves.view(batch, cameras, 3, SIDE, SIDE)


def change(batch: int = 1, cameras: int = 1, **fields: float) -> Change:
    nothing = {"side": 1, "x": 0, "y": 0, "angle": 0, "brightness": 1, "contrast": 1, "saturation": 1}
    return Change(**{k: torch.full((batch, cameras), float(v)) for k, v in (nothing | fields).items()})


def test_no_change():
    """Catches a resampling that blurs or shifts by half a pixel."""
    torch.testing.assert_close(apply(picture(2, 3), change(2, 3)), picture(2, 3))


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_quarter_turns(turns):
    """Catches a rotation the other way round, off the centre, or of the wrong axes."""
    expected = torch.rot90(picture(), turns, dims=(-2, -1))
    torch.testing.assert_close(apply(picture(), change(angle=turns * math.pi / 2)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("left", "top"), [(0, 0), (2, 0), (1, 2)])
def test_crop_and_resize(left, top):
    """Catches a crop of another size or place than openpi's crop of 95 % that is resized back."""
    size = int(SIDE * 0.95)
    crop = picture()[0][..., top : top + size, left : left + size]
    expected = F.interpolate(crop, size=(SIDE, SIDE), mode="bilinear", align_corners=False)[None]
    x, y = ((2 * start + size) / SIDE - 1 for start in (left, top))
    found = apply(picture(), change(side=0.95, x=x, y=y))
    inner = slice(1, -1)  # at the edge, a crop that was cut out repeats its last pixel
    torch.testing.assert_close(found[..., inner, inner], expected[..., inner, inner], atol=1e-4, rtol=0)


def test_colours():
    """Catches a factor about another point: brightness about 0, contrast about the mean, saturation about grey."""
    images = picture()
    mean, grey = images.mean(), images.mean(dim=2, keepdim=True)
    torch.testing.assert_close(apply(images, change(brightness=1.2)), images * 1.2)
    torch.testing.assert_close(apply(images, change(contrast=0.5)), mean + (images - mean) * 0.5)
    torch.testing.assert_close(apply(images, change(saturation=0.0)), grey.expand_as(images))
    assert apply(images, change(brightness=9.0)).max() == 1  # SigLIP knows nothing brighter


def test_each_image_on_its_own():
    """Catches a change that is shared over a batch or its cameras, or mixed up between them."""
    images, uniform = picture(3, 2), torch.rand(6, 3, 2)
    together = apply(images, change_of(uniform, [False, True]))
    for b in range(3):
        for n in range(2):
            alone = change_of(uniform[:, b : b + 1, n : n + 1], [n == 1])
            torch.testing.assert_close(together[b : b + 1, n : n + 1], apply(images[b : b + 1, n : n + 1], alone))
    assert not torch.allclose(*(apply(images[:1, :1], change_of(u[:, None, None], [False])) for u in torch.rand(2, 6)))


def test_ranges():
    """Catches a crop that leaves the image, and other strengths than openpi's."""
    for value, sign in ((0.0, -1), (1.0, 1)):
        found = change_of(torch.full((6, 1, 2), value), [False, True])
        assert found.side.tolist() == [[pytest.approx(0.95), 1]]
        assert found.x.tolist() == found.y.tolist() == [[pytest.approx(sign * 0.05), 0]]
        assert found.angle.tolist() == [[pytest.approx(sign * math.radians(5)), 0]]
        for field, most in (("brightness", 0.3), ("contrast", 0.4), ("saturation", 0.5)):
            assert getattr(found, field).tolist() == [[pytest.approx(1 + sign * most)] * 2]


def test_autocast_moves_nothing():
    """Catches places that are rounded to bfloat16 while LeRobot trains: half a pixel at the far side of an image."""
    images = torch.linspace(0, 1, 224).expand(1, 1, 3, 224, 224)
    change = change_of(torch.full((6, 1, 1), 0.7), [False])
    with torch.autocast("cpu", torch.bfloat16):
        found = apply(images, change)
    assert torch.equal(found, apply(images, change))


def test_draws():
    """Catches draws that a resumed run, or one on two processes, would not repeat; and draws that repeat too much."""
    both = draw("images", 6, 3, 5, [10, 20], 2)
    assert torch.equal(both[:, 1:], draw("images", 6, 3, 5, [20], 2))
    other = [draw("images", 6, 4, 5, [10], 2), draw("images", 6, 3, 6, [10], 2), draw("shifts", 6, 3, 5, [10], 2)]
    assert len({x.sum().item() for x in (both[:, :1], both[:, 1:], *other)}) == 5


@pytest.mark.parametrize(("most", "pixels"), [(0.1, 4), (0.02, 1), (0.03, 1), (0, 0)])
def test_shifts(most, pixels):
    """Catches a shift that blurs, goes too far or never far enough, wraps around, or moves a fixed camera."""
    images, steps = picture(2 * pixels + 1, 2), 2 * pixels + 1
    uniform = torch.stack([(torch.arange(steps) + 0.5) / steps, (torch.arange(steps).flip(0) + 0.5) / steps])
    found = shift(images, uniform[..., None].expand(-1, -1, 2), [False, True], most)
    assert torch.equal(found[:, 1], images[:, 1])
    edged = F.pad(images[:, 0], (pixels,) * 4, mode="replicate")
    for i in range(steps):  # from the far left and bottom to the far right and top
        top, left = 2 * pixels - i, i
        assert torch.equal(found[i, 0], edged[i, :, top : top + SIDE, left : left + SIDE])
    ends = shift(images[:1], torch.tensor([0.0, 1 - 2**-24]).view(2, 1, 1).expand(2, 1, 2), [False, False], most)
    assert torch.equal(ends[0, 0], edged[0, :, 2 * pixels :, :SIDE][:, :SIDE])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("name", "value", "off"), [("augment_images", True, False), ("augment_shift", 0.2, 0)])
def test_only_in_training(name, value, off):
    """Catches augmented images at the robot or in held-out losses, none in training, or others after a resume."""
    torch.manual_seed(0)
    policy = small_policy(CAMERAS, **{name: value})
    batch = make_batch() | {"index": torch.tensor([4, 8])}

    def images() -> torch.Tensor:
        seen = []
        handle = policy.model.vision.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        policy.losses(batch)
        handle.remove()
        return seen[0]

    plain = images()
    assert torch.equal(plain, torch.stack([batch[key] for key in CAMERAS], dim=1).flatten(0, 1) * 2 - 1)
    policy.train()
    first = images()
    assert torch.equal(first, images())
    assert relative(first, plain) > 0.1
    policy.update()
    assert not torch.equal(first, images())
    policy.config.updates = 0
    del batch[CAMERAS[0]]  # the others keep their changes
    assert torch.equal(images().view(2, 2, 3, 32, 32), first.view(2, 3, 3, 32, 32)[:, 1:])
    setattr(policy.config, name, off)
    assert torch.equal(images().view(2, 2, 3, 32, 32), plain.view(2, 3, 3, 32, 32)[:, 1:])
