"""Lists of clips: folders of media, shard sets, CAV-MAE's manifests, and with :mod:`csv_lists` CSVs of data sets."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from avfast.data.clip_list import Clip, ClipList, PackedClips, merge
from avfast.data.csv_lists import Classes, MediaFiles, read_classes, read_segments, read_weights, split_mids, split_name
from avfast.data.folders import extension_of, walk
from avfast.data.media import AUDIO_EXTENSIONS, MEDIA_EXTENSIONS
from avfast.data.shard_layout import is_set, is_url
from avfast.data.shard_source import read_set

if TYPE_CHECKING:
    from avfast.data.shard_cache import Cache

__all__ = ["Clip", "ClipList", "merge", "read_all", "read_folder", "read_manifest"]


def read_all(
    paths: Sequence[str],
    class_csv: str | None = None,
    weights_csv: Sequence[str] = (),
    *,
    data_weights: Sequence[float] = (),
    media: MediaFiles | None = None,
    cache: Cache | None = None,
    source: str = "data",
) -> ClipList:
    """One list of the clips of several folders, media files, shard sets and manifests; classes are united by name.

    Args:
        paths: at least one. Besides JSON manifests the CSVs of AudioSet and VGGSound are manifests, see
            :func:`avfast.data.csv_lists.read_segments`; which is which is told by their contents.
        class_csv: the classes of the manifests' labels; without it those of JSON manifests are ignored. Folders take no
            notice of it.
        weights_csv: none, or sampling weights for each of the manifests.
        data_weights: none, or for each of the paths how often it is drawn from: the sum of its clips' weights.
        media: where the files of the CSVs' clips are.
        cache: where shards are kept of sets that URLs name.
        source: what gave the paths, for messages.

    Raises:
        ValueError: with one line naming what was wrong, and where.
    """
    for path in paths:
        if not is_url(path) and not os.path.exists(split_name(path)[0]):
            raise ValueError(f"{source}: no such file or folder: {path}")
    manifests = [path for path in paths if is_manifest(path)]
    if weights_csv and len(weights_csv) != len(manifests):
        raise ValueError(
            f"weights_csv: expected one CSV for each of the {len(manifests)} manifests, got {len(weights_csv)}: "
            f"{','.join(weights_csv)}"
        )
    weights = iter(weights_csv)

    def read(path: str) -> ClipList:
        if not is_manifest(path):
            return read_set(path, cache) if is_url(path) or is_set(path) else read_folder(path)
        if _is_json(split_name(path)[0]):
            return read_manifest(path, class_csv, next(weights, None))
        return read_segments(path, media, class_csv, next(weights, None))

    if not data_weights:
        return merge([read(path) for path in paths])
    if len(data_weights) != len(paths) or not all(0 <= weight < math.inf for weight in data_weights):
        given = ",".join(f"{weight:g}" for weight in data_weights)
        raise ValueError(f"data_weights {given}: expected a number of 0 or more for each of {', '.join(paths)}")
    return merge([_weighted(read(path), weight) for path, weight in zip(paths, data_weights, strict=True)])


def _weighted(clips: ClipList, weight: float) -> ClipList:
    """The clips with weights in the same proportions, whose sum is ``weight``."""
    total = sum(clip.weight for clip in clips.clips) or 1.0
    return replace(clips, clips=PackedClips(replace(clip, weight=clip.weight * weight / total) for clip in clips.clips))


def is_manifest(path: str) -> bool:
    """Whether :func:`read_all` takes ``path`` for a manifest: no URL, no folder, not named like a media file."""
    return not is_url(path) and not os.path.isdir(path) and extension_of(path) not in MEDIA_EXTENSIONS


def _is_json(file: str) -> bool:
    with open(file, "rb") as stream:
        start = stream.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip()
    return start[:1] in b"{["  # an empty file too


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
        files, skipped = walk(root)
    elif os.path.isfile(root) and extension_of(root) in MEDIA_EXTENSIONS:
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
            video = None if extension_of(file) in AUDIO_EXTENSIONS else os.path.join(root, file)
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


def _pairs(files: Sequence[str]) -> dict[str, str]:
    """Video file -> audio file, where exactly one of each share a folder and a name."""
    found: dict[str, list[str]] = {}
    for file in files:
        found.setdefault(os.path.splitext(file)[0], []).append(file)
    pairs = {}
    for same in found.values():
        if len(same) == 2 and sum(extension_of(file) in AUDIO_EXTENSIONS for file in same) == 1:
            video, audio = sorted(same, key=lambda file: extension_of(file) in AUDIO_EXTENSIONS)
            pairs[video] = audio
    return pairs


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
    classes = None if class_csv is None else read_classes(class_csv)
    weights = [1.0] * len(entries) if weights_csv is None else read_weights(weights_csv, len(entries), file)
    root = Path(file).absolute().parent
    clips = PackedClips(
        _read_entry(entry, f"{where}: entry {i}", root, classes, weight)
        for i, (entry, weight) in enumerate(zip(entries, weights, strict=True))
    )
    return ClipList(clips, classes.names if classes else ())


def _read_entry(entry: object, where: str, root: Path, classes: Classes | None, weight: float) -> Clip:
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
    labels = classes.labels(split_mids(entry["labels"]), where) if classes else ()
    is_file = video is not None and extension_of(video) in MEDIA_EXTENSIONS
    return Clip(name, audio, video if is_file else None, labels, weight, None if is_file else video)


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)
