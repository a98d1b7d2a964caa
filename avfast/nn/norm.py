"""LayerNorm with an affine set per group of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SplitLayerNorm(nn.Module):
    """LayerNorm over the last dimension whose scale and shift depend on the row.

    Rows come in ``sets`` consecutive groups, for example all audio tokens of a batch and then all visual tokens, and
    every group has its own affine parameters. One static split replaces a mask or an index per token.

    Args:
        dim: D.
        sets: number of affine sets.
        eps: added to the variance.

    Shapes: ``weight`` and ``bias`` are ``(sets, D)``; input and output ``(T, D)``.
    """

    def __init__(self, dim: int, sets: int = 2, eps: float = 1e-6) -> None:
        super().__init__()
        self.dim, self.sets, self.eps = dim, sets, eps
        self.weight = nn.Parameter(torch.ones(sets, dim))
        self.bias = nn.Parameter(torch.zeros(sets, dim))

    def forward(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Normalise ``(T, D)``; ``sizes`` gives the rows of each group and adds up to T."""
        if len(sizes) != self.sets:
            raise ValueError(f"this SplitLayerNorm has {self.sets} affine sets, got {len(sizes)} group sizes")
        groups = x.split(list(sizes))
        return torch.cat(
            [F.layer_norm(part, (self.dim,), self.weight[i], self.bias[i], self.eps) for i, part in enumerate(groups)]
        )

    def extra_repr(self) -> str:
        """For ``print(module)``."""
        return f"{self.dim}, sets={self.sets}, eps={self.eps}"
