"""AudioMAE: a masked autoencoder that listens, with a decoder of local attention, and the same with diffusion.

Huang et al., Masked Autoencoders that Listen, NeurIPS 2022; with ``mask_content="diffused"`` as in Nunez et al.,
Diffusion Models as Masked Audio-Video Learners, appendix E.

Where papers and released code disagree or say nothing, and what is done here:

=====================  =======================================  =======================================================
topic, keyword         paper                                    released code
=====================  =======================================  =======================================================
decoder_depth          16 local blocks; DiffMAViL 8, default    16, whatever its setting says; ``from_released`` reads
                                                                it from the checkpoint
shift of windows       both axes                                time alone, by 2 in every other block, as here
rounding               DiffMAViL: to the nearest number         "floor", default
positions              fixed sine-cosine, here on the grid      laid out for (mel, time) while patches run (time, mel);
                       (time, mel) of the patches               ``from_released`` keeps what the checkpoint holds
timesteps              one per iteration or one per clip: not   none
                       told; "clip", default, or "batch"
norm_pix               DiffMAViL's formula has none             on, default
dropout                none                                     0.1 on the position bias in training; none here
=====================  =======================================  =======================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from avfast import checkpoints
from avfast.hub import HubMixin
from avfast.masking import Rounding
from avfast.models.branch import Branch, MaskContent, classifier, reconstructions, transformer_blocks
from avfast.models.contract import Draws, Features, Figures, Output
from avfast.models.views import (
    BranchDraws,
    Masking,
    Noise,
    Timesteps,
    check_given,
    counted,
    draw_views,
    present_rows,
)  # fmt: skip
from avfast.released import audio_mae
from avfast.tensors import float32_weights, untraced

if TYPE_CHECKING:
    from avfast.data.frontend import Frontend


@dataclass(frozen=True, eq=False)
class AudioDraws(Draws):
    """The random choices of a step.

    Args:
        audio: kept and masked patches.
        noise: of the diffusion; None with mask tokens.
        rows: batch rows that have audio; None for all.
    """

    audio: BranchDraws
    noise: Noise | None
    rows: Tensor | None

    def to(self, device: torch.device | str) -> AudioDraws:
        """On a device, with plans there."""
        moved = super().to(device)
        return replace(moved, audio=moved.audio.planned(torch.device(device)))


class AudioMAE(nn.Module, HubMixin):
    """AudioMAE (see the head of this file).

    Args:
        audio_size: spectrogram (frames, mel bins). Patches are numbered time-major, so the position table of a shorter
            spectrogram is the beginning of a longer one's.
        patch_size: of spectrograms.
        embed_dim: D.
        depth: blocks of the encoder.
        num_heads: their heads.
        mlp_ratio: hidden width of the MLPs over the width of the block.
        decoder_embed_dim: width of the decoder.
        decoder_depth: its blocks; 0 builds none.
        decoder_num_heads: their heads.
        decoder: ``"local"``: attention within windows of 4 x 4 patches; ``"global"``.
        mask_ratio: share of masked patches, or its first and last value of a linear course over the epochs.
        mask_content: what stands in for masked patches in the decoder: a ``"token"``, or the patches themselves,
            ``"diffused"``.
        norm_pix: normalise the target patches.
        final_norm: the encoder ends with a LayerNorm; a fine-tuned release does not.
        rounding: of the number of kept patches: ``"floor"`` or ``"nearest"``.
        timesteps: the diffusion draws one per ``"clip"`` or per ``"batch"``.
        num_classes: builds the classification head.
        frontend: overrides for the audio front end.
    """

    passes = ("joint",)
    sources = ("audio",)
    contrasts = False

    @float32_weights
    def __init__(
        self,
        *,
        audio_size: tuple[int, int] = (1024, 128),
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        decoder: Literal["local", "global"] = "local",
        mask_ratio: float | tuple[float, float] = 0.8,
        mask_content: MaskContent = "token",
        norm_pix: bool = True,
        final_norm: bool = True,
        rounding: Rounding = "floor",
        timesteps: Timesteps = "clip",
        num_classes: int | None = None,
        frontend: dict | None = None,
    ) -> None:
        super().__init__()
        if decoder not in ("local", "global"):
            raise ValueError(f"decoder must be local or global, got {decoder!r}")
        frames, mels = audio_size
        self.masking = Masking(mask_ratio, rounding, timesteps)
        self.frontend_args = {"num_frames": frames, "num_mel_bins": mels, **(frontend or {})}
        self.audio = Branch(
            (frames, mels), (patch_size, patch_size), embed_dim=embed_dim, depth=depth, num_heads=num_heads,
            mlp_ratio=mlp_ratio, final_norm=final_norm, decoder_embed_dim=decoder_embed_dim,
            decoder_depth=decoder_depth, decoder_num_heads=decoder_num_heads,
            attention="local" if decoder == "local" else "self",
            decoder_cls="none" if decoder == "local" else "encoder", mask_content=mask_content, norm_pix=norm_pix,
        )  # fmt: skip
        self.masking.check(self.audio.num_patches)
        self.head = None if num_classes is None else classifier(embed_dim, num_classes)

    @cached_property
    def frontend(self) -> Frontend:
        """What turns waveforms into this model's input: filter banks over twice their standard deviation."""
        from avfast.data.frontend import AudioMAEFrontend

        return AudioMAEFrontend(**self.frontend_args)

    def visible(self, progress: float) -> float:
        """Share of patches that the encoder sees at a point of training."""
        return self.masking.visible(progress)

    def draw(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        *,
        has_audio: Iterable[bool] | None = None,
        has_visual: Iterable[bool] | None = None,
        **given: Any,
    ) -> AudioDraws:
        """Every random choice of a pass; for what else can be given see :func:`avfast.models.views.draw_views`.

        Args:
            batch_size: instances on this process.
            generator: seeds a stand-alone draw; default torch's global generator.
            has_audio: per instance, whether it has audio, default all. Else no loss counts it.
            has_visual: not read.
        """
        branches = {"audio": self.audio}
        drawn, noise = draw_views(branches, self.masking, batch_size, generator, **given)
        return AudioDraws("joint", drawn["audio"], noise, present_rows(batch_size, has_audio))

    def forward(self, audio: Tensor, draws: AudioDraws | None = None) -> Output:
        """One pre-training pass.

        Args:
            audio: ``(B, frames, mels)`` normalised log-mel.
            draws: from :meth:`draw`; default drawn here.

        Returns:
            The loss ``reconstruction_audio``; in evaluation mode the predictions ``(B, M, P)`` of the masked patches.
        """
        image = self.audio.image("audio", audio)
        if draws is None or draws.audio.plans is None or draws.audio.kept.device != image.device:
            draws = self.placed(draws, image)
        check_given("audio", draws.audio, draws.rows, image.shape[0], True)
        tokens = self.audio.encode(image, draws.audio.plan("encoder"), draws.audio.kept)
        predicted = self.audio.decode(tokens, image, draws.audio, draws.noise)
        loss = self.audio.reconstruction_loss(predicted, image, counted(draws.audio.masked, draws.rows))
        shown = {} if self.training else {"audio": predicted}
        return Output(loss, {"reconstruction_audio": loss}, reconstruction=shown)

    @untraced
    def placed(self, draws: AudioDraws | None, image: Tensor) -> AudioDraws:
        """Draws with plans on the input's device; None are drawn."""
        return (self.draw(len(image)) if draws is None else draws).to(image.device)

    def encode(self, audio: Tensor) -> Features:
        """Features ``(B, N, D)`` of the patches after the final norm, without masking, from ``(B, frames, mels)``."""
        return Features(self.audio.encode(self.audio.image("audio", audio))[:, 1:], None, None)

    def classify(self, audio: Tensor) -> Tensor:
        """Class logits ``(B, num_classes)`` from ``(B, frames, mels)``: of the mean over patches before the final norm.

        Raises:
            RuntimeError: if the model was built without ``num_classes``.
        """
        if self.head is None:
            raise RuntimeError("this model has no classification head; build it with num_classes")
        tokens = self.audio.encode(self.audio.image("audio", audio), normed=False)
        return self.head(tokens[:, 1:].mean(1))

    def figures(self, inputs: dict[str, Tensor], draws: AudioDraws, output: Output) -> Figures:
        """The reconstruction; with diffusion the noised input."""
        image = self.audio.image("audio", inputs["audio"])
        draws = draws.to(image.device)
        sides = {"audio": self.audio}, {"audio": image}, {"audio": draws.audio}
        return reconstructions(*sides, draws.noise, output.reconstruction)

    # Training machinery.

    @property
    def has_unused_parameters(self) -> bool:
        """Whether a forward pass leaves some parameters without gradient: those of the classification head."""
        return self.head is not None

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All parameters alike."""
        return {"all": list(self.parameters())}

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, the units of sharding."""
        return transformer_blocks(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass instead of keeping them."""
        self.audio.set_grad_checkpointing(enable)

    def load_pretrained(self, audio: checkpoints.Source | None = None) -> None:
        """Start the encoder from AudioMAE's.

        Args:
            audio: its pre-training checkpoint or state dict. Positions are the checkpoint's: the first ones where its
                spectrogram is longer, interpolated where it is shorter or has other mel bins.

        Raises:
            ValueError: listing keys or shapes that do not fit.
        """
        if audio is not None:
            with checkpoints.naming(audio):
                audio_mae.start(self.audio, checkpoints.load(audio))

    @classmethod
    def from_released(
        cls,
        checkpoint: str | Path | Mapping[str, Tensor],
        *,
        resizing: checkpoints.Resizing = "cut",
        **settings: Any,
    ) -> AudioMAE:
        """Load a released checkpoint: pre-trained with its local or global decoder, or fine-tuned.

        Args:
            checkpoint: path of a ``.pth`` or ``.safetensors`` file, or its state dict.
            resizing: of positions for another ``audio_size``, see :meth:`avfast.AVSiam.from_released`.
            settings: overrides of the released settings. ``decoder_depth=0`` leaves the decoder out; another
                ``num_classes`` starts a new head.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: naming the file, if it is no checkpoint; listing unknown, missing and misshapen entries.
        """
        return checkpoints.build(cls, audio_mae.convert, checkpoint, settings, resizing, audio_mae.fill)
