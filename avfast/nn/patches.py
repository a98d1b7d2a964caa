"""Images, spectrograms and videos as grids of patches: cut, embedded, given positions, put together again.

A grid has as many axes as the input has beyond batch and channels: (rows, columns) of an image, (mel, time) or
(time, mel) of a spectrogram, (time, rows, columns) of a video. Patches are numbered row-major, the last axis fastest.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfast.ops.patch_embed_kept import patch_embed_kept


def tiles(x: Tensor, patch: Sequence[int]) -> Tensor:
    """``(B, C, *size)`` as a view ``(B, *grid, C, *patch)``; remainders of the size by the patch are dropped."""
    if x.ndim != 2 + len(patch):
        raise ValueError(
            f"patches of {shown(patch)} need {2 + len(patch)} dimensions (B, C, ...), got {tuple(x.shape)}"
        )
    axes = range(2, 2 + 2 * len(patch), 2)
    for axis, p in zip(axes, patch, strict=True):
        count = x.shape[axis] // p
        x = x.narrow(axis, 0, count * p).unflatten(axis, (count, p))
    return x.permute(0, *axes, 1, *(axis + 1 for axis in axes))


def patchify(x: Tensor, patch: Sequence[int]) -> Tensor:
    """``(B, C, *size)`` to ``(B, N, P)`` patches; the P values of one run over the patch, row-major, then channels.

    Remainders of the size by the patch are dropped.
    """
    n = len(patch)
    return tiles(x, patch).movedim(1 + n, -1).flatten(1 + n).flatten(1, n)


def unpatchify(patches: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Undo :func:`patchify`: ``(B, N, P)`` to ``(B, C, *size)``, each size grid times patch."""
    n, channels = len(grid), patches.shape[2] // prod(patch)
    x = patches.unflatten(2, (*patch, channels)).unflatten(1, tuple(grid))
    x = x.permute(0, -1, *(axis for i in range(1, 1 + n) for axis in (i, i + n)))
    for axis in range(2, 2 + n):
        x = x.flatten(axis, axis + 1)
    return x


class PatchEmbed(nn.Module):
    """Patches to tokens, for all patches or only for the kept ones.

    Args:
        img_size: of the input beyond batch and channels: (H, W), (mels, frames), (T, H, W).
        patch_size: along each of these axes; one number stands for all.
        in_chans: C.
        embed_dim: D.

    ``grid_size``: patches along each axis; ``num_patches``: N, all of them; ``values``: P, numbers in one.
    ``proj`` is timm's convolution ``(D, C, *patch_size)``. Remainders of the input by the patch are dropped.
    """

    def __init__(self, img_size: Sequence[int], patch_size: int | Sequence[int], in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.img_size = tuple(img_size)
        axes = len(self.img_size)
        self.patch_size = (patch_size,) * axes if isinstance(patch_size, int) else tuple(patch_size)
        if axes not in (2, 3) or len(self.patch_size) != axes:
            raise ValueError(f"need 2 or 3 sizes and as many patch sizes, got {self.img_size} and {self.patch_size}")
        self.grid_size = tuple(size // p for size, p in zip(self.img_size, self.patch_size, strict=True))
        self.num_patches, self.values = prod(self.grid_size), in_chans * prod(self.patch_size)
        if self.num_patches == 0:
            raise ValueError(f"an input of {self.img_size} holds no patch of {shown(self.patch_size)}")
        conv: Any = nn.Conv2d if axes == 2 else nn.Conv3d  # holds the parameters and is not called
        self.proj = conv(in_chans, embed_dim, self.patch_size, self.patch_size)

    def forward(self, images: Tensor, rows: Tensor | None = None) -> Tensor:
        """Embed patches.

        Args:
            images: ``(B, C, *img_size)``.
            rows: ``(T,)`` int64, entries of the flattened (B, N) patch list; default all of them. Others are not read.

        Returns:
            ``(T, D)``, or ``(B * N, D)`` without ``rows``.
        """
        if images.shape[1:] != (self.proj.in_channels, *self.img_size):
            size = ", ".join(map(str, (self.proj.in_channels, *self.img_size)))
            raise ValueError(f"expected (B, {size}), got {tuple(images.shape)}")
        axes, weight, bias = len(self.grid_size), self.proj.weight, self.proj.bias
        if rows is not None and axes == 2 and len(set(self.patch_size)) == 1:
            return patch_embed_kept(images, weight, bias, rows)
        patches = tiles(images, self.patch_size)
        if rows is None:
            patches = patches.flatten(axes + 1).flatten(0, axes)
        else:
            patches = patches[torch.unravel_index(rows, patches.shape[: axes + 1])].flatten(1)
        return F.linear(patches, weight.flatten(1), bias)


def shown(patch: Sequence[int]) -> str:
    """``16 x 16`` and the like, for messages."""
    return " x ".join(map(str, patch))


# Positions.


def sincos(dim: int, grid: Sequence[int]) -> Tensor:
    """Fixed sine-cosine positions of a grid, ``(N, dim)`` float32, row-major.

    The channels are divided evenly among the n axes, the last axis first (column before row); within its share sines
    come before cosines, at frequencies 10000^(-2 i / (dim / n)) (He et al., Masked Autoencoders, released code).
    """
    count, rest = divmod(dim, 2 * len(grid))
    if rest:
        raise ValueError(f"dim must be a multiple of {2 * len(grid)}, got {dim}")
    frequencies = 1e4 ** -(torch.arange(count, dtype=torch.float64) / count)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [position.reshape(-1, 1) * frequencies for position in reversed(axes)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1).float()


class SpaceTimePositions(nn.Module):
    """Position = vector of the time + vector of the place (Feichtenhofer et al., Masked Autoencoders As
    Spatiotemporal Learners, section 3), each from a table of its own.

    Args:
        dim: D.
        grid: (time, rows, columns).
        trained: both tables are trained, from the sine-cosine start of the fixed ones.

    ``temporal`` is ``(1, time, D)``, ``spatial`` ``(1, rows * columns, D)``. ``forward()`` gives ``(1, N, D)``.
    """

    def __init__(self, dim: int, grid: Sequence[int], trained: bool = False) -> None:
        super().__init__()
        self.temporal = nn.Parameter(sincos(dim, grid[:1])[None], requires_grad=trained)
        self.spatial = nn.Parameter(sincos(dim, grid[1:])[None], requires_grad=trained)

    def forward(self) -> Tensor:
        """The table of all patches, ``(1, N, D)``."""
        return (self.temporal[:, :, None] + self.spatial[:, None]).flatten(1, 2)


Positions = nn.Parameter | SpaceTimePositions
"""A table ``(1, N, D)``, or what gives it."""


def positions(dim: int, grid: Sequence[int], trained: bool = False) -> Positions:
    """Sine-cosine positions of a grid, fixed or the start of trained ones: of three axes separable, else one table."""
    if len(grid) == 3:
        return SpaceTimePositions(dim, grid, trained)
    return nn.Parameter(sincos(dim, grid)[None], requires_grad=trained)


def table(positions: Positions) -> Tensor:
    """``(1, N, D)`` of either kind."""
    return positions() if isinstance(positions, SpaceTimePositions) else positions
