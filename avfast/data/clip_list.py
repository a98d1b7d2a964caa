"""Lists of clips, packed so that millions of them fit in memory and loader workers share one copy."""

from __future__ import annotations

import marshal
import mmap
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.context import get_spawning_popen
from typing import Any, overload

import numpy as np


@dataclass(frozen=True, slots=True)
class Clip:
    """One clip: where its audio and its frames are.

    Attributes:
        id: for people; need not be unique.
        audio_path, video_path: media files, possibly the same one; None where the clip has no such modality.
        labels: indices into the list's ``class_names``.
        weight: for weighted sampling.
        frames_dir: in place of ``video_path``, a folder with ``frame_0/<id>.jpg`` .. ``frame_9/<id>.jpg`` (CAV-MAE's
            layout).
    """

    id: str
    audio_path: str | None
    video_path: str | None
    labels: tuple[int, ...] = ()
    weight: float = 1.0
    frames_dir: str | None = None

    @property
    def path(self) -> str:
        """The file to name when something is wrong with the clip."""
        return self.video_path or self.audio_path or os.path.join(self.frames_dir or "", "frame_*", f"{self.id}.jpg")


class PackedClips(Sequence[Clip]):
    """An immutable sequence of clips in one buffer; a :class:`Clip` is made when it is asked for.

    About 100 bytes a clip. Processes that multiprocessing starts afresh (spawn, fork server) map the buffer of the
    process that starts them; elsewhere a pickle holds a copy.
    """

    # The buffer: (count + 1,) int64 ends of the records, the first one 0, then the records, each marshalled.

    def __init__(self, clips: Iterable[Clip] = ()) -> None:
        self._file: Any = None
        self._fill(_record(clip) for clip in clips)

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
        taken._fill(self._bytes(i) for i in indices)
        return taken

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
        return _clip(self._bytes(places)) if isinstance(places, int) else self.take(places)

    def __iter__(self) -> Iterator[Clip]:
        return (_clip(self._bytes(i)) for i in range(self._count))

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
            return _from_bytes, (self._count, bytes(self._buffer))
        from multiprocessing.reduction import DupFd

        if self._file is None:
            # Memory without a name rather than /dev/shm, which containers make small
            named = not hasattr(os, "memfd_create")
            self._file = tempfile.TemporaryFile() if named else os.fdopen(os.memfd_create("clips"), "r+b")
            weakref.finalize(self, self._file.close)
            self._file.write(self._buffer)
            self._file.flush()
            self._set(self._count, mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))
        return _from_file, (self._count, DupFd(self._file.fileno()))


def _from_bytes(count: int, buffer: Any) -> PackedClips:
    clips = PackedClips()
    clips._set(count, buffer)
    return clips


def _from_file(count: int, handle: Any) -> PackedClips:
    descriptor = handle.detach()
    try:
        return _from_bytes(count, mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    finally:
        os.close(descriptor)


def _record(clip: Clip) -> bytes:
    """Paths mostly hold the id, and audio and video are often one file: neither is stored twice."""
    video: Any = True if clip.video_path == clip.audio_path is not None else _shorten(clip.video_path, clip.id)
    weight = None if clip.weight == 1.0 else float(clip.weight)
    labels = tuple(int(label) for label in clip.labels)
    return marshal.dumps((clip.id, _shorten(clip.audio_path, clip.id), video, labels, weight, clip.frames_dir))


def _clip(record: bytes) -> Clip:
    name, audio, video, labels, weight, frames_dir = marshal.loads(record)
    audio_path = _lengthen(audio, name)
    video_path = audio_path if video is True else _lengthen(video, name)
    return Clip(name, audio_path, video_path, labels, 1.0 if weight is None else weight, frames_dir)


def _shorten(path: str | None, name: str) -> str | tuple[str, str] | None:
    if path is None or len(name) < 4 or name not in path:
        return path
    before, _, after = path.rpartition(name)
    return before, after


def _lengthen(stored: str | tuple[str, str] | None, name: str) -> str | None:
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
