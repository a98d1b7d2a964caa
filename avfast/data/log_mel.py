"""Log-mel filter banks of a batch of waveforms: Kaldi's, and the plain mel spectrogram of DeepAVFusion.

:func:`log_mel`. The field's spectrograms (AST, CAV-MAE, AudioMAE, AVSiam, MAViL) are
``torchaudio.compliance.kaldi.fbank`` with ``htk_compat=True, use_energy=False, window_type="hanning",
num_mel_bins=128, dither=0.0, frame_shift=10`` after the mean of each waveform was taken off. Definition, per frame of
25 ms (frames that do not fit entirely are dropped):

    x <- x - mean(x);   x[n] <- x[n] - 0.97 x[n-1]  (x[-1] = x[0]);   x <- x * hann(n), symmetric
    power of the real DFT of x, zero-padded to the next power of two;   triangles, equally wide and overlapping by
    half on the scale 1127 ln(1 + f/700) between 20 Hz and half the sample rate;   log(max(., eps of float32))

:func:`htk_log_mel`. DeepAVFusion's are ``torchaudio.transforms.MelSpectrogram`` with its defaults:

    frames centred at multiples of the hop, the waveform mirrored at its ends;   Hann window, periodic;   power of the
    real DFT;   triangles on the scale 2595 log10(1 + f/700) from 0 Hz to half the sample rate;   log10(. + 1e-7)

AVBERT's are the same up to the logarithm: ln(. + 1e-6).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from avfast.tensors import tensor_cache

_FRAME_MS = 25.0
LOW_HZ = 20.0
_PREEMPHASIS = 0.97
_FLOOR = torch.finfo(torch.float32).eps


def frame_length(sample_rate: int) -> int:
    """Samples in a frame of 25 ms."""
    return int(sample_rate * _FRAME_MS / 1000)


def frame_shift(sample_rate: int, frame_shift_ms: float) -> int:
    """Samples between the beginnings of two frames."""
    return int(sample_rate * frame_shift_ms / 1000)


def log_mel(
    waveform: Tensor,
    *,
    sample_rate: int = 16000,
    num_mel_bins: int = 128,
    frame_shift_ms: float = 10.0,
    num_samples: Tensor | None = None,
) -> Tensor:
    """Log-mel filter banks, in float32 on the waveform's device whatever autocast says.

    Args:
        waveform: (B, S) floating point, full scale [-1, 1]. Its mean is taken off per clip.
        sample_rate: of the waveform, in Hz.
        num_mel_bins: M.
        frame_shift_ms: milliseconds between frames.
        num_samples: (B,) valid samples of each row, for clips of unequal length; what lies beyond is not read.

    Returns:
        (B, T, M) float32 with ``T = 1 + (S - frame) // shift`` (0 if S is shorter than a frame). Frames beyond a clip's
        own count are 0: the field pads with zeros before it normalises.

    Raises:
        ValueError: a shape or a setting that makes no sense. TypeError: a waveform of integers.
    """
    if waveform.ndim != 2:
        raise ValueError(f"waveform: expected (B, samples), got shape {tuple(waveform.shape)}")
    if not waveform.is_floating_point():
        raise TypeError(f"waveform: expected floating point in [-1, 1], got {waveform.dtype}")
    batch, samples = waveform.shape
    if num_samples is not None and num_samples.shape != (batch,):
        raise ValueError(f"num_samples: expected shape ({batch},), got {tuple(num_samples.shape)}")
    length, shift = frame_length(sample_rate), frame_shift(sample_rate, frame_shift_ms)
    if length < 2 or shift < 1 or num_mel_bins < 4:
        raise ValueError(
            f"expected a frame of 2 samples, a shift of 1 and 4 mel bins at least, got {length}, {shift} and "
            f"{num_mel_bins} (sample_rate={sample_rate}, frame_shift_ms={frame_shift_ms})"
        )
    if samples < length or batch == 0:
        return waveform.new_zeros(
            (batch, 1 + (samples - length) // shift if samples >= length else 0, num_mel_bins)
        ).float()
    with torch.autocast(waveform.device.type, enabled=False):
        wave = waveform.float()
        if num_samples is None:
            wave = wave - wave.mean(dim=1, keepdim=True)
        else:
            valid = torch.arange(samples, device=wave.device) < num_samples[:, None]
            mean = (wave * valid).sum(dim=1, keepdim=True) / num_samples.clamp(min=1)[:, None]
            wave = torch.where(valid, wave - mean, 0.0)
        # One clip at a time stays in a CPU's cache: three times as fast as one large batch.
        rows = wave.split(1) if wave.device.type == "cpu" else [wave]
        mel = torch.cat([_filter_banks(row, sample_rate, num_mel_bins, length, shift) for row in rows])
        if num_samples is not None:
            own = torch.where(num_samples >= length, 1 + (num_samples - length) // shift, 0)
            mel = mel * (torch.arange(mel.shape[1], device=mel.device) < own[:, None])[..., None]
    return mel


def _filter_banks(wave: Tensor, sample_rate: int, num_mel_bins: int, length: int, shift: int) -> Tensor:
    """(B, S) -> (B, T, num_mel_bins). Bins far below the loudest hold float32 rounding noise, which only the same
    operations in the same order reproduce: hence torchaudio's."""
    frames = wave.unfold(1, length, shift)
    frames = frames - frames.mean(dim=2, keepdim=True)
    frames = frames - _PREEMPHASIS * torch.cat([frames[..., :1], frames[..., :-1]], dim=2)
    frames *= torch.hann_window(length, periodic=False, dtype=torch.float32, device=wave.device)
    fft_size = 2 ** math.ceil(math.log2(length))
    power = torch.fft.rfft(frames, n=fft_size).abs().square()
    banks = _product(power, _triangles(num_mel_bins, fft_size, sample_rate, wave.device))
    return banks.clamp(min=_FLOOR).log().float()


def _product(power: Tensor, triangles: Tensor) -> Tensor:
    exact = power.dtype if _products_are_exact() else torch.float64
    return power.to(exact) @ triangles.to(exact)


def _products_are_exact() -> bool:
    """False where the user allows TF32 or bf16 matrix products for a model: they would cost three digits here."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set per backend, through the newer switches
        return False


@tensor_cache
def _triangles(num_mel_bins: int, fft_size: int, sample_rate: int, device: torch.device) -> Tensor:
    """(fft_size / 2 + 1, num_mel_bins) weights, rounded to float32 at every step as the oracle's are."""

    def to_mel(hertz: float) -> float:
        return 1127.0 * math.log(1.0 + hertz / 700.0)

    low, high = to_mel(LOW_HZ), to_mel(sample_rate / 2)
    step = (high - low) / (num_mel_bins + 1)
    index = torch.arange(num_mel_bins, dtype=torch.float32, device="cpu")
    left, centre, right = low + index * step, low + (index + 1.0) * step, low + (index + 2.0) * step
    hertz = sample_rate / fft_size * torch.arange(fft_size // 2, dtype=torch.float32, device="cpu")
    mel = (1127.0 * torch.log(1.0 + hertz / 700.0))[:, None]
    weights = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp(min=0.0)
    return torch.cat([weights, weights.new_zeros(1, num_mel_bins)]).to(device)  # Kaldi leaves out the Nyquist bin


def htk_log_mel(
    waveform: Tensor,
    *,
    sample_rate: int = 16000,
    num_mel_bins: int = 128,
    n_fft: int = 800,
    hop: int = 250,
    floor: float = 1e-7,
    natural: bool = False,
) -> Tensor:
    """Logarithm of the mel power, in float32 on the waveform's device whatever autocast says.

    Args:
        waveform: (B, S) floating point, more than ``n_fft // 2`` samples (its ends are mirrored).
        sample_rate: of the waveform, in Hz.
        num_mel_bins: M.
        n_fft: samples in a frame.
        hop: samples between the centres of two frames.
        floor: added to the power.
        natural: the natural logarithm instead of that to base 10.

    Returns:
        (B, 1 + S // hop, M) float32.

    Raises:
        ValueError: a shape that makes no sense. TypeError: a waveform of integers.
    """
    if waveform.ndim != 2 or waveform.shape[1] <= n_fft // 2:
        raise ValueError(f"waveform: expected (B, more than {n_fft // 2} samples), got shape {tuple(waveform.shape)}")
    if not waveform.is_floating_point():
        raise TypeError(f"waveform: expected floating point in [-1, 1], got {waveform.dtype}")
    if len(waveform) == 0:
        return waveform.new_zeros(0, 1 + waveform.shape[1] // hop, num_mel_bins).float()
    triangles = _htk_triangles(num_mel_bins, n_fft, sample_rate, waveform.device)
    with torch.autocast(waveform.device.type, enabled=False):
        wave = waveform.float()
        window = torch.hann_window(n_fft, dtype=torch.float32, device=wave.device)
        rows = wave.split(1) if wave.device.type == "cpu" else [wave]  # as in log_mel
        found = []
        for row in rows:
            spectrum = torch.stft(row, n_fft, hop, window=window, center=True, pad_mode="reflect", return_complex=True)
            power = _product(spectrum.abs().square().mT, triangles) + floor
            found.append((power.log() if natural else power.log10()).float())
    return torch.cat(found)


@tensor_cache
def _htk_triangles(num_mel_bins: int, n_fft: int, sample_rate: int, device: torch.device) -> Tensor:
    """(n_fft / 2 + 1, num_mel_bins) weights, sides straight over hertz, heights 1; narrow ones may miss every bin."""
    top = 2595.0 * math.log10(1.0 + sample_rate / 2 / 700.0)
    plain: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    edges = 700.0 * (10.0 ** (torch.linspace(0.0, top, num_mel_bins + 2, **plain) / 2595.0) - 1.0)
    hertz = torch.linspace(0.0, sample_rate / 2, n_fft // 2 + 1, **plain)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    weights = torch.minimum((hertz - left) / (centre - left), (right - hertz) / (right - centre)).clamp(min=0.0)
    return weights.to(device)
