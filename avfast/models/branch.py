"""One modality of AudioMAE, MAViL and DiffMAViL: a masked autoencoder of a spectrogram or a video.

The encoder sees a class token and the patches that a view keeps; all instances keep equally many. The decoder predicts
the patches that the first view lacks. What stands in for them is a mask token, or the noised patches themselves (Nunez
et al., Diffusion Models as Masked Audio-Video Learners, B.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from avfast.models.branch_decoder import EPS, Attention, BranchDecoder, DecoderClass
from avfast.models.contract import Figures, Reconstruction
from avfast.models.patched import equal_plan, init_weights
from avfast.models.views import BranchDraws, Noise
from avfast.nn import CrossBlock, LocalBlock, PackedBlock, run_blocks
from avfast.nn.patches import PatchEmbed, patchify, positions, shown, table, unpatchify
from avfast.ops import AttentionPlan, NoiseSchedule, diffuse_patches, masked_patch_mse
from avfast.ops.masked_patch_mse import normalise_patches
from avfast.random import DrawKey
from avfast.tensors import untraced

if TYPE_CHECKING:
    import numpy as np

MaskContent = Literal["token", "diffused"]


class Branch(nn.Module):
    """One modality (see the head of this file).

    Args:
        size: of the input: (frames, mels), or (T, H, W).
        patch_size: along each of these axes.
        embed_dim: D.
        depth: blocks of the encoder.
        num_heads: their heads.
        mlp_ratio: hidden width of all MLPs over the width of the block.
        final_norm: the encoder ends with a LayerNorm.
        decoder_embed_dim: width of the decoder.
        decoder_depth: its blocks; 0 builds none.
        decoder_num_heads: their heads.
        attention: kind of decoder, see :class:`BranchDecoder`.
        decoder_cls: likewise.
        mask_content: ``"token"`` or ``"diffused"``: a mask token or the noised patch stands in for a masked patch.
        norm_pix: normalise the target patches.
        target_frames: so many frames of a video are predicted, evenly spread, one per tubelet (mae_st's
            ``pred_t_dim``); default all.
        values: predicted per patch, where these are not pixels.
        stream: of the noise, one number per modality.
    """

    def __init__(
        self,
        size: Sequence[int],
        patch_size: Sequence[int],
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        final_norm: bool = True,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        attention: Attention = "self",
        decoder_cls: DecoderClass = "none",
        mask_content: MaskContent = "token",
        norm_pix: bool = True,
        target_frames: int | None = None,
        values: int | None = None,
        stream: int = 0,
    ) -> None:
        super().__init__()
        if mask_content not in get_args(MaskContent):
            raise ValueError(f"mask_content must be one of {', '.join(get_args(MaskContent))}, got {mask_content!r}")
        if mask_content == "diffused" and any(n % p for n, p in zip(size, patch_size, strict=True)):
            raise ValueError(f"noised patches of {shown(patch_size)} must divide the input, which is {shown(size)}")
        channels = 1 if len(size) == 2 else 3
        self.patch_embed = embed = PatchEmbed(size, patch_size, channels, embed_dim)
        self.norm_pix, self.mask_content, self.stream = norm_pix, mask_content, stream
        self.target_frames = target_frames
        self.target_patch = embed.patch_size
        if target_frames is not None:
            if target_frames != embed.grid_size[0]:
                raise ValueError(f"target_frames must be {embed.grid_size[0]}, one per tubelet, got {target_frames}")
            self.target_patch = (1, *embed.patch_size[1:])
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        nn.init.normal_(self.cls_token, std=0.02)
        where = table(positions(embed_dim, embed.grid_size))
        self.pos_embed = nn.Parameter(torch.cat([torch.zeros(1, 1, embed_dim), where], 1), requires_grad=False)
        self.blocks = nn.ModuleList(PackedBlock(embed_dim, num_heads, mlp_ratio, eps=EPS) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=EPS) if final_norm else None
        self.decoder: BranchDecoder | None = None
        if decoder_depth:
            self.decoder = BranchDecoder(
                embed_dim, decoder_embed_dim, decoder_depth, decoder_num_heads, attention, embed.grid_size,
                channels * prod(self.target_patch) if values is None else values,
                embed.values if mask_content == "diffused" else None, decoder_cls, mlp_ratio,
            )  # fmt: skip
        self.schedule = NoiseSchedule() if mask_content == "diffused" else None
        self.grad_checkpointing = False
        self.apply(init_weights)

    @property
    def num_patches(self) -> int:
        """N."""
        return self.patch_embed.num_patches

    # Random choices.

    def draw(
        self,
        key: DrawKey,
        name: str,
        views: int,
        kept: int,
        keep: Tensor | Sequence[Tensor] | None = None,
        timesteps: Tensor | None = None,
        fraction: float = 1.0,
        one_timestep: bool = False,
    ) -> BranchDraws:
        """The random choices of a step.

        Args:
            key: names them.
            name: of the modality, for streams and messages.
            views: how often the patches are masked, V.
            kept: patches that a view keeps, K.
            keep: ids ``(V, B, K)`` given instead, or ``(B, K)`` of a single view.
            timesteps: ``(B,)`` given instead, 1 .. T.
            fraction: share of the masked patches that are predicted.
            one_timestep: one for the whole batch.
        """
        import numpy as np

        batch, count = len(key.positions), self.num_patches
        given = None if keep is None else self.given(name, keep, views, batch)
        if given is not None:
            kept = given.shape[2]
        predicted = max(1, round((count - kept) * fraction)) if kept < count else 0
        ids = []
        for view in range(views):
            noise = key.bits(f"{name} view {view}", count)
            if given is not None:
                np.put_along_axis(noise, given[view], 0, 1)
            ids.append(noise.argsort(1))
        chosen = torch.from_numpy(np.sort(np.stack(ids)[:, :, :kept], 2).astype(np.int64))
        masked = torch.from_numpy(np.sort(ids[0][:, kept : kept + predicted], 1).astype(np.int64))
        if self.schedule is None:
            if timesteps is not None:
                raise ValueError(f'{name}_timesteps are of mask_content="diffused"')
        elif timesteps is None:
            own = replace(key, positions=[0]) if one_timestep else key
            uniform = own.uniform(f"{name} timestep", 1)[:, 0]
            timesteps = torch.from_numpy((uniform * self.schedule.steps).astype(np.int64) + 1).expand(batch).clone()
        keys, queries = kept, predicted
        if self.decoder is not None and self.decoder.attention != "cross":
            keys = self.decoder.front + count
        return BranchDraws(chosen, masked, timesteps, (1 + kept, keys, queries))

    def given(self, name: str, keep: Tensor | Sequence[Tensor], views: int, batch: int) -> np.ndarray:
        """Kept ids given by a caller, checked, as ``(V, B, K)``."""
        ids = keep if isinstance(keep, Tensor) else torch.stack(list(keep))
        ids = ids[None] if ids.ndim == 2 and views == 1 else ids
        counted = ids.dtype != torch.bool and not ids.is_floating_point()
        if not counted or ids.ndim != 3 or tuple(ids.shape[:2]) != (views, batch) or not ids.shape[2]:
            raise ValueError(
                f"{name}_keep must hold the int64 ids ({views}, {batch}, K) of the patches that each view keeps, at "
                f"least one, got {ids.dtype} of {tuple(ids.shape)}"
            )
        ids = ids.long().cpu().sort(2).values
        if ids.numel() and (ids.min() < 0 or ids.max() >= self.num_patches or (ids.diff(dim=2) == 0).any()):
            raise ValueError(f"{name}_keep must hold distinct ids in 0 .. {self.num_patches - 1} of each instance")
        return ids.numpy()

    # The model.

    def image(self, name: str, x: Tensor) -> Tensor:
        """The input checked, with a dimension for channels: ``(B, 1, frames, mels)`` or ``(B, 3, T, H, W)``."""
        size = self.patch_embed.img_size
        shape = size if len(size) == 2 else (3, *size)
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}; model.frontend.{name} makes it so")
        if tuple(x.shape[1:]) != shape:
            fits = ""
            if len(size) == 2 and x.ndim == 3:
                fits = f"audio_size={tuple(x.shape[1:])}"
            elif len(size) == 3 and x.ndim == 5 and x.shape[1] == 3 and x.shape[3] == x.shape[4]:
                fits = f"num_frames={x.shape[2]} and img_size={x.shape[3]}"
            hint = f"; a model built or loaded with {fits} takes it" if fits else ""
            raise ValueError(f"{name} must be (B, {', '.join(map(str, shape))}), got {tuple(x.shape)}{hint}")
        return x.unsqueeze(1) if len(size) == 2 else x

    def blank(self, like: Tensor) -> Tensor:
        """What :meth:`image` gives of silence or a black video, for as many instances and of the type of another."""
        channels = self.patch_embed.proj.in_channels
        return like.new_zeros(like.shape[0], channels, *self.patch_embed.img_size)

    def encode(
        self, image: Tensor, plan: AttentionPlan | None = None, kept: Tensor | None = None, normed: bool = True
    ) -> Tensor:
        """Tokens of the kept patches, behind a class token.

        Args:
            image: from :meth:`image`.
            plan: of V * B sequences of 1 + K tokens; default made here.
            kept: ``(V, B, K)`` ids; default all patches in one view.
            normed: with the final norm, where there is one.

        Returns:
            ``(V * B, 1 + K, D)``, view after view.
        """
        table, count = self.pos_embed[0, 1:], self.num_patches
        if kept is None:
            tokens = self.patch_embed(image).unflatten(0, (image.shape[0], count)) + table
        else:
            first = torch.arange(kept.shape[1], device=kept.device)[:, None] * count
            tokens = self.patch_embed(image, (kept + first).flatten()) + table[kept.flatten()]
            tokens = tokens.unflatten(0, (kept.shape[0] * kept.shape[1], kept.shape[2]))
        cls = (self.cls_token + self.pos_embed[:, :1]).to(tokens.dtype)
        x = torch.cat([cls.expand(tokens.shape[0], -1, -1), tokens], 1)
        shape, norm = x.shape[:2], self.norm if normed else None
        plan = equal_lengths(x) if plan is None else plan
        x = run_blocks(self.blocks, x.flatten(0, 1), plan, recompute=self.grad_checkpointing, norm=norm)
        return x.unflatten(0, shape)

    def noised(self, image: Tensor, draws: BranchDraws, noise: Noise | None) -> Tensor | None:
        """``(B, M, P)`` masked patches with noise, None with mask tokens; values run (channel, patch)."""
        if self.schedule is None:
            return None
        assert noise is not None and draws.timesteps is not None
        x = image.squeeze(1) if image.ndim == 4 else image
        return diffuse_patches(
            x, draws.masked, draws.timesteps, self.schedule, noise.seed,
            patch=self.patch_embed.patch_size, sample_ids=noise.sample_ids, stream=self.stream,
        )  # fmt: skip

    def decode(
        self, tokens: Tensor, image: Tensor, draws: BranchDraws, noise: Noise | None = None, whole: bool = False
    ) -> Tensor:
        """Predictions from the first view's tokens ``(B, 1 + K, D)``, see :class:`BranchDecoder`."""
        if self.decoder is None:
            raise RuntimeError("this model was built without a decoder and cannot reconstruct")
        return self.decoder(tokens, draws, self.noised(image, draws, noise), whole)

    def target(self, image: Tensor) -> Tensor:
        """The input as far as it is to be predicted."""
        if self.target_frames is None:
            return image
        frames = torch.linspace(0, image.shape[2] - 1, self.target_frames, device=image.device).long()
        return image[:, :, frames]

    def reconstruction_loss(self, prediction: Tensor, image: Tensor, ids: Tensor) -> Tensor:
        """Squared error of the predicted patches ``ids`` ``(B, M)``, those of negative ids left out."""
        return masked_patch_mse(prediction, self.target(image), ids, patch=self.target_patch, norm_pix=self.norm_pix)

    @torch.no_grad()
    def shown(
        self, image: Tensor, predicted: Tensor, draws: BranchDraws, noise: Noise | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """By title, the input, what was seen of it and what was made of it; the share of masked patches ``(B,)``.

        Of a video that is the frame in its middle. Normalised predictions are shown with the true patches' means and
        deviations.
        """
        image, kept = self.target(image), draws.kept[0]
        patches = patchify(image, self.target_patch)
        index = draws.masked[..., None].expand(-1, -1, patches.shape[2])
        guess = predicted.to(patches.dtype)
        if self.norm_pix:
            _, mean, deviation = (x.to(patches.dtype) for x in normalise_patches(patches.gather(1, index)))
            guess = guess * deviation + mean
        visible = torch.zeros(patches.shape[:2], dtype=torch.bool, device=image.device).scatter(1, kept, True)
        seen, title = patches.masked_fill(~visible[..., None], torch.nan), "masked input"
        made = seen.scatter(1, index, guess)
        noised = self.noised(image, draws, noise) if self.target_frames is None else None
        if noised is not None:  # its values run (channel, patch), those of `patches` (patch, channel)
            noised = noised.unflatten(2, (image.shape[1], -1)).mT.flatten(2).to(patches.dtype)
            seen, title = seen.scatter(1, index, noised), "noised input"
        rows = {"input": image}
        for name, x in ((title, seen), ("reconstruction", made)):
            rows[name] = unpatchify(x, self.patch_embed.grid_size, self.target_patch)
        rows = {k: (x.squeeze(1) if x.ndim == 4 else x[:, :, x.shape[2] // 2]).float().cpu() for k, x in rows.items()}
        return rows, 1 - visible.float().mean(1).cpu()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable
        if self.decoder is not None:
            self.decoder.grad_checkpointing = enable


@untraced
def equal_lengths(x: Tensor) -> AttentionPlan:
    """The plan of sequences ``(B, n, D)``."""
    return equal_plan(x.device, (x.shape[0], x.shape[1]))


class Fusion(nn.Module):
    """Transformer blocks over [audio; video] tokens of a pair.

    Args:
        dim: D.
        depth: blocks.
        num_heads: their heads.
        mlp_ratio: hidden width of the MLPs over D.
        final_norm: a LayerNorm comes last.
    """

    def __init__(self, dim: int, depth: int, num_heads: int, mlp_ratio: float, final_norm: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PackedBlock(dim, num_heads, mlp_ratio, eps=EPS) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=EPS) if final_norm else None
        self.grad_checkpointing = False
        self.apply(init_weights)

    def forward(self, audio: Tensor, visual: Tensor, plan: AttentionPlan | None = None) -> dict[str, Tensor]:
        """Fused tokens by modality from ``(B, Na, D)`` and ``(B, Nv, D)``.

        The plan, of B sequences of both, is made here where none is given.
        """
        x = torch.cat([audio, visual], 1)
        shape, plan = x.shape[:2], equal_lengths(x) if plan is None else plan
        x = run_blocks(self.blocks, x.flatten(0, 1), plan, recompute=self.grad_checkpointing, norm=self.norm)
        audio, visual = x.unflatten(0, shape).split([audio.shape[1], visual.shape[1]], 1)
        return {"audio": audio, "visual": visual}


def reconstructions(
    branches: Mapping[str, Branch],
    images: Mapping[str, Tensor],
    draws: Mapping[str, BranchDraws],
    noise: Noise | None,
    predicted: Mapping[str, Tensor],
) -> Figures:
    """What can be shown of predictions ``(B, M, P)`` by modality; nothing without any."""
    if not predicted:
        return Figures()
    shown = {name: b.shown(images[name], predicted[name], draws[name], noise) for name, b in branches.items()}
    rows = {name: shown[name][0] if name in shown else {} for name in ("audio", "visual")}
    return Figures(Reconstruction(rows["audio"], rows["visual"], {name: masked for name, (_, masked) in shown.items()}))


def classifier(dim: int, num_classes: int) -> nn.Sequential:
    """LayerNorm and Linear, as the fine-tuned AudioMAE and MAViL have them on pooled features."""
    linear = nn.Linear(dim, num_classes)
    nn.init.trunc_normal_(linear.weight, std=2e-5)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.LayerNorm(dim, eps=EPS), linear)


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of encoders, fusion and decoders."""
    return [m for m in model.modules() if isinstance(m, (PackedBlock, LocalBlock, CrossBlock))]
