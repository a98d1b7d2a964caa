"""What lies in the folder of a shard set, read without avfast."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path


def files(folder: Path) -> dict[str, bytes]:
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return {name: (folder / name).read_bytes() for name in names}


def groups(folder: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """As webdataset has them: the members of a tar up to the first dot of their names, in order."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for key, members in groupby(tar, key=lambda info: info.name.partition(".")[0]):
                found = {}
                for info in members:
                    assert info.mtime == 0 and info.uid == 0 and info.isfile()
                    file = tar.extractfile(info)
                    assert file is not None
                    found[info.name.partition(".")[2]] = file.read()
                yield key, found
