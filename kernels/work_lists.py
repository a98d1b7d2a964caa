"""What the programs of the packed attention kernels do: work lists per length class. Needs no Triton."""

from __future__ import annotations

import torch
from torch import Tensor

SHORT = 256
ROWS = {"tiny": 64, "short": 64, "long": 128}
"""Length classes and the rows of their items. A sequence is tiny if all its queries and all its keys fit one item, and
else short while what is cut into blocks, its queries or its keys, is no longer than ``SHORT``."""
SPARE = 2
"""Rows that a list has beyond its items: torch.compile specialises on the sizes 0 and 1, which no list has so."""


def most_items(tokens: int, sequences: int, longest: int = 0, longest_other: int = 0) -> list[int]:
    """Upper bounds of the items per class, where only the device knows lengths.

    Args:
        tokens: rows of all sequences on the side that is cut into blocks.
        sequences: their number.
        longest: no sequence has more of these rows; 0 if unknown.
        longest_other: none has more rows of the other side; 0 if unknown.
    """
    tiny, short, long = ROWS.values()
    if 0 < longest <= tiny and 0 < longest_other <= tiny:
        return [sequences, 0, 0]
    most_long = 0 if 0 < longest <= SHORT else tokens // long + tokens // (SHORT + 1)
    return [sequences, tokens // short + sequences, most_long]


def blocks_per_sequence(own: Tensor, other: Tensor) -> Tensor:
    """``(3, S)``: how many items of each class the sequences make, from rows of either side ``(S,)``."""
    tiny = (own <= ROWS["tiny"]) & (other <= ROWS["tiny"])
    long = own > SHORT
    pieces = [torch.div(own + ROWS[name] - 1, ROWS[name], rounding_mode="floor") for name in ("short", "long")]
    return torch.stack([tiny & (own + other > 0), pieces[0] * ~(tiny | long), pieces[1] * (long)]).int()


def work_lists(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, counts: list[list[int]]) -> list[Tensor]:
    """Three int32 lists ``(items + SPARE, 4)`` for blocks of queries, tiny, short and long, on the boundaries' device,
    which are not read; three more for blocks of keys, unless these are the same.

    An item is (first row of the block, end of its sequence, first row of the other side, its end); those with most work
    come first, and unused ones are zeros.

    Args:
        cu_seqlens_q: ``(S + 1,)`` boundaries.
        cu_seqlens_k: ``(S + 1,)`` boundaries, None in self-attention.
        counts: at least the items of each class for blocks of queries and, in cross-attention, of keys, see
            :func:`most_items`.
    """
    q, k = cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    lists = []
    for (own, other), sizes in zip(((q, k), (k, q)), counts, strict=False):
        items = max(sizes) + SPARE
        if len(own) == 1:
            lists += [own.new_zeros(size + SPARE, 4) for size in sizes]
            continue
        order = other.diff().argsort(descending=True, stable=True)
        bounds = own[:-1][order], own[1:][order], other[:-1][order], other[1:][order]
        blocks = blocks_per_sequence(own.diff()[order], other.diff()[order])
        ends = blocks.cumsum(1)
        slots = torch.arange(items, device=own.device).expand(len(blocks), items)
        place = torch.searchsorted(ends, slots.contiguous(), right=True).clamp(max=len(own) - 2)
        nth = slots - ends.gather(1, place) + blocks.gather(1, place)
        offset = torch.stack([n * rows for n, rows in zip(nth, ROWS.values(), strict=True)])
        begin, end, other_begin, other_end = (x[place] for x in bounds)
        item = torch.stack([begin + offset, end, other_begin, other_end], 2) * (slots < ends[:, -1:])[:, :, None]
        lists += [x[: size + SPARE] for x, size in zip(item.to(torch.int32), sizes, strict=True)]
    return lists
