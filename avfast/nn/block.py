"""The pre-norm transformer block on packed tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from avfast.nn.drop_path import DropPath
from avfast.nn.norm import Norm, add_norm, apply_norm, layer_norm
from avfast.ops import AttentionPlan, packed_attention, packed_attention_qkv
from avfast.packing import take_rows

Stream = Tensor | tuple[Tensor, Tensor | None]
"""The residual stream, or the stream and an update that is not yet added to it."""


class Read(NamedTuple):
    """The tokens whose output is read of the last block; of the others it computes keys and values alone.

    Args:
        token_rows: ``(M,)`` int64 rows of the stream, sequence by sequence.
        plan: of their queries, and of the keys of all rows.
    """

    token_rows: Tensor
    plan: AttentionPlan


class PackedAttention(nn.Module):
    """Multi-head self-attention within each packed sequence.

    Args:
        dim: D, a multiple of ``num_heads``.
        num_heads: heads.
        qkv_bias: bias of the joint projection.

    ``forward(x, plan)``: ``(T, D) -> (T, D)``.
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = True) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        """``(T, D) -> (T, D)``; the plan holds the sequence lengths."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        return self.proj(packed_attention_qkv(qkv, plan=plan).flatten(1))

    def attend(self, x: Tensor, source: Tensor, plan: AttentionPlan) -> Tensor:
        """Queries of ``(M, D)`` over keys and values of ``(T, D)``, to ``(M, D)``."""
        parts = [x.shape[1], 2 * x.shape[1]]
        weight_q, weight_kv = self.qkv.weight.split(parts)
        bias_q, bias_kv = (None, None) if self.qkv.bias is None else self.qkv.bias.split(parts)
        q = F.linear(x, weight_q, bias_q).unflatten(1, (self.num_heads, self.head_dim))
        kv = F.linear(source, weight_kv, bias_kv).unflatten(1, (2, self.num_heads, self.head_dim))
        return self.proj(packed_attention(q, kv[:, 0], kv[:, 1], plan=plan).flatten(1))


class Mlp(nn.Module):
    """Linear, exact GELU, linear: ``(..., D) -> (..., D)``."""

    def __init__(self, in_features: int, hidden_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D) -> (..., D)``."""
        return self.fc2(F.gelu(self.fc1(x)))


class PackedBlock(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)), on packed tokens.

    Between blocks the addition of the MLP's output is left to the next one, which does it in one pass with its first
    norm: given a pair (residual stream, update not yet added), a block returns such a pair; given a tensor, a tensor.

    Args:
        dim: D.
        num_heads: heads.
        mlp_ratio: hidden width of the MLP over D.
        qkv_bias: bias of the query, key and value projection.
        norm_sets: affine sets of the LayerNorms; with 1 they are plain ``nn.LayerNorm`` and the block has the parameter
            names of timm's.
        eps: of the LayerNorms.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_sets: int = 1,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = layer_norm(dim, norm_sets, eps)
        self.attn = PackedAttention(dim, num_heads, qkv_bias)
        self.norm2 = layer_norm(dim, norm_sets, eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: Stream,
        plan: AttentionPlan,
        sizes: Sequence[int] = (),
        drop: DropPath | None = None,
        read: Read | None = None,
    ) -> Stream:
        """One block.

        Args:
            x: ``(T, D)``, or the stream and an update still to be added to it (or None), each ``(T, D)``.
            plan: the sequence lengths.
            sizes: rows of each norm set; needed with several only.
            drop: which sequences each branch is computed for, see :class:`~avfast.nn.DropPath`.
            read: the rows to compute, default all; not together with ``drop`` or several norm sets.

        Returns:
            ``(T, D)`` for a tensor, a pair for a pair; of M rows ``(M, D)``.
        """
        stream, update = x if isinstance(x, tuple) else (x, None)
        if drop is None:
            normed, stream = add_norm(self.norm1, stream, update, sizes)
            if read is None:
                attended = self.attn(normed, plan)
            else:
                attended = self.attn.attend(take_rows(normed, read.token_rows), normed, read.plan)
                stream = take_rows(stream, read.token_rows)
            normed, stream = add_norm(self.norm2, stream, attended, sizes)
            update = self.mlp(normed)
        else:
            stream, update = self.on_kept_sequences(add(stream, update), drop), None
        return (stream, update) if isinstance(x, tuple) else add(stream, update)

    def on_kept_sequences(self, x: Tensor, drop: DropPath) -> Tensor:
        """The block with each branch computed for its kept sequences and scaled up."""
        kept = drop.attention
        normed = apply_norm(self.norm1, x[kept.token_rows], kept.sizes)
        x = kept.add_to(x, self.attn(normed, kept.plan))
        kept = drop.mlp
        normed = apply_norm(self.norm2, x[kept.token_rows], kept.sizes)
        return kept.add_to(x, self.mlp(normed))


def add(x: Tensor, update: Tensor | None) -> Tensor:
    """``x + update``; no update counts as zero."""
    return x if update is None else x + update


def run_blocks(
    blocks: Sequence[nn.Module] | nn.ModuleList,
    x: Tensor,
    plan: AttentionPlan,
    sizes: Sequence[int] = (),
    recompute: bool = False,
    drops: Sequence[DropPath] | None = None,
    norm: Norm | None = None,
    read: Read | None = None,
) -> Tensor:
    """Packed tokens ``(T, D)`` through blocks.

    Args:
        blocks: :class:`PackedBlock` modules.
        x: ``(T, D)``.
        plan: the sequence lengths.
        sizes: rows of each norm set; needed with several only.
        recompute: keep one tensor per block for the backward and compute the rest again.
        drops: stochastic depth of each block; default none.
        norm: final norm, done in one pass with the last addition; default none.
        read: the rows whose output is wanted, default all.

    Returns:
        ``(T, D)``, or ``(M, D)``.
    """
    pair: tuple[Tensor, Tensor | None] = (x, None)
    for i, block in enumerate(blocks):
        drop = None if drops is None else drops[i]
        wanted = read if i == len(blocks) - 1 else None
        if recompute and torch.is_grad_enabled():
            whole = (add(*pair), None)
            pair = checkpoint(block, whole, plan, sizes, drop, wanted, use_reentrant=False, preserve_rng_state=False)
        else:
            pair = block(pair, plan, sizes, drop, wanted)
    return add(*pair) if norm is None else add_norm(norm, *pair, sizes)[0]
