"""Augmentation of training images: openpi's, and small random shifts.

openpi's is a random crop, rotation, brightness, contrast and saturation per image. Crop and rotation are one resampling
here (two in openpi), and pixels outside of the picture are black. Source: openpi `models/model.py:
preprocess_observation`, `models_pytorch/preprocessing_pytorch.py`.

Shifts are by whole pixels, and edges are repeated (Kostrikov et al. 2020, arXiv 2004.13649). They blur nothing, so
small things stay visible, but no two passes over a scene show the same pixels: it cannot be known by heart.

Images of wrist cameras, which move with the hand, keep their place in both.

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


def _moves(like: Tensor, fixed: Sequence[bool]) -> Tensor:
    """1 for cameras whose images move and 0 for those that stay, (N,)."""
    moves = like.new_ones(len(fixed))
    for camera, still in enumerate(fixed):  # set on the device: the host would wait for the copy of a list
        moves[camera].mul_(not still)
    return moves


def change_of(uniform_FBN: Tensor, fixed: Sequence[bool]) -> Change:
    """The change that six numbers between 0 and 1 describe, for each image.

    Args:
        fixed: per camera, whether it is neither cropped nor rotated.
    """
    u = 2 * uniform_FBN - 1
    moves = _moves(u, fixed)
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


def draw(use: str, numbers: int, seed: int, update: int, samples: Sequence[int], cameras: int) -> Tensor:
    """Uniform numbers (F, B, N), which depend only on their use, seed, update and sample; on the CPU.

    Args:
        use: what they are for, so that two uses get different numbers.
        numbers: F, numbers for each image.
        samples: a number per observation, such as its index in the dataset.
    """
    generators = [generator_of(use, seed, update, sample) for sample in samples]
    return torch.stack([torch.rand(numbers, cameras, generator=generator) for generator in generators], dim=1)


def shift(images_BNCHW: Tensor, uniform_2BN: Tensor, fixed: Sequence[bool], most: float) -> Tensor:
    """Move each image by whole pixels in both directions; what it leaves is filled with its edge.

    Args:
        uniform_2BN: two numbers from 0 to below 1 for each image: how far to the left, and how far up.
        fixed: per camera, whether it stays.
        most: largest shift as a fraction of the image's side; of small images at least a pixel.
    """
    side, device = images_BNCHW.shape[-1], images_BNCHW.device
    farthest = max(1, int(most * side + 1e-6)) if most else 0
    pixels = ((uniform_2BN * (2 * farthest + 1)).floor() - farthest) * _moves(uniform_2BN, fixed)
    places = torch.arange(side, device=device)
    columns_BNW, rows_BNH = (places + pixels[..., None].long()).clamp(0, side - 1)
    # Whole rows of pixels first, as they lie in memory: a gather in both directions takes four times as long.
    first = side * torch.arange(images_BNCHW[..., 0, 0].numel(), device=device).view(images_BNCHW.shape[:3])
    rows = (first[..., None] + rows_BNH[:, :, None]).flatten()
    images = images_BNCHW.reshape(-1, side).index_select(0, rows).view(images_BNCHW.shape)
    return images.gather(4, columns_BNW[:, :, None, None].expand(images.shape))


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
