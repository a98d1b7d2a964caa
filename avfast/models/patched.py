"""What models of audio and visual patches share: inputs, kept patches, the reconstruction loss, its figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from avfast.masking import Kept, Structure, keep_patches
from avfast.models.contract import Draws, Features, Reconstruction
from avfast.nn import PatchEmbed, patchify, unpatchify
from avfast.nn.patches import Positions, table
from avfast.ops import AttentionPlan, masked_patch_mse
from avfast.ops.masked_patch_mse import normalise_patches
from avfast.packing import PackedTokens
from avfast.random import DrawKey
from avfast.tensors import exporting, tensor_cache, untraced

if TYPE_CHECKING:
    import numpy as np

Keep = Kept | Tensor | Sequence[Tensor]
"""Kept patch ids: ``(B, K)``, one 1-D int64 tensor per instance, or :class:`~avfast.masking.Kept`."""
Images = Mapping[str, Tensor]
"""By modality what is cut into patches: ``audio`` ``(B, 1, mels, frames)``, ``visual`` ``(B, 3, H, W)``."""


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform linear and patch projections, zero biases (He et al., Masked Autoencoders, released code)."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def equal_plan(device: torch.device, *runs: tuple[int, int], context: int = 0) -> AttentionPlan:
    """The plan of runs of equal sequences, (count, length) each, with ``context`` keys before a sequence's own; in an
    exported program for any counts.
    """
    if exporting():
        return AttentionPlan.from_runs(runs, context, device)
    lengths = tuple(n for count, n in runs for _ in range(count))
    return shared_plan(lengths, device, tuple(context + n for n in lengths) if context else None)


@tensor_cache
def shared_plan(
    lengths: tuple[int, ...], device: torch.device, lengths_k: tuple[int, ...] | None = None
) -> AttentionPlan:
    """A plan per lengths and device: multi-ratio masking asks for the same few at every step."""
    return AttentionPlan.from_lengths(lengths, lengths_k, device)


def longest_first(audio: np.ndarray, visual: np.ndarray) -> np.ndarray:
    """Batch rows by falling number of audio, then of visual tokens, equal ones as in the batch."""
    import numpy as np

    return np.lexsort((-visual, -audio))


# Inputs.


def images(audio: Tensor | None, visual: Tensor | None, audio_size: tuple[int, int], size: int) -> dict[str, Tensor]:
    """Both inputs checked and as images, an absent one as zeros.

    Args:
        audio: ``(B, frames, mels)`` or None.
        visual: ``(B, 3, size, size)`` or None.
        audio_size: (frames, mels).
        size: height and width of a frame.
    """
    given = audio if audio is not None else visual
    if given is None:
        raise ValueError("give audio, visual or both")
    for name, x in (("audio", audio), ("visual", visual)):
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}; model.frontend.{name} makes it so")
    batch = given.shape[0]
    if visual is not None and visual.shape[0] != batch:
        raise ValueError(f"audio and visual must pair up, got batches of {batch} and {visual.shape[0]}")
    if audio is None:
        audio = given.new_zeros(batch, *audio_size)
    if visual is None:
        visual = given.new_zeros(batch, 3, size, size)
    if audio.ndim != 3 or tuple(audio.shape[1:]) != audio_size:
        fits = f"; a model built or loaded with audio_size={tuple(audio.shape[1:])} takes it" if audio.ndim == 3 else ""
        raise ValueError(f"audio must be (B, {audio_size[0]}, {audio_size[1]}), got {tuple(audio.shape)}{fits}")
    if visual.ndim != 4 or tuple(visual.shape[1:]) != (3, size, size):
        hint = "; channels come first: visual.permute(0, 3, 1, 2)" if visual.shape[-1] == 3 else ""
        if visual.ndim == 4 and visual.shape[1] == 3 and visual.shape[2] == visual.shape[3]:
            hint = f"; a model built or loaded with img_size={visual.shape[3]} takes it"
        raise ValueError(f"visual must be (B, 3, {size}, {size}), got {tuple(visual.shape)}{hint}")
    return {"audio": audio.transpose(1, 2).unsqueeze(1), "visual": visual}


def embed_kept(embed: PatchEmbed, positions: Positions, x: Tensor, kept: Kept) -> Tensor:
    """Tokens ``(T, D)`` of the kept patches of an input, with their positions; the others are not embedded."""
    if kept.whole:
        return (embed(x).unflatten(0, (-1, embed.num_patches)) + table(positions)).flatten(0, 1)
    return embed(x, kept.flat(embed.num_patches)) + table(positions)[0][kept.ids]


# Draws.


@dataclass(frozen=True, eq=False)
class KeptDraws(Draws):
    """Which patches of each pair are kept; a model's own record says how it packs their tokens.

    Args:
        audio_keep: kept audio patches.
        visual_keep: kept visual patches.
        counts: all audio and all visual patches, Na and Nv.
        instances: ``(B,)`` batch rows in the order of packing, longest audio first.
        present_audio: ``(B,)`` 1 where an instance has audio; None for all.
        present_visual: likewise.
        equal: all instances keep the same number of audio and the same number of visual patches.
        plans: attention plans of the lengths, by name, once on a device.
    """

    audio_keep: Kept
    visual_keep: Kept
    counts: tuple[int, int]
    instances: Tensor
    present_audio: Tensor | None
    present_visual: Tensor | None
    equal: bool
    plans: dict[str, AttentionPlan] | None = field(default=None, compare=False, kw_only=True)

    def sides(self) -> tuple[tuple[str, Kept, int, Tensor | None], ...]:
        """Of each modality its name, kept patches, number of all patches, and which instances have it."""
        (count_a, count_v), has_a, has_v = self.counts, self.present_audio, self.present_visual
        return ("audio", self.audio_keep, count_a, has_a), ("visual", self.visual_keep, count_v, has_v)

    def batch_order(self, x: Tensor) -> Tensor:
        """``(B, ...)`` in the order of packing, sorted by batch row; all equal, they are."""
        return x if self.equal else x[self.instances.argsort()]


D = TypeVar("D", bound=KeptDraws)
D_co = TypeVar("D_co", bound=KeptDraws, covariant=True)


class Patched(Protocol[D_co]):
    """What the functions here ask of a model."""

    @property
    def passes(self) -> tuple[str, ...]:
        """The forward passes of a step."""

    @property
    def parts(self) -> dict[str, PatchEmbed]:
        """The patch embeddings by modality."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""

    def draw(self, batch_size: int, generator: torch.Generator | None = None, **given: Any) -> D_co:
        """Every random choice of a pass, see :func:`draw`."""

    def packed(self, only: str, audio: Kept, visual: Kept, *present: Sequence[bool]) -> D_co:
        """The draws of kept patches; per instance whether it has audio and visual, default all."""

    def whole(self, audio: Kept, visual: Kept) -> D_co:
        """The draws, with plans, of :meth:`Kept.all` of both; they ask the host for nothing."""


def draw(
    model: Patched[D],
    batch_size: int,
    generator: torch.Generator | None = None,
    *,
    ratios: Callable[[DrawKey, str], Sequence[tuple[float, float]]],
    structure: Callable[[str], Structure] = lambda only: "unstructured",
    key: DrawKey | None = None,
    only: str | None = None,
    audio_keep: Keep | None = None,
    visual_keep: Keep | None = None,
    has_audio: Iterable[bool] | None = None,
    has_visual: Iterable[bool] | None = None,
) -> D:
    """Every random choice of a pass; what is given is not drawn.

    Args:
        model: whose draws.
        batch_size: instances on this process.
        generator: seeds a stand-alone draw; default torch's global generator.
        ratios: by key and pass, the (audio, visual) share of masked patches of each instance.
        structure: by pass, which audio patches are masked together.
        key: names the draw instead (training), see :class:`~avfast.random.DrawKey`.
        only: one of the model's ``passes``, default the first.
        audio_keep: kept audio patch ids: ``(B, K)``, one 1-D int64 tensor per instance, or
            :class:`~avfast.masking.Kept`.
        visual_keep: likewise.
        has_audio: per instance, whether it has audio, default all. Else no patch is kept and no loss counts it.
        has_visual: likewise.

    Returns:
        Draws on the CPU; the same key or generator state gives the same.
    """
    if only is not None and only not in model.passes:
        raise ValueError(f"only must be one of {', '.join(model.passes)}, got {only!r}")
    if key is not None and len(key.positions) != batch_size:
        raise ValueError(f"the key names {len(key.positions)} positions for a batch of {batch_size}")
    only, key = only or model.passes[0], DrawKey.fresh(batch_size, generator) if key is None else key
    present = [(True,) * batch_size if has is None else tuple(bool(x) for x in has) for has in (has_audio, has_visual)]
    kept, shares = [], ratios(key, only)
    for i, (name, keep) in enumerate((("audio", audio_keep), ("visual", visual_keep))):
        part = model.parts[name]
        if keep is None:
            shape = structure(only) if name == "audio" else "unstructured"
            masked = [pair[i] for pair in shares]
            kept.append(keep_patches(part.grid_size, masked, key, f"{only} {name}", shape, present[i]))
        else:
            kept.append(as_kept(name, keep, part.num_patches, batch_size, present[i]))
    return model.packed(only, *kept, *present)


def as_kept(name: str, keep: Keep, num_patches: int, batch_size: int, present: Sequence[bool]) -> Kept:
    """Given kept patches of a modality; none of instances that lack it, whose stand-ins must reach nothing.

    Raises:
        ValueError: for another number of instances, or for ids on the CPU that are ``num_patches`` or more.
    """
    kept = keep if isinstance(keep, Kept) else Kept.pack(keep)
    if len(kept) != batch_size:
        raise ValueError(f"{name}_keep holds {len(kept)} instances, the batch {batch_size}")
    if kept is not keep and kept.ids.device.type == "cpu" and len(kept.ids) and kept.ids.max() >= num_patches:
        raise ValueError(f"ids of kept patches lie in 0 .. {num_patches - 1}, got {int(kept.ids.max())}")
    if any(n and not has for n, has in zip(kept.batch_lengths(), present, strict=True)):
        return Kept.pack([ids if has else ids[:0] for ids, has in zip(kept.to_list(), present, strict=True)])
    return kept


@untraced
def undrawn(
    model: Patched[D],
    batch_size: int,
    audio: Tensor | None,
    visual: Tensor | None,
    audio_keep: Keep | None = None,
    visual_keep: Keep | None = None,
) -> D:
    """Draws that keep what is given, default all patches of the inputs, on the inputs' device."""
    given = visual if audio is None else audio
    device = model.device if given is None else given.device
    sides, kept = (("audio", audio, audio_keep), ("visual", visual, visual_keep)), []
    whole = all(x is None or keep is None for _, x, keep in sides)
    for name, x, keep in sides:
        count = model.parts[name].num_patches
        if x is None or keep is None:
            kept.append(Kept.all(batch_size, 0 if x is None else count, device if whole else "cpu"))
        else:
            kept.append(as_kept(name, keep, count, batch_size, (True,) * batch_size))
    return model.whole(*kept) if whole else model.packed("joint", *kept).to(device)


def placed(model: Patched[D], draws: D | None, batch_size: int, given: tuple[bool, bool]) -> D:
    """Draws for a batch of which audio and visual are given or not, with plans on the model's device; None are drawn.

    Raises:
        ValueError: for draws of another batch, or that keep patches of a modality which is not given.
    """
    if draws is None or draws.plans is None or draws.instances.device != model.device:
        return _place(model, draws, batch_size, given)
    return _checked(draws, batch_size, given)


@untraced
def _place(model: Patched[D], draws: D | None, batch_size: int, given: tuple[bool, bool]) -> D:
    if draws is None:
        has_a, has_v = (None if has else (False,) * batch_size for has in given)
        draws = model.draw(batch_size, has_audio=has_a, has_visual=has_v)
    return _checked(draws, batch_size, given).to(model.device)


def _checked(draws: D, batch_size: int, given: tuple[bool, bool]) -> D:
    if (instances := draws.instances.shape[0]) != batch_size:
        raise ValueError(f"draws are of {instances} instances, the batch has {batch_size}")
    for has, (name, kept, *_) in zip(given, draws.sides(), strict=True):
        if not has and kept.ids.shape[0]:
            raise ValueError(f"the draws keep patches of {name}, which is not given; draw with has_{name}=[False] * B")
    return draws


def present_index(present: Sequence[bool], device: torch.device) -> Tensor | None:
    """``(B,)`` 1 where an instance has a modality; None where all have it."""
    return None if all(present) else torch.tensor(present, dtype=torch.int64, device=device)


def dense_or_packed(
    values: Tensor, lengths: tuple[int, ...], order: tuple[int, ...], equal: bool, batch: int
) -> Tensor | PackedTokens:
    """Packed tokens ``(T, D)``, their sequences sorted back by batch row; ``(B, N, D)`` where they are equally long.

    Args:
        values: the tokens.
        lengths: of the sequences.
        order: batch row of each.
        equal: all sequences are of one length and in the order of the batch. Nothing of the host is read then, so that
            one compiled encoder serves all.
        batch: how many there are.
    """
    if equal:
        return values.unflatten(0, (batch, -1))
    tokens = PackedTokens(values, lengths).select(sorted(range(len(order)), key=lambda i: order[i]))
    if len(set(tokens.lengths)) == 1:
        return tokens.values.unflatten(0, (len(tokens), tokens.lengths[0]))
    return tokens


def features(
    a: Tensor, v: Tensor, fused: Tensor | PackedTokens | None, draws: KeptDraws, given_a: bool, given_v: bool
) -> Features:
    """Packed tokens of both modalities in batch order, those of one that was not given as None."""
    batch = draws.instances.shape[0]
    audio, visual = (
        dense_or_packed(x, kept.lengths, kept.permutation, draws.equal, batch) if given else None
        for x, kept, given in ((a, draws.audio_keep, given_a), (v, draws.visual_keep, given_v))
    )
    return Features(audio, visual, fused)


# Reconstruction.


def reconstruction_losses(
    predicted: Mapping[str, Tensor],
    entries: Mapping[str, Tensor],
    inputs: Images,
    parts: Mapping[str, PatchEmbed],
    draws: KeptDraws,
    norm_pix: Mapping[str, bool],
) -> dict[str, Tensor]:
    """The terms ``reconstruction_audio`` and ``reconstruction_visual`` over the patches that were not kept.

    Args:
        predicted: patches ``(B, N, P)`` by modality, or ``(M, P)`` of the patches ``entries``.
        entries: by modality, ``(M,)`` entries of the flattened (B, N) patches; empty where all are predicted.
        inputs: images.
        parts: patch embeddings.
        draws: which patches were kept.
        norm_pix: whether the target patches are normalised.
    """
    losses = {}
    for name, kept, _, present in draws.sides():
        part = parts[name]
        counted = kept.masked(part.num_patches)
        if present is not None:
            counted = counted & present.bool()[:, None]
        patches = torch.arange(counted.numel() if entries else part.num_patches, device=counted.device)
        if entries:
            counted, patches = counted.flatten()[entries[name]], patches[entries[name]]
        ids = torch.where(counted, patches, -1)
        losses[f"reconstruction_{name}"] = masked_patch_mse(
            predicted[name], inputs[name], ids, patch=part.patch_size, norm_pix=norm_pix[name]
        )
    return losses


@torch.no_grad()
def reconstruction_figure(
    predicted: Mapping[str, Tensor],
    inputs: Images,
    parts: Mapping[str, PatchEmbed],
    draws: KeptDraws,
    norm_pix: Mapping[str, bool],
) -> Reconstruction | None:
    """What was kept and predicted as inputs; None where nothing was predicted. Arguments as above.

    Normalised predictions are shown with the true patches' means and deviations.
    """
    if not predicted:
        return None
    shown: dict[str, dict[str, Tensor]] = {}
    hidden: dict[str, Tensor] = {}
    for name, kept, *_ in draws.sides():
        part, image, guess = parts[name], inputs[name], predicted[name].to(inputs[name].dtype)
        patches = patchify(image, part.patch_size)
        masked = kept.masked(part.num_patches)[..., None]
        if norm_pix[name]:
            _, mean, deviation = normalise_patches(patches)
            guess = guess * deviation + mean
        seen = (patches.masked_fill(masked, torch.nan), patches.where(~masked, guess))
        rows = [image, *(unpatchify(x, part.grid_size, part.patch_size) for x in seen)]
        rows = [(x.squeeze(1).transpose(1, 2) if name == "audio" else x).float().cpu() for x in rows]
        shown[name] = dict(zip(("input", "masked", "reconstruction"), rows, strict=True))
        hidden[name] = masked.float().mean((1, 2)).cpu()
    return Reconstruction(shown["audio"], shown["visual"], hidden)
