"""Checkpoints of other codebases: their layouts in, our parameter names out.

Here is what all converters share: read, unwrap, rename, resize, fit. :mod:`avfast.released` has one file per layout.
Every converter accounts for each key of the released file: mapped, or named in a drop list with the reason. Anything
else, and anything missing, is an error that lists the keys and names the file. What the caller's settings ask to differ
from the file (sizes, classes, decoder) is resized, left out or starts anew.
"""

from __future__ import annotations

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

from avfast.nn import sincos
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
