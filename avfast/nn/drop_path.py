"""Stochastic depth that saves the work: a branch runs on some sequences only.

For every branch a fixed share of the sequences is left out and the others' update is scaled by S / kept, so that its
expectation stays (Huang et al., Deep Networks with Stochastic Depth; per batch as in Oquab et al., DINOv2, section 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from avfast.ops import AttentionPlan


@dataclass(frozen=True)
class KeptSequences:
    """The sequences that one branch is computed for.

    Args:
        token_rows: ``(T',)`` int64 rows of their tokens, ascending.
        plan: their lengths.
        sizes: their rows in each norm set.
        scale: of their update.
    """

    token_rows: Tensor
    plan: AttentionPlan
    sizes: tuple[int, ...]
    scale: float

    @classmethod
    def draw(
        cls,
        lengths: Sequence[int],
        rate: float,
        generator: torch.Generator | None = None,
        sizes: Sequence[int] = (),
        device: torch.device | str | None = None,
    ) -> KeptSequences:
        """Keep ``round((1 - rate) S)`` of the S sequences, at least one, all choices equally likely.

        Args:
            lengths: tokens of each sequence.
            rate: share of sequences left out, in [0, 1).
            generator: a CPU generator, default torch's global one.
            sizes: rows of each norm set; a set ends where a sequence ends.
            device: of the tokens.
        """
        if not 0 <= rate < 1:
            raise ValueError(f"a drop rate lies in [0, 1), got {rate}")
        total = len(lengths)
        count = min(total, max(1, round((1 - rate) * total)))
        chosen = sorted(torch.randperm(total, generator=generator)[:count].tolist())
        starts = [0, *accumulate(lengths)]
        spans = [torch.arange(starts[i], starts[i + 1]) for i in chosen]
        rows = torch.cat(spans) if spans else torch.zeros(0, dtype=torch.int64)
        ends = [0, *accumulate(sizes)]
        kept_sizes = tuple(int(((rows >= a) & (rows < b)).sum()) for a, b in zip(ends, ends[1:], strict=False))
        plan = AttentionPlan.from_lengths([lengths[i] for i in chosen], device=device)
        return cls(rows.to(device), plan, kept_sizes, total / max(count, 1))

    def add_to(self, x: Tensor, update: Tensor) -> Tensor:
        """``(T, D)`` stream plus the scaled update ``(T', D)`` of the kept rows."""
        return x.index_add(0, self.token_rows, update.to(x.dtype), alpha=self.scale)


@dataclass(frozen=True)
class DropPath:
    """Stochastic depth of one block: the sequences of its attention branch and those of its MLP branch.

    Drawn outside whatever is compiled, captured or checkpointed, since a recomputed draw gives wrong gradients.
    """

    attention: KeptSequences
    mlp: KeptSequences

    @classmethod
    def draw(
        cls,
        lengths: Sequence[int],
        rate: float,
        generator: torch.Generator | None = None,
        sizes: Sequence[int] = (),
        device: torch.device | str | None = None,
    ) -> DropPath:
        """Two draws of :meth:`KeptSequences.draw`."""
        attention, mlp = (KeptSequences.draw(lengths, rate, generator, sizes, device) for _ in range(2))
        return cls(attention, mlp)
