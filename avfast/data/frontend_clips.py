"""The front end of AVBERT: a window cut into clips without a gap, each with a spectrogram and a video of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from avfast.data.frontend import Frontend
from avfast.data.log_mel import htk_log_mel
from avfast.data.spec import Frames, clips
from avfast.random import DrawKey
from avfast.tensors import to_device

_FLOOR = 1e-6


class ClipsFrontend(Frontend):
    """T clips, one after the other: log-mel spectrograms and videos of ``clip_seconds`` each, as AVBERT takes them.

    The clips of a sample lie in one window, so they share its place in the file (drawn in training, the same for sound
    and pictures), crop and flip. A file that ends before the window goes on in silence and with its last frame.

    The filter banks are those of :func:`avfast.data.log_mel.htk_log_mel`, ln(power + 1e-6), of each clip alone, with a
    frame every ``samples // num_frames + 1`` samples: 201 for 220 frames of a second at 44.1 kHz. This is the released
    code's rule; the paper gives 220 frames and 128 mel bins, not how they are made. Where it ends in fewer frames than
    ``num_frames``, the others are 0.

    Deviations: the released code takes 80 bins and 128 frames of 64 / 30 s (``num_frames=128, num_mel_bins=80,
    clip_seconds=64 / 30, masked_share=0.05``). Its clips overlap where it fine-tunes; these never do.

    Args:
        num_clips: T. The paper takes 30 of Kinetics-700, 10 of AudioSet.
        clip_seconds: of one clip.
        num_frames: spectrogram frames of a clip.
        num_mel_bins: mel bins.
        frames_per_clip: video frames of a clip, t, evenly spread over it.
        image_size: height and width of the frames.
        sample_rate: of the waveforms, in Hz; the released code's. (The paper's is not known.)
        n_fft: samples in a spectrogram frame; default, as in the released code, two times the distance between frames.
            With the paper's numbers 16 of the 128 mel bins then lie between two lines of the spectrum and hold
            nothing; ``n_fft=2048`` fills them.
        mean, std: the spectrograms fed are ``(x - mean) / std``; not normalised by default, as released.
        masked_share: in training, a band of up to this share of the mel bins and a stretch of up to this share of the
            frames are 0, the same in all clips of a sample; the paper does not mention it, the released code has 0.05.
        pixel_mean, pixel_std: of red, green and blue in [0, 1]; the released code's by default, the paper names none.
    """

    num_clips: int
    frames_per_clip: int
    n_fft: int

    def __init__(
        self,
        *,
        num_clips: int = 30,
        clip_seconds: float = 1.0,
        num_frames: int = 220,
        num_mel_bins: int = 128,
        frames_per_clip: int = 32,
        image_size: int = 112,
        sample_rate: int = 44100,
        n_fft: int | None = None,
        mean: float = 0.0,
        std: float = 1.0,
        masked_share: float = 0.0,
        pixel_mean: Sequence[float] = (0.45, 0.45, 0.45),
        pixel_std: Sequence[float] = (0.225, 0.225, 0.225),
    ) -> None:
        self._positive(
            num_clips=num_clips, num_frames=num_frames, num_mel_bins=num_mel_bins, frames_per_clip=frames_per_clip,
            image_size=image_size, sample_rate=sample_rate,
        )  # fmt: skip
        self.clip_seconds = clip_seconds
        if self.clip_samples < 1:
            raise ValueError(f"clip_seconds: expected at least one sample of {sample_rate} Hz, got {clip_seconds} s")
        if n_fft is None:
            n_fft = 2 * self.hop
        self._positive(n_fft=n_fft)
        if not n_fft // 2 < self.clip_samples:
            raise ValueError(
                f"clip_seconds: {clip_seconds} s of {sample_rate} Hz are too few samples for n_fft={n_fft}"
            )
        if not std > 0:
            raise ValueError(f"std: expected a positive number, got {std!r}")
        if not 0 <= masked_share <= 1:
            raise ValueError(f"masked_share: expected 0 .. 1, got {masked_share!r}")
        self.mean = mean
        self.std = std
        self.masked_share = masked_share
        self.pixel_mean, self.pixel_std = tuple(pixel_mean), tuple(pixel_std)
        for name in ("pixel_mean", "pixel_std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name}: expected 3 numbers, for red, green and blue, got {getattr(self, name)}")
        if min(self.pixel_std) <= 0:
            raise ValueError(f"pixel_std: expected positive numbers, got {self.pixel_std}")

    @property
    def frames(self) -> Frames:  # type: ignore[override]
        """The clips'."""
        return clips(self.num_clips, self.frames_per_clip)

    @property
    def clip_samples(self) -> int:
        """Waveform samples of one clip."""
        return round(self.clip_seconds * self.sample_rate)

    @property
    def hop(self) -> int:
        """Samples from one spectrogram frame to the next."""
        return self.clip_samples // self.num_frames + 1

    @property
    def num_samples(self) -> int:
        return self.num_clips * self.clip_samples

    def _inputs(self, waveform: Tensor, num_samples: Tensor | None, key: DrawKey | None) -> Tensor:
        if num_samples is not None:
            place = torch.arange(waveform.shape[1], device=waveform.device)
            waveform = torch.where(place < num_samples[:, None], waveform, 0.0)
        waveform = torch.nn.functional.pad(waveform, (0, self.num_samples - waveform.shape[1]))
        banks = htk_log_mel(
            waveform.reshape(-1, self.clip_samples),
            sample_rate=self.sample_rate, num_mel_bins=self.num_mel_bins, n_fft=self.n_fft, hop=self.hop,
            floor=_FLOOR, natural=True,
        )[:, : self.num_frames]  # fmt: skip
        inputs = banks.sub_(self.mean).div_(self.std)
        inputs = torch.nn.functional.pad(inputs, (0, 0, 0, self.num_frames - inputs.shape[1]))
        inputs = inputs.unflatten(0, (len(waveform), self.num_clips))
        return inputs if key is None or not self.masked_share else self._masked(inputs, key)

    def _masked(self, inputs: Tensor, key: DrawKey) -> Tensor:
        """With a band of mel bins and a stretch of frames of each sample set to 0: their sizes uniform, then where."""
        drawn = torch.from_numpy(key.uniform("spectrogram mask", 4))
        for axis, (size, where) in ((2, drawn[:, :2].T), (3, drawn[:, 2:].T)):
            total = inputs.shape[axis]
            most = int(self.masked_share * total + 1e-9)  # 0.29 of 100 is 29
            size = (size * (most + 1)).long()
            first = (where * (total - size + 1)).long()
            first, last = (to_device(x, inputs.device)[:, None] for x in (first, first + size))
            place = torch.arange(total, device=inputs.device)
            masked = (first <= place) & (place < last)
            inputs = inputs.masked_fill(masked[:, None, :, None] if axis == 2 else masked[:, None, None, :], 0.0)
        return inputs
