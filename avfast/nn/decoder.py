"""Decoders of masked autoencoders: one stem, and the stack of blocks that a subclass gives it.

The stem embeds the tokens of the kept patches, lets mask tokens (or given ones, such as diffused patches) stand in for
the others, adds positions, and predicts from the stack's output. A *stack* is a module that holds its blocks by number,
is built as ``stack(dim, depth, num_heads, mlp_ratio, eps)`` and called as :meth:`SelfBlocks.forward`; what else it
needs (a grid, a window) is bound by :func:`functools.partial`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from avfast.nn.block import PackedBlock, Read, run_blocks
from avfast.nn.norm import Norm
from avfast.nn.patches import positions, table
from avfast.ops import AttentionPlan
from avfast.packing import take_rows

Stack = Callable[[int, int, int, float, float], nn.Module]
"""What builds a stack, see above."""
Masked = tuple[Tensor, Tensor]
"""Tokens ``(M, d)`` of patches that were not kept, in the decoder's width, and their ``(M,)`` int64 entries in the
flattened (B, N) patches."""


class SelfBlocks(nn.ModuleList):
    """The stack in which all tokens of an instance attend to each other.

    Args:
        dim: d.
        depth: blocks.
        num_heads: heads of a block.
        mlp_ratio: of the blocks.
        eps: of their LayerNorms.
    """

    def __init__(self, dim: int, depth: int, num_heads: int, mlp_ratio: float = 4.0, eps: float = 1e-6) -> None:
        super().__init__(PackedBlock(dim, num_heads, mlp_ratio, eps=eps) for _ in range(depth))

    def forward(
        self,
        x: Tensor,
        plan: AttentionPlan,
        scatter_index: Tensor | None,
        read: Read | None,
        norm: Norm,
        recompute: bool,
    ) -> Tensor:
        """All blocks and the final norm.

        Args:
            x: ``(B * n, d)``, every instance's tokens with their positions.
            plan: of B sequences of n tokens.
            scatter_index: ``(T,)`` int64 rows of the kept patches, which a stack may treat apart; None for none.
            read: the M rows whose output is wanted; default all.
            norm: the final one.
            recompute: keep one tensor per block for the backward and compute the rest again.

        Returns:
            ``(B * n, d)``, or ``(M, d)``.
        """
        return run_blocks(list(self), x, plan, recompute=recompute, norm=norm, read=read)


class Decoder(nn.Module):
    """The stem; a subclass adds positions, ``blocks`` (a stack), the final ``norm`` and heads, in this order.

    Args:
        dim: width of the incoming tokens.
        decoder_dim: width of the decoder, d.
        mask_token: whether there is one; without it all masked tokens that are read must be given.
    """

    blocks: nn.Module
    norm: nn.LayerNorm

    def __init__(self, dim: int, decoder_dim: int, mask_token: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim)) if mask_token else None
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)
        self.grad_checkpointing = False

    def whole(
        self, embedded: Tensor, scatter_index: Tensor | None, shape: tuple[int, int], masked: Masked | None = None
    ) -> Tensor:
        """All patches of all instances.

        Args:
            embedded: ``(T, d)`` of the kept ones.
            scatter_index: ``(T,)`` int64 entry of each in the flattened (B, N) patches; None if there are none.
            shape: (B, N).
            masked: tokens that are put in place of mask tokens.

        Returns:
            ``(B, N, d)``; what is not given is the mask token, or 0 in a decoder without one.
        """
        if self.mask_token is None:
            x = embedded.new_zeros(*shape, embedded.shape[1])
        else:
            x = self.mask_token.to(embedded.dtype).expand(*shape, -1)
        for tokens, entries in ((embedded, scatter_index), masked or (embedded, None)):
            if entries is not None:
                x = x.flatten(0, 1).index_copy(0, entries, tokens.to(x.dtype)).unflatten(0, shape)
        return x

    def run(self, x: Tensor, plan: AttentionPlan, scatter_index: Tensor | None, read: Read | None) -> Tensor:
        """``(B, n, d)`` through stack and final norm, to ``(B, n, d)``, or ``(M, d)`` of the rows that are read."""
        out = self.blocks(x.flatten(0, 1), plan, scatter_index, read, self.norm, self.grad_checkpointing)
        return out.unflatten(0, x.shape[:2]) if read is None else out


class PatchDecoder(Decoder):
    """Predicts the patches of one modality from the tokens of the kept ones and, in front of them, from further tokens.

    Further tokens have no positions; one linear map embeds both kinds.

    Args:
        dim: width of the incoming tokens.
        decoder_dim: width of the decoder, d.
        depth: blocks.
        num_heads: heads of a block.
        grid: patches along each axis, N in all.
        values: per patch, P.
        mlp_ratio: of the blocks.
        eps: of the LayerNorms.
        train_positions: the sine-cosine position table is trained.
    """

    def __init__(
        self,
        dim: int,
        decoder_dim: int,
        depth: int,
        num_heads: int,
        grid: Sequence[int],
        values: int,
        mlp_ratio: float = 4.0,
        eps: float = 1e-6,
        train_positions: bool = False,
    ) -> None:
        super().__init__(dim, decoder_dim)
        self.pos_embed = positions(decoder_dim, grid, train_positions)
        self.blocks = SelfBlocks(decoder_dim, depth, num_heads, mlp_ratio, eps)
        self.norm = nn.LayerNorm(decoder_dim, eps=eps)
        self.pred = nn.Linear(decoder_dim, values)

    def forward(
        self,
        tokens: Tensor | None,
        scatter_index: Tensor | None,
        plan: AttentionPlan,
        read: Read | None = None,
        *,
        further: Tensor | None = None,
    ) -> Tensor:
        """Decode.

        Args:
            tokens: ``(T, D)`` of the kept patches; may be None where there are further ones.
            scatter_index: ``(T,)`` int64 entry of each in the flattened (B, N) patches.
            plan: B sequences of F + N tokens.
            read: the M tokens, rows of the flattened (B, F + N) ones, whose prediction is wanted; default all patches.
            further: ``(B, F, D)``, default none.

        Returns:
            ``(B, N, P)`` predictions for all patches, or ``(M, P)``.
        """
        front = 0 if further is None else further.shape[1]
        given = [x for x in (None if further is None else further.flatten(0, 1), tokens) if x is not None]
        embedded = self.embed(torch.cat(given) if len(given) > 1 else given[0])
        where = table(self.pos_embed)
        batch = len(plan)
        x = self.whole(embedded[batch * front :], scatter_index, (batch, where.shape[1])) + where
        if front:
            x = torch.cat([embedded[: batch * front].unflatten(0, (batch, front)), x], 1)
        x = self.run(x, plan, scatter_index, read)
        return self.pred(x if read is not None or not front else x[:, front:])


class JointDecoder(Decoder):
    """Predicts the patches of both modalities from the fused tokens of the kept ones, all in one sequence.

    Positions and a vector per modality are added to all.

    Args:
        dim: width of the incoming tokens.
        decoder_dim: width of the decoder, d.
        depth: blocks.
        num_heads: heads of a block.
        grids: of audio and of visual patches, Na and Nv in all.
        values: per audio and per visual patch.
        mlp_ratio: of the blocks.
        eps: of the LayerNorms.
        train_positions: the sine-cosine position tables are trained.
    """

    def __init__(
        self,
        dim: int,
        decoder_dim: int,
        depth: int,
        num_heads: int,
        grids: tuple[Sequence[int], Sequence[int]],
        values: tuple[int, int],
        mlp_ratio: float = 4.0,
        eps: float = 1e-6,
        train_positions: bool = True,
    ) -> None:
        super().__init__(dim, decoder_dim)
        self.modality_a, self.modality_v = (nn.Parameter(torch.zeros(1, 1, decoder_dim)) for _ in range(2))
        for vector in (self.modality_a, self.modality_v):
            nn.init.normal_(vector, std=0.02)
        self.pos_embed_a, self.pos_embed_v = (positions(decoder_dim, grid, train_positions) for grid in grids)
        self.blocks = SelfBlocks(decoder_dim, depth, num_heads, mlp_ratio, eps)
        self.norm = nn.LayerNorm(decoder_dim, eps=eps)
        self.pred_a, self.pred_v = (nn.Linear(decoder_dim, n) for n in values)

    def forward(
        self,
        tokens: Tensor,
        scatter_index: Tensor,
        plan: AttentionPlan,
        read: Read | None = None,
        rows: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Decode.

        Args:
            tokens: ``(T, D)`` fused tokens of the kept patches of B instances.
            scatter_index: ``(T,)`` int64 entry of each in the flattened (B, Na + Nv) patches, audio first.
            plan: of B sequences of Na + Nv patches.
            read: the patches whose prediction is wanted; default all.
            rows: which of these are audio, ``(Ma,)``, and which visual, ``(Mv,)``.

        Returns:
            Predictions ``(B, Na, Pa)`` and ``(B, Nv, Pv)`` for all patches, ``(Ma, Pa)`` and ``(Mv, Pv)`` for those
            that are read.
        """
        audio, visual = table(self.pos_embed_a), table(self.pos_embed_v)
        where = torch.cat([audio + self.modality_a, visual + self.modality_v], 1)
        x = self.run(
            self.whole(self.embed(tokens), scatter_index, (len(plan), where.shape[1])) + where,
            plan,
            scatter_index,
            read,
        )
        if rows is not None:
            return self.pred_a(take_rows(x, rows[0])), self.pred_v(take_rows(x, rows[1]))
        return self.pred_a(x[:, : audio.shape[1]]), self.pred_v(x[:, audio.shape[1] :])
