"""Attention within each sequence of a packed batch.

For every sequence s with queries Q_s, keys K_s and values V_s:  O_s = softmax(scale Q_s K_s^T) V_s. No sequence sees
another, nothing is causal, no padding is computed. The eager reference makes one ``scaled_dot_product_attention``
call per run of consecutive sequences of equal length, so a batch packed in order of length takes as many calls as it
has lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AttentionPlan:
    """What depends on lengths only; built once per step and shared by all layers.

    Args:
        lengths_q: queries per sequence, on the host.
        lengths_k: keys per sequence, default ``lengths_q``.
    """

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]

    @classmethod
    def of(cls, lengths_q: Sequence[int], lengths_k: Sequence[int] | None = None) -> AttentionPlan:
        """From lengths that are known on the host."""
        return cls(tuple(lengths_q), tuple(lengths_q if lengths_k is None else lengths_k))

    @classmethod
    def build(cls, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None) -> AttentionPlan:
        """From sequence boundaries ``(S + 1,)``; reads them, so it waits for the device."""
        lengths = cu_seqlens_q.diff().tolist()
        return cls.of(lengths, None if cu_seqlens_k is None else cu_seqlens_k.diff().tolist())

    def runs(self) -> list[tuple[int, int, int]]:
        """(sequences, queries each, keys each) of consecutive sequences of equal shape."""
        pairs = zip(self.lengths_q, self.lengths_k, strict=True)
        return [(len(list(group)), q, k) for (q, k), group in groupby(pairs)]


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    scale: float | None = None,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Attention within each packed sequence.

    Args:
        q: ``(Tq, H, D)`` queries.
        k: ``(Tk, H, D)`` keys.
        v: ``(Tk, H, D)`` values.
        cu_seqlens_q: ``(S + 1,)`` int32 boundaries of the queries' sequences.
        cu_seqlens_k: the same for keys and values, default ``cu_seqlens_q``.
        scale: factor of the logits, default ``D ** -0.5``.
        plan: takes the place of the boundaries and saves reading them.

    Returns:
        ``(Tq, H, D)``. Rows past the last sequence are zeros; queries of a sequence without keys give zeros.

    Raises:
        ValueError: on shapes that do not fit, or when neither boundaries nor plan are given.
    """
    if plan is None:
        if cu_seqlens_q is None:
            raise ValueError("packed_attention needs cu_seqlens_q or a plan")
        plan = AttentionPlan.build(cu_seqlens_q, cu_seqlens_k)
    if q.ndim != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        raise ValueError(f"q, k, v must be (T, H, D), got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    rest_q, rest_k = q.shape[0] - sum(plan.lengths_q), k.shape[0] - sum(plan.lengths_k)
    if rest_q < 0 or rest_k < 0 or len(plan.lengths_q) != len(plan.lengths_k):
        raise ValueError(
            f"{len(plan.lengths_q)} query and {len(plan.lengths_k)} key sequences of {sum(plan.lengths_q)} and "
            f"{sum(plan.lengths_k)} tokens do not fit q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    groups = plan.runs()
    sizes_q = [count * length for count, length, _ in groups]
    sizes_k = [count * length for count, _, length in groups]
    parts = []
    for (count, length_q, length_k), qs, ks, vs in zip(
        groups, q.split([*sizes_q, rest_q]), k.split([*sizes_k, rest_k]), v.split([*sizes_k, rest_k]), strict=False
    ):
        if length_q == 0 or length_k == 0:
            parts.append(torch.zeros_like(qs))
            continue
        heads = [
            x.unflatten(0, (count, n)).transpose(1, 2) for x, n in ((qs, length_q), (ks, length_k), (vs, length_k))
        ]
        out = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], scale=scale)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    # The empty slices keep q, k and v in the graph of a process whose batch holds no sequence.
    parts.append(q.new_zeros(rest_q, *q.shape[1:]) + q[:0].sum() + k[:0].sum() + v[:0].sum())
    return torch.cat(parts)
