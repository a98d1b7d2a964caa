"""What AVSiam and CAV-MAE share: the means of a masked pair are contrasted, and both sides reconstructed together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from avfast.hub import HubMixin
from avfast.masking import STRUCTURES, Kept, Structure, assign_ratios, check_ratio, spans
from avfast.models import patched
from avfast.models.contract import Features, Figures, Output
from avfast.models.patched import Keep, KeptDraws, equal_plan, shared_plan
from avfast.nn import JointDecoder, PackedBlock, PatchEmbed, run_blocks
from avfast.nn.block import Read
from avfast.ops import AttentionPlan, info_nce
from avfast.ops.info_nce import InfoNCE
from avfast.packing import other_rows, permute_rows
from avfast.random import DrawKey
from avfast.tensors import exporting

if TYPE_CHECKING:
    from avfast.data.frontend import Frontend


@dataclass(frozen=True, eq=False)
class PairDraws(KeptDraws):
    """How the tokens of each pair are packed.

    Args:
        lengths: tokens of each joined sequence [audio_i; visual_i], longest audio first.
        batch_rows: batch row of each joined sequence, on the host.
        permutation: ``(T,)`` row of [all audio; all visual] tokens for each row of the joined sequences.
        inverse: ``(T,)`` the way back.
        scatter_index: ``(T,)`` entry of the flattened (B, Na + Nv) patches, instances in the order of the joined
            sequences, for each row of these.
        pairs: batch rows that have both modalities; None for all.
        plans: once on a device, of the lengths audio + visual (``"both"``), ``"audio"``, ``"visual"``, joined
            (``"joined"``), of all patches joined (``"dense"``), and of the masked ones as queries of all (``"read"``),
            where there are any.
    """

    lengths: tuple[int, ...]
    batch_rows: tuple[int, ...] = field(compare=False)
    permutation: Tensor
    inverse: Tensor
    scatter_index: Tensor
    pairs: Tensor | None

    @classmethod
    def of(
        cls,
        only: str,
        audio: Kept,
        visual: Kept,
        counts: tuple[int, int],
        has_audio: Sequence[bool] = (),
        has_visual: Sequence[bool] = (),
    ) -> PairDraws:
        """From kept patches, on their device; per instance whether it has a modality, default all."""
        import numpy as np

        lengths = [np.array(kept.batch_lengths(), dtype=np.int64) for kept in (audio, visual)]
        rows = patched.longest_first(*lengths)
        joined = np.stack([n[rows] for n in lengths], 1).ravel()
        starts = np.stack([audio.starts()[rows], visual.starts()[rows] + sum(audio.lengths)], 1).ravel()
        sources = spans(starts, joined)
        back = np.empty_like(sources)
        back[sources] = np.arange(len(sources))
        device = audio.ids.device
        permutation, inverse, rank, instances = (
            torch.tensor(x, device=device) for x in (sources, back, rows.argsort(), rows)
        )
        total = sum(counts)
        a, v = rank[audio.batch_rows] * total + audio.ids, rank[visual.batch_rows] * total + counts[0] + visual.ids
        pairs = ((lengths[0] > 0) & (lengths[1] > 0)).nonzero()[0]
        return cls(
            only, audio, visual, counts, instances,
            patched.present_index(has_audio, device), patched.present_index(has_visual, device),
            len({*audio.lengths}) == len({*visual.lengths}) == 1,
            tuple(joined.reshape(-1, 2).sum(1).tolist()), tuple(rows.tolist()), permutation, inverse,
            torch.cat([a, v])[permutation],
            torch.tensor(pairs, device=device) if len(pairs) < len(audio) else None,
        )  # fmt: skip

    @classmethod
    def whole(cls, audio: Kept, visual: Kept, counts: tuple[int, int]) -> PairDraws:
        """From all patches of a modality or none, with plans: the same as from kept ones, without the host's part."""
        rows, device, total = audio.inverse, audio.ids.device, sum(counts)
        batch, n_a, n_v = rows.shape[0], audio.whole or 0, visual.whole or 0
        a, v = torch.arange(n_a, device=device), torch.arange(n_v, device=device)

        def places(first: int, each: int, own: Tensor) -> Tensor:
            return first + rows[:, None] * each + own

        permutation = torch.cat([places(0, n_a, a), places(batch * n_a, n_v, v)], 1).flatten()
        inverse = torch.cat([places(0, n_a + n_v, x).flatten() for x in (a, n_a + v)])
        plans = {
            "both": equal_plan(device, (batch, n_a), (batch, n_v)),
            "audio": equal_plan(device, (batch, n_a)),
            "visual": equal_plan(device, (batch, n_v)),
            "joined": equal_plan(device, (batch, n_a + n_v)),
            "dense": equal_plan(device, (batch, total)),
        }
        return cls(
            "joint", audio, visual, counts, rows, None, None, True,
            () if exporting() else (n_a + n_v,) * batch, audio.permutation, permutation, inverse,
            places(0, total, torch.cat([a, counts[0] + v])).flatten(), None if n_a and n_v else rows[:0], plans=plans,
        )  # fmt: skip

    def to(self, device: torch.device | str) -> PairDraws:
        """On a device, with plans there."""
        device, total = torch.device(device), sum(self.counts)
        lengths = {
            "both": self.audio_keep.lengths + self.visual_keep.lengths,
            "audio": self.audio_keep.lengths,
            "visual": self.visual_keep.lengths,
            "joined": self.lengths,
            "dense": (total,) * len(self.lengths),
        }
        plans = {name: shared_plan(n, device) for name, n in lengths.items()}
        if any(masked := tuple(total - n for n in self.lengths)):
            plans["read"] = shared_plan(masked, device, lengths["dense"])
        return replace(super().to(device), plans=plans)

    def masked(self) -> tuple[Tensor, tuple[Tensor, Tensor], dict[str, Tensor]]:
        """The patches that were not kept, with shapes that no length of the host decides.

        Returns:
            Their rows ``(M,)`` in the flattened (B, Na + Nv) patches, instances in the order of the joined sequences;
            which of these rows are audio and which are visual; by modality, the patches they are: entries of the
            flattened (B, N) ones in batch order.
        """
        (count_a, count_v), batch = self.counts, self.instances.shape[0]
        rows = other_rows(self.scatter_index, batch * (count_a + count_v))
        patch, instance = rows % (count_a + count_v), self.instances[rows // (count_a + count_v)]
        sorted_rows = (patch >= count_a).to(torch.int8).argsort(stable=True)
        masked_a = batch * count_a - self.audio_keep.ids.shape[0]
        a, v = sorted_rows[:masked_a], sorted_rows[masked_a:]
        entries = (instance * count_a + patch)[a], (instance * count_v + patch - count_a)[v]
        return rows, (a, v), {"audio": entries[0], "visual": entries[1]}

    def join(self, audio: Tensor, visual: Tensor) -> Tensor:
        """``(T, D)`` rows of the joined sequences, from the packed tokens of each modality."""
        return permute_rows(torch.cat([audio, visual]), self.permutation, self.inverse)


class MaskedPair(nn.Module, HubMixin):
    """Base of the two models; a subclass provides :meth:`unimodal`, :meth:`contrasted` and :meth:`fuse`.

    Args:
        img_size: height and width of a frame.
        patch_size: of frames, and of spectrograms unless ``audio_patch_size`` is given.
        audio_size: (frames, mel bins).
        embed_dim: D.
        mask_ratios: one fixed ratio, or several for multi-ratio masking.
        audio_structure: ``"unstructured"``, ``"time"``, ``"frequency"`` or ``"time_frequency"``.
        temperature: of the contrastive loss.
        contrastive_weight: weight in the loss; 0 leaves the term out.
        reconstruction_weight: likewise, for the sum of both modalities.
        norm_pix: normalise target patches.
        frontend: overrides for the audio front end's arguments.
    """

    passes: tuple[str, ...] = ("joint",)
    contrastive_direction = "both"

    def __init__(
        self,
        *,
        img_size: int,
        patch_size: int,
        audio_patch_size: int | None,
        audio_size: tuple[int, int],
        embed_dim: int,
        mask_ratios: Sequence[float],
        audio_structure: Structure,
        temperature: float,
        contrastive_weight: float,
        reconstruction_weight: float,
        norm_pix: bool,
        frontend: dict | None,
    ) -> None:
        super().__init__()
        self.img_size, self.audio_size, self.embed_dim = img_size, tuple(audio_size), embed_dim
        self.mask_ratios = tuple(check_ratio(r) for r in mask_ratios)
        if not self.mask_ratios:
            raise ValueError("mask_ratios must hold at least one ratio")
        if audio_structure not in STRUCTURES:
            raise ValueError(f"audio_structure must be one of {', '.join(STRUCTURES)}, got {audio_structure!r}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature!r}")
        self.audio_structure = audio_structure
        self.temperature, self.norm_pix = temperature, norm_pix
        self.contrastive_weight, self.reconstruction_weight = contrastive_weight, reconstruction_weight
        frames, mels = self.audio_size
        self.patch_embed = PatchEmbed((img_size, img_size), patch_size, 3, embed_dim)
        self.patch_embed_a = PatchEmbed((mels, frames), audio_patch_size or patch_size, 1, embed_dim)
        self.decoder: JointDecoder | None = None
        self.grad_checkpointing = False
        self.frontend_args = {"num_frames": frames, "num_mel_bins": mels, "image_size": img_size, **(frontend or {})}

    # What a subclass defines.

    def unimodal(self, audio: Tensor, visual: Tensor, draws: PairDraws) -> tuple[Tensor, Tensor]:
        """Packed tokens ``(T, D)`` of the kept patches of each modality, before the modalities meet."""
        raise NotImplementedError

    def contrasted(self, audio: Tensor, visual: Tensor, draws: PairDraws) -> tuple[Tensor, Tensor]:
        """The packed tokens whose means are contrasted."""
        raise NotImplementedError

    def fuse(self, joined: Tensor, plan: AttentionPlan) -> Tensor:
        """Fused tokens ``(T, D)`` of sequences [audio; visual]."""
        raise NotImplementedError

    # Inputs and random draws.

    @cached_property
    def frontend(self) -> Frontend:
        """What turns waveforms and frames into this model's inputs."""
        from avfast.data.frontend import KaldiFrontend

        return KaldiFrontend(**self.frontend_args)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.patch_embed.proj.weight.device

    @property
    def parts(self) -> dict[str, PatchEmbed]:
        """The patch embeddings by modality."""
        return {"audio": self.patch_embed_a, "visual": self.patch_embed}

    def images(self, audio: Tensor | None, visual: Tensor | None) -> dict[str, Tensor]:
        """Both inputs checked and as images, an absent one as zeros."""
        return patched.images(audio, visual, self.audio_size, self.img_size)

    def masking(self, only: str) -> tuple[tuple[float, ...], Structure]:
        """Ratios, and the structure of the audio mask."""
        return self.mask_ratios, self.audio_structure

    def visible(self, progress: float) -> float:
        """Share of tokens that the encoders see, a mean over passes and ratios; the same all through training."""
        ratios = [self.masking(only)[0] for only in self.passes]
        return 1 - sum(sum(some) / len(some) for some in ratios) / len(ratios)

    def draw(self, batch_size: int, generator: torch.Generator | None = None, **given: Any) -> PairDraws:
        """Every random choice of a pass; for what can be given see :func:`avfast.models.patched.draw`."""

        def ratios(key: DrawKey, only: str) -> list[tuple[float, float]]:
            return assign_ratios(self.masking(only)[0], key)

        def structure(only: str) -> Structure:
            return self.masking(only)[1]

        return patched.draw(self, batch_size, generator, ratios=ratios, structure=structure, **given)

    def packed(self, only: str, audio: Kept, visual: Kept, *present: Sequence[bool]) -> PairDraws:
        """The draws of kept patches."""
        counts = self.patch_embed_a.num_patches, self.patch_embed.num_patches
        return PairDraws.of(only, audio, visual, counts, *present)

    def whole(self, audio: Kept, visual: Kept) -> PairDraws:
        """The draws of all patches, or none, of each modality."""
        return PairDraws.whole(audio, visual, (self.patch_embed_a.num_patches, self.patch_embed.num_patches))

    # Pre-training.

    def forward(
        self, audio: Tensor | None = None, visual: Tensor | None = None, draws: PairDraws | None = None
    ) -> Output:
        """One pre-training pass.

        Args:
            audio: ``(B, frames, mels)`` normalised log-mel.
            visual: ``(B, 3, H, W)`` normalised frames.
            draws: from :meth:`draw`; default drawn here, without the patches of what is not given.
        """
        images = self.images(audio, visual)
        draws = patched.placed(self, draws, len(images["audio"]), (audio is not None, visual is not None))
        a, v = self.unimodal(images["audio"], images["visual"], draws)
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        reconstruction: dict[str, Tensor] = {}
        loss = images["audio"].new_zeros((), dtype=torch.promote_types(images["audio"].dtype, torch.float32))
        if self.contrastive_weight and draws.only != "reconstruction":
            contrast = self.contrast(a, v, draws)
            losses["contrastive"], metrics["contrastive_accuracy"] = contrast.loss, contrast.accuracy
            loss = loss + self.contrastive_weight * contrast.loss
        if self.reconstruction_weight and draws.only != "contrastive":
            predicted, entries = self.reconstruct(a, v, draws)
            terms = patched.reconstruction_losses(predicted, entries, images, self.parts, draws, self.normalised)
            reconstruction = {} if entries else predicted
            losses |= terms
            for term in terms.values():
                loss = loss + self.reconstruction_weight * term
        return Output(loss, losses, metrics, reconstruction)

    @property
    def normalised(self) -> dict[str, bool]:
        """By modality, whether target patches are normalised."""
        return {"audio": self.norm_pix, "visual": self.norm_pix}

    def contrast(self, a: Tensor, v: Tensor, draws: PairDraws) -> InfoNCE:
        """InfoNCE over the instances that have both modalities."""
        tokens_a, tokens_v = self.contrasted(a, v, draws)
        pooled_a = draws.audio_keep.mean(tokens_a, self.patch_embed_a.num_patches)
        pooled_v = draws.visual_keep.mean(tokens_v, self.patch_embed.num_patches)
        if draws.pairs is not None:
            pooled_a, pooled_v = pooled_a[draws.pairs], pooled_v[draws.pairs]
        return info_nce(pooled_a, pooled_v, self.temperature, self.contrastive_direction)

    def reconstruct(self, a: Tensor, v: Tensor, draws: PairDraws) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Predicted patches of both modalities, and which they are, see :func:`patched.reconstruction_losses`."""
        if self.decoder is None:
            raise RuntimeError("this model was built without a decoder and cannot reconstruct")
        fused = self.fuse(draws.join(a, v), draws.plans["joined"])
        if not (self.training and "read" in draws.plans):
            audio, visual = self.decoder(fused, draws.scatter_index, draws.plans["dense"])
            return {"audio": draws.batch_order(audio), "visual": draws.batch_order(visual)}, {}
        # the loss alone reads the predictions, and of the masked patches alone
        rows, of_modality, entries = draws.masked()
        read = Read(rows, draws.plans["read"])
        audio, visual = self.decoder(fused, draws.scatter_index, draws.plans["dense"], read, of_modality)
        return {"audio": audio, "visual": visual}, entries

    @property
    def contrasts(self) -> bool:
        """Whether a loss tells pairs apart."""
        return bool(self.contrastive_weight)

    @property
    def has_unused_parameters(self) -> bool:
        """Whether a forward pass leaves some parameters without gradient (DDP must then look for them)."""
        heads = any(name.startswith("head") for name, _ in self.named_parameters())
        return len(self.passes) > 1 or not (self.contrastive_weight and self.reconstruction_weight) or heads

    # Features and figures.

    def encode(self, audio: Tensor | None = None, visual: Tensor | None = None, **keep: Keep | None) -> Features:
        """Token features after the final norms, without masking unless kept patches are given.

        Args:
            audio: ``(B, frames, mels)`` or None.
            visual: ``(B, 3, H, W)`` or None.
            keep: ``audio_keep`` and ``visual_keep``, kept patch ids as in :meth:`draw`.

        Returns:
            ``audio`` ``(B, Na, D)``, ``visual`` ``(B, Nv, D)`` and, with both, ``fused`` ``(B, Na + Nv, D)`` in the
            order [audio; visual]; PackedTokens in batch order where the kept patches differ in number.
        """
        images = self.images(audio, visual)
        batch = images["audio"].shape[0]
        draws = patched.undrawn(self, batch, audio, visual, **keep)
        a, v = self.unimodal(images["audio"], images["visual"], draws)
        fused = None
        if audio is not None and visual is not None:
            tokens = self.fuse(draws.join(a, v), draws.plans["joined"])
            fused = patched.dense_or_packed(tokens, draws.lengths, draws.batch_rows, draws.equal, batch)
        return patched.features(*self.contrasted(a, v, draws), fused, draws, audio is not None, visual is not None)

    def figures(self, inputs: dict[str, Tensor], draws: PairDraws, output: Output) -> Figures:
        """The reconstruction."""
        images = self.images(inputs["audio"], inputs["visual"])
        return Figures(patched.reconstruction_figure(output.reconstruction, images, self.parts, draws, self.normalised))

    # Training machinery.

    def run_blocks(
        self, blocks: nn.ModuleList, x: Tensor, plan: AttentionPlan, sizes: Sequence[int] = (),
        norm: nn.Module | None = None,
    ) -> Tensor:  # fmt: skip
        """Packed tokens through blocks, and through a final norm where there is one."""
        return run_blocks(blocks, x, plan, sizes, self.grad_checkpointing, norm=norm)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable
        if self.decoder is not None:
            self.decoder.grad_checkpointing = enable

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All parameters alike."""
        return {"all": list(self.parameters())}

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, the units of sharding."""
        return [m for m in self.modules() if isinstance(m, PackedBlock)]
