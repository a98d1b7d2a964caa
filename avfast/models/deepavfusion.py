"""DeepAVFusion: audio and visual transformers that exchange information through fusion tokens from the first layer on.

Mo and Morgado, Unveiling the Power of Audio-Visual Early Fusion Transformers with Dense Interactions through Masked
Modeling, CVPR 2024.

Three streams are updated together, each from the others' previous layer: audio and visual tokens attend to their own
modality and to the fusion tokens, fusion tokens to interactions of the two. For masked pre-training each modality has a
decoder, which reads its visible tokens and the fusion tokens.

What the interactions are, and that dense ones cost no more than the approximation: :mod:`avfast.nn.fusion`.

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
                           attention                               attention and factorized values stay 64 wide, as here
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
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from avfast import checkpoints
from avfast.hub import HubMixin
from avfast.masking import Kept, check_ratio
from avfast.models import patched
from avfast.models.contract import Features, Figures, Output
from avfast.models.fusion_draws import FusionDraws, attention_maps, fused_layers
from avfast.models.patched import Keep, embed_kept, init_weights
from avfast.nn import PackedBlock, PatchDecoder, PatchEmbed, positions
from avfast.nn.block import Read, add
from avfast.nn.fusion import ContextBlock, FusionArch, FusionBlock, Pending, Residual
from avfast.nn.norm import add_norm
from avfast.released import deepavfusion
from avfast.released.vit import load_mae
from avfast.tensors import float32_weights

if TYPE_CHECKING:
    from avfast.data.frontend import HTKFrontend

BLOCK_EPS, FUSION_EPS = 1e-6, 1e-5
"""Of the LayerNorms in the unimodal transformers, and of those in fusion blocks and decoders and after the former."""
Streams = tuple[Pending, Pending, Tensor]
"""Audio and visual tokens, each as (stream, update not yet added), and fusion tokens."""


class DeepAVFusion(nn.Module, HubMixin):
    """DeepAVFusion (see the head of this file).

    ``encode`` gives the encoder alone; ``fused`` are its fusion tokens ``(B, F, D)`` in the order [fusion | visual
    aggregation | audio aggregation]. Without decoders (``decoder_depth=0``) there is no pre-training pass.

    Args:
        img_size: height and width of a frame in pixels.
        patch_size: of frames and spectrograms.
        audio_size: spectrogram (frames, mel bins); patches are numbered frequency-major.
        embed_dim: D.
        depth: layers of the three streams.
        num_heads: of the unimodal and the fusion blocks.
        mlp_ratio: hidden width of the unimodal MLPs over D.
        decoder_embed_dim: width of the decoders.
        decoder_depth: their blocks; 0 builds none.
        decoder_num_heads: their heads.
        audio_patch_size: of spectrograms, default ``patch_size``.
        fusion_arch: ``"dense"``, ``"factorized"`` or ``"token"``, see :class:`~avfast.nn.fusion.FusionBlock`.
        fusion_layers: layers with a fusion block: ``"all"``, ``"none"``, the last so many of them (Table 6a), or their
            indices. In the others the streams go on alone.
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

    passes = ("joint",)
    sources = ("image", "audio")
    contrasts = False
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
        super().__init__()
        if decoder_input not in ("all", "fusion"):
            raise ValueError(f'decoder_input must be "all" or "fusion", got {decoder_input!r}')
        self.fusion_layers = fused_layers(fusion_layers, depth)
        if decoder_input == "fusion" and not self.fusion_layers:
            raise ValueError('decoder_input="fusion" needs a fusion layer: without one the decoders see no input')
        self.img_size, self.audio_size, self.embed_dim = img_size, tuple(audio_size), embed_dim
        self.visual_mask_ratio, self.audio_mask_ratio = check_ratio(visual_mask_ratio), check_ratio(audio_mask_ratio)
        self.normalised = {"audio": norm_pix_audio, "visual": norm_pix_visual}
        self.fusion_arch, self.decoder_input, self.grad_checkpointing = fusion_arch, decoder_input, False
        frames, mels = self.audio_size
        self.frontend_args = {"num_frames": frames, "num_mel_bins": mels, "image_size": img_size, **(frontend or {})}

        self.patch_embed = embed = PatchEmbed((img_size, img_size), patch_size, 3, embed_dim)
        self.patch_embed_a = embed_a = PatchEmbed((mels, frames), audio_patch_size or patch_size, 1, embed_dim)
        self.pos_embed = positions(embed_dim, embed.grid_size)
        self.pos_embed_a = positions(embed_dim, embed_a.grid_size)
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
            for name, part in self.parts.items():
                self.decoders[name] = PatchDecoder(
                    embed_dim, decoder_embed_dim, decoder_depth, decoder_num_heads, part.grid_size, part.values,
                    eps=FUSION_EPS, train_positions=train_decoder_positions,
                )  # fmt: skip
        self.apply(init_weights)

    @cached_property
    def frontend(self) -> HTKFrontend:
        """What turns waveforms and frames into this model's inputs."""
        from avfast.data.frontend import HTKFrontend

        return HTKFrontend(**self.frontend_args)

    # Inputs and random draws.

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.fusion_tokens.device

    @property
    def parts(self) -> dict[str, PatchEmbed]:
        """The patch embeddings by modality."""
        return {"audio": self.patch_embed_a, "visual": self.patch_embed}

    def images(self, audio: Tensor | None, visual: Tensor | None) -> dict[str, Tensor]:
        """Both inputs checked and as images, an absent one as zeros."""
        return patched.images(audio, visual, self.audio_size, self.img_size)

    def visible(self, progress: float) -> float:
        """Share of tokens that the encoders see; the same all through training."""
        audio, visual = self.patch_embed_a.num_patches, self.patch_embed.num_patches
        masked = audio * self.audio_mask_ratio + visual * self.visual_mask_ratio
        return 1 - masked / (audio + visual)

    def draw(self, batch_size: int, generator: torch.Generator | None = None, **given: Any) -> FusionDraws:
        """Every random choice of a pass; for what can be given see :func:`avfast.models.patched.draw`."""
        shares = [(self.audio_mask_ratio, self.visual_mask_ratio)] * batch_size
        return patched.draw(self, batch_size, generator, ratios=lambda *_: shares, **given)

    def packed(self, only: str, audio: Kept, visual: Kept, *present: Sequence[bool]) -> FusionDraws:
        """The draws of kept patches."""
        counts = self.patch_embed_a.num_patches, self.patch_embed.num_patches
        return FusionDraws.of(only, audio, visual, counts, self.fusion_tokens.shape[1], *present)

    def whole(self, audio: Kept, visual: Kept) -> FusionDraws:
        """The draws of all patches, or none, of each modality."""
        counts = self.patch_embed_a.num_patches, self.patch_embed.num_patches
        return FusionDraws.whole(audio, visual, counts, self.fusion_tokens.shape[1])

    # Encoder.

    def layer(self, index: int, a: Pending, v: Pending, tokens: Tensor, draws: FusionDraws) -> Streams:
        """One layer of all streams (Eqs. 1-3)."""
        if index not in self.fusion_layers:
            _, a = self.blocks_a[index](a, draws.tokens["audio"])
            _, v = self.blocks_v[index](v, draws.tokens["visual"])
            return a, v, tokens
        audio, a = self.blocks_a[index](a, draws.tokens["audio"], tokens)
        visual, v = self.blocks_v[index](v, draws.tokens["visual"], tokens)
        return a, v, self.fusion_blocks[str(index)](tokens, *self.patches(audio, visual, draws))

    @staticmethod
    def patches(
        audio: Tensor, visual: Tensor, draws: FusionDraws
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Patch tokens and their boundaries as fusion blocks take them."""
        a, v = draws.tokens["audio"], draws.tokens["visual"]
        return a.sources(audio), v.sources(visual), a.cu_seqlens, v.cu_seqlens

    def run(self, images: dict[str, Tensor], draws: FusionDraws, keep: list[Streams] | None = None) -> Streams:
        """All layers; ``keep`` collects the streams before the first and after every one."""
        audio = embed_kept(self.patch_embed_a, self.pos_embed_a, images["audio"], draws.audio_keep)
        visual = embed_kept(self.patch_embed, self.pos_embed, images["visual"], draws.visual_keep)
        streams: Streams = (audio, None), (visual, None), self.fusion_tokens.repeat(draws.instances.shape[0], 1, 1)
        for index in range(len(self.blocks_a)):
            if keep is not None:
                keep.append(streams)
            if self.grad_checkpointing and torch.is_grad_enabled():
                a, v, tokens = streams
                whole = (add(*a), None), (add(*v), None), tokens
                streams = checkpoint(self.layer, index, *whole, draws, use_reentrant=False, preserve_rng_state=False)
            else:
                streams = self.layer(index, *streams, draws)
        if keep is not None:
            keep.append(streams)
        return streams

    def finish(self, a: Pending, v: Pending, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The final norms."""
        return add_norm(self.norm_a, *a, ())[0], add_norm(self.norm_v, *v, ())[0], self.fusion_norm(tokens)

    # Pre-training.

    def forward(
        self, audio: Tensor | None = None, visual: Tensor | None = None, draws: FusionDraws | None = None
    ) -> Output:
        """One pre-training pass.

        Args:
            audio: ``(B, frames, mels)`` log-mel.
            visual: ``(B, 3, H, W)`` normalised frames.
            draws: from :meth:`draw`; default drawn here, without the patches of what is not given.

        Raises:
            RuntimeError: without decoders.
        """
        if not self.decoders:
            raise RuntimeError("this model was built without a decoder and cannot reconstruct")
        images = self.images(audio, visual)
        draws = patched.placed(self, draws, len(images["audio"]), (audio is not None, visual is not None))
        streams = self.run(images, draws)
        if self.decoder_input == "all":
            a, v, tokens = self.finish(*streams)
            visible: dict[str, Tensor | None] = {"audio": a, "visual": v}
        else:
            visible, tokens = {"audio": None, "visual": None}, self.fusion_norm(streams[2])
        predicted, entries, plans = {}, {}, draws.plans
        # in training the loss alone reads the predictions, and of the masked patches alone
        alone = self.training and "read_audio" in plans and "read_visual" in plans
        for name, kept, count, _ in draws.sides():
            scatter_index, read = kept.packed_flat(count), None
            if alone:
                rows, entries[name] = draws.masked(scatter_index, count)
                read = Read(rows, plans[f"read_{name}"])
            seen = (None, None) if visible[name] is None else (visible[name], scatter_index)
            patches = self.decoders[name](*seen, plans[name], read, further=tokens)
            predicted[name] = patches if alone else draws.batch_order(patches)
        losses = patched.reconstruction_losses(predicted, entries, images, self.parts, draws, self.normalised)
        loss = losses["reconstruction_audio"] + losses["reconstruction_visual"]
        return Output(loss, losses, reconstruction={} if alone else predicted)

    @property
    def unused_parts(self) -> tuple[str, ...]:
        """Beginnings of the names of parameters that get no gradient, see ``decoder_input``."""
        if self.decoder_input == "all":
            return ()
        late = range(self.fusion_layers[-1], len(self.blocks_a))
        return ("norm_a.", "norm_v.", *(f"{blocks}.{i}." for i in late for blocks in ("blocks_a", "blocks_v")))

    @property
    def has_unused_parameters(self) -> bool:
        """Whether there are any."""
        return bool(self.unused_parts)

    # Features.

    def encode(self, audio: Tensor | None = None, visual: Tensor | None = None, **keep: Keep | None) -> Features:
        """Token features after the final norms, without masking unless kept patches are given.

        Args:
            audio: ``(B, frames, mels)`` or None.
            visual: ``(B, 3, H, W)`` or None.
            keep: ``audio_keep`` and ``visual_keep``, kept patch ids as in :meth:`draw`.

        Returns:
            ``audio`` ``(B, Na, D)`` and ``visual`` ``(B, Nv, D)``, None where not given, and ``fused`` ``(B, F, D)``
            from what was; PackedTokens in batch order where the kept patches differ in number.
        """
        images = self.images(audio, visual)
        draws = patched.undrawn(self, images["audio"].shape[0], audio, visual, **keep)
        a, v, tokens = self.finish(*self.run(images, draws))
        return patched.features(a, v, draws.batch_order(tokens), draws, audio is not None, visual is not None)

    @torch.no_grad()
    def fusion_attention(
        self, audio: Tensor | None = None, visual: Tensor | None = None, **keep: Keep | None
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """How much the fusion tokens of each fusion layer read from each patch; arguments as of :meth:`encode`.

        Returns:
            By layer, p ``(B, heads, F, Na)`` over audio and r ``(B, heads, F, Nv)`` over visual patches, each adding up
            to 1; the weight of a pair is their product. Padded with zeros where the kept patches differ in number. For
            ``fusion_arch="factorized"`` see :meth:`avfast.nn.fusion.FusionBlock.weights`.

        Raises:
            ValueError: for ``fusion_arch="token"``, whose one softmax has no such factors.
        """
        draws, states = self.trace(audio, visual, **keep)
        maps = {}
        for index in self.fusion_layers:
            a, v, tokens = states[index]
            p, r = self.fusion_blocks[str(index)].weights(tokens, *self.patches(add(*a), add(*v), draws))
            maps[index] = draws.batch_order(p), draws.batch_order(r)
        return maps

    def trace(
        self, audio: Tensor | None, visual: Tensor | None, **keep: Keep | None
    ) -> tuple[FusionDraws, list[Streams]]:
        """Draws of kept patches, default all given ones, and the streams before and after all layers."""
        images = self.images(audio, visual)
        draws = patched.undrawn(self, len(images["audio"]), audio, visual, **keep)
        states: list[Streams] = []
        self.run(images, draws, states)
        return draws, states

    def figures(self, inputs: dict[str, Tensor], draws: FusionDraws, output: Output) -> Figures:
        """The reconstruction, and the weights of the first, the middle and the last fusion layer."""
        audio, visual = inputs["audio"], inputs["visual"]
        images = self.images(audio, visual)
        shown = patched.reconstruction_figure(output.reconstruction, images, self.parts, draws, self.normalised)
        # under "token" one softmax over both modalities gives weights that are no product
        if self.fusion_arch == "token" or not self.fusion_layers:
            return Figures(shown)
        return Figures(shown, attention_maps(self.fusion_attention(audio, visual), self.parts, audio, visual))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layer and block activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable
        for decoder in self.decoders.values():
            cast(PatchDecoder, decoder).grad_checkpointing = enable

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """``"unimodal"``, see ``unimodal_parts``, and ``"fusion"``, all others."""
        groups: dict[str, list[nn.Parameter]] = {"unimodal": [], "fusion": []}
        for name, parameter in self.named_parameters():
            groups["unimodal" if name.startswith(self.unimodal_parts) else "fusion"].append(parameter)
        return groups

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, the units of sharding."""
        return [m for m in self.modules() if isinstance(m, (PackedBlock, ContextBlock, FusionBlock))]

    @torch.no_grad()
    def load_pretrained(self, image: checkpoints.Source | None = None, audio: checkpoints.Source | None = None) -> None:
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
        if image is not None:
            load_mae(image, self.blocks_v, self.norm_v, self.patch_embed)
        if audio is not None:
            load_mae(audio, self.blocks_a, self.norm_a, self.patch_embed_a, transposed=True)

    @classmethod
    def from_released(
        cls,
        checkpoint: str | Path | Mapping[str, Tensor],
        *,
        resizing: checkpoints.Resizing = "cut",
        **settings: Any,
    ) -> DeepAVFusion:
        """Load a released pre-training checkpoint, with or without its decoders, with the released settings.

        Arguments and errors are those of :meth:`avfast.AVSiam.from_released`.
        """
        return checkpoints.build(cls, deepavfusion.convert, checkpoint, settings, resizing)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"fusion_arch={self.fusion_arch!r}, fusion_layers={self.fusion_layers}"
