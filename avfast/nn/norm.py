"""LayerNorm with an affine set per group of rows, alone or together with the residual addition before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfast.ops.add_layer_norm import add_layer_norm, check_sizes


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
        groups = x.split(check_sizes(sizes, self.sets, x.shape[0]))
        return torch.cat(
            [F.layer_norm(part, (self.dim,), self.weight[i], self.bias[i], self.eps) for i, part in enumerate(groups)]
        )

    def extra_repr(self) -> str:
        """For ``print(module)``."""
        return f"{self.dim}, sets={self.sets}, eps={self.eps}"


Norm = nn.LayerNorm | SplitLayerNorm


def layer_norm(dim: int, sets: int, eps: float) -> Norm:
    """A plain LayerNorm for one affine set, else a :class:`SplitLayerNorm`."""
    return nn.LayerNorm(dim, eps=eps) if sets == 1 else SplitLayerNorm(dim, sets, eps)


def apply_norm(norm: Norm, x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Call either kind."""
    return norm(x, sizes) if isinstance(norm, SplitLayerNorm) else norm(x)


def add_norm(norm: Norm, x: Tensor, update: Tensor | None, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``norm(x + update)`` and ``x + update`` for either kind; no update counts as zero."""
    if update is None:
        return apply_norm(norm, x, sizes), x
    own = sizes if isinstance(norm, SplitLayerNorm) else None
    return add_layer_norm(x, update, norm.weight, norm.bias, own, norm.eps)
