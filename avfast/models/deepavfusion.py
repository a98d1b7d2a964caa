"""DeepAVFusion: audio and visual transformers that exchange information through fusion tokens from the first layer on.

Mo and Morgado, Unveiling the Power of Audio-Visual Early Fusion Transformers with Dense Interactions through Masked
Modeling, CVPR 2024.

Three branches are updated together, each from the others' previous layer: audio and visual tokens attend to their own
modality and to the fusion tokens, fusion tokens to interactions of the two. For masked pre-training each modality has a
decoder, which reads its visible tokens and the fusion tokens.

**What the interactions are.** The paper's fusion attends over all n_a n_v pairs ("dense"), calls this intractable, and
approximates it by pairs of 8 + 8 aggregation tokens ("factorized"). As the key and the value of a pair are sums of one
part per modality, the softmax over pairs is the product of two softmaxes and what it reads is the sum of two readings
(:mod:`avfast.ops.pair_attention`): exactly the same function at linear cost, so that here dense fusion is cheaper than
the approximation. It also says what dense interactions can express: they are two cross-attentions which share their
queries, added. No pair is selected beyond what the choice of its two members, each made alone, implies. From token
fusion (one softmax over both modalities) they differ in that each modality is normalised by itself and so always has
weight 1, in separate key and value weights, and, factorised, in the full-width attention of the aggregation tokens and
4.6 times the parameters per block: Table 4, row 3 against row 1, does not isolate interactions, and the cost of dense
fusion in Table 5 is avoidable.

Where paper and released code disagree, and what is done here:

=========================  ======================================  ====================================================
topic, keyword             paper                                   released code
=========================  ======================================  ====================================================
fusion_residual            "raw": X + attention (Eq. 7), default   "normed": LayerNorm(X) + attention
fusion_scale               not given; default head width to the    64^-0.5 over pairs, also where heads are 16 wide
                           power -0.5
decoder_input              "fusion" (text after Eq. 15): fusion    "all", default here: visible tokens of the modality
                           tokens alone                            and all fusion tokens
train_decoder_positions    not given; default False                True
norm_pix                   not given (Eq. 14: plain l2)            per-patch normalised targets, default here
loss                       squared distance per patch              mean over the values of a patch, as here
pair (Eqs. 4, 11)          Wa a + Wv v, then keys and values       keys and values of the concatenation, as here: the
                                                                   same functions without a separate W
aggregated tokens (Eq. 9)  cross-attention block with residual     what the attention alone has read is paired, as here
                           and MLP
token fusion               attends to fusion tokens as well        attends to patches only, as here
fusion_attn_ratio          16 per head for self- and cross-        queries and keys over pairs only; aggregation
                           attention                               attention and factorised values stay 64 wide, as here
fusion_mlp_ratio           1, default                              1 on VGGSound, 4 on AudioSet (attention ratio 1)
audio_size                 196 frames of 15 ms                     192 of 15.625 ms, default here
order of updates           "parallel and sequential" (conclusion)  parallel only, as here
=========================  ======================================  ====================================================

The released code also computes queries and MLPs of the fusion tokens inside the unimodal blocks and throws them away;
here these blocks compute only keys and values of them, which changes no output. Optimiser, schedule and the ramp of the
learning rate of ``unimodal_parts`` belong to training (:mod:`avfast.train`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from avfast import checkpoints
from avfast.masking import check_ratio
from avfast.models.base import AudioVisualMAE, Features, Output, init_weights
from avfast.models.draws import Draws, Keep, as_kept
from avfast.models.fusion_layout import FusionLayout, align, fused_layers, of_present
from avfast.nn import PackedBlock, sincos_2d
from avfast.nn.block import Read, add
from avfast.nn.fusion import ContextBlock, FusionArch, FusionBlock, Pending, Residual
from avfast.nn.norm import add_norm
from avfast.nn.patch_decoder import PatchDecoder
from avfast.random import DrawKey
from avfast.released import deepavfusion
from avfast.tensors import float32_weights

if TYPE_CHECKING:
    from avfast.data.frontend import HTKFrontend

BLOCK_EPS, FUSION_EPS = 1e-6, 1e-5
"""Of the LayerNorms in the unimodal transformers, and of those in fusion blocks and decoders and after the former."""


Branches = tuple[Pending, Pending, Tensor]
"""Audio and visual tokens, each as (stream, update not yet added), and fusion tokens."""


class DeepAVFusion(AudioVisualMAE):
    """DeepAVFusion (see the head of this file).

    ``encode`` gives the encoder alone; ``fused`` are its fusion tokens ``(B, F, D)`` in the order [fusion | visual
    aggregation | audio aggregation]. Without decoders (``decoder_depth=0``) there is no pre-training pass.

    Args:
        img_size: height and width of a frame in pixels.
        patch_size: of frames and spectrograms.
        audio_size: spectrogram (frames, mel bins); patches are numbered frequency-major.
        embed_dim: D.
        depth: layers of the three branches.
        num_heads: of the unimodal and the fusion blocks.
        mlp_ratio: hidden width of the unimodal MLPs over D.
        decoder_embed_dim: width of the decoders.
        decoder_depth: their blocks; 0 builds none.
        decoder_num_heads: their heads.
        audio_patch_size: of spectrograms, default ``patch_size``.
        fusion_arch: ``"dense"``, ``"factorized"`` or ``"token"``, see :class:`~avfast.nn.fusion.FusionBlock`.
        fusion_layers: layers with a fusion block: ``"all"``, ``"none"``, the last so many of them (Table 6a), or their
            indices. In the others the branches go on alone.
        num_fusion_tokens: fusion, visual aggregation and audio aggregation tokens.
        fusion_attn_ratio: width of attention in the fusion blocks over D.
        fusion_mlp_ratio: hidden width of their MLPs over D.
        fusion_residual: ``"raw"`` or ``"normed"``, see the table.
        fusion_scale: factor of their attention logits, see the table.
        visual_mask_ratio: share of masked visual patches.
        audio_mask_ratio: share of masked audio patches.
        decoder_input: ``"all"`` or ``"fusion"``, see the table. Under ``"fusion"`` mask tokens stand at every position,
            and what comes after the last fusion block gets no gradient: the unimodal blocks from its layer on (with
            fusion at all layers the last one of each modality) and the final norms ``norm_a`` and ``norm_v``; see
            ``unused_parts``.
        train_decoder_positions: the decoders' position tables are trained.
        norm_pix_audio: normalise the target patches of audio.
        norm_pix_visual: likewise of frames.
        frontend: overrides for the audio front end.

    Raises:
        ValueError: on settings that contradict each other.
    """

    unimodal_parts = ("patch_embed", "blocks_a", "blocks_v", "norm_a", "norm_v")
    """Beginnings of the names of what unimodal pre-training gives; the released training raises their learning rate
    from 0 over its first half."""

    @float32_weights
    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        audio_size: tuple[int, int] = (192, 128),
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        *,
        audio_patch_size: int | None = None,
        fusion_arch: FusionArch = "factorized",
        fusion_layers: str | int | Sequence[int] = "all",
        num_fusion_tokens: tuple[int, int, int] = (16, 8, 8),
        fusion_attn_ratio: float = 0.25,
        fusion_mlp_ratio: float = 1.0,
        fusion_residual: Residual = "raw",
        fusion_scale: float | None = None,
        visual_mask_ratio: float = 0.75,
        audio_mask_ratio: float = 0.8,
        decoder_input: Literal["all", "fusion"] = "all",
        train_decoder_positions: bool = False,
        norm_pix_audio: bool = True,
        norm_pix_visual: bool = True,
        frontend: dict | None = None,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            audio_patch_size=audio_patch_size,
            audio_size=audio_size,
            embed_dim=embed_dim,
            mask_ratios=(visual_mask_ratio,),
            audio_structure="unstructured",
            temperature=1.0,
            contrastive_weight=0.0,
            reconstruction_weight=1.0,
            norm_pix=norm_pix_visual,
            frontend=frontend,
        )
        if decoder_input not in ("all", "fusion"):
            raise ValueError(f'decoder_input must be "all" or "fusion", got {decoder_input!r}')
        self.fusion_layers = fused_layers(fusion_layers, depth)
        if decoder_input == "fusion" and not self.fusion_layers:
            raise ValueError('decoder_input="fusion" needs a fusion layer: without one the decoders see no input')
        self.visual_mask_ratio, self.audio_mask_ratio = visual_mask_ratio, check_ratio(audio_mask_ratio)
        self.norm_pix_audio, self.norm_pix_visual = norm_pix_audio, norm_pix_visual
        self.fusion_arch, self.decoder_input = fusion_arch, decoder_input

        embed, embed_a = self.patch_embed, self.patch_embed_a
        self.pos_embed = nn.Parameter(sincos_2d(embed_dim, embed.grid_size)[None], requires_grad=False)
        self.pos_embed_a = nn.Parameter(sincos_2d(embed_dim, embed_a.grid_size)[None], requires_grad=False)
        self.fusion_tokens = nn.Parameter(torch.zeros(1, sum(num_fusion_tokens), embed_dim))
        nn.init.normal_(self.fusion_tokens, std=0.02)
        self.blocks_a, self.blocks_v = (
            nn.ModuleList(ContextBlock(embed_dim, num_heads, mlp_ratio, BLOCK_EPS) for _ in range(depth))
            for _ in range(2)
        )
        self.fusion_blocks = nn.ModuleDict(
            {
                str(i): FusionBlock(
                    embed_dim, num_heads, fusion_arch, num_fusion_tokens, fusion_attn_ratio, fusion_mlp_ratio,
                    residual=fusion_residual, scale=fusion_scale, eps=FUSION_EPS,
                )
                for i in self.fusion_layers
            }
        )  # fmt: skip
        self.norm_a, self.norm_v = (nn.LayerNorm(embed_dim, eps=BLOCK_EPS) for _ in range(2))
        self.fusion_norm = nn.LayerNorm(embed_dim, eps=FUSION_EPS)
        self.decoders = nn.ModuleDict()
        if decoder_depth:
            for name, part, channels in (("audio", embed_a, 1), ("visual", embed, 3)):
                self.decoders[name] = PatchDecoder(
                    embed_dim, decoder_embed_dim, decoder_depth, decoder_num_heads, part.grid_size,
                    channels * part.patch_size**2, eps=FUSION_EPS, train_positions=train_decoder_positions,
                )  # fmt: skip
        self.apply(init_weights)

    @cached_property
    def frontend(self) -> HTKFrontend:
        """What turns waveforms and frames into this model's inputs."""
        from avfast.data.frontend import HTKFrontend

        return HTKFrontend(**self.frontend_args)

    # Draws.

    def ratios(self, branch: str, key: DrawKey) -> list[tuple[float, float]]:
        return [(self.audio_mask_ratio, self.visual_mask_ratio)] * len(key.positions)

    def laid_out(self, draws: Draws) -> Draws:
        counts = self.patch_embed_a.num_patches, self.patch_embed.num_patches
        kept_a, kept_v = align(
            of_present(as_kept(draws.audio_keep, counts[0]), draws.has_audio),
            of_present(as_kept(draws.visual_keep, counts[1]), draws.has_visual),
        )
        layout = cast(FusionLayout, FusionLayout.of(kept_a, kept_v, counts, (draws.has_audio, draws.has_visual)))
        return draws.with_layout(replace(layout, context=self.fusion_tokens.shape[1]))

    # Encoder.

    def embed(self, spectrogram: Tensor, frames: Tensor, layout: FusionLayout) -> Branches:
        """What enters the first layer."""
        a, v = layout.audio, layout.visual
        audio = self.patch_embed_a(spectrogram, a.flat(self.patch_embed_a.num_patches)) + self.pos_embed_a[0][a.ids]
        visual = self.patch_embed(frames, v.flat(self.patch_embed.num_patches)) + self.pos_embed[0][v.ids]
        return (audio, None), (visual, None), self.fusion_tokens.repeat(a.inverse.shape[0], 1, 1)

    def layer(self, index: int, a: Pending, v: Pending, tokens: Tensor, layout: FusionLayout) -> Branches:
        """One layer of all branches (Eqs. 1-3)."""
        if index not in self.fusion_layers:
            _, a = self.blocks_a[index](a, layout.tokens_audio)
            _, v = self.blocks_v[index](v, layout.tokens_visual)
            return a, v, tokens
        audio, a = self.blocks_a[index](a, layout.tokens_audio, tokens)
        visual, v = self.blocks_v[index](v, layout.tokens_visual, tokens)
        return a, v, self.fusion_blocks[str(index)](tokens, *self.sources(audio, visual, layout))

    @staticmethod
    def sources(
        audio: Tensor, visual: Tensor, layout: FusionLayout
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Patch tokens and their boundaries as fusion blocks take them."""
        a, v = layout.tokens_audio, layout.tokens_visual
        return a.sources(audio), v.sources(visual), a.cu_seqlens, v.cu_seqlens

    def run(
        self, spectrogram: Tensor, frames: Tensor, layout: FusionLayout, keep: list[Branches] | None = None
    ) -> Branches:
        """All layers; ``keep`` collects the branches before the first and after every one."""
        branches = self.embed(spectrogram, frames, layout)
        for index in range(len(self.blocks_a)):
            if keep is not None:
                keep.append(branches)
            if self.grad_checkpointing and torch.is_grad_enabled():
                a, v, tokens = branches
                whole: tuple[Pending, Pending] = (add(*a), None), (add(*v), None)
                branches = checkpoint(
                    self.layer, index, *whole, tokens, layout, use_reentrant=False, preserve_rng_state=False
                )
            else:
                branches = self.layer(index, *branches, layout)
        if keep is not None:
            keep.append(branches)
        return branches

    def finish(self, a: Pending, v: Pending, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The final norms."""
        return add_norm(self.norm_a, *a, ())[0], add_norm(self.norm_v, *v, ())[0], self.fusion_norm(tokens)

    # Pre-training.

    def forward(self, audio: Tensor | None, visual: Tensor | None, draws: Draws | None = None) -> Output:
        """One pre-training pass.

        Args:
            audio: ``(B, frames, mels)`` log-mel.
            visual: ``(B, 3, H, W)`` normalised frames.
            draws: from :meth:`draw`; what is missing is drawn.

        Raises:
            RuntimeError: without decoders.
        """
        if not self.decoders:
            raise RuntimeError("this model was built without a decoder and cannot reconstruct")
        spectrogram, frames, draws = self.prepare(audio, visual, draws)
        layout = cast(FusionLayout, draws.layout)
        branches = self.run(spectrogram, frames, layout)
        if self.decoder_input == "all":
            a, v, tokens = self.finish(*branches)
            visible: dict[str, Tensor | None] = {"audio": a, "visual": v}
        else:
            visible, tokens = {"audio": None, "visual": None}, self.fusion_norm(branches[2])
        reconstruction, entries, plans = {}, {}, cast(dict, layout.plans)
        alone = self.predicts_masked_alone(layout, "read_audio", "read_visual")
        for name, kept, count in zip(("audio", "visual"), (layout.audio, layout.visual), layout.counts, strict=True):
            places, read = kept.packed_flat(count), None
            if alone:
                rows, entries[name] = layout.masked_of(places, count)
                read = Read(rows, plans[f"read_{name}"])
            seen = (None, None) if visible[name] is None else (visible[name], places)
            predicted = self.decoders[name](tokens, plans[name], *seen, read)
            reconstruction[name] = predicted if alone else layout.batch_order(predicted)
        losses = self.reconstruction_losses(reconstruction, entries, spectrogram, frames, layout)
        loss = losses["reconstruction_audio"] + losses["reconstruction_visual"]
        return Output(loss, losses, {} if alone else reconstruction)

    def normalises(self, modality: str) -> bool:
        return self.norm_pix_audio if modality == "audio" else self.norm_pix_visual

    @property
    def unused_parts(self) -> tuple[str, ...]:
        """Beginnings of the names of parameters that get no gradient, see ``decoder_input``."""
        if self.decoder_input == "all":
            return ()
        late = range(self.fusion_layers[-1], len(self.blocks_a))
        return ("norm_a.", "norm_v.", *(f"{blocks}.{i}." for i in late for blocks in ("blocks_a", "blocks_v")))

    @property
    def has_unused_parameters(self) -> bool:
        return bool(self.unused_parts)

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
            audio_keep: kept patch ids as in :class:`~avfast.models.Draws`.
            visual_keep: likewise.

        Returns:
            ``audio`` ``(B, Na, D)`` and ``visual`` ``(B, Nv, D)``, None where not given, and ``fused`` ``(B, F, D)``
            from what was; PackedTokens in batch order where the kept patches differ in number.
        """
        spectrogram, frames = self.inputs(audio, visual)
        layout = cast(FusionLayout, self.layout_of(audio, visual, audio_keep, visual_keep))
        branches = self.run(spectrogram, frames, layout)
        return self.features(*self.finish(*branches), layout, audio is not None, visual is not None)

    def encode_layers(
        self,
        audio: Tensor | None = None,
        visual: Tensor | None = None,
        *,
        audio_keep: Keep | None = None,
        visual_keep: Keep | None = None,
    ) -> list[Features]:
        """As :meth:`encode`, after each layer and before the final norms."""
        layout, states = self.trace(audio, visual, audio_keep, visual_keep)
        given = audio is not None, visual is not None
        return [self.features(add(*a), add(*v), tokens, layout, *given) for a, v, tokens in states[1:]]

    @torch.no_grad()
    def fusion_attention(
        self,
        audio: Tensor | None = None,
        visual: Tensor | None = None,
        *,
        audio_keep: Keep | None = None,
        visual_keep: Keep | None = None,
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """How much the fusion tokens of each fusion layer read from each patch, for pictures and analysis.

        Args:
            audio: ``(B, frames, mels)`` or None.
            visual: ``(B, 3, H, W)`` or None.
            audio_keep: kept patch ids as in :class:`~avfast.models.Draws`.
            visual_keep: likewise.

        Returns:
            By layer, p ``(B, heads, F, Na)`` over audio and r ``(B, heads, F, Nv)`` over visual patches, each adding up
            to 1; the weight of a pair is their product. Padded with zeros where the kept patches differ in number. For
            ``fusion_arch="factorized"`` see :meth:`avfast.nn.fusion.FusionBlock.weights`.

        Raises:
            ValueError: for ``fusion_arch="token"``, whose one softmax has no such factors.
        """
        layout, states = self.trace(audio, visual, audio_keep, visual_keep)
        maps = {}
        for index in self.fusion_layers:
            a, v, tokens = states[index]
            p, r = self.fusion_blocks[str(index)].weights(tokens, *self.sources(add(*a), add(*v), layout))
            maps[index] = layout.batch_order(p), layout.batch_order(r)
        return maps

    def trace(
        self, audio: Tensor | None, visual: Tensor | None, audio_keep: Keep | None, visual_keep: Keep | None
    ) -> tuple[FusionLayout, list[Branches]]:
        """The packing of kept patches, default all given ones, and the branches before and after all layers."""
        spectrogram, frames = self.inputs(audio, visual)
        layout = cast(FusionLayout, self.layout_of(audio, visual, audio_keep, visual_keep))
        states: list[Branches] = []
        self.run(spectrogram, frames, layout, states)
        return layout, states

    def features(
        self, a: Tensor, v: Tensor, tokens: Tensor, layout: FusionLayout, given_a: bool, given_v: bool
    ) -> Features:
        """Tokens in batch order, those of a modality that was not given as None."""
        audio = self.in_batch_order(a, layout, "audio") if given_a else None
        visual = self.in_batch_order(v, layout, "visual") if given_v else None
        return Features(audio, visual, layout.batch_order(tokens))

    # Training machinery.

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        for decoder in self.decoders.values():
            cast(PatchDecoder, decoder).grad_checkpointing = enable

    def blocks_to_shard(self) -> list[nn.Module]:
        return [m for m in self.modules() if isinstance(m, (PackedBlock, ContextBlock, FusionBlock))]

    # Weights.

    @torch.no_grad()
    def load_pretrained(
        self,
        image: str | Path | Mapping[str, Tensor] | None = None,
        audio: str | Path | Mapping[str, Tensor] | None = None,
    ) -> None:
        """Start the unimodal transformers from masked autoencoders, as the paper does.

        Class token, decoder and position tables of these are left out; positions are the fixed ones of this grid.

        Args:
            image: a Vision Transformer's checkpoint or state dict in timm's names, as MAE's
                (``vit_base_patch16_224.mae``).
            audio: AudioMAE's pre-training checkpoint or state dict. Its patch kernel is time x mel and is transposed
                for mel x time here. Its inputs were Kaldi log-mel, normalised with (x + 4.2677393) / (2 * 4.5689974),
                and other windows; here they are plain log10-mel, so its first layer meets another scale and has to
                adapt, in the released code as well.

        Raises:
            ValueError: listing keys or shapes that do not fit.
        """
        for source, blocks, norm, embed, transposed in (
            (image, self.blocks_v, self.norm_v, self.patch_embed, False),
            (audio, self.blocks_a, self.norm_a, self.patch_embed_a, True),
        ):
            if source is None:
                continue
            with checkpoints.naming(source):
                weights = checkpoints.mae_encoder(checkpoints.load(source))
                if transposed:
                    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].mT
                target = nn.ModuleDict({"blocks": blocks, "norm": norm, "patch_embed": embed})
                checkpoints.load_into(target, weights)

    @classmethod
    def from_released(cls, checkpoint: str | Path | Mapping[str, Tensor], **settings: Any) -> DeepAVFusion:
        """Load a released pre-training checkpoint, with or without its decoders, with the released settings.

        Args:
            checkpoint: path of a ``.pth`` or ``.safetensors`` file, or its state dict.
            settings: overrides of the released settings, as in :meth:`avfast.AVSiam.from_released`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: naming the file, if it is no checkpoint; listing unknown, missing and misshapen entries.
        """
        return checkpoints.build(cls, deepavfusion.convert, checkpoint, settings)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"fusion_arch={self.fusion_arch!r}, fusion_layers={self.fusion_layers}"
