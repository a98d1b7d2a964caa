"""The media files below a folder."""

from __future__ import annotations

import os
from collections import Counter

from avfast.data.media import MEDIA_EXTENSIONS

_AGAIN = "met before under another name"


def extension_of(path: str) -> str:
    """Of a file's name, in lower case, with its dot; empty where it has none."""
    return os.path.splitext(path)[1].lower()


def walk(root: str) -> tuple[list[str], Counter[str]]:
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
            name, extension = os.path.join(relative, entry.name), extension_of(entry.name)
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
    # by folders, part by part, and then by name
    return sorted(files, key=lambda file: (os.path.dirname(file).replace(os.sep, "\0"), file)), skipped


def _is_listed(path: str) -> bool:
    return extension_of(path) in MEDIA_EXTENSIONS and not os.path.basename(path).startswith(".")
