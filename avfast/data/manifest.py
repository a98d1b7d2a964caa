"""Lists of clips: folders of media files and CAV-MAE's manifests."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from avfast.data.media import AUDIO_EXTENSIONS, MEDIA_EXTENSIONS


@dataclass(frozen=True, slots=True)
class Clip:
    """One clip: where its sound and its pictures are.

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


@dataclass(frozen=True)
class ClipList:
    """Clips and the names of their classes (empty: no labels are known)."""

    clips: tuple[Clip, ...]
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.clips)


def read(data: str | os.PathLike[str], class_csv: str | None = None, weights_csv: str | None = None) -> ClipList:
    """What ``--data`` takes: a folder, a CAV-MAE JSON manifest, or several of them joined by commas.

    Args:
        data: the path or paths. A path that exists is taken whole, commas included.
        class_csv: the classes of the manifests' labels; without it labels are ignored. Folders take no notice of it.
        weights_csv: sampling weights of the manifests, joined by commas if there are several.

    Raises:
        ValueError: with one line naming what was wrong, and where.
    """
    text = os.fspath(data)
    paths = [text] if os.path.exists(text) else [part.strip() for part in text.split(",") if part.strip()]
    if not paths:
        raise ValueError("data: expected a folder or a JSON manifest, got an empty name")
    for path in paths:
        if not os.path.exists(path):
            raise ValueError(f"data: no such file or folder: {path}")
    manifests = [path for path in paths if not os.path.isdir(path)]
    weights = [part.strip() for part in weights_csv.split(",")] if weights_csv else [None] * len(manifests)
    if len(weights) != len(manifests):
        raise ValueError(
            f"weights: expected one CSV for each of the {len(manifests)} manifests, got {len(weights)}: {weights_csv}"
        )
    if class_csv and not manifests:
        raise ValueError(
            f"class CSV: {class_csv} goes with a JSON manifest; the classes of a folder are its sub-folders"
        )
    of_manifest = dict(zip(manifests, weights, strict=True))
    lists = [
        read_folder(path) if os.path.isdir(path) else read_manifest(path, class_csv, of_manifest[path])
        for path in paths
    ]
    return merge(lists)


def merge(lists: Sequence[ClipList]) -> ClipList:
    """All clips in order; classes are united by name, in order of first appearance."""
    if len(lists) == 1:
        return lists[0]
    index: dict[str, int] = {}
    for part in lists:
        for name in part.class_names:
            index.setdefault(name, len(index))
    clips: list[Clip] = []
    for part in lists:
        to = [index[name] for name in part.class_names]
        if to == list(range(len(to))):
            clips += part.clips
        else:
            clips += [replace(clip, labels=tuple(to[label] for label in clip.labels)) for clip in part.clips]
    return ClipList(tuple(clips), tuple(index))


def read_folder(path: str | os.PathLike[str]) -> ClipList:
    """Every media file below ``path``, by name.

    The first sub-folder on the way to a file names its class, as torchvision's ImageFolder has it; files directly in
    ``path`` have none, and without sub-folders there are no classes. Names that begin with a dot are skipped.

    Raises:
        ValueError: there is no such folder, or no media file in it.
    """
    root = os.fspath(path)
    if not os.path.isdir(root):
        raise ValueError(f"data: no such folder: {root}")
    found: list[tuple[str, str, str | None]] = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = os.path.relpath(folder, root)
        category = None if relative == "." else relative.split(os.sep)[0]
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in MEDIA_EXTENSIONS:
                found.append((os.path.join(folder, name), os.path.normpath(os.path.join(relative, name)), category))
    if not found:
        raise ValueError(f"data: no media files under {root} (looked for {', '.join(sorted(MEDIA_EXTENSIONS))})")
    class_names = tuple(sorted({category for _, _, category in found if category is not None}))
    index = {name: i for i, name in enumerate(class_names)}
    clips = []
    for file, relative, category in found:
        sound_only = os.path.splitext(file)[1].lower() in AUDIO_EXTENSIONS
        labels = () if category is None else (index[category],)
        clips.append(Clip(os.path.splitext(relative)[0], file, None if sound_only else file, labels))
    return ClipList(tuple(clips), class_names)


def read_manifest(
    path: str | os.PathLike[str],
    class_csv: str | os.PathLike[str] | None = None,
    weights_csv: str | os.PathLike[str] | None = None,
) -> ClipList:
    """CAV-MAE's JSON manifest, unchanged: ``{"data": [{"video_id", "wav", "video_path", "labels"}, ...]}``.

    ``wav`` is any media file with sound. ``video_path`` is a media file, or (a path without a media extension) the
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
    try:
        with open(file, encoding="utf-8-sig") as stream:
            content = json.load(stream)
    except OSError as error:
        raise ValueError(f"manifest {file}: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"manifest {file}: not valid JSON: {error}") from None
    entries = content.get("data") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f'manifest {file}: expected {{"data": [...]}}, got {_kind(content)}')
    if not entries:
        raise ValueError(f"manifest {file}: its list of clips is empty")
    names, index = ((), None) if class_csv is None else _read_classes(class_csv)
    weights = [1.0] * len(entries) if weights_csv is None else _read_weights(weights_csv, len(entries), file)
    root = Path(file).absolute().parent
    clips = tuple(
        _read_entry(entry, f"manifest {file}: entry {i}", root, index, class_csv, weight)
        for i, (entry, weight) in enumerate(zip(entries, weights, strict=True))
    )
    return ClipList(clips, names)


def _read_entry(
    entry: object,
    where: str,
    root: Path,
    index: dict[str, int] | None,
    class_csv: str | os.PathLike[str] | None,
    weight: float,
) -> Clip:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object with video_id, wav, video_path and labels, got {_kind(entry)}")
    required = ["video_id", "wav", "video_path"] + (["labels"] if index is not None else [])
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
    labels: list[int] = []
    for label in (part.strip() for part in entry["labels"].split(",")) if index is not None else ():
        if label and label not in index:
            raise ValueError(f"{where}: label {label!r} is not among the {len(index)} mids of {os.fspath(class_csv)}")
        if label and index[label] not in labels:
            labels.append(index[label])
    is_file = video is not None and os.path.splitext(video)[1].lower() in MEDIA_EXTENSIONS
    return Clip(name, audio, video if is_file else None, tuple(labels), weight, None if is_file else video)


def _rows(path: str | os.PathLike[str], what: str) -> Iterator[list[str]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            yield from (row for row in csv.reader(stream) if any(cell.strip() for cell in row))
    except OSError as error:
        raise ValueError(f"{what} {os.fspath(path)}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{what} {os.fspath(path)}: not a readable CSV: {error}") from None


def _read_classes(path: str | os.PathLike[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Display names in order of their index, and mid -> index."""
    rows = list(_rows(path, "class CSV"))
    header = [cell.strip() for cell in rows[0]] if rows else []
    if header[:3] != ["index", "mid", "display_name"]:
        raise ValueError(
            f"class CSV {os.fspath(path)}: expected the header index,mid,display_name, "
            f"got {','.join(header) or 'nothing'}"
        )
    names: dict[int, str] = {}
    index: dict[str, int] = {}
    for number, row in enumerate(rows[1:], 2):
        if len(row) < 3 or not row[0].strip().isdecimal():
            raise ValueError(
                f"class CSV {os.fspath(path)}: row {number}: expected index,mid,display_name, got {','.join(row)}"
            )
        position, mid = int(row[0]), row[1].strip()
        if position in names or mid in index:
            raise ValueError(f"class CSV {os.fspath(path)}: row {number}: index {position} or mid {mid} occurs twice")
        names[position], index[mid] = row[2].strip(), position
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"class CSV {os.fspath(path)}: expected the indices 0 .. {len(names) - 1}, each once")
    return tuple(names[i] for i in range(len(names))), index


def _read_weights(path: str | os.PathLike[str], count: int, manifest: str) -> list[float]:
    weights = []
    for number, row in enumerate(_rows(path, "weights CSV"), 1):
        try:
            weight = float(row[0])
        except ValueError:
            raise ValueError(
                f"weights CSV {os.fspath(path)}: line {number}: expected a number, got {row[0]!r}"
            ) from None
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(
                f"weights CSV {os.fspath(path)}: line {number}: expected a weight of 0 or more, got {row[0]}"
            )
        weights.append(weight)
    if len(weights) != count:
        raise ValueError(
            f"weights CSV {os.fspath(path)}: expected {count} weights, one per clip of {manifest}, got {len(weights)}"
        )
    return weights


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)
