"""Augmentation of training images as in openpi: a random crop, rotation, brightness, contrast and saturation per image.

Images of wrist cameras, which move with the hand, are neither cropped nor rotated. Crop and rotation are one resampling
here (two in openpi), and pixels outside of the picture are black. Source: openpi `models/model.py:
preprocess_observation`, `models_pytorch/preprocessing_pytorch.py`.

Axes: B batch, N cameras, C channels, H height, W width.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from einops import rearrange
from torch import Tensor

from .draws import generator_of

CROP = 0.95
"""Side of the crop, as a fraction of the image's."""
DEGREES = 5.0
BRIGHTNESS, CONTRAST, SATURATION = 0.3, 0.4, 0.5
"""Factors are drawn from 1 ± these."""


class Change(NamedTuple):
    """What happens to images; each field (B, N)."""

    side: Tensor  # of the crop, as a fraction of the image's
    x: Tensor  # centre of the crop, in coordinates from -1 to 1
    y: Tensor
    angle: Tensor  # radians, counterclockwise as the picture is seen
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor


def change_of(uniform_FBN: Tensor, fixed: Sequence[bool]) -> Change:
    """The change that six numbers between 0 and 1 describe, for each image.

    Args:
        fixed: per camera, whether it is neither cropped nor rotated.
    """
    u = 2 * uniform_FBN - 1
    moves = u.new_ones(len(fixed))
    for camera, still in enumerate(fixed):  # set on the device: the host would wait for the copy of a list
        moves[camera].mul_(not still)
    margin = (1 - CROP) * moves
    return Change(
        side=(1 - margin).expand_as(u[0]),
        x=u[0] * margin,
        y=u[1] * margin,
        angle=u[2] * math.radians(DEGREES) * moves,
        brightness=1 + u[3] * BRIGHTNESS,
        contrast=1 + u[4] * CONTRAST,
        saturation=1 + u[5] * SATURATION,
    )


def draw(seed: int, update: int, samples: Sequence[int], cameras: int) -> Tensor:
    """Uniform numbers (F, B, N) for `change_of`, which depend only on seed, update and sample; on the CPU.

    Args:
        samples: a number per observation, such as its index in the dataset.
    """
    draws = [torch.rand(6, cameras, generator=generator_of("images", seed, update, sample)) for sample in samples]
    return torch.stack(draws, dim=1)


def apply(images_BNCHW: Tensor, change: Change) -> Tensor:
    """Apply to each image its own change. Images are square and in [0, 1], before and after."""
    batch = len(images_BNCHW)
    images = rearrange(images_BNCHW, "b n c h w -> (b n) c h w")
    side, x, y, angle, *factors = (rearrange(field.to(images.dtype), "b n -> (b n)") for field in change)
    cos, sin = side * angle.cos(), side * angle.sin()
    where = torch.stack([cos, -sin, x, sin, cos, y], dim=1).view(-1, 2, 3)
    with torch.autocast(images.device.type, enabled=False):  # it would round coordinates to half a pixel
        grid = F.affine_grid(where, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    brightness, contrast, saturation = (factor[:, None, None, None] for factor in factors)
    images = images * brightness
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * contrast
    grey = images.mean(dim=1, keepdim=True)
    images = (grey + (images - grey) * saturation).clamp(0, 1)
    return rearrange(images, "(b n) c h w -> b n c h w", b=batch)
