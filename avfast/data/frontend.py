"""What turns decoded sound and pictures into the inputs of AVSiam and CAV-MAE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from avfast.data.log_mel import frame_length, frame_shift, log_mel
from avfast.masking import DrawKey

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class KaldiFrontend:
    """Kaldi filter banks, padded and normalised, and ImageNet-normalised pictures, as CAV-MAE and AVSiam use them.

    Args:
        num_frames: spectrogram frames; shorter clips are padded with zeros *before* normalisation, longer ones cut.
        num_mel_bins: mel bins.
        frame_shift_ms: milliseconds between frames.
        mean, std: of AudioSet's filter banks; the input is ``(x - mean) / std`` (AST and AudioMAE divide by 2 std).
        image_size: height and width of the pictures.
        sample_rate: of the waveforms, in Hz.
        noise: in training, ``x + u * v * noise`` with u ~ U[0, 1) per element and v ~ U[0, 1) per clip is fed; 0 for
            none.
        time_shift: in training, the spectrogram (padding included) is rolled around by an integer from
            ``[-time_shift, time_shift)`` frames; default ``num_frames``, the released code's; 0 for none.
    """

    def __init__(
        self,
        *,
        num_frames: int = 1024,
        num_mel_bins: int = 128,
        frame_shift_ms: float = 10.0,
        mean: float = -5.081,
        std: float = 4.485,
        image_size: int = 224,
        sample_rate: int = 16000,
        noise: float = 0.1,
        time_shift: int | None = None,
    ) -> None:
        settings = {
            "num_frames": num_frames,
            "num_mel_bins": num_mel_bins,
            "image_size": image_size,
            "sample_rate": sample_rate,
        }
        for name, value in settings.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if frame_shift(sample_rate, frame_shift_ms) < 1 or frame_length(sample_rate) < 2:
            raise ValueError(f"no spectrogram frame fits: sample_rate={sample_rate}, frame_shift_ms={frame_shift_ms}")
        if not std > 0:
            raise ValueError(f"std: expected a positive number, got {std!r}")
        if noise < 0:
            raise ValueError(f"noise: expected 0 or more, got {noise!r}")
        if time_shift is None:
            time_shift = num_frames
        if not 0 <= time_shift <= num_frames:
            raise ValueError(f"time_shift: expected 0 .. num_frames ({num_frames}), got {time_shift!r}")
        self.num_frames = num_frames
        self.num_mel_bins = num_mel_bins
        self.frame_shift_ms = frame_shift_ms
        self.mean = mean
        self.std = std
        self.image_size = image_size
        self.sample_rate = sample_rate
        self.noise = noise
        self.time_shift = time_shift

    def to_dict(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON: ``KaldiFrontend(**frontend.to_dict())`` is its equal."""
        return dict(vars(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KaldiFrontend) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))

    def __repr__(self) -> str:
        return f"KaldiFrontend({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    @property
    def num_samples(self) -> int:
        """Waveform samples that ``num_frames`` frames read."""
        return (self.num_frames - 1) * frame_shift(self.sample_rate, self.frame_shift_ms) + frame_length(
            self.sample_rate
        )

    @property
    def seconds(self) -> float:
        """How much sound a clip provides at most."""
        return self.num_samples / self.sample_rate

    def audio(
        self, waveform: Tensor, num_samples: Tensor | None = None, *, train: bool = False, key: DrawKey | None = None
    ) -> Tensor:
        """Normalised spectrograms.

        Args:
            waveform: (B, S) floating point in [-1, 1], any S.
            num_samples: (B,) valid samples of each row; default: all.
            train: adds noise and rolls in time, as the constructor says.
            key: names the draws of ``train``: those of a sample depend on seed, step and position only (and on the kind
                of device), not on the rest of the batch. Its positions are those of the rows.

        Returns:
            (B, num_frames, num_mel_bins) float32 on the waveform's device.
        """
        if waveform.ndim != 2:
            raise ValueError(f"waveform: expected (B, samples), got shape {tuple(waveform.shape)}")
        if num_samples is not None:
            num_samples = num_samples.to(waveform.device).clamp(max=self.num_samples)
        banks = log_mel(
            waveform[:, : self.num_samples],
            sample_rate=self.sample_rate,
            num_mel_bins=self.num_mel_bins,
            frame_shift_ms=self.frame_shift_ms,
            num_samples=num_samples,
        )
        banks = torch.nn.functional.pad(banks, (0, 0, 0, self.num_frames - banks.shape[1]))
        inputs = (banks - self.mean) / self.std
        if not train:
            return inputs
        if key is None or len(key.positions) != len(inputs):
            given = "none" if key is None else f"one of {len(key.positions)} positions"
            raise ValueError(f"key: train=True expects a DrawKey with {len(inputs)} positions, got {given}")
        return self._augment(inputs, key)

    def _augment(self, inputs: Tensor, key: DrawKey) -> Tensor:
        device = inputs.device
        rngs = [key.generator("spectrogram", position) for position in key.positions]
        seeds = [int(rng.integers(2**63)) for rng in rngs]
        scales = [float(rng.random()) * self.noise for rng in rngs]
        shifts = [int(rng.integers(-self.time_shift, self.time_shift)) if self.time_shift else 0 for rng in rngs]
        if self.noise and rngs:
            # Drawn on the device, a generator per sample: 0.5 MB of host noise per clip would hold a GPU up.
            generator = torch.Generator(device)
            noise = torch.empty_like(inputs)
            for row, seed in zip(noise, seeds, strict=True):
                row.uniform_(generator=generator.manual_seed(seed))
            inputs = inputs + noise * torch.tensor(scales, dtype=inputs.dtype).to(device)[:, None, None]
        if self.time_shift:
            frames = torch.arange(self.num_frames, device=device)
            source = (frames - torch.tensor(shifts, dtype=torch.long).to(device)[:, None]) % self.num_frames
            inputs = inputs.gather(1, source[..., None].expand_as(inputs))
        return inputs

    def visual(self, frames: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) or (B, F, 3, H, W) -> float32 of that shape, with ImageNet's mean and deviation taken off.

        Raises:
            ValueError: another shape than ``image_size``. TypeError: another dtype than uint8.
        """
        size = self.image_size
        if frames.ndim not in (4, 5) or frames.shape[-3:] != (3, size, size):
            raise ValueError(
                f"frames: expected (B, 3, {size}, {size}) or (B, F, 3, {size}, {size}), got {tuple(frames.shape)}"
            )
        if frames.dtype != torch.uint8:
            raise TypeError(f"frames: expected uint8, got {frames.dtype}")
        mean = 255 * torch.tensor(IMAGENET_MEAN, device=frames.device)[:, None, None]
        std = 255 * torch.tensor(IMAGENET_STD, device=frames.device)[:, None, None]
        return (frames.float() - mean) / std

    def visual_to_uint8(self, frames: Tensor) -> Tensor:
        """Undoes :meth:`visual`, rounded and clipped to uint8, for pictures."""
        mean = torch.tensor(IMAGENET_MEAN, device=frames.device)[:, None, None]
        std = torch.tensor(IMAGENET_STD, device=frames.device)[:, None, None]
        return (255 * (frames.float() * std + mean)).round().clamp(0, 255).byte()
