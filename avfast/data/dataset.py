"""Clips decoded and cropped, one at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from avfast.data.augment import Crop, eval_crop, resize_short_side, train_crop
from avfast.data.clip_list import Clip, ClipList, ShardRow
from avfast.data.jpegs import Jpegs
from avfast.data.media import MediaError, MediaFile, read_image
from avfast.data.shard_source import ShardFile
from avfast.data.spec import ClipSpec, Draw
from avfast.random import DrawKey

if TYPE_CHECKING:
    from avfast.data.frontend import Frontend

# Where audio and frames come from: both offer `path`, `info`, `ends`, `audio`, `frames` and `measure`
Source = MediaFile | ShardFile
Item = tuple[int, int, int]  # index of the clip, step, position in the global batch
_STILLS = 10  # frame_0 .. frame_9 of CAV-MAE's folders
_STILLS_SECONDS = 10.0
_CACHED_FRAMES = 16
_AT_ONCE = 1 << 28  # bytes of frames decoded before they are made smaller
_CACHED_SIZE = 1.25  # short side of a cached frame, in image sizes
_SHORT = 0.95  # a clip shorter than this share of the model's window counts as short


@dataclass(frozen=True)
class Failure:
    """A clip that could not be decoded: the file at fault, why, and whose place it leaves empty."""

    path: str
    reason: str
    index: int = -1
    step: int = 0
    position: int = -1


@dataclass(frozen=True)
class Sample:
    """One decoded clip.

    Attributes:
        index, step, position: as asked for.
        waveform: (samples,) float32, or None without audio.
        frames: (F, 3, size, size) uint8, not decoded yet where asked for, or None without video.
        labels: class indices.
        short: it has less than 95 % of the window that the model looks at; the rest will be padded.
        truncated: those of its files that end before their headers say.
        start: of the window, in seconds of the clip, where a clip gives several.
    """

    index: int
    step: int
    position: int
    waveform: Tensor | None
    frames: Tensor | Jpegs | None
    labels: tuple[int, ...]
    short: bool
    truncated: tuple[str, ...] = ()
    start: float = 0.0


@dataclass(frozen=True)
class Whole:
    """All of a clip.

    Attributes:
        waveform: (samples,) float32, or None without audio.
        frames: (N, 3, H, W) uint8, or None without video.
        times: of the frames, in seconds: the middles of N equal parts.
        duration: in seconds, of what both have.
        truncated: those of its files that end before their headers say.
    """

    waveform: Tensor | None
    frames: Tensor | None
    times: Sequence[float]
    duration: float
    truncated: tuple[str, ...]


_Cut = tuple[Tensor | None, Tensor | Jpegs | None, bool, tuple[str, ...]]  # audio, frames, short, truncated


class ClipDataset(Dataset[Sample | Failure]):
    """Decodes and crops clips.

    Training takes a random window of ``spec.seconds`` where the clip is longer, the frames of it that ``spec.frames``
    says, a random resized crop and a coin for the flip, the same for all frames. Evaluation takes the first window,
    frames resized and centre-cropped. The window lies where there are both audio and video: if decoding finds less
    than the headers promise, it is taken anew from what is there.

    Args:
        clip_list: the clips.
        frontend: of the model, or its ``spec`` alone: what the model wants of a clip.
        train: see above.
        seed: of the random choices of training.
        cache: keep what is decoded in memory: all audio, and 16 frames per clip or as many as ``spec.frames`` asks for,
            evenly spaced, with a short side of 1.25 image sizes at most. For data sets that fit.
        crop_scale: area share of the random crop.
        jpegs: leave the frames of shard sets as they are: :meth:`avfast.data.clips.Batch.to` decodes those of a batch,
            on the device that it goes to. Not with a cache.
    """

    def __init__(
        self,
        clip_list: ClipList,
        *,
        frontend: Frontend | ClipSpec,
        train: bool,
        seed: int = 0,
        cache: bool = False,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        jpegs: bool = False,
    ) -> None:
        if jpegs and cache:
            raise ValueError("jpegs: a cache keeps decoded frames; give one of the two")
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"crop_scale: expected 0 < low <= high <= 1, got {crop_scale}")
        self.clips = clip_list.clips
        self.class_names = clip_list.class_names
        self.spec = frontend if isinstance(frontend, ClipSpec) else frontend.spec
        self.train = train
        self.seed = seed
        self.cache = cache
        self.crop_scale = crop_scale
        self.jpegs = jpegs
        self._cached: dict[int, Whole | MediaError] = {}

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, item: Item) -> Sample | Failure:
        """Decodes clip ``index`` for ``position`` of ``step``; what cannot be decoded comes back as a Failure."""
        index, step, position = item
        clip = self._clip(index)
        rng = DrawKey(self.seed, step, (position,), position + 1).generator("clip", position) if self.train else None
        try:
            cut = self._cut(self._remember(index), rng) if self.cache else self._decode(clip, rng)
            waveform, frames, short, truncated = cut
            if waveform is None and frames is None:
                lacks = "holds no audio" if self.spec.frames is None else "holds neither audio nor video"
                raise MediaError(self.clips[index].path, lacks)
        except MediaError as error:
            return Failure(error.path, error.reason, index, step, position)
        if isinstance(frames, Jpegs):
            if rng is not None:
                frames = replace(frames, crop=Crop.draw(frames.height, frames.width, rng, self.crop_scale))
        elif frames is not None:
            size = self.spec.image_size
            frames = eval_crop(frames, size) if rng is None else train_crop(frames, size, rng, scale=self.crop_scale)
        return Sample(index, step, position, waveform, frames, clip.labels, short, truncated)

    def warm(
        self, progress: Callable[[Iterable[int]], Iterable[int]] = lambda items: items, threads: int = 2
    ) -> list[Failure]:
        """Fills the cache with every clip, decoding in threads (FFmpeg runs without Python's lock).

        Args:
            progress: wraps the finished clips, e.g. ``partial(tqdm, total=len(dataset))``.
            threads: at work.

        Returns:
            The clips that cannot be decoded.
        """
        if not self.cache:
            raise ValueError("warm() needs a ClipDataset(cache=True)")
        with ThreadPoolExecutor(threads) as pool:
            for _ in progress(pool.map(self._fill, range(len(self)))):
                pass
        errors = [(i, found) for i, found in sorted(self._cached.items()) if isinstance(found, MediaError)]
        return [Failure(error.path, error.reason, i) for i, error in errors]

    def _clip(self, index: int) -> Clip:
        """The clip, without its video where nobody looks at it."""
        clip = self.clips[index]
        return clip if self.spec.frames is not None else replace(clip, video_path=None, frames_dir=None)

    def _decode(self, clip: Clip, rng: np.random.Generator | None) -> _Cut:
        draw = self.spec.draw(rng)
        return self._decode_windows(clip, lambda duration: [draw])[0]

    def _decode_windows(self, clip: Clip, draws: Callable[[float], Sequence[Draw]]) -> list[_Cut]:
        """The windows that ``draws`` takes of a clip of so many seconds, at least one, from its files opened once."""
        with ExitStack() as stack:
            audio, video = _open(clip, stack)
            duration = _duration(audio, video)
            cuts = [self._read(clip, audio, video, duration, draw) for draw in draws(duration)]
            there, truncated = _settle(audio, video, duration, cuts[-1][3], self._slack)
            if there < duration:
                cuts = [self._read(clip, audio, video, there, draw) for draw in draws(there)]
            return [(_non_empty(waveform), frames, short, truncated) for waveform, frames, short, _ in cuts]

    def _read(
        self,
        clip: Clip,
        audio: Source | None,
        video: Source | None,
        duration: float,
        draw: Draw,
    ) -> tuple[Tensor | None, Tensor | Jpegs | None, bool, dict[str, float]]:
        """Audio and frames of one window, whether it is short, and up to where both had to be there."""
        start, times = self.spec.window(duration, draw)
        waveform = None
        if audio is not None:
            waveform = audio.audio(sample_rate=self.spec.sample_rate, start=start, seconds=self.spec.seconds)
        end = {"audio": min(start + self.spec.seconds, duration), "video": max(times, default=0.0)}
        if self.jpegs and isinstance(video, ShardFile):
            return waveform, video.jpegs(times), self._short(duration), end
        return waveform, _frames(clip, video, times, duration), self._short(duration), end

    def _short(self, duration: float) -> bool:
        return duration < _SHORT * self.spec.seconds

    @property
    def _slack(self) -> float:
        return (1 - _SHORT) * self.spec.seconds

    def _remember(self, index: int) -> Whole:
        if index not in self._cached:
            self._fill(index)
        found = self._cached[index]
        if isinstance(found, MediaError):
            raise found
        return found

    def _fill(self, index: int) -> int:
        try:
            self._cached[index] = self._decode_all(self._clip(index))
        except MediaError as error:
            self._cached[index] = error
        return index

    def _decode_all(self, clip: Clip) -> Whole:
        size = int(_CACHED_SIZE * self.spec.image_size)

        def count(duration: float, rate: float) -> int:
            count = self.spec.enough(duration, _CACHED_FRAMES)
            return count if rate <= 0 else min(count, max(1, round(duration * rate)))

        return decode_whole(clip, sample_rate=self.spec.sample_rate, short_side=size, count=count, slack=self._slack)

    def _cut(self, clip: Whole, rng: np.random.Generator | None) -> _Cut:
        start, times = self.spec.window(clip.duration, self.spec.draw(rng))
        waveform, frames = clip.waveform, clip.frames
        if waveform is not None:
            first, count = round(start * self.spec.sample_rate), round(self.spec.seconds * self.spec.sample_rate)
            waveform = _non_empty(waveform[first : first + count])
        if frames is not None:
            frames = frames[[int(np.argmin(np.abs(np.asarray(clip.times) - time))) for time in times]]
        return waveform, frames, self._short(clip.duration), clip.truncated


def decode_whole(
    clip: Clip, *, sample_rate: int, short_side: int, count: Callable[[float, float], int], slack: float
) -> Whole:
    """All audio of a clip, and frames spread over it.

    Args:
        clip: which.
        sample_rate: of the audio, in Hz.
        short_side: of the frames in pixels, at most.
        count: (duration, frames per second or 0) -> how many frames; extracted stills are ten, whatever it says.
        slack: seconds by which a file may end before its header says.

    Raises:
        MediaError: its files cannot be read.
    """

    def spread(video: Source | None, duration: float) -> tuple[list[float], Tensor | None]:
        rate = video.info.frame_rate if video is not None else 0.0
        number = _STILLS if clip.frames_dir is not None else count(duration, rate)
        times = [duration * (i + 0.5) / number for i in range(number)]
        size = (video.info.width * video.info.height * 3) if video is not None else 0
        step = max(1, _AT_ONCE // size) if size else number
        parts = [_frames(clip, video, times[i : i + step], duration) for i in range(0, number, step)]
        return times, _join([_shrunk(part, short_side) for part in parts if part is not None])

    with ExitStack() as stack:
        audio, video = _open(clip, stack)
        duration = _duration(audio, video)
        waveform = audio.audio(sample_rate=sample_rate) if audio is not None else None
        times, frames = spread(video, duration)
        there, truncated = _settle(audio, video, duration, {"audio": duration, "video": times[-1]}, slack)
        if there < duration:
            duration = there
            times, frames = spread(video, duration)
    return Whole(_non_empty(waveform), frames, times, duration, truncated)


def _shrunk(frames: Tensor, short_side: int) -> Tensor:
    frames = resize_short_side(frames, short_side) if min(frames.shape[-2:]) > short_side else frames
    return frames.contiguous()


def _join(parts: list[Tensor]) -> Tensor | None:
    """One tensor of them, all frames as large as the first: a stream may change its size."""
    from torchvision.transforms.v2 import functional

    if len(parts) < 2:
        return parts[0] if parts else None
    size = list(parts[0].shape[-2:])
    return torch.cat([part if list(part.shape[-2:]) == size else functional.resize(part, size) for part in parts])


def _settle(
    audio: Source | None, video: Source | None, duration: float, end: dict[str, float], slack: float
) -> tuple[float, tuple[str, ...]]:
    """How long a clip is whose streams were read up to ``end``, and its truncated files."""

    def ended(media: Source | None, kind: str) -> bool:
        return media is not None and media.ends.get(kind, np.inf) < end[kind] - slack

    if not (ended(audio, "audio") or ended(video, "video")):
        return duration, ()
    files = {media.path: media for media in (audio, video) if media is not None}
    there = {path: media.measure() for path, media in files.items()}
    truncated = tuple(p for p, media in files.items() if max(there[p].values()) < media.info.duration - slack)
    # The last frame stays until the file ends; an audio stream without any is none
    limits = [max(there[video.path].values())] if video is not None and video.info.has_video else []
    if audio is not None and audio.info.has_audio:
        limits.append(min(there[audio.path]["audio"], audio.ends.get("audio", np.inf)))
    shortest = min((limit for limit in limits if limit > 0), default=duration)
    return (shortest if shortest < duration - slack else duration), truncated


@dataclass(frozen=True)
class Modalities:
    """How many clips have what, as their files' headers say.

    Attributes:
        clips: in the list.
        looked_at: those whose files were opened; evenly spaced where it is not all of them.
        audio, video, both: of those.
        unreadable: of those.
    """

    clips: int
    looked_at: int
    audio: int
    video: int
    both: int
    unreadable: int

    def __str__(self) -> str:
        of = "clips" if self.looked_at == self.clips else f"of {self.clips} clips looked at"
        text = f"{self.looked_at} {of}: {self.audio} with audio, {self.video} with video, {self.both} with both"
        text += f", {self.unreadable} unreadable" if self.unreadable else ""
        if bool(self.audio) != bool(self.video):
            text += f"; {'audio' if self.audio else 'video'} alone: there is no pair to learn from"
        return text


def modalities(clips: Sequence[Clip], limit: int = 500, threads: int = 4) -> Modalities:
    """Opens the files of at most ``limit`` clips, evenly spaced."""

    def look(index: int) -> tuple[bool, bool] | None:
        clip = clips[index]
        try:
            with ExitStack() as stack:
                audio, video = _open(clip, stack)
                seen = clip.frames_dir is not None or (video is not None and video.info.has_video)
                return audio is not None and audio.info.has_audio, seen
        except MediaError:
            return None

    count = min(len(clips), limit)
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(look, [i * len(clips) // count for i in range(count)]))
    good = [pair for pair in found if pair is not None]
    audio, video = (sum(pair[i] for pair in good) for i in (0, 1))
    return Modalities(len(clips), count, audio, video, sum(map(all, good)), count - len(good))


def _open(clip: Clip, stack: ExitStack) -> tuple[Source | None, Source | None]:
    """(audio, video), one source where both are in one."""
    audio = _source(clip.audio_path, stack) if clip.audio_path else None
    if clip.video_path is None:
        return audio, None
    return audio, audio if clip.video_path == clip.audio_path else _source(clip.video_path, stack)


def _source(path: str | ShardRow, stack: ExitStack) -> Source:
    return ShardFile(path) if isinstance(path, ShardRow) else stack.enter_context(MediaFile(path))


def _duration(audio: Source | None, video: Source | None) -> float:
    """Of what both have; extracted stills alone stand for ten seconds."""
    return min((media.info.duration for media in (audio, video) if media is not None), default=_STILLS_SECONDS)


def _frames(clip: Clip, media: Source | None, times: Sequence[float], duration: float) -> Tensor | None:
    """(F, 3, H, W) uint8."""
    frames = media.frames(times) if media is not None else None
    if clip.frames_dir is not None:
        share = [time / duration if duration > 0 else 0.5 for time in times]
        frames = torch.stack([_still(clip.frames_dir, clip.id, min(int(_STILLS * at), _STILLS - 1)) for at in share])
    return None if frames is None else frames.permute(0, 3, 1, 2)


def _still(folder: str, name: str, number: int) -> Tensor:
    """Frame ``number`` or, as in the released loaders, the nearest one before it that is there."""
    for i in range(number, -1, -1):
        path = os.path.join(folder, f"frame_{i}", f"{name}.jpg")
        if os.path.exists(path):
            return read_image(path)
    raise MediaError(os.path.join(folder, f"frame_{number}", f"{name}.jpg"), "no such image, nor one of a lower number")


def _non_empty(waveform: Tensor | None) -> Tensor | None:
    return None if waveform is None or len(waveform) == 0 else waveform
