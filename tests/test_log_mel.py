"""Filter banks and the front end built on them.

``tests/fixtures/log_mel/<name>.npz`` holds what ``torchaudio.compliance.kaldi.fbank`` of torchaudio 2.11 makes of
:func:`waveform` ``(name)`` with the field's arguments (``banks``), and its MelSpectrogram with DeepAVFusion's
(``htk``); ``python tests/test_log_mel.py`` writes them again.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from avfast.data.frontend import AudioMAEFrontend, HTKFrontend, KaldiFrontend, MAViLFrontend
from avfast.data.log_mel import _htk_triangles, _triangles, frame_length, frame_shift, htk_log_mel, log_mel
from avfast.data.spec import video
from avfast.random import DrawKey

STORED = Path(__file__).parent / "fixtures" / "log_mel"
NAMES = ("noise", "chord", "sweep", "clicks", "quiet", "offset", "silence")
RATES = {name: 16000 for name in NAMES} | {"sweep": 22050}


def waveform(name: str) -> torch.Tensor:
    """(samples,) float32 in [-1, 1], half a second and a bit."""
    rate = RATES[name]
    times = np.arange(int(0.53 * rate)) / rate
    rng = np.random.RandomState(7)
    wave = {
        "noise": lambda: 0.3 * rng.standard_normal(len(times)),
        "chord": lambda: sum(0.2 * np.sin(2 * np.pi * f * times) for f in (220.0, 277.2, 1318.5)),
        "sweep": lambda: (
            0.5 * np.sin(2 * np.pi * (100 * times + 6000 * times**2)) + 0.01 * rng.standard_normal(len(times))
        ),
        "clicks": lambda: (np.arange(len(times)) % 1000 == 500).astype(float),
        "quiet": lambda: 1e-4 * rng.standard_normal(len(times)),
        "offset": lambda: 0.5 + 0.1 * rng.standard_normal(len(times)),
        "silence": lambda: np.zeros(len(times)),
    }[name]()
    return torch.from_numpy(wave.astype(np.float32))


def by_torchaudio(wave: torch.Tensor, rate: int) -> torch.Tensor:
    import torchaudio

    return torchaudio.compliance.kaldi.fbank(
        wave[None] - wave.mean(),
        htk_compat=True,
        sample_frequency=rate,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=128,
        dither=0.0,
        frame_shift=10,
    )


def htk_by_torchaudio(wave: torch.Tensor, rate: int) -> torch.Tensor:
    import torchaudio

    mel = torchaudio.transforms.MelSpectrogram(sample_rate=rate, n_fft=int(0.05 * rate), hop_length=rate // 64)
    mel.mel_scale = torchaudio.transforms.MelScale(128, rate, n_stft=int(0.05 * rate) // 2 + 1)
    return torch.log10(mel(wave) + 1e-7).T


def htk(wave: torch.Tensor, rate: int) -> torch.Tensor:
    return htk_log_mel(wave[None], sample_rate=rate, n_fft=int(0.05 * rate), hop=rate // 64)[0]


def rounding(name: str, kind: str) -> torch.Tensor:
    """By how much two float32 FFTs may differ, per frame and bin of the logarithm, beside 1e-4 for everything else.

    Each of an FFT's log2(n) stages rounds at the scale of the frame's energy: an error of up to
    d = log2(n) eps |x| in every coefficient X, so of sqrt(sum w) d in the root of a bin's power sum w |X|^2. Bins far
    below the loudest of their frame hold little else, and every FFT library rounds in its own way.
    """
    wave, rate = waveform(name).double(), RATES[name]
    if kind == "banks":
        size, floor = 2 ** math.ceil(math.log2(frame_length(rate))), torch.finfo(torch.float32).eps
        frames = (wave - wave.mean()).unfold(0, frame_length(rate), frame_shift(rate, 10.0))
        frames = frames - frames.mean(1, keepdim=True)
        frames = frames - 0.97 * torch.cat([frames[:, :1], frames[:, :-1]], 1)
        frames = frames * torch.hann_window(frames.shape[1], periodic=False, dtype=torch.float64)
        weights = _triangles(128, size, rate, torch.device("cpu")).double()
    else:
        size, floor = int(0.05 * rate), 1e-7
        wave = torch.nn.functional.pad(wave[None], (size // 2, size // 2), mode="reflect")[0]
        frames = wave.unfold(0, size, rate // 64) * torch.hann_window(size, dtype=torch.float64)
        weights = _htk_triangles(128, size, rate, torch.device("cpu")).double()
    root = (torch.fft.rfft(frames, n=size).abs().square() @ weights).sqrt()
    error = math.log2(size) * torch.finfo(torch.float32).eps * frames.norm(dim=1, keepdim=True) * weights.sum(0).sqrt()
    most, least = ((x.square() + floor).log() for x in (root + error, (root - error).clamp(min=0)))
    return (most - least).float()


@pytest.mark.parametrize("kind", ["banks", "htk"])
@pytest.mark.parametrize("name", NAMES)
def test_stored_numbers(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = torch.from_numpy(np.load(STORED / f"{name}.npz")[kind])
    run = {"banks": lambda: log_mel(waveform(name)[None], sample_rate=RATES[name])[0],
           "htk": lambda: htk(waveform(name), RATES[name])}[kind]  # fmt: skip
    got = run()
    assert got.dtype == torch.float32 and got.shape == stored.shape
    allowed = 1e-4 + rounding(name, kind)
    assert ((got - stored).abs() <= allowed).all()
    # another CPU: numpy's FFT rounds in its own order
    monkeypatch.setattr(torch.fft, "rfft", lambda x, n: torch.from_numpy(np.fft.rfft(x.numpy(), n)).to(torch.complex64))
    assert ((run() - stored).abs() <= allowed).all()


@pytest.mark.filterwarnings("ignore:At least one mel filterbank has all zero values")
@pytest.mark.parametrize("name", NAMES)
def test_torchaudio(name: str) -> None:
    pytest.importorskip("torchaudio", exc_type=ImportError)
    wave = waveform(name).repeat(4)
    got = log_mel(wave[None], sample_rate=RATES[name])[0]
    assert (got - by_torchaudio(wave, RATES[name])).abs().max() <= 1e-4
    assert (htk(wave, RATES[name]) - htk_by_torchaudio(wave, RATES[name])).abs().max() <= 1e-4


def test_independent_of_torchaudio() -> None:
    """A plain float64 transcription of the definition, frame by frame."""
    wave = waveform("noise").double().numpy()
    wave = wave - wave.mean()
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
    bank = np.zeros((257, 128))
    mel = lambda hertz: 1127 * np.log(1 + hertz / 700)  # noqa: E731
    edges = np.linspace(mel(20), mel(8000), 130)
    for k in range(256):
        for m in range(128):
            at, (left, centre, right) = mel(k * 16000 / 512), edges[m : m + 3]
            if left < at < right:
                bank[k, m] = (at - left) / (centre - left) if at <= centre else (right - at) / (right - centre)
    rows = []
    for first in range(0, len(wave) - 399, 160):
        frame = wave[first : first + 400] - wave[first : first + 400].mean()
        frame = window * (frame - 0.97 * np.concatenate([frame[:1], frame[:-1]]))
        rows.append(np.log(np.maximum(np.abs(np.fft.rfft(frame, 512)) ** 2 @ bank, np.finfo(np.float32).eps)))
    got = log_mel(waveform("noise")[None])[0].double().numpy()
    assert got.shape == (len(rows), 128)
    assert np.abs(got - np.array(rows)).max() < 5e-3  # float32 against float64, in the faintest of 6,528 bins
    assert np.abs(got - np.array(rows)).mean() < 1e-5


def test_htk_independent_of_torchaudio() -> None:
    """A plain float64 transcription of the definition, frame by frame."""
    wave = waveform("noise").double().numpy()
    mirrored = np.pad(wave, 400, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(800) / 800)
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 130) / 2595) - 1)
    bank = np.zeros((401, 128))
    for k in range(401):
        for m in range(128):
            at, (left, centre, right) = 20.0 * k, edges[m : m + 3]
            if left < at < right:
                bank[k, m] = (at - left) / (centre - left) if at <= centre else (right - at) / (right - centre)
    frames = [mirrored[250 * i : 250 * i + 800] * window for i in range(1 + len(wave) // 250)]
    want = np.log10(np.abs(np.fft.rfft(frames)) ** 2 @ bank + 1e-7)
    got = htk_log_mel(waveform("noise")[None])[0].double().numpy()
    assert got.shape == want.shape and np.abs(got - want).max() < 1e-4


def test_ragged_batch() -> None:
    wave = waveform("offset")
    lengths = [len(wave), 5000, 400, 399, 0]
    batch = torch.full((5, len(wave)), 0.7)  # what lies beyond must not be read
    for row, length in zip(batch, lengths, strict=True):
        row[:length] = wave[:length]
    got = log_mel(batch, num_samples=torch.tensor(lengths))
    for row, length in zip(got, lengths, strict=True):
        alone = log_mel(wave[None, :length])[0]
        assert len(alone) == (0 if length < 400 else 1 + (length - 400) // 160)
        assert torch.allclose(row[: len(alone)], alone, atol=1e-4)
        assert not row[len(alone) :].any()


def test_settings_and_errors() -> None:
    assert log_mel(torch.zeros(2, 8000), num_mel_bins=80, frame_shift_ms=5.0).shape == (2, 96, 80)
    assert log_mel(torch.zeros(0, 8000)).shape == (0, 48, 128) and log_mel(torch.zeros(3, 10)).shape == (3, 0, 128)
    with pytest.raises(ValueError, match=r"\(B, samples\), got shape \(8000,\)"):
        log_mel(torch.zeros(8000))
    with pytest.raises(TypeError, match="int16"):
        log_mel(torch.zeros(1, 8000, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(3,\)"):
        log_mel(torch.zeros(2, 8000), num_samples=torch.zeros(3))
    with pytest.raises(ValueError, match="frame_shift_ms=0"):
        log_mel(torch.zeros(2, 8000), frame_shift_ms=0.0)
    assert htk_log_mel(torch.zeros(0, 8000)).shape == (0, 33, 128)
    assert htk_log_mel(torch.zeros(2, 8000), num_mel_bins=40, n_fft=512, hop=160).shape == (2, 51, 40)
    with pytest.raises(ValueError, match=r"\(B, more than 400 samples\), got shape \(2, 400\)"):
        htk_log_mel(torch.zeros(2, 400))
    with pytest.raises(TypeError, match="int16"):
        htk_log_mel(torch.zeros(1, 8000, dtype=torch.int16))


@pytest.mark.parametrize("function", [log_mel, htk_log_mel])
def test_other_precisions_change_nothing(function) -> None:
    wave = waveform("chord")[None]
    want = function(wave)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(function(wave), want)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert (function(wave) - want).abs().max() <= 1e-4
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_gpu(name: str) -> None:
    """Bins more than 60 dB under the loudest of their frame hold rounding noise, which no two FFTs share."""
    wave = waveform(name)[None]
    for function, decade in ((log_mel, 2.3), (htk_log_mel, 1.0)):
        want = function(wave, sample_rate=RATES[name])
        torch.set_float32_matmul_precision("high")
        try:
            got = function(wave.cuda(), sample_rate=RATES[name]).cpu()
        finally:
            torch.set_float32_matmul_precision("highest")
        heard = want > want.amax(dim=2, keepdim=True) - 6 * decade
        assert (got - want)[heard].abs().max() <= 1e-4


# -- front end ------------------------------------------------------------------------------------------------------


def test_front_end_pads_before_it_normalises() -> None:
    frontend = KaldiFrontend(num_frames=64)
    wave = waveform("noise")[None]
    got = frontend.audio(wave, torch.tensor([len(wave[0])]))
    banks = log_mel(wave)[0]
    assert got.shape == (1, 64, 128)
    assert torch.allclose(got[0, : len(banks)], (banks + 5.081) / 4.485)
    assert torch.allclose(got[0, len(banks) :], torch.tensor(5.081 / 4.485))
    cut = KaldiFrontend(num_frames=20).audio(wave)
    assert torch.allclose(cut[0], got[0, :20], atol=1e-3)  # its mean is that of fewer samples
    assert frontend.audio(torch.zeros(0, 0)).shape == (0, 64, 128)
    assert torch.allclose(frontend.audio(torch.zeros(1, 0), torch.tensor([0])), torch.tensor(5.081 / 4.485))


def test_seconds_are_what_the_frames_read() -> None:
    frontend = KaldiFrontend()
    assert frontend.seconds == pytest.approx(10.255)
    assert log_mel(torch.zeros(1, frontend.num_samples)).shape[1] == 1024
    assert log_mel(torch.zeros(1, frontend.num_samples - 1)).shape[1] == 1023


def test_training_noise_and_shift() -> None:
    wave = waveform("noise").repeat(3, 1)
    key = DrawKey(seed=5, step=3, positions=(4, 0, 2), total=6)
    plain = KaldiFrontend(num_frames=64).audio(wave)
    shifted = KaldiFrontend(num_frames=64, noise=0.0).audio(wave, train=True, key=key)
    shifts = [next(s for s in range(64) if torch.equal(plain[0].roll(s, 0), row)) for row in shifted]
    assert len(set(shifts)) > 1
    noisy = KaldiFrontend(num_frames=64, time_shift=0).audio(wave, train=True, key=key) - plain
    assert noisy.min() >= -1e-6 and noisy.max() <= 0.1 + 1e-6
    for row in noisy:  # uniform between 0 and the clip's own amplitude
        assert row.mean() / row.max() == pytest.approx(0.5, abs=0.03)
    assert len({round(row.max().item(), 4) for row in noisy}) == 3
    assert torch.equal(KaldiFrontend(num_frames=64, noise=0.0, time_shift=0).audio(wave, train=True, key=key), plain)


def test_draws_follow_the_sample_not_the_batch() -> None:
    frontend = KaldiFrontend(num_frames=64)
    wave = torch.stack([waveform(name) for name in ("noise", "chord", "clicks")])
    whole = frontend.audio(wave, train=True, key=DrawKey(1, 7, (0, 1, 2), 3))
    part = frontend.audio(wave[1:], train=True, key=DrawKey(1, 7, (1, 2), 3))
    assert torch.equal(whole[1:], part)
    assert not torch.equal(whole, frontend.audio(wave, train=True, key=DrawKey(1, 8, (0, 1, 2), 3)))
    assert not torch.equal(whole, frontend.audio(wave, train=True, key=DrawKey(2, 7, (0, 1, 2), 3)))
    with pytest.raises(ValueError, match="3 positions, got one of 2"):
        frontend.audio(wave, train=True, key=DrawKey(1, 7, (1, 2), 3))
    with pytest.raises(ValueError, match="3 positions, got none"):
        frontend.audio(wave, train=True)


def test_pictures_in_and_out() -> None:
    frontend = KaldiFrontend(image_size=16)
    frames = torch.randint(0, 256, (2, 1, 3, 16, 16), dtype=torch.uint8)
    got = frontend.visual(frames)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    want = (frames[:, 0].float() / 255 - mean[:, None, None]) / std[:, None, None]
    assert got.dtype == torch.float32 and torch.allclose(got, want, atol=1e-6)
    assert torch.equal(frontend.visual(frames[:, 0]), got)  # one frame may come without its dimension
    for wrong in (frames[..., :8], frames[:, 0, 0], frames.expand(2, 5, 3, 16, 16)):
        with pytest.raises(ValueError, match=r"\(B, 1, 3, 16, 16\), got \(2, "):
            frontend.visual(wrong)
    with pytest.raises(TypeError, match="float32"):
        frontend.visual(frames.float())


def test_htk_front_end_drops_the_last_frame_and_mirrors_short_clips() -> None:
    frontend = HTKFrontend()
    assert (frontend.seconds, frontend.num_samples) == (3.0, 48000)
    wave = waveform("noise")
    got = frontend.audio(torch.nn.functional.pad(wave, (0, 90000))[None], torch.tensor([len(wave)]))
    whole = torch.cat([wave, wave.flip(0)]).repeat(5)[:48000]
    assert got.shape == (1, 192, 128) and torch.equal(got[0], htk_log_mel(whole[None])[0, :192])
    assert torch.equal(frontend.audio(wave[None]), got)  # all samples valid
    assert torch.equal(frontend.audio(whole.repeat(2)[None]), got)  # cut
    silent = frontend.audio(torch.zeros(2, 0), torch.tensor([0, 0]))
    assert torch.allclose(silent, torch.full((2, 192, 128), -7.0))
    assert torch.equal(frontend.audio(torch.ones(2, 10), torch.tensor([0, 10]))[0], silent[0])
    assert frontend.audio(torch.zeros(0, 0)).shape == (0, 192, 128)
    tiny = HTKFrontend(num_frames=64, num_mel_bins=32, image_size=16)
    assert tiny.audio(wave[None]).shape == (1, 64, 32) and tiny.seconds == 1.0


def test_htk_training_gain() -> None:
    wave = 0.1 * torch.stack([waveform("noise"), waveform("chord"), waveform("chord")])
    frontend = HTKFrontend(num_frames=32)
    key = DrawKey(seed=5, step=3, positions=(4, 0, 2), total=6)
    louder = frontend.audio(wave, train=True, key=key) - frontend.audio(wave)
    steady = louder[:, :30].flatten(1).median(1).values  # a gain is an offset wherever the floor is far below
    assert (louder[0, :, 20:] - steady[0]).abs().max() < 1e-3
    assert steady.abs().max() <= 0.6 and len({round(x, 3) for x in steady.tolist()}) == 3
    part = frontend.audio(wave[1:], train=True, key=DrawKey(5, 3, (0, 2), 6))
    assert torch.equal(part, frontend.audio(wave, train=True, key=key)[1:])
    loud = HTKFrontend(num_frames=32, gain_db=60.0).audio(wave.sign(), train=True, key=key)
    assert torch.equal(loud[steady > 0], frontend.audio(wave.sign())[steady > 0])  # clipped to [-1, 1]
    assert torch.equal(HTKFrontend(num_frames=32, gain_db=0.0).audio(wave, train=True, key=key), frontend.audio(wave))
    with pytest.raises(ValueError, match="3 positions, got none"):
        frontend.audio(wave, train=True)


def test_front_end_is_json_and_checks_its_arguments() -> None:
    import json

    frontend = KaldiFrontend(num_frames=200, image_size=64, std=8.97)
    assert KaldiFrontend(**json.loads(json.dumps(frontend.to_dict()))) == frontend != KaldiFrontend()
    for wrong in ({"num_frames": 0}, {"std": 0.0}, {"noise": -1.0}, {"time_shift": 2000}, {"image_size": 2.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            KaldiFrontend(**wrong)
    frontend = HTKFrontend(num_frames=100, gain_db=3.0)
    assert HTKFrontend(**json.loads(json.dumps(frontend.to_dict()))) == frontend != HTKFrontend()
    for wrong in ({"num_frames": 1}, {"hop": 0}, {"n_fft": 0.5}, {"gain_db": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            HTKFrontend(**wrong)


# Ten thousand keys are enough to see a distribution.
MANY = DrawKey(seed=3, step=9, positions=range(10_000), total=10_000)


def test_audio_mae_divides_by_twice_the_deviation() -> None:
    """So noise of variance 1 is four times as strong beside it as beside what is divided by the deviation alone."""
    wave = waveform("noise")[None]
    got = AudioMAEFrontend(num_frames=64).audio(wave)
    banks = log_mel(wave)[0]
    assert torch.allclose(got[0, : len(banks)], (banks + 4.268) / (2 * 4.569))
    assert torch.allclose(got[0, len(banks) :], torch.tensor(4.268 / (2 * 4.569)))  # padded before
    once = KaldiFrontend(num_frames=64, mean=-4.268, std=4.569).audio(wave)
    assert (once.var() / got.var()).item() == pytest.approx(4, rel=1e-5)
    assert AudioMAEFrontend().spec.frames is None


@pytest.fixture
def heard(monkeypatch):
    """What the filter banks are made of in training: a function of waveforms, their lengths, a key and settings."""
    seen: list[torch.Tensor] = []

    def listen(waveform: torch.Tensor, **_) -> torch.Tensor:
        seen.append(waveform)
        return torch.zeros(len(waveform), 0, 128)

    def hear(wave: torch.Tensor, valid: list[int], key: DrawKey, **settings) -> torch.Tensor:
        frontend = AudioMAEFrontend(num_frames=1 + wave.shape[1] // 160, **settings)
        frontend.audio(wave, torch.tensor(valid), train=True, key=key)
        return seen.pop()

    monkeypatch.setattr("avfast.data.frontend.log_mel", listen)
    return hear


def test_a_waveform_rolls_over_its_own_samples(heard) -> None:
    wave = torch.arange(3 * 4000, dtype=torch.float32).view(3, 4000) / 12000
    key = DrawKey(seed=5, step=3, positions=(4, 0, 2), total=6)
    valid = [4000, 2500, 0]
    got = heard(wave, valid, key)
    starts = []
    for row, source, count in zip(got, wave, valid, strict=True):
        start = int((source == row[0]).nonzero()) if count else 0
        starts.append(start)
        assert torch.equal(row[:count], source[:count].roll(-start)) and torch.equal(row[count:], source[count:])
    assert starts[0] > 0 and starts[1] > 0 and starts[0] != starts[1]
    assert torch.equal(heard(wave[1:], valid[1:], DrawKey(5, 3, (0, 2), 6)), got[1:])  # follows the sample
    assert torch.equal(heard(wave, valid, key, roll=False), wave)
    starts = heard(torch.arange(10.0).expand(10_000, 10), [10] * 10_000, MANY)[:, 0].int().bincount(minlength=10)
    assert len(starts) == 10 and (starts - 1000).abs().max() < 150  # every sample as often; the deviation is 30


def test_a_waveform_gains_a_beta_factor(heard) -> None:
    factors = heard(torch.ones(10_000, 1), [1] * 10_000, MANY, magnitude=True)[:, 0].double()
    assert 0.5 < factors.min() and factors.max() < 1.5
    # Beta(10, 10): mean 1/2, variance 1/84, kurtosis 3 - 6/23
    assert factors.mean().item() == pytest.approx(1, abs=0.005)
    assert factors.var().item() == pytest.approx(1 / 84, rel=0.06)
    z = (factors - factors.mean()) / factors.std()
    assert z.pow(4).mean().item() == pytest.approx(3 - 6 / 23, rel=0.08)


def test_noise_and_shift_of_fine_tuning_are_switches() -> None:
    wave, key = waveform("noise").repeat(2, 1), DrawKey(5, 3, (0, 1), 2)
    still = AudioMAEFrontend(num_frames=64, roll=False)
    assert torch.equal(still.audio(wave, train=True, key=key), still.audio(wave))
    both = AudioMAEFrontend(num_frames=64, roll=False, noise=0.1, time_shift=10).audio(wave, train=True, key=key)
    for row, plain in zip(both, still.audio(wave), strict=True):
        added = min((row - plain.roll(shift, 0) for shift in range(-10, 10)), key=lambda x: x.abs().max())
        assert -1e-6 <= added.min() and 0.01 < added.max() <= 0.1 + 1e-6


def test_mavil_sees_a_video_no_longer_than_it_hears() -> None:
    import json

    frontend = MAViLFrontend()
    assert (frontend.spec.frames, frontend.seconds) == (video(16, 4.0), pytest.approx(10.255))
    short = MAViLFrontend(num_frames=192, video_frames=4, image_size=16, magnitude=True)
    assert short.spec.frames == video(4, short.seconds) and short.seconds == pytest.approx(1.935)
    assert short.visual(torch.zeros(2, 4, 3, 16, 16, dtype=torch.uint8)).shape == (2, 3, 4, 16, 16)
    for each in (short, AudioMAEFrontend(std=3.26, roll=False)):
        assert type(each)(**json.loads(json.dumps(each.to_dict()))) == each != type(each)()
    for wrong, says in (({"video_seconds": 11.0}, "11.0 s does not fit"), ({"video_frames": 0}, "video_frames")):
        with pytest.raises(ValueError, match=says):
            MAViLFrontend(**wrong)
    with pytest.raises(TypeError, match="frames"):
        AudioMAEFrontend(frames=16)


if __name__ == "__main__":
    for each in NAMES:
        found = by_torchaudio(waveform(each), RATES[each]), htk_by_torchaudio(waveform(each), RATES[each])
        np.savez_compressed(STORED / f"{each}.npz", banks=found[0].numpy(), htk=found[1].numpy())
