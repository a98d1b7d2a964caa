"""Where the time of a training step goes, on random clips without media: wall clock, device, host, hidden waits.

    python benchmarks/steptime.py [--model avsiam_base] [--launch eager,graph,compile,compile+graph] [--clips 96]

The step is the trainer's own, front end, draws and optimiser included. `median_ms` is the mean wall clock of a step;
`tflops` and `matmul_share` are the FLOPs the model asks for over it. The note says how long the host took to launch a
step, how busy the device was, and how often the host waited for it and where. The ten longest kernels follow.
"""

from __future__ import annotations

import collections
import itertools
import os
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import common
import torch
from common import OURS, Row
from memory import MIB

from avfast import flops
from avfast.data.clips import Batch
from avfast.models import create_model
from avfast.train.config import Config
from avfast.train.trainer import Trainer

LAUNCHES = ("eager", "graph", "compile", "compile+graph")
GEMM = ("gemm", "cutlass", "nvjet", "cublas", "xmma")


class Steps:
    """Steps of a trainer on the same few batches of random clips."""

    def __init__(self, name: str, clips: int, launch: str, device: torch.device) -> None:
        torch.manual_seed(0)
        on_gpu = device.type == "cuda"
        self.device, self.number = device, 0
        config = replace(
            Config(recipe="steptime", model=name),
            batch_size=clips, device=device.type, compile="compile" in launch, cuda_graph="graph" in launch and on_gpu,
        )  # fmt: skip
        self.trainer = Trainer(create_model(name).to(device), config, device)
        self.batches = [self.batch(clips, step) for step in range(3)]
        if on_gpu:
            self.batches = [batch.pin_memory() for batch in self.batches]

    def batch(self, clips: int, step: int) -> Batch:
        front, generator = self.trainer.model.frontend, torch.Generator().manual_seed(step)
        size, present = front.image_size, torch.ones(clips, dtype=torch.bool)
        return Batch(
            waveform=torch.rand(clips, front.num_samples, generator=generator) * 2 - 1,
            num_samples=torch.full((clips,), front.num_samples),
            frames=torch.randint(0, 256, (clips, 1, 3, size, size), generator=generator, dtype=torch.uint8),
            has_audio=present, has_visual=present, labels=None, index=torch.arange(clips),
            positions=tuple(range(clips)), step=step, total=clips, failures=[], short=~present,
        )  # fmt: skip

    def __call__(self) -> dict[str, torch.Tensor]:
        batch = replace(self.batches[self.number % len(self.batches)], step=self.number)
        self.number += 1
        return self.trainer.step([batch], 1e-4)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def times(self, rounds: int) -> tuple[common.Timing, float]:
        """Wall clock of a step, the mean of a run that is waited for once; and what the host took to launch one."""
        self.synchronize()
        host = []
        start = time.perf_counter()
        for _ in range(rounds):
            begin = time.perf_counter()
            self()
            host.append(time.perf_counter() - begin)
        self.synchronize()
        mean = (time.perf_counter() - start) / rounds
        return common.Timing(mean, mean, mean, rounds), statistics.median(host)

    def waits(self) -> collections.Counter[str]:
        """Where the host waits for the device during a step."""
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                self()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        places = [f"{os.path.basename(w.filename)}:{w.lineno}" for w in seen if "synchroniz" in str(w.message)]
        return collections.Counter(places)

    def profile(self, steps: int) -> tuple[list[tuple[str, float, int]], float]:
        """(kernel, ms per step, launches per step), longest first; and the share of time in which one ran."""
        from torch.profiler import ProfilerActivity, profile

        on_gpu = self.device.type == "cuda"
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=kinds, acc_events=True) as record:
            for _ in range(steps):
                self()
            self.synchronize()
        spans, spent, calls = [], collections.Counter[str](), collections.Counter[str]()
        for event in record.events():
            if on_gpu == str(event.device_type).endswith("CUDA"):
                name = "GEMM" if any(part in event.name.lower() for part in GEMM) else event.name[:60]
                taken = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
                spent[name] += taken
                calls[name] += 1
                spans.append((event.time_range.start, event.time_range.end))
        kernels = [(name, us / 1e3 / steps, calls[name] // steps) for name, us in spent.most_common(10)]
        return kernels, busy(spans)


def busy(spans: list[tuple[float, float]]) -> float:
    """The share of the time between the first start and the last end that is covered."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    whole = end - min(start for start, _ in spans) if spans else 0.0
    return covered / whole if whole else 0.0


def measure(name: str, clips: int, launch: str, device: torch.device, rounds: int, floors: common.Floors) -> list[Row]:
    """One row of the step and one for each of its ten longest kernels; a row with a note if it fails."""
    blank = Row("steps", f"{name} {clips} clips", OURS, "bfloat16" if device.type == "cuda" else "float32", "step")
    blank = replace(blank, launch=launch)
    try:
        work = useful(name, clips, device)
        return measured(Steps(name, clips, launch, device), blank, clips, rounds, floors, work)
    except Exception as problem:  # the next launch may do
        return [replace(blank, note=f"FAILED: {common.reason(problem)}")]


def measured(step: Steps, blank: Row, clips: int, rounds: int, floors: common.Floors, work: int) -> list[Row]:
    on_gpu = step.device.type == "cuda"
    start = time.perf_counter()
    for _ in range(4 if on_gpu else 1):  # the second step of a shape is captured
        loss = step()["loss"]
    step.synchronize()
    taken = time.perf_counter() - start
    print(f"{blank.case} {blank.launch}: ready in {taken:.1f} s, loss {loss.item():.4f}", flush=True)
    if not torch.isfinite(loss):
        return [replace(blank, note=f"FAILED: loss {loss.item()}")]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    timing, host = step.times(rounds)
    row = floors.share(blank.timed(timing), torch.bfloat16 if on_gpu else torch.float32, work)
    row = replace(row, clips_per_s=clips / timing.median)
    notes = [f"host {host * 1e3:.0f} ms"]
    if on_gpu:
        row = replace(row, peak_mib=torch.cuda.max_memory_allocated() / MIB)
        waits = step.waits()
        places = ", ".join(place for place, _ in waits.most_common(6))
        notes.append(f"{waits.total()} waits{': ' * bool(places)}{places}")
    kernels, share = step.profile(2 if on_gpu else 1)
    if on_gpu:
        notes.insert(1, f"busy {share:.0%}")
    rows = [replace(row, note="; ".join(notes))]
    for rank, (name, ms, launches) in enumerate(kernels, 1):
        rows.append(replace(blank, phase=f"kernel {rank}", median_ms=ms, note=f"{name}, {launches} launches"))
    return rows


@cache
def useful(name: str, clips: int, device: torch.device) -> int:
    """FLOPs of a step, counted in a plain one: a replayed or compiled one shows nothing."""
    return flops.count(Steps(name, clips, "eager", device))


def main(argv: Sequence[str] | None = None) -> int:
    parse = common.parser(__doc__.splitlines()[0])
    parse.add_argument("--model", default="avsiam_base", help="comma-separated names of `python -m avfast.models`")
    parse.add_argument("--launch", default="eager,graph,compile+graph", help=f"comma-separated, of {LAUNCHES}")
    parse.add_argument("--clips", type=int, help="default 96; 4 on the CPU")
    args = parse.parse_args(argv)
    device = common.begin(args)
    on_gpu = device.type == "cuda"
    machine, floors = common.header(device, [torch.bfloat16 if on_gpu else torch.float32])
    rows: list[Row] = []
    for name, launch in itertools.product(args.model.split(","), common.chosen(LAUNCHES, args.launch)):
        clips = args.clips or (96 if on_gpu else 4)
        new = measure(name, clips, launch, device, args.rounds or (8 if on_gpu else 3), floors)
        rows += common.report("steps", new, machine, args.csv)
        if on_gpu:
            torch.cuda.empty_cache()
    return int(any(row.note.startswith("FAILED") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
