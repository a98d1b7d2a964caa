"""DeepAVFusion as published: pairs are formed, and what is thrown away is computed first. In plain PyTorch.

Everything runs on the modules and weights of this library's model, so outputs and gradients must agree with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfast.models import DeepAVFusion
from avfast.nn.fusion import ContextBlock, CrossAttention, FusionBlock, PairAttention


def pairs(a: Tensor, v: Tensor) -> Tensor:
    """``(..., Na, D)`` and ``(..., Nv, D)`` to sums of all pairs, ``(..., Na Nv, D)``."""
    return (a[..., :, None, :] + v[..., None, :, :]).flatten(-3, -2)


def pair_attention(
    q: Tensor,
    k_a: Tensor,
    v_a: Tensor,
    k_v: Tensor,
    v_v: Tensor,
    bias_v: Tensor | None = None,
    *,
    bias_k: Tensor | None = None,
    scale: float | None = None,
    mask_a: Tensor | None = None,
    mask_v: Tensor | None = None,
) -> Tensor:
    """Softmax attention over formed pairs: what :func:`avfast.ops.pair_attention` computes without them.

    ``bias_k`` ``(H, Dqk)`` and ``bias_v`` ``(H, Dv)`` are added to the keys and values of pairs. A pair takes part if
    both of its tokens do; there must be one.
    """
    k, v = pairs(k_a, k_v), pairs(v_a, v_v)
    k = k if bias_k is None else k + bias_k[:, None]
    v = v if bias_v is None else v + bias_v[:, None]
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    every_a, every_v = (q.new_ones(len(q), x.shape[2], dtype=torch.bool) for x in (k_a, k_v))
    mask = (every_a if mask_a is None else mask_a)[:, :, None] & (every_v if mask_v is None else mask_v)[:, None]
    return logits.masked_fill(~mask.flatten(1)[:, None, None], float("-inf")).softmax(-1) @ v


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None) -> Tensor:
    """``(B, N, D)`` tensors through scaled dot-product attention."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def pair_module(module: PairAttention, x: Tensor, audio: Tensor, visual: Tensor) -> Tensor:
    """The module on concatenated pairs ``(B, Na Nv, 2 D)``."""
    shape = (*audio.shape[:2], visual.shape[1], audio.shape[2])
    joined = torch.cat([visual[:, None].expand(shape), audio[:, :, None].expand(shape)], -1).flatten(1, 2)
    k, v = module.kv(joined).split(module.widths, -1)
    return module.proj(attend(module.q(x), k, v, module.num_heads, module.scale))


def summed_pair_module(module: PairAttention, x: Tensor, audio: Tensor, visual: Tensor) -> Tensor:
    """Pairs formed after the projections, in the width of keys and values."""
    weight_v, weight_a = module.kv.weight.chunk(2, 1)
    kv = pairs(F.linear(audio, weight_a), F.linear(visual, weight_v, module.kv.bias))
    k, v = kv.split(module.widths, -1)
    return module.proj(attend(module.q(x), k, v, module.num_heads, module.scale))


def two_attentions(module: PairAttention, x: Tensor, audio: Tensor, visual: Tensor) -> Tensor:
    """The same without pairs, in PyTorch's own operators: what someone who knows the identity would write."""
    weight_v, weight_a = module.kv.weight.chunk(2, 1)
    q, out = module.q(x), module.kv.bias[module.widths[0] :]
    for tokens, weight in ((audio, weight_a), (visual, weight_v)):
        k, v = F.linear(tokens, weight).split(module.widths, -1)
        out = out + attend(q, k, v, module.num_heads, module.scale)
    return module.proj(out)


def cross_attention(module: CrossAttention, x: Tensor, source: Tensor) -> Tensor:
    """Attention of ``(B, F, D)`` to ``(B, N, D)``."""
    k, v = module.kv(source).chunk(2, -1)
    return module.proj(attend(module.q(x), k, v, module.num_heads, module.scale))


def context_block(block: ContextBlock, tokens: Tensor, x: Tensor) -> Tensor:
    """A whole block on [tokens, x] of which the first rows are thrown away."""
    joined = torch.cat([tokens, x], 1)
    q, k, v = block.attn.qkv(block.norm1(joined)).chunk(3, -1)
    joined = joined + block.attn.proj(attend(q, k, v, block.attn.num_heads, None))
    joined = joined + block.mlp(block.norm2(joined))
    return joined[:, tokens.shape[1] :]


def fusion_block(block: FusionBlock, tokens: Tensor, audio: Tensor, visual: Tensor) -> Tensor:
    """Dense, on all pairs of patches, or factorized, on all pairs of aggregation tokens."""
    x, audio, visual = block.norm1(tokens), block.norm1_a(audio), block.norm1_v(visual)
    if block.arch == "dense":
        update = pair_module(block.attn, x, audio, visual)
    elif block.arch == "factorized":
        fusion, aggregate_v, aggregate_a = x.split(block.num_tokens, 1)
        aggregate_v = cross_attention(block.attn_v, aggregate_v, visual)
        aggregate_a = cross_attention(block.attn_a, aggregate_a, audio)
        update = torch.cat([pair_module(block.attn, fusion, aggregate_a, aggregate_v), aggregate_v, aggregate_a], 1)
    else:
        raise ValueError(f"there is no published form of arch {block.arch!r} here")
    x = (x if block.residual == "normed" else tokens) + update
    return x + block.mlp(block.norm2(x))


class Encoder(nn.Module):
    """The published encoder of ``model``: ``forward(audio, visual)`` to audio, visual and fusion tokens ``(B, N, D)``.

    Args:
        model: whose modules are used.
        audio_ids: ``(B, K)`` kept patches; all patches are embedded first. Default all.
        visual_ids: likewise.
    """

    def __init__(self, model: DeepAVFusion, audio_ids: Tensor | None = None, visual_ids: Tensor | None = None) -> None:
        super().__init__()
        self.model, self.audio_ids, self.visual_ids = model, audio_ids, visual_ids

    def forward(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model = self.model
        images = model.images(audio, visual)
        a = embed(model.patch_embed_a.proj, images["audio"], model.pos_embed_a, self.audio_ids)
        v = embed(model.patch_embed.proj, images["visual"], model.pos_embed, self.visual_ids)
        tokens = model.fusion_tokens.expand(len(a), -1, -1)
        for i, (block_a, block_v) in enumerate(zip(model.blocks_a, model.blocks_v, strict=True)):
            fused = i in model.fusion_layers
            context = tokens if fused else tokens[:, :0]
            next_a, next_v = context_block(block_a, context, a), context_block(block_v, context, v)
            if fused:
                tokens = fusion_block(model.fusion_blocks[str(i)], tokens, a, v)
            a, v = next_a, next_v
        return model.norm_a(a), model.norm_v(v), model.fusion_norm(tokens)


def embed(proj: nn.Conv2d, image: Tensor, positions: Tensor, ids: Tensor | None) -> Tensor:
    """All patches with their positions, then the kept ones."""
    x = proj(image).flatten(2).transpose(1, 2) + positions
    return x if ids is None else x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))
