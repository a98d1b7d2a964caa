"""What happens before the first step: seeds, the run folder, the checkpoint to continue from, the model."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from avfast.distributed import world_size
from avfast.train import checkpoint, parallel
from avfast.train.config import Config, SettingError

if TYPE_CHECKING:
    from avfast.train.trainer import Trainer

# Settings that may change when a run is resumed: where it runs, how long, what it says, how it is judged.
FREE = {
    "out", "resume", "epochs", "steps", "device", "workers", "cache_media", "shard", "checkpoint_activations",
    "log_every", "checkpoint_every", "keep_checkpoints", "tensorboard", "pictures", "evaluate", "eval_clips",
    "probe_clips", "probe_l2", "neighbours_every", "group_parts", "max_bad_files", "eval_data", "timm", "init_ast",
    "init_audio", "init_from", "batch_size", "paper_batch", "compile", "cuda_graph",
}  # fmt: skip


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
    """The run folder, made; the same on every process."""

    def make() -> str:
        out = Path(config.out or f"runs/{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
        checkpoints = out / "checkpoints"
        if config.resume is None and checkpoint.complete(checkpoints):
            raise SettingError(f"--out {out} holds checkpoints: continue with --resume auto or choose another folder")
        checkpoints.mkdir(parents=True, exist_ok=True)
        checkpoint.clean(checkpoints)
        return str(out)

    return Path(parallel.first_only(make))


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
    changed = [f"{k} {old.get(k)} -> {v}" for k, v in new.items() if k not in FREE and old.get(k) != v]
    batch = config.batch_size * world_size()
    if batch != saved["global_batch"]:
        changed.append(f"clips per forward pass over all processes {saved['global_batch']} -> {batch}")
    if changed:
        raise SettingError(f"--resume {path}: settings differ from the checkpoint's: {'; '.join(changed)}")


def build_model(config: Config, fresh: bool = True) -> nn.Module:
    """The model with the weights it starts from."""
    from avfast.models import create_model

    try:
        model = create_model(config.model, **config.model_args)
        model.frontend  # noqa: B018 (its arguments are checked on first use)
    except (TypeError, ValueError, KeyError) as error:
        raise SettingError(f"--model {config.model}: {error}") from None
    if fresh:
        for flag in ("timm", "init_ast", "init_audio"):
            if getattr(config, flag):
                start_from_file(model, config, flag)
    if config.init_from and fresh:
        state, _ = checkpoint.load(checkpoint.find(config.init_from))
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise SettingError(f"--init_from {config.init_from}: {' '.join(str(error).split())}") from None
    return model


def whole_model(trainer: Trainer) -> nn.Module:
    """The model for evaluation; a copy where parameters are sharded. Every process must call it.

    Sharded parameters gather block by block in step with the other processes, and evaluation does not go in step.
    """
    if trainer.config.shard == "none":
        return trainer.model
    state = trainer.model_state(everywhere=True)
    model = build_model(trainer.config, fresh=False).to(trainer.device)
    model.load_state_dict(state)
    return model


def start_from_file(model: nn.Module, config: Config, flag: str) -> None:
    """Takes an encoder's weights from elsewhere: ``timm``, ``init_ast`` or ``init_audio``."""
    from avfast import checkpoints

    given = getattr(config, flag)
    takes = {"timm": ("load_vit", "load_pretrained"), "init_ast": ("load_vit",), "init_audio": ("load_pretrained",)}
    load = next((getattr(model, name) for name in takes[flag] if hasattr(model, name)), None)
    if load is None:
        kind = "an AudioMAE checkpoint" if flag == "init_audio" else "a Vision Transformer"
        raise SettingError(f"--{flag} {given}: {config.model} does not start from {kind}; use none")
    try:
        if flag == "timm":
            load(checkpoints.timm_vit(given, True, model.img_size).state_dict())
        elif flag == "init_ast":
            load(checkpoints.ast(checkpoints.load(given)))
        else:
            load(audio=given)
    except Exception as error:  # timm, its download client and the readers of files raise many kinds
        reason = " ".join(str(error).split())[:300]
        raise SettingError(f"--{flag} {given}: {reason}; --{flag} none starts from random weights") from error
