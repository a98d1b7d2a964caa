"""AVSiam's joint pre-training loss in plain PyTorch, from the same modules and weights, as others would schedule it.

Each variant computes the function of ``AVSiam.forward`` with the shared encoder and uses no kernel of this library
inside the transformer. What depends on the draws alone (masks, indices) is made once and is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from avfast.masking import Kept
from avfast.models import AVSiam
from avfast.models.masked_pair import PairDraws
from avfast.nn import patchify
from avfast.ops import info_nce
from avfast.ops.masked_patch_mse import normalise_patches
from avfast.packing import cumulative, runs

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Norm = Callable[[nn.Module, Tensor], Tensor]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """``(B, N, H, D)``; ``mask`` ``(B, N)`` is True for the keys that count."""
    mask = None if mask is None else mask[:, None, None]
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)


def set_norm(index: int, module: nn.Module, x: Tensor) -> Tensor:
    """The affine set of one modality, or the only one."""
    if module.weight.ndim == 1:
        return module(x)
    return F.layer_norm(x, x.shape[-1:], module.weight[index], module.bias[index], module.eps)


def run_block(block: nn.Module, x: Tensor, attend: Attend, norm: Norm) -> Tensor:
    """A pre-norm block on ``(..., D)``."""
    attn, mlp = block.attn, block.mlp
    q, k, v = attn.qkv(norm(block.norm1, x)).unflatten(-1, (3, attn.num_heads, -1)).unbind(-3)
    x = x + attn.proj(attend(q, k, v).flatten(-2))
    return x + mlp.fc2(F.gelu(mlp.fc1(norm(block.norm2, x))))


class Variant(nn.Module):
    """``forward(audio, visual) -> loss``.

    Args:
        model: whose modules and weights are used; shared encoder, joint objective or a pass of the released one.
        draws: of one step.
        parts: ``"contrastive"``, ``"reconstruction"`` or both.
    """

    def __init__(
        self, model: AVSiam, draws: PairDraws, parts: Sequence[str] = ("contrastive", "reconstruction")
    ) -> None:
        super().__init__()
        self.model, self.parts = model, tuple(parts)
        self.recompute = False
        self.kept_a: Kept = draws.to(model.device).audio_keep
        self.kept_v: Kept = draws.to(model.device).visual_keep
        self.patches_a, self.patches_v = model.patch_embed_a.num_patches, model.patch_embed.num_patches
        self.masked_a, self.masked_v = self.kept_a.masked(self.patches_a), self.kept_v.masked(self.patches_v)

    def tokens(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded tokens of both modalities in the variant's layout; audio is ``(B, 1, mels, frames)``."""
        raise NotImplementedError

    def pooled(self, a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, D)`` mean tokens of the kept patches."""
        raise NotImplementedError

    def decoder_input(self, a: Tensor, v: Tensor) -> Tensor:
        """Fused and embedded tokens, with mask tokens, ``(B, N, Dd)``."""
        raise NotImplementedError

    def forward(self, audio: Tensor, visual: Tensor) -> Tensor:
        model, loss = self.model, 0.0
        audio = audio.transpose(1, 2).unsqueeze(1)
        a, v = self.tokens(audio, visual)
        if "contrastive" in self.parts:
            pooled = self.pooled(a, v)
            loss = loss + model.contrastive_weight * info_nce(*pooled, model.temperature, "both").loss
        if "reconstruction" in self.parts:
            if model.stop_gradient:
                a, v = a.detach(), v.detach()
            predicted = self.decode(self.decoder_input(a, v))
            targets = patchify(audio, model.patch_embed_a.patch_size), patchify(visual, model.patch_embed.patch_size)
            for got, target, masked in zip(predicted, targets, (self.masked_a, self.masked_v), strict=True):
                target = normalise_patches(target)[0] if model.norm_pix else target
                term = ((got - target).square().mean(-1) * masked).sum() / masked.sum()
                loss = loss + model.reconstruction_weight * term
        return loss

    def block(self, *args: Any) -> Tensor:
        """:func:`run_block`; with ``recompute`` set, what it keeps for the backward pass is its input alone."""
        if self.recompute:
            return checkpoint(run_block, *args, use_reentrant=False, preserve_rng_state=False)
        return run_block(*args)

    def decode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Dense decoder blocks over all positions."""
        d = self.model.decoder
        x = x + torch.cat([d.pos_embed_a + d.modality_a, d.pos_embed_v + d.modality_v], 1)
        for block in d.blocks:
            x = self.block(block, x, dense_attention, partial(set_norm, 0))
        x = d.norm(x)
        return d.pred_a(x[:, : self.patches_a]), d.pred_v(x[:, self.patches_a :])

    def embed(self, images: Tensor, module: nn.Module, positions: Tensor, kept: Kept | None = None) -> Tensor:
        """All patches ``(B, N, D)``, or the kept ones ``(T, D)``."""
        weight, bias = module.proj.weight, module.proj.bias
        if kept is None:
            return F.conv2d(images, weight, bias, stride=module.patch_size).flatten(2).transpose(1, 2) + positions
        patches = F.unfold(images, module.patch_size, stride=module.patch_size).transpose(1, 2).flatten(0, 1)
        return F.linear(patches[kept.flat(module.num_patches)], weight.flatten(1), bias) + positions[0][kept.ids]


class Padded(Variant):
    """Each modality at its own full length; patches that are not kept stay in place and are masked as keys."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.keys_a, self.keys_v = ~self.masked_a, ~self.masked_v
        self.keys = torch.cat([self.keys_a, self.keys_v], 1)

    def tokens(self, audio, visual):
        m = self.model
        a = self.embed(audio, m.patch_embed_a, m.pos_embed_a)
        v = self.embed(visual, m.patch_embed, m.pos_embed)
        attend_a, attend_v = (partial(dense_attention, mask=keys) for keys in (self.keys_a, self.keys_v))
        for block in m.encoder.blocks:
            a = self.block(block, a, attend_a, partial(set_norm, 0))
            v = self.block(block, v, attend_v, partial(set_norm, 1))
        return set_norm(0, m.encoder.norm, a), set_norm(1, m.encoder.norm, v)

    def pooled(self, a, v):
        pairs = (a, self.keys_a), (v, self.keys_v)
        return tuple((x * keys[..., None]).sum(1) / keys.sum(1, keepdim=True) for x, keys in pairs)

    def decoder_input(self, a, v):
        x = torch.cat([a, v], 1)
        for block in self.model.fusion:
            x = self.block(block, x, partial(dense_attention, mask=self.keys), partial(set_norm, 0))
        d = self.model.decoder
        return torch.where(self.keys[..., None], d.embed(x), d.mask_token)


class Ragged(Variant):
    """Kept tokens only, ``(T, D)``; a subclass says how blocks run over them."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.join()

    def run(self, blocks: nn.ModuleList, x: Tensor, lengths: Sequence[int], split: int) -> Tensor:
        """Blocks over packed rows, of which the first ``split`` have the audio norms."""
        raise NotImplementedError

    def join(self) -> None:
        """Indices of the sequences [audio_i; visual_i], longest first, and their places in the decoder."""
        lengths_a, lengths_v = self.kept_a.batch_lengths(), self.kept_v.batch_lengths()
        rows = sorted(range(len(lengths_a)), key=lambda i: (-lengths_a[i], -lengths_v[i]))
        total, count = self.patches_a + self.patches_v, len(self.kept_a.ids)
        index, places = [], []
        parts = ((self.kept_a, 0, 0), (self.kept_v, count, self.patches_a))
        for row in rows:
            for kept, first, offset in parts:
                at = kept.permutation.index(row)
                start = [0, *accumulate(kept.lengths)][at]
                index.append(torch.arange(start, start + kept.lengths[at]) + first)
                places.append(row * total + offset + kept.ids[start : start + kept.lengths[at]])
        self.joined, self.places = torch.cat(index).to(self.model.device), torch.cat(places)
        self.joined_lengths = tuple(lengths_a[row] + lengths_v[row] for row in rows)

    def tokens(self, audio, visual):
        m = self.model
        a = self.embed(audio, m.patch_embed_a, m.pos_embed_a, self.kept_a)
        v = self.embed(visual, m.patch_embed, m.pos_embed, self.kept_v)
        x, split = torch.cat([a, v]), len(a)
        x = self.run(m.encoder.blocks, x, self.kept_a.lengths + self.kept_v.lengths, split)
        return set_norm(0, m.encoder.norm, x[:split]), set_norm(1, m.encoder.norm, x[split:])

    def pooled(self, a, v):
        means = []
        for x, kept in ((a, self.kept_a), (v, self.kept_v)):
            groups = runs(kept.lengths)
            parts = x.split([count * n for count, n in groups])
            dense = [part.unflatten(0, shape).mean(1) for part, shape in zip(parts, groups, strict=True)]
            means.append(torch.cat(dense)[kept.inverse])
        return means[0], means[1]

    def decoder_input(self, a, v):
        x = torch.cat([a, v]).index_select(0, self.joined)
        x = self.run(self.model.fusion, x, self.joined_lengths, len(x))
        d, batch = self.model.decoder, len(self.kept_a.lengths)
        x = d.embed(x)
        blank = d.mask_token.to(x.dtype).expand(batch, self.patches_a + self.patches_v, -1).flatten(0, 1)
        return blank.index_copy(0, self.places, x).unflatten(0, (batch, -1))


class GroupByGroup(Ragged):
    """Dense calls per layer, one for each length of a modality, as the released code runs its ratios."""

    def run(self, blocks, x, lengths, split):
        groups = runs(lengths)
        parts, done = [], 0
        for part, (count, n) in zip(x.split([count * n for count, n in groups]), groups, strict=True):
            norm = partial(set_norm, int(done >= split))
            done += len(part)
            part = part.unflatten(0, (count, n))
            for block in blocks:
                part = run_block(block, part, dense_attention, norm)
            parts.append(part.flatten(0, 1))
        return torch.cat(parts)


class Packed(Ragged):
    """Packed matrix products; a subclass says how attention runs."""

    def attention(self, lengths: Sequence[int]) -> Attend:
        raise NotImplementedError

    def run(self, blocks, x, lengths, split):
        attend = self.attention(tuple(lengths))

        def norm(module: nn.Module, x: Tensor) -> Tensor:
            if module.weight.ndim == 1:
                return module(x)
            return torch.cat([set_norm(0, module, x[:split]), set_norm(1, module, x[split:])])

        for block in blocks:
            x = run_block(block, x, attend, norm)
        return x


class PackedGroups(Packed):
    """One dense SDPA per run of equal lengths."""

    def attention(self, lengths):
        groups = runs(lengths)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            split = zip(*(x.split([count * n for count, n in groups]) for x in (q, k, v)), strict=True)
            pairs = zip(split, groups, strict=True)
            return torch.cat([dense_attention(*(x.unflatten(0, g) for x in part)).flatten(0, 1) for part, g in pairs])

        return attend


class PackedVarlen(Packed):
    """``torch.nn.attention.varlen``."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        sets = (self.kept_a.lengths + self.kept_v.lengths, self.joined_lengths)
        self.boundaries = {lengths: cumulative(lengths, self.model.device) for lengths in sets}

    def attention(self, lengths):
        from torch.nn.attention.varlen import varlen_attn

        cu, longest = self.boundaries[lengths], max(lengths)
        return lambda q, k, v: varlen_attn(q, k, v, cu, cu, longest, longest)
