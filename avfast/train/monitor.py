"""What is watched while a run goes on: losses that are not finite, files that cannot be read, speed."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from avfast.data.clips import BadFiles, Batch, Failure, TooManyBadFiles
from avfast.data.manifest import ClipList
from avfast.train import parallel
from avfast.train.log import Log


class RunError(RuntimeError):
    """The run cannot go on: too many bad files, or a loss that is not finite."""


class Window:
    """What happened since the last log line, kept on the device so that no step waits for it."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, torch.Tensor], list[int]]] = []
        self.failures: list[Failure] = []
        self.began = time.perf_counter()

    def add(self, step: int, losses: dict[str, torch.Tensor], batches: list[Batch]) -> None:
        """One step of this process."""
        self.rows.append((step, losses, [int(i) for batch in batches for i in batch.index]))
        self.failures += [failure for batch in batches for failure in batch.failures]

    def close(self, clips: ClipList, bad: BadFiles, log: Log) -> dict[str, Any]:
        """Means over the steps and processes. Raises RunError for a loss that is not finite."""
        names = list(self.rows[-1][1])
        values = torch.stack([torch.stack([row[name] for name in names]) for _, row, _ in self.rows]).cpu()
        broken = [
            (step, row[0].item(), [clips.clips[i].id for i in index])
            for (step, _, index), row in zip(self.rows, values, strict=True)
            if not torch.isfinite(row).all()
        ]
        shares = parallel.gather(
            (values.double().mean(0).tolist(), sum(len(i) for *_, i in self.rows), self.failures, broken[:1])
        )
        seconds = time.perf_counter() - self.began
        account(bad, [failure for share in shares for failure in share[2]], log)
        if found := [(*broken[0], rank) for rank, (*_, broken) in enumerate(shares) if broken]:
            step, value, ids, rank = min(found)
            raise RunError(f"step {step}: the loss is {value}, not finite, on rank {rank} with clips {', '.join(ids)}")
        means = dict(zip(names, np.mean([share[0] for share in shares], 0).tolist(), strict=True))
        count = sum(share[1] for share in shares)
        loss = means.pop("loss")
        return {
            "loss": loss,
            "losses": means,
            "clips_per_second": count / seconds,
            "clips": count,
            "seconds": seconds,
        }


def account(bad: BadFiles, failures: list[Failure], log: Log) -> None:
    """Names each bad file once and ends the run when there are too many; ``failures`` are those of all processes."""
    for failure in bad.add(failures):
        log.say(f"bad file {failure.path}: {failure.reason}")
    try:
        bad.check()
    except TooManyBadFiles as error:
        raise RunError(f"--max_bad_files: {error}") from None
