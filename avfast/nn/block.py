"""The pre-norm transformer block on packed tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from avfast.nn.norm import SplitLayerNorm
from avfast.ops import AttentionPlan, packed_attention


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
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(1)
        return self.proj(packed_attention(q, k, v, plan=plan).flatten(1))


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

    Args:
        dim: D.
        num_heads: heads.
        mlp_ratio: hidden width of the MLP over D.
        qkv_bias: bias of the query, key and value projection.
        norm_sets: affine sets of the LayerNorms; with 1 they are plain ``nn.LayerNorm`` and the block has the parameter
            names of timm's.
        eps: of the LayerNorms.

    ``forward(x, plan, sizes)``: ``(T, D) -> (T, D)``; ``sizes`` is needed with several norm sets only.
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

    def forward(self, x: Tensor, plan: AttentionPlan, sizes: Sequence[int] = ()) -> Tensor:
        """``(T, D) -> (T, D)``."""
        x = x + self.attn(apply_norm(self.norm1, x, sizes), plan)
        return x + self.mlp(apply_norm(self.norm2, x, sizes))


def layer_norm(dim: int, sets: int, eps: float) -> nn.Module:
    """A plain LayerNorm for one affine set, else a :class:`SplitLayerNorm`."""
    return nn.LayerNorm(dim, eps=eps) if sets == 1 else SplitLayerNorm(dim, sets, eps)


def apply_norm(norm: nn.Module, x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Call either kind."""
    return norm(x, sizes) if isinstance(norm, SplitLayerNorm) else norm(x)


def run_blocks(
    blocks: Iterable[nn.Module], x: Tensor, plan: AttentionPlan, sizes: Sequence[int] = (), recompute: bool = False
) -> Tensor:
    """Packed tokens ``(T, D)`` through blocks; with ``recompute`` activations are not kept for the backward."""
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, x, plan, sizes, use_reentrant=False)
        else:
            x = block(x, plan, sizes)
    return x
