"""Clips of shard sets, read as media files are.

A set is opened once in a process, by :func:`avfast.data.shard_layout.open_set`; to another process goes its folder.
Files are read at given places, so that forked processes may share them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from avfast.data.clip_list import ClipList, PackedClips, ShardRow
from avfast.data.jpegs import Jpegs
from avfast.data.media import MediaError, MediaInfo
from avfast.data.samples import resample
from avfast.data.shard_layout import ShardError, open_set

if TYPE_CHECKING:
    from avfast.data.shard_cache import Cache


def read_set(folder: str, cache: Cache | None = None) -> ClipList:
    """All clips of the shard set in ``folder``, with its classes. Arguments and errors as of :func:`open_set`."""
    shards = open_set(folder, cache)
    return ClipList(PackedClips.of_set(shards), shards.class_names)


class ShardFile:
    """A clip of a shard set, with what :class:`avfast.data.media.MediaFile` offers.

    Args:
        row: which.

    Attributes:
        path: of the shard, and the clip in it.
        info: what was stored. There are as many frames per second as are stored, so that nobody asks for more.
        ends: seconds of its audio.
        frame_times: of the stored frames, in seconds.

    Raises:
        MediaError: what the set says of the clip cannot be read.
    """

    def __init__(self, row: ShardRow) -> None:
        self._set, self._number = row.shards, row.number
        self._clip = clip = self._set.clip(row.number)
        self.path = str(row)
        self.frame_times = clip.frame_times
        self._rate = self._set.settings.sample_rate
        self.info = MediaInfo(
            duration=clip.duration,
            has_audio=clip.has_audio,
            has_video=clip.frames > 0,
            sample_rate=self._rate if clip.has_audio else 0,
            channels=int(clip.has_audio),
            frame_rate=clip.frames / clip.duration if clip.duration > 0 else 0.0,
        )
        self.ends = {"audio": clip.samples / self._rate} if clip.has_audio else {}

    def audio(self, *, sample_rate: int = 16000, start: float = 0.0, seconds: float | None = None) -> Tensor | None:
        """As :meth:`avfast.data.media.MediaFile.audio`. What is stored at another rate is resampled."""
        if not self.info.has_audio:
            return None
        samples = np.frombuffer(self._read("s16"), dtype="<i2")
        if sample_rate != self._rate:
            samples = resample(samples.astype(np.float32), self._rate, sample_rate)
        first = round(start * sample_rate)
        end = len(samples) if seconds is None else first + round(seconds * sample_rate)
        return torch.from_numpy(np.multiply(samples[first:end], 2.0**-15, dtype=np.float32))  # in one pass

    def frames(self, times: Sequence[float]) -> Tensor | None:
        """The stored frame nearest to each of ``times``: (len(times), height, width, 3) uint8 RGB, None without any."""
        if not self.info.has_video:
            return None
        numbers = self._nearest(times)
        images = {number: self._image(number) for number in set(numbers)}
        if len(numbers) == 1:
            return images[numbers[0]][None]  # a view
        return torch.stack([images[number] for number in numbers])

    def jpegs(self, times: Sequence[float]) -> Jpegs | None:
        """The same, not decoded."""
        from PIL import Image

        if not self.info.has_video:
            return None
        numbers = self._nearest(times)
        files = {number: bytes(self._read(f"{number}.jpg")) for number in dict.fromkeys(numbers)}
        places = {number: place for place, number in enumerate(files)}
        try:
            with Image.open(io.BytesIO(files[numbers[0]]), formats=["JPEG"]) as image:
                width, height = image.size
        except (OSError, ValueError) as error:
            raise MediaError(self.path, f"{self._clip.key}.{numbers[0]}.jpg: {error}") from None
        return Jpegs(tuple(files.values()), tuple(places[number] for number in numbers), height, width)

    def _nearest(self, times: Sequence[float]) -> list[int]:
        stored = np.asarray(self.frame_times)
        return [int(np.abs(stored - time).argmin()) for time in times]

    def measure(self) -> dict[str, float]:
        """As :meth:`avfast.data.media.MediaFile.measure`."""
        return self.ends | ({"video": self.info.duration} if self.info.has_video else {})

    def _image(self, number: int) -> Tensor:
        """(height, width, 3) uint8 of frame ``number``."""
        from torchvision.io import ImageReadMode, decode_jpeg

        member = f"{number}.jpg"
        data = torch.frombuffer(bytearray(self._read(member)), dtype=torch.uint8)
        try:
            return decode_jpeg(data, mode=ImageReadMode.RGB).permute(1, 2, 0)
        except RuntimeError as error:
            raise MediaError(self.path, f"{self._clip.key}.{member}: {' '.join(str(error).split())}") from None

    def _read(self, member: str) -> memoryview:
        try:
            return self._set.view(self._number, member)
        except ShardError as error:
            shard = self._set.path(self._set.shard(self._number))
            raise MediaError(self.path, str(error).removeprefix(f"{shard}: ")) from None
