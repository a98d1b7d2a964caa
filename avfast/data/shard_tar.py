"""The tars of a shard set: names, members, and whether one is as it was written."""

from __future__ import annotations

import hashlib
import re
import tarfile
import zlib
from dataclasses import dataclass
from urllib.parse import quote, unquote

BLOCK = 512  # bytes; a tar consists of them
_LONGEST = 72  # characters of a key before its suffix; a tar's names have at most 100
_SHORTENED = re.compile("~[0-9a-f]{16}")
_CRC = "crc32="


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def key_of(name: str) -> str:
    """A clip's name in its shard: its id with everything percent-encoded but letters, digits, ``_`` and ``-``.

    Of a long id the beginning stays, and a checksum. The builder appends ``~2`` to a second clip of the same name.
    """
    key = quote(name, safe="", errors="surrogateescape").replace(".", "%2E").replace("~", "%7E")
    if len(key) > _LONGEST:
        key = re.sub("%.?$", "", key[: _LONGEST - 17]) + "~" + hashlib.sha256(key.encode()).hexdigest()[:16]
    return key or "~"


def id_of(key: str) -> str | None:
    """The id that a key was made of; None where it holds only its beginning."""
    if _SHORTENED.search(key):
        return None
    return unquote(key.partition("~")[0], errors="surrogateescape")


def padded(size: int) -> int:
    """Bytes of a member in the tar, with its header."""
    return BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK


def member(name: str, content: bytes) -> bytes:
    """One member: header, content and padding. The same content gives the same bytes, whoever writes it and when."""
    info = tarfile.TarInfo(name)
    info.size, info.gname = len(content), f"{_CRC}{zlib.crc32(content):08x}"
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % BLOCK)


@dataclass(frozen=True)
class Header:
    """Of a member: its name, its size in bytes and the CRC-32 of its content."""

    name: str
    size: int
    crc: int


def header(block: bytes) -> Header | None:
    """What the first 512 bytes of ``block`` say; None if they are no header of ours."""
    try:
        name, size, chksum, group = (_field(block, *place) for place in ((0, 100), (124, 136), (148, 156), (297, 329)))
        if int(chksum, 8) != sum(block[:148]) + 8 * ord(" ") + sum(block[156:BLOCK]):
            return None
        return Header(name, int(size, 8), int(group.removeprefix(_CRC), 16))
    except ValueError:
        return None


def _field(block: bytes, first: int, last: int) -> str:
    return block[first:last].partition(b"\0")[0].decode("ascii")


def check(data: bytes, name: str, size: int) -> str:
    """What is wrong with a member, header and content; empty if nothing is."""
    found = header(data)
    if found is None:
        return "damaged header, or the index is another set's"
    if found.name != name:
        return f"missing, or the index is another set's: {found.name} stands in its place"
    if found.size != size:
        return f"holds {found.size} bytes where the index says {size}"
    if zlib.crc32(memoryview(data)[BLOCK : BLOCK + size]) != found.crc:
        return "damaged content (its CRC-32 is not that of its header)"
    return ""
