"""What is watched while a run goes on: signals, losses that are not finite, files that cannot be read, speed."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from avfast.data.clips import Batch, Failure
from avfast.distributed import world_size
from avfast.train import parallel
from avfast.train.run import Run, RunError


class Stopped(KeyboardInterrupt):
    """A signal ended the run; the message says how to continue it."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class Signals:
    """SIGINT and SIGTERM while a run goes on, as a context.

    While steps are taken, the first signal ends the run between two of them, the same two on every process. A second
    one, or one at another time, raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.number = 0
        self.stepping = False
        self._before: dict[int, Any] = {}
        self._sent: tuple[Any, torch.Tensor] | None = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._before = {n: signal.signal(n, self._met) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _met(self, number: int, frame: FrameType | None) -> None:
        again, self.number = self.number, number
        if again or not self.stepping:
            raise KeyboardInterrupt
        if parallel.rank() == 0:
            os.write(2, b"avfast: stopping after this step with a checkpoint; once more: at once\n")

    def asked(self, last: bool = False) -> bool:
        """Whether the run is to end here. Every process calls it after each step; nothing is sent after the ``last``.

        What the processes send each other after a step they read after the next, so that none of them waits.
        """
        if world_size() == 1:
            return self.number > 0
        heard = 0
        if self._sent is not None:
            work, flag = self._sent
            work.wait()
            heard, self._sent = int(flag), None
        if heard:
            self.number = heard
        elif not last:
            flag = torch.tensor([self.number])
            self._sent = (dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True), flag)
        return heard > 0


class Meter:
    """What happened since the last log line, kept on the device so that no step waits for it, and the run's speed.

    Its clock stands still between :meth:`close` and :meth:`restart`, where the run is probed and written.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.clips, self.seconds = run, 0, 0.0
        self.restart()

    def restart(self) -> None:
        """From here on time counts."""
        self.rows: list[tuple[int, dict[str, torch.Tensor], list[int]]] = []
        self.failures: list[Failure] = []
        self.began = time.perf_counter()

    def add(self, step: int, losses: dict[str, torch.Tensor], batches: list[Batch]) -> None:
        """One step of this process."""
        self.rows.append((step, losses, [int(i) for batch in batches for i in batch.index]))
        self.failures += [failure for batch in batches for failure in batch.failures]

    def close(self) -> dict[str, Any]:
        """Means over the steps and processes. Raises RunError for a loss that is not finite."""
        names = list(self.rows[-1][1])
        values = torch.stack([torch.stack([row[name] for name in names]) for _, row, _ in self.rows]).cpu()
        broken = [
            (step, row[0].item(), [self.run.clips.clips[i].id for i in index])
            for (step, _, index), row in zip(self.rows, values, strict=True)
            if not torch.isfinite(row).all()
        ]
        shares = parallel.gather(
            (values.double().mean(0).tolist(), sum(len(i) for *_, i in self.rows), self.failures, broken[:1])
        )
        seconds = time.perf_counter() - self.began
        self.run.account([failure for share in shares for failure in share[2]])
        if found := [(*broken[0], rank) for rank, (*_, broken) in enumerate(shares) if broken]:
            step, value, ids, rank = min(found)
            raise RunError(f"step {step}: the loss is {value}, not finite, on rank {rank} with clips {', '.join(ids)}")
        means = dict(zip(names, np.mean([share[0] for share in shares], 0).tolist(), strict=True))
        clips = sum(share[1] for share in shares)
        self.clips, self.seconds = self.clips + clips, self.seconds + seconds
        return {"loss": means.pop("loss"), "losses": means, "clips_per_second": clips / seconds}

    @property
    def clips_per_second(self) -> float | None:
        """Of the whole run over all processes, probes and checkpoints left out; None before the first line."""
        return self.clips / self.seconds if self.seconds else None
