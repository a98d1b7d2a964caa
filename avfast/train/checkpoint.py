"""Atomic checkpoints: a folder per step that appears under its name only when it is complete."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from avfast.checkpoints import Grid, grids
from avfast.train.config import Config, SettingError, from_dict
from avfast.train.recipes import load_model_of
from avfast.weight_files import read, write

MODEL, STATE = "model.safetensors", "train_state.pt"


def save(folder: Path, step: int, model: Mapping[str, Tensor], state: dict[str, Any], keep: int = 2) -> Path:
    """Writes ``folder/step-N``; a kill at any moment leaves the earlier checkpoints untouched.

    Args:
        folder: the run's ``checkpoints``.
        step: optimiser steps done.
        model: full state dict.
        state: plain types and tensors only, so that it loads with ``weights_only=True``.
        keep: newest checkpoints kept, 0 for all.
    """
    final, temporary = folder / f"step-{step}", folder / f".writing-step-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary / MODEL, model)
    torch.save(state, temporary / STATE)
    for path in (temporary / MODEL, temporary / STATE, temporary):
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    _sync(folder)
    if keep:
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clean(folder: Path) -> None:
    """Removes what a killed run left half written."""
    for path in folder.glob(".writing-step-*"):
        shutil.rmtree(path, ignore_errors=True)


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("step-*") if p.name[5:].isdigit() and (p / MODEL).exists() and (p / STATE).exists()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def find(where: str | Path) -> Path:
    """The checkpoint folder meant by a run folder (its newest), a checkpoint folder or a file in one; absolute."""
    path = Path(where).absolute()
    if path.name in (MODEL, STATE) and path.is_file():
        path = path.parent
    if (path / MODEL).exists():
        return path
    found = complete(path / "checkpoints") or complete(path)
    if not found:
        raise SettingError(f"{where}: no checkpoint; expected a run folder or a folder with {MODEL} and {STATE}")
    return found[-1]


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The model's state dict and the train state, on the CPU."""
    if not ((path / MODEL).exists() and (path / STATE).exists()):
        raise SettingError(f"{path}: not a checkpoint; expected a folder with {MODEL} and {STATE}")
    return read(path / MODEL), read(path / STATE)


def settings_of(path: Path) -> Config:
    """The settings of the run that wrote a checkpoint folder, wherever that is now."""
    if not (path / STATE).exists():
        raise SettingError(f"{path}: no {STATE}, which holds the model's settings; copy the whole folder")
    state = read(path / STATE, mmap=True)  # the optimisers' tensors beside the settings are not read
    if not isinstance(state, dict) or "config" not in state:
        raise SettingError(f"{path / STATE}: holds no settings, so no run has written it")
    return load_model_of(from_dict(state["config"], str(path / STATE)))


def load_model(where: str | Path) -> nn.Module:
    """The trained model of a run folder (its newest checkpoint) or of one of its checkpoint folders, on the CPU.

    A checkpoint folder may have been copied to another place; a file in it stands for the folder.
    """
    from avfast.models import create_model

    path = find(where)
    config = settings_of(path)
    model = create_model(config.model, **config.model_args)
    model.load_state_dict(read(path / MODEL))
    return model


def grids_of(path: Path) -> dict[str, Grid]:
    """The grids of the position tables of a checkpoint folder's model; no generator moves on."""
    from avfast.models import create_model

    config = settings_of(path)
    with torch.random.fork_rng(devices=[]):
        return grids(create_model(config.model, **config.model_args))


def rng_state() -> dict[str, Any]:
    """The state of every random number generator of this process, as plain types and tensors."""
    kind, keys, position, has_gauss, cached = cast(tuple[Any, ...], np.random.get_state())
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores what :func:`rng_state` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
