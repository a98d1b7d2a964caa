"""What of a file is shown and heard, and how it is turned: what players do with it."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from media_files import RATE, rotate_header, shown, write

from avfast.data.media import read_audio, read_frames


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotated_and_mirrored(tmp_path: Path, degrees: int, mirrored: bool) -> None:
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32, 0] = 255  # red, top left
    picture[24:, :32, 2] = 255  # blue, bottom left
    path = tmp_path / "portrait.mp4"
    write(path, codecs=("libx264", None, 0), pictures=[picture] * 5)
    rotate_header(path, degrees, mirrored)
    frame = read_frames(path, [0.2])[0].float()
    assert frame.shape == ((64, 48, 3) if degrees % 180 else (48, 64, 3))
    frame = frame.flip(1) if mirrored else frame
    h, w = frame.shape[0] // 2, frame.shape[1] // 2
    corners = {
        "top left": frame[:h, :w],
        "top right": frame[:h, w:],
        "bottom left": frame[h:, :w],
        "bottom right": frame[h:, w:],
    }
    red = max(corners, key=lambda name: corners[name][..., 0].mean())
    blue = max(corners, key=lambda name: corners[name][..., 2].mean())
    assert (red, blue) == {
        0: ("top left", "bottom left"),
        90: ("top right", "top left"),
        180: ("bottom right", "top right"),
        270: ("bottom left", "bottom right"),
    }[degrees]


@pytest.mark.parametrize(("aspect", "shape"), [((2, 1), (48, 128)), ((16, 15), (48, 68)), ((1, 2), (96, 64))])
def test_pixels_become_square(tmp_path: Path, aspect: tuple[int, int], shape: tuple[int, int]) -> None:
    path = tmp_path / "oblong.mkv"
    write(path, codecs=("libx264", None, 0), seconds=0.5, aspect=Fraction(*aspect))
    frames = read_frames(path, [0.1, 0.3])
    assert frames.shape == (2, *shape, 3) and shown(frames) == [1, 3]
    turned = tmp_path / "oblong.mp4"
    write(turned, codecs=("libx264", None, 0), seconds=0.5, aspect=Fraction(*aspect))
    rotate_header(turned, 90)
    assert read_frames(turned, [0.1]).shape == (1, *shape[::-1], 3)


def test_a_pixel_of_absurd_shape_is_square(tmp_path: Path) -> None:
    path = tmp_path / "damaged.mkv"
    write(path, codecs=("libx264", None, 0), seconds=0.3, aspect=Fraction(16, 1))
    assert read_frames(path, [0.1]).shape == (1, 48, 64, 3)


def test_pictures_that_change_their_size_keep_the_first_one(tmp_path: Path) -> None:
    import av

    path = tmp_path / "change.ts"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        packets = []
        for first, (height, width) in ((0, (48, 64)), (5, (96, 64)), (10, (48, 96))):
            codec = av.CodecContext.create("mpeg2video", "w")
            codec.width, codec.height, codec.pix_fmt, codec.bit_rate = width, height, "yuv420p", 400_000
            codec.time_base, codec.framerate = Fraction(1, 25), Fraction(25)
            for i in range(first, first + 5):
                frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 20 + 10 * i, np.uint8), format="rgb24")
                frame.pts, frame.time_base = i, codec.time_base
                packets += codec.encode(frame)
            packets += codec.encode(None)
        file.start_encoding()
        for packet in packets:
            packet.stream, packet.time_base = stream, Fraction(1, 25)
            file.mux(packet)
    frames = read_frames(path, [0.05, 0.25, 0.45, 0.57])
    assert frames.shape == (4, 48, 64, 3) and shown(frames) == [1, 6, 11, 14]


def test_streams_that_players_choose(tmp_path: Path) -> None:
    """The second film and the third sound are marked as default; without a mark, commentary gives way."""
    import av

    Mark = av.stream.Disposition
    for name, marks in (
        ("default", (0, Mark.default, 0, 0, Mark.default)),
        ("commentary", (Mark.comment, 0, Mark.comment, Mark.visual_impaired, 0)),
    ):
        path = tmp_path / f"{name}.mkv"
        with av.open(str(path), "w") as file:
            films = [file.add_stream("mpeg4", rate=RATE) for _ in range(2)]
            sounds = [file.add_stream("pcm_s16le", rate=16000, layout="mono") for _ in range(3)]
            for stream, mark in zip([*films, *sounds], marks, strict=True):
                stream.disposition = mark
            for stream in films:
                stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for number, stream in enumerate(films):
                for i in range(3):
                    picture = np.full((48, 64, 3), 20 + 100 * number, np.uint8)
                    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                    frame.pts, frame.time_base = i, Fraction(1, RATE)
                    file.mux(stream.encode(frame))
                file.mux(stream.encode(None))
            for number, stream in enumerate(sounds):
                samples = np.full((1, 8000), 1000 * (number + 1), np.int16)
                frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
                frame.sample_rate, frame.pts = 16000, 0
                file.mux(stream.encode(frame))
                file.mux(stream.encode(None))
        assert shown(read_frames(path, [0.1])) == [10], name
        assert read_audio(path).mean().item() == pytest.approx(3000 / 32768, rel=1e-3), name


@pytest.mark.parametrize(("codec", "sound"), [("libx264", "aac"), ("mpeg4", "pcm_s16le")])
def test_avi_with_frames_out_of_order(tmp_path: Path, codec: str, sound: str) -> None:
    path = tmp_path / "b.avi"
    write(path, codecs=(codec, sound, 32000), b_frames=2)
    assert shown(read_frames(path, [0.05, 0.55, 1.05, 1.65])) == [0, 5, 10, 16]
    assert shown(read_frames(path, [1.25])) == [12]
