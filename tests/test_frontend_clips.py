"""AVBERT's front end: clips one after the other, each with its own spectrogram and video."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from media_files import shown, write

from avfast.data.clip_list import Clip, ClipList
from avfast.data.clips import StepBatches, make_loader
from avfast.data.dataset import ClipDataset
from avfast.data.frontend import IMAGENET_MEAN, IMAGENET_STD, KaldiFrontend
from avfast.data.frontend_clips import ClipsFrontend
from avfast.data.spec import ClipSpec, clips
from avfast.random import DrawKey

SMALL = {"num_clips": 3, "clip_seconds": 0.25, "num_frames": 30, "num_mel_bins": 20, "sample_rate": 16000}
SMALL |= {"frames_per_clip": 2, "image_size": 8}
SILENCE = float(np.log(np.float32(1e-6)))


def sound(batch: int, samples: int) -> torch.Tensor:
    return 0.2 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(1))


def by_hand(wave: np.ndarray, rate: int, frames: int, bins: int) -> np.ndarray:
    """A plain float64 transcription of the released code's rule, frame by frame."""
    hop = len(wave) // frames + 1
    mirrored = np.pad(wave, hop, mode="reflect")
    window = 0.5 - 0.5 * np.cos(np.pi * np.arange(2 * hop) / hop)
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + rate / 2 / 700), bins + 2) / 2595) - 1)
    bank = np.zeros((hop + 1, bins))
    for k in range(hop + 1):
        for m in range(bins):
            at, (left, centre, right) = k * rate / (2 * hop), edges[m : m + 3]
            if left < at < right:
                bank[k, m] = (at - left) / (centre - left) if at <= centre else (right - at) / (right - centre)
    rows = [mirrored[hop * i : hop * i + 2 * hop] * window for i in range(1 + len(wave) // hop)][:frames]
    return np.log(np.abs(np.fft.rfft(rows)) ** 2 @ bank + 1e-6)


@pytest.mark.parametrize(
    ("seconds", "frames", "bins", "lacking"),
    [(1.0, 220, 128, 0), (64 / 30, 128, 80, 0), (0.25, 100, 17, 2)],
    ids=["paper", "released", "two frames short"],
)
def test_every_clip_has_its_own_filter_banks(seconds: float, frames: int, bins: int, lacking: int) -> None:
    rate = 16000 if lacking else 44100
    front = ClipsFrontend(num_clips=2, clip_seconds=seconds, num_frames=frames, num_mel_bins=bins, sample_rate=rate)
    wave = sound(1, front.num_samples + 100)
    got = front.audio(wave)
    assert got.shape == (1, 2, frames, bins) and got.dtype == torch.float32
    for clip, piece in zip(got[0], wave[0].split(front.clip_samples), strict=False):
        want = by_hand(piece.double().numpy(), rate, frames, bins)
        assert len(want) == frames - lacking and not clip[len(want) :].any()
        assert np.abs(clip[: len(want)].numpy() - want).max() < 2e-4
    assert torch.equal(front.audio(wave[:, : front.num_samples]), got)  # what lies beyond the window is not heard
    scaled = ClipsFrontend(**front.to_dict() | {"mean": -2.0, "std": 3.0}).audio(wave)
    assert torch.allclose(scaled[:, :, : frames - lacking], (got[:, :, : frames - lacking] + 2) / 3, atol=1e-6)
    assert not scaled[:, :, frames - lacking :].any()


@pytest.mark.parametrize(("seconds", "frames", "bins"), [(1.0, 220, 128), (64 / 30, 128, 80)])
@pytest.mark.filterwarnings("ignore:At least one mel filterbank has all zero values")
def test_torchaudio(seconds: float, frames: int, bins: int) -> None:
    torchaudio = pytest.importorskip("torchaudio", exc_type=ImportError)
    front = ClipsFrontend(num_clips=2, clip_seconds=seconds, num_frames=frames, num_mel_bins=bins)
    hop = front.clip_samples // frames + 1
    mel = torchaudio.transforms.MelSpectrogram(44100, n_fft=2 * hop, hop_length=hop, n_mels=bins)
    wave = sound(2, front.num_samples)
    want = (mel(wave.view(2, 2, -1)) + 1e-6).log().mT
    assert want.shape == (2, 2, frames, bins) and (front.audio(wave) - want).abs().max() <= 1e-4


def test_what_a_file_lacks_is_silence() -> None:
    front = ClipsFrontend(**SMALL)
    wave = sound(4, front.num_samples)
    heard = torch.tensor([front.num_samples, 5000, 4000, 0])
    got = front.audio(wave, heard)
    for row, samples, count in zip(got, wave, heard.tolist(), strict=True):
        alone = torch.nn.functional.pad(samples[None, :count], (0, front.num_samples - count))
        assert torch.equal(row, front.audio(alone)[0])
    assert (got[2, 1:] == SILENCE).all() and (got[3] == SILENCE).all() and (got[1, 1] != SILENCE).any()
    assert torch.equal(front.audio(wave[:, :4000])[2], got[2]) and front.audio(wave[:, :0]).shape == got.shape
    assert front.audio(wave[:0]).shape == (0, 3, 30, 20)


def test_a_mask_is_the_same_in_all_clips_and_follows_the_sample() -> None:
    small = SMALL | {"clip_seconds": 0.06}
    front = ClipsFrontend(**small, masked_share=0.1)
    wave, key = sound(500, front.num_samples), DrawKey(3, 4, range(500), 500)
    plain, got = front.audio(wave), front.audio(wave, train=True, key=key)
    hidden = (got == 0) & (plain != 0)
    assert torch.equal(got[~hidden], plain[~hidden])
    assert (hidden == hidden[:, :1]).all()
    frames, bins = hidden[:, 0].all(2), hidden[:, 0].all(1)
    assert torch.equal(hidden[:, 0], frames[:, :, None] | bins[:, None])
    for masked, most in ((frames, 3), (bins, 2)):
        sizes = masked.sum(1).bincount()
        assert len(sizes) == most + 1 and (sizes / 500 - 1 / (most + 1)).abs().max() < 0.08
        edges = masked.int().diff(dim=1, prepend=torch.zeros(500, 1), append=torch.zeros(500, 1)).abs().sum(1)
        assert edges.max() == 2  # one stretch
        assert masked.any(0).all()  # anywhere
    half = DrawKey(3, 4, range(250, 500), 500)
    assert torch.equal(front.audio(wave[250:], train=True, key=half), got[250:])
    assert torch.equal(front.audio(wave), plain)
    assert torch.equal(ClipsFrontend(**small).audio(wave, train=True, key=key), plain)
    with pytest.raises(ValueError, match="500 positions, got none"):
        front.audio(wave, train=True)


def test_frames_are_normalised_as_the_front_end_says() -> None:
    pixels = torch.randint(256, (2, 6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    released = ClipsFrontend(**SMALL).visual(pixels)
    assert released.shape == (2, 3, 3, 2, 8, 8) and released.is_contiguous() and released.dtype == torch.float32
    want = (pixels.float() / 255 - 0.45) / 0.225
    for clip in range(3):
        for frame in range(2):
            assert torch.allclose(released[:, clip, :, frame], want[:, 2 * clip + frame], atol=1e-5)
    imagenet = ClipsFrontend(**SMALL, pixel_mean=IMAGENET_MEAN, pixel_std=IMAGENET_STD).visual(pixels)
    assert torch.equal(imagenet[:, 2, :, 1], KaldiFrontend(image_size=8).visual(pixels[:, 5]))


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> ClipList:
    """Two seconds of pictures that grow lighter from left to right and with time, and of a tone that grows louder.

    Picture ``i`` of 20 is shown while the tone has an amplitude of ``(i + 1) / 25``.
    """
    path = tmp_path_factory.mktemp("clips") / "film.mkv"
    ramp = np.broadcast_to(np.linspace(-15, 15, 64)[None, :, None], (64, 64, 3))
    pictures = [np.clip(np.round(20 + 10 * i + ramp), 0, 255).astype(np.uint8) for i in range(20)]
    loudness = np.repeat((np.arange(20) + 1) / 25, 4410)
    tone = np.sin(2 * np.pi * 440 * np.arange(len(loudness)) / 44100)
    write(path, pictures=pictures, wave=(loudness * tone).astype(np.float32), layout="mono")
    return ClipList((Clip("film", str(path), str(path)),))


@pytest.mark.parametrize("cache", [False, True])
def test_clips_lie_in_one_window_and_share_crop_and_flip(film: ClipList, cache: bool) -> None:
    front = ClipsFrontend(**SMALL | {"clip_seconds": 0.5, "frames_per_clip": 5, "image_size": 32})
    dataset = ClipDataset(film, frontend=front, train=True, cache=cache, crop_scale=(0.3, 0.6))
    starts, flips = set(), set()
    for step in range(24):
        sample = dataset[0, step, 0]
        assert sample.frames.shape == (15, 3, 32, 32) and len(sample.waveform) == front.num_samples == 24000
        pictures = sample.frames.double().mean(1)
        slopes = (pictures[..., -8:] - pictures[..., :8]).mean((1, 2))
        assert (slopes > 0).all() or (slopes < 0).all()
        assert slopes.abs().max() - slopes.abs().min() < 3  # of at least 30 * 0.55 * 3 / 4
        flips.add(bool(slopes[0] < 0))
        middles = pictures.mean((1, 2))
        levels = sample.waveform.view(15, 1600).std(1) * 2**0.5 * 25 - 1
        numbers = (middles - 20) / 10
        assert (numbers.diff() > 0.4).all() and (numbers.diff() - 1).abs().mean() < (0.4 if cache else 0.25)
        lag = (numbers - numbers.mean()) - (levels - levels.mean())
        assert lag.abs().max() < 1.3 and abs((numbers - levels).mean()) < 1.9  # a crop is lighter or darker by 1.5
        starts.add(round(float(levels[0])))
    assert flips == {True, False} and len(starts) >= 4


def test_from_a_file_to_inputs(film: ClipList, tmp_path: Path) -> None:
    front = ClipsFrontend(**SMALL | {"num_clips": 4, "clip_seconds": 1.0}, masked_share=0.1)
    assert front.spec == ClipSpec(4.0, 16000, 8, clips(4, 2))
    dataset = ClipDataset(film, frontend=front, train=True)
    (batch,) = make_loader(dataset, StepBatches(1, 1, steps=1))
    assert batch.short.all()
    inputs = front(batch, train=True, key=batch.key(0))
    assert {name: tuple(x.shape) for name, x in inputs.items()} == {
        "audio": (1, 4, 30, 20),
        "visual": (1, 4, 3, 2, 8, 8),
    }
    loaded = front.load(film.clips[0].path)
    frames = (loaded["visual"] * 0.225 + 0.45).mul(255).transpose(2, 3).flatten(0, 3)
    assert shown(frames.view(8, 3, 8, 8)) == [2, 7, 12, 17, 19, 19, 19, 19]  # then its last frame
    assert (loaded["audio"][0, 2:] == SILENCE).all() and (loaded["audio"][0, :2].amax(2) > 0).all()
    write(tmp_path / "deaf.mkv", codecs=("libx264", None, 0))
    write(tmp_path / "blind.wav")
    assert list(front.load(tmp_path / "deaf.mkv")) == ["visual"]
    assert list(front.load(tmp_path / "blind.wav")) == ["audio"]


def test_it_is_json_and_checks_its_arguments() -> None:
    front = ClipsFrontend(**SMALL, pixel_std=IMAGENET_STD, masked_share=0.05)
    assert ClipsFrontend(**json.loads(json.dumps(front.to_dict()))) == front != ClipsFrontend()
    assert hash(front) == hash(ClipsFrontend(**front.to_dict()))
    assert ClipsFrontend().to_dict()["n_fft"] == 402 and ClipsFrontend().num_samples == 30 * 44100
    assert ClipsFrontend(n_fft=2048).audio(torch.zeros(1, 0)).shape == (1, 30, 220, 128)
    for wrong in (
        {"num_clips": 0}, {"frames_per_clip": 1.5}, {"clip_seconds": 0.0}, {"clip_seconds": -1.0}, {"n_fft": 0},
        {"std": 0.0}, {"masked_share": 1.1}, {"pixel_mean": (0.5,)}, {"pixel_std": (0.2, 0.2, 0.0)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ClipsFrontend(**wrong)
