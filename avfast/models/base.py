"""What all models share: their inputs and outputs, random draws, and the masked contrastive pre-training step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from avfast.masking import STRUCTURES, Kept, Structure, assign_ratios, check_ratio, keep_patches
from avfast.models.draws import Draws, Keep, Layout, as_kept
from avfast.nn import JointDecoder, PackedBlock, PatchEmbed, patchify, run_blocks, unpatchify
from avfast.nn.block import Read
from avfast.ops import AttentionPlan, info_nce, masked_patch_mse
from avfast.ops.info_nce import InfoNCE
from avfast.ops.masked_patch_mse import normalise_patches
from avfast.packing import PackedTokens
from avfast.random import DrawKey
from avfast.tensors import untraced

if TYPE_CHECKING:
    from avfast.data.frontend import Frontend


@dataclass
class Output:
    """Result of a pre-training pass.

    Args:
        loss: scalar, weighted sum of ``losses``. In a distributed run the mean over processes is the global loss.
        losses: unweighted scalars: ``contrastive``, ``reconstruction_audio``, ``reconstruction_visual``.
        reconstruction: predicted patches ``{"audio": (B, N, P), "visual": (B, N, P)}`` of a model in evaluation mode;
            empty without that objective, and in training, where only those that the loss reads are predicted.
        contrastive_accuracy: share of best matches that are the own pair, without gradient.
    """

    loss: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    reconstruction: dict[str, Tensor] = field(default_factory=dict)
    contrastive_accuracy: Tensor | None = None


@dataclass(frozen=True)
class Features:
    """Token features ``(B, N, D)``, PackedTokens where instances keep unequal numbers, None for an absent modality."""

    audio: Tensor | PackedTokens | None
    visual: Tensor | PackedTokens | None
    fused: Tensor | PackedTokens | None


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform linear and patch projections, zero biases (He et al., Masked Autoencoders, released code)."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class AudioVisualMAE(nn.Module):
    """Base of the models that contrast and reconstruct masked audio-visual pairs.

    A subclass provides :meth:`unimodal`, :meth:`contrasted` and :meth:`fuse`.

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

    branches: tuple[str, ...] = ("joint",)
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

    def unimodal(self, audio: Tensor, visual: Tensor, layout: Layout, branch: str = "joint") -> tuple[Tensor, Tensor]:
        """Packed tokens ``(T, D)`` of the kept patches of each modality, before the modalities meet."""
        raise NotImplementedError

    def contrasted(self, audio: Tensor, visual: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """The packed tokens whose means are contrasted."""
        raise NotImplementedError

    def fuse(self, joined: Tensor, plan: AttentionPlan) -> Tensor:
        """Fused tokens ``(T, D)`` of sequences [audio; visual]."""
        raise NotImplementedError

    # Inputs.

    @cached_property
    def frontend(self) -> Frontend:
        """What turns waveforms and frames into this model's inputs."""
        from avfast.data.frontend import KaldiFrontend

        return KaldiFrontend(**self.frontend_args)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.patch_embed.proj.weight.device

    def spectrogram_image(self, audio: Tensor) -> Tensor:
        """``(B, frames, mels)`` as the ``(B, 1, mels, frames)`` image whose patches are embedded."""
        if audio.ndim != 3 or tuple(audio.shape[1:]) != self.audio_size:
            raise ValueError(f"audio must be (B, {self.audio_size[0]}, {self.audio_size[1]}), got {tuple(audio.shape)}")
        return audio.transpose(1, 2).unsqueeze(1)

    def check_visual(self, visual: Tensor) -> Tensor:
        """``visual`` if it is ``(B, 3, H, W)`` of this model's size."""
        size = self.img_size
        if visual.ndim != 4 or tuple(visual.shape[1:]) != (3, size, size):
            hint = "; channels come first: visual.permute(0, 3, 1, 2)" if visual.shape[-1] == 3 else ""
            raise ValueError(f"visual must be (B, 3, {size}, {size}), got {tuple(visual.shape)}{hint}")
        return visual

    def inputs(self, audio: Tensor | None, visual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both inputs checked, an absent one as zeros."""
        given = audio if audio is not None else visual
        if given is None:
            raise ValueError("give audio, visual or both")
        for name, x in (("audio", audio), ("visual", visual)):
            if x is not None and not x.is_floating_point():
                raise ValueError(f"{name} must be floating point, got {x.dtype}; model.frontend.{name} makes it so")
        if audio is not None and visual is not None and len(audio) != len(visual):
            raise ValueError(f"audio and visual must pair up, got batches of {len(audio)} and {len(visual)}")
        if audio is None:
            audio = given.new_zeros(len(given), *self.audio_size)
        if visual is None:
            visual = given.new_zeros(len(given), 3, self.img_size, self.img_size)
        return self.spectrogram_image(audio), self.check_visual(visual)

    # Random draws.

    def draw(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        *,
        key: DrawKey | None = None,
        branch: str | None = None,
        has_audio: Iterable[bool] | None = None,
        has_visual: Iterable[bool] | None = None,
    ) -> Draws:
        """Every random choice of a step.

        Args:
            batch_size: instances on this process.
            generator: seeds a stand-alone draw; default torch's global generator.
            key: names the draw instead (training), see :class:`~avfast.random.DrawKey`.
            branch: one of ``branches``, default the first.
            has_audio: per instance; default all.
            has_visual: likewise.

        Returns:
            Draws on the CPU; the same key or generator state gives the same.
        """
        branch = self.branches[0] if branch is None else branch
        if branch not in self.branches:
            raise ValueError(f"branch must be one of {', '.join(self.branches)}, got {branch!r}")
        key = DrawKey.fresh(batch_size, generator) if key is None else key
        if len(key.positions) != batch_size:
            raise ValueError(f"the key names {len(key.positions)} positions for a batch of {batch_size}")
        present_a = (True,) * batch_size if has_audio is None else tuple(bool(x) for x in has_audio)
        present_v = (True,) * batch_size if has_visual is None else tuple(bool(x) for x in has_visual)
        ratios = self.ratios(branch, key)
        kept = [
            keep_patches(grid, [pair[i] for pair in ratios], key, f"{branch} {name}", structure, present)
            for i, (name, grid, structure, present) in enumerate(
                (
                    ("audio", self.patch_embed_a.grid_size, self.masking(branch)[1], present_a),
                    ("visual", self.patch_embed.grid_size, "unstructured", present_v),
                )
            )
        ]
        return self.laid_out(Draws(kept[0], kept[1], branch, present_a, present_v))

    def laid_out(self, draws: Draws) -> Draws:
        """Complete draws together with the packing of their tokens."""
        patches = self.patch_embed_a.num_patches, self.patch_embed.num_patches
        kept = as_kept(draws.audio_keep, patches[0]), as_kept(draws.visual_keep, patches[1])
        return draws.with_layout(Layout.of(*kept, patches, (draws.has_audio, draws.has_visual)))

    def masking(self, branch: str) -> tuple[tuple[float, ...], Structure]:
        """Ratios, and the structure of the audio mask."""
        return self.mask_ratios, self.audio_structure

    def ratios(self, branch: str, key: DrawKey) -> list[tuple[float, float]]:
        """The (audio, visual) ratio of each of the key's positions."""
        return assign_ratios(self.masking(branch)[0], key)

    def complete(self, draws: Draws | None, batch_size: int) -> Draws:
        """``draws`` with what is missing drawn, checked against this model and laid out on its device."""
        if draws is None:
            return self.packed_here(Draws(), batch_size)
        layout = draws.layout
        if layout is not None and layout.index is not None and layout.index.device == self.device:
            if layout.audio.inverse.shape[0] != batch_size:
                raise ValueError(f"draws are of {layout.audio.inverse.shape[0]} instances, the batch has {batch_size}")
            return draws
        return self.packed_here(draws, batch_size)

    @untraced
    def packed_here(self, draws: Draws, batch_size: int) -> Draws:
        """``draws`` with what is missing drawn, and packed on this model's device."""
        if draws.audio_keep is None or draws.visual_keep is None or draws.branch is None:
            drawn = self.draw(batch_size, branch=draws.branch, has_audio=draws.has_audio, has_visual=draws.has_visual)
            draws = replace(
                draws,
                audio_keep=drawn.audio_keep if draws.audio_keep is None else draws.audio_keep,
                visual_keep=drawn.visual_keep if draws.visual_keep is None else draws.visual_keep,
                branch=drawn.branch,
            )
        for name, keep in (("audio_keep", draws.audio_keep), ("visual_keep", draws.visual_keep)):
            if len(keep) != batch_size:
                raise ValueError(f"{name} holds {len(keep)} instances, the batch {batch_size}")
        return (draws if draws.layout is not None else self.laid_out(draws)).to(self.device)

    # Pre-training.

    def forward(self, audio: Tensor | None, visual: Tensor | None, draws: Draws | None = None) -> Output:
        """One pre-training pass.

        Args:
            audio: ``(B, frames, mels)`` normalised log-mel.
            visual: ``(B, 3, H, W)`` normalised frames.
            draws: from :meth:`draw`; what is missing is drawn.
        """
        spectrogram, visual, draws = self.prepare(audio, visual, draws)
        layout, branch = draws.layout, draws.branch
        a, v = self.unimodal(spectrogram, visual, layout, branch)
        losses: dict[str, Tensor] = {}
        reconstruction: dict[str, Tensor] = {}
        accuracy = None
        loss = spectrogram.new_zeros((), dtype=torch.promote_types(spectrogram.dtype, torch.float32))
        if self.contrastive_weight and branch != "reconstruction":
            contrast = self.contrast(a, v, layout)
            losses["contrastive"], accuracy = contrast.loss, contrast.accuracy
            loss = loss + self.contrastive_weight * contrast.loss
        if self.reconstruction_weight and branch != "contrastive":
            reconstruction, entries = self.reconstruct(a, v, layout)
            terms = self.reconstruction_losses(reconstruction, entries, spectrogram, visual, layout)
            reconstruction = {} if entries else reconstruction
            losses |= terms
            for term in terms.values():
                loss = loss + self.reconstruction_weight * term
        return Output(loss, losses, reconstruction, accuracy)

    def prepare(self, audio: Tensor | None, visual: Tensor | None, draws: Draws | None) -> tuple[Tensor, Tensor, Draws]:
        """Spectrogram and frames, an absent one as zeros, and the complete draws."""
        given_a, given_v = audio is not None, visual is not None
        spectrogram, visual = self.inputs(audio, visual)
        batch = len(spectrogram)
        if not (given_a and given_v):
            draws = self.without(draws or Draws(), batch, given_a, given_v)
        return spectrogram, visual, self.complete(draws, batch)

    @staticmethod
    @untraced
    def without(draws: Draws, batch_size: int, given_a: bool, given_v: bool) -> Draws:
        """The same draws for a batch of which a modality was not given at all."""
        absent = (False,) * batch_size
        has_a, has_v = draws.has_audio if given_a else absent, draws.has_visual if given_v else absent
        return replace(draws, has_audio=has_a, has_visual=has_v)

    def reconstruction_losses(
        self,
        reconstruction: dict[str, Tensor],
        entries: dict[str, Tensor],
        spectrogram: Tensor,
        visual: Tensor,
        layout: Layout,
    ) -> dict[str, Tensor]:
        """The terms ``reconstruction_audio`` and ``reconstruction_visual`` over the patches that were not kept.

        Args:
            reconstruction: predictions ``(B, N, P)``, or ``(M, P)`` of the patches ``entries``.
            entries: by modality, ``(M,)`` entries of the flattened (B, N) patches; empty where all are predicted.
            spectrogram: ``(B, 1, mels, frames)``.
            visual: ``(B, 3, H, W)``.
            layout: which patches were kept.
        """
        losses = {}
        for name, kept, target, present in (
            ("audio", layout.audio, patchify(spectrogram, self.patch_embed_a.patch_size), layout.present_audio),
            ("visual", layout.visual, patchify(visual, self.patch_embed.patch_size), layout.present_visual),
        ):
            mask = kept.masked(target.shape[1])
            if present is not None:
                mask = mask & present.bool()[:, None]
            predicted = reconstruction[name]
            if entries:
                target, mask = (x.flatten(0, 1)[entries[name]][None] for x in (target, mask))
                predicted = predicted[None]
            term = masked_patch_mse(predicted, target, mask, norm_pix=self.normalises(name))
            losses[f"reconstruction_{name}"] = term
        return losses

    def normalises(self, modality: str) -> bool:
        """Whether the target patches of a modality are normalised."""
        return self.norm_pix

    def contrast(self, a: Tensor, v: Tensor, layout: Layout) -> InfoNCE:
        """InfoNCE over the instances that have both modalities."""
        tokens_a, tokens_v = self.contrasted(a, v, layout)
        pooled_a = layout.audio.mean(tokens_a, self.patch_embed_a.num_patches)
        pooled_v = layout.visual.mean(tokens_v, self.patch_embed.num_patches)
        if layout.pairs is not None:
            pooled_a, pooled_v = pooled_a[layout.pairs], pooled_v[layout.pairs]
        return info_nce(pooled_a, pooled_v, self.temperature, self.contrastive_direction)

    def reconstruct(self, a: Tensor, v: Tensor, layout: Layout) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Predicted patches of both modalities, and which they are, see :meth:`reconstruction_losses`."""
        if self.decoder is None:
            raise RuntimeError("this model was built without a decoder and cannot reconstruct")
        fused = self.fuse(layout.join(a, v), layout.plans["joined"])
        if not self.predicts_masked_alone(layout, "read"):
            audio, visual = self.decoder(fused, layout.places, layout.plans["dense"])
            return {"audio": layout.batch_order(audio), "visual": layout.batch_order(visual)}, {}
        rows, of_modality, entries = layout.masked()
        read = Read(rows, layout.plans["read"])
        audio, visual = self.decoder(fused, layout.places, layout.plans["dense"], read, of_modality)
        return {"audio": audio, "visual": visual}, entries

    def predicts_masked_alone(self, layout: Layout, *plans: str) -> bool:
        """Whether the loss alone reads the predictions, and there are some."""
        return self.training and all(name in layout.plans for name in plans)

    @property
    def has_unused_parameters(self) -> bool:
        """Whether a forward pass leaves some parameters without gradient (DDP must then look for them)."""
        heads = any(name.startswith("head") for name, _ in self.named_parameters())
        return len(self.branches) > 1 or not (self.contrastive_weight and self.reconstruction_weight) or heads

    # Features.

    def encode(
        self,
        audio: Tensor | None = None,
        visual: Tensor | None = None,
        *,
        audio_keep: Keep | None = None,
        visual_keep: Keep | None = None,
    ) -> Features:
        """Token features after the final norms, without masking unless kept patches are given.

        Args:
            audio: ``(B, frames, mels)`` or None.
            visual: ``(B, 3, H, W)`` or None.
            audio_keep: kept patch ids as in :class:`Draws`.
            visual_keep: likewise.

        Returns:
            ``audio`` ``(B, Na, D)``, ``visual`` ``(B, Nv, D)`` and, with both, ``fused`` ``(B, Na + Nv, D)`` in the
            order [audio; visual]; PackedTokens in batch order where the kept patches differ in number.
        """
        given_a, given_v = audio is not None, visual is not None
        spectrogram, frames = self.inputs(audio, visual)
        layout = self.layout_of(audio, visual, audio_keep, visual_keep)
        a, v = self.unimodal(spectrogram, frames, layout)
        fused = None
        if given_a and given_v:
            tokens = self.fuse(layout.join(a, v), layout.plans["joined"])
            fused = self.in_batch_order(tokens, layout, "joined")
        a, v = self.contrasted(a, v, layout)
        return Features(
            self.in_batch_order(a, layout, "audio") if given_a else None,
            self.in_batch_order(v, layout, "visual") if given_v else None,
            fused,
        )

    @untraced
    def layout_of(
        self,
        audio: Tensor | None,
        visual: Tensor | None,
        audio_keep: Keep | None = None,
        visual_keep: Keep | None = None,
    ) -> Layout:
        """The packing of given kept patches, default all, of what is given, on its device."""
        given = cast(Tensor, audio if audio is not None else visual)
        kept = [
            Kept.all(len(given), 0 if x is None else part.num_patches) if x is None or keep is None else keep
            for x, keep, part in ((audio, audio_keep, self.patch_embed_a), (visual, visual_keep, self.patch_embed))
        ]
        return cast(Layout, self.laid_out(Draws(*kept)).to(given.device).layout)

    @staticmethod
    def in_batch_order(values: Tensor, layout: Layout, part: str) -> Tensor | PackedTokens:
        """``"audio"``, ``"visual"`` or ``"joined"`` packed tokens, sequences sorted back; dense where equally long."""
        if layout.equal:  # packed in batch order then; no lengths of the host, so that one compiled encoder serves all
            batch = layout.audio.inverse.shape[0]
            return values.unflatten(0, (batch, values.shape[0] // batch))
        lengths, order = {
            "audio": (layout.audio.lengths, layout.audio.order),
            "visual": (layout.visual.lengths, layout.visual.order),
            "joined": (layout.lengths, layout.rows),
        }[part]
        tokens = PackedTokens(values, lengths).select(sorted(range(len(order)), key=lambda i: order[i]))
        if len(set(tokens.lengths)) == 1:
            return tokens.values.unflatten(0, (len(tokens), tokens.lengths[0]))
        return tokens

    # Pictures.

    def patchify_audio(self, audio: Tensor) -> Tensor:
        """``(B, frames, mels)`` to ``(B, N, P)``."""
        return patchify(self.spectrogram_image(audio), self.patch_embed_a.patch_size)

    def patchify_visual(self, visual: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, N, P)``."""
        return patchify(self.check_visual(visual), self.patch_embed.patch_size)

    def unpatchify_audio(self, patches: Tensor) -> Tensor:
        """``(B, N, P)`` to ``(B, frames, mels)``."""
        images = unpatchify(patches, self.patch_embed_a.grid_size, self.patch_embed_a.patch_size)
        return images.squeeze(1).transpose(1, 2)

    def unpatchify_visual(self, patches: Tensor) -> Tensor:
        """``(B, N, P)`` to ``(B, 3, H, W)``."""
        return unpatchify(patches, self.patch_embed.grid_size, self.patch_embed.patch_size)

    def reconstruction_to_input(self, modality: str, patches: Tensor, inputs: Tensor) -> Tensor:
        """Predicted ``(B, N, P)`` patches as an input; undoes ``norm_pix`` with the true statistics."""
        audio = modality == "audio"
        if self.normalises(modality):
            _, mean, deviation = normalise_patches((self.patchify_audio if audio else self.patchify_visual)(inputs))
            patches = patches * deviation + mean
        return (self.unpatchify_audio if audio else self.unpatchify_visual)(patches)

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

    def blocks_to_shard(self) -> list[nn.Module]:
        """The transformer blocks, the units of sharding."""
        return [m for m in self.modules() if isinstance(m, PackedBlock)]
