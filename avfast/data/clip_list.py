"""Lists of clips, packed so that millions of them fit in memory and loader workers share one copy."""

from __future__ import annotations

import marshal
import mmap
import os
import tempfile
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.context import get_spawning_popen
from typing import Any, overload

import numpy as np

from avfast.data.shard_layout import ShardSet


@dataclass(frozen=True, slots=True)
class ShardRow:
    """One clip of a shard set, by its number there."""

    shards: ShardSet
    number: int

    def __str__(self) -> str:
        return self.shards.where(self.number)


@dataclass(frozen=True, slots=True)
class Clip:
    """One clip: where its audio and its frames are.

    Attributes:
        id: for people; need not be unique.
        audio_path, video_path: media files or clips of shard sets, possibly the same one; None where the clip has no
            such modality.
        labels: indices into the list's ``class_names``.
        weight: for weighted sampling.
        frames_dir: in place of ``video_path``, a folder with ``frame_0/<id>.jpg`` .. ``frame_9/<id>.jpg`` (CAV-MAE's
            layout).
    """

    id: str
    audio_path: str | ShardRow | None
    video_path: str | ShardRow | None
    labels: tuple[int, ...] = ()
    weight: float = 1.0
    frames_dir: str | None = None

    @property
    def path(self) -> str:
        """The file to name when something is wrong with the clip."""
        path = self.video_path or self.audio_path
        return str(path) if path else os.path.join(self.frames_dir or "", "frame_*", f"{self.id}.jpg")


class PackedClips(Sequence[Clip]):
    """An immutable sequence of clips in one buffer; a :class:`Clip` is made when it is asked for.

    About 100 bytes a clip of media files. A clip of a shard set takes 13, and is looked up in the set's index, which
    all processes map. Processes that multiprocessing starts afresh (spawn, fork server) map the buffer of the process
    that starts them; elsewhere a pickle holds a copy.
    """

    # The buffer: (count + 1,) int64 ends of the records, the first one 0, then the records, each marshalled.

    def __init__(self, clips: Iterable[Clip] = ()) -> None:
        self._file: Any = None
        self._rows = _Rows()
        self._fill(_record(clip, self._rows) for clip in clips)

    @classmethod
    def of_set(cls, shards: ShardSet) -> PackedClips:
        """All clips of a shard set, as it has them."""
        clips = cls()
        clips._rows.base(shards)
        clips._fill(map(marshal.dumps, range(len(shards))))
        return clips

    def _fill(self, records: Iterable[bytes]) -> None:
        ends, text = array("q", [0]), bytearray()
        for record in records:
            text += record
            ends.append(len(text))
        self._set(len(ends) - 1, ends.tobytes() + text)

    def _set(self, count: int, buffer: Any) -> None:
        self._count, self._buffer = count, buffer
        self._ends = np.frombuffer(buffer, dtype=np.int64, count=count + 1)

    def take(self, indices: Iterable[int]) -> PackedClips:
        """The clips at ``indices``, in that order."""
        taken = PackedClips()
        taken._rows = self._rows
        taken._fill(self._bytes(i) for i in indices)
        return taken

    @property
    def sets(self) -> list[ShardSet]:
        """The shard sets of its clips; of clips left out too."""
        return self._rows.sets

    def _bytes(self, index: int) -> bytes:
        first = 8 * (self._count + 1)
        return self._buffer[first + int(self._ends[index]) : first + int(self._ends[index + 1])]

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Clip: ...
    @overload
    def __getitem__(self, index: slice) -> PackedClips: ...
    def __getitem__(self, index: int | slice) -> Clip | PackedClips:
        places = range(self._count)[index]  # raises IndexError as a tuple does
        return _clip(self._bytes(places), self._rows) if isinstance(places, int) else self.take(places)

    def __iter__(self) -> Iterator[Clip]:
        return (_clip(self._bytes(i), self._rows) for i in range(self._count))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedClips | tuple | list):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash((self._count, self[0] if self._count else None))

    def __repr__(self) -> str:
        return f"PackedClips({list(self)!r})" if self._count <= 3 else f"<{self._count} clips, the first {self[0]!r}>"

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is None:
            return _from_bytes, (self._count, bytes(self._buffer), self._rows)
        from multiprocessing.reduction import DupFd

        if self._file is None:
            # Memory without a name rather than /dev/shm, which containers make small
            named = not hasattr(os, "memfd_create")
            self._file = tempfile.TemporaryFile() if named else os.fdopen(os.memfd_create("clips"), "r+b")
            weakref.finalize(self, self._file.close)
            self._file.write(self._buffer)
            self._file.flush()
            self._set(self._count, mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))
        return _from_file, (self._count, DupFd(self._file.fileno()), self._rows)


def _from_bytes(count: int, buffer: Any, rows: _Rows) -> PackedClips:
    clips = PackedClips()
    clips._rows = rows
    clips._set(count, buffer)
    return clips


def _from_file(count: int, handle: Any, rows: _Rows) -> PackedClips:
    descriptor = handle.detach()
    try:
        return _from_bytes(count, mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), rows)
    finally:
        os.close(descriptor)


class _Rows:
    """One number for each clip of several shard sets: those of a set follow those of the sets met before it."""

    def __init__(self) -> None:
        self.sets: list[ShardSet] = []
        self.bases = [0]

    def base(self, shards: ShardSet) -> int:
        if shards not in self.sets:
            self.sets.append(shards)
            self.bases.append(self.bases[-1] + len(shards))
        return self.bases[self.sets.index(shards)]

    def number(self, row: ShardRow) -> int:
        return self.base(row.shards) + row.number

    def row(self, number: int) -> ShardRow:
        place = bisect_right(self.bases, number) - 1
        return ShardRow(self.sets[place], number - self.bases[place])


def _row_clip(row: ShardRow) -> Clip:
    """The clip as its shard set has it."""
    found = row.shards.clip(row.number)
    audio, video = row if found.has_audio else None, row if found.frames else None
    return Clip(found.id, audio, video, found.labels, found.weight)


def _record(clip: Clip, rows: _Rows) -> bytes:
    """Paths mostly hold the id, and audio and video are often one file: neither is stored twice.

    A clip that is as its shard set has it is one number; of others id and labels are left out that are the set's.
    """
    audio, name, labels = clip.audio_path, clip.id, tuple(int(label) for label in clip.labels)
    row = next((path for path in (clip.video_path, audio) if isinstance(path, ShardRow)), None)
    own = None if row is None else _row_clip(row)
    if row is not None and clip == own:
        return marshal.dumps(rows.number(row))
    video: Any = True if clip.video_path == audio is not None else _shorten(clip.video_path, name, rows)
    weight = None if clip.weight == 1.0 else float(clip.weight)
    return marshal.dumps(
        (
            None if own is not None and name == own.id else name,
            _shorten(audio, name, rows),
            video,
            None if own is not None and labels == own.labels else labels,
            weight,
            clip.frames_dir,
        )
    )


def _clip(record: bytes, rows: _Rows) -> Clip:
    values = marshal.loads(record)
    if isinstance(values, int):
        return _row_clip(rows.row(values))
    name, audio, video, labels, weight, frames_dir = values
    if name is None or labels is None:
        own = _row_clip(rows.row(video if type(video) is int else audio))
        name, labels = own.id if name is None else name, own.labels if labels is None else labels
    audio_path = _lengthen(audio, name, rows)
    video_path = audio_path if video is True else _lengthen(video, name, rows)
    return Clip(name, audio_path, video_path, labels, 1.0 if weight is None else weight, frames_dir)


def _shorten(path: str | ShardRow | None, name: str, rows: _Rows) -> str | tuple[str, str] | int | None:
    if isinstance(path, ShardRow):
        return rows.number(path)
    if path is None or len(name) < 4 or name not in path:
        return path
    before, _, after = path.rpartition(name)
    return before, after


def _lengthen(stored: str | tuple[str, str] | int | None, name: str, rows: _Rows) -> str | ShardRow | None:
    if isinstance(stored, int):
        return rows.row(stored)
    return name.join(stored) if isinstance(stored, tuple) else stored


@dataclass(frozen=True)
class ClipList:
    """Clips and the names of their classes.

    Attributes:
        clips: any sequence of clips is taken, and kept packed.
        class_names: each once; empty where no labels are known.
        notes: what its reader has to say about the files, one line each.
        missing: clips of the lists it was read from that have no file, and are left out.
    """

    clips: Sequence[Clip]
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)
    missing: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.clips, PackedClips):
            object.__setattr__(self, "clips", PackedClips(self.clips))

    def __len__(self) -> int:
        return len(self.clips)

    def take(self, indices: Iterable[int]) -> ClipList:
        """The clips at ``indices``, in that order, with all classes."""
        assert isinstance(self.clips, PackedClips)
        return replace(self, clips=self.clips.take(indices))


def merge(lists: Sequence[ClipList]) -> ClipList:
    """All clips in order; classes are united by name, in order of first appearance."""
    if len(lists) == 1:
        return lists[0]
    index: dict[str, int] = {}
    for part in lists:
        for name in part.class_names:
            index.setdefault(name, len(index))

    def clips() -> Iterator[Clip]:
        for part in lists:
            to = [index[name] for name in part.class_names]
            same = to == list(range(len(to)))
            for clip in part.clips:
                yield clip if same else replace(clip, labels=tuple(to[label] for label in clip.labels))

    notes = tuple(note for part in lists for note in part.notes)
    return ClipList(PackedClips(clips()), tuple(index), notes, sum(part.missing for part in lists))
