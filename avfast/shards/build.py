"""Builds shard sets: a plan, shards that are each built by a pure function, and an index of them at the end.

The plan, and so every byte of the set, depends on the list of clips and the settings alone: not on how many processes
or machines build it, nor on how often they are interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
import torch

from avfast.data.clip_list import Clip, ClipList, ShardRow
from avfast.data.dataset import Whole, decode_whole
from avfast.data.media import MediaError, probe
from avfast.data.shard_layout import (
    BUILD,
    FORMAT,
    INDEX,
    PLAN,
    UNREADABLE,
    WORK,
    Entry,
    ShardSettings,
    index_bytes,
    is_url,
    read_json,
)
from avfast.data.shard_tar import BLOCK, id_of, key_of, member, shard_name

_SLACK = 0.5  # seconds by which a file may end before its header says
_SAMPLE = 64  # clips whose headers tell how large a clip is
_PARTS = 32  # shards into which a small set is cut, so that several processes find work,
_FEWEST = 64  # unless they would hold fewer clips than this
_PER_PIXEL = 0.35  # bytes of a JPEG, about


@dataclass(frozen=True)
class ShardSpec:
    """One shard to build; all that :func:`build_shard` knows.

    Attributes:
        folder: of the set.
        number: of the shard.
        clips: in it.
        keys: their names in it.
        settings: what of them is kept.
    """

    folder: str
    number: int
    clips: Sequence[Clip]
    keys: Sequence[str]
    settings: ShardSettings

    @property
    def path(self) -> Path:
        return Path(self.folder) / shard_name(self.number)


def build_shard(spec: ShardSpec, tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Builds a shard and its report; each appears whole or not at all, the report last.

    Args:
        spec: which.
        tick: called after each clip.

    Returns:
        The report: ``{"bytes", "sha256", "entries", "unreadable", "truncated"}``, the entries as in
        :class:`avfast.data.shard_layout.Entry`.

    Raises:
        OSError: it cannot be written. Clips that cannot be read stand in the report.
    """
    entries: list[dict[str, Any]] = []
    unreadable: list[dict[str, str]] = []
    truncated: list[str] = []
    digest, size = hashlib.sha256(), 0
    with _written(spec.path) as file:
        for clip, key in zip(spec.clips, spec.keys, strict=True):
            try:
                whole = decode_whole(
                    clip,
                    sample_rate=spec.settings.sample_rate,
                    short_side=spec.settings.short_side,
                    count=spec.settings.count,
                    slack=_SLACK,
                )
                if whole.waveform is None and whole.frames is None:
                    raise MediaError(clip.path, "holds neither audio nor video")
            except MediaError as error:
                unreadable.append({"id": clip.id, "path": error.path, "reason": error.reason})
            else:
                contents = _contents(clip, whole, spec.settings)
                sizes = [len(content) for _, content in contents]
                labels, has_audio = [int(label) for label in clip.labels], whole.waveform is not None
                entry = Entry(key, size // BLOCK, sizes, whole.duration, has_audio, labels, float(clip.weight))
                entry.id = clip.id if id_of(key) is None else ""
                entries.append(asdict(entry))
                truncated += whole.truncated
                data = b"".join(member(f"{key}.{name}", content) for name, content in contents)
                digest.update(data)
                size += file.write(data)
            tick()
        end = bytes(2 * BLOCK)
        digest.update(end)
        size += file.write(end)
    report = {
        "bytes": size,
        "sha256": digest.hexdigest(),
        "entries": entries,
        "unreadable": unreadable,
        "truncated": truncated,
    }
    _write(_report_path(spec.path), json.dumps(report).encode())
    return report


def _contents(clip: Clip, whole: Whole, settings: ShardSettings) -> list[tuple[str, bytes]]:
    """(name without the key, content) of the members of a clip."""
    from torchvision.io import encode_jpeg

    contents = []
    if whole.waveform is not None:
        samples = (whole.waveform * 2.0**15).round_().clamp_(-(2**15), 2**15 - 1).to(torch.int16)
        contents.append(("s16", samples.numpy().astype("<i2").tobytes()))
    if whole.frames is not None:
        for i, frame in enumerate(whole.frames):
            contents.append((f"{i}.jpg", encode_jpeg(frame, quality=settings.quality).numpy().tobytes()))
    about = {
        "id": clip.id,
        "audio_path": clip.audio_path,
        "video_path": clip.video_path or clip.frames_dir,
        "duration": whole.duration,
        "labels": [int(label) for label in clip.labels],
        "sample_rate": settings.sample_rate if whole.waveform is not None else None,
        "frame_times": [] if whole.frames is None else list(whole.times),
        "absent": [k for k, v in (("audio", whole.waveform), ("video", whole.frames)) if v is None],
        "truncated": list(whole.truncated),
    }
    return contents + [("json", json.dumps(about).encode())]


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at ``path`` whole or not at all; the next build sweeps up what a killed process leaves."""
    folder = path.parent if path.parent.name == WORK else path.parent / WORK
    part = folder / f"{path.name}.{uuid4().hex}.tmp"
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    with _written(path) as file:
        file.write(content)


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _report_path(shard: Path) -> Path:
    return shard.parent / WORK / f"{shard.stem}.json"


def _finished(shard: Path) -> bool:
    """Whether it is built: its report is there, and it is as long as that says."""
    try:
        return shard.stat().st_size == json.loads(_report_path(shard).read_bytes())["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


# -- the set --------------------------------------------------------------------------------------------------------

Runner = Callable[[Iterator[ShardSpec], int, Callable[[int], None]], None]


def build(
    clip_list: ClipList,
    folder: str | os.PathLike[str],
    *,
    settings: ShardSettings | None = None,
    shard_bytes: float = 1e9,
    run: Runner | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Builds the shard set of a list of clips, or what is missing of it.

    Args:
        clip_list: of media files. Clips that cannot be read are left out, and listed in ``unreadable.jsonl``.
        folder: of the set; new, or one that an earlier call with the same arguments left.
        settings: what of a clip is kept.
        shard_bytes: about how large a shard is. A small set is cut into up to 32 shards of 64 clips or more.
        run: what builds the shards: (specifications, how many, called with a number of clips done); by default one
            after the other in this process. See :mod:`avfast.shards.pool`.
        progress: a bar with clips per second and the time left.

    Returns:
        What stands in ``build.json``.

    Raises:
        ValueError: with one line: the folder holds something else, or another build is at work there.
        OSError: it cannot be written.
    """
    from tqdm import tqdm

    settings = settings or ShardSettings()
    if is_url(folder):
        raise ValueError(f"{folder}: sets are built in folders; copy a finished one to the store, {BUILD} last")
    root = Path(os.path.abspath(folder))
    with _locked(root):
        plan = _plan(root, clip_list, settings, shard_bytes)
        for stray in (root / WORK).glob("*.tmp"):
            stray.unlink(missing_ok=True)
        cuts = [len(clip_list) * i // plan["shards"] for i in range(plan["shards"] + 1)]
        missing = [i for i in range(plan["shards"]) if not _finished(root / shard_name(i))]
        done = len(clip_list) - sum(cuts[i + 1] - cuts[i] for i in missing)
        if missing:
            specs = _specs(root, clip_list, settings, cuts, missing)
            about: dict[str, Any] = {"desc": str(folder), "unit": "clip", "mininterval": 1.0, "smoothing": 0.05}
            with tqdm(total=len(clip_list), initial=done, disable=not progress, **about) as bar:
                (run or in_process)(specs, len(missing), bar.update)
        return _finish(root, clip_list, plan)


def in_process(specs: Iterable[ShardSpec], count: int, tick: Callable[[int], None]) -> None:
    """One shard after the other."""
    for spec in specs:
        build_shard(spec, partial(tick, 1))


def _specs(
    root: Path, clip_list: ClipList, settings: ShardSettings, cuts: Sequence[int], numbers: Sequence[int]
) -> Iterator[ShardSpec]:
    """The shards ``numbers`` of those between ``cuts``, in order; no two clips of the set have the same key."""
    wanted, seen = set(numbers), dict[str, int]()
    for number, (first, last) in enumerate(zip(cuts, cuts[1:], strict=False)):
        clips = clip_list.clips[first:last]
        keys = []
        for clip in clips:
            key = key_of(clip.id)
            seen[key] = before = seen.get(key, -1) + 1
            keys.append(f"{key}~{before + 1}" if before else key)
        if number in wanted:
            yield ShardSpec(str(root), number, clips, keys, settings)


def _plan(root: Path, clip_list: ClipList, settings: ShardSettings, shard_bytes: float) -> dict[str, Any]:
    """What is built in ``root``, as an earlier call has written it down or as this one does."""
    if not len(clip_list):
        raise ValueError("data: no clips to build shards of")
    wanted = {"format": FORMAT, **asdict(settings), "shard_bytes": int(shard_bytes), "clips": _digest(clip_list)}
    path = root / WORK / PLAN
    if path.exists():
        plan = read_json(path)
        for name, value in wanted.items():
            if plan.get(name) != value:
                what = "another list of clips" if name == "clips" else f"{name} {plan.get(name)}, not {value}"
                raise ValueError(f"{root} holds shards built with {what}: name another folder, or delete it")
        return plan
    by_size = shard_bytes / _typical_size(clip_list.clips, settings)
    by_count = max(len(clip_list) / _PARTS, _FEWEST)
    plan = wanted | {"shards": int(np.ceil(len(clip_list) / max(1.0, min(by_size, by_count))))}
    _write(path, _json(plan))
    return plan


def _typical_size(clips: Sequence[Clip], settings: ShardSettings) -> float:
    """Bytes of a clip in a shard, by the headers of a few."""
    sizes = []
    for i in range(min(len(clips), _SAMPLE)):
        clip = clips[i * len(clips) // min(len(clips), _SAMPLE)]
        path = clip.video_path or clip.audio_path
        try:
            info = probe(str(path)) if path else None
        except MediaError:
            continue
        seconds = 10.0 if info is None else info.duration
        frames = settings.count(seconds, info.frame_rate if info else 0.0) if clip.video_path or clip.frames_dir else 0
        jpeg = _PER_PIXEL * settings.short_side**2 * 16 / 9
        sizes.append(2 * settings.sample_rate * seconds + (jpeg + BLOCK) * frames + 4 * BLOCK)
    return float(np.mean(sizes)) if sizes else 1e6


def _digest(clip_list: ClipList) -> str:
    """Tells lists of clips apart."""
    digest = hashlib.sha256(json.dumps(clip_list.class_names).encode())
    for clip in clip_list.clips:
        if isinstance(clip.audio_path or clip.video_path, ShardRow):
            raise ValueError(f"data: {clip.path} is in a shard set already: name what that was built from")
        labels = [int(label) for label in clip.labels]
        record = [clip.id, clip.audio_path, clip.video_path, clip.frames_dir, labels, float(clip.weight)]
        digest.update(json.dumps(record).encode())
    return digest.hexdigest()


def _finish(root: Path, clip_list: ClipList, plan: dict[str, Any]) -> dict[str, Any]:
    """Writes the index, the list of what could not be read and, last, ``build.json``, all from the reports."""
    from avfast import __version__

    shards, unreadable, counts = [], [], dict.fromkeys(("audio", "video", "both", "truncated"), 0)

    def entries() -> Iterator[list[Entry]]:
        for number in range(plan["shards"]):
            path = root / shard_name(number)
            report = read_json(_report_path(path))
            found = [Entry(**entry) for entry in report["entries"]]
            has = [(entry.has_audio, len(entry.sizes) > 1 + entry.has_audio) for entry in found]
            counts["audio"] += sum(audio for audio, _ in has)
            counts["video"] += sum(video for _, video in has)
            counts["both"] += sum(audio and video for audio, video in has)
            counts["truncated"] += len(report["truncated"])
            shards.append({"name": path.name, "clips": len(found), **{k: report[k] for k in ("bytes", "sha256")}})
            unreadable.extend(report["unreadable"])
            yield found

    identity = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    index = index_bytes(entries(), identity)
    _write(root / UNREADABLE, "".join(json.dumps(line) + "\n" for line in unreadable).encode())
    _write(root / INDEX, index)
    built = {
        "format": FORMAT,
        "avfast": __version__,
        "set": identity,
        "settings": {k: v for k, v in plan.items() if k not in ("format", "clips", "shards")},
        "clips": {
            "listed": len(clip_list),
            "built": len(clip_list) - len(unreadable),
            "share": (len(clip_list) - len(unreadable)) / len(clip_list),
            **counts,
        },
        "notes": list(clip_list.notes),
        "index": {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()},
        "shards": shards,
        "classes": list(clip_list.class_names),
    }
    _write(root / BUILD, _json(built))
    return built


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One build at a time in a folder, which is made if need be."""
    if not (root / WORK).is_dir() and root.is_dir() and (others := sorted(os.listdir(root))):
        raise ValueError(f"{root} is no folder of shards (it holds {others[0]}): name another one")
    (root / WORK).mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (root / WORK / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{root}: another build is at work there; wait for it, or end it") from None
        except OSError:
            pass  # a file system without locks
        yield
