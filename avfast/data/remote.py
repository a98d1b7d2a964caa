"""Shard sets in object stores, behind a URL of any file system that fsspec knows (``s3://``, ``gs://``, ``file://``).

Index and whole shards are fetched into a cache (:mod:`avfast.data.shard_cache`) and read there. A set that is built
anew has another folder in it; of a shard that is repaired in the store, the copy in the cache must be deleted.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from avfast.data.shard_cache import Cache, file_system, make_room, placed, tried
from avfast.data.shard_layout import BUILD, INDEX, ShardError, ShardSet, parse_json
from avfast.data.shard_tar import shard_name

_AGAIN = 60.0  # seconds for which a shard that could not be fetched is not tried again


def open_url(url: str, cache: Cache) -> ShardSet:
    """The shard set behind ``url``, see :func:`avfast.data.shard_layout.open_set`."""
    url = url.rstrip("/")
    files, root = file_system(url)
    try:
        content = tried(f"{url}/{BUILD}", lambda: cast(bytes, files.cat_file(f"{root}/{BUILD}")))
    except FileNotFoundError as error:
        raise ShardError(f"{url}: no finished shard set ({BUILD}: {error.strerror}), and a URL names one") from None
    build = parse_json(content, f"{url}/{BUILD}")
    # by its content: build.json has the checksums of all shards
    folder = cache.root / hashlib.sha256(content).hexdigest()[:16]
    if not (folder / BUILD).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        about = build.get("index", {})

        def write(part: Path) -> None:
            files.get_file(f"{root}/{INDEX}", str(part))
            if hashlib.sha256(part.read_bytes()).hexdigest() != about.get("sha256"):
                raise ShardError(f"{url}/{INDEX}: damaged, or of another set (its SHA-256 is not that in {BUILD})")

        placed(folder / INDEX, lambda part: tried(f"{url}/{INDEX}", lambda: write(part)))
        placed(folder / BUILD, lambda part: part.write_bytes(content))
    return _open(url, cache, str(folder))


@lru_cache(maxsize=16)
def _open(url: str, cache: Cache, folder: str) -> RemoteSet:
    return RemoteSet(url, cache, folder)


class RemoteSet(ShardSet):
    """A shard set behind a URL. ``folder`` is that of its fetched files. Use :func:`open_url`."""

    def __init__(self, url: str, cache: Cache, folder: str) -> None:
        super().__init__(Path(folder), url)
        self.cache = cache
        self.sizes = [int(shard["bytes"]) for shard in self.build["shards"]]
        self._failed: dict[int, tuple[float, OSError]] = {}
        if self.sizes and max(self.sizes) > cache.gigabytes * 1e9:
            one = f"{max(self.sizes) / 1e9:.3g} GB"
            raise ShardError(f"{url}: a shard has {one}, too large for a cache of {cache.gigabytes:g} GB of shards")

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, (self.name, self.cache, str(self.folder))

    def files(self) -> set[str]:
        files, root = file_system(self.name)
        listed = tried(self.name, lambda: files.ls(root, detail=False))
        return {name.rstrip("/").rpartition("/")[2] for name in listed}

    def file(self, name: str) -> BinaryIO:
        files, root = file_system(self.name)
        return tried(f"{self.name}/{name}", lambda: cast(BinaryIO, files.open(f"{root}/{name}", "rb")))

    def fetch(self, shard: int) -> None:
        """Puts a shard into the cache, where it is not there yet. OSError, naming its URL, if that cannot be done."""
        path = self.folder / shard_name(shard)
        since, error = self._failed.get(shard, (-_AGAIN, None))
        if error is not None and time.monotonic() < since + _AGAIN:
            raise error
        try:
            placed(path, lambda part: self._write(shard, part))
            os.utime(path)  # used last: now
        except OSError as found:
            self._failed[shard] = time.monotonic(), found
            raise

    def _write(self, shard: int, part: Path) -> None:
        files, root = file_system(self.name)
        size = self.sizes[shard]

        def write() -> None:
            files.get_file(f"{root}/{shard_name(shard)}", str(part))
            if (found := part.stat().st_size) != size:
                raise OSError(errno.EIO, f"{found} bytes where {BUILD} says {size}")

        make_room(self.cache, size)
        tried(self.path(shard), write)

    def _open(self, shard: int) -> int:
        for number, handle in list(self._handles.items()):
            if not os.fstat(handle.fileno).st_nlink:  # removed: the disk gets its room back once nobody has it open
                self._handles.pop(number, None)
        for _ in range(3):
            self.fetch(shard)
            try:
                return super()._open(shard)
            except FileNotFoundError:
                pass  # another process made room just now
        raise OSError(errno.ENOSPC, f"removed from {self.folder} again and again: the cache is too small")
