"""The random choices of a step, and how its tokens are packed: all that a forward pass would otherwise ask the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from avfast.masking import Kept, spans
from avfast.ops import AttentionPlan
from avfast.packing import other_rows, permute_rows
from avfast.tensors import tensor_cache, to_device

if TYPE_CHECKING:
    import numpy as np

Keep = Kept | Tensor | Sequence[Tensor]


@tensor_cache
def shared_plan(
    lengths: tuple[int, ...], device: torch.device, lengths_k: tuple[int, ...] | None = None
) -> AttentionPlan:
    """A plan per lengths and device: multi-ratio masking asks for the same few at every step."""
    return AttentionPlan.from_lengths(lengths, lengths_k, device)


def as_kept(keep: Keep, num_patches: int | None = None) -> Kept:
    """Pack lists of ids; pass :class:`~avfast.masking.Kept` through.

    Raises:
        ValueError: for ids on the CPU that are ``num_patches`` or more.
    """
    if isinstance(keep, Kept):
        return keep
    kept = Kept.pack(keep)
    if num_patches is not None and kept.ids.device.type == "cpu" and len(kept.ids) and kept.ids.max() >= num_patches:
        raise ValueError(f"ids of kept patches lie in 0 .. {num_patches - 1}, got {int(kept.ids.max())}")
    return kept


def longest_first(audio: np.ndarray, visual: np.ndarray) -> np.ndarray:
    """Batch rows by falling number of audio, then of visual tokens, equal ones as in the batch."""
    import numpy as np

    return np.lexsort((-visual, -audio))


@dataclass(frozen=True, eq=False)
class Layout:
    """How the tokens of a step are packed.

    Tuples and plans depend on lengths alone, so multi-ratio masking gives the same at every step, and one compiled or
    captured step serves all. What differs is in ``index``, which the tensors here and in ``audio`` and ``visual`` view.

    Args:
        audio: kept audio patches.
        visual: kept visual patches.
        rows: batch row of each joined sequence [audio_i; visual_i], on the host; longest audio first.
        lengths: tokens of each joined sequence.
        counts: all audio and all visual patches, Na and Nv.
        order: ``(T,)`` row of [all audio; all visual] tokens for each row of the joined sequences.
        back: ``(T,)`` the inverse.
        places: ``(T,)`` entry of the flattened (B, Na + Nv) patches, instances in the order of the joined sequences,
            for each row of these.
        instances: ``(B,)`` the batch rows ``rows``.
        pairs: batch rows that have both modalities; None for all.
        present_audio: ``(B,)`` 1 where an instance has audio; None for all.
        present_visual: likewise.
        equal: all instances keep the same number of audio and the same number of visual patches.
        index: the int64 tensor that holds all others.
        plans: of the lengths audio + visual (``"both"``), ``"audio"``, ``"visual"``, joined (``"joined"``), of all
            patches joined (``"dense"``), and of the masked ones as queries of all (``"read"``), where there are any.
    """

    audio: Kept
    visual: Kept
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    counts: tuple[int, int]
    order: Tensor
    back: Tensor
    places: Tensor
    instances: Tensor
    pairs: Tensor | None
    present_audio: Tensor | None
    present_visual: Tensor | None
    equal: bool
    index: Tensor | None = None
    plans: dict[str, AttentionPlan] | None = None

    @classmethod
    def of(
        cls,
        audio: Kept,
        visual: Kept,
        patches: tuple[int, int],
        presence: tuple[Sequence[bool] | None, Sequence[bool] | None] = (None, None),
    ) -> Layout:
        """On the device of the kept ids, without plans.

        Args:
            audio: kept audio patches.
            visual: kept visual patches, of as many instances.
            patches: how many there are of audio and of visual ones.
            presence: per instance, whether it has audio, and whether it has visual; None for all.
        """
        import numpy as np

        lengths = [np.array(kept.batch_lengths(), dtype=np.int64) for kept in (audio, visual)]
        rows = longest_first(*lengths)
        joined = np.stack([n[rows] for n in lengths], 1).ravel()
        starts = np.stack([audio.starts()[rows], visual.starts()[rows] + sum(audio.lengths)], 1).ravel()
        sources = spans(starts, joined)
        inverse = np.empty_like(sources)
        inverse[sources] = np.arange(len(sources))
        order, back, rank, instances = (
            torch.tensor(x, device=audio.ids.device) for x in (sources, inverse, rows.argsort(), rows)
        )
        total = sum(patches)
        places = [rank[audio.rows] * total + audio.ids, rank[visual.rows] * total + patches[0] + visual.ids]
        pairs = ((lengths[0] > 0) & (lengths[1] > 0)).nonzero()[0].tolist()
        optional = (
            pairs if len(pairs) < len(audio) else None,
            *(None if all(has or ()) else has for has in presence),
        )
        rare = [None if x is None else torch.tensor(x, dtype=torch.int64, device=order.device) for x in optional]
        return cls(
            audio, visual, tuple(rows.tolist()), tuple(joined.reshape(-1, 2).sum(1).tolist()), patches,
            order, back, torch.cat(places)[order], instances, rare[0], rare[1], rare[2],
            equal=len({*audio.lengths}) == len({*visual.lengths}) == 1,
        )  # fmt: skip

    @property
    def signature(self) -> tuple:
        """What a captured step depends on beside the values of ``index``."""
        optional = (self.pairs, self.present_audio, self.present_visual)
        return self.audio.lengths, self.visual.lengths, self.lengths, *(None if x is None else len(x) for x in optional)

    def plan_lengths(self) -> dict[str, tuple[int, ...]]:
        """The sequence lengths of each of ``plans``."""
        return {
            "both": self.audio.lengths + self.visual.lengths,
            "audio": self.audio.lengths,
            "visual": self.visual.lengths,
            "joined": self.lengths,
            "dense": (sum(self.counts),) * len(self.audio),
        }

    def read_lengths(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """The queries and keys of each of ``plans`` for a last block that computes masked patches alone."""
        total = sum(self.counts)
        return {"read": (tuple(total - n for n in self.lengths), (total,) * len(self.lengths))}

    def masked(self) -> tuple[Tensor, tuple[Tensor, Tensor], dict[str, Tensor]]:
        """The patches that were not kept, with shapes that no length of the host decides.

        Returns:
            Their rows ``(M,)`` in the flattened (B, Na + Nv) patches, instances in the order of the joined sequences;
            which of these rows are audio and which are visual; by modality, the patches they are: entries of the
            flattened (B, N) ones in batch order.
        """
        (count_a, count_v), batch = self.counts, self.instances.shape[0]
        rows = other_rows(self.places, batch * (count_a + count_v))
        patch, instance = rows % (count_a + count_v), self.instances[rows // (count_a + count_v)]
        sorted_rows = (patch >= count_a).to(torch.int8).argsort(stable=True)
        masked_a = batch * count_a - self.audio.ids.shape[0]
        a, v = sorted_rows[:masked_a], sorted_rows[masked_a:]
        entries = (instance * count_a + patch)[a], (instance * count_v + patch - count_a)[v]
        return rows, (a, v), {"audio": entries[0], "visual": entries[1]}

    def batch_order(self, x: Tensor) -> Tensor:
        """``(B, ...)`` in the order of the joined sequences, sorted by batch row; all equal, they are."""
        return x if self.equal else x[self.instances.argsort()]

    def to(self, device: torch.device | str) -> Layout:
        """On a device, with plans there; one copy for all index tensors."""
        device = torch.device(device)
        a, v = self.audio, self.visual
        parts = (
            a.ids, a.rows, a.inverse, v.ids, v.rows, v.inverse, self.order, self.back, self.places,
            self.instances, self.pairs, self.present_audio, self.present_visual,
        )  # fmt: skip
        given = [x for x in parts if x is not None]
        index = to_device(torch.cat(given), device)
        views = iter(index.split([len(x) for x in given]))
        moved = [None if x is None else next(views) for x in parts]
        return replace(
            self,
            audio=Kept(moved[0], moved[1], moved[2], a.lengths, a.order),
            visual=Kept(moved[3], moved[4], moved[5], v.lengths, v.order),
            **dict(
                zip(
                    ("order", "back", "places", "instances", "pairs", "present_audio", "present_visual"),
                    moved[6:],
                    strict=True,
                )
            ),
            index=index,
            plans={
                **{name: shared_plan(n, device) for name, n in self.plan_lengths().items()},
                **{name: shared_plan(q, device, k) for name, (q, k) in self.read_lengths().items() if any(q)},
            },
        )

    def join(self, audio: Tensor, visual: Tensor) -> Tensor:
        """``(T, D)`` rows of the joined sequences, from the packed tokens of each modality."""
        return permute_rows(torch.cat([audio, visual]), self.order, self.back)


@dataclass(frozen=True)
class Draws:
    """The random choices of one forward pass; what is None is drawn.

    Args:
        audio_keep: kept audio patch ids: ``(B, K)``, one 1-D int64 tensor per instance, or
            :class:`~avfast.masking.Kept`.
        visual_keep: likewise.
        branch: which of the model's ``branches`` to compute.
        has_audio: per instance, whether it has this modality. Without it no patch is kept and no loss counts it.
        has_visual: likewise.

    ``layout`` says how the tokens are packed; the model makes it, and a changed copy (``replace``) has none.
    """

    audio_keep: Keep | None = None
    visual_keep: Keep | None = None
    branch: str | None = None
    has_audio: tuple[bool, ...] | None = None
    has_visual: tuple[bool, ...] | None = None
    layout: Layout | None = field(default=None, init=False)

    def with_layout(self, layout: Layout) -> Draws:
        """The same draws packed that way."""
        draws = replace(self, audio_keep=layout.audio, visual_keep=layout.visual)
        object.__setattr__(draws, "layout", layout)
        return draws

    def to(self, device: torch.device | str) -> Draws:
        """With packed ids on another device."""
        if self.layout is not None:
            return self.with_layout(self.layout.to(device))
        return replace(
            self,
            audio_keep=None if self.audio_keep is None else as_kept(self.audio_keep).to(device),
            visual_keep=None if self.visual_keep is None else as_kept(self.visual_keep).to(device),
        )
