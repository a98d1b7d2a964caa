"""The layout of mae_st's checkpoints, masked autoencoders of videos."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from avfast.checkpoints import Rule, listed, rename, square
from avfast.released.audio_mae import DECODER, ENCODER, branch_settings, load_encoder

if TYPE_CHECKING:
    from avfast.models.branch import Branch

POSITIONS: list[Rule] = [
    (r"(pos_embed_(?:spatial|temporal|class))", r"\1"),
    (r"decoder_pos_embed_(spatial|temporal|class)", r"decoder.pos_embed.\1"),
]


def branch(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for :class:`avfast.models.branch.Branch` from mae_st's names.

    The encoder's tables of space and time are added up to one. It has all tables trained; here positions are fixed.

    Raises:
        ValueError: listing unknown keys, or saying what is no mae_st checkpoint.
    """
    kernel = state.get("patch_embed.proj.weight")
    if kernel is None or kernel.ndim != 5 or "pos_embed_temporal" not in state:
        raise ValueError(f"no mae_st checkpoint: expected keys pos_embed_temporal, found {listed(list(state), 5)}")
    merged = dict(state)
    for key in [k for k in state if re.fullmatch(r".*\.attn\.q\.(weight|bias)", k)]:
        parts = [key.replace(".attn.q.", f".attn.{x}.") for x in "qkv"]
        if all(part in merged for part in parts):
            merged[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat([merged.pop(part) for part in parts])
    weights = rename(merged, [*ENCODER, *DECODER, *POSITIONS])
    names = [f"pos_embed_{part}" for part in ("class", "temporal", "spatial")]
    if lacking := [name for name in names if name not in weights]:
        raise ValueError(f"the checkpoint lacks {', '.join(lacking)}")
    cls, temporal, spatial = (weights.pop(name) for name in names)
    weights["pos_embed"] = torch.cat([cls, (temporal[:, :, None] + spatial[:, None]).flatten(1, 2)], 1)
    if "decoder.pos_embed.class" in weights and "decoder.cls_token" in weights:
        weights["decoder.cls_token"] = weights["decoder.cls_token"] + weights.pop("decoder.pos_embed.class")
    return weights


def start(part: Branch, state: Mapping[str, Tensor]) -> None:
    """Fill the encoder of a branch of videos. Errors are those of :func:`avfast.released.audio_mae.load_encoder`."""
    weights, rows = branch(state), square(state["pos_embed_spatial"].shape[1]) or 0
    load_encoder(part, weights, (state["pos_embed_temporal"].shape[1], rows, rows))


def convert(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of a :class:`~avfast.models.branch.Branch`: the whole of mae_st."""
    weights, settings = branch(state), {}
    frames, patch, _ = weights["patch_embed.proj.weight"].shape[2:]
    times, places = state["pos_embed_temporal"].shape[1], square(state["pos_embed_spatial"].shape[1])
    settings = branch_settings(weights)
    settings.pop("patch_size")
    size = (times * frames, *[(places or 0) * patch] * 2)
    if (
        "decoder.pred.weight" in weights
        and weights["decoder.pred.weight"].shape[0] == 3 * patch**2 != 3 * patch**2 * frames
    ):
        settings["target_frames"] = times
    return {**settings, "size": size, "patch_size": (frames, patch, patch), "decoder_cls": "own"}, weights
