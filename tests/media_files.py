"""Small media files whose content tells the time: grey levels for pictures, a tone and a click for sound."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av", reason="needs av to write media files")

RATE = 10  # pictures per second unless told otherwise
TONE = 440.0
CLICK = 1.0  # seconds
CODECS = {  # extension -> (pictures, sound, sample rate)
    "mp4": ("libx264", "aac", 44100),
    "mov": ("mpeg4", "aac", 48000),
    "mkv": ("libx264", "flac", 44100),
    "webm": ("libvpx", "libopus", 48000),
    "avi": ("mjpeg", "pcm_s16le", 32000),
    "wav": (None, "pcm_s16le", 44100),
    "flac": (None, "flac", 96000),
    "mp3": (None, "libmp3lame", 44100),
}


def level(index: int) -> int:
    """Grey level of picture number ``index``."""
    return 20 + 10 * index


def shown(frames: Any) -> list[int]:
    """Numbers of the pictures in (F, H, W, 3), from their mean grey level."""
    return [round((float(np.asarray(frame, dtype=np.float64).mean()) - 20) / 10) for frame in frames]


def grey(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    return [np.full((height, width, 3), level(i), np.uint8) for i in range(count)]


def tone(seconds: float, rate: int, frequency: float = TONE, click: float | None = CLICK) -> np.ndarray:
    """(samples,) float32: a tone at 0.1, and one sample's worth of 16 kHz click at 0.9."""
    times = np.arange(round(seconds * rate)) / rate
    wave = 0.1 * np.sin(2 * np.pi * frequency * times)
    if click is not None:
        first = round(click * rate)
        wave[first : first + max(1, rate // 16000)] = 0.9
    return wave.astype(np.float32)


def write(
    path: Path | Any,
    *,
    codecs: tuple[str | None, str | None, int] | None = None,
    pictures: Sequence[np.ndarray] | None = None,
    times: Sequence[float] | None = None,
    wave: np.ndarray | None = None,
    layout: str = "stereo",
    waves_at: Sequence[tuple[float, np.ndarray]] | None = None,
    seconds: float = 2.0,
    pix_fmt: str | None = None,
    options: dict[str, str] | None = None,
    format: str | None = None,
    aspect: Fraction | None = None,
    b_frames: int | None = None,
) -> None:
    """Writes a file, by default two seconds of :func:`grey` and :func:`tone`.

    Args:
        codecs: (pictures, sound, sample rate), None for a missing stream; default by extension.
        pictures, times: RGB arrays and when each is shown, by default 10 per second.
        wave: (samples,) for all channels or (channels, samples).
        waves_at: instead of ``wave``, several (time, wave) with holes between them.
        options: of the muxer.
        aspect: width of a pixel over its height.
        b_frames: at most so many between two others.
    """
    video_codec, audio_codec, rate = codecs or CODECS[Path(path).suffix[1:]]
    file = path if hasattr(path, "write") else str(path)
    with av.open(file, "w", options=options or {}, format=format) as container:
        video = audio = None
        if video_codec:
            pictures = grey(round(seconds * RATE)) if pictures is None else pictures
            video = container.add_stream(video_codec, rate=RATE)
            video.height, video.width = pictures[0].shape[:2]
            video.pix_fmt = pix_fmt or ("yuvj420p" if video_codec == "mjpeg" else "yuv420p")
            video.bit_rate = 400_000
            video.codec_context.time_base = Fraction(1, RATE if times is None else 1000)
            if aspect is not None:
                video.codec_context.sample_aspect_ratio = aspect
            if b_frames is not None:
                video.codec_context.max_b_frames = b_frames
        if audio_codec:
            audio = container.add_stream(audio_codec, rate=rate, layout=layout)
        if video is not None:
            for i, picture in enumerate(pictures or ()):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.time_base = video.codec_context.time_base
                frame.pts = i if times is None else round(times[i] * 1000)
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
        if audio is not None:
            for start, samples in waves_at or [(0.0, tone(seconds, rate) if wave is None else wave)]:
                channels = audio.codec_context.channels
                frame = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(np.broadcast_to(samples, (channels, samples.shape[-1])), dtype=np.float32),
                    format="fltp",
                    layout=layout,
                )
                frame.sample_rate = rate
                resampler = av.AudioResampler(
                    format=audio.codec_context.format,
                    layout=layout,
                    rate=rate,
                    frame_size=None if waves_at is None else 1024,
                )
                at = round(start * rate)
                for part in [*resampler.resample(frame), *resampler.resample(None)]:
                    part.pts, part.time_base = at, Fraction(1, rate)
                    at += part.samples
                    container.mux(audio.encode(part))
            container.mux(audio.encode(None))


def rotate_header(path: Path, degrees: int, mirrored: bool = False) -> None:
    """Rewrites the display matrix of the first track of an mp4.

    It is shown turned clockwise by ``degrees``, and then with left and right exchanged if ``mirrored``.
    """
    a, b = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    side = -1 if mirrored else 1
    matrix = [side * a << 16, b << 16, 0, side * -b << 16, a << 16, 0, 0, 0, 1 << 30]
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4  # after the size and the name of the box
    at += 4 + 20 + 8 + 8  # version and flags; times, id, duration (32 bits); reserved; layer, group, volume, reserved
    data[at : at + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(data)
