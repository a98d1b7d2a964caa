"""Which clips make up which batch.

Everything random is named by (seed, step, position in the global batch), so a run may stop and resume at any step and
be split over any number of processes and workers without changing a sample.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from avfast.data.dataset import Item
from avfast.random import DrawKey, progress


class StepBatches:
    """Which clips make up which batch: a batch sampler that is a pure function of (seed, step).

    Each epoch is a new permutation of the clips, cut into global batches; the last, incomplete one is left out. With
    ``weights``, clips are drawn with replacement instead; with ``shards``, shards are permuted, and clips within groups
    of them. A step's global batch does not depend on the number of processes: each takes a contiguous part of it.

    Args:
        num_clips: to choose from.
        sizes: planned size of the global batch, over all processes: a number, or a function of the epoch (from 0) for a
            batch that grows or shrinks between epochs. More than there are clips: all clips, with a warning
            if that is so from the start.
        steps: end of the range of steps.
        start_step: its beginning; a resumed run begins where it left off.
        epochs: planned for the training, what its progress refers to; steps may end before or go on after them.
        seed: of the permutations.
        rank, world_size: this process and how many there are.
        weights: (num_clips,) sampling weights.
        shards: (num_clips,) the number of each clip's shard, where shards are read a few at a time.
        together: how many.
    """

    def __init__(
        self,
        num_clips: int,
        sizes: int | Callable[[int], int],
        *,
        steps: int,
        start_step: int = 0,
        epochs: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        weights: Sequence[float] | np.ndarray | None = None,
        shards: Sequence[int] | np.ndarray | None = None,
        together: int = 1,
    ) -> None:
        if num_clips < 1:
            raise ValueError(f"num_clips: expected at least one clip, got {num_clips}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 .. {world_size - 1}, got {rank}")
        if not 0 <= start_step <= steps:
            raise ValueError(f"start_step: expected 0 .. steps ({steps}), got {start_step}")
        self.num_clips = num_clips
        self.sizes = sizes
        self.steps = steps
        self.start_step = start_step
        self.epochs = epochs
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._cumulative: np.ndarray | None = None
        if weights is not None:
            values = np.asarray(weights, dtype=np.float64)
            if values.shape != (num_clips,) or not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
                raise ValueError(
                    f"weights: expected {num_clips} numbers of 0 or more, not all 0, got shape {values.shape}"
                )
            self._cumulative = np.cumsum(values) / values.sum()
        self._shards: list[np.ndarray] | None = None  # the clips of each
        self.together = together
        if shards is not None:
            numbers = np.asarray(shards)
            if numbers.shape != (num_clips,) or weights is not None or together < 1:
                raise ValueError(
                    f"shards: expected {num_clips} numbers, no weights and together of 1 or more, got shape "
                    f"{numbers.shape}, {'no ' if weights is None else ''}weights and {together}"
                )
            order = np.argsort(numbers, kind="stable")
            self._shards = np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)
        self._permutation: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
        self._firsts = [0]  # the first step of each epoch, as far as anyone has asked
        if (planned := self._planned(0)) > num_clips:
            warnings.warn(
                f"the data holds {num_clips} clips, fewer than a batch of {planned}: batches of {num_clips}",
                stacklevel=2,
            )
        self.size(0)  # what cannot be is said at once

    def __len__(self) -> int:
        return self.steps - self.start_step

    def __iter__(self) -> Iterator[list[Item]]:
        for step in range(self.start_step, self.steps):
            yield self.at(step)

    def size(self, epoch: int) -> int:
        """Planned size of the global batches of an epoch."""
        planned = self._planned(epoch)
        if planned < 1:
            raise ValueError(f"sizes: expected a batch of at least 1, got {planned} in epoch {epoch}")
        size = min(planned, self.num_clips)
        if size < self.world_size:
            raise ValueError(
                f"a global batch of {size} clips leaves some of the {self.world_size} processes without any"
            )
        return size

    def first_step(self, epoch: int) -> int:
        """The step with which an epoch begins; after so many steps every clip had its turn ``epoch`` times."""
        if not callable(self.sizes):
            return epoch * (self.num_clips // self.size(0))
        while len(self._firsts) <= epoch:
            self._firsts.append(self._firsts[-1] + self.num_clips // self.size(len(self._firsts) - 1))
        return self._firsts[epoch]

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to."""
        if not callable(self.sizes):
            return step // self.first_step(1)
        while self._firsts[-1] <= step:
            self.first_step(len(self._firsts))
        return bisect_right(self._firsts, step) - 1

    def plan(self, step: int) -> tuple[int, float]:
        """Planned size of a step's global batch, and the progress of training."""
        epoch = self.epoch(step)
        return self.size(epoch), progress(epoch, self.epochs)

    def global_batch(self, step: int) -> np.ndarray:
        """(size,) clip indices of a step, by position."""
        epoch = self.epoch(step)
        size, place = self.size(epoch), step - self.first_step(epoch)
        if self._cumulative is not None:
            draws = self._rng("weighted", step).random(size)
            return np.searchsorted(self._cumulative, draws, side="right").clip(max=self.num_clips - 1)
        if self._permutation[0] != epoch:
            self._permutation = (epoch, self._order(self._rng("epoch", epoch)))
        return self._permutation[1][place * size : (place + 1) * size]

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        """(num_clips,) every clip once."""
        if self._shards is None:
            return rng.permutation(self.num_clips)
        shards = [self._shards[i] for i in rng.permutation(len(self._shards))]
        groups = (shards[i : i + self.together] for i in range(0, len(shards), self.together))
        return np.concatenate([rng.permutation(np.concatenate(group)) for group in groups])

    def at(self, step: int) -> list[Item]:
        """This process's part of a step's batch."""
        batch = self.global_batch(step)
        first, last = _share(len(batch), self.rank, self.world_size)
        return [(int(index), step, first + i) for i, index in enumerate(batch[first:last])]

    def _planned(self, epoch: int) -> int:
        return self.sizes(epoch) if callable(self.sizes) else self.sizes

    def _rng(self, stream: str, number: int) -> np.random.Generator:
        return DrawKey(self.seed, number, (0,), 1).generator(stream, 0)


class InOrder:
    """Every clip once, this process's contiguous part of them."""

    def __init__(self, num_clips: int, batch_size: int, rank: int, world_size: int) -> None:
        self.first, self.last = _share(num_clips, rank, world_size)
        self.batch_size = batch_size
        self.num_clips = num_clips

    def plan(self, step: int) -> tuple[int, float]:
        return self.num_clips, 0.0

    def __len__(self) -> int:
        return -(-(self.last - self.first) // self.batch_size)

    def __iter__(self) -> Iterator[list[Item]]:
        for first in range(self.first, self.last, self.batch_size):
            yield [(index, 0, index) for index in range(first, min(first + self.batch_size, self.last))]


def _share(count: int, rank: int, world_size: int) -> tuple[int, int]:
    return rank * count // world_size, (rank + 1) * count // world_size
