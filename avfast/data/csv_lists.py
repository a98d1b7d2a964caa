"""CSV files of the field: classes, sampling weights, and AudioSet's and VGGSound's lists of YouTube clips."""

from __future__ import annotations

import csv
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from avfast.data.clip_list import Clip, ClipList, PackedClips
from avfast.data.folders import extension_of, walk
from avfast.data.media import AUDIO_EXTENSIONS

_ID = r"[\w-]{11}"
# <id>, <id>_<start>, <id>_<start>_<end> and the like; AudioSet's wav files of PANNs begin with a Y
_STEM = re.compile(rf"Y?({_ID})(?:[_-](\d+(?:\.\d+)?)(?:[_-]\d+(?:\.\d+)?)?)?", re.ASCII)


class MediaFiles:
    """The media files below some folders by the YouTube id in their names; the folders are searched when it is asked.

    Names are those of the usual downloaders: ``<id>``, ``<id>_<start>``, ``<id>_<start>_<end>``, with ``-`` for ``_``
    or a ``Y`` before the id, and times in seconds (30, 30.0, 000030) or milliseconds (30000).

    Args:
        roots: folders, searched with all their sub-folders.
    """

    def __init__(self, roots: Sequence[str]) -> None:
        for root in roots:
            if not os.path.isdir(root):
                raise ValueError(f"media: no such folder: {root}")
        self.roots = tuple(roots)
        self.count = 0
        self.asked = False

    @cached_property
    def _files(self) -> dict[str, str | list[str]]:
        """The file of each id, or its files, those of the first root first."""
        found: dict[str, str | list[str]] = {}
        for root in self.roots:
            files, _ = walk(root)
            self.count += len(files)
            for file in files:
                if match := _STEM.fullmatch(_stem(file)):
                    before, path = found.get(match[1], []), os.path.join(root, file)
                    found[match[1]] = [*([before] if isinstance(before, str) else before), path] if before else path
        return found

    def find(self, name: str, start: float, alone: bool = True) -> tuple[str | None, str | None]:
        """Audio and video of a clip, the same file where there is no other for the audio; None for what is missing.

        Args:
            name: the YouTube id.
            start: of the clip, in seconds.
            alone: whether a file without a start in its name is this clip's.
        """
        self.asked = True
        timed, untimed = [], []
        files = self._files.get(name, [])
        for path in [files] if isinstance(files, str) else files:
            match = _STEM.fullmatch(_stem(path))
            if match is None or match[2] is None:
                untimed.append(path)
            elif float(match[2]) in (start, 1000 * start):
                timed.append(path)
        ordered = timed + untimed if alone else timed
        video = next((path for path in ordered if extension_of(path) not in AUDIO_EXTENSIONS), None)
        return next((path for path in ordered if extension_of(path) in AUDIO_EXTENSIONS), video), video


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def split_name(path: str) -> tuple[str, str | None]:
    """File and split of ``vggsound.csv:train``; a path that exists has no split."""
    file, colon, split = path.rpartition(":")
    return (path, None) if not colon or os.path.exists(path) else (file, split)


@dataclass(frozen=True, slots=True)
class _Row:
    """Of a list: id, start in seconds, labels and, of VGGSound's, which split it belongs to."""

    name: str
    start: float
    labels: tuple[str, ...]
    split: str | None


def read_segments(
    path: str,
    media: MediaFiles | None,
    class_csv: str | os.PathLike[str] | None = None,
    weights_csv: str | os.PathLike[str] | None = None,
) -> ClipList:
    """A list of YouTube clips, as AudioSet and VGGSound are published, with their files found by id and start.

    AudioSet's: lines of comment, then ``YTID, start_seconds, end_seconds, "mid,mid"``. VGGSound's: ``YTID,start
    seconds,label,split``. A file is taken for the clip alone, not for the whole film. Rows without a file are left out
    and counted in ``missing``. Where an id is listed more than once, only files with a start in their names are taken.

    Args:
        path: of the CSV; ``vggsound.csv:train`` takes the rows of one split.
        media: where the files are.
        class_csv: ``index,mid,display_name``, which may name VGGSound's labels in either column; without it the labels
            themselves are the classes, those of all rows, sorted.
        weights_csv: one sampling weight per row of the whole CSV.

    Raises:
        ValueError: with one line naming what was wrong, and where; also where no row has a file.
    """
    file, split = split_name(path)
    where = f"CSV {file}"
    listed = _read_segments(file, where)
    weights = [1.0] * len(listed) if weights_csv is None else read_weights(weights_csv, len(listed), file)
    if media is None:
        raise ValueError(f"{where}: a list of YouTube clips needs --media FOLDER, where their files are")
    splits = sorted({row.split for row in listed if row.split is not None})
    if split is not None and split not in splits:
        raise ValueError(f"{path}: expected a split, one of {', '.join(splits) or 'none'}; got {split!r}")
    if class_csv is None:
        names = tuple(sorted({label for row in listed for label in row.labels}))
        classes = Classes(file, names, {name: i for i, name in enumerate(names)})
    else:
        classes = read_classes(class_csv)
        if splits:
            named = {name: i for i, name in enumerate(classes.names)}
            classes = Classes(classes.source, classes.names, named | classes.index)
    often = {name for name, count in Counter(row.name for row in listed).items() if count > 1}
    wanted = [(row, weight) for row, weight in zip(listed, weights, strict=True) if split in (None, row.split)]

    def clips() -> Iterator[Clip]:
        for row, weight in wanted:
            labels = classes.labels(row.labels, f"{where}: {row.name}")
            audio, video = media.find(row.name, row.start, row.name not in often)
            if audio is not None:
                yield Clip(row.name, audio, video, labels, weight)

    found = PackedClips(clips())
    folders = ", ".join(media.roots)
    if not len(found):
        one = wanted[0][0]
        tried = ", ".join(f"{one.name}{start}.*" for start in ("", f"_{one.start:g}", f"_{int(one.start):06d}"))
        raise ValueError(
            f"media: {folders}: no file of the {len(wanted)} clips of {path} (looked for {tried} and the like among "
            f"{media.count} media files)"
        )
    notes = [f"{path}: {len(found)} of {len(wanted)} clips are in {folders} ({len(found) / len(wanted):.1%})"]
    if split is None and len(splits) > 1:
        notes.append(f"{path}: the clips of {', '.join(splits)} alike; {file}:{splits[-1]} takes those of one split")
    return ClipList(found, classes.names, tuple(notes), missing=len(wanted) - len(found))


def _read_segments(file: str, where: str) -> list[_Row]:
    lines = (row for row in read_rows(file, where) if not row[0].startswith("#"))
    first = next(lines, [])
    if not _is_number(first[1:2]):  # a header
        first = next(lines, [])
    forms = "YTID,start_seconds,end_seconds,labels (AudioSet) or YTID,start,label,split (VGGSound)"
    if not first:
        raise ValueError(f"{where}: expected {forms}, got no such row")
    timed = _is_number(first[2:3])  # an end
    shared: dict[str, tuple[str, ...]] = {}  # millions of rows have few labels
    found = []
    for line in chain([first], lines):
        row = [cell.strip() for cell in line]
        if len(row) != 4 or not re.fullmatch(_ID, row[0]) or not _is_number(row[1:2]) or _is_number(row[2:3]) != timed:
            raise ValueError(f"{where}: expected {forms}, got {','.join(row)[:100]}")
        text = row[3] if timed else row[2]
        labels = shared.setdefault(text, tuple(split_mids(text)) if timed else (text,))
        found.append(_Row(row[0], float(row[1]), labels, None if timed else sys.intern(row[3])))
    return found


def _is_number(cells: Sequence[str]) -> bool:
    try:
        return len(cells) == 1 and 0 <= float(cells[0]) < math.inf
    except ValueError:
        return False


@dataclass(frozen=True)
class Classes:
    """Of a class CSV: ``names`` to display in order of their index, and the ``index`` of each mid."""

    source: str
    names: tuple[str, ...]
    index: dict[str, int]

    def labels(self, mids: Iterable[str], where: str) -> tuple[int, ...]:
        """The indices of mids, each once."""
        found: dict[int, None] = {}
        for mid in mids:
            if mid not in self.index:
                raise ValueError(f"{where}: label {mid!r} is not among the {len(self.index)} mids of {self.source}")
            found[self.index[mid]] = None
        return tuple(found)


def split_mids(text: str) -> list[str]:
    """The parts of labels joined by commas."""
    return [part for part in (part.strip() for part in text.split(",")) if part]


def read_rows(path: str | os.PathLike[str], where: str) -> Iterator[list[str]]:
    """The rows of a CSV that are not empty, without the blanks behind commas."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            yield from (row for row in csv.reader(stream, skipinitialspace=True) if any(cell.strip() for cell in row))
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{where}: not a readable CSV: {error}") from None


def read_classes(path: str | os.PathLike[str]) -> Classes:
    """``index,mid,display_name``; a name of several mids is followed by each one's mid."""
    where = f"class CSV {os.fspath(path)}"
    rows = list(read_rows(path, where))
    header = [cell.strip() for cell in rows[0]] if rows else []
    if header[:3] != ["index", "mid", "display_name"]:
        raise ValueError(f"{where}: expected the header index,mid,display_name, got {','.join(header) or 'nothing'}")
    names: dict[int, str] = {}
    index: dict[str, int] = {}
    for number, row in enumerate(rows[1:], 2):
        if len(row) < 3 or not row[0].strip().isdecimal():
            raise ValueError(f"{where}: row {number}: expected index,mid,display_name, got {','.join(row)}")
        position, mid = int(row[0]), row[1].strip()
        if position in names or mid in index:
            raise ValueError(f"{where}: row {number}: index {position} or mid {mid} occurs twice")
        names[position], index[mid] = row[2].strip(), position
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"{where}: expected the indices 0 .. {len(names) - 1}, each once")
    often = {name for name, count in Counter(names.values()).items() if count > 1}
    mids = {position: mid for mid, position in index.items()}
    shown = tuple(f"{names[i]} ({mids[i]})" if names[i] in often else names[i] for i in range(len(names)))
    return Classes(os.fspath(path), shown, index)


def read_weights(path: str | os.PathLike[str], count: int, manifest: str) -> list[float]:
    """One sampling weight per line, as many as ``manifest`` has clips."""
    where, weights = f"weights CSV {os.fspath(path)}", []
    for number, row in enumerate(read_rows(path, where), 1):
        try:
            weight = float(row[0])
        except ValueError:
            raise ValueError(f"{where}: line {number}: expected a number, got {row[0]!r}") from None
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{where}: line {number}: expected a weight of 0 or more, got {row[0]}")
        weights.append(weight)
    if len(weights) != count:
        raise ValueError(f"{where}: expected {count} weights, one per clip of {manifest}, got {len(weights)}")
    return weights
