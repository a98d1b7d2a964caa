"""What turns decoded audio and frames into the inputs of a model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from avfast.data.log_mel import LOW_HZ, frame_length, frame_shift, htk_log_mel, log_mel
from avfast.data.spec import ClipSpec, Frames, one, video
from avfast.random import DrawKey
from avfast.tensors import tensor_cache, to_device

if TYPE_CHECKING:
    from avfast.data.clips import Batch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@tensor_cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(3, 1, 1) float32."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")[:, None, None].to(device)


class Frontend:
    """What the front ends share: settings that survive JSON, checks, normalised frames.

    A subclass sets its constructor's arguments as attributes, and nothing else, and provides ``num_samples`` and
    ``_inputs``; ``frames`` where its model takes others than one frame, as in ``frames = video(8, 4.0)``.
    """

    num_frames: int
    num_mel_bins: int
    image_size: int
    sample_rate: int
    frames: Frames | None = one
    pixel_mean: tuple[float, ...] = IMAGENET_MEAN  # of red, green and blue in [0, 1]
    pixel_std: tuple[float, ...] = IMAGENET_STD
    low_hz: float = 0.0  # where the lowest mel bin begins; the highest ends at half the sample rate

    def _positive(self, **settings: int) -> None:
        for name, value in settings.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON: ``type(frontend)(**frontend.to_dict())`` is its equal."""
        return dict(vars(self))

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    @property
    def num_samples(self) -> int:
        """Waveform samples that ``num_frames`` frames read."""
        raise NotImplementedError

    @property
    def seconds(self) -> float:
        """How much audio a clip provides at most."""
        return self.num_samples / self.sample_rate

    @property
    def spec(self) -> ClipSpec:
        """What of a clip the model needs."""
        return ClipSpec(self.seconds, self.sample_rate, self.image_size, self.frames)

    def __call__(self, batch: Batch, *, train: bool = False, key: DrawKey | None = None) -> dict[str, Tensor]:
        """A model's inputs by name, on the batch's device: what :meth:`audio` and :meth:`visual` make of it.

        There is no ``visual`` for a model that only listens. A front end whose model takes others overrides this;
        training, evaluation and :meth:`load` ask for nothing else.
        """
        inputs = {"audio": self.audio(batch.waveform, batch.num_samples, train=train, key=key)}
        return inputs if self.frames is None else inputs | {"visual": self.visual(batch.frames)}

    def load(self, path: str | os.PathLike[str]) -> dict[str, Tensor]:
        """A media file as a model takes it: ``model.encode(**model.frontend.load("clip.mp4"))``.

        The window is that of evaluation: the first ``seconds`` of the file, and the frame in its middle (or what else
        ``spec.frames`` says).

        Returns:
            The inputs of a batch of one, on the CPU, without those that the file lacks: ``audio``
            ``(1, num_frames, num_mel_bins)`` and ``visual`` ``(1, 3, image_size, image_size)``, or what else the model
            takes.

        Raises:
            MediaError: the file cannot be decoded.
        """
        from avfast.data.clip_list import Clip, ClipList
        from avfast.data.clips import collate
        from avfast.data.dataset import ClipDataset, Failure
        from avfast.data.media import MediaError

        file = os.fspath(path)
        clips = ClipList((Clip(file, file, file),))
        sample = ClipDataset(clips, frontend=self, train=False)[0, 0, 0]
        if isinstance(sample, Failure):
            raise MediaError(sample.path, sample.reason)
        batch = collate([sample], spec=self.spec)
        absent = {name for name, has in batch.has.items() if not has.any()}
        return {name: x for name, x in self(batch).items() if name not in absent}

    def audio(
        self, waveform: Tensor, num_samples: Tensor | None = None, *, train: bool = False, key: DrawKey | None = None
    ) -> Tensor:
        """Spectrograms as the model takes them.

        Args:
            waveform: (B, S) floating point in [-1, 1], any S.
            num_samples: (B,) valid samples of each row; default: all.
            train: augments, as the constructor says.
            key: names the draws of ``train``: those of a sample depend on seed, step and position only (and on the kind
                of device), not on the rest of the batch. Its positions are those of the rows.

        Returns:
            (B, num_frames, num_mel_bins) float32 on the waveform's device.
        """
        if waveform.ndim != 2:
            raise ValueError(f"waveform: expected (B, samples), got shape {tuple(waveform.shape)}")
        if train and (key is None or len(key.positions) != len(waveform)):
            given = "none" if key is None else f"one of {len(key.positions)} positions"
            raise ValueError(f"key: train=True expects a DrawKey with {len(waveform)} positions, got {given}")
        if num_samples is not None:
            num_samples = to_device(num_samples, waveform.device).clamp(max=self.num_samples)
        return self._inputs(waveform[:, : self.num_samples], num_samples, key if train else None)

    def _inputs(self, waveform: Tensor, num_samples: Tensor | None, key: DrawKey | None) -> Tensor:
        """What ``audio`` returns; a waveform no longer than ``num_samples``, augmented where there is a key."""
        raise NotImplementedError

    def visual(self, frames: Tensor) -> Tensor:
        """A batch's frames as the model takes them: ``(x / 255 - pixel_mean) / pixel_std``, ImageNet's unless said.

        Args:
            frames: (B, F, 3, image_size, image_size) uint8, F as ``spec.frames`` says; where it is 1 it may be
                left out.

        Returns:
            float32, shaped by :meth:`avfast.data.spec.Frames.shaped`: (B, 3, H, W) of one frame, (B, 3, T, H, W) of a
            video, (B, T, 3, t, H, W) of clips.

        Raises:
            ValueError: another shape. TypeError: another dtype than uint8.
        """
        if self.frames is None:
            raise ValueError("frames: the model takes none")
        expected = (self.frames.count, 3, self.image_size, self.image_size)
        if frames.ndim == 4 and self.frames.count == 1:
            frames = frames[:, None]
        if frames.ndim != 5 or frames.shape[1:] != expected:
            raise ValueError(f"frames: expected (B, {', '.join(map(str, expected))}), got {tuple(frames.shape)}")
        if frames.dtype != torch.uint8:
            raise TypeError(f"frames: expected uint8, got {frames.dtype}")
        # into the model's order as bytes, and in place from there on: clips are a hundred times as large as one frame
        pixels = self.frames.shaped(frames).float()
        mean, std = (255 * _per_channel(x, frames.device) for x in (self.pixel_mean, self.pixel_std))
        if self.frames.kind != "even":
            mean, std = mean[:, None], std[:, None]  # time stands between channels and height
        return pixels.sub_(mean).div_(std)


class KaldiFrontend(Frontend):
    """Kaldi filter banks, padded and normalised, and ImageNet-normalised frames, as CAV-MAE and AVSiam use them.

    Args:
        num_frames: spectrogram frames; shorter clips are padded with zeros *before* normalisation, longer ones cut.
        num_mel_bins: mel bins.
        frame_shift_ms: milliseconds between frames.
        mean, std: of AudioSet's filter banks; the input is ``(x - mean) / std``.
        image_size: height and width of the frames.
        sample_rate: of the waveforms, in Hz.
        noise: in training, ``x + u * v * noise`` with u ~ U[0, 1) per element and v ~ U[0, 1) per clip is fed; 0 for
            none.
        time_shift: in training, the spectrogram (padding included) is rolled around by an integer from
            ``[-time_shift, time_shift)`` frames; default ``num_frames``, the released code's; 0 for none.
    """

    low_hz = LOW_HZ
    deviations = 1.0  # how many of them an input of 1 is

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
        self._positive(num_frames=num_frames, num_mel_bins=num_mel_bins, image_size=image_size, sample_rate=sample_rate)
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
        self.frame_shift_ms = frame_shift_ms
        self.mean = mean
        self.std = std
        self.noise = noise
        self.time_shift = time_shift

    @property
    def num_samples(self) -> int:
        shift = frame_shift(self.sample_rate, self.frame_shift_ms)
        return (self.num_frames - 1) * shift + frame_length(self.sample_rate)

    def _inputs(self, waveform: Tensor, num_samples: Tensor | None, key: DrawKey | None) -> Tensor:
        banks = log_mel(
            waveform,
            sample_rate=self.sample_rate,
            num_mel_bins=self.num_mel_bins,
            frame_shift_ms=self.frame_shift_ms,
            num_samples=num_samples,
        )
        banks = torch.nn.functional.pad(banks, (0, 0, 0, self.num_frames - banks.shape[1]))
        inputs = (banks - self.mean) / (self.deviations * self.std)
        return inputs if key is None else self._augment(inputs, key)

    def _augment(self, inputs: Tensor, key: DrawKey) -> Tensor:
        device = inputs.device
        seeds, drawn = key.bits("spectrogram", 3)[:, 0] >> 1, key.uniform("spectrogram", 3)
        if self.noise and len(drawn):
            # Drawn on the device, a generator per sample: 0.5 MB of host noise per clip would hold a GPU up.
            generator = torch.Generator(device)
            noise = torch.empty_like(inputs)
            for row, seed in zip(noise, seeds.tolist(), strict=True):
                row.uniform_(generator=generator.manual_seed(seed))
            scales = torch.from_numpy((drawn[:, 1] * self.noise).astype("float32"))
            inputs = inputs + noise * to_device(scales, device)[:, None, None]
        if self.time_shift:
            shifts = torch.from_numpy((drawn[:, 2] * 2 * self.time_shift).astype("int64") - self.time_shift)
            frames = torch.arange(self.num_frames, device=device)
            source = (frames - to_device(shifts, device)[:, None]) % self.num_frames
            inputs = inputs.gather(1, source[..., None].expand_as(inputs))
        return inputs


class AudioMAEFrontend(KaldiFrontend):
    """Filter banks over two standard deviations and no frames, as AudioMAE takes them.

    The input is ``(x - mean) / (2 std)``, so that data of that deviation have the variance 1/4. Where a model adds
    noise of variance 1, as DiffMAViL does, the factor sets the signal-to-noise ratio: a quarter of that of frames,
    whose variance is about 1, at the same timestep.

    DiffMAViL's Table 4 calls ``roll`` "R" and ``noise=0.1, time_shift=10`` "N". Its statistics of other data: VGGSound
    -5.189 and 3.260, ESC-50 -6.627 and 5.359, Speech Commands -6.702 and 5.448.

    Args:
        mean, std: of AudioSet's filter banks.
        noise, time_shift: as of :class:`KaldiFrontend`; none by default.
        roll: in training, the waveform begins at any of its samples and goes on from its end to its beginning.
            (AudioMAE's released code means to, but draws from the number of channels, one, and never rolls.)
        magnitude: in training, the waveform is scaled by a factor from Beta(10, 10) + 0.5, as AudioMAE's released code
            does wherever it rolls; DiffMAViL does not mention it.
        spectrogram: ``num_frames``, ``num_mel_bins``, ``frame_shift_ms``, ``image_size``, ``sample_rate`` of
            :class:`KaldiFrontend`.
    """

    frames: Frames | None = None
    deviations = 2.0

    def __init__(
        self,
        *,
        mean: float = -4.268,
        std: float = 4.569,
        noise: float = 0.0,
        time_shift: int = 0,
        roll: bool = True,
        magnitude: bool = False,
        **spectrogram: Any,
    ) -> None:
        super().__init__(mean=mean, std=std, noise=noise, time_shift=time_shift, **spectrogram)
        self.roll = roll
        self.magnitude = magnitude

    def _inputs(self, waveform: Tensor, num_samples: Tensor | None, key: DrawKey | None) -> Tensor:
        if key is not None and self.roll:
            waveform = self._rolled(waveform, num_samples, key)
        if key is not None and self.magnitude:
            # the tenth smallest of 19 uniform draws is distributed as Beta(10, 10)
            factors = torch.from_numpy(key.uniform("magnitude", 19)).sort(1).values[:, 9:10] + 0.5
            waveform = waveform * to_device(factors.to(waveform.dtype), waveform.device)
        return super()._inputs(waveform, num_samples, key)

    def _rolled(self, waveform: Tensor, num_samples: Tensor | None, key: DrawKey) -> Tensor:
        """Every row's valid samples from a drawn one on, and around; what lies beyond them stays."""
        batch, given = waveform.shape
        device = waveform.device
        valid = torch.full((batch,), given, device=device) if num_samples is None else num_samples.clamp(max=given)
        starts = to_device(torch.from_numpy((key.bits("roll", 1)[:, 0] >> 1).astype("int64")), device)
        place = torch.arange(given, device=device)
        source = (place + (starts % valid.clamp(min=1))[:, None]) % valid.clamp(min=1)[:, None]
        return waveform.gather(1, torch.where(place < valid[:, None], source, place))


class MAViLFrontend(AudioMAEFrontend):
    """:class:`AudioMAEFrontend` with a video beside it, as MAViL and DiffMAViL take it.

    Args:
        video_frames: of the video, T.
        video_seconds: it lasts; default 4, the papers', or the whole window where that is shorter.
        audio: as of :class:`AudioMAEFrontend`.
    """

    video_frames: int

    def __init__(self, *, video_frames: int = 16, video_seconds: float | None = None, **audio: Any) -> None:
        super().__init__(**audio)
        self._positive(video_frames=video_frames)
        self.video_seconds = min(4.0, self.seconds) if video_seconds is None else video_seconds
        self.spec  # noqa: B018  refuses a video that does not fit

    @property
    def frames(self) -> Frames:  # type: ignore[override]
        """The video's."""
        return video(self.video_frames, self.video_seconds)


class HTKFrontend(Frontend):
    """The logarithm of the mel power, not normalised, and ImageNet-normalised frames, as DeepAVFusion uses them.

    Of the ``1 + S // hop`` frames of a waveform the last is dropped, which leaves 192 of 3 s at the defaults. (The
    paper gives 196 frames and a hop of 15 ms; the released code has 192 and 15.625 ms, and its weights fit these.)

    Args:
        num_frames: spectrogram frames. A shorter clip is continued by itself, backwards and forwards in turn; a longer
            one is cut.
        num_mel_bins: mel bins.
        image_size: height and width of the frames.
        sample_rate: of the waveforms, in Hz.
        n_fft: samples in a frame.
        hop: samples between frames.
        gain_db: in training, the waveform is made louder or softer by up to so many decibels and clipped to [-1, 1].
    """

    n_fft: int
    hop: int

    def __init__(
        self,
        *,
        num_frames: int = 192,
        num_mel_bins: int = 128,
        image_size: int = 224,
        sample_rate: int = 16000,
        n_fft: int = 800,
        hop: int = 250,
        gain_db: float = 6.0,
    ) -> None:
        self._positive(
            num_frames=num_frames, num_mel_bins=num_mel_bins, image_size=image_size, sample_rate=sample_rate,
            n_fft=n_fft, hop=hop,
        )  # fmt: skip
        if self.num_samples <= n_fft // 2:
            raise ValueError(f"num_frames: {num_frames} of {hop} samples leave nothing to mirror at n_fft={n_fft}")
        if gain_db < 0:
            raise ValueError(f"gain_db: expected 0 or more, got {gain_db!r}")
        self.gain_db = gain_db

    @property
    def num_samples(self) -> int:
        return self.num_frames * self.hop

    def _inputs(self, waveform: Tensor, num_samples: Tensor | None, key: DrawKey | None) -> Tensor:
        waveform = self._continued(waveform, num_samples)
        if key is not None:
            decibels = (2 * key.uniform("gain", 1) - 1) * self.gain_db
            gains = to_device(torch.from_numpy((10 ** (decibels / 20)).astype("float32")), waveform.device)
            waveform = (waveform * gains.to(waveform.dtype)).clamp(-1, 1)
        banks = htk_log_mel(
            waveform, sample_rate=self.sample_rate, num_mel_bins=self.num_mel_bins, n_fft=self.n_fft, hop=self.hop
        )
        return banks[:, :-1]

    def _continued(self, waveform: Tensor, num_samples: Tensor | None) -> Tensor:
        """(B, num_samples): every row mirrored at its end until it is long enough; zeros where there is no sample."""
        batch, given = waveform.shape
        if given == 0:
            return waveform.new_zeros(batch, self.num_samples)
        if num_samples is None:
            num_samples = torch.full((batch,), given, device=waveform.device)
        place = torch.arange(self.num_samples, device=waveform.device) % (2 * num_samples.clamp(min=1)[:, None])
        place = torch.minimum(place, 2 * num_samples[:, None] - 1 - place).clamp(min=0)
        return waveform.gather(1, place) * (num_samples > 0)[:, None]
