"""The random choices of AVBERT: masked clips, the noise that draws negatives, derangements, positions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from avfast.distributed import world_size
from avfast.models.avbert_losses import Negatives
from avfast.models.contract import Draws
from avfast.models.views import present_rows
from avfast.random import DrawKey

if TYPE_CHECKING:
    import numpy as np

Masks = Literal["pool", "video"]
Half = Literal["all", "first", "second"]


@dataclass(frozen=True, eq=False)
class AVBERTDraws(Draws):
    """The random choices of a step.

    Args:
        masked: ``(B, M)`` int64 clips that are masked in both modalities, 0 .. T - 1, ascending.
        places: ``(B, 2)`` int64: the pool that negatives of a video are drawn from, and the video's place in it.
        noise: ``(B, 2, M, W T)`` float32 Gumbel noise that draws the negatives of each masked clip (visual, then
            audio): a column for each clip of each place of a pool of W. None where all candidates are taken.
        visual_rows: batch rows that have frames; None for all.
        audio_rows: those that have audio.
        pairs: ``(2, n)`` int64: the videos that have both, by their place among ``visual_rows`` and among
            ``audio_rows``; None where all have both.
        matched: ``(m,)`` int64: those of these pairs that get another video's audio too; None for all. Fewer than two
            in a pool have no partner.
        partner: ``(m,)`` int64: the pair whose audio each of them gets; None without correct pair prediction.
        positions: ``(m, S)`` int64 clips whose outputs are classified beside BOS, 0 .. T - 1.
        half: ``"all"``, or which half of a training that freezes one modality this is.
    """

    masked: Tensor
    places: Tensor
    noise: Tensor | None
    visual_rows: Tensor | None
    audio_rows: Tensor | None
    pairs: Tensor | None
    matched: Tensor | None
    partner: Tensor | None
    positions: Tensor | None
    half: Half = "all"

    def rows(self) -> dict[str, Tensor | None]:
        """By modality, the batch rows that have it."""
        return {"audio": self.audio_rows, "visual": self.visual_rows}


class Sampling:
    """How the choices of a step are made.

    Args:
        num_clips: of a video, T.
        mask_ratio: share of masked clips; of a video max(1, floor(T mask_ratio + 0.5)) are.
        masks: videos are masked one by one, or all of a pool alike.
        negatives: which clips a positive is told from.
        num_negatives: how many of them ``"similar"`` and ``"dissimilar"`` draw, K.
        pool_size: consecutive videos of the global batch that negatives and partners come from; None for a process's.
        cross_rank: negatives come from all processes.
        cpp_positions: clips whose outputs are classified beside BOS; None without correct pair prediction.
    """

    def __init__(
        self,
        num_clips: int,
        mask_ratio: float,
        masks: Masks,
        negatives: Negatives,
        num_negatives: int,
        pool_size: int | None,
        cross_rank: bool,
        cpp_positions: int | None,
    ) -> None:
        for name, value, allowed in (("masks", masks, Masks), ("negatives", negatives, Negatives)):
            if value not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {value!r}")
        if num_clips < 2:
            raise ValueError(f"num_clips must be at least 2, one to mask and one to see, got {num_clips}")
        if not 0 < mask_ratio < 1 or int(num_clips * mask_ratio + 0.5) >= num_clips:
            raise ValueError(f"mask_ratio must be in (0, 1) and leave one of {num_clips} clips, got {mask_ratio}")
        if num_negatives < 1:
            raise ValueError(f"num_negatives must be at least 1, got {num_negatives}")
        if cpp_positions is not None and not 0 <= cpp_positions <= num_clips:
            raise ValueError(f"cpp_positions must be 0 .. {num_clips}, the clips of a video, got {cpp_positions}")
        if pool_size is not None and pool_size < (1 if cpp_positions is None else 2):
            raise ValueError(f"pool_size must be at least 1, with cpp at least 2, got {pool_size}")
        self.num_clips, self.num_masked = num_clips, max(1, int(num_clips * mask_ratio + 0.5))
        self.masks, self.negatives, self.num_negatives = masks, negatives, num_negatives
        self.pool_size, self.cross_rank, self.cpp_positions = pool_size, cross_rank, cpp_positions

    def draw(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        *,
        key: DrawKey | None = None,
        only: str | None = None,
        has_audio: Iterable[bool] | None = None,
        has_visual: Iterable[bool] | None = None,
        masked: Tensor | None = None,
        noise: Tensor | None = None,
        partner: Sequence[int] | None = None,
        positions: Tensor | None = None,
        training: bool = True,
    ) -> AVBERTDraws:
        """The random choices of a pass, on the CPU; what is given is not drawn.

        Args:
            batch_size: videos on this process, B.
            generator: seeds a stand-alone draw; default torch's global generator.
            key: names the draw instead (training), see :class:`~avfast.random.DrawKey`.
            only: ``"joint"``.
            has_audio: per video, whether it has audio, default all.
            has_visual: likewise.
            masked: ``(B, M)`` distinct clips, 0 .. T - 1.
            noise: ``(B, 2, M, W T)``, see :class:`AVBERTDraws`.
            partner: per video the one whose audio it gets, another one of the batch; itself where it takes no part.
            positions: ``(B, S)`` distinct clips, 0 .. T - 1.
            training: a batch of one video, which no other can be paired with, is an error; else it has no pair.
        """
        if only not in (None, "joint"):
            raise ValueError(f"only must be joint, got {only!r}")
        if key is not None and len(key.positions) != batch_size:
            raise ValueError(f"the key names {len(key.positions)} positions for a batch of {batch_size}")
        key = DrawKey.fresh(batch_size, generator) if key is None else key
        has_audio, has_visual = (None if has is None else list(has) for has in (has_audio, has_visual))
        visual_rows, audio_rows, both = (
            present_rows(batch_size, *has) for has in ((has_visual,), (has_audio,), (has_visual, has_audio))
        )
        pairs = None
        if both is not None:
            whole = torch.arange(batch_size, device="cpu")
            pairs = torch.stack([
                torch.searchsorted(whole if rows is None else rows, both) for rows in (visual_rows, audio_rows)
            ])  # fmt: skip
        rows = list(range(batch_size)) if both is None else both.tolist()
        matched = partners = at = None
        if self.cpp_positions is not None:
            found = (
                self._deranged(key, rows, training) if partner is None else _given_partners(partner, rows, batch_size)
            )
            if len(found) < len(rows):
                matched = _ints([i for i, row in enumerate(rows) if row in found])
            place = {row: i for i, row in enumerate(rows)}
            partners = _ints([place[other] for other in found.values()])
            drawn = self._clips(key, "positions", self.cpp_positions, positions)
            at = drawn[_ints(list(found))]
        elif partner is not None or positions is not None:
            raise ValueError("partner and positions are of cpp=True")
        return AVBERTDraws(
            "joint", self._masked(key, masked), self._places(key), self._noise(key, noise), visual_rows, audio_rows,
            pairs, matched, partners, at,
        )  # fmt: skip

    # Pools.

    def _pools(self, key: DrawKey) -> dict[int, list[int]]:
        """Batch rows by the position in the global batch that names their pool, within this process."""
        pools: dict[int, list[int]] = {}
        for row, position in enumerate(key.positions):
            first = key.positions[0] if self.pool_size is None else position - position % self.pool_size
            pools.setdefault(first, []).append(row)
        return pools

    def _places(self, key: DrawKey) -> Tensor:
        if self.pool_size is not None:
            places = [divmod(position, self.pool_size) for position in key.positions]
        else:
            places = [(0, position if self.cross_rank else row) for row, position in enumerate(key.positions)]
        return torch.tensor(places, dtype=torch.int64, device="cpu").view(-1, 2)

    def _noise(self, key: DrawKey, given: Tensor | None) -> Tensor | None:
        import numpy as np

        if self.negatives not in ("similar", "dissimilar"):
            if given is not None:
                raise ValueError("noise is of negatives=similar or dissimilar")
            return None
        width = self.pool_size or (key.total if self.cross_rank else len(key.positions))
        shape = (len(key.positions), 2, self.num_masked, width * self.num_clips)
        if given is not None:
            if given.shape != shape:
                raise ValueError(f"noise must be {shape}, got {tuple(given.shape)}")
            return given.to("cpu", torch.float32)
        drawn = np.maximum(key.uniform("negatives", shape[1] * shape[2] * shape[3]), 2.0**-53)
        return torch.from_numpy((-np.log(-np.log(drawn))).astype("float32")).view(shape)

    def _masked(self, key: DrawKey, given: Tensor | None) -> Tensor:
        if given is not None or self.masks == "video":
            return self._clips(key, "masked", self.num_masked, given)
        pools = self._pools(key)
        drawn = self._clips(replace(key, positions=list(pools)), "masked", self.num_masked, None)
        number = torch.zeros(len(key.positions), dtype=torch.int64, device="cpu")
        for i, rows in enumerate(pools.values()):
            number[rows] = i
        return drawn[number]

    def _clips(self, key: DrawKey, stream: str, count: int, given: Tensor | None) -> Tensor:
        """``(positions, count)`` int64 distinct clips of each video, ascending."""
        if given is None:
            order = torch.from_numpy(key.uniform(stream, self.num_clips).argsort(1))
            return order[:, :count].sort(1).values
        given, shape = (
            torch.as_tensor(given, dtype=torch.int64, device="cpu").sort(-1).values,
            (len(key.positions), count),
        )
        if given.shape != shape:
            raise ValueError(f"{stream} must be {shape}, got {tuple(given.shape)}")
        if given.numel() and (given.min() < 0 or given.max() >= self.num_clips or (given.diff(dim=1) == 0).any()):
            raise ValueError(f"{stream} must be distinct clips 0 .. {self.num_clips - 1} of each video")
        return given

    def _deranged(self, key: DrawKey, rows: Sequence[int], training: bool) -> dict[int, int]:
        """For each row that has both modalities, ascending, the one whose audio it gets; without pools of one."""
        if training and len(rows) == 1 and key.total // world_size() < 2:
            raise ValueError(
                "correct pair prediction re-pairs the videos of a process, of which there must be 2 or more in a "
                "batch; there is 1 (a larger batch, or cpp=False)"
            )
        found: dict[int, int] = {}
        wanted = set(rows)
        for first, pool in self._pools(key).items():
            members = [row for row in pool if row in wanted]
            if len(members) > 1:
                order = derangement(len(members), key.generator("derangement", first))
                found |= {row: members[i] for row, i in zip(members, order, strict=True)}
        return dict(sorted(found.items()))


def derangement(count: int, generator: np.random.Generator) -> list[int]:
    """One of the permutations of ``count`` >= 2 that leave nothing in its place, all equally likely.

    Permutations are drawn until one does so: e = 2.7 on average.
    """
    import numpy as np

    if count < 2:
        raise ValueError(f"{count} cannot be deranged")
    while True:
        order = generator.permutation(count)
        if not (order == np.arange(count)).any():
            return order.tolist()


def _given_partners(partner: Sequence[int], rows: Sequence[int], batch_size: int) -> dict[int, int]:
    partner = [int(p) for p in partner]
    if len(partner) != batch_size:
        raise ValueError(f"partner must name one video for each of {batch_size}, got {len(partner)}")
    found = {row: other for row, other in enumerate(partner) if row != other}
    if not sorted(found) == sorted(found.values()) or not {*found} <= {*rows}:
        raise ValueError(f"partner must exchange videos that have both modalities, each once, got {partner}")
    return found


def _ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")
