"""Crops of frames, their parameters drawn from a generator that the caller names."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_AT_A_TIME = 32  # frames that are resized together: where that needs floating point, a whole video is gigabytes


def random_crop_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a box with an area share from ``scale`` and an aspect from ``ratio`` (log-uniform).

    The sampling of torchvision's RandomResizedCrop, which draws from torch's global generator; boxes that do not fit in
    ten trials give way to the largest central one within ``ratio``.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class Crop:
    """What training shows of frames: the box (top, left, height, width), mirrored or not."""

    box: tuple[int, int, int, int]
    flip: bool

    @classmethod
    def draw(cls, height: int, width: int, rng: np.random.Generator, scale: tuple[float, float] = (0.2, 1.0)) -> Crop:
        """A random box and a coin for the flip."""
        return cls(random_crop_box(height, width, rng, scale), rng.random() < 0.5)

    def of(self, frames: Tensor, size: int) -> Tensor:
        """(F, 3, H, W) uint8 -> (F, 3, size, size), the same of all frames."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional

        def cropped(part: Tensor) -> Tensor:
            return functional.resized_crop(part, *self.box, [size, size], InterpolationMode.BICUBIC, antialias=True)

        frames = _in_parts(frames, cropped)
        return functional.horizontal_flip(frames) if self.flip else frames


def train_crop(
    frames: Tensor, size: int, rng: np.random.Generator, *, scale: tuple[float, float] = (0.2, 1.0)
) -> Tensor:
    """(F, 3, H, W) uint8 -> (F, 3, size, size): one random :class:`Crop` for all frames."""
    return Crop.draw(frames.shape[-2], frames.shape[-1], rng, scale).of(frames, size)


def eval_crop(frames: Tensor, size: int) -> Tensor:
    """(F, 3, H, W) uint8 -> (F, 3, size, size): the short side resized to ``size``, then the centre."""
    from torchvision.transforms.v2 import functional

    return functional.center_crop(resize_short_side(frames, size), [size, size])


def resize_short_side(frames: Tensor, size: int) -> Tensor:
    """(F, 3, H, W) uint8 with the shorter of H and W resized to ``size``, bicubic with antialiasing."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    height, width = frames.shape[-2:]
    short = min(height, width)
    to = [max(size, round(height * size / short)), max(size, round(width * size / short))]
    if to == [height, width]:
        return frames
    return _in_parts(frames, lambda part: functional.resize(part, to, InterpolationMode.BICUBIC, antialias=True))


def _in_parts(frames: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    if len(frames) <= _AT_A_TIME:
        return change(frames)
    return torch.cat([change(part) for part in frames.split(_AT_A_TIME)])
