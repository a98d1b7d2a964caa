"""The blocks of a decoder whose masked tokens read the visible ones: DiffMAViL's video decoder.

Masked tokens are queries, visible tokens keys and values, the same in every layer, each of which projects them anew.
Neither do masked tokens attend to each other nor are visible ones updated (the paper's table of FLOPs leaves no other
reading), so a prediction depends on its own token and the visible ones alone: any part of the masked tokens may be
decoded, with the same result for those.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from avfast.nn.block import Mlp, Read, Stream, add
from avfast.nn.norm import Norm, add_norm
from avfast.ops import AttentionPlan, packed_attention
from avfast.packing import take_rows


class PackedCrossAttention(nn.Module):
    """Multi-head attention of the tokens of each packed sequence to those of another.

    Args:
        dim: D, a multiple of ``num_heads``.
        num_heads: heads.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, plan: AttentionPlan) -> Tensor:
        """Queries of ``(M, D)`` over keys and values of ``(T, D)``, to ``(M, D)``; the plan holds both lengths."""
        q = self.q(x).unflatten(1, (self.num_heads, -1))
        kv = self.kv(context).unflatten(1, (2, self.num_heads, -1))
        return self.proj(packed_attention(q, kv[:, 0], kv[:, 1], plan=plan).flatten(1))


class CrossBlock(nn.Module):
    """x + attention(norm1(x), context), then x + mlp(norm2(x)), on packed tokens.

    The context enters as it is, without a norm of its own. As in :class:`~avfast.nn.PackedBlock` the addition of the
    MLP's output may be left to the next block.

    Args:
        dim: D.
        num_heads: heads.
        mlp_ratio: hidden width of the MLP over D.
        eps: of the LayerNorms.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = PackedCrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Stream, context: Tensor, plan: AttentionPlan) -> Stream:
        """One block.

        Args:
            x: ``(M, D)``, or the stream and an update still to be added to it (or None), each ``(M, D)``.
            context: ``(T, D)``.
            plan: lengths of both, sequence by sequence.

        Returns:
            ``(M, D)`` for a tensor, a pair for a pair.
        """
        normed, stream = add_norm(self.norm1, *(x if isinstance(x, tuple) else (x, None)), ())
        normed, stream = add_norm(self.norm2, stream, self.attn(normed, context, plan), ())
        update = self.mlp(normed)
        return (stream, update) if isinstance(x, tuple) else add(stream, update)


class CrossBlocks(nn.ModuleList):
    """The stack of a decoder (:mod:`avfast.nn.decoder`) in which masked tokens read the kept ones.

    Args:
        dim: d.
        depth: blocks.
        num_heads: heads of a block.
        mlp_ratio: of the blocks.
        eps: of their LayerNorms.
    """

    def __init__(self, dim: int, depth: int, num_heads: int, mlp_ratio: float = 4.0, eps: float = 1e-6) -> None:
        super().__init__(CrossBlock(dim, num_heads, mlp_ratio, eps) for _ in range(depth))

    def forward(
        self,
        x: Tensor,
        plan: AttentionPlan,
        scatter_index: Tensor | None,
        read: Read | None,
        norm: Norm,
        recompute: bool,
    ) -> Tensor:
        """All blocks and the final norm, see :meth:`avfast.nn.SelfBlocks.forward`.

        Both ``scatter_index`` and ``read`` must be given, with the instances in the same order. ``read`` names masked
        tokens, all or some of them; its plan has their lengths as queries' and those of the kept tokens as keys'.

        Returns:
            ``(M, d)`` of the tokens that are read.
        """
        if scatter_index is None or read is None:
            raise ValueError("a cross decoder needs the rows of the kept tokens and the masked rows to read")
        context = take_rows(x, scatter_index)
        pair: tuple[Tensor, Tensor | None] = (take_rows(x, read.token_rows), None)
        for block in self:
            if recompute and torch.is_grad_enabled():
                whole = (add(*pair), None)
                pair = checkpoint(block, whole, context, read.plan, use_reentrant=False, preserve_rng_state=False)
            else:
                pair = block(pair, context, read.plan)
        return add_norm(norm, *pair, ())[0]
