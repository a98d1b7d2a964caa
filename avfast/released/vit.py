"""Plain Vision Transformers in timm's names: timm's own, masked autoencoders (MAE, AudioMAE) and AST."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from avfast.checkpoints import Rule, Source, listed, load, load_into, naming, rename, square
from avfast.nn import PackedBlock
from avfast.ops import AttentionPlan

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

TOKENS = "cls_token|dist_token|reg_token|register_tokens"
RULES: list[Rule] = [
    (r"((?:patch_embed\.proj|norm)\.(?:weight|bias)|pos_embed)", r"\1"),
    (r"(blocks\.\d+\.(?:norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(?:weight|bias))", r"\1"),
    (r"(blocks\.\d+\.)(?:ls([12])\.gamma|gamma_([12]))", lambda m: f"{m[1]}ls{m[2] or m[3]}.gamma"),
    (TOKENS + "|mask_token", None),  # no patches
    (r"(?:head|pre_logits|attn_pool|decoder)[._].*", None),  # what comes after the encoder
]


def plain_vit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Patch embedding, positions of patches, blocks and final norm of a plain Vision Transformer in timm's names.

    Class, distillation and register tokens, their positions, heads and a masked autoencoder's decoder are left out.
    LayerScale is multiplied into the projections before it and a missing bias of queries, keys and values is 0: the
    same function.

    Raises:
        ValueError: for what no plain Vision Transformer has (normalised queries and keys, gated MLPs, relative
            positions, a norm before the blocks...), listing its keys.
    """
    if pooled := [key for key in state if key.startswith("fc_norm.")]:
        raise ValueError(
            f"{len(pooled)} unknown keys in the checkpoint: {listed(pooled)}; its final norm comes after the pooling"
        )
    weights = rename(state, RULES)
    parts = [f"{part}.{kind}" for part in ("patch_embed.proj", "norm") for kind in ("weight", "bias")]
    if lacking := [part for part in parts if part not in weights]:
        raise ValueError(f"no plain Vision Transformer: {len(lacking)} missing keys: {listed(lacking)}")
    for key in [k for k in weights if k.endswith(".gamma")]:
        gamma, (block, part) = weights.pop(key), key.removesuffix(".gamma").rsplit(".", 1)
        last = f"{block}.{'attn.proj' if part == 'ls1' else 'mlp.fc2'}"
        weights[f"{last}.weight"] = gamma[:, None] * weights[f"{last}.weight"]
        weights[f"{last}.bias"] = gamma * weights[f"{last}.bias"]
    for key in [k for k in weights if k.endswith("attn.qkv.weight")]:
        weights.setdefault(key.replace(".weight", ".bias"), weights[key].new_zeros(len(weights[key])))
    if "pos_embed" in weights:
        tokens = sum(state[k].shape[1] for k in state if re.fullmatch(TOKENS, k))
        audio = weights["patch_embed.proj.weight"].shape[1] == 1
        weights["pos_embed"] = patch_positions(weights["pos_embed"], tokens, audio)
    return weights


def patch_positions(table: Tensor, tokens: int, audio: bool = False) -> Tensor:
    """The positions of patches in a table ``(1, N, D)`` that may start with those of class and other tokens.

    Args:
        table: positions.
        tokens: how many others there are; 0, 1 and 2 are tried after it.
        audio: the patches are a spectrogram's, see :func:`vit_grid`.
    """
    for skipped in (tokens, 0, 1, 2):
        if vit_grid(table.shape[1] - skipped, audio):
            return table[:, skipped:]
    raise ValueError(f"pos_embed holds {table.shape[1]} positions, which fill no grid with or without class tokens")


def vit_grid(count: int, audio: bool) -> tuple[int, int] | None:
    """(rows, columns) of so many patches: a square of frames; of spectrograms 12 rows (AST's stride of 10) or 8."""
    rows = next((r for r in (12, 8) if count > 0 and count % r == 0), None) if audio else square(count)
    return None if rows is None else (rows, count // rows)


def mae_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Blocks, final norm and patch embedding of a masked autoencoder (MAE or AudioMAE, pre-trained) in timm's names."""
    return plain_vit({k: v for k, v in state.items() if k != "pos_embed"})  # a table of another grid


def ast_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Encoder weights in timm's names from an AST checkpoint (audio spectrogram transformer, DeiT layout ``v.*``)."""
    return plain_vit(rename(state, [(r"v\.(.*)", r"\1"), (r"mlp_head\..*", None)]))


def load_mae(source: Source, blocks: nn.Module, norm: nn.Module, embed: nn.Module, transposed: bool = False) -> None:
    """Fill a transformer from a masked autoencoder's encoder; ``transposed`` where its patch kernel is."""
    with naming(source):
        weights = mae_encoder(load(source))
        if transposed:
            weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].mT
        load_into(nn.ModuleDict({"blocks": blocks, "norm": norm, "patch_embed": embed}), weights)


def timm_vit(name: str, pretrained: bool, img_size: int | None = None) -> VisionTransformer:
    """A timm Vision Transformer without head, its positions resized to ``img_size``.

    Raises:
        ImportError: without timm.
        ValueError: if it is no plain Vision Transformer: if what :func:`plain_vit` takes from it is another function.
    """
    try:
        import timm
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise ImportError("loading timm weights needs timm: pip install timm") from error
    size = {} if img_size is None else {"img_size": img_size}
    vit = timm.create_model(name, pretrained=pretrained, num_classes=0, **size)
    reason = "it is another architecture"
    if isinstance(vit, VisionTransformer):
        reason = _differs(vit)
    if reason:
        raise ValueError(f"{name} is no plain Vision Transformer: {reason}")
    return vit


def _differs(vit: VisionTransformer) -> str:
    """Why a timm ViT is another function than :func:`plain_vit` makes of it; empty if it is the same."""
    block, first = vit.blocks[0], "blocks.0."
    if vit.pos_embed is None:
        return "it has no position table"
    size, patch = vit.patch_embed.img_size, vit.patch_embed.patch_size
    if size[0] != size[1] or patch[0] != patch[1]:
        return f"its frames of {tuple(size)} or patches of {tuple(patch)} pixels are not square"
    try:
        weights, settings = plain_vit(vit.state_dict()), vit_settings(vit)
        shape = (vit.embed_dim, settings["num_heads"], settings["mlp_ratio"])
        ours = PackedBlock(*shape, eps=settings["eps"]).double()
        load_into(ours, {k.removeprefix(first): v for k, v in weights.items() if k.startswith(first)})
    except (ValueError, AttributeError) as error:
        return str(error)
    x = torch.linspace(-2, 2, 5 * vit.embed_dim, dtype=torch.float64).mul(50).sin().mul(3).view(5, -1)
    with torch.no_grad():
        want = copy.deepcopy(block).double().eval()(x[None])[0]
        got = ours.eval()(x, AttentionPlan.from_cu_seqlens(torch.tensor([0, 5], dtype=torch.int32)))
    if (got - want).abs().max() > 1e-6 * (want - x).abs().max():
        return "its blocks compute something else (another activation, norm or attention)"
    return ""


def vit_settings(vit: VisionTransformer) -> dict[str, Any]:
    """Constructor arguments that a timm ViT fixes."""
    block, embed = vit.blocks[0], vit.patch_embed
    return {
        "img_size": embed.img_size[0],
        "patch_size": embed.patch_size[0],
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / vit.embed_dim,
        "eps": block.norm1.eps,
        "norm_eps": vit.norm.eps,
    }
