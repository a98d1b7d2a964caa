"""The layout of CAV-MAE's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from avfast.checkpoints import Rule, block_count, input_sizes, listed, mlp_ratio, num_heads, rename, stack_norms

DECODER: list[Rule] = [
    (r"decoder_(embed|norm|pred_a|pred_v)\.(weight|bias)", r"decoder.\1.\2"),
    (r"mask_token", r"decoder.mask_token"),
    (r"decoder_(modality_[av]|pos_embed_[av])", r"decoder.\1"),
    (r"decoder_blocks\.(\d+)\.((?:norm[12]|attn|mlp)\..*)", r"decoder.blocks.\1.\2"),
    (r"decoder_blocks\.\d+\.norm[12]_[av]\..*", None),  # norm sets of its block class that the decoder never reads
]
"""The decoder that AVSiam took over from CAV-MAE."""


def convert(state: Mapping[str, Tensor], **overrides: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights for :class:`avfast.CAVMAE` from a released CAV-MAE checkpoint, pre-trained or fine-tuned."""
    if "blocks_u.0.norm1_a.weight" not in state or "modality_a" not in state:
        raise ValueError(f"no released CAV-MAE checkpoint: expected keys blocks_u.*, found {listed(list(state), 5)}")
    rules: list[Rule] = [
        (r"patch_embed_a\.(proj\..*)", r"patch_embed_a.\1"),
        (r"patch_embed_v\.(proj\..*)", r"patch_embed.\1"),
        (r"(pos_embed_a|modality_[av])", r"\1"),
        (r"pos_embed_v", r"pos_embed"),
        (r"blocks_([av])\.(\d+\.(?:norm[12]|attn|mlp)\..*)", r"blocks_\1.\2"),
        (r"blocks_[av]\.\d+\.norm[12]_[av]\..*", None),  # norm sets of its block class that these blocks never read
        (r"(blocks_u\.\d+\..*)", r"\1"),
        (r"(norm(?:_[av])?\.(?:weight|bias))", r"\1"),
        (r"mlp_head\.([01]\..*)", r"head.\1"),
        (r"cls_token.*", None),  # set by an adaptation script, never read
        *DECODER,
    ]
    weights = rename(state, rules)
    sizes = input_sizes(weights, (1024, 128), overrides.get("audio_size"))
    joint = {k: v for k, v in weights.items() if k.startswith(("blocks_u.", "norm"))}
    weights = {**{k: v for k, v in weights.items() if k not in joint}, **stack_norms(joint, ("", "_a", "_v"))}
    dim = weights["patch_embed.proj.weight"].shape[0]
    decoder_depth = block_count(weights, "decoder.blocks")
    head = weights.get("head.1.weight")
    settings = {
        **sizes,
        "embed_dim": dim,
        "depth": block_count(weights, "blocks_a"),
        "joint_depth": block_count(weights, "blocks_u"),
        "num_heads": num_heads(dim),
        "mlp_ratio": mlp_ratio(weights, "blocks_a", dim),
        "decoder_depth": decoder_depth,
        "num_classes": None if head is None else head.shape[0],
    }
    if decoder_depth and "decoder.embed.weight" in weights:
        settings["decoder_embed_dim"] = weights["decoder.embed.weight"].shape[0]
    return settings, weights
