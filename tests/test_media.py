"""Sound and pictures out of real files, judged by what is seen and heard in them."""

from __future__ import annotations

import io
import os
import pickle
import socket
import wave as wavefile
from pathlib import Path

import numpy as np
import pytest
import torch
from media_files import CLICK, CODECS, RATE, TONE, grey, shown, tone, write

from avfast.data.media import MediaError, MediaFile, probe, read_audio, read_frames, read_image

VIDEO = [name for name, (pictures, _, _) in CODECS.items() if pictures]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two seconds in every container."""
    folder = tmp_path_factory.mktemp("media")
    paths = {name: folder / f"clip.{name}" for name in CODECS}
    for path in paths.values():
        write(path)
    return paths


def frequency(samples: torch.Tensor, rate: int = 16000) -> float:
    """The loudest frequency, to within half a hertz."""
    spectrum = torch.fft.rfft(samples * torch.hann_window(len(samples)), n=2 * rate).abs()
    return spectrum.argmax().item() / 2


def click(samples: torch.Tensor, rate: int = 16000) -> float:
    return samples.abs().argmax().item() / rate


@pytest.mark.parametrize("name", CODECS)
def test_sound_of_every_container(files: dict[str, Path], name: str) -> None:
    samples = read_audio(files[name])
    assert samples is not None and samples.dtype == torch.float32 and samples.ndim == 1
    assert len(samples) / 16000 == pytest.approx(2.0, abs=0.05)
    assert click(samples) == pytest.approx(CLICK, abs=1e-3)
    quiet = samples[2000:14000]
    assert frequency(quiet) == pytest.approx(TONE, abs=1)
    assert quiet.square().mean().sqrt().item() == pytest.approx(0.1 / 2**0.5, rel=0.05)


@pytest.mark.parametrize("name", CODECS)
def test_window_of_sound(files: dict[str, Path], name: str) -> None:
    window = read_audio(files[name], start=1.35, seconds=0.5)
    whole = read_audio(files[name])
    assert window is not None and whole is not None and len(window) == 8000
    # Matroska's clock has milliseconds, which is a sixth of a radian of this tone
    assert (window - whole[21600:29600]).abs().max() < (0.15 if name == "webm" else 0.05 if name == "mkv" else 0.01)
    early = read_audio(files[name], start=0.9, seconds=0.2)
    assert early is not None and click(early) == pytest.approx(CLICK - 0.9, abs=1e-3)
    assert len(read_audio(files[name], start=1.9, seconds=5.0)) == pytest.approx(1600, abs=800)
    assert len(read_audio(files[name], start=30.0, seconds=5.0)) == 0


@pytest.mark.parametrize("name", VIDEO)
def test_pictures_of_every_container(files: dict[str, Path], name: str) -> None:
    frames = read_frames(files[name], [0.5, 0.0, 1.55, 1.55, 1.0, 99.0, 1.89])
    assert frames is not None and frames.dtype == torch.uint8 and frames.shape == (7, 48, 64, 3)
    assert shown(frames) == [5, 0, 15, 15, 10, 19, 18]
    # from a keyframe, without the early ones
    assert shown(read_frames(files[name], [1.2, 1.7])) == [12, 17]


@pytest.mark.parametrize("name", VIDEO)
def test_one_file_read_often(files: dict[str, Path], name: str) -> None:
    with MediaFile(files[name]) as media:
        first = media.audio()
        assert shown(media.frames([1.3, 1.95])) == [13, 19]
        assert shown(media.frames([1.3])) == [13]
        assert torch.equal(first, media.audio())
        window = media.audio(start=1.2, seconds=0.3)
        assert shown(media.frames([0.3])) == [3]
        assert torch.equal(window, media.audio(start=1.2, seconds=0.3))
    assert click(first) == pytest.approx(CLICK, abs=1e-3)


def test_seeks_that_land_too_late(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Some containers have no or a poor index."""
    seek = MediaFile._seek
    monkeypatch.setattr(MediaFile, "_seek", lambda self, kind, time: seek(self, kind, time + 0.5))
    assert shown(read_frames(files["avi"], [1.2, 1.7])) == [12, 17]
    window, whole = read_audio(files["wav"], start=1.35, seconds=0.5), read_audio(files["wav"])
    assert (window - whole[21600:29600]).abs().max() < 0.01


def test_probe(files: dict[str, Path]) -> None:
    info = probe(files["mp4"])
    assert (info.has_audio, info.has_video, info.sample_rate, info.channels) == (True, True, 44100, 2)
    assert (info.width, info.height, info.frame_rate) == (64, 48, RATE)
    assert info.duration == pytest.approx(2.0, abs=0.05)
    assert not probe(files["mp3"]).has_video


def test_missing_modality(tmp_path: Path, files: dict[str, Path]) -> None:
    silent = tmp_path / "silent.mp4"
    write(silent, codecs=("libx264", None, 0))
    assert read_audio(silent) is None and shown(read_frames(silent, [0.4])) == [4]
    assert read_frames(files["wav"], [0.4]) is None and read_audio(files["wav"]) is not None


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050])
def test_sample_rates(tmp_path: Path, rate: int) -> None:
    path = tmp_path / "clip.wav"
    write(path, codecs=(None, "pcm_s16le", rate))
    samples = read_audio(path)
    assert len(samples) == 32000
    assert click(samples) == pytest.approx(CLICK, abs=1e-3)
    assert frequency(samples[:12000]) == pytest.approx(TONE, abs=1)
    assert frequency(read_audio(path, sample_rate=8000)[:6000], 8000) == pytest.approx(TONE, abs=1)


@pytest.mark.parametrize(("extension", "codec", "rate", "layout"), [
    ("wav", "pcm_s16le", 8000, "stereo"),
    ("mp4", "aac", 48000, "5.1"),
    ("flac", "flac", 48000, "5.1"),
    ("wav", "pcm_f32le", 48000, "3.0"),
    ("wav", "pcm_s32le", 44100, "mono"),
    ("wav", "pcm_u8", 44100, "stereo"),
])  # fmt: skip
def test_channels_are_averaged(tmp_path: Path, extension: str, codec: str, rate: int, layout: str) -> None:
    """Each channel carries its own tone; all of them are heard, each at its share."""
    channels = {"mono": 1, "stereo": 2, "3.0": 3, "5.1": 6}[layout]
    tones = [
        40.0 if layout == "5.1" and i == 3 else 400.0 + 300 * i for i in range(channels)
    ]  # AAC's LFE is low-passed
    path = tmp_path / f"clip.{extension}"
    wave = np.stack([5 * tone(1.0, rate, hertz, click=None) for hertz in tones])
    write(path, codecs=("libx264" if extension == "mp4" else None, codec, rate), wave=wave, layout=layout, seconds=1.0)
    assert probe(path).channels == channels
    samples = read_audio(path)[:16000]
    amplitude = torch.fft.rfft(samples).abs() / 8000
    assert samples.mean().abs() < 1e-2
    for hertz in tones:
        assert amplitude[round(hertz)].item() == pytest.approx(0.5 / channels, rel=0.05)


def test_channels_without_a_layout(tmp_path: Path) -> None:
    path = tmp_path / "three.wav"
    with wavefile.open(str(path), "wb") as file:
        file.setnchannels(3)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(np.array([[3000, 6000, 9000]] * 16000, dtype="<i2").tobytes())
    assert read_audio(path).mean().item() == pytest.approx(6000 / 32768, rel=1e-4)


def test_variable_frame_rate(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    times = [0.0, 0.04, 0.3, 0.31, 0.9, 1.5, 1.52]
    write(path, codecs=("libx264", "aac", 16000), pictures=grey(7), times=times)
    asked = [0.0, 0.03, 0.04, 0.29, 0.305, 0.5, 0.89, 0.9, 1.49, 1.51, 1.9]
    assert shown(read_frames(path, asked)) == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6]
    assert shown(read_frames(path, [1.45])) == [4]


def test_any_pyav(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Since 19 its open knows no metadata_errors."""
    import av

    original = av.open
    monkeypatch.setattr(av, "open", lambda file, mode="r", format=None: original(file, mode, format=format))
    assert shown(read_frames(files["mp4"], [0.5])) == [5] and click(read_audio(files["wav"])) == CLICK
    with pytest.raises(MediaError, match="No such file"):
        read_audio("none.mp4")


def test_odd_size(tmp_path: Path) -> None:
    path = tmp_path / "odd.mkv"
    write(path, codecs=("libx264", None, 0), pictures=grey(5, 47, 63), pix_fmt="yuv444p")
    frames = read_frames(path, [0.1, 0.4])
    assert frames.shape == (2, 47, 63, 3) and shown(frames) == [1, 4]
    assert (frames.float().amax((1, 2, 3)) - frames.float().amin((1, 2, 3))).max() <= 6  # no torn rows


@pytest.mark.parametrize(("name", "codec"), [("mkv", "flac"), ("mp4", "aac"), ("ts", "aac")])
def test_sound_and_pictures_share_a_clock(tmp_path: Path, name: str, codec: str) -> None:
    """Pictures from 1.0 s on, sound from 1.5 s on with a click at 2.5 s: zero is where the first of them starts."""
    path = tmp_path / f"late.{name}"
    times = [1.0 + i / RATE for i in range(20)]
    write(path, codecs=("libx264", codec, 48000), pictures=grey(20), times=times, waves_at=[(1.5, tone(1.5, 48000))])
    assert click(read_audio(path)) == pytest.approx(1.5, abs=2e-3)
    before = read_audio(path, seconds=0.4)
    assert len(before) == 6400 and before.abs().max() == 0
    assert shown(read_frames(path, [0.25, 1.45])) == [2, 14]
    assert click(read_audio(path, start=1.2, seconds=0.5)) == pytest.approx(0.3, abs=2e-3)


def test_holes_in_the_sound_are_silent(tmp_path: Path) -> None:
    path = tmp_path / "hole.mkv"
    parts = [(0.0, tone(0.5, 16000, click=None)), (1.2, tone(0.8, 16000, click=0.3))]
    write(path, codecs=(None, "pcm_s16le", 16000), waves_at=parts)
    samples = read_audio(path)
    assert len(samples) == pytest.approx(32000, abs=16)
    assert samples[8100:19100].abs().max() == 0 and samples[:8000].abs().max() > 0.09
    assert click(samples) == pytest.approx(1.5, abs=1e-3)


def test_short_clip(tmp_path: Path) -> None:
    path = tmp_path / "short.mp4"
    write(path, seconds=0.3, wave=tone(0.3, 44100, click=0.1))
    samples = read_audio(path, seconds=2.0)
    assert 4800 <= len(samples) <= 5600 and click(samples) == pytest.approx(0.1, abs=1e-3)
    assert shown(read_frames(path, [0.0, 0.25, 1.0])) == [0, 2, 2]


@pytest.mark.parametrize("name", ["ütf-8 名前 🎬.mp4", "take:2.mp4", "100%03d.mp4", "-i.mp4"])
def test_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write(tmp_path / "plain.mp4", seconds=0.5, wave=tone(0.5, 44100, click=None))
    (tmp_path / "plain.mp4").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / name, name):
        assert shown(read_frames(path, [0.3])) == [3]


def test_duration_of_a_streamed_file(tmp_path: Path) -> None:
    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.data = b""

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            self.data += bytes(data)
            return len(data)

    pipe = Pipe()
    write(pipe, codecs=("libx264", "flac", 16000), format="matroska", options={"live": "1"})
    path = tmp_path / "streamed.mkv"
    path.write_bytes(pipe.data)
    assert probe(path).duration == pytest.approx(2.0, abs=0.11)
    assert shown(read_frames(path, [1.5])) == [15]


def test_pipes_and_sockets_are_refused(tmp_path: Path) -> None:
    """Reading one would wait for ever."""
    os.mkfifo(tmp_path / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.wav"))
        for name, read in (("pipe.mp4", probe), ("socket.wav", probe), ("pipe.mp4", read_image)):
            with pytest.raises(MediaError, match=f"{name}: is no regular file"):
                read(tmp_path / name)


def test_where_a_stream_ends(files: dict[str, Path]) -> None:
    with MediaFile(files["mkv"]) as media:
        media.audio(seconds=0.5)
        assert media.ends == {}
        media.audio(start=1.5)
        assert media.ends == {"audio": pytest.approx(2.0, abs=0.01)}
        assert media.measure() == {"audio": pytest.approx(2.0, abs=0.01), "video": pytest.approx(2.0, abs=0.11)}
        assert shown(media.frames([1.3, 5.0])) == [13, 19]
        assert media.ends["video"] == pytest.approx(2.0, abs=0.01)


def test_cover_art_is_no_video(tmp_path: Path) -> None:
    import av

    path = tmp_path / "song.mp3"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("libmp3lame", rate=44100, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(grey(1)[0], format="rgb24")))
        container.mux(cover.encode(None))
        frame = av.AudioFrame.from_ndarray(tone(1.0, 44100, click=None)[None], format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    assert not probe(path).has_video and read_frames(path, [0.0]) is None
    assert frequency(read_audio(path)) == pytest.approx(TONE, abs=1)


def broken(folder: Path, whole: bytes, kind: str) -> Path:
    path = folder / f"{kind}.mp4"
    if kind == "truncated":
        assert whole.rindex(b"moov") > len(whole) // 2
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "text":
        path.write_text("This is not a video.\n" * 50)
    elif kind == "zero":
        path.write_bytes(b"")
    elif kind == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(50_000))
    elif kind == "folder":
        path.mkdir()
    elif kind == "subtitles":
        path.write_text("1\n00:00:00,000 --> 00:00:01,000\nHello\n\n" * 20)
    elif kind == "head":
        path.write_bytes(whole[:40])
    else:
        assert kind == "missing"
    return path


@pytest.mark.parametrize("kind", ["truncated", "text", "zero", "noise", "folder", "subtitles", "head", "missing"])
def test_undecodable_files_are_named(tmp_path: Path, files: dict[str, Path], kind: str) -> None:
    path = broken(tmp_path, files["mp4"].read_bytes(), kind)
    for read in (probe, read_audio, lambda path: read_frames(path, [0.0])):
        with pytest.raises(MediaError) as caught:
            read(path)
        assert caught.value.path == str(path) and str(caught.value).startswith(f"{path}: ")
        assert len(caught.value.reason) > 5 and "\n" not in str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.path, copy.reason) == (caught.value.path, caught.value.reason)


@pytest.mark.parametrize(("name", "options"), [("mkv", {}), ("mp4", {"movflags": "faststart"})])
def test_cut_off_files_give_what_is_there(tmp_path: Path, name: str, options: dict[str, str]) -> None:
    whole, cut = tmp_path / f"whole.{name}", tmp_path / f"cut.{name}"
    rng = np.random.default_rng(0)
    pictures = [np.clip(p + rng.integers(-20, 20, p.shape), 0, 255).astype(np.uint8) for p in grey(20)]
    write(whole, pictures=pictures, options=options)
    data = whole.read_bytes()
    cut.write_bytes(data[: len(data) * 6 // 10])
    frames = shown(read_frames(cut, [0.2, 1.99]))
    assert frames[0] == 2 and 2 < frames[1] < 19
    cut.write_bytes(data[: data.index(b"mdat") + 8] if name == "mp4" else data[:300])
    with pytest.raises(MediaError, match=r"cut\.\w+: "):
        read_frames(cut, [0.2])


def test_sound_that_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "nan.wav"
    samples = tone(1.0, 16000, click=None)
    samples[500] = np.nan
    write(path, codecs=(None, "pcm_f32le", 16000), wave=samples)
    with pytest.raises(MediaError, match=r"nan\.wav: its audio holds values that are not finite"):
        read_audio(path)
    assert read_audio(path, start=0.5).isfinite().all()


def test_headers_that_lie(tmp_path: Path, files: dict[str, Path]) -> None:
    path = tmp_path / "rate.wav"
    data = bytearray(files["wav"].read_bytes())
    data[24:28] = (1_526_770_756).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(MediaError, match="1526770756 Hz does not resample"):
        read_audio(path)
    path = tmp_path / "hole.mkv"
    part = tone(0.2, 16000, click=None)
    write(path, codecs=(None, "pcm_s16le", 16000), waves_at=[(0.0, part), (100_000.0, part)])
    with pytest.raises(MediaError, match="hole of more than an hour"):
        read_audio(path)
    assert len(read_audio(path, seconds=2.0)) == 32000


@pytest.mark.parametrize("name", CODECS)
def test_damage_never_escapes(tmp_path: Path, files: dict[str, Path], name: str) -> None:
    """Whatever the bytes, there is a result or a MediaError."""
    data, path = files[name].read_bytes(), tmp_path / f"x.{name}"
    rng = np.random.default_rng(0)
    for trial in range(12):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data) if trial % 2 else 600, 20):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            with MediaFile(path) as media:
                samples, frames = media.audio(start=1.2 * (trial % 3), seconds=1.0), media.frames([0.5, 1.5])
        except MediaError:
            continue
        assert samples is None or (len(samples) <= 16000 and samples.isfinite().all())
        assert frames is None or len(frames) == 2


def test_damaged_middle(tmp_path: Path) -> None:
    """Damage costs what it hits, not the file."""
    path = tmp_path / "damaged.mp3"
    write(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 4 : len(data) // 4 + 2000] = b"\xff\x00" * 1000
    path.write_bytes(data)
    samples = read_audio(path)
    assert samples.isfinite().all() and 24000 < len(samples) <= 33000
    assert frequency(samples[-9000:-1000]) == pytest.approx(TONE, abs=2)
