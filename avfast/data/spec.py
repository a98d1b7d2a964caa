"""What a model wants of a clip: how long a window of it, and which of its frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING, Literal

from torch import Tensor

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Frames:
    """Which frames of a clip's window a model sees; made by :data:`one`, :func:`even`, :func:`video`, :func:`clips`.

    Attributes:
        kind: which of them; ``one`` is ``even(1)``.
        shape: ``(F,)``, of clips ``(T, t)``.
        seconds: that a video lasts; 0 for the whole window.
    """

    kind: Literal["even", "video", "clips"]
    shape: tuple[int, ...]
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise ValueError(f"{self.kind}: expected at least 1 frame, got {' x '.join(map(str, self.shape))}")
        if self.kind == "video" and not self.seconds > 0:
            raise ValueError(f"video: expected more than 0 seconds, got {self.seconds}")

    @property
    def count(self) -> int:
        """Frames of a clip in all, F."""
        return prod(self.shape)

    def shaped(self, frames: Tensor) -> Tensor:
        """``(B, F, 3, H, W)`` as models take it.

        Returns:
            ``(B, 3, H, W)`` of one frame, ``(B, F, 3, H, W)`` of several even ones, ``(B, 3, T, H, W)`` of a video,
            ``(B, T, 3, t, H, W)`` of clips; contiguous.
        """
        if self.kind == "even":
            return frames.squeeze(1) if self.count == 1 else frames
        return frames.unflatten(1, self.shape).transpose(-4, -3).contiguous()


def even(count: int) -> Frames:
    """One frame of each of ``count`` equal parts of the window: its middle, in training any place in it."""
    return Frames("even", (count,))


def video(count: int, seconds: float) -> Frames:
    """``count`` frames, ``seconds / count`` apart: of the middle of the window, in training of any place in it."""
    return Frames("video", (count,), seconds)


def clips(count: int, frames: int) -> Frames:
    """``count`` clips that fill the window without a gap, of ``frames`` frames each, all equally far apart."""
    return Frames("clips", (count, frames))


one = even(1)  # of the middle of the window, in training of any place in it

# where the window starts in what it can choose from, where a video in the window, each frame in its part; in [0, 1)
Draw = tuple[float, float, Sequence[float]]


@dataclass(frozen=True)
class ClipSpec:
    """What a model's front end needs of a clip; all that a data set knows of the model.

    Args:
        seconds: of the window.
        sample_rate: of its audio, in Hz.
        image_size: height and width of its frames.
        frames: which; None for a model that only listens.
    """

    seconds: float
    sample_rate: int
    image_size: int
    frames: Frames | None = one

    def __post_init__(self) -> None:
        if self.frames is not None and self.frames.seconds > self.seconds:
            raise ValueError(f"a video of {self.frames.seconds} s does not fit a window of {self.seconds:.3f} s")

    @property
    def num_frames(self) -> int:
        """Frames of a clip, F."""
        return 0 if self.frames is None else self.frames.count

    def draw(self, rng: np.random.Generator | None) -> Draw:
        """The random choices of a clip; without a generator those of evaluation."""
        middles = [0.5] * self.num_frames
        if rng is None:
            return 0.0, 0.5, middles
        start = rng.random()
        if self.frames is not None and self.frames.kind == "even":
            return start, 0.0, rng.random(self.num_frames).tolist()
        return start, rng.random(), middles

    def window(self, duration: float, draw: Draw) -> tuple[float, list[float]]:
        """Where the window starts and the times of the frames, in seconds of a clip of ``duration`` seconds.

        Even frames are spread over what there is of the window; those of a video and of clips keep their distance, and
        where the clip ends before them they show its end.
        """
        start = draw[0] * max(duration - self.seconds, 0.0)
        length = min(self.seconds, duration - start)
        shares = [(i + place) / self.num_frames for i, place in enumerate(draw[2])]
        if self.frames is None or self.frames.kind == "even":
            return start, [start + length * share for share in shares]
        stretch = self.frames.seconds or self.seconds
        first = start + draw[1] * max(length - stretch, 0.0)
        return start, [min(first + stretch * share, start + length) for share in shares]

    def enough(self, duration: float, least: int) -> int:
        """How many frames, evenly spread over a clip, are as dense as the model's own; ``least`` or more."""
        if self.frames is None or self.frames.kind == "even":
            return max(least, self.num_frames)
        return max(least, ceil(duration * self.num_frames / (self.frames.seconds or self.seconds)))
