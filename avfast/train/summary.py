"""What a run leaves behind: scores, figures, summary.json."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avfast.data.clips import ClipDataset, eval_loader
from avfast.data.manifest import ClipList
from avfast.distributed import world_size
from avfast.models import Model
from avfast.train import data, parallel
from avfast.train.evaluate import evaluate, nothing, table
from avfast.train.figures import (
    Labels,
    draw_attention,
    draw_losses,
    draw_reconstructions,
)
from avfast.train.run import Run, RunError
from avfast.train.setup import whole_model
from avfast.train.trainer import Trainer

CANDIDATES = 3  # clips from which each row of a figure is chosen


def finish(run: Run, found: dict[str, Any]) -> dict[str, Any]:
    """Evaluation, figures and summary.json, which holds ``found`` too."""
    config, trainer, log, out = run.config, run.trainer, run.log, run.out
    model = whole_model(trainer)
    summary: dict[str, Any] = nothing()
    if config.evaluate:
        summary, failures = evaluate(model, config, run.train, run.held_out, trainer.device)
        run.account(failures)
        log.say(table(summary))
    clips = len(run.train) + len(run.held_out)
    summary |= {
        "steps": run.total,
        "clips": {"train": len(run.train), "held_out": len(run.held_out)},
        "clips_present": clips / (clips + run.train.missing) if clips else None,
        "modalities": asdict(run.modalities),
        **found,
        "bad_files": run.bad.summary(),
        "model": config.model,
        "recipe": config.recipe,
        "processes": world_size(),
        "device": str(trainer.device),
    }
    title = f"{config.name}: {config.model} after {run.total} steps"
    if config.figures:
        paint(trainer, model, run.held_out, out, f"{title}, held-out clips")
    if parallel.rank() == 0:
        contrasted = min(config.batch_size * world_size(), len(run.train))
        draw_losses(log.path, f"{config.name}: {config.model}", out / "loss.png", contrasted)
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    if summary["diverged"]:
        raise RunError(f"{summary['diverged']}: the model has diverged and has no scores; the rest is in {out}")
    log.say(f"summary, figures and checkpoints are in {out}")
    return summary


def paint(trainer: Trainer, model: Model, clips: ClipList, out: Path, title: str) -> None:
    """reconstruction.png and attention.png of what the model shows; all processes take the same clips, rank 0 draws."""
    wanted = trainer.config.figures
    clips = data.first(clips, CANDIDATES * wanted)
    if not clips.clips:
        return
    dataset = ClipDataset(clips, frontend=model.frontend, train=False, seed=trainer.config.seed)
    (batch,) = eval_loader(dataset, len(clips))
    if not len(batch.index):
        return
    inputs, draws = trainer.inputs(batch, model.passes[-1], train=False)
    training = model.training
    model.eval()
    with torch.no_grad():
        output = model(**inputs, draws=draws)  # on every process: a contrastive loss is gathered over all
        if parallel.rank() == 0:
            figures = model.figures(inputs, draws, output)
    model.train(training)
    if parallel.rank() > 0:
        return

    def labels(rows: Tensor) -> Labels:
        return Labels.of(title, clips, batch.index[rows].tolist(), model.frontend)

    if shown := figures.reconstruction:
        # a clip of which little or nothing is hidden shows little: first those that are masked on every side
        hidden = torch.stack(list(shown.masked.values())).amin(0) > 0
        chosen = hidden.logical_not().long().argsort(stable=True)[:wanted].sort().values
        draw_reconstructions(shown.select(chosen), labels(chosen), out / "reconstruction.png")
    if maps := figures.attention:
        sides = ((maps.audio, batch.has_audio), (maps.visual, batch.has_visual))
        whole = torch.stack([has for x, has in sides if x is not None]).all(0).nonzero()[:wanted, 0]
        if len(whole):
            draw_attention(maps.select(whole), labels(whole), out / "attention.png")
