"""The layout of AVBERT's checkpoints: two networks of clips, and the transformers with or without shared weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from avfast.checkpoints import Rule, block_count, listed, rename

MODALITIES = ("single_visual", "single_audio", "multi")
"""The transformers in our order."""
SHARED = "transformer.encoder.albert_layer_groups.0.albert_layers.0."
PROJECTIONS = {
    "attention.0.qkv": ("attention.factor_query", "attention.factor_key", "attention.factor_value"),
    "attention.0.proj": ("attention.factor_dense",),
    "mlp.0.fc1": ("factor_ffn",),
    "mlp.0.fc2": ("factor_ffn_output",),
}
"""Projections of low rank, in the order of their rotations, and the released code's that each is made of."""
LAYER: list[tuple[str, str]] = [
    (r"attention\.output\.dense", "attention.{}.proj"),
    (r"attention\.output\.LayerNorm", "attention.{}.norm"),
    (r"intermediate\.dense", "mlp.{}.fc1"),
    (r"output\.dense", "mlp.{}.fc2"),
    (r"output\.LayerNorm", "mlp.{}.norm"),
]
"""Names within a layer that shares nothing."""
TENSOR = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
VISUAL: list[Rule] = [
    (rf"visual_conv\.s1\.pathway0_stem\.conv\.{TENSOR}", r"stem.0.conv.\1"),
    (rf"visual_conv\.s1\.pathway0_stem\.bn\.{TENSOR}", r"stem.0.norm.\1"),
    (rf"visual_conv\.s(\d)\.pathway0_res(\d+)\.(branch1|branch2\.[abc])(_bn)?\.{TENSOR}", lambda m: _block(m, "abc")),
]
AUDIO: list[Rule] = [
    (rf"audio_conv\.s1\.stem\.conv([12])\.{TENSOR}", lambda m: f"stem.{int(m[1]) - 1}.conv.{m[2]}"),
    (rf"audio_conv\.s1\.stem\.bn([12])\.{TENSOR}", lambda m: f"stem.{int(m[1]) - 1}.norm.{m[2]}"),
    (
        rf"audio_conv\.s([23])\.res(\d+)\.(branch1|branch2\.(?:a|b1|b2|c))(_bn)?\.{TENSOR}",
        lambda m: _block(m, ("a", "b1", "b2", "c")),
    ),
    (rf"audio_conv\.s([45])\.res(\d+)\.(branch1|branch2\.[abc])(_bn)?\.{TENSOR}", lambda m: _block(m, "abc")),
]


def _block(m: re.Match, convolutions: Any) -> str:
    """Our name of a tensor of a bottleneck: stage, block, branch, whether of its norm, tensor."""
    branch = m[3].removeprefix("branch2.")
    part = "shortcut" if branch == "branch1" else f"layers.{convolutions.index(branch)}"
    return f"stages.{int(m[1]) - 2}.{m[2]}.{part}.{'norm' if m[4] else 'conv'}.{m[5]}"


def low_rank_transformer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for :class:`avfast.nn.SharedLowRankTransformer` that shares as ``part``, from ``transformer.*``.

    A rotation is base exp(skew(A)). What the base does besides goes into V, whose normalisation it does not change.

    Raises:
        ValueError: listing missing and unknown keys.
    """
    rest = {key.removeprefix(SHARED): value for key, value in state.items()}
    missing: list[str] = []

    def take(key: str) -> Tensor:
        if key not in rest:
            missing.append(SHARED + key)
            return torch.zeros(0)
        return rest.pop(key)

    weights = {}
    a: list[Tensor] = []
    for ours, theirs in PROJECTIONS.items():
        v = [[take(f"{name}.ms{i}_linear.weight") for name in theirs] for i in range(len(MODALITIES))]
        base = [[take(f"{name}.orthogonal_ms{i}_linear.base") for name in theirs] for i in range(len(MODALITIES))]
        a += [take(f"{name}.orthogonal_ms{i}_linear.A") for name in theirs for i in range(len(MODALITIES))]
        u, bias = ([take(f"{name}.s_linear.{tensor}") for name in theirs] for tensor in ("weight", "bias"))
        if not missing:
            v = [[_rotated(x, b) for x, b in zip(*each, strict=True)] for each in zip(v, base, strict=True)]
            weights[f"{ours}.v"] = torch.stack([torch.cat(each) for each in v])
            weights[f"{ours}.u"], weights[f"{ours}.bias"] = torch.stack(u), torch.stack(bias)
    for ours, name in (("attention.0.norm", "attention.LayerNorm"), ("mlp.0.norm", "full_layer_layer_norm")):
        weights |= {f"{ours}.{tensor}": take(f"{name}.{tensor}") for tensor in ("weight", "bias")}
    problems = [
        f"{len(keys)} {what} in the checkpoint: {listed(keys)}"
        for what, keys in (("missing keys", missing), ("unknown keys", [SHARED + key for key in rest]))
        if keys
    ]
    if problems:
        raise ValueError("; ".join(problems))
    return {**weights, "skew": torch.stack(a)}


def _rotated(v: Tensor, base: Tensor) -> Tensor:
    # (x V^T) base = x (base^T V)^T
    same = base.is_meta or torch.equal(base, torch.eye(len(base), dtype=base.dtype, device=base.device))
    return v if same else base.mT @ v


def separate_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for :class:`avfast.nn.SharedLowRankTransformer` that shares nothing, from ``single_visual_transformer.*``
    and its siblings.

    Raises:
        ValueError: listing missing and unknown keys.
    """
    depths = [block_count(state, f"{name}_transformer.encoder.layer") for name in MODALITIES]
    merged, missing = dict(state), []
    weights = {}
    rules: list[Rule] = []
    for i, name in enumerate(MODALITIES):
        for layer in range(depths[i]):
            prefix, index = f"{name}_transformer.encoder.layer.{layer}.", sum(depths[:i]) + layer
            rules += [
                (rf"{re.escape(prefix)}{theirs}\.(weight|bias)", rf"{ours.format(index)}.\1") for theirs, ours in LAYER
            ]
            for tensor in ("weight", "bias"):
                parts = [f"{prefix}attention.self.{part}.{tensor}" for part in ("query", "key", "value")]
                missing += [part for part in parts if part not in merged]
                if not missing:
                    weights[f"attention.{index}.qkv.{tensor}"] = torch.cat([merged.pop(part) for part in parts])
    if missing:
        raise ValueError(f"{len(missing)} missing keys in the checkpoint: {listed(missing)}")
    return weights | rename(merged, rules)
