"""Every random choice is named.

A :class:`DrawKey` holds seed, step and positions of the samples in the global batch; its bits come from a counter-based
generator, so they do not depend on how a batch is split over processes or on what was drawn before.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import numpy as np


def progress(epoch: int, epochs: int) -> float:
    """How far training is in an epoch (from 0): 0 in the first of ``epochs``, 1 in the last and after it.

    It stands still within an epoch, and with it all that depends on it, shapes above all. 0 where there is one epoch.
    """
    return max(min(epoch, epochs - 1), 0) / max(epochs - 1, 1)


@dataclass(frozen=True)
class DrawKey:
    """Names the random choices of one step.

    Args:
        seed: of the run, a non-negative integer below 2^64.
        step: counter of forward passes.
        positions: of the local samples in the global batch, each in ``0 .. total - 1``. A sample that was skipped
            leaves a hole.
        total: planned size of the global batch.
        progress: of training, see :func:`progress`, for what changes on the way (a curriculum). It names no random
            bits.
    """

    seed: int
    step: int
    positions: Sequence[int]
    total: int
    progress: float = 0.0

    def bits(self, stream: str, count: int) -> np.ndarray:
        """``(positions, count)`` uint64 random bits, drawn in one go.

        Philox4x64-10 keyed by (seed, stream) and counted from (step, position): position p reads the values that follow
        ``4 p ceil(count / 4)`` others. A stream is always read with the same count.
        """
        import numpy as np

        blocks = -(-count // 4)
        source, at = np.random.Philox(key=self._key(stream), counter=[0, 0, 0, self.step]), 0
        runs, start = [], 0
        for i in range(1, len(self.positions) + 1):
            if i == len(self.positions) or self.positions[i] != self.positions[i - 1] + 1:
                source.advance((self.positions[start] - at) * blocks)
                runs.append(source.random_raw((i - start) * blocks * 4).reshape(-1, blocks * 4))
                start, at = i, self.positions[i - 1] + 1
        return np.concatenate(runs)[:, :count] if runs else np.zeros((0, count), dtype=np.uint64)

    def uniform(self, stream: str, count: int) -> np.ndarray:
        """``(positions, count)`` float64 in [0, 1), made of :meth:`bits`."""
        return (self.bits(stream, count) >> 11) * 2.0**-53

    def generator(self, stream: str, position: int) -> np.random.Generator:
        """A generator of one position, for draws whose number is not known: Philox counted from (step, position)."""
        import numpy as np

        return np.random.Generator(np.random.Philox(key=self._key(stream), counter=[0, 0, position, self.step]))

    def _key(self, stream: str) -> np.ndarray:
        import numpy as np

        return np.array([self.seed, zlib.crc32(stream.encode())], dtype=np.uint64)

    @classmethod
    def fresh(cls, batch_size: int, generator: torch.Generator | None = None) -> DrawKey:
        """A key for a stand-alone batch, its seed drawn from ``generator`` (default: torch's global one)."""
        seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
        return cls(seed, 0, range(batch_size), batch_size)
