"""Files of object stores in a folder of this machine, the cache, where all its processes read them.

A file appears there whole or not at all. How a store is reached (keys, end points) is fsspec's own matter: its
environment variables and configuration files.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from avfast.data.shard_layout import ShardError

_PAUSES = (1.0, 2.0, 4.0)  # seconds between tries
_STRAY = 3600.0  # seconds after which a temporary file that nobody writes to is that of a killed process
_FINAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOENT, errno.EACCES}  # no better a second later
T = TypeVar("T")


@dataclass(frozen=True)
class Cache:
    """Where shards of object stores are kept.

    Attributes:
        folder: default ``$AVFAST_CACHE/shards``, AVFAST_CACHE being ``~/.cache/avfast`` if unset.
        gigabytes: of shards in it, about: before one is fetched, those used longest ago are removed.
    """

    folder: str | None = None
    gigabytes: float = 100.0

    @property
    def root(self) -> Path:
        given = self.folder or Path(os.environ.get("AVFAST_CACHE") or "~/.cache/avfast") / "shards"
        return Path(os.path.abspath(Path(given).expanduser()))


def file_system(url: str) -> tuple[Any, str]:
    """(fsspec's file system, path in it); the same one every time."""
    import fsspec
    from fsspec.registry import known_implementations

    try:
        files, root = fsspec.url_to_fs(url)
    except ImportError as error:
        known = known_implementations.get(url.partition("://")[0], {}).get("class", "fsspec").partition(".")[0]
        package = "aiohttp requests" if known == "fsspec" else known
        raise ImportError(f"{url}: {str(error).rstrip('.')}: pip install {package}") from None
    except ValueError as error:
        raise ShardError(f"{url}: {error}") from None
    return files, root.rstrip("/")


def tried(url: str, do: Callable[[], T]) -> T:
    """What ``do`` returns, tried a few times; an OSError that names the URL otherwise."""
    for pause in (*_PAUSES, None):
        try:
            return do()
        except ShardError:
            raise
        except Exception as error:  # each file system has its own
            code = getattr(error, "errno", None)
            if isinstance(error, FileNotFoundError):
                code = errno.ENOENT
            elif isinstance(error, PermissionError):
                code = errno.EACCES
            if code in _FINAL:
                raise OSError(code, os.strerror(code), url) from None
            if pause is None:
                what = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
                raise OSError(errno.EIO, f"could not be fetched in {len(_PAUSES) + 1} tries ({what})", url) from None
            time.sleep(pause)
    raise AssertionError


def placed(path: Path, write: Callable[[Path], object]) -> None:
    """A file that appears whole or not at all, written by one process at a time; nothing is done where it is there.

    Where the file system has no locks several write it, and the last one's stays.
    """
    if path.exists():
        return
    with _locked(path.with_suffix(".lock")):
        if path.exists():
            return
        part = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
        try:
            write(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield


def make_room(cache: Cache, size: int) -> None:
    """Removes the shards used longest ago until ``size`` more bytes fit, and what killed processes left."""
    found = []
    for path in cache.root.glob("*/shard-*.tar*"):
        try:
            stat = path.stat()
        except OSError:
            continue
        if path.suffix == ".tmp" and stat.st_mtime < time.time() - _STRAY:
            path.unlink(missing_ok=True)
        else:
            found.append((path.suffix == ".tmp", stat.st_mtime, stat.st_size, path))
    used = sum(bytes for _, _, bytes, _ in found)
    for partial, _, bytes, path in sorted(found):
        if partial or used + size <= cache.gigabytes * 1e9:
            break
        path.unlink(missing_ok=True)
        used -= bytes
