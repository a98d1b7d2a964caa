"""The layout of AVBERT's checkpoints: two networks of clips, and the transformers with or without shared weights.

The released code registers its shared transformer under four names, keeps a copy of each rotation once computed
(``_B``), and adds the classifiers of what it is fine-tuned for. Neither the copies nor the classifiers are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from avfast.checkpoints import Rule, Source, block_count, listed, load, load_into, naming, num_heads, rename

Model = TypeVar("Model", bound=nn.Module)
SETTINGS: dict[str, Any] = {
    "num_clips": 21,
    "audio_size": (128, 80),
    "cnn": "released",
    "dropout": 0.1,
    "frontend": {"clip_seconds": 64 / 30, "masked_share": 0.05},
}
"""Those of the released model that are not :class:`avfast.AVBERT`'s defaults."""
NEW = ("adapters.visual.mask", "adapters.audio.mask", "mep_heads.", "cpp_heads.")
"""What pre-training alone needs, and the released code does not have."""
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
RULES: list[Rule] = [
    (r"visual_conv\.s1\.pathway0_stem\.(conv|bn)\." + TENSOR, lambda m: f"visual_cnn.stem.0.{_kind(m[1])}.{m[2]}"),
    (
        rf"(visual)_conv\.s(\d)\.pathway0_res(\d+)\.(branch1|branch2\.[abc])(_bn)?\.{TENSOR}",
        lambda m: _bottleneck(m, ("a", "b", "c")),
    ),
    (
        r"audio_conv\.s1\.stem\.(conv|bn)([12])\." + TENSOR,
        lambda m: f"audio_cnn.stem.{int(m[2]) - 1}.{_kind(m[1])}.{m[3]}",
    ),
    (
        rf"(audio)_conv\.s([23])\.res(\d+)\.(branch1|branch2\.(?:a|b1|b2|c))(_bn)?\.{TENSOR}",
        lambda m: _bottleneck(m, ("a", "b1", "b2", "c")),
    ),
    (
        rf"(audio)_conv\.s([45])\.res(\d+)\.(branch1|branch2\.[abc])(_bn)?\.{TENSOR}",
        lambda m: _bottleneck(m, ("a", "b", "c")),
    ),
    (r"(visual|audio)_fc\.(weight|bias)", r"adapters.\1.proj.\2"),
    (r"(visual|audio)_norm\.(weight|bias)", r"adapters.\1.norm.\2"),
    (r"single_(visual|audio)_embeddings\.position_embeddings\.weight", r"times.\1.positions"),
    (r"multi_embeddings\.position_embeddings\.weight", "times.fused.positions"),
    (r"multi_embeddings\.token_type_embeddings\.weight", "times.fused.modality"),
    (r"single_(visual|audio)_embeddings\.LayerNorm\.(weight|bias)", r"times.\1.norm.\2"),
    (r"multi_embeddings\.LayerNorm\.(weight|bias)", r"times.fused.norm.\1"),
    (r"(?:.*_)?head\..*", None),  # a classifier
]
"""Of all but the transformers and the table of BOS."""


def _kind(name: str) -> str:
    return "conv" if name == "conv" else "norm"


def _bottleneck(m: re.Match, convolutions: Sequence[str]) -> str:
    """Our name of a bottleneck's tensor, from the network, stage, block, branch, whether it is a norm, and tensor."""
    branch = m[4].removeprefix("branch2.")
    part = "shortcut" if branch == "branch1" else f"layers.{convolutions.index(branch)}"
    return f"{m[1]}_cnn.stages.{int(m[2]) - 2}.{m[3]}.{part}.{'norm' if m[5] else 'conv'}.{m[6]}"


def low_rank_transformer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for :class:`avfast.nn.SharedLowRankTransformer` that shares as ``part``, from ``transformer.*``.

    A rotation is base exp(skew(A)). What the base does besides goes into V, whose normalisation it does not change.

    Raises:
        ValueError: listing missing and unknown keys.
    """
    rest, missing = dict(state), []

    def take(key: str) -> Tensor:
        if SHARED + key not in rest:
            missing.append(SHARED + key)
            return torch.zeros(0)
        return rest.pop(SHARED + key)

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
        for what, keys in (("missing keys", missing), ("unknown keys", list(rest)))
        if keys
    ]
    if problems:
        raise ValueError("; ".join(problems))
    return {**weights, "skew": torch.stack(a)}


def _rotated(v: Tensor, base: Tensor) -> Tensor:
    # (x V^T) base = x (base^T V)^T
    same = base.is_meta or torch.equal(base, torch.eye(len(base), dtype=base.dtype, device=base.device))
    return v if same else base.mT.to(v) @ v


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


def convert(state: Mapping[str, Tensor], **overrides: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights for :class:`avfast.AVBERT` from a released checkpoint, pre-trained or fine-tuned.

    A state dict does not tell how often a shared layer is used (6 times); ``overrides`` may.

    Raises:
        ValueError: listing missing and unknown keys, or saying what is no AVBERT checkpoint.
    """
    state = {key.removeprefix("avbert."): value for key, value in state.items() if not key.endswith("._B")}
    if "visual_fc.weight" not in state or "multi_embeddings.position_embeddings.weight" not in state:
        raise ValueError(f"no released AVBERT checkpoint: expected keys avbert.*, found {listed(list(state), 5)}")
    shared = any(key.startswith(SHARED) for key in state)
    trees = ("multi_transformer.", "single_audio_transformer.", "single_visual_transformer.", "transformer.")
    theirs = {key: value for tree in trees for key, value in state.items() if key.startswith(tree)}
    rest = {key: value for key, value in state.items() if key not in theirs}
    if shared:  # any of its names will do
        theirs = {trees[-1] + key.partition(trees[-1])[2]: value for key, value in theirs.items()}
    bos = rest.pop("summary_encoding.bos_embeddings.weight", None)
    weights = rename(rest, RULES)
    if bos is not None:
        weights |= {f"adapters.{name}.bos": row for name, row in zip(("visual", "audio"), bos, strict=True)}
    dim = state["visual_fc.weight"].shape[0]
    settings = SETTINGS | {
        "num_clips": len(weights["times.fused.positions"]) - 1,
        "embed_dim": dim,
        "num_heads": num_heads(dim),
        "sharing": "part" if shared else "none",
    }
    if shared:
        transformer = low_rank_transformer(theirs)
        settings["rank"] = transformer["skew"].shape[-1]
        settings["mlp_ratio"] = transformer["mlp.0.fc1.u"].shape[1] / dim
    else:
        transformer = separate_transformers(theirs)
        settings["depth"] = block_count(theirs, f"{MODALITIES[0]}_transformer.encoder.layer")
        settings["mlp_ratio"] = transformer["mlp.0.fc1.weight"].shape[0] / dim
    return settings, weights | {f"transformer.{key}": value for key, value in transformer.items()}


def build(cls: Callable[..., Model], source: Source, overrides: Mapping[str, Any]) -> Model:
    """A model from a released checkpoint; what pre-training alone needs starts anew.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, and listing unknown, missing, left-over and misshapen entries.
    """
    with naming(source):
        settings, weights = convert(load(source), **overrides)
        model = cls(**{**settings, **overrides})
        for key in [key for key in weights if key.endswith(".positions")]:
            weights[key] = weights[key][: model.get_parameter(key).shape[0]]  # fewer clips than there are positions
        load_into(model, weights, NEW)
    return model
