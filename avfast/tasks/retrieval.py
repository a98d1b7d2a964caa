"""Zero-shot retrieval between the audio and the frame of the same clip, in matrix form.

Protocol of CAV-MAE and AVSiam: tokens after the final norm are averaged per clip, compared by cosine, and the rank of
the true partner among the whole gallery is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

TIE = 1e-12


def ranks(queries: Tensor, gallery: Tensor, groups: Tensor | None = None, chunk: int = 2048) -> Tensor:
    """The rank, from 1, of each query's partner (the gallery row of the same index) by cosine similarity.

    Equal similarities count against the query: a model that maps everything to one point gets rank N, not 1.

    Args:
        queries: ``(N, D)``.
        gallery: ``(N, D)``.
        groups: ``(N,)`` integers; where given, only gallery rows of the query's own group are candidates.
        chunk: queries per block of the similarity matrix.

    Returns:
        ``(N,)`` int64.
    """
    if queries.shape != gallery.shape or queries.ndim != 2:
        raise ValueError(
            f"queries and gallery must be (N, D) alike, got {tuple(queries.shape)}, {tuple(gallery.shape)}"
        )
    for name, x in (("queries", queries), ("gallery", gallery)):
        if not torch.isfinite(x).all():
            raise ValueError(f"{name} hold values that are not finite; no rank can be given")
    # float64, so that equal rows tie up to TIE whatever order the matrix product sums in
    queries, gallery = (F.normalize(x.double(), dim=1) for x in (queries, gallery))
    result = []
    for start in range(0, len(queries), chunk):
        rows = torch.arange(start, min(start + chunk, len(queries)), device=queries.device)
        similarity = queries[rows] @ gallery.T
        ahead = similarity >= similarity[torch.arange(len(rows)), rows, None] - TIE
        if groups is not None:
            ahead &= groups[rows, None] == groups[None, :]
        result.append(ahead.sum(1))
    return torch.cat(result) if result else torch.zeros(0, dtype=torch.int64)


def recall(
    queries: Tensor, gallery: Tensor, groups: Tensor | None = None, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """``{"R@1": ..., "R@5": ..., "R@10": ..., "MdR": ...}``: rates in 0-1 and the median rank.

    With ``groups``, queries that are alone in their group are left out, since their partner is certain.
    """
    rank = ranks(queries, gallery, groups)
    if groups is not None:
        rank = rank[_group_sizes(groups) > 1]
    if not len(rank):
        raise ValueError("retrieval needs at least one query with a gallery to search, got none")
    found: dict[str, float] = {f"R@{k}": (rank <= k).double().mean().item() for k in ks}
    return found | {"MdR": rank.double().quantile(0.5).item()}


def retrieval(audio: Tensor, visual: Tensor, groups: Tensor | None = None) -> dict:
    """Both directions between the pooled features of N clips, ``(N, D)`` each.

    Returns:
        ``{"gallery": N, "audio_to_visual": recall, "visual_to_audio": recall, "chance": recall}``.
    """
    return {
        "gallery": len(audio),
        "audio_to_visual": recall(audio, visual, groups),
        "visual_to_audio": recall(visual, audio, groups),
        "chance": chance(len(audio), groups),
    }


def chance(gallery: int, groups: Tensor | None = None, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """What :func:`recall` gives on average for features that know nothing."""
    if groups is None:
        sizes = torch.full((gallery,), gallery)
    else:
        sizes = _group_sizes(groups)
        sizes = sizes[sizes > 1]
    expected: dict[str, float] = {f"R@{k}": (k / sizes).clamp(max=1).double().mean().item() for k in ks}
    return expected | {"MdR": ((sizes.double() + 1) / 2).mean().item()}


def _group_sizes(groups: Tensor) -> Tensor:
    """The size of each row's group."""
    _, member, sizes = groups.unique(return_inverse=True, return_counts=True)
    return sizes[member]
