"""Position tables."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_2d(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed sine-cosine positions of a grid, ``(rows * columns, dim)`` float32, row-major.

    The first half of the channels encodes the column, the second the row; within each half sines come before cosines,
    at frequencies 10000^(-2 i / (dim / 2)) (He et al., Masked Autoencoders, released code).
    """
    if dim % 4:
        raise ValueError(f"dim must be a multiple of 4, got {dim}")
    frequencies = 1e4 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [position.reshape(-1, 1) * frequencies for position in (column, row)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1).float()
