"""A run from settings to summary."""

from __future__ import annotations

import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import closing
from math import ceil
from pathlib import Path
from typing import Any

import torch

from avfast.data.bad_files import BadFiles
from avfast.data.clips import Batch, ClipDataset, Loader, StepBatches, make_loader
from avfast.data.dataset import modalities
from avfast.distributed import world_size
from avfast.train import checkpoint, data, parallel, slurm, trackers
from avfast.train.config import Config, SettingError
from avfast.train.evaluate import KNN
from avfast.train.log import Log
from avfast.train.monitor import Meter, Signals, Stopped
from avfast.train.run import Run
from avfast.train.schedule import Schedule, batch_sizes
from avfast.train.setup import (
    build_model,
    check_clips,
    check_compiler,
    check_jpeg,
    check_same,
    open_folder,
    resume_point,
    run_folder,
    seed_everything,
    whole_model,
)
from avfast.train.speed import backends, matmul_rate
from avfast.train.summary import finish
from avfast.train.trainer import Trainer


def run(config: Config) -> dict[str, Any]:
    """Trains, checkpoints and evaluates; returns what summary.json holds.

    Raises:
        SettingError: a setting is wrong or does not fit the checkpoint.
        RunError: too many bad files, a loss or features that are not finite.
        Stopped: by SIGINT, SIGTERM or SIGUSR1, with a checkpoint where a step was taken.
    """
    if config.requeue:
        slurm.check(config)
    seed_everything(config)
    device = parallel.start(config.device)
    out = run_folder(config)
    new = not out.exists()
    with Signals() as signals:
        try:
            return _run(config, device, out, signals)
        except KeyboardInterrupt:
            raise stopped(config, out, signals) from None
        finally:
            # on every way out, so that a run that came to nothing leaves nothing
            if new and parallel.rank() == 0 and is_empty(out):
                shutil.rmtree(out, ignore_errors=True)


def stopped(config: Config, out: Path, signals: Signals) -> Stopped:
    """What a run ends with that a signal has stopped: exit code 0 where it was asked for and all is kept."""
    number = signals.number or signal.SIGINT
    message = how_to_continue(out, number)
    kept = number != signal.SIGINT and bool(checkpoint.complete(out / "checkpoints"))
    if config.requeue and number == signal.SIGUSR1 and parallel.rank() == 0:
        asked = slurm.requeue()
        message, kept = f"{message}; {asked or 'SLURM starts the job again'}", kept and not asked
    return Stopped(message, 0 if kept else 128 + number, signals.agreed)


def how_to_continue(out: Path, number: int) -> str:
    """One line for who stopped a run."""
    name = signal.Signals(number or signal.SIGINT).name
    found = checkpoint.complete(out / "checkpoints")
    if not found:
        return f"{name} before the first checkpoint: nothing to continue"
    many = world_size()
    launch = "python" if many == 1 else f"torchrun --nproc_per_node={many}"
    step = found[-1].name.removeprefix("step-")
    return f"{name}: {found[-1]} holds the run after step {step}; continue: {launch} -m avfast.train --resume {out}"


def is_empty(out: Path) -> bool:
    """Whether a run folder holds nothing that a step has made."""
    metrics = out / "metrics.jsonl"
    made = checkpoint.complete(out / "checkpoints") or (out / "summary.json").exists()
    return not made and not (metrics.exists() and metrics.stat().st_size)


def _run(config: Config, device: torch.device, out: Path, signals: Signals) -> dict[str, Any]:
    """The run, once processes, device and run folder are known."""
    run = prepare(config, device, out)
    try:
        introduce(run)
        loader = open_clips(run)
        with closing(iter(loader)) as batches:  # its workers end here, also where a signal ends the run
            totals = fit(run, batches, signals)
        short = len(set().union(*parallel.gather(loader.short)))
        truncated = sorted(set().union(*parallel.gather(loader.truncated)))
        return finish(run, totals | {"short_clips": short, "truncated_files": truncated})
    finally:
        run.log.close()


def prepare(config: Config, device: torch.device, out: Path) -> Run:
    """The run before its first step. Its folder is made last, once nothing speaks against the run any more."""
    resumed = resume_point(config, out)
    backends(device)  # raises where the named one cannot run
    if config.compile:
        check_compiler(device)
    check_jpeg(config, device)
    trackers.check(config.tracker)
    # before the clips: lists of millions take minutes
    trainer = Trainer(build_model(config, fresh=resumed is None).to(device), config, device)
    train, held_out = data.sources(config)
    if not train.clips:
        raise SettingError(f"no clips to train on: all {len(held_out)} were held out")
    clips = data.shuffled(train, config.seed) if config.shuffle_pairs else train
    found = parallel.first_only(lambda: modalities(train.clips))
    data.check_pairs(found, trainer.model.contrasts)
    bad = BadFiles(len(train) + len(held_out), config.max_bad_files)
    start, digest, others = 0, data.digest(train), False
    if resumed is not None:
        model_state, state = checkpoint.load(resumed)
        check_same(config, state, resumed)
        others = check_clips(config, state, digest, resumed)
        trainer.load(model_state, state)
        start = state["step"]
        bad.reasons.update(state["bad_files"])
    batches = StepBatches(
        len(clips),
        batch_sizes(config, trainer.model.visible),
        steps=0,
        epochs=ceil(config.epochs),
        seed=config.seed,
        rank=parallel.rank(),
        world_size=world_size(),
        weights=data.weights(config, clips),
        shards=data.shards(config, clips),
        together=config.shuffle_shards or 1,
    )
    schedule = Schedule(config, batches, start)
    batches.start_step, batches.steps = start * config.accumulate, schedule.total * config.accumulate
    rate = sum(parallel.gather(matmul_rate(device, trainer.dtype))) if config.count_flops else None
    open_folder(config, out)
    log = Log(out, schedule.total, start, trackers.start(config, out, start))
    return Run(
        config, out, trainer, train, held_out, clips, modalities=found, digest=digest, other_clips=others,
        batches=batches, start=start, schedule=schedule, bad=bad, log=log, matmul_rate=rate,
    )  # fmt: skip


def introduce(run: Run) -> None:
    """The first lines of a run."""
    config, trainer, log = run.config, run.trainer, run.log
    parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    precision = "fp32" if trainer.dtype is None else str(trainer.dtype).removeprefix("torch.")
    rate = f", matmul {run.matmul_rate / 1e12:.3g} TFLOP/s" if run.matmul_rate else ""
    log.say(
        f"{config.name}: {config.model} ({parameters:.1f}M parameters) on {trainer.device} in {precision}, "
        f"{backends(trainer.device)}{rate}"
    )
    first, last = (run.batches.size(epoch) for epoch in (0, max(run.batches.epochs - 1, 0)))
    changing = f" ({first} clips in the first epoch, {last} in the last)" if first != last else ""
    log.say(
        f"{len(run.train)} clips, {len(run.held_out)} held out, {world_size()} x {config.batch_size} clips a step"
        f"{changing}, {run.total} steps, run folder {run.out}"
    )
    if run.start:
        log.say(f"continuing after step {run.start}")
    for line in dict.fromkeys((*run.train.notes, *run.held_out.notes, str(run.modalities))):
        log.say(line)
    if run.other_clips:
        log.say("the training clips are others than before, as --other_clips allows")
    gathered = config.batch_size * world_size()
    if trainer.model.contrasts and config.paper_batch and gathered < config.paper_batch / 2 and parallel.rank() == 0:
        warnings.warn(
            f"the contrastive loss sees {gathered} clips at once, the paper's {config.paper_batch}; "
            f"--accumulate adds no negatives",
            stacklevel=2,
        )


def open_clips(run: Run) -> Loader:
    """What gives the batches of the steps; with ``cache_media`` once every clip is decoded."""
    config = run.config
    dataset = ClipDataset(
        run.clips,
        frontend=run.trainer.model.frontend,
        train=True,
        seed=config.seed,
        cache=config.cache_media,
        crop_scale=config.crop_scale,
        jpegs=config.gpu_jpeg,
    )
    loader = make_loader(dataset, run.batches, config.workers, pin_memory=run.trainer.device.type == "cuda")
    if config.cache_media and len(run.batches):
        run.log.say("decoding all clips into memory")
        failures = parallel.gather(dataset.warm(run.log.progress(len(dataset))))
        run.account([failure for share in failures for failure in share])
    return loader


def fit(run: Run, loader: Iterator[Batch], signals: Signals) -> dict[str, Any]:
    """The training loop. Returns :meth:`Meter.totals`, probes and checkpoints left out."""
    config, trainer, schedule = run.config, run.trainer, run.schedule
    probe = None
    if config.knn_every and len(run.held_out) > 1 and run.held_out.class_names:
        probe = KNN(config, run.held_out, trainer.model.frontend)
    meter = Meter(run)
    size = None
    signals.stepping = True
    for step in range(run.start, run.total):
        batches = meter.take(loader)
        if config.compile and size not in (None, batches[0].total):
            torch.compiler.reset()  # of one pass it keeps eight shapes, and the earlier ones do not come again
        size = batches[0].total
        rate, unimodal = schedule.rates(step)
        meter.add(step + 1, trainer.step(batches, rate, unimodal))
        run.log.advance()
        last = step + 1 == run.total
        stopped = signals.asked(last)
        due = (step + 1) % config.checkpoint_every == 0 if config.checkpoint_every else schedule.ends(step, 1)
        saves = due or last or stopped
        probes = probe is not None and schedule.ends(step, config.knn_every or 1)
        if saves or probes or (step + 1) % config.log_every == 0:
            row = meter.close() | {"lr": rate, "epoch": schedule.epochs(step + 1), "batch": size}
            if probe is not None and probes:
                row["knn"] = probe(whole_model(trainer), trainer.device)
            run.log.record(step + 1, row)
            if saves:
                run.save(step + 1)
            if stopped:
                raise KeyboardInterrupt
            meter.restart()
    signals.stepping = False
    if signals.number:  # came after the last exchange: as one that comes while the run is judged
        raise KeyboardInterrupt
    return meter.totals()
