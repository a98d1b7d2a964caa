"""What residual convolutional networks of images, spectrograms and videos share: bottleneck stages of any kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from avfast.distributed import all_sum_with_gradient, world_size

Norm = Literal["batch", "sync", "group"]
Kernel = tuple[int, ...]
EXPANSION = 4
"""Channels of a bottleneck's output over those within."""


class SyncBatchNorm(_BatchNorm):
    """Batch norm with the statistics of all processes, on a CPU too, where PyTorch's refuses.

    In a single process it is PyTorch's, for inputs of any number of axes. Processes may bring batches of different
    sizes, or none. (On GPUs :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm` makes fused ones of these.)
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected (N, C, ...), got {tuple(input.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, ...) -> (N, C, ...)``."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        axes, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        own = torch.cat([wide.sum(axes), wide.new_full((1,), x.numel() // x.shape[1])])
        total, count = all_sum_with_gradient(own).split([x.shape[1], 1])
        mean = total / count
        centred = wide - mean.view(shape)
        variance = all_sum_with_gradient(centred.square().sum(axes)) / count
        if self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum or 0.0)
                unbiased = variance * (count / (count - 1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum or 0.0)
        scale = (variance + self.eps).rsqrt() * self.weight
        return torch.addcmul(self.bias.view(shape), centred, scale.view(shape)).to(x.dtype)


class ConvNorm(nn.Sequential):
    """Convolution without bias that keeps sizes (up to its stride), norm, and ReLU unless told otherwise.

    Args:
        in_channels: C.
        out_channels: C'.
        kernel: odd extent along each of the input's two or three axes.
        stride: along each; 1 everywhere by default.
        norm: ``"batch"``; ``"sync"``: :class:`SyncBatchNorm`; or ``"group"``: groups of 16 channels (one group where
            there are fewer), whose statistics are those of one sample, so that no result depends on the rest of the
            batch.
        relu: whether a ReLU follows.

    ``(N, C, ...) -> (N, C', ...)``.
    """

    norm: _BatchNorm | nn.GroupNorm

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Kernel,
        stride: Kernel | None = None,
        norm: Norm = "batch",
        relu: bool = True,
    ) -> None:
        super().__init__()
        if norm not in get_args(Norm):
            raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, not {norm!r}")
        conv: Any = {2: nn.Conv2d, 3: nn.Conv3d}[len(kernel)]
        padding = tuple(k // 2 for k in kernel)
        self.conv = conv(in_channels, out_channels, kernel, stride or 1, padding=padding, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if norm == "sync":
            self.norm = SyncBatchNorm(out_channels)
        elif norm == "batch":
            self.norm = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[len(kernel)](out_channels)
        else:
            self.norm = nn.GroupNorm(math.gcd(out_channels, max(out_channels // 16, 1)), out_channels)
        if relu:
            self.relu = nn.ReLU(inplace=True)


class Bottleneck(nn.Module):
    """A residual block: convolutions through fewer channels beside a shortcut (He et al., 2016, figure 5).

    Args:
        in_channels: C.
        width: channels within; 4 times as many come out.
        kernels: of the convolutions, the first of which narrows and the last of which widens.
        strides: of the convolutions, as many.
        norm: see :class:`ConvNorm`.
        zero_init: the last norm's gain starts at 0, so that the block starts as its shortcut (Goyal et al., 2017).

    ``forward(x)``: ``(N, C, ...) -> (N, 4 width, ...)``.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        kernels: Sequence[Kernel],
        strides: Sequence[Kernel],
        norm: Norm = "batch",
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        channels = [in_channels, *[width] * (len(kernels) - 1), EXPANSION * width]
        layers = [
            ConvNorm(channels[i], channels[i + 1], kernel, stride, norm, relu=i < len(kernels) - 1)
            for i, (kernel, stride) in enumerate(zip(kernels, strides, strict=True))
        ]
        if zero_init:
            nn.init.zeros_(layers[-1].norm.weight)
        self.layers = nn.Sequential(*layers)
        stride = tuple(math.prod(steps) for steps in zip(*strides, strict=True))
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != EXPANSION * width or any(step > 1 for step in stride):
            self.shortcut = ConvNorm(in_channels, EXPANSION * width, (1,) * len(stride), stride, norm, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, ...) -> (N, 4 width, ...)``."""
        return F.relu(self.layers(x) + self.shortcut(x), inplace=True)


def stage(
    in_channels: int,
    width: int,
    depth: int,
    kernels: Sequence[Kernel],
    strides: Sequence[Kernel],
    norm: Norm = "batch",
    zero_init: bool = True,
) -> nn.Sequential:
    """``depth`` bottlenecks of the same kernels, the first of which takes the strides; see :class:`Bottleneck`."""
    ones = [(1,) * len(kernel) for kernel in kernels]
    return nn.Sequential(
        *(
            Bottleneck(EXPANSION * width if i else in_channels, width, kernels, ones if i else strides, norm, zero_init)
            for i in range(depth)
        )
    )


def run_stage(module: nn.Module, x: Tensor, recompute: bool) -> Tensor:
    """``module(x)``, with what it computes within recomputed in the backward pass instead of kept if asked.

    The running statistics of batch norms are updated by the first computation alone.
    """
    if not recompute or not torch.is_grad_enabled():
        return module(x)

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _running_statistics_kept(module)

    # A compiled graph recomputes values alone, and takes no such contexts.
    settings: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": contexts}
    return checkpoint(module, x, use_reentrant=False, preserve_rng_state=False, **settings)


@contextmanager
def _running_statistics_kept(module: nn.Module) -> Iterator[None]:
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm, (_, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = 0.0, None if count is None else count.clone()
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
