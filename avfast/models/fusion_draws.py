"""Which layers of a DeepAVFusion have a fusion block, how the tokens of a step are packed, and where fusion looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from avfast.masking import Kept
from avfast.models.contract import AttentionMaps
from avfast.models.patched import KeptDraws, equal_plan, longest_first, present_index, shared_plan
from avfast.nn import PatchEmbed
from avfast.nn.fusion import TokenLayout
from avfast.packing import other_rows
from avfast.tensors import tensor_cache

FIGURE_LEGEND = (
    "r, p: the weight that the fusion tokens give each patch of the frame (r) and of the spectrogram (p), averaged "
    "over heads and fusion tokens; before that, the weight of a pair is p times r"
)


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
class FusionDraws(KeptDraws):
    """How the tokens of each pair are packed: both modalities in one order of instances.

    Args:
        context: fusion tokens.
        tokens: by modality, packing of the kept tokens, once on a device.
        plans: once on a device, of the decoders (``"audio"``, ``"visual"``: fusion tokens and all patches), and of the
            masked patches as queries of these (``"read_audio"``, ``"read_visual"``), where there are any.
    """

    context: int
    tokens: dict[str, TokenLayout] | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls,
        only: str,
        audio: Kept,
        visual: Kept,
        counts: tuple[int, int],
        context: int,
        has_audio: Sequence[bool] = (),
        has_visual: Sequence[bool] = (),
    ) -> FusionDraws:
        """From kept patches, on their device; per instance whether it has a modality, default all."""
        import numpy as np

        order = longest_first(*(np.array(kept.batch_lengths()) for kept in (audio, visual))).tolist()
        audio, visual, device = audio.reordered(order), visual.reordered(order), audio.ids.device
        return cls(
            only, audio, visual, counts, torch.tensor(order, dtype=torch.int64, device=device),
            present_index(has_audio, device), present_index(has_visual, device),
            len({*audio.lengths}) == len({*visual.lengths}) == 1, context,
        )  # fmt: skip

    @classmethod
    def whole(cls, audio: Kept, visual: Kept, counts: tuple[int, int], context: int) -> FusionDraws:
        """From all patches of a modality or none, with plans: the same as from kept ones, without the host's part."""
        rows, device = audio.inverse, audio.ids.device
        batch, tokens, plans = rows.shape[0], {}, {}
        for name, kept, count in (("audio", audio, counts[0]), ("visual", visual, counts[1])):
            run = (batch, kept.whole or 0)
            with_context = equal_plan(device, run, context=context)
            tokens[name] = TokenLayout(batch, (run,), None, equal_plan(device, run), with_context)
            plans[name] = equal_plan(device, (batch, context + count))
        return cls("joint", audio, visual, counts, rows, None, None, True, context, tokens, plans=plans)

    def to(self, device: torch.device | str) -> FusionDraws:
        """On a device, with plans there."""
        device, tokens, plans = torch.device(device), {}, {}
        for name, kept, count, _ in self.sides():
            tokens[name] = shared_tokens(kept.lengths, self.context, device)
            whole = (self.context + count,) * len(kept)
            plans[name] = shared_plan(whole, device)
            if any(masked := tuple(count - n for n in kept.lengths)):
                plans[f"read_{name}"] = shared_plan(masked, device, whole)
        return replace(super().to(device), tokens=tokens, plans=plans)

    def masked(self, scatter_index: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The patches of one modality that were not kept.

        Args:
            scatter_index: of those that were among the patches of all instances, see :meth:`Kept.packed_flat`.
            count: patches of an instance.

        Returns:
            Their rows ``(M,)`` among the fusion tokens and patches of all instances in that order, and which entries of
            the flattened ``(B, count)`` patches in batch order they are.
        """
        rows = other_rows(scatter_index, self.instances.shape[0] * count)
        place = rows // count
        return rows + (place + 1) * self.context, self.instances[place] * count + rows % count


def attention_maps(
    weights: Mapping[int, tuple[Tensor, Tensor]], parts: Mapping[str, PatchEmbed], audio: Tensor, visual: Tensor
) -> AttentionMaps:
    """The weights of the first, the middle and the last fusion layer, averaged over heads and fusion tokens."""
    layers = list(weights)
    chosen = dict.fromkeys((layers[0], layers[len(layers) // 2], layers[-1]))
    p, r = (
        {i: weights[i][side].float().mean((1, 2)).unflatten(1, parts[name].grid_size).cpu() for i in chosen}
        for side, name in enumerate(("audio", "visual"))
    )
    return AttentionMaps(audio.float().cpu(), visual.float().cpu(), p, r, FIGURE_LEGEND)
