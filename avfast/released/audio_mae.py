"""The layout of AudioMAE's checkpoints, and what other masked autoencoders with its names share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from avfast.checkpoints import (
    Grid,
    Rule,
    block_count,
    grids,
    listed,
    load_into,
    mlp_ratio,
    num_heads,
    rename,
    resize_tables,
)

if TYPE_CHECKING:
    from avfast.models.branch import Branch

MELS = 128
"""Mel bins of the released models' spectrograms."""
BLOCK = r"(\d+\.(?:norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12])\.(?:weight|bias))"
ENCODER: list[Rule] = [
    (r"(cls_token|pos_embed)", r"\1"),
    (r"((?:patch_embed\.proj|norm)\.(?:weight|bias))", r"\1"),
    (rf"blocks\.{BLOCK}", r"blocks.\1"),
]
DECODER: list[Rule] = [
    (r"decoder_(embed|norm|pred)\.(weight|bias)", r"decoder.\1.\2"),
    (r"mask_token", r"decoder.mask_token"),
    (r"decoder_(pos_embed|cls_token)", r"decoder.\1"),
    (rf"decoder_blocks\.{BLOCK}", r"decoder.blocks.\1"),
    (r"decoder_blocks\.(\d+\.attn\.(?:tau|meta_mlp\.fc[12]\.(?:weight|bias)))", r"decoder.blocks.\1"),
]
HEAD: list[Rule] = [(r"fc_norm\.(weight|bias)", r"head.0.\1"), (r"head\.(weight|bias)", r"head.1.\1")]


def branch(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for :class:`avfast.models.branch.Branch`, and of a head, from AudioMAE's names.

    Raises:
        ValueError: listing unknown keys, or saying what is no AudioMAE checkpoint.
    """
    kernel = state.get("patch_embed.proj.weight")
    if kernel is None or kernel.ndim != 4 or kernel.shape[1] != 1 or "cls_token" not in state:
        raise ValueError(f"no AudioMAE checkpoint: expected keys patch_embed.*, found {listed(list(state), 5)}")
    weights = rename(state, [*ENCODER, *DECODER, *HEAD])
    if "decoder.pos_embed" in weights:
        cls, weights["decoder.pos_embed"] = weights["decoder.pos_embed"].split([1, state["pos_embed"].shape[1] - 1], 1)
        if cls.any() and not is_local(weights):  # local blocks get no class token
            raise ValueError("decoder_pos_embed has a position for the class token, which is 0 in AudioMAE's tables")
    return weights


def is_local(weights: Mapping[str, Tensor]) -> bool:
    """Whether the decoder attends within windows."""
    return "decoder.blocks.0.attn.tau" in weights


def convert(state: Mapping[str, Tensor], **overrides: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights for :class:`avfast.AudioMAE` from a released checkpoint, pre-trained or fine-tuned."""
    weights = branch(state)
    settings = branch_settings(weights) | {
        "audio_size": spectrogram_size(weights),
        "final_norm": "norm.weight" in weights,
    }
    settings["decoder"] = "local" if is_local(weights) else "global"
    if is_local(weights):
        settings["decoder_num_heads"] = weights["decoder.blocks.0.attn.tau"].shape[0]
    if "head.1.weight" in weights:
        settings["num_classes"] = weights["head.1.weight"].shape[0]
    return settings, {key if key.startswith("head.") else f"audio.{key}": value for key, value in weights.items()}


def branch_settings(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings that follow from the shapes of a branch."""
    kernel = weights["patch_embed.proj.weight"]
    settings: dict[str, Any] = {
        "patch_size": kernel.shape[-1],
        "embed_dim": kernel.shape[0],
        "depth": block_count(weights, "blocks"),
        "num_heads": num_heads(kernel.shape[0]),
        "mlp_ratio": mlp_ratio(weights, "blocks", kernel.shape[0]),
        "decoder_depth": block_count(weights, "decoder.blocks"),
    }
    if "decoder.embed.weight" in weights:
        settings["decoder_embed_dim"] = weights["decoder.embed.weight"].shape[0]
    return settings


def spectrogram_size(weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """(frames, mel bins) of a position table with a class token in front, of the released models' mel bins.

    Raises:
        ValueError: where they do not fill a grid.
    """
    if "pos_embed" not in weights:
        raise ValueError("the checkpoint lacks pos_embed")
    patch, count = weights["patch_embed.proj.weight"].shape[-1], weights["pos_embed"].shape[1] - 1
    if count < 1 or count % (MELS // patch):
        raise ValueError(f"pos_embed holds {count} positions, which fill no grid of {MELS} mel bins")
    return count // (MELS // patch) * patch, MELS


def start(part: Branch, state: Mapping[str, Tensor]) -> None:
    """Fill the encoder of a branch from a checkpoint of AudioMAE. Errors are those of :func:`load_encoder`."""
    weights = branch(state)
    rows = MELS // weights["patch_embed.proj.weight"].shape[-1]
    load_encoder(part, weights, ((weights["pos_embed"].shape[1] - 1) // rows, rows))


def load_encoder(part: Branch, weights: Mapping[str, Tensor], grid: tuple[int, ...]) -> None:
    """Fill the encoder of a branch; decoder and head of ``weights`` are left out, and positions resized.

    Args:
        part: to fill.
        weights: by its names.
        grid: patches along each axis of the weights' position table, time first.

    Raises:
        ValueError: listing missing, left-over and misshapen entries.
    """
    chosen, own = {k: v for k, v in weights.items() if not k.startswith(("decoder.", "head."))}, part.state_dict()
    if "norm.weight" not in own:
        chosen = {k: v for k, v in chosen.items() if not k.startswith("norm.")}
    resize_tables(chosen, {"pos_embed": Grid(grid, 0)}, grids(part))
    load_into(part, chosen, ("decoder.",))


def fill(
    model: nn.Module, weights: Mapping[str, Tensor], settings: Mapping[str, Any], overrides: Mapping[str, Any]
) -> None:
    """Load the weights of a model of branches from a released checkpoint.

    A part that the overrides leave out is left out of the weights; one that the checkpoint lacks, or a head of other
    classes, starts anew where the overrides ask for it.
    """
    own = model.state_dict()
    asked = {"head": "num_classes", ".decoder.": "decoder_depth"}
    fresh = []
    for part, setting in asked.items():
        if setting not in overrides or overrides[setting] == settings.get(setting):
            continue
        weights = {k: v for k, v in weights.items() if part not in k}
        fresh += [k for k in own if part in k]
    load_into(model, weights, fresh)
