"""Which patches are kept.

Every random choice is named by a :class:`DrawKey` (seed, step, position of the sample in the global batch) and drawn
from a counter-based generator, so the outcome does not depend on how a batch is split over processes or on what was
drawn before.

Multi-ratio masking (AVSiam, section "Multi-Ratio Random Masking"): the instances of a batch are masked at different
ratios from a fixed list. Samples are dealt to ratios within fixed blocks of consecutive positions, one block per
length of the list, and each block uses every ratio once for audio and once for visual. Only *which* instance gets
which pair of ratios is random, so the number of kept tokens is the same at every step.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

Structure = Literal["unstructured", "time", "frequency", "time_frequency"]
STRUCTURES = ("unstructured", "time", "frequency", "time_frequency")


def check_ratio(ratio: float) -> float:
    """``ratio`` if it is in [0, 1), else a ValueError."""
    if not 0 <= ratio < 1:
        raise ValueError(f"a masking ratio lies in [0, 1), got {ratio}")
    return ratio


def num_kept(num_patches: int, ratio: float) -> int:
    """``floor(num_patches * (1 - ratio))``, exact for decimal ratios: 100 patches at 0.9 keep 10, not 9."""
    return floor(num_patches * (1 - Fraction(repr(float(check_ratio(ratio))))))


@dataclass(frozen=True)
class DrawKey:
    """Names the random choices of one step.

    Args:
        seed: of the run, a non-negative integer below 2^64.
        step: counter of forward passes.
        positions: of the local samples in the global batch, each in ``0 .. total - 1``. A sample that was skipped
        leaves a
            hole.
        total: planned size of the global batch.
    """

    seed: int
    step: int
    positions: Sequence[int]
    total: int

    def generator(self, stream: str, position: int) -> np.random.Generator:
        """Philox keyed by (seed, stream) and counted from (step, position)."""
        import numpy as np

        key = np.array([self.seed, zlib.crc32(stream.encode())], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, position, self.step]))

    @classmethod
    def fresh(cls, batch_size: int, generator: torch.Generator | None = None) -> DrawKey:
        """A key for a stand-alone batch, its seed drawn from ``generator`` (default: torch's global one)."""
        seed = int(torch.randint(2**62, (), generator=generator))
        return cls(seed, 0, range(batch_size), batch_size)


def ratio_pairs(ratios: Sequence[float], count: int, block: int = 0) -> list[tuple[float, float]]:
    """``count`` (audio, visual) ratio pairs in which every ratio of the list stands at most once per modality.

    Consecutive blocks shift the visual ratios against the audio ratios by one more place, so that all pairs occur.
    """
    if count < len(ratios):
        last = len(ratios) - 1
        ratios = [ratios[round(i * last / (count - 1)) if count > 1 else last // 2] for i in range(count)]
    shift = len(ratios) // 2 + block
    return [(r, ratios[(i + shift) % len(ratios)]) for i, r in enumerate(ratios)]


def assign_ratios(ratios: Sequence[float], key: DrawKey) -> list[tuple[float, float]]:
    """The (audio, visual) ratio of each of the key's positions."""
    size, assigned = len(ratios), []
    for position in key.positions:
        block, slot = divmod(position, size)
        count = min(size, key.total - block * size)
        order = key.generator("ratio", block).permutation(count)
        assigned.append(ratio_pairs(ratios, count, block)[order[slot]])
    return assigned


def keep_patches(
    grid: tuple[int, int], ratio: float, generator: np.random.Generator, structure: Structure = "unstructured"
) -> Tensor:
    """Ids of the kept patches of one instance, ascending.

    Args:
        grid: (rows, columns) of patches; for a spectrogram (frequency, time). Patch ids are row-major.
        ratio: share of masked patches.
        generator: source of randomness.
        structure: ``"time"`` masks whole columns first, ``"frequency"`` whole rows, ``"time_frequency"`` both at 0.7
        of the
            ratio each, as the released CAV-MAE and AVSiam do; single patches make up the exact number.

    Returns:
        ``(num_kept(rows * columns, ratio),)`` int64.
    """
    import numpy as np

    if structure not in STRUCTURES:
        raise ValueError(f"structure must be one of {', '.join(STRUCTURES)}, got {structure!r}")

    rows, columns = grid
    noise = generator.random((rows, columns))
    share = 0.7 if structure == "time_frequency" else 1.0
    if structure in ("time", "time_frequency"):
        noise[:, generator.permutation(columns)[: int(columns * ratio * share)]] += 1
    if structure in ("frequency", "time_frequency"):
        noise[generator.permutation(rows)[: int(rows * ratio * share)]] += 1
    kept = np.argsort(noise, axis=None)[: num_kept(rows * columns, ratio)]
    return torch.from_numpy(np.sort(kept))


@dataclass(frozen=True)
class Kept:
    """Kept patches of a batch of B instances, ragged; instances are packed longest first.

    Args:
        ids: ``(T,)`` int64 patch ids.
        rows: ``(T,)`` int64 batch row of each id.
        inverse: ``(B,)`` int64 place of each batch row in the packed order.
        lengths: kept patches per packed sequence, on the host.
        order: batch row of each packed sequence, on the host.
    """

    ids: Tensor
    rows: Tensor
    inverse: Tensor
    lengths: tuple[int, ...]
    order: tuple[int, ...]

    @classmethod
    def pack(cls, keep: Sequence[Tensor] | Tensor) -> Kept:
        """From one 1-D int64 tensor of patch ids per instance, or a ``(B, K)`` tensor."""
        order = sorted(range(len(keep)), key=lambda i: -len(keep[i]))
        ids = torch.cat([keep[i] for i in order]) if order else torch.zeros(0, dtype=torch.int64)
        lengths = [len(keep[i]) for i in order]
        places = torch.tensor(order, dtype=torch.int64)
        rows = places.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
        return cls(ids, rows.to(ids.device), places.argsort().to(ids.device), tuple(lengths), tuple(order))

    @classmethod
    def all(cls, batch_size: int, num_patches: int, device: torch.device | str | None = None) -> Kept:
        """Every patch of every instance."""
        ids = torch.arange(num_patches, device=device).repeat(batch_size)
        rows = torch.arange(batch_size, device=device)
        return cls(
            ids, rows.repeat_interleave(num_patches), rows, (num_patches,) * batch_size, tuple(range(batch_size))
        )

    def __len__(self) -> int:
        """Number of instances B."""
        return len(self.lengths)

    def to(self, device: torch.device | str) -> Kept:
        """The same on another device."""
        moved = [x.to(device, non_blocking=True) for x in (self.ids, self.rows, self.inverse)]
        return Kept(moved[0], moved[1], moved[2], self.lengths, self.order)

    def batch_lengths(self) -> list[int]:
        """Kept patches per instance, in batch order."""
        lengths = [0] * len(self)
        for row, length in zip(self.order, self.lengths, strict=True):
            lengths[row] = length
        return lengths

    def to_list(self) -> list[Tensor]:
        """The ids of each instance, in batch order."""
        parts = self.ids.split(list(self.lengths))
        return [parts[self.order.index(i)] for i in range(len(self))]

    def flat(self, num_patches: int) -> Tensor:
        """``(T,)`` entries of the flattened (B, num_patches) patch list."""
        return self.rows * num_patches + self.ids

    def masked(self, num_patches: int) -> Tensor:
        """``(B, num_patches)`` bool: True where a patch is not kept."""
        mask = torch.ones(len(self) * num_patches, dtype=torch.bool, device=self.ids.device)
        return mask.index_fill(0, self.flat(num_patches), False).view(len(self), num_patches)
