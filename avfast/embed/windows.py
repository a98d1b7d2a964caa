"""Clips of any length, read as windows of what a model looks at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from avfast.data.augment import eval_crop
from avfast.data.clip_list import Clip, ClipList
from avfast.data.dataset import ClipDataset, Failure, Item, Sample
from avfast.data.media import MediaError
from avfast.data.spec import ClipSpec, Draw

Modality = Literal["audio", "visual", "both"]
_LEFT_OVER = 0.05  # share of a window that a clip may go on after the last one, without one of its own


def window_starts(duration: float, seconds: float, hop: float) -> list[float]:
    """Where the windows of a clip start: ``hop`` apart, and the last one ends with the clip.

    A clip no longer than a window has one, from its start. What goes on for less than 5 % of a window after one gets
    no further one.

    Args:
        duration: of the clip, in seconds.
        seconds: of a window.
        hop: seconds from one window to the next.
    """
    starts = [0.0]
    while (start := len(starts) * hop) + seconds <= duration:
        starts.append(start)
    if duration - (starts[-1] + seconds) > _LEFT_OVER * seconds:
        starts.append(duration - seconds)
    return starts


class Windows(ClipDataset):
    """All windows of clips, without augmentation: a clip asked for gives as many samples, told by their ``start``.

    A clip's windows are in memory at once.

    Args:
        clip_list: the clips; their classes are not read.
        spec: what the model wants of a window.
        modality: ``"audio"`` or ``"visual"`` leaves the other one undecoded.
        hop: see :func:`window_starts`.
    """

    def __init__(self, clip_list: ClipList, *, spec: ClipSpec, modality: Modality, hop: float) -> None:
        super().__init__(replace(clip_list, class_names=()), frontend=spec, train=False)
        self.modality = modality
        self.hop = hop

    def __getitems__(self, items: Sequence[Item]) -> list[Sample | Failure]:
        """The windows of several clips (the hook of torch's DataLoader)."""
        return [sample for item in items for sample in self.windows(item)]

    def windows(self, item: Item) -> list[Sample | Failure]:
        """Those of a clip, or why there are none."""
        index, step, position = item
        starts: list[float] = []

        def draws(duration: float) -> list[Draw]:
            found, room = [], duration - self.spec.seconds
            for start in window_starts(duration, self.spec.seconds, self.hop):
                found.append((start / room if start else 0.0, *self.spec.draw(None)[1:]))
            starts[:] = [self.spec.window(duration, draw)[0] for draw in found]
            return found

        try:
            cuts = zip(self._decode_windows(self._clip(index), draws), starts, strict=True)
            samples: list[Sample | Failure] = [
                Sample(index, step, position, waveform, frames, (), short, truncated, start)
                for (waveform, frames, short, truncated), start in cuts
                if not (waveform is None and frames is None)
            ]
            if not samples:
                wanted = "audio" if self.spec.frames is None else self.modality
                lacks = {"audio": "holds no audio", "visual": "holds no video"}
                raise MediaError(self.clips[index].path, lacks.get(wanted, "holds neither audio nor video"))
        except MediaError as error:
            return [Failure(error.path, error.reason, index, step, position)]
        return samples

    def _read(self, *given: Any) -> Any:
        waveform, frames, *rest = super()._read(*given)
        # at once: the frames of all windows are a lot in their own size
        return waveform, eval_crop(frames, self.spec.image_size) if isinstance(frames, Tensor) else frames, *rest

    def _clip(self, index: int) -> Clip:
        clip = super()._clip(index)
        if self.modality == "audio":
            return replace(clip, video_path=None, frames_dir=None)
        return replace(clip, audio_path=None) if self.modality == "visual" else clip


class Portions:
    """A batch sampler: the clips of blocks, in order, a few at a time.

    Args:
        blocks: the clips of each.
        size: clips at a time.
    """

    def __init__(self, blocks: Sequence[range], size: int) -> None:
        self.blocks = blocks
        self.size = size

    def __len__(self) -> int:
        return sum(-(-len(block) // self.size) for block in self.blocks)

    def __iter__(self) -> Iterator[list[Item]]:
        for block in self.blocks:
            for first in range(block.start, block.stop, self.size):
                yield [(i, 0, i) for i in range(first, min(first + self.size, block.stop))]
