"""Lists of clips: folders of media files and CAV-MAE's manifests."""

from __future__ import annotations

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from avfast.data.clip_list import Clip, ClipList, PackedClips, merge
from avfast.data.media import AUDIO_EXTENSIONS, MEDIA_EXTENSIONS

__all__ = ["Clip", "ClipList", "merge", "read_all", "read_folder", "read_manifest"]

_AGAIN = "met before under another name"


def read_all(
    paths: Sequence[str], class_csv: str | None = None, weights_csv: Sequence[str] = (), *, source: str = "data"
) -> ClipList:
    """One list of the clips of several folders, media files and manifests; classes are united by name.

    Args:
        paths: at least one.
        class_csv: the classes of the manifests' labels; without it labels are ignored. Folders take no notice of it.
        weights_csv: none, or sampling weights for each of the manifests.
        source: what gave the paths, for messages.

    Raises:
        ValueError: with one line naming what was wrong, and where.
    """
    for path in paths:
        if not os.path.exists(path):
            raise ValueError(f"{source}: no such file or folder: {path}")
    manifests = [path for path in paths if is_manifest(path)]
    if weights_csv and len(weights_csv) != len(manifests):
        raise ValueError(
            f"weights_csv: expected one CSV for each of the {len(manifests)} manifests, got {len(weights_csv)}: "
            f"{','.join(weights_csv)}"
        )
    weights = iter(weights_csv)
    return merge(
        [read_manifest(p, class_csv, next(weights, None)) if is_manifest(p) else read_folder(p) for p in paths]
    )


def is_manifest(path: str) -> bool:
    """Whether :func:`read_all` takes ``path`` for a manifest: it is neither a folder nor named like a media file."""
    return not os.path.isdir(path) and _extension(path) not in MEDIA_EXTENSIONS


def read_folder(path: str | os.PathLike[str]) -> ClipList:
    """Every media file below ``path``, by name; a media file is a list of one clip.

    The first sub-folder on the way to a file names its class, as torchvision's ImageFolder has it; files directly in
    ``path`` have none, and without sub-folders there are no classes. Names that begin with a dot are skipped. Links are
    followed, but a folder or file that is met again under another name is left out. One audio file and one video
    file whose names differ in their extension alone (``clip.wav`` beside ``clip.mp4``) are one clip. ``notes`` say what
    was paired and what was left out.

    Raises:
        ValueError: there is no such folder, or no media file in it.
    """
    root = os.fspath(path)
    if os.path.isdir(root):
        files, skipped = _walk(root)
    elif os.path.isfile(root) and _extension(root) in MEDIA_EXTENSIONS:
        root, name = os.path.split(root)
        files, skipped = [name], Counter()
    else:
        raise ValueError(f"data: no such folder: {root}")
    kinds = [f"{count} {what}" for what, count in skipped.most_common(6)]
    rest = sum(skipped.values()) - sum(count for _, count in skipped.most_common(6))
    left_out = ", ".join(kinds + ([f"{rest} others"] if rest else []))
    if not files:
        wanted = f"looked for {', '.join(sorted(MEDIA_EXTENSIONS))}" + (f"; left out {left_out}" if left_out else "")
        raise ValueError(f"data: no media files under {root} ({wanted})")
    categories = [file.split(os.sep)[0] if os.sep in file else None for file in files]
    class_names = tuple(sorted({category for category in categories if category is not None}))
    index = {name: i for i, name in enumerate(class_names)}
    audio_of = _pairs(files)
    partners = set(audio_of.values())

    def clips() -> Iterator[Clip]:
        for file, category in zip(files, categories, strict=True):
            if file in partners:
                continue
            video = None if _extension(file) in AUDIO_EXTENSIONS else os.path.join(root, file)
            audio = os.path.join(root, audio_of.get(file, file))
            yield Clip(os.path.splitext(file)[0], audio, video, () if category is None else (index[category],))

    notes = []
    if audio_of:
        video, audio = next(iter(audio_of.items()))
        more = f" and {len(audio_of) - 1} more" if len(audio_of) > 1 else ""
        notes.append(f"{root}: the audio of {video} is taken from {audio}{more}, by name")
    if left_out:
        notes.append(f"{root}: left out {left_out}")
    return ClipList(PackedClips(clips()), class_names, tuple(notes))


def _walk(root: str) -> tuple[list[str], Counter[str]]:
    """Media files below ``root``, relative to it, and how many of what else there are.

    Folders and files are told apart by where they really are. Links come last, so that they never take the place of
    what they lead to.
    """
    files: list[str] = []
    skipped: Counter[str] = Counter()
    seen: set[str] = set()  # folders, and files that links lead to
    folders: list[str] = [""]
    links: list[str] = []
    while folders or links:
        relative = folders.pop() if folders else links.pop()
        place = os.path.join(root, relative)
        real = os.path.realpath(place)
        is_folder = os.path.isdir(place)
        if real in seen or (not is_folder and _is_listed(real) and os.path.dirname(real) in seen):
            skipped[_AGAIN] += 1
            continue
        seen.add(real)
        if not is_folder:
            files.append(relative)
            continue
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name, reverse=True)
        except OSError:
            skipped["unreadable folders"] += 1
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name, extension = os.path.join(relative, entry.name), _extension(entry.name)
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                (links if entry.is_symlink() else folders).append(name)
            elif extension not in MEDIA_EXTENSIONS:
                skipped[f"{extension} files" if extension else "files without extension"] += 1
            elif entry.is_file(follow_symlinks=False):
                if os.path.join(real, entry.name) in seen:
                    skipped[_AGAIN] += 1
                else:
                    files.append(name)
            elif os.path.exists(entry.path) and not os.path.isfile(entry.path):
                skipped["pipes, sockets or devices"] += 1
            else:
                links.append(name)  # a broken one too: it is named when it cannot be read
    return sorted(files, key=lambda file: (file.split(os.sep)[:-1], file)), skipped


def _is_listed(path: str) -> bool:
    return _extension(path) in MEDIA_EXTENSIONS and not os.path.basename(path).startswith(".")


def _pairs(files: Sequence[str]) -> dict[str, str]:
    """Video file -> audio file, where exactly one of each share a folder and a name."""
    found: dict[str, list[str]] = {}
    for file in files:
        found.setdefault(os.path.splitext(file)[0], []).append(file)
    pairs = {}
    for same in found.values():
        if len(same) == 2 and sum(_extension(file) in AUDIO_EXTENSIONS for file in same) == 1:
            video, audio = sorted(same, key=lambda file: _extension(file) in AUDIO_EXTENSIONS)
            pairs[video] = audio
    return pairs


def _extension(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def read_manifest(
    path: str | os.PathLike[str],
    class_csv: str | os.PathLike[str] | None = None,
    weights_csv: str | os.PathLike[str] | None = None,
) -> ClipList:
    """CAV-MAE's JSON manifest, unchanged: ``{"data": [{"video_id", "wav", "video_path", "labels"}, ...]}``.

    ``wav`` is any media file with audio. ``video_path`` is a media file, or (a path without a media extension) the
    folder that holds ``frame_0/<video_id>.jpg`` .. ``frame_9/<video_id>.jpg``. Either may be empty or null for a
    modality that is missing. Relative paths start at the manifest's folder. ``labels`` are mids joined by commas.

    Args:
        path: of the manifest.
        class_csv: ``index,mid,display_name``; without it labels are ignored.
        weights_csv: one sampling weight per line, in the manifest's order.

    Raises:
        ValueError: with one line naming what was wrong, and where. Media files are not looked for: those that are
            missing are reported when they are read.
    """
    file = os.fspath(path)
    where = f"manifest {file}"
    try:
        with open(file, encoding="utf-8-sig") as stream:
            content = json.load(stream)
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None
    entries = content.get("data") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f'{where}: expected {{"data": [...]}}, got {_kind(content)}')
    if not entries:
        raise ValueError(f"{where}: its list of clips is empty")
    classes = None if class_csv is None else _read_classes(class_csv)
    weights = [1.0] * len(entries) if weights_csv is None else _read_weights(weights_csv, len(entries), file)
    root = Path(file).absolute().parent
    clips = PackedClips(
        _read_entry(entry, f"{where}: entry {i}", root, classes, weight)
        for i, (entry, weight) in enumerate(zip(entries, weights, strict=True))
    )
    return ClipList(clips, classes.names if classes else ())


@dataclass(frozen=True)
class _Classes:
    """Of a class CSV: ``names`` to display in order of their index, and the ``index`` of each mid."""

    source: str
    names: tuple[str, ...]
    index: dict[str, int]

    def labels(self, mids: str, where: str) -> tuple[int, ...]:
        """The indices of mids joined by commas, each once."""
        found: dict[int, None] = {}
        for mid in filter(None, (part.strip() for part in mids.split(","))):
            if mid not in self.index:
                raise ValueError(f"{where}: label {mid!r} is not among the {len(self.index)} mids of {self.source}")
            found[self.index[mid]] = None
        return tuple(found)


def _read_entry(entry: object, where: str, root: Path, classes: _Classes | None, weight: float) -> Clip:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object with video_id, wav, video_path and labels, got {_kind(entry)}")
    required = ["video_id", "wav", "video_path"] + (["labels"] if classes else [])
    if missing := [key for key in required if key not in entry]:
        raise ValueError(f"{where}: missing {', '.join(missing)}; it has {', '.join(entry) or 'nothing'}")
    for key in required:
        if not isinstance(entry[key], str) and not (entry[key] is None and key in ("wav", "video_path")):
            raise ValueError(f"{where}: {key}: expected a string, got {_kind(entry[key])}")
    name = entry["video_id"]
    where = f"{where} ({name})"
    audio, video = (os.path.join(root, entry[key]) if entry[key] else None for key in ("wav", "video_path"))
    if audio is None and video is None:
        raise ValueError(f"{where}: both wav and video_path are empty")
    labels = classes.labels(entry["labels"], where) if classes else ()
    is_file = video is not None and _extension(video) in MEDIA_EXTENSIONS
    return Clip(name, audio, video if is_file else None, labels, weight, None if is_file else video)


def _rows(path: str | os.PathLike[str], where: str) -> Iterator[list[str]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            yield from (row for row in csv.reader(stream) if any(cell.strip() for cell in row))
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{where}: not a readable CSV: {error}") from None


def _read_classes(path: str | os.PathLike[str]) -> _Classes:
    """A name of several mids is followed by each one's mid."""
    where = f"class CSV {os.fspath(path)}"
    rows = list(_rows(path, where))
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
    return _Classes(os.fspath(path), shown, index)


def _read_weights(path: str | os.PathLike[str], count: int, manifest: str) -> list[float]:
    where, weights = f"weights CSV {os.fspath(path)}", []
    for number, row in enumerate(_rows(path, where), 1):
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


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)
