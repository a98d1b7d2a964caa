"""Frames that stay JPEGs until a whole batch of them is decoded, on the device that wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avfast.data.augment import Crop, eval_crop


@dataclass(frozen=True)
class Jpegs:
    """The frames of a clip, not decoded.

    Attributes:
        files: each image once.
        order: which of them each frame is.
        height, width: of all.
        crop: what of them is shown; None for that of evaluation.
    """

    files: tuple[bytes, ...]
    order: tuple[int, ...]
    height: int
    width: int
    crop: Crop | None = None


def decode(clips: Sequence[Jpegs], size: int, device: torch.device | str) -> list[Tensor]:
    """Of each clip (F, 3, size, size) uint8 on ``device``.

    On the CPU these are the frames that loader workers decode. CUDA decodes all images in one call of nvJPEG, whose
    values differ from them by rounding.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    files = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for clip in clips for file in clip.files]
    images = iter(decode_jpeg(files, mode=ImageReadMode.RGB, device=device) if files else [])
    found = []
    for clip in clips:
        own = [next(images) for _ in clip.files]
        frames = torch.stack([own[i] for i in clip.order])
        found.append(eval_crop(frames, size) if clip.crop is None else clip.crop.of(frames, size))
    return found
