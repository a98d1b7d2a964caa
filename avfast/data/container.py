"""What a container says about its streams, in the same words for PyAV 14 to 19."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.stream import Stream

AnyStream = TypeVar("AnyStream", bound="Stream")

# FFmpeg's AV_DISPOSITION_*
_DEFAULT = 1
_SECONDARY = 2 | 8 | 32 | 128 | 256 | 512  # dubbed, comment, karaoke, hearing or visually impaired, effects only
_NO_VIDEO = 1024 | 2048  # attached picture, timed thumbnails


def open_media(path: str) -> InputContainer:
    """An open container. Tags that are no UTF-8 are no error."""
    import av

    try:
        return av.open(path, metadata_errors="ignore")
    except TypeError:  # since av 19 they never are
        return av.open(path)


def chosen(streams: Sequence[AnyStream]) -> AnyStream | None:
    """Of the streams of one kind the one that players choose, None if there is none."""
    ranks = {}
    for stream in streams:
        marks = getattr(getattr(stream, "disposition", None), "value", 0)
        if not marks & _NO_VIDEO:
            ranks[stream] = (stream.codec_context is None, not marks & _DEFAULT, bool(marks & _SECONDARY), stream.index)
    return min(ranks, key=ranks.__getitem__, default=None)


def display_matrix(frame: VideoFrame) -> list[int] | None:
    """[a, b, c, d] such that column x and row y are shown at column a x + c y and row b x + d y; None: as they are."""
    data = frame.side_data.get("DISPLAYMATRIX")
    return None if data is None else np.frombuffer(bytes(data), dtype=np.int32)[[0, 1, 3, 4]].tolist()


def swaps_axes(matrix: list[int] | None) -> bool:
    """Whether columns are shown as rows."""
    return matrix is not None and abs(matrix[0]) + abs(matrix[3]) < abs(matrix[1]) + abs(matrix[2])


def turned(image: np.ndarray, matrix: list[int] | None) -> np.ndarray:
    """(H, W, 3) turned by quarters and mirrored as it is to be shown."""
    if matrix is None:
        return image
    a, b, c, d = matrix
    if swaps_axes(matrix):
        image, a, d = image.transpose(1, 0, 2), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
