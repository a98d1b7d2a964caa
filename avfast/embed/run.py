"""Embeddings of clips of any length."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from avfast.data.clip_list import ClipList
from avfast.data.clips import Batch, make_loader
from avfast.data.manifest import read_all
from avfast.data.spec import even, one
from avfast.distributed import world_size
from avfast.embed.parts import Block, InMemory, OnDisk, assemble
from avfast.embed.record import Embeddings, check_name
from avfast.embed.windows import Modality, Portions, Windows
from avfast.hub import WEIGHTS
from avfast.models import Model
from avfast.packing import PackedTokens
from avfast.tasks.features import KINDS, encoded, mean
from avfast.train import checkpoint, data, parallel
from avfast.train.config import Config

BLOCK = 256  # clips; an interrupted run loses at most so many of each process

Clips = ClipList | str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Pool = Literal["mean", "max"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


def load(model: str | os.PathLike[str], preset: str | None = None, **settings: Any) -> Model:
    """A trained model from where it lies, on the CPU.

    Args:
        model: a run folder or a checkpoint folder of one; a folder of ``save_pretrained``, or ``OWNER/NAME`` on the
            Hub; with a preset, a released checkpoint's file.
        preset: the name of a model of its paper, such as ``avsiam_base``; the file tells its size.
        settings: other arguments than the saved or released ones, such as ``audio_size=(512, 128)``; none for a run.
    """
    from avfast.models.registry import from_pretrained, from_released

    if preset is None:
        place = Path(model)
        published = (place / WEIGHTS).is_file() and not (place / checkpoint.STATE).is_file()
        if published or not place.exists():
            return cast(Model, from_pretrained(os.fspath(model), **settings))
        if settings:
            raise ValueError(f"{', '.join(settings)}: a run's own settings say what its model is")
        return cast(Model, checkpoint.load_model(os.fspath(model)))
    return cast(Model, from_released(os.fspath(model), preset, **settings))


def embed(
    model: Model | str | os.PathLike[str],
    clips: Clips,
    *,
    out: str | os.PathLike[str] | None = None,
    preset: str | None = None,
    modality: Modality = "both",
    tokens: bool = False,
    pool: Pool = "mean",
    hop: float | None = None,
    per_window: bool = False,
    frames: int = 1,
    batch_size: int = 32,
    workers: int = 0,
    device: str | torch.device | None = None,
    precision: Precision = "fp32",
) -> Embeddings:
    """Features of clips of any length, as ``model.encode`` gives them.

    A clip longer than the model's window is covered by windows; a shorter one is padded, as in evaluation. Each window
    is encoded with all modalities that it has: in models that fuse early, audio features have met the frame then.
    Within a process group each process encodes a share, and all get the whole, with ``out`` the first one alone.

    Args:
        model: a model, or what :func:`load` takes. It is run in evaluation mode, its mode is restored.
        clips: media files, folders, shard sets or manifests, see :func:`avfast.data.read_all`; or a list of clips.
        out: a file to write, see :meth:`Embeddings.save`. What is finished lies in the folder ``<out>.parts`` until
            then: an interrupted call is gone on with by the same call.
        preset: see :func:`load`.
        modality: ``"audio"`` and ``"visual"`` leave the other one out.
        tokens: give ``(tokens, D)`` of each row in place of one vector.
        pool: what makes one vector of the tokens of a window.
        hop: seconds from one window to the next, default the window. The last one ends with the clip.
        per_window: a row for each window, in place of the mean over a clip's windows.
        frames: of a window, each seen by a model that takes one; features are the mean over them.
        batch_size: windows encoded at once.
        workers: processes that decode.
        device: to run on; default where the model is, of a model that is loaded here a GPU if there is one.
        precision: ``"fp32"``, ``"bf16"``, ``"fp16"``, or ``"auto"``: half precision on a GPU.

    Returns:
        Rows in the order of the clips.

    Raises:
        ValueError: the model does not take what is asked for, no clip could be read, or ``<out>.parts`` is of another
            call.
    """
    if out is not None:
        check_name(out)
    model, where = _prepared(model, preset, device)
    job = _Job(model, _listed(clips), modality, tokens, pool, hop, per_window, frames)
    if out is None:
        in_memory = InMemory()
        job.run(in_memory, batch_size, workers, where, precision)
        return job.record(in_memory)
    weights = parallel.first_only(lambda: _digest(cast(nn.Module, model)))
    plan = job.settings() | {
        "weights": weights,
        "precision": precision,
        "clips": data.digest(job.clips),
        "block": BLOCK,
    }
    on_disk = OnDisk(Path(f"{os.fspath(out)}.parts"), plan)
    job.run(on_disk, batch_size, workers, where, precision)

    def finish() -> Embeddings:
        found = job.record(on_disk)
        found.save(out)
        on_disk.remove()
        return found

    return finish() if parallel.rank() == 0 else Embeddings([], [], torch.empty(0, dtype=torch.float64), {})


def _prepared(
    model: Model | str | os.PathLike[str], preset: str | None, device: str | torch.device | None
) -> tuple[Model, torch.device]:
    if isinstance(model, (str, os.PathLike)):
        model = load(model, preset)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    elif preset is not None:
        raise ValueError(f"preset {preset!r}: goes with a file, not with a model")
    where = torch.device(device) if device is not None else next(iter(model.parameters())).device
    return model.to(where), where


def _listed(clips: Clips) -> ClipList:
    if isinstance(clips, ClipList):
        return clips
    some = [clips] if isinstance(clips, (str, os.PathLike)) else clips
    return read_all([os.fspath(path) for path in some], source="clips")


def _digest(model: nn.Module) -> str:
    """Of a model's class and weights."""
    found = hashlib.sha256(repr(type(model)).encode())
    for name, x in model.state_dict().items():
        found.update(name.encode() + repr(x.shape).encode())
        found.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


class _Job:
    """Which features of which clips; arguments as of :func:`embed`."""

    def __init__(
        self,
        model: Model,
        clips: ClipList,
        modality: Modality,
        tokens: bool,
        pool: Pool,
        hop: float | None,
        per_window: bool,
        frames: int,
    ) -> None:
        spec = model.frontend.spec
        for name, value, known in (
            ("modality", modality, ("audio", "visual", "both")),
            ("pool", pool, ("mean", "max")),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        if modality == "visual" and spec.frames is None:
            raise ValueError("modality visual: the model only listens")
        if hop is not None and not hop > 0:
            raise ValueError(f"hop: expected more than 0 seconds, got {hop}")
        if frames < 1 or (frames > 1 and spec.frames != one):
            takes = "none" if spec.frames is None else f"{spec.frames.count} at once"
            raise ValueError(f"frames: expected 1, got {frames}" + ("" if frames < 1 else f"; the model takes {takes}"))
        if not len(clips):
            raise ValueError("clips: the list is empty")
        self.model, self.clips, self.modality = model, clips, modality
        self.tokens, self.pool, self.per_window, self.frames = tokens, pool, per_window, frames
        self.hop = spec.seconds if hop is None else hop
        self.spec = spec if frames == 1 else replace(spec, frames=even(frames))

    def settings(self) -> dict[str, Any]:
        """As the record keeps them."""
        return {
            "model": type(self.model).__name__,
            "modality": self.modality,
            "pool": None if self.tokens else self.pool,
            "window": self.spec.seconds,
            "hop": self.hop,
            "per_window": self.per_window,
            "frames": self.frames,
        }

    @torch.no_grad()
    def run(
        self, blocks: InMemory | OnDisk, batch_size: int, workers: int, device: torch.device, precision: Precision
    ) -> None:
        """Adds this process's share of the blocks that are not finished."""
        from tqdm import tqdm

        for name, value, low in (("batch_size", batch_size, 1), ("workers", workers, 0)):
            if value < low:
                raise ValueError(f"{name}: expected {low} or more, got {value}")
        autocast = partial(parallel.autocast, parallel.precision(Config(precision=precision), device), device)
        starts = range(0, len(self.clips), BLOCK)
        todo = sorted({*range(len(starts))} - blocks.finished())[parallel.rank() :: world_size()]
        ranges = [range(starts[i], min(starts[i] + BLOCK, len(self.clips))) for i in todo]
        portions = Portions(ranges, batch_size)
        windows = Windows(self.clips, spec=self.spec, modality=self.modality, hop=self.hop)
        batches = iter(make_loader(windows, portions, workers, pin_memory=device.type == "cuda"))
        total = sum(map(len, ranges))
        training = self.model.training
        self.model.eval()
        try:
            with tqdm(total=total, unit="clip", disable=parallel.rank() > 0 or not sys.stderr.isatty()) as bar:
                for number, block in zip(todo, ranges, strict=True):
                    rows = _Rows()
                    for first in range(block.start, block.stop, batch_size):
                        batch = next(batches)
                        rows.failures += [(failure.path, failure.reason) for failure in batch.failures]
                        for at in range(0, len(batch), batch_size):
                            self._encode(batch.rows(at, at + batch_size), rows, device, autocast)
                        bar.update(min(batch_size, block.stop - first))
                    blocks.add(number, rows.block(self.per_window))
            next(batches, None)  # which ends the loader's workers
        finally:
            self.model.train(training)
        blocks.gather()

    def _encode(
        self, batch: Batch, rows: _Rows, device: torch.device, autocast: Callable[[], AbstractContextManager]
    ) -> None:
        count = self.frames if bool(batch.has_visual.any()) else 1
        seen = [batch] if self.frames == 1 else [
            replace(batch, frames=batch.frames[:, i : i + 1]) for i in range(count)
        ]  # fmt: skip
        first = rows.begin(batch)
        for found in zip(*(encoded(self.model, part, device, autocast) for part in seen), strict=True):
            for kind in found[0][1]:
                values = torch.stack([self._pooled(tokens[kind]) for _, tokens in found]).mean(0)
                rows.put(kind, first + found[0][0], values.cpu())

    def _pooled(self, tokens: Tensor | PackedTokens) -> Tensor:
        """``(n, D)``, or ``(n, N, D)`` where tokens are wanted."""
        if not self.tokens and self.pool == "mean":
            return mean(tokens)
        if isinstance(tokens, PackedTokens):
            raise ValueError("the model gives unequal numbers of tokens: only their mean can be had")
        return tokens.float() if self.tokens else tokens.float().amax(1)

    def record(self, blocks: InMemory | OnDisk) -> Embeddings:
        """Of all blocks."""
        found = assemble(blocks)
        failures = dict(found.failures)
        if not found.features:
            reason = "; ".join(f"{path}: {why}" for path, why in list(failures.items())[:1])
            raise ValueError(f"no clip gave features: {reason or f'the model takes no {self.modality}'}")
        clips = [self.clips.clips[i] for i in found.index.tolist()]
        features = {kind: found.features[kind] for kind in KINDS if kind in found.features}
        names, paths = [clip.id for clip in clips], [clip.path for clip in clips]
        return Embeddings(names, paths, found.start, features, failures, self.settings())


class _Rows:
    """The windows of a block of clips, as they come."""

    def __init__(self) -> None:
        self.index: list[Tensor] = []
        self.start: list[float] = []
        self.found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.failures: list[tuple[str, str]] = []

    def begin(self, batch: Batch) -> int:
        """Adds the rows of a batch; the number of the first of them."""
        first = len(self.start)
        self.index.append(batch.index.cpu())
        self.start += batch.starts
        return first

    def put(self, kind: str, rows: Tensor, values: Tensor) -> None:
        """What some rows have."""
        self.found.setdefault(kind, []).append((rows, values))

    def block(self, per_window: bool) -> Block:
        """A row for each window, or the mean of those that a clip has."""
        index = torch.cat(self.index) if self.index else torch.empty(0, dtype=torch.int64)
        start = torch.tensor(self.start, dtype=torch.float64)
        place, clips = torch.arange(len(index)), index
        if not per_window:
            clips, place = index.unique_consecutive(return_inverse=True)
            start = start.new_zeros(len(clips))
        features = {}
        for kind, parts in self.found.items():
            rows, values = (torch.cat(side) for side in zip(*parts, strict=True))
            total = values.new_zeros(len(clips), *values.shape[1:]).index_add_(0, place[rows], values)
            count = torch.zeros(len(clips)).index_add_(0, place[rows], torch.ones(len(rows)))
            features[kind] = total / count.view(-1, *[1] * (values.ndim - 1))  # none: 0 / 0 is NaN
        return Block(clips, start, features, self.failures)
