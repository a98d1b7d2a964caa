"""Blocks of a transformer with three branches: audio, visual, and fusion tokens that read both and are read by both.

Mo and Morgado, Unveiling the Power of Audio-Visual Early Fusion Transformers with Dense Interactions through Masked
Modeling, CVPR 2024.

**What the interactions are.** The paper's fusion attends over all n_a n_v pairs ("dense"), calls this intractable, and
approximates it by pairs of 8 + 8 aggregation tokens ("factorized"). As the key and the value of a pair are sums of one
part per modality, the softmax over pairs is the product of two softmaxes and what it reads is the sum of two readings
(:mod:`avfast.ops.pair_attention`): exactly the same function at linear cost, so that here dense fusion is cheaper than
the approximation. It also says what dense interactions can express: they are two cross-attentions which share their
queries, added. No pair is selected beyond what the choice of its two members, each made alone, implies. From token
fusion (one softmax over both modalities) they differ in that each modality is normalised by itself and so always has
weight 1, in separate key and value weights, and, factorized, in the full-width attention of the aggregation tokens and
4.6 times the parameters per block: Table 4, row 3 against row 1, does not isolate interactions, and the cost of dense
fusion in Table 5 is avoidable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from avfast.nn.block import Mlp, PackedAttention
from avfast.nn.norm import add_norm
from avfast.ops import AttentionPlan
from avfast.ops._shared import autocast_dtype
from avfast.ops.pair_attention import pair_attention, pair_weights
from avfast.packing import cumulative, runs

FusionArch = Literal["dense", "factorized", "token"]
Residual = Literal["raw", "normed"]
Pending = tuple[Tensor, Tensor | None]
"""The residual stream, and an update that is not yet added to it."""


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """How the patch tokens ``(T, D)`` of one modality are packed; built once per step and shared by all layers.

    Args:
        batch: instances.
        groups: consecutive instances of equal length, (count, tokens of each).
        cu_seqlens: ``(B + 1,)`` int32 boundaries; None where all instances have the same number of tokens.
        alone: the attention of the tokens among themselves.
        with_context: their attention to a number of context tokens and themselves.
    """

    batch: int
    groups: tuple[tuple[int, int], ...]
    cu_seqlens: Tensor | None
    alone: AttentionPlan
    with_context: AttentionPlan

    @classmethod
    def of(cls, lengths: Sequence[int], context: int, device: torch.device | str | None = None) -> TokenLayout:
        """From the tokens of each instance, which may be none, and the number of context tokens."""
        groups = tuple(runs(lengths)) or ((0, 0),)
        return cls(
            len(lengths),
            groups,
            None if len(groups) == 1 else cumulative(lengths, device),
            AttentionPlan.from_lengths(lengths, device=device),
            AttentionPlan.from_lengths(lengths, [context + n for n in lengths], device=device),
        )

    def sources(self, x: Tensor) -> Tensor:
        """``(T, D)`` as :class:`FusionBlock` takes it: ``(B, N, D)`` where all instances have N tokens."""
        return x.unflatten(0, self.groups[0]) if self.cu_seqlens is None else x

    def prepend(self, context: Tensor, x: Tensor) -> Tensor:
        """``(T + B C, D)``: each instance's context tokens ``(B, C, D)``, then its own of ``(T, D)``."""
        parts = zip(
            context.to(x.dtype).split([count for count, _ in self.groups]),
            x.split([count * length for count, length in self.groups]),
            self.groups,
            strict=True,
        )
        joined = [torch.cat([c, rows.unflatten(0, group)], 1).flatten(0, 1) for c, rows, group in parts]
        return joined[0] if len(joined) == 1 else torch.cat(joined)


class ContextBlock(nn.Module):
    """A transformer block on packed tokens which may also attend to context tokens that it does not update (Eqs. 2, 3).

    Of the context tokens only keys and values are computed. Parameters and their names are those of timm's block.

    Args:
        dim: D.
        num_heads: heads.
        mlp_ratio: hidden width of the MLP over D.
        eps: of the LayerNorms.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = PackedAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Pending, layout: TokenLayout, context: Tensor | None = None) -> tuple[Tensor, Pending]:
        """One block.

        Args:
            x: the stream ``(T, D)``, and an update still to be added to it, or None.
            layout: how the tokens are packed.
            context: ``(B, C, D)`` tokens of each instance.

        Returns:
            The block's input ``(T, D)`` with the update added, and its output in the form of ``x``.
        """
        normed, before = add_norm(self.norm1, *x, ())
        if context is None:
            attended = self.attn(normed, layout.alone)
        else:
            attended = self.attn.attend(normed, layout.prepend(self.norm1(context), normed), layout.with_context)
        normed, stream = add_norm(self.norm2, before, attended, ())
        return before, (stream, self.mlp(normed))


class CrossAttention(nn.Module):
    """Attention of a few tokens to the tokens of another set.

    Args:
        dim: D.
        num_heads: heads.
        width: of queries, keys and values, a multiple of ``num_heads``.
        scale: factor of the logits, default ``(width / num_heads) ** -0.5``.
    """

    def __init__(self, dim: int, num_heads: int, width: int, scale: float | None = None) -> None:
        super().__init__()
        self.num_heads, self.width, self.scale = num_heads, width, scale
        self.q = nn.Linear(dim, width)
        self.kv = nn.Linear(dim, 2 * width)
        self.proj = nn.Linear(width, dim)

    def forward(self, x: Tensor, source: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """``(B, F, D)`` queries over ``(B, N, D)``, or over packed ``(T, D)``, to ``(B, F, D)``; empty ones read 0."""
        k, v = self.kv(source).split(self.width, -1)
        q, k, v = (split_heads(y, self.num_heads) for y in (self.q(x), k, v))
        out = pair_attention(q, k, v, None, None, scale=self.scale, cu_seqlens_a=cu_seqlens)
        return self.proj(out.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, source: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """The attention map ``(B, H, F, N)`` without gradient, packed tokens padded to the longest instance."""
        q, k = (split_heads(y, self.num_heads) for y in (self.q(x), self.kv(source)[..., : self.width]))
        return pair_weights(q, k, None, scale=self.scale, cu_seqlens_a=cu_seqlens)[0]


def linear_halves(first: Tensor, second: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``first @ weight[:, :D].T`` and ``second @ weight[:, D:].T`` of inputs ``(..., D)`` and a weight ``(C, 2 D)``."""
    if torch.compiler.is_compiling():  # which joins the gradients of the halves without a copy by itself
        left, right = weight.chunk(2, 1)
        return F.linear(first, left), F.linear(second, right)
    return _LinearHalves.apply(*(x.to(autocast_dtype(x)) for x in (first, second, weight)))


class _LinearHalves(torch.autograd.Function):
    """Writes the gradient of each half where it belongs: joining them takes longer than the products of a few rows."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(first, second, weight)
        left, right = weight.chunk(2, 1)
        return F.linear(first, left), F.linear(second, right)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, weight = ctx.saved_tensors
        total = torch.empty_like(weight)
        for grad, x, half in zip(grads, inputs, total.chunk(2, 1), strict=True):
            torch.mm(grad.flatten(0, -2).T, x.flatten(0, -2), out=half)
        first, second = (grad @ half for grad, half in zip(grads, weight.chunk(2, 1), strict=True))
        return first, second, total


class PairAttention(nn.Module):
    """Attention of a few tokens to all pairs of an audio and a visual token, at the cost of attention to each.

    Keys and values are a linear map of the pair's channels [visual | audio]; see :mod:`avfast.ops.pair_attention` for
    why no pair has to be formed. The key half of ``kv.bias`` cancels: its gradient is zero.

    Args:
        dim: D.
        num_heads: heads.
        key_width: of queries and keys, a multiple of ``num_heads``.
        value_width: of values, likewise.
        scale: factor of the logits, default ``(key_width / num_heads) ** -0.5``.
    """

    def __init__(self, dim: int, num_heads: int, key_width: int, value_width: int, scale: float | None = None) -> None:
        super().__init__()
        self.num_heads, self.widths, self.scale = num_heads, (key_width, value_width), scale
        self.q = nn.Linear(dim, key_width)
        self.kv = nn.Linear(2 * dim, key_width + value_width)
        self.proj = nn.Linear(value_width, dim)

    def forward(
        self,
        x: Tensor,
        audio: Tensor,
        visual: Tensor,
        cu_seqlens_a: Tensor | None = None,
        cu_seqlens_v: Tensor | None = None,
    ) -> Tensor:
        """``(B, F, D)`` queries over the pairs of ``(B, Na, D)`` and ``(B, Nv, D)``, each dense or packed."""
        q, (k_a, v_a), (k_v, v_v) = self.project(x, audio, visual)
        bias = self.kv.bias[self.widths[0] :].unflatten(0, (self.num_heads, -1))
        out = pair_attention(
            q, k_a, v_a, k_v, v_v, bias, scale=self.scale, cu_seqlens_a=cu_seqlens_a, cu_seqlens_v=cu_seqlens_v
        )
        return self.proj(out.transpose(1, 2).flatten(2))

    def weights(
        self,
        x: Tensor,
        audio: Tensor,
        visual: Tensor,
        cu_seqlens_a: Tensor | None = None,
        cu_seqlens_v: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """p ``(B, H, F, Na)`` and r ``(B, H, F, Nv)`` without gradient, packed tokens padded to the longest."""
        q, (k_a, _), (k_v, _) = self.project(x, audio, visual)
        return pair_weights(q, k_a, k_v, scale=self.scale, cu_seqlens_a=cu_seqlens_a, cu_seqlens_v=cu_seqlens_v)

    def project(self, x: Tensor, audio: Tensor, visual: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Queries, and keys and values of each modality, all split into heads."""
        kv_v, kv_a = linear_halves(visual, audio, self.kv.weight)
        a, v = ([split_heads(y, self.num_heads) for y in kv.split(self.widths, -1)] for kv in (kv_a, kv_v))
        return split_heads(self.q(x), self.num_heads), a, v


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """``(B, N, H d)`` to a view ``(B, H, N, d)``, packed ``(T, H d)`` to ``(T, H, d)``."""
    x = x.unflatten(-1, (num_heads, -1))
    return x.transpose(1, 2) if x.ndim == 4 else x


def join(
    first: Tensor, second: Tensor, cu_first: Tensor | None, cu_second: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Per instance the tokens of ``first``, then those of ``second``, and boundaries where they are packed."""
    if cu_first is None and cu_second is None:
        return torch.cat([first, second], 1), None
    flat, instances, ends = [], [], []
    for x, cu in ((first, cu_first), (second, cu_second)):
        if cu is None:
            cu = torch.arange(len(x) + 1, device=x.device, dtype=torch.int32) * x.shape[1]
            x = x.flatten(0, 1)
        batch = torch.arange(len(cu) - 1, device=x.device)
        flat.append(x)
        ends.append(cu)
        instances.append(batch.repeat_interleave(cu.diff(), output_size=len(x)))
    return torch.cat(flat)[torch.cat(instances).argsort(stable=True)], ends[0] + ends[1]


class FusionBlock(nn.Module):
    """Updates fusion tokens from the audio and visual tokens of the layer before (Eqs. 6-8, 9-13).

    The tokens of an instance are [fusion | visual aggregation | audio aggregation].

    ``"dense"``
        All of them attend to all audio-visual pairs.
    ``"factorized"``
        Aggregation tokens attend to the patches of their modality, at full width; the fusion tokens attend to all pairs
        of what these have read (without residual, as released).
    ``"token"``
        All of them attend to the patches of both modalities under one softmax. They do not see each other, as released.

    What an absent modality leaves: nothing under ``"dense"`` and ``"token"``; under ``"factorized"`` its aggregation
    tokens read a constant. There is no attention dropout: it would break the separation of the pairs.

    Args:
        dim: D.
        num_heads: heads.
        arch: see above.
        num_tokens: fusion, visual aggregation and audio aggregation tokens.
        attn_ratio: width over D of queries and keys; under ``"dense"`` and ``"token"`` of values as well.
        mlp_ratio: hidden width of the MLP over D.
        residual: attention is added to the tokens (``"raw"``, Eq. 7) or to the normalised ones (``"normed"``,
            released).
        scale: factor of the logits over pairs (``"token"``: over patches), default head width to the power -0.5.
        eps: of the LayerNorms.

    Raises:
        ValueError: on settings that do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        arch: FusionArch = "factorized",
        num_tokens: tuple[int, int, int] = (16, 8, 8),
        attn_ratio: float = 0.25,
        mlp_ratio: float = 1.0,
        *,
        residual: Residual = "raw",
        scale: float | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("arch", arch, get_args(FusionArch)),
            ("residual", residual, get_args(Residual)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if len(num_tokens) != 3 or min(num_tokens) < 1:
            raise ValueError(f"num_tokens must be three positive numbers (fusion, visual, audio), got {num_tokens}")
        width = round(dim * attn_ratio)
        if width < 1 or width % num_heads or dim % num_heads:
            raise ValueError(f"dim {dim} and dim * attn_ratio {width} must be multiples of num_heads {num_heads}")
        self.arch, self.num_tokens, self.residual = arch, tuple(num_tokens), residual
        self.norm1, self.norm1_a, self.norm1_v, self.norm2 = (nn.LayerNorm(dim, eps=eps) for _ in range(4))
        self.attn: nn.Module
        if arch == "token":
            self.attn = CrossAttention(dim, num_heads, width, scale)
        elif arch == "dense":
            self.attn = PairAttention(dim, num_heads, width, width, scale)
        else:
            self.attn = PairAttention(dim, num_heads, width, dim, scale)
            self.attn_a, self.attn_v = (CrossAttention(dim, num_heads, dim) for _ in range(2))
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        tokens: Tensor,
        audio: Tensor,
        visual: Tensor,
        cu_seqlens_a: Tensor | None = None,
        cu_seqlens_v: Tensor | None = None,
    ) -> Tensor:
        """One update.

        Args:
            tokens: ``(B, F, D)``, F the sum of ``num_tokens``.
            audio: ``(B, Na, D)``, or packed ``(Ta, D)`` with its boundaries.
            visual: likewise. Either may be empty.
            cu_seqlens_a: ``(B + 1,)`` int32 boundaries of packed audio tokens.
            cu_seqlens_v: likewise.

        Returns:
            ``(B, F, D)``.
        """
        self.check(tokens)
        normed = self.norm1(tokens)
        update = self.attend(normed, self.norm1_a(audio), self.norm1_v(visual), cu_seqlens_a, cu_seqlens_v)
        x = normed if self.residual == "normed" else tokens
        normed, x = add_norm(self.norm2, x.flatten(0, 1), update.flatten(0, 1), ())
        return (x + self.mlp(normed)).unflatten(0, tokens.shape[:2])

    def check(self, tokens: Tensor) -> None:
        """Raises ValueError unless there are as many tokens as the block was built for."""
        if tokens.ndim != 3 or tokens.shape[1] != sum(self.num_tokens):
            raise ValueError(f"tokens must be (B, {sum(self.num_tokens)}, D), got {tuple(tokens.shape)}")

    def attend(
        self, x: Tensor, audio: Tensor, visual: Tensor, cu_seqlens_a: Tensor | None, cu_seqlens_v: Tensor | None
    ) -> Tensor:
        """What each token reads, from normalised tokens."""
        if self.arch == "token":
            return self.attn(x, *join(visual, audio, cu_seqlens_v, cu_seqlens_a))
        if self.arch == "dense":
            return self.attn(x, audio, visual, cu_seqlens_a, cu_seqlens_v)
        fusion, aggregate_v, aggregate_a = x.split(self.num_tokens, 1)
        aggregate_v = self.attn_v(aggregate_v, visual, cu_seqlens_v)
        aggregate_a = self.attn_a(aggregate_a, audio, cu_seqlens_a)
        return torch.cat([self.attn(fusion, aggregate_a, aggregate_v), aggregate_v, aggregate_a], 1)

    @torch.no_grad()
    def weights(
        self,
        tokens: Tensor,
        audio: Tensor,
        visual: Tensor,
        cu_seqlens_a: Tensor | None = None,
        cu_seqlens_v: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """How much each token reads from each audio and each visual patch; the weight of a pair is the product.

        Under ``"factorized"`` these are the weights over aggregation tokens times what those read from patches (mean
        over their heads), and fusion tokens only.

        Args:
            tokens: ``(B, F, D)``, F the sum of ``num_tokens``.
            audio: ``(B, Na, D)``, or packed ``(Ta, D)`` with its boundaries.
            visual: likewise.
            cu_seqlens_a: ``(B + 1,)`` int32 boundaries of packed audio tokens.
            cu_seqlens_v: likewise.

        Returns:
            p ``(B, H, F, Na)`` and r ``(B, H, F, Nv)``; packed tokens are padded to the longest instance.

        Raises:
            ValueError: under ``"token"``, whose one softmax has no such factors.
        """
        self.check(tokens)
        if not isinstance(self.attn, PairAttention):
            raise ValueError('arch "token" has one softmax over both modalities, which is no product of p and r')
        x, audio, visual = self.norm1(tokens), self.norm1_a(audio), self.norm1_v(visual)
        if self.arch == "dense":
            return self.attn.weights(x, audio, visual, cu_seqlens_a, cu_seqlens_v)
        fusion, aggregate_v, aggregate_a = x.split(self.num_tokens, 1)
        read_a = self.attn_a.weights(aggregate_a, audio, cu_seqlens_a).mean(1, keepdim=True)
        read_v = self.attn_v.weights(aggregate_v, visual, cu_seqlens_v).mean(1, keepdim=True)
        aggregate_v = self.attn_v(aggregate_v, visual, cu_seqlens_v)
        aggregate_a = self.attn_a(aggregate_a, audio, cu_seqlens_a)
        p, r = self.attn.weights(fusion, aggregate_a, aggregate_v)
        with torch.autocast(p.device.type, enabled=False):
            return p @ read_a, r @ read_v
