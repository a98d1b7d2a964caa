"""What is watched while a run goes on: signals, losses that are not finite, files that cannot be read, speed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from itertools import islice
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from avfast.data.clips import Batch, Failure
from avfast.distributed import world_size
from avfast.train import parallel
from avfast.train.run import Run, RunError
from avfast.train.speed import Work, peak_memory
from avfast.train.trainer import METRICS

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """A signal ended the run; the message says how to continue it.

    Attributes:
        code: the process's exit code.
        together: whether all processes end here.
    """

    def __init__(self, message: str, code: int, together: bool) -> None:
        super().__init__(message)
        self.code, self.together = code, together


class Signals:
    """SIGINT, SIGTERM and SIGUSR1 while a run goes on, as a context.

    While steps are taken, the first signal ends the run between two of them, the same two on every process; at another
    time it raises KeyboardInterrupt at once. Later ones change nothing (SLURM and torchrun both pass SIGTERM on, so a
    process may get it twice), but for SIGINT, which then raises KeyboardInterrupt at once.

    Attributes:
        number: of the signal that ends the run, 0 without one.
        stepping: whether steps are taken.
        agreed: whether every process has been told to end after the step it is at.
    """

    def __init__(self) -> None:
        self.number = 0
        self.stepping = self.agreed = False
        self._before: dict[int, Any] = {}
        self._sent: tuple[Any, torch.Tensor] | None = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._before = {n: signal.signal(n, self._met) for n in HANDLED}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _met(self, number: int, frame: FrameType | None) -> None:
        if self.number and number != signal.SIGINT:
            return
        again, self.number = self.number, number
        if again or not self.stepping:
            self.agreed = False
            raise KeyboardInterrupt
        if parallel.rank() == 0:
            os.write(2, b"avfast: stopping after this step with a checkpoint; ^C: at once\n")

    def asked(self, last: bool = False) -> bool:
        """Whether the run is to end here. Every process calls it after each step.

        What the processes send each other after a step they read after the next, so that none of them waits; after the
        ``last`` one they do.
        """
        heard = self.number if world_size() == 1 else 0
        if self._sent is not None:
            work, flag = self._sent
            work.wait()
            heard, self._sent = int(flag), None
        if world_size() > 1 and not heard:
            if last:
                heard = max(parallel.gather(self.number))
            else:
                flag = torch.tensor([self.number])
                self._sent = (dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True), flag)
        if heard:
            self.number, self.agreed = heard, True
        return self.agreed


class Meter:
    """What happened since the last log line, kept on the device so that no step waits for it, and the run's speed.

    Its clock stands still between :meth:`close` and :meth:`restart`, where the run is probed and written.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.clips, self.seconds, self.all_waited = run, 0, 0.0, 0.0
        self.work = Work(run.trainer)
        self.restart()

    def restart(self) -> None:
        """From here on time counts."""
        self.rows: list[tuple[int, dict[str, torch.Tensor], list[int]]] = []
        self.failures: list[Failure] = []
        self.waited, self.began = 0.0, time.perf_counter()

    def take(self, loader: Iterator[Batch]) -> list[Batch]:
        """The batches of the next step. The host waits for them; a GPU works on the step before meanwhile."""
        began = time.perf_counter()
        self.batches = list(islice(loader, self.run.config.accumulate))
        self.waited += time.perf_counter() - began
        return self.batches

    def add(self, step: int, losses: dict[str, torch.Tensor]) -> None:
        """One step of this process, on the batches taken last."""
        self.rows.append((step, losses, [int(i) for batch in self.batches for i in batch.index]))
        self.failures += [failure for batch in self.batches for failure in batch.failures]

    def close(self) -> dict[str, Any]:
        """A row of metrics.jsonl: means over the steps and processes, and the speed of all processes.

        ``data_wait`` is the share of time that the process which waits most waits for clips, ``peak_memory`` the most
        bytes of one process; ``flops_per_second`` and ``mfu``, its share of the matmul rate, are there where known.

        Raises:
            RunError: a loss is not finite.
        """
        names = list(self.rows[-1][1])
        judged = [i for i, name in enumerate(names) if not name.startswith(METRICS)]
        values = torch.stack([torch.stack([row[name] for name in names]) for _, row, _ in self.rows]).cpu()
        broken = [
            (step, row[0].item(), [self.run.clips.clips[i].id for i in index])
            for (step, _, index), row in zip(self.rows, values, strict=True)
            if not torch.isfinite(row[judged]).all()
        ]
        own = values.double().mean(0).tolist(), sum(len(i) for *_, i in self.rows)
        shares = parallel.gather((*own, self.failures, broken[:1], self.waited, peak_memory(self.run.trainer.device)))
        seconds = time.perf_counter() - self.began
        values, counts, failures, nonfinite, waited, memory = zip(*shares, strict=True)
        self.run.account([failure for share in failures for failure in share])
        if found := [(*broken[0], rank) for rank, broken in enumerate(nonfinite) if broken]:
            step, value, ids, rank = min(found)
            raise RunError(f"step {step}: the loss is {value}, not finite, on rank {rank} with clips {', '.join(ids)}")
        means = dict(zip(names, np.mean(values, 0).tolist(), strict=True))
        clips = sum(counts)
        self.clips, self.seconds = self.clips + clips, self.seconds + seconds
        self.all_waited += max(waited)
        losses = {names[i]: means[names[i]] for i in judged}
        metrics = {name.removeprefix(METRICS): value for name, value in means.items() if name not in losses}
        row = {"loss": losses.pop("loss"), "losses": losses, "metrics": metrics, "clips_per_second": clips / seconds}
        row |= {"data_wait": max(waited) / seconds, "peak_memory": max(memory)}
        rate = self.run.matmul_rate
        if parallel.rank() == 0 and rate and (each := self.work.per_clip(self.batches[-1])):
            row |= {"flops_per_second": each * clips / seconds, "mfu": each * clips / seconds / rate}
        return row

    def totals(self) -> dict[str, float | None]:
        """``clips_per_second`` over all processes and ``data_wait`` since the start; None before the first line."""
        known = self.seconds > 0
        return {
            "clips_per_second": self.clips / self.seconds if known else None,
            "data_wait": self.all_waited / self.seconds if known else None,
        }
