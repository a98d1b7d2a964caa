"""Shards of object stores, fetched before a step waits for them."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from avfast.data.clip_list import Clip, PackedClips, ShardRow
from avfast.data.remote import RemoteSet

_THREADS = 4  # that fetch


def ahead(batches: Any, clips: Sequence[Clip]) -> Any:
    """The batches of a sampler; shards in object stores are fetched before they are asked for."""
    if not isinstance(clips, PackedClips) or not any(isinstance(part, RemoteSet) for part in clips.sets):
        return batches
    return _Ahead(batches, clips)


class _Ahead:
    """Draws batches until twice as many shards are met as are read together, and hands them over later.

    Args:
        batches: lists of (index, step, position), as a sampler gives them.
        clips: which the indices count.
    """

    def __init__(self, batches: Any, clips: PackedClips) -> None:
        self._batches, self._clips = batches, clips
        self._shards = 2 * getattr(batches, "together", 1)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[Any]]:
        source, drawn = iter(self._batches), deque[tuple[list[Any], set[tuple[RemoteSet, int]]]]()
        met: Counter[tuple[RemoteSet, int]] = Counter()  # shards, and in how many of the drawn batches each is
        wanted, ended = SimpleQueue[tuple[RemoteSet, int]](), threading.Event()
        for _ in range(_THREADS):
            threading.Thread(target=_fetch, args=(wanted, ended), name="avfast-ahead", daemon=True).start()
        try:
            while True:
                while len(met) < self._shards or not drawn:
                    batch = next(source, None)
                    if batch is None:
                        break
                    shards = set(self._of(item[0] for item in batch))
                    for shard in shards - set(met):
                        wanted.put(shard)
                    met.update(shards)
                    drawn.append((batch, shards))
                if not drawn:
                    return
                batch, shards = drawn.popleft()
                met.subtract(shards)
                met = +met
                yield batch
        finally:
            ended.set()

    def _of(self, indices: Iterable[int]) -> Iterator[tuple[RemoteSet, int]]:
        for index in indices:
            clip = self._clips[index]
            for row in {clip.audio_path, clip.video_path}:
                if isinstance(row, ShardRow) and isinstance(row.shards, RemoteSet):
                    yield row.shards, row.shards.shard(row.number)


def _fetch(wanted: SimpleQueue[tuple[RemoteSet, int]], ended: threading.Event) -> None:
    while not ended.is_set():
        try:
            shards, shard = wanted.get(timeout=0.5)
            shards.fetch(shard)
        except (Empty, OSError):
            pass  # who needs the shard says what is wrong
