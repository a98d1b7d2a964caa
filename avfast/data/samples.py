"""Decoded audio as one channel of samples, at any rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from av import AudioFrame


def mono(frame: AudioFrame) -> np.ndarray:
    """(samples,) float32, the mean of the channels."""
    data = frame.to_ndarray()
    if not frame.format.is_planar:
        data = data.reshape(frame.samples, -1).T
    if data.dtype.kind != "f":
        bits = 8 * data.dtype.itemsize
        offset = 128 if data.dtype.kind == "u" else 0
        return ((data.mean(axis=0) - offset) / 2.0 ** (bits - 1)).astype(np.float32)
    return data.mean(axis=0).astype(np.float32, copy=False)


def resample(samples: np.ndarray, rate: int, to: int) -> np.ndarray:
    """(samples,) float32 of ``rate`` Hz at ``to`` Hz, by FFmpeg's resampler."""
    import av

    if rate == to or len(samples) == 0:
        return samples
    frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=to)
    return np.concatenate([out.to_ndarray()[0] for out in [*resampler.resample(frame), *resampler.resample(None)]])
