"""MAViL and DiffMAViL: two masked autoencoders, fused by a transformer, that contrast modalities and views.

Huang et al., MAViL: Masked Audio-Video Learners, NeurIPS 2023 (stages 1 and 2); Nunez et al., Diffusion Models as
Masked Audio-Video Learners, 2024, whose text tells more of MAViL's stage 1 than any code that was released.

Two random views of each modality pass through its encoder as one batch. InfoNCE tells the means of audio and video of
a clip from others' (inter-modal), and the means of its two views (intra-modal). The fused tokens of the first view go
to a decoder of their own modality, which predicts the patches that this view lacks. DiffMAViL is MAViL with two
switches: ``mask_content="diffused"``, noised patches for mask tokens; ``decoder_attention="cross"``, masked video
patches that read the visible ones alone. Patches are masked before they are embedded, under every setting.

MAViL's training code was never released. What papers and other code leave open:

=====================  ===============================================================================================
keyword                choice
=====================  ===============================================================================================
inter_weight, ...      0.1 and 0.01, temperatures 0.1 and 1.0: as we recollect MAViL's; neither checked nor in the
                       text of Nunez et al.
rounding               "floor", as AudioMAE, mae_st and the counts of Table 5; the text rounds to the nearest number
timesteps              one per "clip", default, or one per "batch"; modalities draw their own
norm_pix               on as in AudioMAE and mae_st; off for DiffMAViL, whose formula has no normalisation
final_norm             encoders and fusion end with a LayerNorm; the released inference model has none
target_frames          all frames are predicted; mae_st predicts 8 of 16
audio_decoder          8 blocks of local attention (AudioMAE's release: 16), windows shifted in time alone
class tokens           of both encoders, through the fusion, as the released model; decoders drop them, but for a class
                       token of its own in a video decoder of self-attention (mae_st) and audio's in a global one
positions              fixed sine-cosine; of videos time plus place (MAViL's release: other channels for each)
negatives              of all processes; both directions of InfoNCE; features without projection head
no time embedding      nothing tells a decoder the timestep
weights at start       random; ``load_pretrained`` takes AudioMAE's and mae_st's encoders
stage 2                ``teacher``: mean squared error to its fused tokens of the whole pair, in place of pixels
=====================  ===============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from avfast import checkpoints
from avfast.hub import HubMixin
from avfast.masking import Rounding
from avfast.models.branch import Branch, Fusion, MaskContent, classifier, reconstructions, transformer_blocks
from avfast.models.contract import Features, Figures, Output
from avfast.models.distillation import Teacher, token_mse
from avfast.models.views import Masking, Timesteps, ViewDraws, check_given, counted, draw_views, present_rows
from avfast.ops import info_nce
from avfast.packing import take_rows
from avfast.released import audio_mae, mae_st, mavil
from avfast.tensors import float32_weights, untraced, with_defaults

if TYPE_CHECKING:
    from avfast.data.frontend import Frontend

NAMES = ("audio", "visual")
Head = Literal["audio", "visual", "fused"]


class MAViL(nn.Module, HubMixin):
    """MAViL (see the head of this file).

    Args:
        img_size: height and width of a frame in pixels.
        num_frames: of a video, T.
        tubelet_size: frames of a video patch.
        patch_size: of frames and spectrograms.
        audio_size: spectrogram (frames, mel bins). Patches are numbered time-major, so the position table of a shorter
            spectrogram is the beginning of a longer one's.
        embed_dim: D.
        depth: blocks of each encoder.
        num_heads: of encoders and fusion.
        mlp_ratio: hidden width of the MLPs over the width of the block.
        fusion_depth: blocks over [audio; video] tokens.
        decoder_embed_dim: width of the decoders.
        decoder_depth: their blocks; 0 builds none.
        decoder_num_heads: their heads.
        audio_decoder: ``"local"``: attention within windows of 4 x 4 patches; ``"global"``.
        mask_ratio: share of masked patches, or its first and last value of a linear course over the epochs.
        mask_content: what stands in for masked patches in the decoders: a ``"token"``, or the patches themselves,
            ``"diffused"``.
        decoder_attention: of the video decoder, ``"self"`` or ``"cross"``.
        decode_fraction: of the masked video patches, in training; below 1 only with ``"cross"``, where a prediction
            does not depend on the others.
        norm_pix: normalise the target patches.
        inter_weight: weight of the inter-modal loss; 0 leaves it out.
        intra_weight: weight of each intra-modal loss; 0 leaves them and the second views out.
        inter_temperature: of the inter-modal loss.
        intra_temperature: of the intra-modal losses.
        teacher: stage 2: a checkpoint (a file, or a state dict) of a model of stage 1 with the same encoders and
            fusion, whose fused tokens are predicted in place of pixels. It is neither trained nor saved.
        final_norm: encoders and fusion end with a LayerNorm.
        target_frames: so many frames of a video are predicted, one per tubelet; default all.
        rounding: of the number of kept patches: ``"floor"`` or ``"nearest"``.
        timesteps: the diffusion draws one per ``"clip"`` or per ``"batch"``.
        num_classes: builds classification heads.
        heads: which: ``"audio"`` and ``"visual"`` on the encoders, ``"fused"``.
        frontend: overrides for the audio front end.

    Raises:
        ValueError: on settings that contradict each other.
    """

    passes = ("joint",)
    sources = ("audio", "video")

    @float32_weights
    def __init__(
        self,
        *,
        img_size: int = 224,
        num_frames: int = 16,
        tubelet_size: int = 2,
        patch_size: int = 16,
        audio_size: tuple[int, int] = (1024, 128),
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        fusion_depth: int = 2,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        audio_decoder: Literal["local", "global"] = "local",
        mask_ratio: float | tuple[float, float] = 0.8,
        mask_content: MaskContent = "token",
        decoder_attention: Literal["self", "cross"] = "self",
        decode_fraction: float = 1.0,
        norm_pix: bool = True,
        inter_weight: float = 0.1,
        intra_weight: float = 0.01,
        inter_temperature: float = 0.1,
        intra_temperature: float = 1.0,
        teacher: str | dict | None = None,
        final_norm: bool = True,
        target_frames: int | None = None,
        rounding: Rounding = "floor",
        timesteps: Timesteps = "clip",
        num_classes: int | None = None,
        heads: Sequence[Head] = ("audio", "visual", "fused"),
        frontend: dict | None = None,
    ) -> None:
        super().__init__()
        if audio_decoder not in ("local", "global"):
            raise ValueError(f"audio_decoder must be local or global, got {audio_decoder!r}")
        if decoder_attention not in ("self", "cross"):
            raise ValueError(f"decoder_attention must be self or cross, got {decoder_attention!r}")
        if not 0 < decode_fraction <= 1 or (decode_fraction < 1 and decoder_attention != "cross"):
            raise ValueError(
                f"decode_fraction must be in (0, 1], and 1 unless decoder_attention is cross, got {decode_fraction}"
            )
        frames, mels = audio_size
        self.masking, self.decode_fraction = Masking(mask_ratio, rounding, timesteps), decode_fraction
        self.inter_weight, self.intra_weight = inter_weight, intra_weight
        self.inter_temperature, self.intra_temperature = inter_temperature, intra_temperature
        self.frontend_args = {
            "num_frames": frames, "num_mel_bins": mels, "image_size": img_size, "video_frames": num_frames,
            **(frontend or {}),
        }  # fmt: skip
        shared: dict[str, Any] = {
            "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio,
            "final_norm": final_norm, "decoder_embed_dim": decoder_embed_dim, "decoder_depth": decoder_depth,
            "decoder_num_heads": decoder_num_heads, "mask_content": mask_content, "norm_pix": norm_pix,
            "values": None if teacher is None else embed_dim,
        }  # fmt: skip
        local = audio_decoder == "local"
        self.audio = Branch(
            (frames, mels), (patch_size, patch_size), attention="local" if local else "self",
            decoder_cls="none" if local else "encoder", **shared,
        )  # fmt: skip
        self.visual = Branch(
            (num_frames, img_size, img_size), (tubelet_size, patch_size, patch_size), attention=decoder_attention,
            decoder_cls="none" if decoder_attention == "cross" else "own", target_frames=target_frames, stream=1,
            **shared,
        )  # fmt: skip
        self.masking.check(self.audio.num_patches, self.visual.num_patches)
        self.fusion = Fusion(embed_dim, fusion_depth, num_heads, mlp_ratio, final_norm)
        self.heads = nn.ModuleDict()
        if num_classes is not None:
            for name in heads:
                if name not in get_args(Head):
                    raise ValueError(f"heads must be of {', '.join(get_args(Head))}, got {name!r}")
                self.heads[name] = classifier(embed_dim * (2 if name == "fused" else 1), num_classes)
        self.teacher: Teacher | None = None
        if teacher is not None:
            whole = {k: v for k, v in shared.items() if k not in ("values", "decoder_depth")} | {"rounding": rounding}
            model = MAViL(
                img_size=img_size, num_frames=num_frames, tubelet_size=tubelet_size, patch_size=patch_size,
                audio_size=audio_size, fusion_depth=fusion_depth, mask_ratio=mask_ratio, decoder_depth=0, **whole,
            )  # fmt: skip
            self.teacher = Teacher(model, teacher)

    @cached_property
    def frontend(self) -> Frontend:
        """What turns waveforms and videos into this model's inputs: filter banks over twice their deviation."""
        from avfast.data.frontend import MAViLFrontend

        return MAViLFrontend(**self.frontend_args)

    @property
    def branches(self) -> dict[str, Branch]:
        """By modality."""
        return {"audio": self.audio, "visual": self.visual}

    @property
    def views(self) -> int:
        """How often each input is masked."""
        return 2 if self.intra_weight else 1

    def visible(self, progress: float) -> float:
        """Share of patches that the encoders see at a point of training."""
        return self.masking.visible(progress)

    # Random choices.

    def draw(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        *,
        has_audio: Iterable[bool] | None = None,
        has_visual: Iterable[bool] | None = None,
        **given: Any,
    ) -> ViewDraws:
        """Every random choice of a pass; for what else can be given see :func:`avfast.models.views.draw_views`.

        Args:
            batch_size: instances on this process.
            generator: seeds a stand-alone draw; default torch's global generator.
            has_audio: per instance, whether it has audio, default all. One that lacks a modality counts in the
                intra-modal loss of the other alone.
            has_visual: likewise.
        """
        fractions = {"visual": self.decode_fraction if self.training else 1.0}
        drawn, noise = draw_views(
            self.branches, self.masking, batch_size, generator, views=self.views,
            fractions=fractions, **given,
        )  # fmt: skip
        has_audio, has_visual = (None if has is None else list(has) for has in (has_audio, has_visual))
        rows = [present_rows(batch_size, *has) for has in ((has_audio,), (has_visual,), (has_audio, has_visual))]
        whole = None if self.teacher is None else (self.audio.num_patches, self.visual.num_patches)
        return ViewDraws("joint", drawn["audio"], drawn["visual"], noise, rows[0], rows[1], rows[2], whole)

    @untraced
    def placed(self, draws: ViewDraws | None, images: dict[str, Tensor], given: dict[str, bool]) -> ViewDraws:
        """Draws with plans on the inputs' device; None are drawn."""
        batch = len(images["audio"])
        if draws is None:
            has = [None if given[name] else (False,) * batch for name in NAMES]
            draws = self.draw(batch, has_audio=has[0], has_visual=has[1])
        return draws.to(images["audio"].device)

    # The model.

    def images(self, audio: Tensor | None, visual: Tensor | None) -> dict[str, Tensor]:
        """Both inputs checked, with channels, an absent one as zeros."""
        inputs = {"audio": audio, "visual": visual}
        given = [x for x in inputs.values() if x is not None]
        if not given:
            raise ValueError("give audio, visual or both")
        if len(sizes := [x.shape[0] for x in given]) == 2 and sizes[0] != sizes[1]:
            raise ValueError(f"audio and visual must pair up, got batches of {sizes[0]} and {sizes[1]}")
        return {
            name: branch.blank(given[0]) if (x := inputs[name]) is None else branch.image(name, x)
            for name, branch in self.branches.items()
        }

    def forward(
        self, audio: Tensor | None = None, visual: Tensor | None = None, draws: ViewDraws | None = None
    ) -> Output:
        """One pre-training pass.

        Args:
            audio: ``(B, frames, mels)`` normalised log-mel.
            visual: ``(B, 3, T, H, W)`` normalised video.
            draws: from :meth:`draw`; default drawn here, without what is not given.

        Returns:
            Losses ``reconstruction_audio`` and ``reconstruction_visual`` (in stage 2 ``distillation_...``),
            ``inter_modal``, ``intra_modal_audio``, ``intra_modal_visual``, each contrast with its accuracy; in
            evaluation mode the predictions ``(B, M, P)`` of the masked patches.
        """
        images = self.images(audio, visual)
        given = {"audio": audio is not None, "visual": visual is not None}
        if draws is None or draws.plans is None or draws.audio.kept.device != images["audio"].device:
            draws = self.placed(draws, images, given)
        batch, sides = images["audio"].shape[0], draws.sides()
        for name, rows in draws.rows().items():
            check_given(name, sides[name], rows, batch, given[name], self.views)
        tokens = {
            name: branch.encode(images[name], sides[name].plan("encoder"), sides[name].kept)
            for name, branch in self.branches.items()
        }
        losses, metrics = self.contrast(tokens, draws)
        weights = {"inter_modal": self.inter_weight}
        weights |= {f"intra_modal_{name}": self.intra_weight for name in NAMES}
        predicted: dict[str, Tensor] = {}
        if self.audio.decoder is not None:
            fused = self.fusion(tokens["audio"][:batch], tokens["visual"][:batch], draws.plan("fusion"))
            features = {} if self.teacher is None else self.teacher.features(images, draws)
            for name, branch in self.branches.items():
                side = sides[name]
                predicted[name] = branch.decode(fused[name], images[name], side, draws.noise)
                ids = counted(side.masked, draws.pair_rows)
                if features:
                    losses[f"distillation_{name}"] = token_mse(predicted[name], features[name], ids)
                else:
                    losses[f"reconstruction_{name}"] = branch.reconstruction_loss(predicted[name], images[name], ids)
        if not losses:
            raise RuntimeError("this model was built without a decoder and without contrast: it has no loss")
        loss = torch.stack([weights.get(name, 1.0) * term for name, term in losses.items()]).sum()
        shown = {} if self.training or self.teacher else predicted
        return Output(loss, losses, metrics, shown)

    def contrast(self, tokens: dict[str, Tensor], draws: ViewDraws) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The contrastive losses, and accuracies, of encoder tokens ``(V * B, 1 + K, D)``."""
        wide = torch.promote_types(tokens["audio"].dtype, torch.float32)
        pooled = {name: x[:, 1:].mean(1, dtype=wide).unflatten(0, (self.views, -1)) for name, x in tokens.items()}
        pairs = []
        if self.inter_weight:
            sides = pooled["audio"][0], pooled["visual"][0]
            pairs.append(("inter_modal", *sides, draws.pair_rows, self.inter_temperature))
        if self.intra_weight:
            for name, rows in draws.rows().items():
                pairs.append((f"intra_modal_{name}", *pooled[name], rows, self.intra_temperature))
        losses, metrics = {}, {}
        for name, first, second, rows, temperature in pairs:
            if rows is not None:
                first, second = take_rows(first, rows), take_rows(second, rows)
            losses[name], metrics[f"{name}_accuracy"] = info_nce(first, second, temperature)
        return losses, metrics

    # Features and figures.

    def encode(self, audio: Tensor | None = None, visual: Tensor | None = None) -> Features:
        """Features of the patches after the final norms, without masking.

        Args:
            audio: ``(B, frames, mels)`` or None.
            visual: ``(B, 3, T, H, W)`` or None.

        Returns:
            ``audio`` ``(B, Na, D)``, ``visual`` ``(B, Nv, D)`` and, with both, ``fused`` ``(B, Na + Nv, D)`` in the
            order [audio; visual], without class tokens.
        """
        inputs = {"audio": audio, "visual": visual}
        images = self.images(audio, visual)
        tokens = {name: self.branches[name].encode(images[name]) for name, x in inputs.items() if x is not None}
        fused = torch.cat([x[:, 1:] for x in self.fusion(**tokens).values()], 1) if len(tokens) == 2 else None
        alone = {name: tokens[name][:, 1:] if name in tokens else None for name in NAMES}
        return Features(alone["audio"], alone["visual"], fused)

    def classify(self, audio: Tensor | None = None, visual: Tensor | None = None) -> Tensor:
        """Class logits ``(B, num_classes)`` of the mean over patches, as in the fine-tuned release.

        An encoder's patches are taken before its final norm.

        Args:
            audio: ``(B, frames, mels)`` or None.
            visual: ``(B, 3, T, H, W)`` or None. With both, the head on fused tokens answers: on the means of audio and
                of video patches.

        Raises:
            RuntimeError: if the model was built without that head.
        """
        inputs = {name: x for name, x in (("audio", audio), ("visual", visual)) if x is not None}
        head = "fused" if len(inputs) == 2 else next(iter(inputs), "audio")
        if head not in self.heads:
            raise RuntimeError(f"this model has no {head} classification head; build it with num_classes and heads")
        images = self.images(audio, visual)
        tokens = {name: self.branches[name].encode(images[name], normed=len(inputs) == 2) for name in inputs}
        if len(inputs) == 2:
            tokens = self.fusion(**tokens)
        return self.heads[head](torch.cat([x[:, 1:].mean(1) for x in tokens.values()], 1))

    def figures(self, inputs: dict[str, Tensor], draws: ViewDraws, output: Output) -> Figures:
        """The reconstruction, of a video its middle frame; with diffusion the noised input; none in stage 2."""
        images = self.images(inputs.get("audio"), inputs.get("visual"))
        draws = draws.to(images["audio"].device)
        return reconstructions(self.branches, images, draws.sides(), draws.noise, output.reconstruction)

    # Training machinery.

    @property
    def contrasts(self) -> bool:
        """Whether a loss tells pairs of audio and video apart."""
        return bool(self.inter_weight)

    @property
    def has_unused_parameters(self) -> bool:
        """Whether a forward pass leaves some parameters without gradient: heads, and fusion without decoders."""
        return bool(self.heads) or self.audio.decoder is None

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All parameters alike."""
        return {"all": list(self.parameters())}

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, the units of sharding."""
        return transformer_blocks(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass instead of keeping them."""
        self.fusion.grad_checkpointing = enable
        for branch in self.branches.values():
            branch.set_grad_checkpointing(enable)

    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> MAViL:
        """Moves and casts the teacher too, which is no part of this module otherwise."""
        if self.teacher is not None:
            self.teacher.model._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    @torch.no_grad()
    def load_pretrained(self, audio: checkpoints.Source | None = None, video: checkpoints.Source | None = None) -> None:
        """Start the encoders from masked autoencoders of one modality; positions are the checkpoints'.

        Args:
            audio: AudioMAE's pre-training checkpoint or state dict.
            video: mae_st's (Feichtenhofer et al., Masked Autoencoders As Spatiotemporal Learners).

        Raises:
            ValueError: listing keys or shapes that do not fit.
        """
        for source, branch, start in ((audio, self.audio, audio_mae.start), (video, self.visual, mae_st.start)):
            if source is not None:
                with checkpoints.naming(source):
                    start(branch, checkpoints.load(source))

    @classmethod
    def from_released(
        cls,
        checkpoint: str | Path | Mapping[str, Tensor],
        *,
        resizing: checkpoints.Resizing = "cut",
        **settings: Any,
    ) -> MAViL:
        """Load the released inference model: pre-trained, or fine-tuned on audio, video or both. It has no decoders.

        Arguments and errors are those of :meth:`avfast.AudioMAE.from_released`; the checkpoint's frames are of 224
        pixels, or of ``img_size`` where its positions are none of 224.
        """
        return checkpoints.build(cls, mavil.convert, checkpoint, settings, resizing, audio_mae.fill)


class DiffMAViL(MAViL):
    """:class:`MAViL` with other defaults: ``mask_content="diffused"``, ``decoder_attention="cross"`` and
    ``norm_pix=False``.
    """

    __init__ = with_defaults(MAViL.__init__, mask_content="diffused", decoder_attention="cross", norm_pix=False)
