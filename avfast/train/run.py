"""One run: its settings, trainer, clips, folder, log, bad files and steps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avfast.data.bad_files import BadFiles, TooManyBadFiles
from avfast.data.clip_list import ClipList
from avfast.data.clips import Failure, StepBatches
from avfast.data.dataset import Modalities
from avfast.distributed import world_size
from avfast.train import checkpoint, parallel
from avfast.train.config import Config
from avfast.train.log import Log
from avfast.train.schedule import Schedule
from avfast.train.trainer import Trainer


class RunError(RuntimeError):
    """The run cannot go on: too many bad files, a loss or features that are not finite."""


@dataclass
class Run:
    """A run that is ready for its next step.

    Args:
        config: its settings.
        out: its folder.
        trainer: model, optimisers and device.
        train: the clips it trains on, as they are.
        held_out: the clips it is judged by.
        clips: ``train`` as it is stepped through, which differs where pairs are shuffled.
        modalities: what ``train`` holds.
        digest: of ``train``.
        other_clips: whether they are others than those of the checkpoint it goes on from.
        batches: of all steps that are left.
        start: optimiser steps done before.
        schedule: of all its steps.
        bad: files that could not be decoded.
        log: its lines and metrics.
        matmul_rate: FLOP/s of matrix products on the devices of all processes; None where FLOPs are not counted.
    """

    config: Config
    out: Path
    trainer: Trainer
    train: ClipList
    held_out: ClipList
    clips: ClipList
    modalities: Modalities
    digest: str
    other_clips: bool
    batches: StepBatches
    start: int
    schedule: Schedule
    bad: BadFiles
    log: Log
    matmul_rate: float | None

    @property
    def total(self) -> int:
        """Optimiser steps of the whole run."""
        return self.schedule.total

    def account(self, failures: list[Failure]) -> None:
        """Names each bad file once; ``failures`` are those of all processes.

        Raises:
            RunError: there are too many.
        """
        for failure in self.bad.add(failures):
            self.log.say(f"bad file {failure.path}: {failure.reason}")
        try:
            self.bad.check()
        except TooManyBadFiles as error:
            raise RunError(f"--max_bad_files: {error}") from None

    def save(self, step: int) -> None:
        """A checkpoint of everything after ``step`` optimiser steps, written by rank 0; every process must call it."""
        model = self.trainer.model_state()
        state: dict[str, Any] = self.trainer.state() | {
            "step": step,
            "config": json.loads(self.config.to_json()),
            "global_batch": self.config.batch_size * world_size(),  # the smallest, with adaptive_batch
            "clips": self.digest,
            "bad_files": self.bad.reasons,
        }
        folder, keep = self.out / "checkpoints", self.config.keep_checkpoints
        parallel.first_only(lambda: checkpoint.save(folder, step, model, state, keep) and None)
