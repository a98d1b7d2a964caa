"""Which patches are kept.

Multi-ratio masking (AVSiam, section "Multi-Ratio Random Masking"): the instances of a batch are masked at different
ratios from a fixed list. Samples are dealt to ratios within fixed blocks of consecutive positions, one block per
length of the list, and each block uses every ratio once for audio and once for visual. Only *which* instance gets
which pair of ratios is random, so the number of kept tokens is the same at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import floor
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from avfast.packing import PackedTokens
from avfast.random import DrawKey
from avfast.tensors import exporting, to_device

if TYPE_CHECKING:
    import numpy as np

Structure = Literal["unstructured", "time", "frequency", "time_frequency"]
Rounding = Literal["floor", "nearest"]
STRUCTURES = ("unstructured", "time", "frequency", "time_frequency")


def check_ratio(ratio: float) -> float:
    """``ratio`` if it is in [0, 1), else a ValueError."""
    if not 0 <= ratio < 1:
        raise ValueError(f"a masking ratio lies in [0, 1), got {ratio}")
    return ratio


def num_kept(num_patches: int, ratio: float | Fraction, rounding: Rounding = "floor") -> int:
    """``floor(num_patches * (1 - ratio))``, exact for decimal ratios: 100 patches at 0.9 keep 10, not 9.

    ``rounding="nearest"`` rounds to the nearest number, halves up.
    """
    exact = num_patches * (1 - (ratio if isinstance(ratio, Fraction) else decimal(check_ratio(ratio))))
    return floor(exact + Fraction(1, 2) if rounding == "nearest" else exact)


def decimal(x: float) -> Fraction:
    """The number that a float is written as: 9/10 for 0.9."""
    return Fraction(repr(float(x)))


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
    size = len(ratios)
    blocks = sorted({position // size for position in key.positions})
    dealt = {}
    for block, noise in zip(blocks, replace(key, positions=blocks).bits("ratio", size), strict=True):
        count = min(size, key.total - block * size)
        pairs = ratio_pairs(ratios, count, block)
        dealt[block] = [pairs[i] for i in noise[:count].argsort(kind="stable")]
    return [dealt[position // size][position % size] for position in key.positions]


def keep_patches(
    grid: tuple[int, int],
    ratios: Sequence[float],
    key: DrawKey,
    stream: str,
    structure: Structure = "unstructured",
    present: Sequence[bool] | None = None,
) -> Kept:
    """The kept patches of a batch, ascending in each instance.

    Args:
        grid: (rows, columns) of patches; for a spectrogram (frequency, time). Patch ids are row-major.
        ratios: share of masked patches of each instance.
        key: names the draws, one position per instance.
        stream: name of the random stream, one per grid and structure.
        structure: ``"time"`` masks whole columns first, ``"frequency"`` whole rows, ``"time_frequency"`` both at 0.7
            of the ratio each, as the released CAV-MAE and AVSiam do; single patches make up the exact number.
        present: per instance, whether it has the modality; without it no patch is kept. Default: all have it.

    Returns:
        ``num_kept(rows * columns, ratio)`` patches of each instance.
    """
    import numpy as np

    if structure not in STRUCTURES:
        raise ValueError(f"structure must be one of {', '.join(STRUCTURES)}, got {structure!r}")
    rows, columns = grid
    patches, share = rows * columns, 0.7 if structure == "time_frequency" else 1.0
    lines = (columns if "time" in structure else 0, rows if "frequency" in structure else 0)
    bits = key.bits(stream, patches + sum(lines))
    # The patch id in the lowest bits makes the noise of an instance distinct; the highest two count its masked lines.
    low = np.uint64((1 << patches.bit_length()) - 1)
    noise = (bits[:, :patches] >> np.uint64(2)) & ~low | np.arange(patches, dtype=np.uint64)
    grids, after = noise.reshape(-1, rows, columns), bits[:, patches:]
    for values, axis in ((after[:, : lines[0]], 1), (after[:, lines[0] :], 2)):
        masked = [int(values.shape[1] * ratio * share) for ratio in ratios]
        if any(masked):
            chosen = values.argsort(1, kind="stable").argsort(1) < np.array(masked)[:, None]
            grids += np.expand_dims(chosen.astype(np.uint64) << np.uint64(62), axis)
    number = {ratio: num_kept(patches, ratio) for ratio in set(ratios)}
    counts = np.array([number[ratio] for ratio in ratios], dtype=np.int64)
    if present is not None:
        counts *= np.array(present, dtype=np.int64)
    last = np.maximum(counts, 1) - 1
    threshold = np.sort(noise, axis=1)[np.arange(len(noise)), last]
    return Kept.where((noise <= threshold[:, None]) & (counts > 0)[:, None])


def spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The ranges ``start .. start + length - 1``, one after another, int64."""
    import numpy as np

    return np.arange(lengths.sum()) + np.repeat(starts - (lengths.cumsum() - lengths), lengths)


@dataclass(frozen=True)
class Kept:
    """Kept patches of a batch of B instances, ragged; instances are packed longest first.

    Args:
        ids: ``(T,)`` int64 patch ids.
        batch_rows: ``(T,)`` int64 batch row of each id.
        inverse: ``(B,)`` int64 place of each batch row in the packed order.
        lengths: kept patches per packed sequence, on the host.
        permutation: batch row of each packed sequence, on the host.
        whole: of every instance all N patches in their order (N), or none (0), made by :meth:`all`; else None.
    """

    ids: Tensor
    batch_rows: Tensor
    inverse: Tensor
    lengths: tuple[int, ...]
    permutation: tuple[int, ...] = field(compare=False)  # differs from step to step, and is not read in a pass
    whole: int | None = None

    @classmethod
    def pack(cls, keep: Sequence[Tensor] | Tensor) -> Kept:
        """From one 1-D int64 tensor of patch ids per instance, or a ``(B, K)`` tensor.

        Raises:
            TypeError: for what is no tensor of integers, such as a mask.
            ValueError: for another number of dimensions; for ids on the CPU that are negative or repeated (to read
                those of another device would wait for it).
        """
        permutation = sorted(range(len(keep)), key=lambda i: -len(keep[i]))
        for i, ids in enumerate(keep):
            if ids.dtype == torch.bool:
                raise TypeError(
                    f"kept patches are given by their ids, got a bool mask for instance {i}; mask.nonzero() has the ids"
                )
            if ids.is_floating_point() or ids.is_complex():
                raise TypeError(f"kept patches are given by their int64 ids, got {ids.dtype} for instance {i}")
            if ids.ndim != 1:
                raise ValueError(f"kept patches of an instance are (K,) ids, got {tuple(ids.shape)} for instance {i}")
        parts = [keep[i] for i in permutation]
        ids = torch.cat(parts).long() if parts else torch.zeros(0, dtype=torch.int64, device="cpu")
        lengths = [len(part) for part in parts]
        packed = torch.tensor(permutation, dtype=torch.int64, device="cpu")
        repeats = torch.tensor(lengths, dtype=torch.int64, device="cpu")
        batch_rows = packed.repeat_interleave(repeats, output_size=sum(lengths)).to(ids.device)
        kept = cls(ids, batch_rows, packed.argsort().to(ids.device), tuple(lengths), tuple(permutation))
        if ids.device.type == "cpu" and len(ids):
            if ids.min() < 0:
                raise ValueError(f"ids of kept patches count from 0, got {int(ids.min())}")
            if len(kept.flat(int(ids.max()) + 1).unique()) < len(ids):
                raise ValueError("the ids of the kept patches of an instance must be distinct; some are repeated")
        return kept

    @classmethod
    def where(cls, kept: np.ndarray) -> Kept:
        """From a ``(B, N)`` bool array that is True where a patch is kept."""
        import numpy as np

        counts = kept.sum(1)
        permutation = np.argsort(-counts, kind="stable")
        lengths = counts[permutation]
        batch_rows = permutation.repeat(lengths)
        ids = np.flatnonzero(kept[permutation]) - np.arange(len(permutation)).repeat(lengths) * kept.shape[1]
        packed = [torch.from_numpy(x) for x in (ids, batch_rows, np.argsort(permutation))]
        return cls(packed[0], packed[1], packed[2], tuple(lengths.tolist()), tuple(permutation.tolist()))

    @classmethod
    def all(cls, batch_size: int, num_patches: int, device: torch.device | str | None = "cpu") -> Kept:
        """Every patch of every instance.

        While a program is exported a batch has any size, and nothing on the host has one entry for each instance:
        ``lengths`` and ``permutation`` are empty.
        """
        rows = torch.arange(batch_size, device=device)
        ids = torch.arange(num_patches, device=device).repeat(batch_size)
        batch_rows = rows[:, None].expand(-1, num_patches).flatten()
        on_host = ((), ()) if exporting() else ((num_patches,) * batch_size, tuple(range(batch_size)))
        return cls(ids, batch_rows, rows, *on_host, num_patches)

    def __len__(self) -> int:
        """Number of instances B."""
        return len(self.lengths)

    def to(self, device: torch.device | str) -> Kept:
        """The same on another device."""
        moved = [to_device(x, device) for x in (self.ids, self.batch_rows, self.inverse)]
        return Kept(moved[0], moved[1], moved[2], self.lengths, self.permutation, self.whole)

    def batch_lengths(self) -> list[int]:
        """Kept patches per instance, in batch order."""
        lengths = [0] * len(self)
        for row, length in zip(self.permutation, self.lengths, strict=True):
            lengths[row] = length
        return lengths

    def to_list(self) -> list[Tensor]:
        """The ids of each instance, in batch order."""
        parts = dict(zip(self.permutation, self.ids.split(list(self.lengths)), strict=True))
        return [parts[i] for i in range(len(self))]

    def starts(self) -> np.ndarray:
        """``(B,)`` where the ids of each instance begin, in batch order, on the host."""
        import numpy as np

        lengths = np.array(self.lengths, dtype=np.int64)
        starts = np.empty_like(lengths)
        starts[list(self.permutation)] = lengths.cumsum() - lengths
        return starts

    def reordered(self, permutation: Sequence[int]) -> Kept:
        """The same patches, instances packed in this order of batch rows."""
        import numpy as np

        if tuple(permutation) == self.permutation:
            return self
        packed = np.array(permutation, dtype=np.int64)
        lengths = np.array(self.batch_lengths(), dtype=np.int64)[packed]
        index = torch.tensor(spans(self.starts()[packed], lengths), device=self.ids.device)
        inverse = torch.tensor(packed.argsort(), device=self.ids.device)
        return Kept(self.ids[index], self.batch_rows[index], inverse, tuple(lengths.tolist()), tuple(permutation))

    def flat(self, num_patches: int) -> Tensor:
        """``(T,)`` entries of the flattened (B, num_patches) patch list."""
        return self.batch_rows * num_patches + self.ids

    def packed_flat(self, num_patches: int) -> Tensor:
        """``(T,)`` entries of the flattened (B, num_patches) patches of the instances in the order they are packed."""
        return self.inverse[self.batch_rows] * num_patches + self.ids

    def masked(self, num_patches: int) -> Tensor:
        """``(B, num_patches)`` bool: True where a patch is not kept."""
        # the batch size as a shape, so that one compiled step serves all
        batch = self.inverse.shape[0]
        mask = torch.ones(batch * num_patches, dtype=torch.bool, device=self.ids.device)
        return mask.index_fill(0, self.flat(num_patches), False).view(batch, num_patches)

    def mean(self, tokens: Tensor, num_patches: int) -> Tensor:
        """``(B, D)`` mean of the packed tokens ``(T, D)`` of each batch row, in at least float32; of none zeros."""
        wide = torch.promote_types(tokens.dtype, torch.float32)
        if not torch.compiler.is_compiling():
            return PackedTokens(tokens, self.lengths).mean(wide)[self.inverse]
        # without the lengths of the host, which a compiled step would be compiled anew for
        placed = tokens.new_zeros(self.inverse.shape[0] * num_patches, tokens.shape[1])
        placed = placed.index_copy(0, self.flat(num_patches), tokens).unflatten(0, (-1, num_patches))
        counts = (~self.masked(num_patches)).sum(1, keepdim=True).clamp(min=1)
        return placed.sum(1, dtype=wide) / counts
