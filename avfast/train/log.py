"""What a run says: a line every n steps, metrics.jsonl, trackers, a progress bar on a terminal. Rank 0 only."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from avfast.train.config import mute
from avfast.train.parallel import rank
from avfast.train.trackers import Tracker, scalars


def encodable(text: str) -> str:
    """What standard output can write of a text; names of files need not be of its encoding."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Within it a warning is a line of the log, without file, line number and source; said by rank 0 alone."""

    def show(message: object, *where: object, **how: object) -> None:
        if rank() == 0:
            print(encodable(f"warning: {' '.join(str(message).split())}"), flush=True)

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            show(record.getMessage())

    handler, logger = Lines(logging.WARNING), logging.getLogger("avfast")
    with warnings.catch_warnings():
        warnings.showwarning = show
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)


class Log:
    """Writes the records of one run.

    Args:
        out: run folder.
        total: optimiser steps of the whole run.
        start: steps already done; records after it, from a run that was killed later, are dropped.
        trackers: where the metrics go too, by name; of rank 0.
    """

    def __init__(self, out: Path, total: int, start: int = 0, trackers: Mapping[str, Tracker] | None = None) -> None:
        self.path, self.total, self.start = out / "metrics.jsonl", total, start
        self.began = time.perf_counter()
        self.bar, self.trackers = None, dict(trackers or {})
        self.active = rank() == 0
        if not self.active:
            return
        rows = [row for row in read_metrics(self.path) if row["step"] <= start] if start else []
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if sys.stderr.isatty() and total > start:
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def say(self, text: str) -> None:
        """One line on standard output."""
        if not self.active:
            return
        if self.bar is not None:
            self.bar.clear()
        try:
            print(encodable(text), flush=True)
        except BrokenPipeError:  # hours of training are worth more than the reader of a pipe
            mute()
            print(f"avfast: nobody reads the log any more; the run goes on, see {self.path}", file=sys.stderr)

    def progress(self, total: int) -> Callable[[Iterable[int]], Iterable[int]]:
        """What wraps a loop of ``total`` items in a bar on a terminal, and does nothing elsewhere."""
        if not (self.active and sys.stderr.isatty()):
            return lambda items: items
        from tqdm import tqdm

        return lambda items: tqdm(items, total=total, unit="clip", leave=False, dynamic_ncols=True)

    def advance(self) -> None:
        """One optimiser step is done."""
        if self.bar is not None:
            self.bar.update()

    def record(self, step: int, row: dict[str, Any]) -> None:
        """One row of metrics.jsonl, and its line, which leaves out what does not change fast.

        Args:
            step: optimiser steps done.
            row: what :meth:`avfast.train.monitor.Meter.close` gives, with lr, epoch, batch (clips of the step's first
                forward pass on all processes, on which a contrastive loss depends) and, where probed, neighbours.
        """
        if not self.active:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step} | row) + "\n")
        for name in list(self.trackers):
            self._track(name, lambda tracker: tracker.add(step, scalars(row)))
        left = (time.perf_counter() - self.began) / max(step - self.start, 1) * (self.total - step)
        eta = f"{int(left // 60)}:{int(left % 60):02d}"
        speed = f"{row['clips_per_second']:.{0 if row['clips_per_second'] > 99 else 1}f} clips/s "
        speed += f"mfu {row['mfu']:.0%} " if "mfu" in row else ""
        self.say(
            f"step {step}/{self.total}  {short(row['loss'], row['losses'])}  {speed}"
            f"wait {row['data_wait']:.0%} {row['peak_memory'] / 1e9:.1f} GB  eta {eta}"
        )
        if near := row.get("knn"):
            scores = "  ".join(f"{name} {near[name]:.1%}" for name in near if name != "score")
            self.say(f"nearest neighbour, {near['score']}: {scores}")

    def _track(self, name: str, call: Callable[[Tracker], None]) -> None:
        """Hours of training are worth more than a tracker: one that fails is left out from there on."""
        try:
            call(self.trackers[name])
        except Exception as error:  # each package has its own
            del self.trackers[name]
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.say(f"warning: {name} failed and is left out ({reason}); all metrics are in {self.path}")

    def close(self) -> None:
        """Ends the bar and the trackers."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        for name in list(self.trackers):
            self._track(name, lambda tracker: tracker.close())
        self.trackers = {}


def short(loss: float, losses: dict[str, float]) -> str:
    """Losses in few columns; what the names of a pair share is said once: ``reconstruction a 0.52 v 0.41``."""
    parts, before = [f"loss {loss:.4g}"], ""
    for name, value in losses.items():
        stem, _, modality = name.rpartition("_")
        if not stem or modality not in ("audio", "visual"):
            stem, modality = name, ""
        text = f"{modality[:1]} {value:.4g}".strip()
        parts.append(f" {text}" if stem == before else f"  {stem} {text}")
        before = stem
    return "".join(parts)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a line cut short by a kill is skipped."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
