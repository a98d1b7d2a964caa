"""AVBERT's transformers, which share their weights across modalities and layers, some of them in low-rank factors.

A layer is that of BERT, LayerNorm(x + attention(x)) and LayerNorm(x + MLP(x)) with weights W_q, W_k, W_v, W_b (the
attention's output), W_c and W_d (the MLP). There is one transformer for each modality and one for both together, and
sharing says which weights they have in common (Lee et al., ICLR 2021, section 3.2, Figure 2 and appendix B.2):

  none          every layer of every transformer has its own
  layers        the layers of a transformer have the same
  transformers  layer l of every transformer has the same
  all           one layer is used everywhere
  part          one layer is used everywhere, in which W = U Sigma V: U is shared, V and the rotation Sigma are each
                transformer's own, and V x is normalised (:mod:`avfast.ops.low_rank_linear`)
  part_att      so for W_q, W_k, W_v and W_b alone; W_c and W_d are each transformer's own

The paper says of no biases and norms whose they are. As in the released code they are shared with U, so that 3,843,840
parameters replace 127,581,696; those of an MLP that is not shared are its transformer's own.

Sigma = exp(skew(A)) (:mod:`avfast.ops.skew_exp`), and all A are one parameter: all rotations are one batch of
exponentials, and with G = Sigma U^T one set of products, once for all layers and transformers of a forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from avfast.ops._shared import autocast_dtype, without_autocast
from avfast.ops.low_rank_linear import low_rank_linear
from avfast.ops.skew_exp import skew_exp

Sharing = Literal["none", "layers", "transformers", "all", "part", "part_att"]
Factors = list[dict[str, tuple[Tensor, Tensor, Tensor]]]
"""Of each transformer by projection: V, G and bias as :func:`~avfast.ops.low_rank_linear` takes them."""


class LowRankLinear(nn.Module):
    """A projection of several transformers whose U and bias are shared, in so many chunks that read the same input.

    Args:
        transformers: T, each of which has its own V.
        in_features: I.
        out_features: O.
        rank: r.
        chunks: C.

    Shapes: ``v`` (T, C r, I), ``u`` (C, O, r), ``bias`` (C, O).
    """

    def __init__(self, transformers: int, in_features: int, out_features: int, rank: int, chunks: int = 1) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.empty(transformers, chunks * rank, in_features))
        self.u = nn.Parameter(torch.empty(chunks, out_features, rank))
        self.bias = nn.Parameter(torch.zeros(chunks, out_features))

    @property
    def chunks(self) -> int:
        """C."""
        return self.u.shape[0]

    def factors(self, sigma: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
        """V, G and bias of each transformer, from its rotations ``(C, T, r, r)``; the first two in ``dtype``."""
        chunks, transformers, rank, _ = sigma.shape
        g = (sigma.reshape(chunks, transformers * rank, rank) @ self.u.mT).to(dtype)
        # One unbind for all: a gradient of its own for each part would fill and add whole tensors.
        parts = zip(self.v.to(dtype).unbind(), g.unflatten(1, (transformers, rank)).unbind(1), strict=True)
        return [(v, g_own, self.bias) for v, g_own in parts]

    def forward(self, x: Tensor, factors: tuple[Tensor, Tensor, Tensor]) -> Tensor | tuple[Tensor, ...]:
        """``(..., I) -> (..., O)``, or as many of that as there are chunks, with the factors of one transformer."""
        parts = low_rank_linear(x, *factors)
        return parts if self.chunks > 1 else parts[0]


def _apply(linear: nn.Module, x: Tensor, factors: tuple[Tensor, Tensor, Tensor] | None) -> Any:
    return linear(x) if factors is None else linear(x, factors)


class SelfAttention(nn.Module):
    """LayerNorm(x + attention(x)) over whole sequences; ``qkv`` and ``proj`` are linear or of low rank."""

    def __init__(self, qkv: nn.Module, proj: nn.Module, dim: int, num_heads: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.qkv, self.proj, self.norm = qkv, proj, nn.LayerNorm(dim, eps=eps)
        self.num_heads, self.dropout = num_heads, dropout

    def forward(self, x: Tensor, factors: dict[str, tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """``(B, n, D) -> (B, n, D)``."""
        parts = _apply(self.qkv, x, factors.get("qkv"))
        if isinstance(parts, Tensor):
            parts = parts.chunk(3, -1)
        dropout = self.dropout if self.training else 0.0
        # Heads are split after, so that the gradient of the whole is put together by rows and not by heads.
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        heads = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        out = _apply(self.proj, heads.transpose(1, 2).flatten(2), factors.get("proj"))
        return self.norm(x + F.dropout(out, dropout, self.training))


class FeedForward(nn.Module):
    """LayerNorm(x + fc2(GELU(fc1(x)))); ``fc1`` and ``fc2`` are linear or of low rank."""

    def __init__(self, fc1: nn.Module, fc2: nn.Module, dim: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.fc1, self.fc2, self.norm = fc1, fc2, nn.LayerNorm(dim, eps=eps)
        self.dropout = dropout

    def forward(self, x: Tensor, factors: dict[str, tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """``(B, n, D) -> (B, n, D)``."""
        out = _apply(self.fc2, F.gelu(_apply(self.fc1, x, factors.get("fc1"))), factors.get("fc2"))
        return self.norm(x + F.dropout(out, self.dropout, self.training))


class _Kept:
    """Factors, and the parameters they are of."""

    def __init__(self, sources: Sequence[Tensor], dtype: torch.dtype, factors: Factors) -> None:
        # An alias holds its memory, so that no other parameter can come to lie there.
        self.sources = [(x.detach(), x._version) for x in sources]
        self.state, self.factors = (dtype, torch.is_inference_mode_enabled()), factors

    def fits(self, sources: Sequence[Tensor], dtype: torch.dtype) -> bool:
        """Whether these are the same parameters with the same values."""
        same = (
            x.data_ptr() == alias.data_ptr() and x._version == version
            for x, (alias, version) in zip(sources, self.sources, strict=True)
        )
        return self.state == (dtype, torch.is_inference_mode_enabled()) and all(same)


class SharedLowRankTransformer(nn.Module):
    """Several transformers on embedded tokens, with shared weights; AVBERT's are visual, audio and multimodal.

    ``factors = transformer.factors()`` once in a forward pass, then ``transformer(x, i, factors)`` for each of them.

    Args:
        embed_dim: D, a multiple of ``num_heads``.
        depth: layers of each transformer, or those of each in turn (which then says how many there are).
        num_heads: heads.
        mlp_ratio: hidden width of the MLP over D.
        transformers: how many.
        sharing: see the head of this file.
        rank: r of the factors.
        dropout: of attention weights and of the outputs of attention and MLP. (The released code has none after an MLP
            that layers share.)
        eps: of the LayerNorms.
        init_std: of all weights but A, which starts with r / 2 plane rotations by at most 1 radian. Biases are 0.

    Raises:
        ValueError: on sizes that do not fit and an unknown ``sharing``.

    ``grad_checkpointing``: keep the input of each layer alone for the backward pass, and compute the rest again.
    """

    skew: nn.Parameter

    def __init__(
        self,
        embed_dim: int = 768,
        depth: int | Sequence[int] = 6,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        *,
        transformers: int = 3,
        sharing: Sharing = "part",
        rank: int = 128,
        dropout: float = 0.0,
        eps: float = 1e-12,
        init_std: float = 0.01,
    ) -> None:
        super().__init__()
        if sharing not in get_args(Sharing):
            raise ValueError(f"sharing must be one of {', '.join(get_args(Sharing))}, got {sharing!r}")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        self.depths = (depth,) * transformers if isinstance(depth, int) else tuple(depth)
        if not self.depths or min(self.depths) < 1 or rank < 1:
            raise ValueError(f"needs transformers, of one layer at least, and a rank; got {self.depths}, rank {rank}")
        self.embed_dim, self.sharing, self.rank = embed_dim, sharing, rank
        self.init_std, self.grad_checkpointing = init_std, False
        self._kept: _Kept | None = None
        hidden, count = int(embed_dim * mlp_ratio), len(self.depths)

        def linear(in_features: int, out_features: int, low_rank: bool, chunks: int = 1) -> nn.Module:
            if low_rank:
                return LowRankLinear(count, in_features, out_features, rank, chunks)
            return nn.Linear(in_features, chunks * out_features)

        def attention() -> SelfAttention:
            low = sharing in ("part", "part_att")
            qkv, proj = linear(embed_dim, embed_dim, low, 3), linear(embed_dim, embed_dim, low)
            return SelfAttention(qkv, proj, embed_dim, num_heads, dropout, eps)

        def mlp() -> FeedForward:
            low = sharing == "part"
            return FeedForward(linear(embed_dim, hidden, low), linear(hidden, embed_dim, low), embed_dim, dropout, eps)

        self.attention = nn.ModuleList(attention() for _ in range(self._distinct(part_att=1)))
        self.mlp = nn.ModuleList(mlp() for _ in range(self._distinct(part_att=count)))
        rotations = sum(module.chunks for module in self._low_rank().values())
        if rotations:
            # of qkv, proj, fc1 and fc2 in this order, for each of their chunks those of all transformers
            self.skew = nn.Parameter(torch.empty(rotations * count, rank, rank))
        self.reset_parameters()

    def _distinct(self, part_att: int) -> int:
        """How many different modules there are of a kind."""
        counts = {"none": sum(self.depths), "layers": len(self.depths), "transformers": max(self.depths)}
        return part_att if self.sharing == "part_att" else counts.get(self.sharing, 1)

    def _index(self, transformer: int, layer: int) -> int:
        """Which module of a kind that is not ``part_att``'s a layer uses."""
        first = sum(self.depths[:transformer])
        return {"none": first + layer, "layers": transformer, "transformers": layer}.get(self.sharing, 0)

    def _low_rank(self) -> dict[str, LowRankLinear]:
        """The projections of low rank, in the order of their rotations."""
        return {n.rpartition(".")[2]: m for n, m in self.named_modules() if isinstance(m, LowRankLinear)}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """New initial weights."""
        for name, parameter in self.named_parameters():
            if name == "skew":
                parameter.zero_()
                angle = torch.rand_like(parameter[:, : self.rank // 2, 0]) * (math.pi / 4)
                parameter.diagonal(1, -2, -1)[:, ::2] = -angle.tan()
            elif name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=self.init_std)

    def orthogonal_parameters(self) -> list[nn.Parameter]:
        """The one parameter that holds A of all rotations, ``(6 T, r, r)`` (``part_att``: 4 T); none without them."""
        return [self.skew] if self.sharing in ("part", "part_att") else []

    def factors(self) -> Factors | None:
        """What all layers of all transformers use, computed from the parameters once.

        In evaluation mode and without gradients they are kept until a parameter has another place or version, a call
        wants gradients, or ``train()`` or ``eval()`` is called. Call one of these after what changes parameters and not
        their versions: edits in place of ``parameter.data``, and fused optimisers. Never kept are those of parameters
        that FSDP shards, whose versions it hides, or that are inference tensors, which have none, and what a CUDA
        graph computes.

        Returns:
            V, G and biases by transformer and projection, under autocast in its dtype; None without low rank.
        """
        if not self.orthogonal_parameters():
            return None
        dtype = autocast_dtype(self.skew)
        sources = [self.skew, *(p for m in self._low_rank().values() for p in (m.v, m.u, m.bias))]
        if not self._keeps(sources):
            self._kept = None
            return self._compute(dtype)
        if self._kept is None or not self._kept.fits(sources, dtype):
            self._kept = _Kept(sources, dtype, self._compute(dtype))
        return self._kept.factors

    def _keeps(self, sources: Sequence[Tensor]) -> bool:
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if self.skew.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        plain = all(type(x) is nn.Parameter and not x.is_inference() for x in sources)
        return plain and not getattr(self, "_is_fsdp_managed_module", False)

    def _compute(self, dtype: torch.dtype) -> Factors:
        modules = self._low_rank()
        with without_autocast(self.skew):
            sigma = skew_exp(self.skew).unflatten(0, (-1, len(self.depths)))
            parts = sigma.split([module.chunks for module in modules.values()])
            found = [m.factors(part, dtype) for m, part in zip(modules.values(), parts, strict=True)]
        return [dict(zip(modules, each, strict=True)) for each in zip(*found, strict=True)]

    def train(self, mode: bool = True) -> SharedLowRankTransformer:
        """As of any module."""
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    def forward(self, x: Tensor, transformer: int, factors: Factors | None = None) -> Tensor:
        """All layers of one transformer.

        Args:
            x: ``(B, n, D)`` embedded tokens.
            transformer: which.
            factors: of :meth:`factors`, computed here unless given.

        Returns:
            ``(B, n, D)``.

        Raises:
            ValueError: on another width, or when there is no such transformer.
        """
        if not 0 <= transformer < len(self.depths):
            raise ValueError(f"there are {len(self.depths)} transformers, from 0 on; got {transformer}")
        if x.ndim != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x must be (B, n, {self.embed_dim}), got {tuple(x.shape)}")
        factors = self.factors() if factors is None else factors
        own = {} if factors is None else factors[transformer]
        for layer in range(self.depths[transformer]):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._layer, x, transformer, layer, own, use_reentrant=False)
            else:
                x = self._layer(x, transformer, layer, own)
        return x

    def _layer(self, x: Tensor, transformer: int, layer: int, factors: dict[str, Any]) -> Tensor:
        index = self._index(transformer, layer)
        x = self.attention[index](x, factors)
        return self.mlp[transformer if self.sharing == "part_att" else index](x, factors)
