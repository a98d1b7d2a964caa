"""Checkpoints of other codebases: their layouts in, our parameter names out.

Here is what all converters share: read, unwrap, rename, resize, fit. :mod:`avfast.released` has one file per layout.
Every converter accounts for each key of the released file: mapped, or named in a drop list with the reason. Anything
else, and anything missing, is an error that lists the keys and names the file. What the caller's settings ask to differ
from the file (sizes, classes, decoder) is resized, left out or starts anew.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt, prod
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfast.nn import PatchEmbed, sincos
from avfast.weight_files import read

logger = logging.getLogger("avfast")
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


def unwrap(state: object) -> dict[str, Tensor]:
    """The tensors of a state dict by their own names."""
    if not isinstance(state, Mapping):
        raise ValueError(f"expected a state dict or a dictionary that holds one, found a {type(state).__name__}")
    inner = state
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
    rows = isqrt(max(count, 0))
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

Resizing = Literal["cut", "interpolate"]
"""What a spectrogram or video shorter than the checkpoint's takes: the first positions in time, or all of them."""
TABLES = {
    "patch_embed_a": ("pos_embed_a", "decoder.pos_embed_a", "decoders.audio.pos_embed"),
    "patch_embed": ("pos_embed", "decoder.pos_embed", "decoder.pos_embed_v", "decoders.visual.pos_embed"),
}
"""Position tables by the patch embedding whose grid they follow, in the module that has both."""
PARTS = {
    "head": ("num_classes", "joint_head"),
    "decoder": ("decoder_depth", "decoder_embed_dim", "decoder_num_heads"),
}
"""Beginnings of the names of parts that start anew where the caller's settings differ from the checkpoint's."""


@dataclass(frozen=True)
class Grid:
    """What a position table is of.

    Attributes:
        size: patches along each axis.
        time: the axis that is time; None for an image.
    """

    size: tuple[int, ...]
    time: int | None

    def __str__(self) -> str:
        return " x ".join(map(str, self.size))


def grids(model: nn.Module) -> dict[str, Grid]:
    """The grid of each position table of a model, by its name in the state dict."""
    found: dict[str, Grid] = {}
    for prefix, module in model.named_modules():
        for name in TABLES:
            embed = getattr(module, name, None)
            if not isinstance(embed, PatchEmbed):
                continue
            # audio beside frames is (mel, time); on its own (time, mel), as a video is (time, row, column)
            time = 1 if name == "patch_embed_a" else 0
            grid = Grid(embed.grid_size, None if embed.proj.in_channels == 3 and len(embed.grid_size) == 2 else time)
            for table in (f"{prefix}.{table}".lstrip(".") for table in TABLES[name]):
                found[table] = grid
                found[f"{table}.temporal"] = Grid(grid.size[:1], 0)
                found[f"{table}.spatial"] = Grid(grid.size[1:], None)
    return {name: grid for name, grid in found.items() if name in model.state_dict()}


def resize(table: Tensor, old: Sequence[int], new: Sequence[int], cut: int | None = None) -> Tensor:
    """Positions ``(1, N, D)`` of one grid for another, bicubically along each axis whose length differs.

    With antialiasing, as timm does for images.

    Args:
        table: row-major; what comes before the grid's, such as a class token's, stays.
        old: its size.
        new: that wanted.
        cut: an axis along which a smaller size takes the first positions, which keeps what they mean: their time.
    """
    front, grid = table.split([table.shape[1] - prod(old), prod(old)], 1)
    grid = grid.unflatten(1, tuple(old))
    for axis, count in enumerate(new, 1):
        if cut == axis - 1:
            grid = grid.narrow(axis, 0, min(count, grid.shape[axis]))
        if grid.shape[axis] != count:
            rows = grid.movedim(axis, 0).float()
            resized = F.interpolate(
                rows.flatten(1)[None, None], (count, rows[0].numel()), mode="bicubic", antialias=True
            )
            grid = resized[0, 0].view(count, *rows.shape[1:]).movedim(0, axis).to(table.dtype)
    return torch.cat([front, grid.flatten(1, len(old))], 1)


def resize_tables(
    weights: dict[str, Tensor], old: Mapping[str, Grid], new: Mapping[str, Grid], resizing: Resizing = "cut"
) -> None:
    """Position tables among ``weights`` from their grids to those of a model, in place; the log says which.

    Args:
        weights: by the model's names.
        old: their grids.
        new: the model's, see :func:`grids`.
        resizing: see :data:`Resizing`.
    """
    if resizing not in get_args(Resizing):
        raise ValueError(f"resizing must be one of {', '.join(get_args(Resizing))}, got {resizing!r}")
    said = []
    for name in sorted(weights.keys() & old.keys() & new.keys()):
        before, after = old[name], new[name]
        fits = 0 <= weights[name].shape[1] - prod(before.size) <= 1  # a class token; others are said where they load
        if before.size == after.size or len(before.size) != len(after.size) or not fits:
            continue
        cut = before.time if resizing == "cut" else None
        weights[name] = resize(weights[name], before.size, after.size, cut)
        shortened = cut is not None and after.size[cut] < before.size[cut]
        others = any(m != n for i, (m, n) in enumerate(zip(before.size, after.size, strict=True)) if i != cut)
        how = " and ".join(["cut"] * shortened + ["interpolated"] * (others or not shortened))
        said.append(f"{name} {before} -> {after} ({how})")
    if said:
        logger.warning("positions of other sizes than the checkpoint's: %s", ", ".join(said))


def build(
    cls: Callable[..., Model],
    convert: Converter,
    source: Source,
    overrides: Mapping[str, Any],
    resizing: Resizing = "cut",
    fill: Callable[[nn.Module, Mapping[str, Tensor], Mapping[str, Any], Mapping[str, Any]], None] | None = None,
) -> Model:
    """A model from a checkpoint of another codebase: the one way of every ``from_released``.

    Args:
        cls: of the model.
        convert: gives its settings and weights.
        source: the checkpoint.
        overrides: the caller's settings.
        resizing: of positions for other sizes than the checkpoint's.
        fill: loads (model, weights, settings, overrides), default :func:`fit`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, and listing unknown, missing, left-over and misshapen entries.
    """
    with naming(source):
        settings, weights = convert(load(source), **overrides)
        model = cls(**{**settings, **overrides})
        with torch.device("meta"):
            own = grids(cls(**settings))
        resize_tables(weights, own, grids(model), resizing)
        if fill is None:
            fit(model, weights, overrides)
        else:
            fill(model, weights, settings, overrides)
    return model


def fit(model: nn.Module, weights: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> None:
    """Load renamed weights; parts that ``overrides`` declare and that differ from the checkpoint's start anew."""
    own, weights = model.state_dict(), dict(weights)
    fresh, renewed = [], []
    for part in sorted({_part(key) for key in (*own, *weights)}):
        name = part.rpartition(".")[2]
        relevant = [s for begin, settings in PARTS.items() if name.startswith(begin) for s in settings]
        declared = [s for s in relevant if s in overrides]
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


def _part(key: str) -> str:
    """The first component of a key, or as many as lead to one that :data:`PARTS` names: ``audio.decoder``."""
    parts = key.split(".")
    named = [i for i, part in enumerate(parts[:-1]) if part.startswith(tuple(PARTS))]
    return ".".join(parts[: named[0] + 1] if named else parts[:1])


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
