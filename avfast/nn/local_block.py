"""The blocks of AudioMAE's local decoder: attention within windows of a grid, after Swin Transformer V2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from avfast.nn.block import Mlp, Read
from avfast.nn.norm import Norm, apply_norm
from avfast.ops import AttentionPlan
from avfast.ops._shared import without_autocast
from avfast.ops.local_attention import local_attention
from avfast.packing import take_rows

LEAST_TAU = 0.01


class PositionBiasMlp(nn.Module):
    """What is added to the logits of two tokens of a window, from how far apart they are: 2 -> hidden -> heads, ReLU.

    Args:
        num_heads: heads.
        hidden: width in between.
    """

    def __init__(self, num_heads: int, hidden: int = 384) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2, hidden)
        self.fc2 = nn.Linear(hidden, num_heads)

    def forward(self, distances: Tensor) -> Tensor:
        """``(W, W, 2)`` distances to ``(heads, W, W)``, in at least float32 under autocast too."""
        with without_autocast(distances):
            return self.fc2(F.relu(self.fc1(distances.to(self.fc1.weight.dtype)))).movedim(-1, 0)


class LocalAttention(nn.Module):
    """Multi-head attention within the windows of a grid: cosine logits over a learned temperature, and a bias from
    log-spaced distances (:func:`~avfast.ops.local_attention`).

    Args:
        dim: D, a multiple of ``num_heads``.
        num_heads: heads.
        window: (rows, columns) of a window.
        shift: tokens by which windows begin later.
        meta_hidden: width of the network that gives the bias.

    The released network drops 10 % of its hidden values in training; this one does not.
    """

    distances: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: tuple[int, int] = (4, 4),
        shift: tuple[int, int] = (0, 0),
        meta_hidden: int = 384,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads, self.window, self.shift = num_heads, window, shift
        self.tau = nn.Parameter(torch.ones(num_heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.meta_mlp = PositionBiasMlp(num_heads, meta_hidden)
        self.register_buffer("distances", log_distances(window), persistent=False)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """``(B, N, D) -> (B, N, D)`` for the N tokens of a (rows, columns) grid, row by row."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        scale = 1 / self.tau.clamp(min=LEAST_TAU)
        bias = self.meta_mlp(self.distances)
        out = local_attention(qkv, bias, scale, grid=grid, window=self.window, shift=self.shift)
        return self.proj(out.flatten(2))


def log_distances(window: tuple[int, int]) -> Tensor:
    """``(W, W, 2)`` float32 sign(d) log(1 + |d|) of the (row, column) distance d from key to query."""
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in window)).view(-1, 2)
    distance = places[:, None] - places
    return distance.sign() * distance.abs().log1p()


class LocalBlock(nn.Module):
    """x + norm1(attention(x)), then x + norm2(mlp(x)), on the tokens of a grid.

    Args:
        dim: D.
        num_heads: heads.
        mlp_ratio: hidden width of the MLP over D.
        window: (rows, columns) of a window.
        shift: tokens by which windows begin later; AudioMAE's odd blocks have (2, 0).
        eps: of the LayerNorms.

    Parameters have the names of AudioMAE's released decoder blocks.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        window: tuple[int, int] = (4, 4),
        shift: tuple[int, int] = (0, 0),
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = LocalAttention(dim, num_heads, window, shift)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """``(B, N, D) -> (B, N, D)`` for the N tokens of a (rows, columns) grid, row by row."""
        x = x + self.norm1(self.attn(x, grid))
        return x + self.norm2(self.mlp(x))


class LocalBlocks(nn.ModuleList):
    """The stack of a decoder (:mod:`avfast.nn.decoder`) in which tokens attend within windows, every other block's
    windows shifted. No further tokens may stand in front of the grid's.

    Args:
        dim: d.
        depth: blocks; AudioMAE's release has 16, DiffMAViL 8.
        num_heads: heads of a block.
        mlp_ratio: of the blocks.
        eps: of their LayerNorms.
        grid: (rows, columns) of patches, multiples of the window's.
        window: (rows, columns) of a window.
        shift: of the windows of odd blocks; (0, 0) for none.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        eps: float = 1e-6,
        *,
        grid: tuple[int, int],
        window: tuple[int, int] = (4, 4),
        shift: tuple[int, int] = (2, 0),
    ) -> None:
        super().__init__(
            LocalBlock(dim, num_heads, mlp_ratio, window, shift if i % 2 else (0, 0), eps) for i in range(depth)
        )
        self.grid = grid

    def forward(
        self,
        x: Tensor,
        plan: AttentionPlan,
        scatter_index: Tensor | None,
        read: Read | None,
        norm: Norm,
        recompute: bool,
    ) -> Tensor:
        """All blocks and the final norm, see :meth:`avfast.nn.SelfBlocks.forward`: ``(B * N, d)``, or ``(M, d)``."""
        x = x.unflatten(0, (-1, self.grid[0] * self.grid[1]))
        for block in self:
            if recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, self.grid, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, self.grid)
        x = x.flatten(0, 1)
        return apply_norm(norm, x if read is None else take_rows(x, read.token_rows), ())
