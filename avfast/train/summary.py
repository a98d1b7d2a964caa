"""What a run leaves behind: scores, pictures, summary.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from avfast.data.clips import BadFiles, ClipDataset, eval_loader
from avfast.data.manifest import ClipList
from avfast.distributed import world_size
from avfast.train import data, parallel
from avfast.train.evaluate import evaluate, nothing, table
from avfast.train.log import Log
from avfast.train.monitor import RunError, account
from avfast.train.pictures import draw_fusion, draw_losses, draw_reconstructions, fusion_maps, reconstructions
from avfast.train.setup import whole_model
from avfast.train.trainer import Trainer


def finish(
    trainer: Trainer,
    train: ClipList,
    held_out: ClipList,
    log: Log,
    bad: BadFiles,
    out: Path,
    total: int,
    speed: float | None,
    files: dict[str, Any],
) -> dict[str, Any]:
    """Evaluation, pictures and summary.json; ``files`` is what is known of the training clips' files."""
    config, model = trainer.config, whole_model(trainer)
    summary: dict[str, Any] = nothing()
    if config.evaluate:
        summary, failures = evaluate(model, config, train, held_out, trainer.device)
        account(bad, failures, log)
        log.say(table(summary))
    summary |= {
        "clips_per_second": speed,
        "steps": total,
        "clips": {"train": len(train), "held_out": len(held_out)},
        **files,
        "bad_files": bad.summary(),
        "model": config.model,
        "recipe": config.recipe,
        "processes": world_size(),
        "device": str(trainer.device),
    }
    if config.pictures:
        paint(trainer, model, data.first(held_out, config.pictures), out)
    if parallel.rank() == 0:
        draw_losses(log.path, out / "loss.png")
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    if summary["diverged"]:
        raise RunError(f"{summary['diverged']}: the model has diverged and has no scores; the rest is in {out}")
    log.say(f"summary, pictures and checkpoints are in {out}")
    return summary


def paint(trainer: Trainer, model: nn.Module, clips: ClipList, out: Path) -> None:
    """reconstruction.png and fusion.png; every process takes the same clips, and rank 0 draws."""
    if not clips.clips:
        return
    dataset = ClipDataset(clips, frontend=model.frontend, train=False, seed=trainer.config.seed)
    for batch in eval_loader(dataset, len(clips)):
        if len(batch.index):
            audio, visual, draws = trainer.inputs(batch, model.branches[-1], train=False)
            rows = reconstructions(model, audio, visual, draws)
            if rows and parallel.rank() == 0:
                draw_reconstructions(rows, out / "reconstruction.png")
            both = (batch.has_audio & batch.has_visual).to(audio.device)
            maps = fusion_maps(model, audio[both], visual[both]) if parallel.rank() == 0 else None
            if maps:
                draw_fusion(maps, out / "fusion.png")
