"""The layout of AVSiam's checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from avfast.checkpoints import (
    Rule,
    block_count,
    input_sizes,
    listed,
    mlp_ratio,
    num_heads,
    rename,
    stack_norms,
)
from avfast.released.cav_mae import DECODER
from avfast.released.vit import patch_positions


def convert(state: Mapping[str, Tensor], **overrides: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights for :class:`avfast.AVSiam` from a released AVSiam checkpoint, pre-trained or fine-tuned.

    ``separate_mae_audio=True`` keeps the released Base's second audio encoder ``ast_base``.
    """
    backbones = {m[1] for k in state if (m := re.match(r"(vit_(?:base|large|huge))\.", k))}
    if len(backbones) != 1:
        raise ValueError(f"no released AVSiam checkpoint: expected keys vit_base.*, found {listed(list(state), 5)}")
    vit = backbones.pop()
    separate = bool(overrides.get("separate_mae_audio"))
    heads = {"mlp_head_a": "head_a", "mlp_head": "head_v", "mlp_head_mm": "head_av"}
    concat = "mlp_head_mm.1.weight" in state
    if not concat:
        heads = {"mlp_head_a": "head_a", "mlp_head": "head_v", "mlp_head_mm_v2": "head_av"}
    rules: list[Rule] = [
        (rf"{vit}\.(cls_token|head\.(weight|bias))", None),  # never read: class token and the 21k-class head
        (r"my_blocks\..*|my_patch_embed(_a)?\..*", None),  # aliases and unused copies of the backbone
        (rf"{vit}\.(pos_embed|pos_embed_a)", r"\1"),
        (rf"{vit}\.(patch_embed|patch_embed_a)\.(proj\..*)", r"\1.\2"),
        (rf"{vit}\.norm\.(weight|bias)", r"encoder.norm_v.\1"),
        (rf"{vit}\.norm_a\.(weight|bias)", r"encoder.norm_a.\1"),
        (rf"{vit}\.blocks\.(\d+\.(?:norm[12]_[av]|attn|mlp)\..*)", r"encoder.blocks.\1"),
        (rf"{vit}\.blocks\.\d+\.norm[12]\..*", None),  # read by the second audio encoder's class only
        (r"mm_layer_(\d+)\.(norm[12])_a\.(.*)", lambda m: f"fusion.{int(m[1]) - 1}.{m[2]}.{m[3]}"),
        (r"mm_layer_(\d+)\.((?:attn|mlp)\..*)", lambda m: f"fusion.{int(m[1]) - 1}.{m[2]}"),
        (r"mm_layer_\d+\.norm[12](_v)?\..*", None),  # fusion layers read their audio norms only
        *((rf"{old}\.([01]\..*)", rf"{new}.\1") for old, new in heads.items()),
        (r"mlp_head_mm_v2\..*", None),  # unused in Base and Large
        *DECODER,
    ]
    ast = vit.replace("vit_", "ast_")
    if separate:
        rules += [
            (rf"{ast}\.blocks\.(\d+\.(?:norm[12]|attn|mlp)\..*)", r"encoder_a.blocks.\1"),
            (rf"{ast}\.norm_a\.(.*)", r"encoder_a.norm.\1"),
        ]
    rules.append((rf"{ast}\..*", None))  # Base's second audio encoder, discarded after pre-training
    weights = rename(state, rules)
    if "pos_embed" in weights:
        weights["pos_embed"] = patch_positions(weights["pos_embed"], 1)
    sizes = input_sizes(weights, (1024, 128), overrides.get("audio_size"))
    second = {k: v for k, v in weights.items() if k.startswith("encoder_a.")}
    encoder = {k: v for k, v in weights.items() if k.startswith("encoder.")}
    rest = {k: v for k, v in weights.items() if k not in encoder and k not in second}
    weights = {**rest, **second, **stack_norms(encoder, ("_a", "_v"))}
    dim = weights["patch_embed.proj.weight"].shape[0]
    decoder_depth = block_count(weights, "decoder.blocks")
    head = weights.get("head_a.1.weight")
    settings = {
        **sizes,
        "embed_dim": dim,
        "depth": block_count(weights, "encoder.blocks"),
        "num_heads": num_heads(dim),
        "mlp_ratio": mlp_ratio(weights, "encoder.blocks", dim),
        "fusion_depth": block_count(weights, "fusion"),
        "decoder_depth": decoder_depth,
        "double_embedding": True,
        "eps": 1e-5,
        "norm_eps": 1e-6,
        "norm_pix": False,
        "objective": "released",
        "mask_ratios": (0.0, 0.2, 0.4, 0.6, 0.8) if vit == "vit_base" else tuple(i / 10 for i in range(8)),
        "audio_structure": "time_frequency",
        "stop_gradient": vit != "vit_base",
        "num_classes": None if head is None else head.shape[0],
        "joint_head": "concat" if concat or head is None else "mean",
    }
    if decoder_depth and "decoder.embed.weight" in weights:
        settings["decoder_embed_dim"] = weights["decoder.embed.weight"].shape[0]
    return settings, weights
