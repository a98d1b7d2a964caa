"""The files of a shard set: with :mod:`shard_tar` the one place that knows how they look.

``shard-000000.tar`` ... hold the clips in WebDataset's layout, one after the other: ``<key>.s16`` (mono PCM, 16 bits,
little-endian), ``<key>.0.jpg`` ... (frames, in the middles of equal parts of the clip) and ``<key>.json``. A modality
that a clip lacks has no members. Each member's header holds, as its group's name, the CRC-32 of its content: a shard
can be checked without anything else, and a reader needs no table of checksums in memory.

``index.safetensors`` says where each clip is (about 75 bytes a clip with ten frames, and its key), ``build.json`` what
was built and how, ``unreadable.jsonl`` which clips could not be, and why. The index is mapped, not read: processes of
one machine share it.
"""

from __future__ import annotations

import json
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from avfast.data.shard_tar import BLOCK, check, id_of, padded, shard_name

if TYPE_CHECKING:
    from avfast.data.shard_cache import Cache

FORMAT = 2  # raise it whenever older readers would misread what is written
BUILD, INDEX, UNREADABLE = "build.json", "index.safetensors", "unreadable.jsonl"
WORK, PLAN = ".build", "plan.json"  # folder of what a build needs to go on; reports of finished shards lie there too
_OPEN = 256  # shards that a process keeps open


class ShardError(ValueError):
    """A shard set, or a member of one, is not as it should be. The message names it."""


@dataclass(frozen=True)
class ShardSettings:
    """What of a clip is kept.

    Attributes:
        sample_rate: of the audio, in Hz.
        frames: of a clip.
        fps: in their place, how many a second, for models of video; 0 for ``frames``.
        short_side: of the frames, in pixels; smaller ones stay as they are.
        quality: of their JPEGs, 1 to 100.
    """

    sample_rate: int = 16000
    frames: int = 10
    fps: float = 0.0
    short_side: int = 256
    quality: int = 90

    def __post_init__(self) -> None:
        bounds = {"sample_rate": (1000, 384000), "frames": (1, 1000), "fps": (0, 240), "short_side": (16, 4096)}
        for name, (low, high) in (bounds | {"quality": (1, 100)}).items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: expected {low} to {high}, got {getattr(self, name)}")

    def count(self, duration: float, rate: float) -> int:
        """How many frames are kept of a clip of ``duration`` seconds that has ``rate`` (0: unknown) frames a second."""
        count = round(duration * self.fps) if self.fps else self.frames
        return max(1, min(count, round(duration * rate)) if rate > 0 else count)


def middles(duration: float, count: int) -> list[float]:
    """The times of ``count`` frames: the middles of equal parts of ``duration``, all in seconds."""
    return [duration * (i + 0.5) / count for i in range(count)]


# -- the index ------------------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """A clip in its shard, as a report of the builder and the index have it.

    Attributes:
        key: its name there.
        block: where it begins, in blocks of 512 bytes.
        sizes: of its members in bytes: audio if there is any, frames, json.
        duration: in seconds, of what both modalities have.
        has_audio: whether it has any.
        labels: indices of classes.
        weight: for weighted sampling.
        id: of the clip, where the key does not tell it.
    """

    key: str
    block: int
    sizes: list[int]
    duration: float
    has_audio: bool
    labels: list[int]
    weight: float = 1.0
    id: str = ""


def index_bytes(shards: Iterator[list[Entry]], identity: str) -> bytes:
    """The index's file, of the entries of all shards in order."""
    from safetensors.numpy import save

    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    firsts, count = [0], 0
    for entries in shards:
        count += len(entries)
        firsts.append(count)
        texts = {
            "keys": [entry.key.encode() for entry in entries],
            "ids": [entry.id.encode(errors="surrogateescape") for entry in entries],
        }
        columns["block"].append(np.array([entry.block for entry in entries], np.uint32))
        columns["duration"].append(np.array([entry.duration for entry in entries], np.float64))
        columns["has_audio"].append(np.array([entry.has_audio for entry in entries], np.uint8))
        columns["weight"].append(np.array([entry.weight for entry in entries], np.float32))
        for name, lists in (("sizes", [e.sizes for e in entries]), ("labels", [e.labels for e in entries])):
            columns[name].append(np.array([value for part in lists for value in part], np.uint32))
            columns[f"{name}_end"].append(np.array([len(part) for part in lists], np.int64))
        for name, parts in texts.items():
            columns[name].append(np.frombuffer(b"".join(parts), np.uint8))
            columns[f"{name}_end"].append(np.array([len(part) for part in parts], np.int64))
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    for name in ("sizes", "labels", "keys", "ids"):
        ends = np.concatenate([[0], np.cumsum(joined[f"{name}_end"])])
        joined[f"{name}_end"] = ends.astype(np.uint32 if ends[-1] < 2**32 else np.int64)
    if joined["labels"].max(initial=0) < 2**16:
        joined["labels"] = joined["labels"].astype(np.uint16)
    if (joined["weight"] == 1).all():
        del joined["weight"]
    if not len(joined["ids"]):
        del joined["ids"], joined["ids_end"]
    joined["shard_first"] = np.array(firsts, np.int64)
    return save(joined, {"set": identity})  # nothing else: several would come in any order


_COLUMNS = tuple("block duration has_audio weight sizes sizes_end labels labels_end keys keys_end ids ids_end".split())
_OPTIONAL = {"weight", "ids", "ids_end"}
_DTYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "I64": np.int64, "F32": np.float32, "F64": np.float64}


def _map_index(path: Path, name: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(columns, metadata) of an index, ``name`` in messages; the columns are views of the mapped file."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length = int.from_bytes(mapped[:8], "little")
        table = json.loads(mapped[8 : 8 + length])
        about = table.pop("__metadata__")
        columns = {}
        for key, column in table.items():
            first, last = column["data_offsets"]
            dtype = np.dtype(_DTYPES[column["dtype"]])
            columns[key] = np.frombuffer(mapped, dtype, (last - first) // dtype.itemsize, 8 + length + first)
        if missing := {*_COLUMNS, "shard_first"} - _OPTIONAL - set(columns):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        return columns, about
    except OSError as error:
        raise ShardError(f"{name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{name}: damaged ({' '.join(str(error).split())[:100]}); build the set again") from None


# -- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardClip:
    """A clip of a set.

    Attributes:
        id: of the clip that it was made of.
        key: its name in the shard; unique in the set.
        duration: in seconds.
        samples: of its audio; 0 without any.
        frames: how many are stored; 0 without video.
        labels: indices into the set's ``class_names``.
        weight: for weighted sampling.
    """

    id: str
    key: str
    duration: float
    samples: int
    frames: int
    labels: tuple[int, ...]
    weight: float = 1.0

    @property
    def has_audio(self) -> bool:
        return self.samples > 0

    @property
    def frame_times(self) -> list[float]:
        """When each stored frame is shown, in seconds."""
        return middles(self.duration, self.frames)


def open_set(folder: str | os.PathLike[str], cache: Cache | None = None) -> ShardSet:
    """The shard set in ``folder``; one object for all who ask in a process, until the set is built anew.

    Args:
        folder: or a URL, see :mod:`avfast.data.remote`.
        cache: where shards behind a URL are kept.

    Raises:
        ShardError: it is missing, unfinished, or its files do not belong together.
        ImportError, OSError: what is behind the URL cannot be reached.
    """
    if is_url(folder):
        from avfast.data.remote import open_url
        from avfast.data.shard_cache import Cache

        return open_url(os.fspath(folder), cache or Cache())
    path = Path(os.path.abspath(folder))
    try:
        stats = [os.stat(path / name) for name in (BUILD, INDEX)]
    except OSError as error:
        unfinished = f"is not finished: run the same `{COMMAND}` again" if (path / WORK / PLAN).is_file() else ""
        raise ShardError(f"{path}: {unfinished or f'no shard set ({BUILD} or {INDEX}: {error.strerror})'}") from None
    return _open_set(path, *(number for stat in stats for number in (stat.st_mtime_ns, stat.st_ino, stat.st_size)))


COMMAND = "python -m avfast.shards build"


@lru_cache(maxsize=16)
def _open_set(path: Path, *_: int) -> ShardSet:
    return ShardSet(path)


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether it names something in an object store: ``s3://bucket/folder``."""
    return "://" in os.fspath(path)


def is_set(folder: str | os.PathLike[str]) -> bool:
    """Whether there is a shard set in ``folder``, finished or not."""
    return os.path.isfile(os.path.join(folder, BUILD)) or os.path.isfile(os.path.join(folder, WORK, PLAN))


class ShardSet:
    """The clips of a shard set. Use :func:`open_set`.

    Attributes:
        folder: where it is.
        name: of it in messages, its folder or URL.
        build: the content of ``build.json``.
        settings: it was built with.
        class_names: each once.
        columns: of the index, by name.
    """

    def __init__(self, folder: Path, url: str = "") -> None:
        self.folder = folder
        self.name = url or str(folder)
        self.build = read_json(folder / BUILD)
        if self.build.get("format") != FORMAT:
            found = self.build.get("format")
            raise ShardError(f"{self.name}/{BUILD}: format {found}; this avfast reads format {FORMAT}; build it again")
        known = {field.name for field in fields(ShardSettings)}
        self.settings = ShardSettings(**{k: v for k, v in self.build["settings"].items() if k in known})
        self.class_names: tuple[str, ...] = tuple(self.build["classes"])
        self.columns, about = _map_index(folder / INDEX, f"{self.name}/{INDEX}")
        if about.get("set") != self.build["set"]:
            raise ShardError(f"{self.name}/{INDEX}: belongs to another shard set than {BUILD} beside it")
        self._handles: OrderedDict[int, _Handle] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return open_set, (str(self.folder),)

    def __len__(self) -> int:
        return len(self.columns["block"])

    def clip(self, index: int) -> ShardClip:
        """What the index says of clip ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: clip {index} of {len(self)}")
        sizes = self._part("sizes", index)
        has_audio = bool(self.columns["has_audio"][index])
        weight = float(self.columns["weight"][index]) if "weight" in self.columns else 1.0
        return ShardClip(
            id=self._id(index),
            key=self.key(index),
            duration=float(self.columns["duration"][index]),
            samples=int(sizes[0]) // 2 if has_audio else 0,
            frames=len(sizes) - has_audio - 1,
            labels=tuple(self._part("labels", index).tolist()),
            weight=weight,
        )

    def key(self, index: int) -> str:
        return self._part("keys", index).tobytes().decode()

    def _id(self, index: int) -> str:
        found = id_of(self.key(index))
        return self._part("ids", index).tobytes().decode(errors="surrogateescape") if found is None else found

    def _part(self, name: str, index: int) -> np.ndarray:
        ends = self.columns[f"{name}_end"]
        return self.columns[name][int(ends[index]) : int(ends[index + 1])]

    def shard(self, index: int) -> int:
        """The number of the shard that holds clip ``index``."""
        return int(np.searchsorted(self.columns["shard_first"], index, side="right")) - 1

    def clips_of(self, shard: int) -> range:
        """The clips of a shard."""
        first = self.columns["shard_first"]
        return range(int(first[shard]), int(first[shard + 1]))

    def path(self, shard: int) -> str:
        """Of its tar, for messages."""
        return f"{self.name}/{shard_name(shard)}"

    def where(self, index: int) -> str:
        """For messages: the shard, and the clip in it."""
        return f"{self.path(self.shard(index))}/{self.key(index)}"

    def files(self) -> set[str]:
        """The names of all its files."""
        return set(os.listdir(self.folder))

    def file(self, name: str) -> BinaryIO:
        """One of them, as it lies where the set is, open for reading."""
        return (self.folder / name).open("rb")

    def members(self, index: int) -> list[tuple[str, int, int]]:
        """(name without the key, offset of its header in the shard, size of its content), in the shard's order."""
        sizes = self._part("sizes", index).tolist()
        names = ["s16"] if self.columns["has_audio"][index] else []
        names += [f"{i}.jpg" for i in range(len(sizes) - len(names) - 1)] + ["json"]
        offset, found = int(self.columns["block"][index]) * BLOCK, []
        for name, size in zip(names, sizes, strict=True):
            found.append((name, offset, size))
            offset += padded(size)
        return found

    def read(self, index: int, name: str) -> bytes:
        """:meth:`view`, copied."""
        return bytes(self.view(index, name))

    def view(self, index: int, name: str) -> memoryview:
        """The content of a member of clip ``index``: ``s16``, ``<n>.jpg`` or ``json``.

        Raises:
            ShardError: there is no such member, or not where the index says, or it is damaged.
        """
        members = self.members(index)
        place = next((place for place in members if place[0] == name), None)
        full, shard = f"{self.key(index)}.{name}", self.shard(index)

        def error(what: object) -> ShardError:
            return ShardError(f"{self.path(shard)}: {full}: {what}")

        if place is None:
            raise error(f"no such member, it has {', '.join(m for m, _, _ in members)}")
        _, offset, size = place
        try:
            data = os.pread(self._handle(shard).fileno, BLOCK + size, offset)
        except OSError as problem:
            raise error(problem.strerror) from None
        if len(data) < BLOCK + size:
            raise error(f"the shard is truncated, it ends before byte {offset + BLOCK + size}")
        if wrong := check(data, full, size):
            raise error(wrong)
        return memoryview(data)[BLOCK:]

    def _handle(self, shard: int) -> _Handle:
        handle = self._handles.get(shard)
        if handle is None:
            handle = self._handles[shard] = _Handle(self._open(shard))
            while len(self._handles) > _OPEN:
                self._handles.popitem(last=False)
        return handle

    def _open(self, shard: int) -> int:
        return os.open(self.folder / shard_name(shard), os.O_RDONLY)


class _Handle:
    """An open shard; closed when nobody holds it any more, so that threads may share it."""

    def __init__(self, fileno: int) -> None:
        self.fileno = fileno

    def __del__(self) -> None:
        os.close(self.fileno)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. ShardError if it cannot be read."""
    try:
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror}") from None


def parse_json(content: bytes, name: str) -> dict[str, Any]:
    """A JSON object; ``name`` in messages."""
    try:
        found = json.loads(content)
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found
    except ValueError as error:
        raise ShardError(f"{name}: damaged ({error})") from None
