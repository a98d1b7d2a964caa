"""``python -m avfast.data.stats CLIPS``: mean and deviation of the filter banks over a sample of clips.

The figures are those that :class:`~avfast.data.frontend.KaldiFrontend` and its kin take off: of every mel bin of every
frame that a clip fills within the model's window, without the padding of clips that are shorter.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from avfast.data.clip_list import ClipList
from avfast.data.clips import Batch, ClipDataset, eval_loader
from avfast.data.csv_lists import MediaFiles
from avfast.data.frontend import Frontend, HTKFrontend, KaldiFrontend
from avfast.data.log_mel import frame_length, frame_shift
from avfast.data.manifest import read_all
from avfast.data.spec import ClipSpec


@dataclass
class Stats:
    """Of the filter banks of a sample.

    Attributes:
        mean, std: over all values; the deviation of the sample itself (divided by their number).
        values: how many.
        clips: that have audio.
        failures: path -> reason of those that could not be read or have none.
    """

    mean: float = 0.0
    std: float = 0.0
    values: int = 0
    clips: int = 0
    failures: dict[str, str] = field(default_factory=dict)


def filter_bank_stats(
    clips: ClipList,
    frontend: Frontend,
    *,
    limit: int | None = 1000,
    workers: int = 0,
    progress: Callable[[Iterable[Batch]], Iterable[Batch]] = lambda batches: batches,
) -> Stats:
    """Mean and deviation of what ``frontend`` makes of audio, in float64.

    Args:
        clips: any; ``limit`` of them drawn at random, always the same ones; None for all.
        frontend: whose figures are wanted. A :class:`KaldiFrontend` has its own mean and deviation put back.
        limit: number of clips.
        workers: processes that decode.
        progress: wraps the batches, of one clip each.

    Raises:
        ValueError: no clip has audio that can be read.
    """
    count = len(clips) if limit is None else min(limit, len(clips))
    drawn = np.random.Generator(np.random.Philox(0)).permutation(len(clips))[:count]
    spec = ClipSpec(frontend.seconds, frontend.sample_rate, frontend.image_size, None)
    dataset = ClipDataset(clips.take(sorted(drawn.tolist())), frontend=spec, train=False)
    found = Stats()
    total = squares = 0.0
    for batch in progress(eval_loader(dataset, 1, workers)):
        found.failures |= {failure.path: failure.reason for failure in batch.failures}
        for row in range(len(batch)):
            values = _filled(frontend, batch.waveform[row, : int(batch.num_samples[row])]).double()
            if values.numel():
                found.clips += 1
                found.values += values.numel()
                total, squares = total + values.sum().item(), squares + values.square().sum().item()
    if not found.values:
        reason = next((f": {path}: {reason}" for path, reason in found.failures.items()), "")
        raise ValueError(f"none of {count} clips has audio that can be read{reason}")
    found.mean = total / found.values
    found.std = max(squares / found.values - found.mean**2, 0.0) ** 0.5
    return found


def _filled(frontend: Frontend, waveform: Tensor) -> Tensor:
    """(frames, mel bins) of one clip as they are before normalisation, without padding."""
    banks = frontend.audio(waveform[None])[0]
    if not isinstance(frontend, KaldiFrontend):
        return banks  # a short clip is continued by itself
    shift = frame_shift(frontend.sample_rate, frontend.frame_shift_ms)
    samples = min(len(waveform), frontend.num_samples)
    frames = max(0, 1 + (samples - frame_length(frontend.sample_rate)) // shift)
    return banks[:frames].double() * (frontend.deviations * frontend.std) + frontend.mean


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; ``arguments`` default to the command line's."""
    parser = argparse.ArgumentParser(prog="python -m avfast.data.stats", description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+", metavar="CLIPS", help="what --data of avfast.train takes")
    parser.add_argument("--media", nargs="+", default=[], metavar="FOLDER", help="where the files of a CSV's clips are")
    parser.add_argument("--frontend", choices=("kaldi", "htk"), default="kaldi", help="whose filter banks")
    parser.add_argument("--clips", type=int, default=1000, metavar="N", help="clips in the sample (1000); 0: all")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that decode (0: in this one)")
    given = parser.parse_args(arguments)
    frontend: Frontend = KaldiFrontend() if given.frontend == "kaldi" else HTKFrontend()
    try:
        clips = read_all(given.data, media=MediaFiles(given.media) if given.media else None, source="CLIPS")
        found = filter_bank_stats(clips, frontend, limit=given.clips or None, workers=given.workers, progress=_bar)
    except (ValueError, OSError) as error:
        parser.exit(2, f"avfast: {' '.join(str(error).split())}\n")
    for note in clips.notes:
        print(note)
    print(f"{found.clips} of {len(clips)} clips, {found.values / 1e6:.3g} million values")
    if found.failures:
        path, reason = next(iter(found.failures.items()))
        print(f"left out {len(found.failures)} without audio that can be read, such as {path}: {reason}")
    figures = {"mean": round(found.mean, 3), "std": round(found.std, 3)}
    if given.frontend == "kaldi":
        print(f"--model.frontend '{json.dumps(figures)}'")
    else:
        print("mean {mean}, deviation {std}; this front end does not normalise and takes neither".format(**figures))


def _bar(batches: Any) -> Iterable[Batch]:
    from tqdm import tqdm

    return tqdm(batches, unit="clip", leave=False, disable=None, dynamic_ncols=True)


if __name__ == "__main__":
    main()
