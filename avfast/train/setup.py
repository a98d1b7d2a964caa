"""What happens before the first step: seeds, the run folder, the checkpoint to continue from, the model."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from avfast.checkpoints import grids, resize_tables
from avfast.distributed import world_size
from avfast.train import checkpoint, parallel
from avfast.train.config import Config, SettingError, fields, model_settings

if TYPE_CHECKING:
    from avfast.models import Model
    from avfast.train.trainer import Trainer


# What the flags that name weights of elsewhere are to `Model.load_pretrained`.
SOURCES = {"timm": "image", "init_ast": "spectrogram", "init_audio": "audio", "init_video": "video"}
KINDS = {"init_audio": "an AudioMAE checkpoint", "init_video": "a mae_st checkpoint"}


def seed_everything(config: Config) -> None:
    """Seeds every generator and, where asked, allows deterministic kernels only."""
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def run_folder(config: Config) -> Path:
    """The run folder, not made yet; the same on every process."""

    def choose() -> str:
        out = Path(config.out or f"runs/{config.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        if config.resume is None and checkpoint.complete(out / "checkpoints"):
            raise SettingError(f"--out {out} holds checkpoints: continue with --resume auto or choose another folder")
        return str(out)

    return Path(parallel.first_only(choose))


def open_folder(config: Config, out: Path) -> None:
    """Makes the run folder, once nothing speaks against the run any more, with its config.json."""

    def make() -> None:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        checkpoint.clean(out / "checkpoints")
        (out / "config.json").write_text(config.to_json())

    parallel.first_only(make)


def resume_point(config: Config, out: Path) -> Path | None:
    """The checkpoint to continue from, None for a fresh start."""
    if config.resume is None:
        return None
    if config.resume != "auto":
        return checkpoint.find(config.resume)
    if config.out is None:
        raise SettingError("--resume auto needs the run folder: --out RUN")
    found = checkpoint.complete(out / "checkpoints")
    return found[-1] if found else None


def check_same(config: Config, saved: dict[str, Any], path: Path) -> None:
    """Refuses to continue with settings that would make it another run."""
    old, new = saved["config"], json.loads(config.to_json())
    # an older checkpoint lacks the settings that came later, and ran with what are their defaults
    old = json.loads(Config().to_json()) | old
    kept = {k for k, field in fields().items() if not field.metadata["free"]}
    if config.adaptive_batch:
        kept.add("epochs")  # they say which clips make up which batch
    changed = [f"{k} {old[k]} -> {v}" for k, v in new.items() if k in kept and old[k] != v]
    batch = config.batch_size * world_size()
    if batch != saved["global_batch"]:
        changed.append(f"clips per forward pass over all processes {saved['global_batch']} -> {batch}")
    if changed:
        raise SettingError(f"--resume {path}: settings differ from the checkpoint's: {'; '.join(changed)}")


def check_clips(config: Config, saved: dict[str, Any], digest: str, path: Path) -> bool:
    """Whether the training clips are others than the checkpoint's, which is refused unless ``other_clips`` is set."""
    before = saved.get("clips", digest)  # checkpoints of version 0.1 do not know
    if before != digest and not config.other_clips:
        raise SettingError(
            f"--resume {path}: the training clips are others than the checkpoint's ({before} -> {digest}); "
            "--other_clips continues with them"
        )
    return before != digest


def check_compiler(device: torch.device) -> None:
    """Raises SettingError where torch.compile will find no compiler to build its kernels with."""
    variable, names = ("CC", ("gcc", "clang", "cc")) if device.type == "cuda" else ("CXX", ("g++", "clang++", "c++"))
    own = os.environ.get(variable)
    if not any(shutil.which(name) for name in ([own] if own else names)):
        missing = own or " or ".join(names[:2])
        raise SettingError(f"--compile needs a C++ compiler: no {missing} found; install one or set {variable}")


def check_jpeg(config: Config, device: torch.device) -> None:
    """Raises SettingError where frames are to be decoded on a GPU that is not there, or that decoded ones are kept."""
    if config.gpu_jpeg and device.type != "cuda":
        raise SettingError(f"--gpu_jpeg needs a CUDA device; this run is on {device}")
    if config.gpu_jpeg and config.cache_media:
        raise SettingError("--gpu_jpeg: --cache_media keeps decoded frames; use one of the two")


def build_model(config: Config, fresh: bool = True) -> Model:
    """The model with the weights it starts from."""
    from avfast.models import create_model

    arguments = model_settings(config.model, config.model_args)
    try:
        model: Model = create_model(config.model, **arguments)
        model.frontend  # noqa: B018 (its arguments are checked on first use)
    except (TypeError, ValueError, KeyError, RuntimeError, ArithmeticError, AssertionError) as error:
        given = "".join(f" --model.{name} {value}" for name, value in arguments.items())
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SettingError(f"--model {config.model}{given}: {reason}") from error
    if fresh:
        for flag in SOURCES:
            if getattr(config, flag):
                start_from_file(model, config, flag)
    if config.init_from and fresh:
        path = checkpoint.find(config.init_from)
        state, _ = checkpoint.load(path)
        resize_tables(state, checkpoint.grids_of(path), grids(cast(nn.Module, model)), config.resizing)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise SettingError(f"--init_from {config.init_from}: {' '.join(str(error).split())}") from None
    return model


def whole_model(trainer: Trainer) -> Model:
    """The model for evaluation; a copy where parameters are sharded. Every process must call it.

    Sharded parameters gather block by block in step with the other processes, and evaluation does not go in step.
    """
    if trainer.config.shard == "none":
        return trainer.model
    state = trainer.model_state(everywhere=True)
    model = build_model(trainer.config, fresh=False).to(trainer.device)
    model.load_state_dict(state)
    return model


def start_from_file(model: Model, config: Config, flag: str) -> None:
    """Takes an encoder's weights from elsewhere: a flag of :data:`SOURCES`."""
    from avfast.released.vit import timm_vit

    given, source = getattr(config, flag), SOURCES[flag]
    if source not in model.sources:
        kind = KINDS.get(flag, "a Vision Transformer")
        raise SettingError(f"--{flag} {given}: {config.model} does not start from {kind}; use none")
    try:
        weights = given
        if flag == "timm":
            weights = timm_vit(given, True, model.frontend.image_size).state_dict()
        model.load_pretrained(**{source: weights})
    except Exception as error:  # timm, its download client and the readers of files raise many kinds
        reason = " ".join(str(error).split())[:300]
        raise SettingError(f"--{flag} {given}: {reason}; --{flag} none starts from random weights") from error
