"""The layout of DeepAVFusion's checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from avfast.checkpoints import Rule, block_count, input_sizes, listed, mlp_ratio, num_heads, rename


def convert(state: Mapping[str, Tensor], **overrides: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights for :class:`avfast.DeepAVFusion` from a released checkpoint, with or without decoders.

    A state dict does not tell how the fusion tokens divide (taken as 2 : 1 : 1, the released 16, 8, 8); ``overrides``
    may.
    """
    if "encoder.fusion_tokens" not in state:
        raise ValueError(
            f"no released DeepAVFusion checkpoint: expected keys encoder.*, found {listed(list(state), 5)}"
        )
    count, dim = state["encoder.fusion_tokens"].shape[1:]
    blocks = {key: value for key, value in state.items() if key.startswith("encoder.fusion_blocks.")}
    if any(".attn.attn_v." in key for key in blocks):
        arch = "factorized"
    else:
        pairs = any(key.endswith(".attn.kv.weight") and value.shape[1] == 2 * dim for key, value in blocks.items())
        arch = "dense" if pairs or not blocks else "token"
    side = {"image": "v", "img": "v", "audio": "a", "aud": "a"}
    norms = side if arch != "token" else {"img": "a", "aud": "v"}  # called with its arguments in another order
    block = r"(\d+\.(?:norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12])\.(?:weight|bias))"
    rules: list[Rule] = [
        (r"encoder\.(fusion_tokens|fusion_norm\.(?:weight|bias))", r"\1"),
        (r"encoder\.image\.(pos_embed|patch_embed\.proj\.(?:weight|bias))", r"\1"),
        (r"encoder\.audio\.(pos_embed|patch_embed)(\.proj\.(?:weight|bias))?", r"\1_a\2"),
        (r"encoder\.(image|audio)\.norm\.(weight|bias)", lambda m: f"norm_{side[m[1]]}.{m[2]}"),
        (rf"encoder\.(image|audio)\.blocks\.{block}", lambda m: f"blocks_{side[m[1]]}.{m[2]}"),
        (r"encoder\.(fusion_blocks\.\d+\.norm1)_mm(\..*)", r"\1\2"),
        (r"encoder\.(fusion_blocks\.\d+\.norm1)_(aud|img)(\..*)", lambda m: f"{m[1]}_{norms[m[2]]}{m[3]}"),
        (r"encoder\.(fusion_blocks\.\d+)\.attn(\.attn_[av]\..*)", r"\1\2"),
        (r"encoder\.(fusion_blocks\.\d+\.(?:norm2|mlp|attn)\..*)", r"\1"),
        (r"image_decoder_(.*)", r"decoders.visual.\1"),
        (r"audio_decoder_(.*)", r"decoders.audio.\1"),
    ]
    weights = rename(state, rules)
    sizes = input_sizes(weights, (192, 128), overrides.get("audio_size"))
    for key in list(weights):
        other = re.sub(r"\.attn\.k\.(weight|bias)$", r".attn.v.\1", key)
        if other != key and other in weights:
            weights[key.replace(".attn.k.", ".attn.kv.")] = torch.cat([weights.pop(key), weights.pop(other)])
        if arch == "dense" and key.endswith(".attn.kv.weight") and key.startswith("fusion_blocks."):
            weights[key] = weights[key].roll(dim, 1)  # released pairs are [audio | image] here
    settings: dict[str, Any] = {
        **sizes,
        "embed_dim": dim,
        "depth": block_count(weights, "blocks_v"),
        "num_heads": num_heads(dim),
        "mlp_ratio": mlp_ratio(weights, "blocks_v", dim),
        "fusion_arch": arch,
        "fusion_layers": sorted({int(key.split(".")[2]) for key in blocks}),
        "num_fusion_tokens": (count - 2 * (count // 4), count // 4, count // 4),
        "fusion_residual": "normed",
        "fusion_scale": None if arch == "token" else (dim // num_heads(dim)) ** -0.5,
        "decoder_depth": block_count(weights, "decoders.visual.blocks"),
        "train_decoder_positions": True,
    }
    for key in weights:
        if re.fullmatch(r"fusion_blocks\.\d+\.attn\.q\.weight", key):
            settings["fusion_attn_ratio"] = weights[key].shape[0] / dim
        if re.fullmatch(r"fusion_blocks\.\d+\.mlp\.fc1\.weight", key):
            settings["fusion_mlp_ratio"] = weights[key].shape[0] / dim
    if "decoders.visual.embed.weight" in weights:
        settings["decoder_embed_dim"] = weights["decoders.visual.embed.weight"].shape[0]
    return settings, weights
