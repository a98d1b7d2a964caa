"""Reconstruction loss from raw input against target patches that are cut, normalised and subtracted in PyTorch.

    python benchmarks/masked_patch_mse.py [--quick] [--cases 'video*'] [--dtypes float32,bfloat16] [--batch B] [--graph]

`patches` cuts the whole input into patches and gathers the masked ones, as the released code of masked autoencoders
does; `patches_compiled` is the same under torch.compile. The input is float32, as frames and spectrograms are; the
prediction has the dtype of the row. The floor is reading prediction and target once in each pass and writing the
gradient.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import prod

import op_runner
import torch
from common import OURS
from torch import Tensor

from avfast.nn import patchify
from avfast.ops import masked_patch_mse


@dataclass(frozen=True)
class Case:
    """Inputs of a shape (B, C, ...), patches of a size, so many of them masked."""

    shape: tuple[int, ...]
    patch: tuple[int, ...]
    masked: int
    norm_pix: bool

    @property
    def values(self) -> int:
        return self.shape[1] * prod(self.patch)


def cases(batch: int) -> dict[str, Case]:
    video, frame, audio = (batch, 3, 16, 224, 224), (batch, 3, 224, 224), (batch, 1, 1024, 128)
    return {
        "video-1254": Case(video, (2, 16, 16), 1254, False),
        "video-1254-norm": Case(video, (2, 16, 16), 1254, True),
        "frames-147-norm": Case(frame, (16, 16), 147, True),
        "audio-410": Case(audio, (16, 16), 410, False),
        "tiny": Case((2, 3, 4, 8, 8), (2, 4, 4), 5, True),
    }


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    total = prod(n // p for n, p in zip(case.shape[2:], case.patch, strict=True))
    ids = torch.stack([torch.randperm(total)[: case.masked] for _ in range(case.shape[0])])
    prediction = torch.randn(*ids.shape, case.values).to(device, dtype)
    return [prediction], [torch.randn(case.shape).to(device), ids.to(device)]


def avfast(case: Case, prediction: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    return masked_patch_mse(prediction, x, ids, patch=case.patch, norm_pix=case.norm_pix)


def patches(case: Case, prediction: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    target = patchify(x, case.patch).gather(1, ids[..., None].expand(-1, -1, case.values))
    if case.norm_pix:
        mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6) ** 0.5
    return (prediction - target).square().mean(-1).mean()


def moved(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    values = case.shape[0] * case.masked * case.values
    return values * (dtype.itemsize + 4), values * (2 * dtype.itemsize + 4)


OP = op_runner.Operator(
    "masked_patch_mse",
    cases,
    {OURS: avfast, "patches": patches, "patches_compiled": patches},
    inputs,
    moved,
)


def main(argv: list[str] | None = None) -> int:
    return op_runner.main(OP, __file__, __doc__.splitlines()[0], argv)


if __name__ == "__main__":
    sys.exit(main())
