"""CAV-MAE: separate encoders for audio and frames, and one joint layer.

Gong et al., Contrastive Audio-Visual Masked Autoencoder, ICLR 2023.

Audio and visual tokens pass through encoders of their own, then through the joint layer three times with three sets of
LayerNorms: audio alone and visual alone (their means are contrasted), and both together (reconstructed by the decoder).
Here the three passes are one packed pass over [both; audio; visual].

Paper and released code agree but for: the contrastive loss has one direction, visual to audio (the paper's formula sums
over the other one); positions are fixed sine-cosine tables. ``mask_ratios`` with several ratios gives the multi-ratio
masking of AVSiam's supplement, Table 3; ``reconstruction_weight=0`` gives CAV.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from avfast import checkpoints
from avfast.masking import Structure
from avfast.models import patched
from avfast.models.masked_pair import MaskedPair, PairDraws
from avfast.models.patched import embed_kept, init_weights, shared_plan
from avfast.nn import JointDecoder, PackedBlock, SplitLayerNorm, positions
from avfast.ops import AttentionPlan
from avfast.released import cav_mae
from avfast.tensors import float32_weights


class CAVMAE(MaskedPair):
    """CAV-MAE (see the head of this file).

    Args:
        img_size: height and width of a frame in pixels.
        patch_size: of frames and spectrograms.
        audio_size: spectrogram (frames, mel bins); patches are numbered frequency-major.
        embed_dim: D.
        depth: blocks of each encoder.
        joint_depth: joint layers.
        num_heads: heads.
        mlp_ratio: hidden width of the MLPs over D.
        decoder_embed_dim: width of the decoder.
        decoder_depth: its blocks; 0 builds no decoder.
        decoder_num_heads: its heads.
        audio_patch_size: of spectrograms, default ``patch_size``.
        mask_ratios: one fixed ratio, or several for multi-ratio masking.
        audio_structure: which audio patches are masked together.
        temperature: of the contrastive loss.
        contrastive_weight: 0 leaves the loss out.
        reconstruction_weight: 0 leaves the loss out.
        contrastive_direction: ``"visual_to_audio"``, ``"audio_to_visual"`` or ``"both"``.
        norm_pix: normalise the target patches.
        eps: of all LayerNorms.
        num_classes: builds the classification head.
        frontend: overrides for the audio front end.
    """

    sources = ()

    @float32_weights
    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        audio_size: tuple[int, int] = (1024, 128),
        embed_dim: int = 768,
        depth: int = 11,
        joint_depth: int = 1,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        *,
        audio_patch_size: int | None = None,
        mask_ratios: Sequence[float] = (0.75,),
        audio_structure: Structure = "unstructured",
        temperature: float = 0.05,
        contrastive_weight: float = 0.01,
        reconstruction_weight: float = 1.0,
        contrastive_direction: str = "visual_to_audio",
        norm_pix: bool = True,
        eps: float = 1e-5,
        num_classes: int | None = None,
        frontend: dict | None = None,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            audio_patch_size=audio_patch_size,
            audio_size=audio_size,
            embed_dim=embed_dim,
            mask_ratios=mask_ratios,
            audio_structure=audio_structure,
            temperature=temperature,
            contrastive_weight=contrastive_weight,
            reconstruction_weight=reconstruction_weight,
            norm_pix=norm_pix,
            frontend=frontend,
        )
        self.contrastive_direction = contrastive_direction
        embed, embed_a = self.patch_embed, self.patch_embed_a
        self.pos_embed = positions(embed_dim, embed.grid_size)
        self.pos_embed_a = positions(embed_dim, embed_a.grid_size)
        self.modality_a = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.modality_v = nn.Parameter(torch.zeros(1, 1, embed_dim))
        nn.init.normal_(self.modality_a, std=0.02)
        nn.init.normal_(self.modality_v, std=0.02)
        block = {"dim": embed_dim, "num_heads": num_heads, "mlp_ratio": mlp_ratio, "eps": eps}
        self.blocks_a = nn.ModuleList(PackedBlock(**block) for _ in range(depth))
        self.blocks_v = nn.ModuleList(PackedBlock(**block) for _ in range(depth))
        self.blocks_u = nn.ModuleList(PackedBlock(**block, norm_sets=3) for _ in range(joint_depth))
        self.norm = SplitLayerNorm(embed_dim, 3, eps)
        if decoder_depth:
            self.decoder = JointDecoder(
                embed_dim, decoder_embed_dim, decoder_depth, decoder_num_heads,
                (embed_a.grid_size, embed.grid_size), (embed_a.values, embed.values), mlp_ratio, eps,
                train_positions=False,
            )  # fmt: skip
        self.apply(init_weights)
        self.head = None
        if num_classes is not None:
            self.head = nn.Sequential(nn.LayerNorm(embed_dim, eps=eps), nn.Linear(embed_dim, num_classes))

    def unimodal(self, audio: Tensor, visual: Tensor, draws: PairDraws) -> tuple[Tensor, Tensor]:
        kept_a, kept_v, plans = draws.audio_keep, draws.visual_keep, draws.plans
        a = embed_kept(self.patch_embed_a, self.pos_embed_a, audio, kept_a)
        v = embed_kept(self.patch_embed, self.pos_embed, visual, kept_v)
        a = self.run_blocks(self.blocks_a, a + self.modality_a[0], plans["audio"])
        v = self.run_blocks(self.blocks_v, v + self.modality_v[0], plans["visual"])
        return a, v

    def joint_layer(self, x: Tensor, plan: AttentionPlan, sizes: tuple[int, int, int]) -> Tensor:
        """One packed pass over rows of which ``sizes`` are under the joint, the audio and the visual norms."""
        return self.run_blocks(self.blocks_u, x, plan, sizes, self.norm)

    def contrasted(self, audio: Tensor, visual: Tensor, draws: PairDraws) -> tuple[Tensor, Tensor]:
        rows = (audio.shape[0], visual.shape[0])
        a, v = self.joint_layer(torch.cat([audio, visual]), draws.plans["both"], (0, *rows)).split(rows)
        return a, v

    def fuse(self, joined: Tensor, plan: AttentionPlan) -> Tensor:
        return self.joint_layer(joined, plan, (joined.shape[0], 0, 0))

    def classify(self, audio: Tensor | None = None, visual: Tensor | None = None, *, missing: bool = False) -> Tensor:
        """Class logits.

        Args:
            audio: ``(B, frames, mels)`` or None.
            visual: ``(B, 3, H, W)``, ``(B, F, 3, H, W)`` for several frames, or None.
            missing: for a model fine-tuned on both modalities and tested on one: average the joint layer's features
                under the joint and the modality's own norms (released modes ``missingaudioonly`` and
                ``missingvideoonly``).

        Returns:
            ``(B, num_classes)``, or ``(B, F, num_classes)`` for several frames.

        Raises:
            RuntimeError: if the model was built without ``num_classes``.
        """
        if self.head is None:
            raise RuntimeError("this model has no classification head; build it with num_classes")
        frames = visual.shape[1] if visual is not None and visual.ndim == 5 else None
        if visual is not None and frames is not None:
            visual = visual.flatten(0, 1)
            audio = None if audio is None else audio.repeat_interleave(frames, 0)
        images = self.images(audio, visual)
        batch, draws = len(images["audio"]), patched.undrawn(self, len(images["audio"]), audio, visual)
        a, v = self.unimodal(images["audio"], images["visual"], draws)
        if audio is not None and visual is not None:
            tokens = self.fuse(draws.join(a, v), draws.plans["joined"])
            pooled = tokens.unflatten(0, (batch, -1)).mean(1)
        else:
            own = a if audio is not None else v
            rows = len(own)
            sizes = (rows * missing, rows * (own is a), rows * (own is v))
            plan = shared_plan((rows // batch,) * batch * (1 + missing), own.device)
            x = self.joint_layer(own.repeat(1 + missing, 1), plan, sizes)
            pooled = x.unflatten(0, (1 + missing, batch, -1)).mean(2).mean(0)
        logits = self.head(pooled)
        return logits if frames is None else logits.unflatten(0, (-1, frames))

    def load_pretrained(self) -> None:
        """Nothing: this model starts from no other's weights."""

    @classmethod
    def from_released(
        cls,
        checkpoint: str | Path | Mapping[str, Tensor],
        *,
        resizing: checkpoints.Resizing = "cut",
        **settings: Any,
    ) -> CAVMAE:
        """Load a released pre-training or fine-tuning checkpoint.

        Args:
            checkpoint: path of a ``.pth`` or ``.safetensors`` file, or its state dict.
            resizing, settings: as in :meth:`avfast.AVSiam.from_released`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: naming the file, if it is no checkpoint; listing unknown, missing and misshapen entries.
        """
        return checkpoints.build(cls, cav_mae.convert, checkpoint, settings, resizing)
