"""Audio and frames out of media files, through PyAV (which carries its own FFmpeg).

Time zero of a file is its container's start time, or 0 where that is negative (codec priming), so audio and frames of
one file share one clock whatever offsets its streams have. Priming samples of AAC, Opus and MP3 are dropped as the
container signals them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from avfast.data import container
from avfast.data.samples import mono, resample

if TYPE_CHECKING:
    from av import AudioFrame, VideoFrame
    from av.audio.stream import AudioStream
    from av.video.stream import VideoStream

VIDEO_EXTENSIONS = frozenset(
    {".mp4", ".m4v", ".mkv", ".webm", ".avi", ".mov", ".mpg", ".mpeg", ".ts", ".flv", ".3gp", ".wmv"}
)
AUDIO_EXTENSIONS = frozenset({".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus", ".aac"})
MEDIA_EXTENSIONS = VIDEO_EXTENSIONS | AUDIO_EXTENSIONS

_SEEK_FROM = 1.0  # seconds: nearer to the start, decoding from the beginning is cheaper than it is risky to seek
_PREROLL = 0.25  # seconds decoded ahead of a window, for codecs whose frames lean on earlier ones
_GAP = 0.05  # seconds by which timestamps may stray from the sample count before silence is put in
_LONGEST_HOLE = 3600.0  # seconds of silence put in, before the timestamps must be wrong
_NOTHING = np.zeros(0, dtype=np.float32)
_WIDEST = 8.0  # a pixel more oblong than this is a damaged header
_ROUNDING = 1e-3  # seconds: Matroska stores times in milliseconds


class MediaError(Exception):
    """A file cannot be decoded. The message names the file and the reason.

    Attributes:
        path, reason: the two parts of the message.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds, as its header says.

    Attributes:
        duration: in seconds, 0.0 if nothing tells.
        has_audio, has_video: whether there is such a stream; a cover picture is no video.
        sample_rate, channels: of the audio, 0 without one.
        width, height: of the coded frames, before rotation; 0 without one.
        frame_rate: average, 0.0 if unknown.
    """

    duration: float
    has_audio: bool
    has_video: bool
    sample_rate: int = 0
    channels: int = 0
    width: int = 0
    height: int = 0
    frame_rate: float = 0.0


class MediaFile:
    """An open media file. Use it as a context manager, from one thread.

    Args:
        path: of the file. Of several streams of a kind the one that players choose counts: marked as default, else the
            first that is no commentary, cover or the like.

    Attributes:
        info: what the header says.
        ends: {"audio" or "video": seconds} where a stream was found to end. A stream that was never read to its end is
            not in it.

    Raises:
        MediaError: the file is missing, empty, no media file, or holds neither audio nor video.
    """

    info: MediaInfo

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._container: Any = None
        self._fresh = False
        self.ends: dict[str, float] = {}
        self._open()
        try:
            self.info = self._probe()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> MediaFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None

    def audio(self, *, sample_rate: int = 16000, start: float = 0.0, seconds: float | None = None) -> Tensor | None:
        """The audio between ``start`` and ``start + seconds`` (default: to the end).

        Channels are averaged (5.1 included), then resampled by FFmpeg. A stream that begins late or has holes is filled
        with silence, so sample ``i`` always stands at ``start + i / sample_rate`` seconds.

        Returns:
            (samples,) float32 in [-1, 1] full scale, shorter than asked where the audio ends earlier; None without a
            stream.

        Raises:
            MediaError: there is a stream but nothing of it decodes.
        """
        if self._audio is None:
            return None
        pieces = self._audio_pieces(sample_rate, start, seconds, seek=start > _SEEK_FROM)
        if pieces is None:
            pieces = self._audio_pieces(sample_rate, start, seconds, seek=False) or []
        first = round(start * sample_rate)
        end = max((at + len(piece) for at, piece in pieces), default=0) - first
        if seconds is not None:
            end = min(end, round(seconds * sample_rate))
        if end - sum(len(piece) for _, piece in pieces) > _LONGEST_HOLE * sample_rate:
            raise MediaError(self.path, "its audio has a hole of more than an hour (damaged timestamps)")
        out = np.zeros(max(end, 0), dtype=np.float32)
        for at, piece in pieces:
            lo, hi = max(at - first, 0), min(at - first + len(piece), len(out))
            if lo < hi:
                out[lo:hi] = piece[lo - at + first : hi - at + first]
        if not np.isfinite(out).all():
            raise MediaError(self.path, "its audio holds values that are not finite")
        return torch.from_numpy(out)

    def frames(self, times: Sequence[float]) -> Tensor | None:
        """The frame shown at each of ``times``: the last frame at or before it, or the first frame if none is.

        Returns:
            (len(times), height, width, 3) uint8 RGB with square pixels, turned and mirrored as the file asks; None
            without a video stream. All have the size of the first, whatever changes in the middle of the stream.

        Raises:
            MediaError: there is a stream but nothing of it decodes.
        """
        if self._video is None:
            return None
        order = sorted(range(len(times)), key=lambda i: times[i])
        targets = [times[i] for i in order]
        seek = bool(targets) and targets[0] > _SEEK_FROM and not self._reordered
        out, last = torch.empty(0, 0, 0, 3).byte(), None
        for attempt in [True, False] if seek else [False]:
            # each is made RGB before the next is decoded: a minute of frames is gigabytes
            for i, frame in zip(order, self._shown(targets, seek=attempt), strict=False):
                if last is None:
                    image = self._image(frame, None)
                    out = torch.empty(len(times), *image.shape, dtype=torch.uint8)
                elif frame is not last:
                    image = self._image(frame, (out.shape[1], out.shape[2]))
                out[i], last = image, frame
            if last is not None:
                break
        return out

    def measure(self) -> dict[str, float]:
        """Seconds at which the last packet of each stream ends, by ``"audio"`` and ``"video"``. Nothing is decoded."""
        import av

        self._rewind()
        streams = {stream: kind for kind in ("audio", "video") if (stream := self._stream(kind)) is not None}
        ends = dict.fromkeys(streams.values(), 0.0)
        try:
            for packet in self._container.demux(list(streams)):
                if packet.pts is not None and packet.time_base is not None:
                    end = float((packet.pts + (packet.duration or 0)) * packet.time_base) - self._origin
                    ends[streams[packet.stream]] = max(ends[streams[packet.stream]], end)
        except av.FFmpegError:
            pass  # a cut-off file: as far as it goes
        return ends

    def _image(self, frame: VideoFrame, shape: tuple[int, int] | None) -> Tensor:
        """RGB of (height, width) ``shape``, or of the frame's own."""
        import av

        matrix = container.display_matrix(frame)
        lying = container.swaps_axes(matrix)
        height, width = frame.height, frame.width
        if shape is not None:
            height, width = reversed(shape) if lying else shape
        elif (ratio := float(self._stream("video").sample_aspect_ratio or 1)) != 1 and 1 / _WIDEST <= ratio <= _WIDEST:
            height, width = max(height, round(height / ratio)), max(width, round(width * ratio))
        try:
            image = container.turned(frame.to_ndarray(format="rgb24", width=width, height=height), matrix)
        except (av.FFmpegError, ValueError) as error:
            raise MediaError(self.path, f"its frames do not convert to RGB ({_reason(error)})") from None
        return torch.from_numpy(np.ascontiguousarray(image))

    # -- opening ----------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        import av

        self.close()
        try:
            _check_regular(self.path)
            # An absolute path: FFmpeg would take "take:2.mp4" for a protocol named "take".
            self._container = container.open_media(os.path.abspath(self.path))
        except (av.FFmpegError, OSError, ValueError) as error:
            raise MediaError(self.path, _reason(error)) from None
        self._fresh = True
        self._video: VideoStream | None = container.chosen(self._container.streams.video)
        self._audio: AudioStream | None = container.chosen(self._container.streams.audio)
        for stream in (self._video, self._audio):
            if stream is not None and stream.codec_context is not None:
                stream.codec_context.thread_count = 1  # loader workers are the parallelism
        self._origin = max(self._container.start_time or 0, 0) / 1e6
        # AVI has no presentation times, and FFmpeg's guesses are late and out of order where there are B-frames
        self._reordered = "avi" in self._container.format.name and bool(
            self._video and self._video.codec_context and self._video.codec_context.has_b_frames
        )

    def _rewind(self) -> None:
        """Back to the beginning. Reopens, since seeking to 0 loses the first packets of some containers."""
        if not self._fresh:
            self._open()
        self._fresh = False

    def _probe(self) -> MediaInfo:
        video, audio = self._video, self._audio
        if video is None and audio is None:
            raise MediaError(self.path, "holds neither audio nor video")
        for kind, stream in (("video", video), ("audio", audio)):
            if stream is not None and stream.codec_context is None:
                raise MediaError(self.path, f"its {kind} codec is unknown")
        duration = (self._container.duration or 0) / 1e6
        return MediaInfo(
            duration=duration if duration > 0 else max(self.measure().values()),  # streamed: no header tells
            has_audio=audio is not None,
            has_video=video is not None,
            sample_rate=audio.codec_context.sample_rate if audio else 0,
            channels=audio.codec_context.channels if audio else 0,
            width=video.codec_context.width if video else 0,
            height=video.codec_context.height if video else 0,
            frame_rate=float(video.average_rate or 0) if video else 0.0,
        )

    # -- decoding ---------------------------------------------------------------------------------------------------

    def _stream(self, kind: str) -> Any:
        return self._video if kind == "video" else self._audio

    def _seek(self, kind: str, time: float) -> None:
        """To a point from which what is at ``time`` decodes."""
        import av

        self._fresh = False
        stream = self._stream(kind)
        try:
            self._container.seek(int((time + self._origin) / stream.time_base), stream=stream, backward=True)
        except (av.FFmpegError, OSError, OverflowError):
            self._open()  # it cannot seek: from the beginning
            self._fresh = False

    def _decode(self, kind: str, problems: list[str]) -> Iterator[tuple[float, Any]]:
        """(time, frame) of the stream; what does not decode is skipped and noted in ``problems``."""
        import av

        stream = self._stream(kind)
        packets = self._container.demux(stream)
        expected, first = 0.0, None
        while True:
            packet = None
            try:
                packet = next(packets, None)
                frames = [] if packet is None else packet.decode()
            except (av.FFmpegError, OSError, ValueError) as error:
                problems.append(_reason(error))
                if packet is not None:
                    continue
                try:
                    frames = stream.codec_context.decode(None)  # reading stopped: what the decoder still holds
                except (av.FFmpegError, OSError, ValueError):
                    frames = []
            for frame in frames:
                if self._reordered and kind == "video" and frame.dts is not None:
                    first = frame.dts if first is None else first
                    time = float((frame.dts - first) * stream.time_base)
                else:
                    time = expected if frame.time is None else frame.time - self._origin
                expected = time + _length(frame, stream)
                yield time, frame
            if packet is None:
                if expected:
                    self.ends[kind] = expected
                return

    def _audio_pieces(
        self, sample_rate: int, start: float, seconds: float | None, *, seek: bool
    ) -> list[tuple[int, np.ndarray]] | None:
        """(position in output samples, mono samples) of each unbroken stretch; None if seeking overshot."""
        import av

        if seek:
            self._seek("audio", start - _PREROLL)
        else:
            self._rewind()
        stop = float("inf") if seconds is None else start + seconds + _GAP
        problems: list[str] = []
        stretches: list[tuple[float, int, list[np.ndarray]]] = []  # time, rate, chunks
        count = decoded = 0
        for time, frame in self._decode("audio", problems):
            if seek and not decoded and time > start:
                return None
            decoded += 1
            if time >= stop:
                stretches.append((time, frame.sample_rate, []))  # what lies between is silence
                break
            if time + frame.samples / frame.sample_rate < start - _GAP:
                continue
            rate = frame.sample_rate
            if not stretches or stretches[-1][1] != rate or abs(time - stretches[-1][0] - count / rate) > _GAP:
                stretches.append((time, rate, []))
                count = 0
            stretches[-1][2].append(mono(frame))
            count += frame.samples
        if not decoded:
            if seek:
                return None
            stream = self._stream("audio")
            if problems or stream.frames or (stream.duration or 0) > 0:
                raise MediaError(self.path, f"its audio does not decode ({problems[0] if problems else 'no data'})")
        try:
            return [
                (round(time * sample_rate), resample(np.concatenate([_NOTHING, *chunks]), rate, sample_rate))
                for time, rate, chunks in stretches
            ]
        except (av.FFmpegError, ValueError) as error:
            rate = stretches[-1][1]
            raise MediaError(self.path, f"its audio of {rate} Hz does not resample ({_reason(error)})") from None

    def _shown(self, targets: Sequence[float], *, seek: bool) -> Iterator[VideoFrame]:
        """The frame for each of the ascending targets; none at all if seeking overshot the first."""
        if seek:
            self._seek("video", targets[0])
        else:
            self._rewind()
        problems: list[str] = []
        done, previous = 0, None
        for time, frame in self._decode("video", problems):
            if previous is None and seek and time > targets[0] + _ROUNDING:
                return
            while done < len(targets) and targets[done] + _ROUNDING < time:
                done += 1
                yield frame if previous is None else previous
            previous = frame
            if done == len(targets):
                return
        if previous is not None:
            yield from [previous] * (len(targets) - done)
        elif not seek:
            raise MediaError(self.path, f"its frames do not decode ({problems[0] if problems else 'no data'})")


def read_audio(
    path: str | os.PathLike[str], *, sample_rate: int = 16000, start: float = 0.0, seconds: float | None = None
) -> Tensor | None:
    """:meth:`MediaFile.audio` of the file at ``path``."""
    with MediaFile(path) as media:
        return media.audio(sample_rate=sample_rate, start=start, seconds=seconds)


def read_frames(path: str | os.PathLike[str], times: Sequence[float]) -> Tensor | None:
    """:meth:`MediaFile.frames` of the file at ``path``."""
    with MediaFile(path) as media:
        return media.frames(times)


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """(height, width, 3) uint8 RGB of a still image. MediaError if it cannot be read."""
    from PIL import Image, ImageOps

    try:
        _check_regular(path)
        with Image.open(path) as image:
            return torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB")))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(os.fspath(path), _reason(error)) from None


def probe(path: str | os.PathLike[str]) -> MediaInfo:
    """What the file at ``path`` holds. MediaError if it is no readable media file."""
    with MediaFile(path) as media:
        return media.info


def _check_regular(path: str | os.PathLike[str]) -> None:
    """Named pipes and sockets are refused: reading one may wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise MediaError(os.fspath(path), "is no regular file")


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def _length(frame: AudioFrame | VideoFrame, stream: Any) -> float:
    if hasattr(frame, "samples"):
        return frame.samples / frame.sample_rate
    return float(1 / (stream.average_rate or Fraction(25)))
