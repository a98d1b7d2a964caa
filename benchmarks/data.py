"""Reading clips from a shard set against reading them from the media files it was built of.

    python benchmarks/data.py [--quick] [--cases '640x360*'] [--clips N] [--folder DIR]

Ten seconds of video each, made by the writer of the demo clips: H.264 with a key frame every second, AAC at 44.1 kHz;
and the same pictures with the settings that x264 has of its own, which most files are nearer to (`640x360-x264`).
The window and the frame are AVSiam's, the augmentation that of training. `one core` reads in the benchmark's own
process, `one worker` and `two workers` in others; `training` is the training loop with a model and a front end that
compute nothing, also with workers. Times are per clip: CPU time of what happens in one process, else wall time.
The gate compares what is stored with the media: the audio of a window, and frames at the times of those stored.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import common
import torch
from common import OURS, Row, Timing
from machine import Machine
from torch import Tensor, nn
from torchvision.io import decode_jpeg, encode_jpeg

from avfast.data import ClipDataset, ClipList, KaldiFrontend, StepBatches, make_loader, read_all
from avfast.data.augment import resize_short_side
from avfast.data.dataset import Sample
from avfast.data.media import read_frames
from avfast.data.shard_source import ShardFile
from avfast.demo.sampling import Preset, sample
from avfast.demo.write import write_clip
from avfast.models.contract import Draws, Features, Figures, Output
from avfast.models.registry import PRESETS
from avfast.shards.build import build
from avfast.train.config import Config
from avfast.train.log import Log
from avfast.train.loop import run

MEDIA = "media"
LIMIT = 1e-3  # of relative errors: audio has 16 bits


@dataclass(frozen=True)
class Case:
    """Clips of a size; what of them is read is a model's."""

    preset: Preset
    frontend: KaldiFrontend
    usual: bool = False  # encoded with x264's own settings


def cases() -> dict[str, Case]:
    wide = Preset("wide", width=640, height=360, fps=25, seconds=10.0, sample_rate=44100)
    return {
        "640x360": Case(wide, KaldiFrontend()),
        "640x360-x264": Case(wide, KaldiFrontend(), usual=True),
        "tiny": Case(Preset("tiny", seconds=1.0), KaldiFrontend(num_frames=64, image_size=32)),
    }


class Silent(KaldiFrontend):
    """Computes nothing."""

    def __call__(self, batch: Any, *, train: bool = False, key: Any = None) -> dict[str, Tensor]:
        return {}


class Nothing(nn.Module):
    """A model that computes nothing, so that a run takes as long as its data."""

    passes, sources, contrasts, has_unused_parameters = ("joint",), (), False, False

    def __init__(self, num_frames: int = 1024, image_size: int = 224) -> None:
        super().__init__()
        self.frontend = Silent(num_frames=num_frames, image_size=image_size)
        self.weight = nn.Parameter(torch.zeros(()))

    def visible(self, progress: float) -> float:
        return 1.0

    def draw(self, batch_size: int, **given: object) -> Draws:
        return Draws("joint")

    def forward(self, draws: Draws | None = None) -> Output:
        return Output(self.weight * 0.0)

    def encode(self) -> Features:
        return Features(None, None, None)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"all": [self.weight]}

    def blocks(self) -> list[nn.Module]:
        return []

    def figures(self, inputs: object, draws: object, output: object) -> Figures:
        return Figures()


PRESETS["nothing"] = (Nothing, {})


def prepare(case: Case, folder: Path, count: int) -> tuple[Path, Path]:
    """(folder of media files, shard set), made where they are not there yet."""
    media, shards = folder / f"media-{count}", folder / f"shards-{count}"
    media.mkdir(parents=True, exist_ok=True)
    for scene in sample(replace(case.preset, train=count), "train", 0):
        path = media / f"{scene.id}.mp4"
        if not path.exists():
            part, other = path.with_suffix(".part"), path.with_suffix(".other")
            write_clip(scene, part)
            if case.usual:
                encode_as_usual(part, other)
                other.rename(part)
            part.rename(path)
    build(read_all([str(media)]), shards, progress=False)
    return media, shards


def encode_as_usual(source: Path, target: Path) -> None:
    """The same pictures with x264's own settings: key frames up to ten seconds apart, B-frames; the audio stays."""
    import av

    with av.open(str(source)) as given, av.open(str(target), "w", format="mp4") as out:
        video, audio = given.streams.video[0], given.streams.audio[0]
        encoder = out.add_stream("libx264", rate=video.average_rate, options={"threads": "1"})
        encoder.width, encoder.height, encoder.pix_fmt = video.width, video.height, "yuv420p"
        copied = out.add_stream_from_template(audio)
        for packet in given.demux(video, audio):
            if packet.stream is video:
                for frame in packet.decode():
                    frame.pict_type = 0  # for the encoder to choose
                    out.mux(encoder.encode(frame))
            elif packet.dts is not None:
                packet.stream = copied
                out.mux(packet)
        out.mux(encoder.encode(None))


def error(case: Case, media: ClipList, shards: ClipList) -> float:
    """Relative error of stored audio, and of stored frames against a JPEG of the media's; the worst of three clips."""
    worst = 0.0
    sets = [ClipDataset(clips, frontend=case.frontend, train=False) for clips in (media, shards)]
    for i in range(min(3, len(media))):
        want, got = (dataset[i, 0, i] for dataset in sets)
        if not isinstance(want, Sample) or not isinstance(got, Sample):
            return float("inf")
        stored = ShardFile(shards.clips[i].video_path)
        frames = read_frames(media.clips[i].video_path, stored.frame_times).permute(0, 3, 1, 2)
        frames = resize_short_side(frames, 256) if min(frames.shape[-2:]) > 256 else frames
        jpegs = torch.stack([decode_jpeg(encode_jpeg(frame.contiguous(), quality=90)) for frame in frames])
        pairs = [(got.waveform, want.waveform), (stored.frames(stored.frame_times).permute(0, 3, 1, 2), jpegs)]
        worst = max(worst, *(common.rms_error([x.float()], [y.float()]) for x, y in pairs))
    return worst


def timed(batches: Iterable[Any], clock: Callable[[], float], skipped: int, rounds: int, each: int) -> Timing:
    """Seconds per clip of ``rounds`` times ``each`` batches, after some that are not timed."""
    source = iter(batches)
    for _ in islice(source, skipped):
        pass
    seconds = []
    for _ in range(rounds):
        start = clock()
        clips = sum(len(batch) for batch in islice(source, each))
        seconds.append((clock() - start) / clips)
    return Timing.of(seconds)


def reading(case: Case, clips: ClipList, workers: int, batch: int, rounds: int, each: int) -> Timing:
    dataset = ClipDataset(clips, frontend=case.frontend, train=True)
    skipped = 1 + 4 * workers
    plan = StepBatches(len(clips), batch, steps=skipped + rounds * each)
    return timed(make_loader(dataset, plan, workers), clock_of(workers), skipped, rounds, each)


def training(case: Case, folder: Path, workers: int, batch: int, rounds: int, each: int) -> Timing:
    """Seconds per clip from one line of the run's log to the next; before the first the workers start."""
    clock, marks, record = clock_of(workers), [], Log.record

    def noted(log: Log, *row: Any) -> None:
        marks.append(clock())
        record(log, *row)

    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        config = Config(
            recipe="nothing", model="nothing", data=(str(folder),), eval_fraction=0.0, out=out + "/run", device="cpu",
            model_args={"num_frames": case.frontend.num_frames, "image_size": case.frontend.image_size},
            workers=workers, batch_size=batch, steps=(rounds + 1) * each, log_every=each, checkpoint_every=10**9,
            count_flops=False, figures=0, evaluate=False, timm=None,
        )  # fmt: skip
        with mock.patch.object(Log, "record", noted):
            run(config)
    return Timing.of([(after - before) / (each * batch) for before, after in pairwise(marks)])


def clock_of(workers: int) -> Callable[[], float]:
    """CPU time where one process does everything: its core may be shared with others."""
    return time.perf_counter if workers else time.process_time


def measure(
    name: str, case: Case, folder: Path, count: int, rounds: int, quick: bool, counts: Sequence[int]
) -> list[Row]:
    media, shards = prepare(case, folder / name, count)
    lists = {OURS: read_all([str(shards)]), MEDIA: read_all([str(media)])}
    found = error(case, lists[MEDIA], lists[OURS])
    batch = min(16, count)
    blank = Row("data", name, "", "float32", "", "read", note=f"{count} clips, batches of {batch}")
    rows = []
    good = {MEDIA: media, OURS: shards}
    if found > LIMIT:
        rows.append(replace(blank, variant=OURS, error=found, note=f"REFUSED: above {LIMIT}"))
        del good[OURS]
    known = {
        0: ("one core", "training"),
        1: ("one worker", "training, one worker"),
        2: ("two workers", "training, two workers"),
    }
    for workers, phases in ((number, known[number]) for number in counts):
        for variant, path in good.items():
            each = (8 if quick else 30) if variant == OURS else 2
            timings = (
                reading(case, lists[variant], workers, batch, rounds, each),
                training(case, path, workers, batch, rounds, each),
            )
            for phase, timing in zip(phases, timings, strict=True):
                row = replace(blank, variant=variant, phase=phase, clips_per_s=1 / timing.median)
                rows.append(replace(row, error=found if variant == OURS else None).timed(timing))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parse = common.parser(__doc__.splitlines()[0])
    parse.add_argument("--clips", type=int, help="of a set, default 48, or 12 with --quick")
    parse.add_argument("--folder", help="where clips and shards are kept for the next run; default: a temporary folder")
    parse.add_argument("--workers", type=int, nargs="+", choices=(0, 1, 2), default=(0, 1, 2), help="loader workers")
    args = parse.parse_args(argv)
    torch.set_num_threads(args.threads or 1)
    known = cases()
    chosen = common.chosen(known, args.cases, ["tiny"])
    machine, rows = Machine.here(torch.device("cpu")), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        for name in chosen:
            count = args.clips or (12 if args.quick else 48)
            rounds = args.rounds or (3 if args.quick else 7)
            found = measure(name, known[name], folder, count, rounds, args.quick, args.workers)
            rows += common.report("data", found, machine, args.csv)
    return common.finish("data", rows, machine, args.csv, plotted=False)


if __name__ == "__main__":
    sys.exit(main())
