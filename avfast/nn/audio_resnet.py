"""The residual convolutional network of spectrograms of short clips that AVBERT reads audio with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from avfast.nn.bottleneck import EXPANSION, ConvNorm, Norm, run_stage, stage

Variant = Literal["paper", "released"]


class AudioResNet(nn.Module):
    """A ResNet of half the width that keeps the spectrogram's size in its stem: the audio network of AVBERT.

    ``variant="paper"`` (table 3): a 9 x 9 convolution of stride 1, no pooling, bottlenecks of 1 x 1, 3 x 3, 1 x 1. The
    table leaves the strides of the stages open; they are ResNet-50's, 1, 2, 2, 2. ``"released"``, the released code:
    9 x 1 (mel bins), then 1 x 9 (frames), 3 x 1 and 1 x 3 in place of the 3 x 3 of the first two stages, each with norm
    and ReLU, and strides 2, 2, 2, 2.

    Args:
        width: channels of the stem; stage i has ``2^i width`` within and ``4 2^i width`` going out.
        depths: bottlenecks of each stage; (3, 4, 6, 3) is ResNet-50.
        variant: see above.
        strides: of the stages, along mel bins and frames alike; None for the variant's.
        norm: ``"batch"``, ``"sync"`` or ``"group"``: see :class:`avfast.nn.bottleneck.ConvNorm`.
        zero_init: the gain of the last norm of every bottleneck starts at 0.

    ``forward(x)``: log-mel spectrograms ``(N, frames, mels) -> (N, out_features)``, 1024 features for the default
    sizes. With ``grad_checkpointing`` the backward pass recomputes the stem and each stage.
    """

    def __init__(
        self,
        width: int = 32,
        depths: Sequence[int] = (3, 4, 6, 3),
        *,
        variant: Variant = "paper",
        strides: Sequence[int] | None = None,
        norm: Norm = "batch",
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        if variant not in ("paper", "released"):
            raise ValueError(f"variant must be 'paper' or 'released', not {variant!r}")
        released = variant == "released"
        strides = strides or [2 if i or released else 1 for i in range(len(depths))]
        if len(strides) != len(depths):
            raise ValueError(f"{len(depths)} stages want as many strides, not {len(strides)}")
        if released:
            self.stem = nn.Sequential(ConvNorm(1, width, (9, 1), norm=norm), ConvNorm(width, width, (1, 9), norm=norm))
        else:
            self.stem = nn.Sequential(ConvNorm(1, width, (9, 9), norm=norm))
        self.stages = nn.ModuleList()
        channels = width
        for i, (depth, step) in enumerate(zip(depths, strides, strict=True)):
            kernels, steps = [(3, 3)], [(step, step)]
            if released and i < 2:
                kernels, steps = [(3, 1), (1, 3)], [(step, 1), (1, step)]
            kernels, steps = [(1, 1), *kernels, (1, 1)], [(1, 1), *steps, (1, 1)]
            self.stages.append(stage(channels, width * 2**i, depth, kernels, steps, norm, zero_init))
            channels = EXPANSION * width * 2**i
        self.out_features = channels
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """``(N, frames, mels) -> (N, out_features)``."""
        if x.ndim != 3:
            raise ValueError(f"expected spectrograms (N, frames, mels), got a tensor of shape {tuple(x.shape)}")
        x = x.transpose(1, 2).unsqueeze(1)  # rows are mel bins
        for part in (self.stem, *self.stages):
            x = run_stage(part, x, self.grad_checkpointing)
        return x.mean((2, 3))
