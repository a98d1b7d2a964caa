"""Convolutional networks of short clips: SlowFast (Feichtenhofer et al., 2019) and a 3D ResNet of one pathway."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from avfast.nn.bottleneck import EXPANSION, ConvNorm, Norm, run_stage, stage


class VideoResNet(nn.Module):
    """A 3D ResNet that strides in space alone after its stem: the visual network of AVBERT's released code.

    Convolution of temporal kernel x 7 x 7 with stride (temporal_stride, 2, 2), max pooling 1 x 3 x 3 with stride
    (1, 2, 2), then stages of bottlenecks ``(k, 1, 1), (1, 3, 3), (1, 1, 1)`` whose spatial strides are 1, 2, 2, 2, and
    the mean over space and time.

    Args:
        width: channels of the stem; stage i has ``2^i width`` within and ``4 2^i width`` going out.
        depths: bottlenecks of each stage; (3, 4, 6, 3) is ResNet-50.
        temporal_kernels: of the stem and of the first convolution of the bottlenecks of each stage.
        temporal_stride: of the stem.
        extra_channels: channels that each stage reads beside those of the stage before it (:class:`SlowFast`).
        norm: ``"batch"``, ``"sync"`` or ``"group"``: see :class:`avfast.nn.bottleneck.ConvNorm`.
        zero_init: the gain of the last norm of every bottleneck starts at 0.

    ``forward(x)``: ``(N, 3, t, H, W) -> (N, out_features)``, 2048 features for the default sizes. With
    ``grad_checkpointing`` the backward pass recomputes the stem and each stage.
    """

    def __init__(
        self,
        width: int = 64,
        depths: Sequence[int] = (3, 4, 6, 3),
        *,
        temporal_kernels: Sequence[int] = (5, 1, 1, 3, 3),
        temporal_stride: int = 2,
        extra_channels: Sequence[int] = (0, 0, 0, 0),
        norm: Norm = "batch",
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        if not len(temporal_kernels) - 1 == len(depths) <= len(extra_channels):
            raise ValueError(
                f"{len(depths)} stages want {len(depths) + 1} temporal_kernels, not {len(temporal_kernels)}"
            )
        self.stem = nn.Sequential(
            ConvNorm(3, width, (temporal_kernels[0], 7, 7), (temporal_stride, 2, 2), norm),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        )
        self.stages = nn.ModuleList()
        channels = width
        for i, (depth, k, extra) in enumerate(zip(depths, temporal_kernels[1:], extra_channels, strict=False)):
            step = (1, 2, 2) if i else (1, 1, 1)
            kernels, strides = [(k, 1, 1), (1, 3, 3), (1, 1, 1)], [(1, 1, 1), step, (1, 1, 1)]
            self.stages.append(stage(channels + extra, width * 2**i, depth, kernels, strides, norm, zero_init))
            channels = EXPANSION * width * 2**i
        self.out_features = channels
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, t, H, W) -> (N, out_features)``."""
        _check(x)
        for part in (self.stem, *self.stages):
            x = run_stage(part, x, self.grad_checkpointing)
        return x.mean((2, 3, 4))


class SlowFast(nn.Module):
    """Two 3D ResNets, of few frames with many channels and of many frames with few: the visual network of AVBERT.

    The slow pathway reads every ``alpha``-th frame. Before each of its stages it is joined by the fast pathway's
    channels, doubled by a 5 x 1 x 1 convolution of stride (alpha, 1, 1), which is centred on the slow frames, and its
    norm and ReLU (section 3.3 of SlowFast). The features are the means over space and time of the slow pathway, then of
    the fast one.

    Args:
        width: channels of the slow pathway's stem; see :class:`VideoResNet`.
        depths: bottlenecks of each of the four stages, in both pathways; (3, 4, 6, 3) is ResNet-50.
        alpha: fast frames per slow frame; a clip need not be a multiple of them.
        beta: channels of the fast pathway over those of the slow one.
        norm: ``"batch"``, ``"sync"`` or ``"group"``: see :class:`avfast.nn.bottleneck.ConvNorm`.
        zero_init: the gain of the last norm of every bottleneck starts at 0.

    ``forward(x)``: the fast pathway's frames ``(N, 3, t, H, W) -> (N, out_features)``, 2048 + 256 features for the
    default sizes. With ``grad_checkpointing`` the backward pass recomputes the stems and each stage.

    Raises:
        ValueError: if ``beta * width`` is no whole number of channels.
    """

    def __init__(
        self,
        width: int = 64,
        depths: Sequence[int] = (3, 4, 6, 3),
        *,
        alpha: int = 8,
        beta: float = 1 / 8,
        norm: Norm = "batch",
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        if not (beta * width).is_integer() or beta <= 0:
            raise ValueError(f"the fast pathway would have beta * width = {beta} * {width} channels")
        if len(depths) != 4:
            raise ValueError(f"depths names the bottlenecks of four stages, not of {len(depths)}")
        narrow = int(beta * width)
        channels = [narrow, *(EXPANSION * narrow * 2**i for i in range(3))]
        self.alpha = alpha
        self.slow = VideoResNet(
            width,
            depths,
            temporal_kernels=(1, 1, 1, 3, 3),
            temporal_stride=1,
            extra_channels=[2 * c for c in channels],
            norm=norm,
            zero_init=zero_init,
        )
        self.fast = VideoResNet(
            narrow, depths, temporal_kernels=(5, 3, 3, 3, 3), temporal_stride=1, norm=norm, zero_init=zero_init
        )
        self.lateral = nn.ModuleList(ConvNorm(c, 2 * c, (5, 1, 1), (alpha, 1, 1), norm) for c in channels)
        self.out_features = self.slow.out_features + self.fast.out_features
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, t, H, W) -> (N, out_features)``."""
        _check(x)
        recompute = self.grad_checkpointing
        slow = run_stage(self.slow.stem, x[:, :, :: self.alpha], recompute)
        fast = run_stage(self.fast.stem, x, recompute)
        for lateral, slow_stage, fast_stage in zip(self.lateral, self.slow.stages, self.fast.stages, strict=True):
            slow = run_stage(slow_stage, torch.cat([slow, lateral(fast)], 1), recompute)
            fast = run_stage(fast_stage, fast, recompute)
        return torch.cat([slow.mean((2, 3, 4)), fast.mean((2, 3, 4))], 1)


def _check(x: Tensor) -> None:
    if x.ndim != 5 or x.shape[1] != 3:
        raise ValueError(f"expected clips (N, 3, t, H, W), got a tensor of shape {tuple(x.shape)}")
