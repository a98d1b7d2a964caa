"""AVSiam: one Vision Transformer for spectrograms and frames.

Lin and Bertasius, Siamese Vision Transformers are Scalable Audio-visual Learners, ECCV 2024.

Both modalities are patched, embedded and sent through the same transformer in one packed pass over the patches that
multi-ratio masking keeps. The mean tokens of a pair are contrasted; two fusion layers over [audio; visual] and a
decoder reconstruct the masked patches.

Where paper and released code disagree, the default is the paper's and a keyword gives the released behaviour:

========================  ==========================================  ==================================================
keyword                   default (paper)                             released code
========================  ==========================================  ==================================================
objective                 "joint": one pass serves both losses        "released": two passes, two Adam steps per batch
mask_ratios               0 ... 0.5, both losses                      contrastive pass: Base 0, .2, .4, .6, .8, Large
                                                                      0 ... .7; reconstruction pass: 0.75
audio_structure           "unstructured"                              "time_frequency" in the contrastive pass
shared_norms              False: every published number used a        False
                          LayerNorm set per modality
norm_pix                  True ("the same loss as CAV-MAE")           False (the setting is ignored)
stop_gradient             True (supplement, section 1)                Large yes, Base no
separate_mae_audio        False                                       Base: audio of the reconstruction pass runs in a
                                                                      copy of the encoder that is thrown away later
double_embedding          False                                       True: tokens enter as 2 * (patch + position)
eps, norm_eps             1e-6, 1e-6 (timm)                           1e-5 in blocks and heads, 1e-6 in the final norm
decoder_depth             6                                           Base 8, Large 6
fusion initialisation     last two encoder blocks                     Base pre-training: the last block twice (no
                                                                      keyword: released weights replace it)
loss                      sum over both directions / 2                the same (the paper's formula has one direction)
joint_head                "concat" of audio and visual means          Huge: "mean" over all fused tokens
========================  ==========================================  ==================================================

A plain block's LayerNorm becomes two affine sets, one per modality, and rows are packed audio first, so that one static
split serves them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfast import checkpoints
from avfast.masking import Structure, check_ratio
from avfast.models.masked_pair import MaskedPair, PairDraws
from avfast.models.patched import embed_kept, init_weights, shared_plan
from avfast.nn import JointDecoder, PackedBlock, positions
from avfast.nn.norm import layer_norm
from avfast.ops import AttentionPlan
from avfast.released import avsiam
from avfast.released.vit import ast_encoder, plain_vit, timm_vit, vit_grid, vit_settings
from avfast.tensors import float32_weights


class Encoder(nn.Module):
    """Transformer blocks and their final norm, for one or both modalities."""

    def __init__(
        self, dim: int, depth: int, num_heads: int, mlp_ratio: float, norm_sets: int, eps: float, norm_eps: float
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            PackedBlock(dim, num_heads, mlp_ratio, norm_sets=norm_sets, eps=eps) for _ in range(depth)
        )
        self.norm = layer_norm(dim, norm_sets, norm_eps)


class AVSiam(MaskedPair):
    """AVSiam (see the head of this file).

    Args:
        img_size: height and width of a frame in pixels.
        patch_size: of frames and spectrograms.
        audio_size: spectrogram (frames, mel bins); patches are numbered frequency-major.
        embed_dim: D.
        depth: encoder blocks.
        num_heads: of the encoder and the fusion layers.
        mlp_ratio: hidden width of the MLPs over D.
        fusion_depth: fusion layers.
        decoder_embed_dim: width of the decoder.
        decoder_depth: its blocks; 0 builds no decoder, for fine-tuning and features.
        decoder_num_heads: its heads.
        audio_patch_size: of spectrograms, default ``patch_size``.
        shared: one encoder for both modalities; False gives AVSep, one for each.
        shared_norms: one LayerNorm set for both modalities.
        objective: ``"joint"`` or ``"released"``.
        mask_ratios: one fixed ratio, or several for multi-ratio masking.
        reconstruction_ratio: of the released objective's reconstruction pass.
        audio_structure: which audio patches are masked together.
        temperature: of the contrastive loss.
        contrastive_weight: 0 leaves the loss out.
        reconstruction_weight: 0 leaves the loss out.
        norm_pix: normalise the target patches.
        stop_gradient: the reconstruction trains only fusion layers and decoder.
        separate_mae_audio: see the table; needs ``objective="released"``.
        double_embedding: see the table.
        eps: of the LayerNorms in blocks, decoder and heads.
        norm_eps: of the encoder's final LayerNorm.
        num_classes: builds the audio, visual and joint heads.
        joint_head: ``"concat"`` or ``"mean"``.
        frontend: overrides for the audio front end.

    Raises:
        ValueError: on settings that contradict each other.
    """

    sources = ("image", "spectrogram")

    @float32_weights
    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        audio_size: tuple[int, int] = (1024, 128),
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        fusion_depth: int = 2,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 6,
        decoder_num_heads: int = 16,
        *,
        audio_patch_size: int | None = None,
        shared: bool = True,
        shared_norms: bool = False,
        objective: str = "joint",
        mask_ratios: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
        reconstruction_ratio: float = 0.75,
        audio_structure: Structure = "unstructured",
        temperature: float = 0.05,
        contrastive_weight: float = 1.0,
        reconstruction_weight: float = 1.0,
        norm_pix: bool = True,
        stop_gradient: bool = True,
        separate_mae_audio: bool = False,
        double_embedding: bool = False,
        eps: float = 1e-6,
        norm_eps: float = 1e-6,
        num_classes: int | None = None,
        joint_head: str = "concat",
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
        if objective not in ("joint", "released"):
            raise ValueError(f'objective must be "joint" or "released", got {objective!r}')
        if separate_mae_audio and (objective == "joint" or not shared):
            raise ValueError('separate_mae_audio needs objective="released" and shared=True')
        if joint_head not in ("concat", "mean"):
            raise ValueError(f'joint_head must be "concat" or "mean", got {joint_head!r}')
        self.passes = ("joint",) if objective == "joint" else ("contrastive", "reconstruction")
        self.objective, self.reconstruction_ratio = objective, check_ratio(reconstruction_ratio)
        self.shared, self.stop_gradient, self.double_embedding = shared, stop_gradient, double_embedding
        self.separate_mae_audio, self.joint_head = separate_mae_audio, joint_head

        embed, embed_a = self.patch_embed, self.patch_embed_a
        self.pos_embed = positions(embed_dim, embed.grid_size, trained=True)
        self.pos_embed_a = positions(embed_dim, embed_a.grid_size, trained=True)
        shape = (embed_dim, depth, num_heads, mlp_ratio)
        self.encoder = Encoder(*shape, norm_sets=2 if shared and not shared_norms else 1, eps=eps, norm_eps=norm_eps)
        self.encoder_a = None
        if not shared or separate_mae_audio:
            self.encoder_a = Encoder(*shape, norm_sets=1, eps=eps, norm_eps=norm_eps)
        self.fusion = nn.ModuleList(PackedBlock(embed_dim, num_heads, mlp_ratio, eps=eps) for _ in range(fusion_depth))
        if decoder_depth:
            self.decoder = JointDecoder(
                embed_dim, decoder_embed_dim, decoder_depth, decoder_num_heads,
                (embed_a.grid_size, embed.grid_size), (embed_a.values, embed.values), mlp_ratio, eps,
            )  # fmt: skip
        self.apply(init_weights)
        self.copy_fusion()
        self.head_a = self.head_v = self.head_av = None
        if num_classes is not None:
            widths = (embed_dim, embed_dim, embed_dim * (2 if joint_head == "concat" else 1))
            self.head_a, self.head_v, self.head_av = (
                nn.Sequential(nn.LayerNorm(width, eps=eps), nn.Linear(width, num_classes)) for width in widths
            )

    def copy_fusion(self) -> None:
        """Start the fusion layers from the last encoder blocks, with the audio norms where there are two sets."""
        blocks = self.encoder.blocks[len(self.encoder.blocks) - len(self.fusion) :]
        for fusion, block in zip(self.fusion, blocks, strict=False):
            state = {k: v[0] if "norm" in k and v.ndim == 2 else v for k, v in block.state_dict().items()}
            fusion.load_state_dict(state)

    def masking(self, only: str) -> tuple[tuple[float, ...], Structure]:
        if only == "reconstruction":
            return (self.reconstruction_ratio,), "unstructured"
        return super().masking(only)

    def unimodal(self, audio: Tensor, visual: Tensor, draws: PairDraws) -> tuple[Tensor, Tensor]:
        kept_a, kept_v, plans = draws.audio_keep, draws.visual_keep, draws.plans
        cut = draws.only == "reconstruction" and self.stop_gradient
        with torch.no_grad() if cut else nullcontext():
            a = embed_kept(self.patch_embed_a, self.pos_embed_a, audio, kept_a)
            v = embed_kept(self.patch_embed, self.pos_embed, visual, kept_v)
            if self.double_embedding:
                a, v = 2 * a, 2 * v
            if not self.shared or (self.separate_mae_audio and draws.only == "reconstruction"):
                a = self.run_encoder(self.encoder_a, a, plans["audio"], (a.shape[0], 0))
                v = self.run_encoder(self.encoder, v, plans["visual"], (0, v.shape[0]))
            else:
                x = torch.cat([a, v])
                sizes = (a.shape[0], v.shape[0])
                a, v = self.run_encoder(self.encoder, x, plans["both"], sizes).split(sizes)
        return a, v

    def run_encoder(self, encoder: Encoder, x: Tensor, plan: AttentionPlan, sizes: tuple[int, int]) -> Tensor:
        """Blocks and final norm; ``sizes`` are the audio and the visual rows of ``x``."""
        return self.run_blocks(encoder.blocks, x, plan, sizes, encoder.norm)

    def contrasted(self, audio: Tensor, visual: Tensor, draws: PairDraws) -> tuple[Tensor, Tensor]:
        return audio, visual

    def fuse(self, joined: Tensor, plan: AttentionPlan) -> Tensor:
        return self.run_blocks(self.fusion, joined, plan)

    def reconstruct(self, a: Tensor, v: Tensor, draws: PairDraws) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if self.stop_gradient:
            a, v = a.detach(), v.detach()
        return super().reconstruct(a, v, draws)

    def classify(self, audio: Tensor | None = None, visual: Tensor | None = None) -> Tensor:
        """Class logits of the audio, the visual or the joint head, by what is given.

        Args:
            audio: ``(B, frames, mels)`` or None.
            visual: ``(B, 3, H, W)``, or ``(B, F, 3, H, W)``: audio is encoded once and fused with each frame.

        Returns:
            ``(B, num_classes)``, or ``(B, F, num_classes)`` for several frames. The papers average the sigmoid
            (AudioSet) or softmax (VGGSound) of the frames.

        Raises:
            RuntimeError: if the model was built without ``num_classes``.
        """
        if self.head_a is None or self.head_v is None or self.head_av is None:
            raise RuntimeError("this model has no classification heads; build it with num_classes")
        frames = visual.shape[1] if visual is not None and visual.ndim == 5 else None
        if visual is not None and frames is not None:
            visual = visual.flatten(0, 1)
        a = None if audio is None else cast(Tensor, self.encode(audio).audio)
        v = None if visual is None else cast(Tensor, self.encode(None, visual).visual)
        if v is None:
            return self.head_a(a.mean(1))
        if a is None:
            logits = self.head_v(v.mean(1))
        else:
            if len(a) * (frames or 1) != len(v):
                raise ValueError(f"audio and visual must pair up, got {len(a)} spectrograms and {len(v)} frames")
            a = a.repeat_interleave(frames or 1, 0)
            joined = torch.cat([a, v], 1)
            plan = shared_plan((joined.shape[1],) * len(a), joined.device)
            fused = self.fuse(joined.flatten(0, 1), plan).unflatten(0, (len(a), -1))
            parts = [fused[:, : a.shape[1]].mean(1), fused[:, a.shape[1] :].mean(1)]
            logits = self.head_av(torch.cat(parts, 1) if self.joint_head == "concat" else fused.mean(1))
        return logits if frames is None else logits.unflatten(0, (-1, frames))

    @classmethod
    def from_timm(
        cls, name: str = "vit_base_patch16_224.augreg_in21k", *, pretrained: bool = True, **settings: Any
    ) -> AVSiam:
        """Start from a timm Vision Transformer.

        The audio kernel is the mean of the RGB kernel and audio positions are the visual ones, nearest-interpolated
        as a flat sequence (released code); both modalities' norms and the fusion layers start from the transformer's.

        Args:
            name: timm model name.
            pretrained: load its weights (needs the network or a local cache).
            settings: further arguments of :class:`AVSiam`.

        Raises:
            ImportError: without timm.
            ValueError: if the model is no plain ViT, or does not fit the settings, for example in its patch size.
        """
        vit = timm_vit(name, pretrained, settings.get("img_size"))
        model = cls(**{**vit_settings(vit), **settings})
        with checkpoints.naming(name):
            model.load_vit(vit.state_dict())
        return model

    def load_pretrained(
        self, image: checkpoints.Source | None = None, spectrogram: checkpoints.Source | None = None
    ) -> None:
        """Start the encoder from a Vision Transformer's weights, see :meth:`load_vit`.

        Args:
            image: checkpoint or state dict in timm's names.
            spectrogram: an AST's checkpoint or state dict.
        """
        if image is not None:
            self.load_vit(checkpoints.load(image))
        if spectrogram is not None:
            self.load_vit(ast_encoder(checkpoints.load(spectrogram)))

    @torch.no_grad()
    def load_vit(self, state: Mapping[str, Tensor]) -> None:
        """Take encoder weights from a ViT's state dict (timm's names) and restart what derives from them.

        Class, distillation and register tokens are left out and LayerScale goes into the weights, see
        :func:`avfast.released.vit.plain_vit`. Positions of another grid are resized as a grid, bicubically; those of an
        image start audio's as in :meth:`from_timm`. A one-channel patch kernel is a spectrogram transformer's (AST): it
        is spread over RGB for frames, and audio takes the positions of as many frames as it has.

        Raises:
            ValueError: for another architecture, patch size or width, listing keys or shapes.
        """
        weights = plain_vit(state)
        if "pos_embed" not in weights:
            raise ValueError("no plain Vision Transformer: it has no pos_embed")
        kernel, positions = weights.pop("patch_embed.proj.weight"), weights.pop("pos_embed")
        bias, audio = weights.pop("patch_embed.proj.bias"), kernel.shape[1] == 1
        grid = cast(tuple[int, int], vit_grid(positions.shape[1], audio))
        loaded = {
            "patch_embed.proj.weight": kernel.expand(-1, 3, -1, -1) / 3 if audio else kernel,
            "patch_embed_a.proj.weight": kernel.mean(1, keepdim=True),
            "patch_embed.proj.bias": bias,
            "patch_embed_a.proj.bias": bias,
            "pos_embed": checkpoints.resize(positions, grid, self.patch_embed.grid_size),
        }
        if audio:
            patch, stride = kernel.shape[2], 10 if grid[0] == 12 else kernel.shape[2]
            reached = min(grid[1], (self.audio_size[0] - patch) // stride + 1)
            positions = positions.unflatten(1, grid)[:, :, :reached].flatten(1, 2)
            loaded["pos_embed_a"] = checkpoints.resize(positions, (grid[0], reached), self.patch_embed_a.grid_size)
        else:
            loaded["pos_embed_a"] = F.interpolate(positions.mT, self.patch_embed_a.num_patches).mT
        for name in ("encoder", "encoder_a"):
            if getattr(self, name) is not None:
                own = getattr(self, name).state_dict()
                for key, value in weights.items():
                    sets = key in own and own[key].ndim > value.ndim
                    loaded[f"{name}.{key}"] = value.expand(len(own[key]), -1) if sets else value
        checkpoints.load_into(self, loaded, optional=("fusion.", "decoder.", "head_"))
        self.copy_fusion()

    @classmethod
    def from_released(
        cls,
        checkpoint: str | Path | Mapping[str, Tensor],
        *,
        resizing: checkpoints.Resizing = "cut",
        **settings: Any,
    ) -> AVSiam:
        """Load a released pre-training or fine-tuning checkpoint with the released settings.

        Args:
            checkpoint: path of a ``.pth`` or ``.safetensors`` file, or its state dict.
            resizing: of positions for another ``img_size`` or ``audio_size``, said in the log. ``"cut"``: fewer frames
                of a spectrogram keep the first positions, as CAV-MAE's authors advise, and what else differs is
                interpolated over the grid, bicubically; ``"interpolate"``: so is that.
            settings: overrides of the released settings. ``decoder_depth=0`` and ``num_classes=None`` leave these parts
                out; other classes or another decoder than the checkpoint's start anew, with a warning.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: naming the file, if it is no checkpoint; listing unknown, missing and misshapen entries.
        """
        return checkpoints.build(cls, avsiam.convert, checkpoint, settings, resizing)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"objective={self.objective!r}, mask_ratios={self.mask_ratios}, shared={self.shared}"
