"""A run from settings to summary."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

from avfast.data.clip_list import ClipList
from avfast.data.clips import BadFiles, Batch, ClipDataset, StepBatches, make_loader
from avfast.data.dataset import modalities
from avfast.distributed import world_size
from avfast.train import checkpoint, data, parallel
from avfast.train.config import Config, SettingError
from avfast.train.evaluate import Neighbours
from avfast.train.log import Log
from avfast.train.monitor import Window, account
from avfast.train.setup import build_model, check_same, resume_point, run_folder, seed_everything, whole_model
from avfast.train.summary import finish
from avfast.train.trainer import Trainer, learning_rate, unimodal_factor


def run(config: Config) -> dict[str, Any]:
    """Trains, checkpoints and evaluates; returns what summary.json holds.

    Raises:
        SettingError: a setting is wrong or does not fit the checkpoint.
        RunError: too many bad files, or a loss that is not finite.
    """
    seed_everything(config)
    device = parallel.start(config.device)
    out = run_folder(config)
    resumed = resume_point(config, out)
    train, held_out = data.sources(config)
    if not train.clips:
        raise SettingError(f"no clips to train on: all {len(held_out)} were held out")
    clips = data.shuffled(train, config.seed) if config.shuffle_pairs else train
    trainer = Trainer(build_model(config, fresh=resumed is None).to(device), config, device)
    found = parallel.first_only(lambda: modalities(train.clips))
    data.check_pairs(found, bool(getattr(trainer.model, "contrastive_weight", 0)))
    bad = BadFiles(len(train) + len(held_out), config.max_bad_files)
    batches = StepBatches(
        len(clips),
        config.batch_size * world_size(),
        steps=0,
        seed=config.seed,
        rank=parallel.rank(),
        world_size=world_size(),
        weights=[clip.weight for clip in clips.clips] if config.weights_csv else None,
    )
    per_epoch = batches.steps_per_epoch / config.accumulate
    total = ceil(config.epochs * per_epoch) if config.steps is None else config.steps
    start = 0
    if resumed is not None:
        model_state, state = checkpoint.load(resumed)
        check_same(config, state, resumed)
        trainer.load(model_state, state)
        start = state["step"]
        bad.reasons.update(state["bad_files"])
    total = max(total, start)
    if parallel.rank() == 0:
        (out / "config.json").write_text(config.to_json())
    log = Log(out, total, start, config.tensorboard)
    try:
        introduce(trainer, train, held_out, log, total, start, out)
        for line in dict.fromkeys((*train.notes, *held_out.notes, str(found))):
            log.say(line)
        dataset = ClipDataset(
            clips,
            frontend=trainer.model.frontend,
            train=True,
            seed=config.seed,
            cache=config.cache_media,
            crop_scale=config.crop_scale,
        )
        batches.start_step, batches.steps = start * config.accumulate, total * config.accumulate
        loader = make_loader(dataset, batches, config.workers, pin_memory=device.type == "cuda")
        if config.cache_media and len(batches):
            log.say("decoding all clips into memory")
            failures = parallel.gather(dataset.warm(log.progress(len(dataset))))
            account(bad, [failure for share in failures for failure in share], log)
        probe = None
        if config.neighbours_every and len(held_out) > 1 and held_out.class_names:
            probe = Neighbours(config, held_out, trainer.model.frontend)
        speed = fit(trainer, clips, iter(loader), log, bad, out, start, total, per_epoch, probe)
        short = len(set().union(*parallel.gather(loader.short)))
        truncated = sorted(set().union(*parallel.gather(loader.truncated)))
        files = {"short_clips": short, "truncated_files": truncated, "modalities": asdict(found)}
        return finish(trainer, train, held_out, log, bad, out, total, speed, files)
    finally:
        log.close()


def introduce(
    trainer: Trainer, train: ClipList, held_out: ClipList, log: Log, total: int, start: int, out: Path
) -> None:
    """The first lines of a run."""
    config = trainer.config
    parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    precision = "fp32" if trainer.dtype is None else str(trainer.dtype).removeprefix("torch.")
    log.say(
        f"{config.recipe}: {config.model} ({parameters:.1f}M parameters), {len(train)} clips, "
        f"{len(held_out)} held out, {world_size()} x {config.batch_size} clips a step on {trainer.device} in "
        f"{precision}, {total} steps, run folder {out}"
    )
    if start:
        log.say(f"continuing after step {start}")
    gathered = config.batch_size * world_size()
    contrasts = getattr(trainer.model, "contrastive_weight", 0)
    if contrasts and config.paper_batch and gathered < config.paper_batch / 2 and parallel.rank() == 0:
        warnings.warn(
            f"the contrastive loss sees {gathered} clips at once, the paper's {config.paper_batch}; "
            f"--accumulate adds no negatives",
            stacklevel=2,
        )


def fit(
    trainer: Trainer,
    clips: ClipList,
    loader: Iterator[Batch],
    log: Log,
    bad: BadFiles,
    out: Path,
    start: int,
    total: int,
    per_epoch: float,
    probe: Neighbours | None = None,
) -> float | None:
    """The training loop. Returns clips per second over all processes, probes and checkpoints left out."""
    config = trainer.config
    every = config.checkpoint_every or max(round(per_epoch), 1)
    probe_every = max(round((config.neighbours_every or 0) * per_epoch), 1)
    window = Window()
    done, seconds = 0, 0.0
    for step in range(start, total):
        batches = list(islice(loader, config.accumulate))
        rate = learning_rate(config, step, per_epoch, total)
        window.add(step + 1, trainer.step(batches, rate, unimodal_factor(config, step, total)), batches)
        log.advance()
        saves = (step + 1) % every == 0 or step + 1 == total
        probes = probe is not None and (step + 1) % probe_every == 0
        if saves or probes or (step + 1) % config.log_every == 0:
            row = window.close(clips, bad, log)
            done, seconds = done + row.pop("clips"), seconds + row.pop("seconds")
            row |= {"lr": rate, "epoch": (step + 1) / per_epoch}
            if probe is not None and probes:
                row["neighbours"] = probe(whole_model(trainer), trainer.device)
            log.record(step + 1, row)
            if saves:
                save(trainer, out, step + 1, bad)
            window = Window()  # the clock starts after probing and writing
    return done / seconds if seconds else None


def save(trainer: Trainer, out: Path, step: int, bad: BadFiles) -> None:
    """A checkpoint of the whole run, written by rank 0."""
    config = trainer.config
    model = trainer.model_state()
    state = trainer.state() | {
        "step": step,
        "config": json.loads(config.to_json()),
        "global_batch": config.batch_size * world_size(),
        "bad_files": bad.reasons,
    }
    parallel.first_only(
        lambda: checkpoint.save(out / "checkpoints", step, model, state, config.keep_checkpoints) and None
    )
