"""Looks a shard set over: what is damaged, and what is in it."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import BinaryIO

import numpy as np

from avfast.data.shard_cache import Cache
from avfast.data.shard_layout import BUILD, INDEX, UNREADABLE, ShardError, ShardSet, open_set
from avfast.data.shard_tar import BLOCK, check, header, padded, shard_name

_SHOWN = 5  # names in a line
_CHUNK = 1 << 22


def verify(folder: str | os.PathLike[str], progress: bool = False, *, cache: Cache | None = None) -> Iterator[str]:
    """What is wrong with the set in ``folder``, a line each; nothing if it is as it was built.

    Every shard is compared with its checksum; where it differs, its members are looked at one by one. Behind a URL the
    store's own files are looked at, not those in the cache.
    """
    from tqdm import tqdm

    try:
        shards = open_set(folder, cache)
    except ShardError as error:
        yield str(error)
        return
    if _sha256(shards.file(INDEX)) != shards.build["index"]["sha256"]:
        yield f"{shards.name}/{INDEX}: damaged (its SHA-256 is not that in {BUILD})"
        return
    files = shards.files()
    if UNREADABLE not in files:
        yield f"{shards.name}/{UNREADABLE}: missing"
    listed = shards.build["shards"]
    known = {shard_name(number) for number in range(len(listed))}
    for stranger in sorted({name for name in files if fnmatch(name, "shard-*.tar")} - known):
        yield f"{shards.name}/{stranger}: belongs to no shard of this set"
    total = sum(shard["bytes"] for shard in listed)
    with tqdm(total=total, unit="B", unit_scale=True, desc=str(folder), disable=not progress) as bar:
        for number, shard in enumerate(listed):
            try:
                digest = _sha256(shards.file(shard["name"]))
            except OSError as error:
                what = "missing" if isinstance(error, FileNotFoundError) else error.strerror or error
                yield f"{shards.path(number)}: {what}"
            else:
                if digest != shard["sha256"]:
                    yield from _damage(shards, number)
            bar.update(shard["bytes"])


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    with file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _damage(shards: ShardSet, number: int) -> Iterator[str]:
    """What is wrong with the members of a shard."""
    path, listed = shards.path(number), shards.build["shards"][number]
    expected = [
        (f"{shards.key(clip)}.{name}", length)
        for clip in shards.clips_of(number)
        for name, _, length in shards.members(clip)
    ]
    names = {name for name, _ in expected}
    missing, wrong, at = [], [], 0
    with shards.file(listed["name"]) as file:
        size = file.seek(0, os.SEEK_END)
        for name, length in expected:
            file.seek(at)
            data = file.read(BLOCK + length)
            found = header(data)
            if len(data) < BLOCK + length and (found is None or found.name == name):
                missing.append(name)  # the end is cut off
            elif found is not None and found.name in names and found.name != name:
                missing.append(name)  # a later one stands here
            elif found is None and not any(data[:BLOCK]):
                missing.append(name)  # the end of the archive
            else:
                if problem := check(data, name, length):
                    wrong.append(f"{name}: {problem}")
                at += padded(length if found is None else found.size)
    what = [f"truncated, {size} of {listed['bytes']} bytes"] if size < listed["bytes"] else []
    what += [f"{len(missing)} members missing: {_some(missing)}"] if missing else []
    what += wrong[:_SHOWN] + ([f"{len(wrong) - _SHOWN} more damaged members"] if len(wrong) > _SHOWN else [])
    for line in what or ["damaged between its members (its SHA-256 is not that in build.json)"]:
        yield f"{path}: {line}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def info(folder: str | os.PathLike[str], cache: Cache | None = None) -> str:
    """What is in the set in ``folder``, for people.

    Raises:
        ShardError: there is none, or it cannot be opened.
    """
    shards = open_set(folder, cache)
    build, columns = shards.build, shards.columns
    counts, sizes = build["clips"], [shard["bytes"] for shard in build["shards"]]
    durations = columns["duration"]
    labels: Counter[int] = Counter(columns["labels"].tolist())
    settings = ", ".join(f"{name} {value:g}" for name, value in build["settings"].items())
    lines = [
        f"{folder}: built by avfast {build['avfast']} with {settings}",
        f"clips     {counts['built']} of {counts['listed']} listed ({100 * counts['share']:.1f} %); {UNREADABLE} says "
        "which are missing and why",
        f"          {counts['audio']} with audio, {counts['video']} with video, {counts['both']} with both; "
        f"{counts['truncated']} files end before their headers say",
        f"shards    {len(sizes)}, {sum(sizes) / 1e9:.3f} GB; index {build['index']['bytes'] / 1e6:.3f} MB",
    ]
    if len(durations):
        low, middle, high = np.quantile(durations, [0, 0.5, 1])
        lines.append(
            f"seconds   {low:.2f} to {high:.2f}, median {middle:.2f}; {durations.sum() / 3600:.2f} hours in all"
        )
    if shards.class_names:
        often = ", ".join(f"{shards.class_names[i]} {count}" for i, count in labels.most_common(_SHOWN))
        lines.append(f"classes   {len(shards.class_names)}: {often}{', ...' if len(labels) > _SHOWN else ''}")
    return "\n".join(lines + [f"note      {note}" for note in build["notes"]])
