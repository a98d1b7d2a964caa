"""Which layers of a DeepAVFusion have a fusion block, and how the tokens of a step are packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from avfast.masking import Kept
from avfast.models.draws import Layout, longest_first
from avfast.nn.fusion import TokenLayout
from avfast.packing import other_rows
from avfast.tensors import tensor_cache


def fused_layers(layers: str | int | Sequence[int], depth: int) -> tuple[int, ...]:
    """Indices of the layers with a fusion block: ``"all"``, ``"none"``, the last k of them, or the given ones."""
    if layers == "all":
        return tuple(range(depth))
    if layers == "none":
        return ()
    if isinstance(layers, int) and not isinstance(layers, bool) and 0 <= layers <= depth:
        return tuple(range(depth - layers, depth))
    if isinstance(layers, Sequence) and not isinstance(layers, str):
        chosen = tuple(sorted(set(layers)))
        if len(chosen) == len(layers) and all(isinstance(i, int) and 0 <= i < depth for i in chosen):
            return chosen
    raise ValueError(
        f'fusion_layers must be "all", "none", how many of the last layers (0 to {depth}), or distinct layer indices '
        f"below {depth}, got {layers!r}"
    )


@tensor_cache
def shared_tokens(lengths: tuple[int, ...], context: int, device: torch.device) -> TokenLayout:
    """A layout per lengths and device: every step asks for the same."""
    return TokenLayout.of(lengths, context, device)


@dataclass(frozen=True, eq=False)
class FusionLayout(Layout):
    """The packing of a step in which both modalities have the same order of instances.

    Args:
        context: fusion tokens.
        tokens_audio: packing of the kept audio tokens, once on a device.
        tokens_visual: likewise.
    """

    context: int = 0
    tokens_audio: TokenLayout | None = None
    tokens_visual: TokenLayout | None = None

    def plan_lengths(self) -> dict[str, tuple[int, ...]]:
        """Of the decoders, ``"audio"`` and ``"visual"``: fusion tokens and all patches."""
        counts = zip(("audio", "visual"), self.counts, strict=True)
        return {name: (self.context + count,) * len(self.audio) for name, count in counts}

    def read_lengths(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Of the last blocks of the decoders, ``"read_audio"`` and ``"read_visual"``."""
        sides = (("read_audio", self.audio, self.counts[0]), ("read_visual", self.visual, self.counts[1]))
        return {
            name: (tuple(count - n for n in kept.lengths), (self.context + count,) * len(kept))
            for name, kept, count in sides
        }

    def masked_of(self, places: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The patches of one modality that were not kept.

        Args:
            places: of those that were among the patches of all instances, see :meth:`Kept.packed_flat`.
            count: patches of an instance.

        Returns:
            Their rows ``(M,)`` among the fusion tokens and patches of all instances in that order, and which entries of
            the flattened ``(B, count)`` patches in batch order they are.
        """
        rows = other_rows(places, self.instances.shape[0] * count)
        place = rows // count
        return rows + (place + 1) * self.context, self.instances[place] * count + rows % count

    def to(self, device: torch.device | str) -> FusionLayout:
        """On a device, with plans there."""
        moved, device = cast(FusionLayout, super().to(device)), torch.device(device)
        return replace(
            moved,
            tokens_audio=shared_tokens(self.audio.lengths, self.context, device),
            tokens_visual=shared_tokens(self.visual.lengths, self.context, device),
        )


def of_present(kept: Kept, present: Sequence[bool] | None) -> Kept:
    """The kept patches of instances that have the modality: stand-ins for others must not reach the fusion tokens."""
    if present is None or not any(n and not has for n, has in zip(kept.batch_lengths(), present, strict=True)):
        return kept
    return Kept.pack([ids if has else ids[:0] for ids, has in zip(kept.to_list(), present, strict=True)])


def align(audio: Kept, visual: Kept) -> tuple[Kept, Kept]:
    """The same patches packed in one order of instances for both modalities, longest audio first, else as in the batch.

    Raises:
        ValueError: where they are of batches that differ in size.
    """
    import numpy as np

    if len(audio) != len(visual):
        raise ValueError(f"audio_keep holds {len(audio)} instances, visual_keep {len(visual)}")
    order = longest_first(*(np.array(kept.batch_lengths()) for kept in (audio, visual))).tolist()
    return audio.reordered(order), visual.reordered(order)
