"""The lengths that the attention benchmark runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from avfast.masking import num_kept, ratio_pairs

AUDIO_PATCHES, VISUAL_PATCHES = 512, 196
RAGGED = (389, 104, 251, 317, 142, 371, 198, 263, 120, 344, 229, 167, 302, 110, 276, 331)
MIXES = {"mix-0-50": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5), "mix-0-80": (0.0, 0.2, 0.4, 0.6, 0.8)}


@dataclass(frozen=True)
class Case:
    """Sequence lengths, heads H and head dimension D."""

    name: str
    lengths: tuple[int, ...]
    heads: int = 12
    dim: int = 64

    @property
    def equal(self) -> bool:
        return len(set(self.lengths)) == 1

    @property
    def flops(self) -> int:
        """Of the forward pass."""
        return 4 * self.heads * self.dim * sum(n * n for n in self.lengths)

    @property
    def padding(self) -> float:
        """How many times the work is on sequences padded to the longest."""
        return len(self.lengths) * max(self.lengths) ** 2 / sum(n * n for n in self.lengths)

    def bytes(self, dtype: torch.dtype) -> int:
        """Of the forward pass: q, k, v and out once."""
        return 4 * self.heads * self.dim * sum(self.lengths) * dtype.itemsize


def mix(ratios: Sequence[float], blocks: int) -> tuple[int, ...]:
    """Lengths as AVSiam packs them: audio, then visual, each longest first."""
    pairs = [pair for block in range(blocks) for pair in ratio_pairs(ratios, len(ratios), block)]
    audio, visual = ([num_kept(n, pair[i]) for pair in pairs] for i, n in enumerate((AUDIO_PATCHES, VISUAL_PATCHES)))
    return (*sorted(audio, reverse=True), *sorted(visual, reverse=True))


def all_cases(tokens: int) -> dict[str, Case]:
    """The cases at about ``tokens`` tokens each; a mix or ragged list is taken whole."""
    cases = [Case(f"n{n}", (n,) * max(1, round(tokens / n))) for n in (49, 98, 196, 392, 512, 784, 1568)]
    for name, ratios in MIXES.items():
        cases.append(Case(name, mix(ratios, max(1, round(tokens / sum(mix(ratios, 1)))))))
    cases.append(Case("ragged-100-400", RAGGED * max(1, round(tokens / sum(RAGGED)))))
    total = AUDIO_PATCHES + VISUAL_PATCHES
    cases.append(Case("decoder-708", (total,) * max(1, round(tokens / total)), heads=16, dim=32))
    cases.append(Case("tiny", (9, 9, 5, 1), heads=2, dim=16))
    return {case.name: case for case in cases}
