"""Checkpoints of other codebases: their layouts in, our parameter names out.

Here is the step that all converters share: read, unwrap, rename, resize, fit; and the layout of plain Vision
Transformers. :mod:`avfast.released` has one file per paper. Every converter accounts for each key of the released file:
mapped, or named in a drop list with the reason. Anything else, and anything missing, is an error that lists the keys
and names the file. What the caller's settings ask to differ from the file (sizes, classes, decoder) is resized, left
out or starts anew.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfast.nn import PackedBlock, sincos
from avfast.ops import AttentionPlan
from avfast.weight_files import read

Source = str | Path | Mapping[str, Tensor]
Rule = tuple[str, str | Callable[[re.Match], str] | None]
Model = TypeVar("Model", bound=nn.Module)
Converter = Callable[..., tuple[dict[str, Any], dict[str, Tensor]]]
"""Takes a state dict and the caller's settings; gives the checkpoint's own settings, and weights under our names."""


# Read and unwrap.

WRAPPERS = (
    "model", "state_dict", "model_state_dict", "module", "net", "network", "weights", "params", "ema", "model_ema",
    "ema_state_dict", "teacher", "student",
)  # fmt: skip
"""Entries under which trainers store the weights; the first that is there is taken."""
LEADING = ("model", "net", "network", "backbone")
"""Names of the attribute that holds the model within a training module."""
ANYWHERE = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of a name that data parallelism, torch.compile, FSDP and recomputation put in, in any order and place."""


def load(checkpoint: Source) -> dict[str, Tensor]:
    """State dict of a ``.pth``/``.pt`` or ``.safetensors`` file, or the given one, without wrappers and their prefixes.

    Nothing in the file is run: beside tensors only plain data is read (numbers, text, ``argparse.Namespace``, NumPy
    scalars and arrays, paths).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is none of these files or holds no tensors.
    """
    with naming(checkpoint):
        return unwrap(read(Path(checkpoint)) if isinstance(checkpoint, (str, Path)) else checkpoint)


@contextmanager
def naming(source: Source) -> Iterator[None]:
    """Has every ValueError of its block name the file, where ``source`` is one."""
    try:
        yield
    except ValueError as error:
        if not isinstance(source, (str, Path)) or str(source) in str(error):
            raise
        raise ValueError(f"{source}: {error}") from error


def unwrap(state: Any) -> dict[str, Tensor]:
    """The tensors of a state dict by their own names."""
    if not isinstance(state, Mapping):
        raise ValueError(f"expected a state dict or a dictionary that holds one, found a {type(state).__name__}")
    inner: Any = state
    while not _has_tensors(inner) or any(isinstance(inner.get(name), Mapping) for name in WRAPPERS):
        nested = {key: value for key, value in inner.items() if isinstance(value, Mapping)}
        tensors = [key for key, value in nested.items() if _has_tensors(value)]
        named = [name for name in WRAPPERS if name in nested] or (tensors if len(tensors) == 1 else [])
        if not named:
            entries = ", ".join(map(str, list(inner)[:8])) or "none"
            raise ValueError(f"the checkpoint holds no tensors; its entries are {entries}")
        inner = nested[named[0]]
    found: dict[str, Tensor] = {}
    for key, value in inner.items():
        if not isinstance(value, Tensor) or key == "n_averaged":  # the counter of averaged models
            continue
        parts = [part for part in key.split(".") if part not in ANYWHERE]
        while len(parts) > 1 and parts[0] in LEADING:
            parts = parts[1:]
        name = ".".join(parts)
        if name in found:
            raise ValueError(f"the checkpoint holds {name} twice, under different prefixes; give one of the models")
        found[name] = value
    return found


def _has_tensors(state: Mapping) -> bool:
    return any(isinstance(value, Tensor) for value in state.values())


# Rename.


def rename(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Rename keys by the first rule whose pattern matches the whole key; a rule with None drops it.

    Raises:
        ValueError: listing the keys that no rule matches.
    """
    renamed, unknown = {}, []
    for key, value in state.items():
        for pattern, target in rules:
            match = re.fullmatch(pattern, key)
            if match:
                if target is not None:
                    renamed[match.expand(target) if isinstance(target, str) else target(match)] = value
                break
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"{len(unknown)} unknown keys in the checkpoint: {listed(unknown)}")
    return renamed


def listed(keys: Sequence[str], most: int = 20) -> str:
    """Keys for an error message."""
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def stack_norms(state: Mapping[str, Tensor], sets: Sequence[str]) -> dict[str, Tensor]:
    """Merge ``...norm1{set}.weight`` of several sets into one ``...norm1.weight`` ``(sets, D)``."""
    merged = {}
    for key, value in state.items():
        match = re.fullmatch(r"(.*norm[12]?)(_[a-z]+)?\.(weight|bias)", key)
        if match and (match[2] or "") in sets:
            name, parameter = match[1], match[3]
            if (match[2] or "") == sets[0]:
                missing = [f"{name}{s}.{parameter}" for s in sets if f"{name}{s}.{parameter}" not in state]
                if missing:
                    raise ValueError(f"{len(missing)} keys are missing in the checkpoint: {listed(missing)}")
                merged[f"{name}.{parameter}"] = torch.stack([state[f"{name}{s}.{parameter}"] for s in sets])
        else:
            merged[key] = value
    return merged


# Settings that follow from shapes.


def block_count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many blocks ``prefix.0``, ``prefix.1``, ... there are."""
    numbers = [int(m[1]) for k in state if (m := re.match(re.escape(prefix) + r"\.(\d+)\.", k))]
    return max(numbers, default=-1) + 1


def num_heads(dim: int) -> int:
    """Heads of the Base, Large and Huge Vision Transformers, whose state dicts do not tell."""
    return {768: 12, 1024: 16, 1280: 16}.get(dim, max(dim // 64, 1))


def mlp_ratio(state: Mapping[str, Tensor], blocks: str, dim: int) -> float:
    """Hidden width of the first block's MLP over ``dim``."""
    weight = state.get(f"{blocks}.0.mlp.fc1.weight")
    return 4.0 if weight is None else weight.shape[0] / dim


def square(count: int) -> int | None:
    """Rows of a square grid of so many patches, if there is one."""
    rows = math.isqrt(max(count, 0))
    return rows if count > 0 and rows**2 == count else None


def input_sizes(
    weights: Mapping[str, Tensor], audio_size: tuple[int, int], wanted: tuple[int, int] | None
) -> dict[str, Any]:
    """Sizes of frames, spectrograms and patches that the patch embeddings and position tables belong to.

    Args:
        weights: under our names.
        audio_size: (frames, mel bins) of the released models.
        wanted: what the caller asks for.

    Raises:
        ValueError: where something is lacking or fills no grid.
    """
    names = ("patch_embed.proj.weight", "patch_embed_a.proj.weight", "pos_embed", "pos_embed_a")
    if lacking := [name for name in names if name not in weights]:
        raise ValueError(f"the checkpoint lacks {', '.join(lacking)}")
    patch, patch_a = (weights[name].shape[-1] for name in names[:2])
    rows = square(weights["pos_embed"].shape[1])
    if rows is None:
        raise ValueError(f"pos_embed holds {weights['pos_embed'].shape[1]} positions, which fill no square grid")
    return {
        "img_size": rows * patch,
        "patch_size": patch,
        "audio_size": _spectrogram_size(weights["pos_embed_a"], patch_a, audio_size, wanted),
        "audio_patch_size": patch_a,
    }


def _spectrogram_size(
    table: Tensor, patch: int, released: tuple[int, int], wanted: tuple[int, int] | None
) -> tuple[int, int]:
    """(frames, mel bins) of a position table, whose length alone does not tell its grid.

    It is that of a sine-cosine table that is equal, or the released one, or the one wanted, or one with the mel bins of
    the released one.
    """
    count, dim = table.shape[1:]
    sizes = {(mels // patch, frames // patch): (frames, mels) for frames, mels in (wanted or released, released)}
    rows = released[1] // patch
    grids = [] if table.is_meta or dim % 4 else [(r, count // r) for r in range(1, count + 1) if count % r == 0]
    grids = [grid for grid in grids if torch.allclose(table[0].float(), sincos(dim, grid), atol=1e-4)]
    grids = grids or [*reversed(sizes), (rows, count // rows)]
    for grid in grids:
        if grid[0] * grid[1] == count:
            return sizes.get(grid, (grid[1] * patch, released[1] if grid[0] == rows else grid[0] * patch))
    raise ValueError(
        f"pos_embed_a holds {count} positions, which fill no grid of {rows} rows ({released[1]} mel bins); give the "
        "checkpoint's own audio_size"
    )


# Resize and fit.

TABLES = {
    "patch_embed_a": ("pos_embed_a", "decoder.pos_embed_a", "decoders.audio.pos_embed"),
    "patch_embed": ("pos_embed", "decoder.pos_embed_v", "decoders.visual.pos_embed"),
}
"""Position tables by the patch embedding whose grid they follow."""
PARTS = {
    "head": ("num_classes", "joint_head"),
    "decoder": ("decoder_depth", "decoder_embed_dim", "decoder_num_heads"),
}
"""Beginnings of the names of parts that start anew where the caller's settings differ from the checkpoint's."""


def resize(table: Tensor, old: tuple[int, int], new: tuple[int, int], cut: bool = False) -> Tensor:
    """Positions ``(1, rows * columns, D)`` of one grid for another, bilinearly along each axis whose length differs.

    Args:
        table: row-major, without class tokens.
        old: its (rows, columns).
        new: those wanted.
        cut: fewer columns are the first ones, which keeps what a column of a spectrogram means: its time.
    """
    grid = table.unflatten(1, old)[:, :, : new[1] if cut else None]
    if tuple(grid.shape[1:3]) != tuple(new):
        grid = F.interpolate(grid.permute(0, 3, 1, 2).float(), new, mode="bilinear", antialias=True)
        grid = grid.permute(0, 2, 3, 1).to(table.dtype)
    return grid.flatten(1, 2)


def build(cls: Callable[..., Model], convert: Converter, source: Source, overrides: Mapping[str, Any]) -> Model:
    """A model from a checkpoint of another codebase: the one way of every ``from_released``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, and listing unknown, missing, left-over and misshapen entries.
    """
    with naming(source):
        settings, weights = convert(load(source), **overrides)
        model = cls(**{**settings, **overrides})
        frames, mels = settings["audio_size"]
        grids = {
            "patch_embed_a": (mels // settings["audio_patch_size"], frames // settings["audio_patch_size"]),
            "patch_embed": (settings["img_size"] // settings["patch_size"],) * 2,
        }
        for embed, old in grids.items():
            new = getattr(model, embed).grid_size
            for name in TABLES[embed]:
                if name in weights and weights[name].shape[1] == old[0] * old[1] and old != new:
                    weights[name] = resize(weights[name], old, new, cut=embed == "patch_embed_a")
        fit(model, weights, overrides)
    return model


def fit(model: nn.Module, weights: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> None:
    """Load renamed weights; parts that ``overrides`` declare and that differ from the checkpoint's start anew."""
    own, weights = model.state_dict(), dict(weights)
    fresh, renewed = [], []
    for part in sorted({key.split(".")[0] for key in (*own, *weights)}):
        declared = [s for name, settings in PARTS.items() if part.startswith(name) for s in settings if s in overrides]
        mine, theirs = (
            {key: value.shape for key, value in state.items() if key.startswith(f"{part}.")} for state in (own, weights)
        )
        if declared and mine != theirs:
            fresh.append(f"{part}.")
            renewed += [part] if mine and theirs else []
            weights = {key: value for key, value in weights.items() if key not in theirs}
    if renewed:
        asked = ", ".join(f"{k}={v!r}" for k, v in overrides.items() if any(k in names for names in PARTS.values()))
        warnings.warn(f"{', '.join(renewed)}: not the checkpoint's, starting anew for {asked}", stacklevel=4)
    load_into(model, weights, fresh)


def load_into(model: nn.Module, weights: Mapping[str, Tensor], optional: Sequence[str] = ()) -> None:
    """Load renamed weights; every parameter must be there unless its name starts with an ``optional`` prefix.

    Raises:
        ValueError: listing missing, left-over and misshapen entries.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in weights and not k.startswith(tuple(optional))]
    extra = [k for k in weights if k not in own]
    shapes = [
        f"{k} {tuple(weights[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in weights and weights[k].shape != own[k].shape
    ]
    problems = [
        f"{len(keys)} {what}: {listed(keys)}"
        for what, keys in (("missing keys", missing), ("keys without a place", extra), ("wrong shapes", shapes))
        if keys
    ]
    if problems:
        raise ValueError("the checkpoint does not fit the model: " + "; ".join(problems))
    model.load_state_dict({**own, **weights})


# Vision Transformers in timm's names.

VIT_TOKENS = "cls_token|dist_token|reg_token|register_tokens"
VIT: list[Rule] = [
    (r"((?:patch_embed\.proj|norm)\.(?:weight|bias)|pos_embed)", r"\1"),
    (r"(blocks\.\d+\.(?:norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(?:weight|bias))", r"\1"),
    (r"(blocks\.\d+\.)(?:ls([12])\.gamma|gamma_([12]))", lambda m: f"{m[1]}ls{m[2] or m[3]}.gamma"),
    (VIT_TOKENS + "|mask_token", None),  # no patches
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
    weights = rename(state, VIT)
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
        tokens = sum(state[k].shape[1] for k in state if re.fullmatch(VIT_TOKENS, k))
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


def ast(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Encoder weights in timm's names from an AST checkpoint (audio spectrogram transformer, DeiT layout ``v.*``)."""
    return plain_vit(rename(state, [(r"v\.(.*)", r"\1"), (r"mlp_head\..*", None)]))


def load_mae(source: Source, blocks: nn.Module, norm: nn.Module, embed: nn.Module, transposed: bool = False) -> None:
    """Fill a transformer from a masked autoencoder's encoder; ``transposed`` where its patch kernel is."""
    with naming(source):
        weights = mae_encoder(load(source))
        if transposed:
            weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].mT
        load_into(nn.ModuleDict({"blocks": blocks, "norm": norm, "patch_embed": embed}), weights)


def timm_vit(name: str, pretrained: bool, img_size: int | None = None) -> nn.Module:
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


def _differs(vit: nn.Module) -> str:
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


def vit_settings(vit: nn.Module) -> dict[str, Any]:
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
