"""From lists of clips to batches: collating, loading."""

from __future__ import annotations

import atexit
import logging
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from avfast.data.ahead import ahead
from avfast.data.dataset import ClipDataset, Failure, Sample
from avfast.data.jpegs import Jpegs, decode
from avfast.data.sampling import InOrder, StepBatches
from avfast.data.spec import ClipSpec
from avfast.random import DrawKey
from avfast.tensors import to_device

__all__ = [
    "Batch",
    "ClipDataset",
    "Failure",
    "Loader",
    "Sample",
    "StepBatches",
    "collate",
    "eval_loader",
    "make_loader",
]

logger = logging.getLogger("avfast")
TRAINER_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the signals that are a trainer's to answer

_SMALL = 1 << 16  # bytes of a tensor that is sent by value


@dataclass
class Batch:
    """The local part of a global batch. B counts the samples that could be decoded, and may be 0.

    Attributes:
        waveform: (B, S) float32, zero-padded to the longest; zeros for a sample without audio.
        num_samples: (B,) int64, valid samples of each row.
        frames: (B, F, 3, H, W) uint8, zeros without video. F is 1 for a model of one frame, T * t for one of T clips
            of t frames; a front end gives them the shape that its model takes.
        has_audio, has_visual: (B,) bool.
        labels: (B, C) float32 multi-hot, or None where the data has no classes.
        index: (B,) int64, which clips.
        positions: of each sample in the global batch; failures leave holes.
        step: of the sampler.
        failures: what this process could not decode.
        short: (B,) bool, see :class:`Sample`.
        truncated: files met that end before their headers say.
        jpegs: by row, frames that :meth:`to` decodes; until then ``frames`` holds zeros for them.
        total: planned size of the global batch. It and ``progress`` are what the loader's sampler says.
        progress: of training in this step's epoch, see :func:`avfast.random.progress`.
        starts: of each sample's window, see :class:`Sample`.
    """

    waveform: Tensor
    num_samples: Tensor
    frames: Tensor
    has_audio: Tensor
    has_visual: Tensor
    labels: Tensor | None
    index: Tensor
    positions: tuple[int, ...]
    step: int
    failures: list[Failure]
    short: Tensor
    truncated: tuple[str, ...] = ()
    jpegs: dict[int, Jpegs] = field(default_factory=dict)
    total: int = 1
    progress: float = 0.0
    starts: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def has(self) -> dict[str, Tensor]:
        """By modality, which samples have it."""
        return {"audio": self.has_audio, "visual": self.has_visual}

    def key(self, seed: int) -> DrawKey:
        """The key of this batch's draws."""
        return DrawKey(seed, self.step, self.positions, self.total, self.progress)

    def to(self, device: torch.device | str) -> Batch:
        """This batch with its tensors on ``device``; no copy waits for it, see :func:`avfast.tensors.to_device`."""
        moved = self._map(lambda tensor: to_device(tensor, device))
        if not self.jpegs:
            return moved
        frames = moved.frames.clone()
        decoded = decode(list(self.jpegs.values()), frames.shape[-1], frames.device)
        for row, clip in zip(self.jpegs, decoded, strict=True):
            frames[row] = clip
        return replace(moved, frames=frames, jpegs={})

    def rows(self, first: int, last: int) -> Batch:
        """Some of its samples; what does not belong to one of them stays."""
        part = self._map(lambda tensor: tensor[first:last])
        return replace(part, positions=self.positions[first:last], starts=self.starts[first:last])

    def pin_memory(self) -> Batch:
        """This batch in page-locked memory (the hook of torch's DataLoader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def __getstate__(self) -> dict[str, Any]:
        """Small tensors by value: each that goes through shared memory costs both processes a connection."""
        return {name: _by_value(value) for name, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, torch.from_numpy(value) if isinstance(value, np.ndarray) else value)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)


def collate(samples: Sequence[Sample | Failure], *, spec: ClipSpec, num_classes: int = 0) -> Batch:
    """Decoded clips to a :class:`Batch`; failures to its list, the others keep their order and positions.

    Args:
        samples: at least one, all of one step.
        spec, num_classes: shapes that a batch without a sample must have too.
    """
    good = [sample for sample in samples if isinstance(sample, Sample)]
    lengths = [0 if sample.waveform is None else len(sample.waveform) for sample in good]
    waveform = _empty((len(good), max(lengths, default=0)), torch.float32)
    frames = _empty((len(good), spec.num_frames, 3, spec.image_size, spec.image_size), torch.uint8)
    labels = torch.zeros(len(good), num_classes, dtype=torch.float32) if num_classes else None
    for row, sample in enumerate(good):
        if sample.waveform is not None:
            waveform[row, : lengths[row]] = sample.waveform
        waveform[row, lengths[row] :] = 0.0
        frames[row] = sample.frames if isinstance(sample.frames, Tensor) else 0
        if labels is not None:
            labels[row, list(sample.labels)] = 1.0
    return Batch(
        waveform=waveform,
        num_samples=torch.tensor(lengths, dtype=torch.long),
        frames=frames,
        has_audio=torch.tensor([sample.waveform is not None for sample in good], dtype=torch.bool),
        has_visual=torch.tensor([sample.frames is not None for sample in good], dtype=torch.bool),
        labels=labels,
        index=torch.tensor([sample.index for sample in good], dtype=torch.long),
        positions=tuple(sample.position for sample in good),
        step=samples[0].step,
        failures=[sample for sample in samples if isinstance(sample, Failure)],
        short=torch.tensor([sample.short for sample in good], dtype=torch.bool),
        truncated=tuple(path for sample in good for path in sample.truncated),
        jpegs={row: sample.frames for row, sample in enumerate(good) if isinstance(sample.frames, Jpegs)},
        total=1 + max(sample.position for sample in samples),
        starts=tuple(sample.start for sample in good),
    )


def _by_value(value: Any) -> Any:
    """A small tensor of the CPU as an array."""
    small = isinstance(value, Tensor) and value.device.type == "cpu" and value.nbytes <= _SMALL
    return value.numpy() if small else value


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory to write to: in a loader's worker shared, as torch's own collating has it, so that sending is no copy."""
    size = math.prod(shape) * dtype.itemsize
    if get_worker_info() is None or not size:
        return torch.empty(shape, dtype=dtype)
    return torch.empty(0, dtype=dtype).set_(torch.UntypedStorage._new_shared(size)).view(shape)


class Loader:
    """Iterable of batches that says once when clips are shorter than the model's window, and once when truncated.

    Attributes:
        short: indices of the short clips met so far.
        truncated: the files met so far that end before their headers say.
    """

    def __init__(self, loader: DataLoader[Any], batches: Any, seconds: float) -> None:
        self._loader = loader
        self._plan = getattr(batches, "plan", None)  # a sampler without one gives batches as large as they are
        self._seconds = seconds
        self.short: set[int] = set()
        self.truncated: set[str] = set()

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Generator[Batch, None, None]:
        before = set(multiprocessing.active_children())
        # What this thread holds back is held back in the fork server and its workers for good: what is sent to a whole
        # group can end neither the server nor a worker that still imports.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, TRAINER_SIGNALS)
        try:
            batches = iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        workers = set(multiprocessing.active_children()) - before
        # Python ends its processes by a signal that these ignore, and waits for them.
        end = partial(_kill, workers)
        atexit.register(end)
        try:
            for batch in batches:
                self._note(batch)
                # here and not in the workers, which a function of the user's might not reach
                if self._plan is not None:
                    batch.total, batch.progress = self._plan(batch.step)
                yield batch
        finally:
            del batches  # asks the workers to end, and waits a little
            end()
            atexit.unregister(end)

    def _note(self, batch: Batch) -> None:
        if batch.short.any():
            if not self.short:
                logger.warning("some clips are shorter than the model's %.2f s: their end is padded", self._seconds)
            self.short.update(batch.index[batch.short].tolist())
        if batch.truncated and not self.truncated:
            logger.warning(
                "some files end before their headers say (%s is the first): what is there is used", batch.truncated[0]
            )
        self.truncated.update(batch.truncated)


def _kill(workers: Iterable[multiprocessing.process.BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


def make_loader(dataset: ClipDataset, batches: Any, num_workers: int = 0, *, pin_memory: bool = False) -> Loader:
    """Batches of ``dataset`` as ``batches`` says.

    Args:
        batches: lists of (index, step, position): a :class:`StepBatches`, or any batch sampler.
        num_workers: processes that decode, started through a fork server (FFmpeg hangs in plain forks of a process that
            has threads). A dataset with a cache is read in this process: nothing is left to decode.
        pin_memory: as in torch's DataLoader.
    """
    workers = 0 if dataset.cache else num_workers
    context = None
    if workers:
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch"])
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=ahead(batches, dataset.clips),
        num_workers=workers,
        multiprocessing_context=context,
        pin_memory=pin_memory,
        worker_init_fn=_end_with_trainer,
        collate_fn=partial(
            collate,
            spec=dataset.spec,
            num_classes=len(dataset.class_names),
        ),
    )
    return Loader(loader, batches, dataset.spec.seconds)


def _end_with_trainer(worker: int) -> None:
    """Lets a loader worker end when its trainer does, however that ends.

    torch's own watchdog waits for the worker's parent, which here is the fork server: it lives as long as its workers.
    Signals, which a terminal and torchrun send to whole groups, are the trainer's to answer: it may need another batch.
    """
    for number in TRAINER_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()  # whose end closes a pipe that it alone holds open
    if trainer is None:
        return
    wait = trainer.join

    def watch() -> None:
        wait()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def eval_loader(
    dataset: ClipDataset,
    batch_size: int,
    num_workers: int = 0,
    *,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Loader:
    """Every clip once and in order; process ``rank`` gets a contiguous part, sizes differing by one at most."""
    return make_loader(dataset, InOrder(len(dataset), batch_size, rank, world_size), num_workers, pin_memory=pin_memory)
