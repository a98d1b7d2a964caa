"""Kernel times of packed attention by tile, from CUDA graphs, beside the strongest other kernels.

    python benchmarks/tiles.py [--cases 'n196,mix*'] [--seconds 60] [--dtypes bfloat16]

Every candidate of the tile table takes the place of the shipped tile of one kernel and length class; the rest stays as
it is. `forward` is the forward pass, `both` with the backward pass; a graph of several launches is replayed, so no row
holds host time. `ratio` is the time with the shipped tiles over the row's. Variants are compiled first, by as many
processes as there are cores.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import attention
import common
import torch
from attention_cases import Case, all_cases
from common import OURS, Row
from machine import Machine

from avfast.kernels import packed_attention as kernels
from avfast.kernels import work_lists as work

DTYPES = attention.DTYPES
CASES = "n49,n98,n196,n392,n512,n1568,mix-0-50,decoder-708"
BASELINES = ("varlen", "flash_attn", "flash_attn_4", "dense_cudnn")  # varlen is FlashAttention-2, as PyTorch brings it
LAUNCHES = 10  # in one graph


@dataclass(frozen=True)
class Choice:
    """One kernel of one length class with another tile; None: the class does without this kernel."""

    kernel: str
    size: str
    tile: Any

    def __str__(self) -> str:
        return f"{OURS} {self.kernel} {self.size} {self.tile}".replace("Tile", "")

    @contextmanager
    def used(self) -> Iterator[None]:
        """In force for what is planned and run inside."""
        rows = work.ROWS["tiny"]
        try:
            # A program that does whole sequences of more rows wants more sequences in its class.
            work.ROWS["tiny"] = max(rows, self.tile.own if self.kernel == "whole" and self.tile else 0)
            with kernels.override(self.kernel, self.size, self.tile):
                yield
        finally:
            work.ROWS["tiny"] = rows

    def matters(self, case: Case, whole: bool) -> bool:
        """Whether a case launches it; ``whole`` is whether tiny sequences have one kernel for their backward pass."""
        tiny = work.ROWS["tiny"]
        if self.kernel == "whole":
            return min(case.lengths) <= (self.tile.own if self.tile else tiny)
        if self.size == "tiny" and self.kernel != "forward" and whole:
            return False
        limits = {"tiny": (0, tiny), "short": (tiny, work.SHORT), "long": (work.SHORT, math.inf)}[self.size]
        return any(limits[0] < n <= limits[1] for n in case.lengths)


def choices(case: Case, dtype: torch.dtype) -> list[Choice]:
    """Every tile but the shipped ones that a case would run with."""
    found: list[Choice] = []
    whole = bool(kernels.candidates("whole", case.dim, dtype, "tiny"))
    for kernel, size in itertools.product(kernels.KERNELS, work.ROWS):
        tiles = kernels.candidates(kernel, case.dim, dtype, size)
        others = [*tiles[1:], *([None] if tiles and kernel == "whole" else [])]
        found += [Choice(kernel, size, tile) for tile in others]
    return [choice for choice in found if choice.matters(case, whole)]


def timed(run: Callable[[], object], device: torch.device, replays: int) -> common.Timing:
    """Seconds of one run, from replays of a graph on CUDA."""
    times = LAUNCHES if device.type == "cuda" else 1
    phases = {"run": common.graphed(run, times) if device.type == "cuda" else run}
    taken = common.interleave({"it": phases}, device, rounds=replays, budget=1.0)["it"]["run"]
    return common.Timing(taken.median / times, taken.low / times, taken.high / times, taken.rounds)


def measure(
    name: str, build: Callable[[], attention.Variant], want: list[torch.Tensor], blank: Row, replays: int,
    phases: Sequence[str] = ("forward", "both"),
) -> Iterator[Row]:  # fmt: skip
    """A row per phase; one row with a note where it is wrong or fails, none where it is not there."""
    try:
        variant, device = build(), want[0].device
        error = common.rms_error(variant.results(), want)
        bound = common.limit(want[0].dtype, blank.error or 0.0)
        if error > bound:
            yield replace(blank, variant=name, error=error, note=f"REFUSED: error above {bound:.1e}")
            return
        for phase in phases:
            with torch.set_grad_enabled(phase == "both"):
                run = variant.both if phase == "both" else partial(variant.call, *variant.leaves)
                timing = timed(run, device, replays)
            yield replace(blank, variant=name, phase=phase, error=error).timed(timing)
    except attention.Unavailable:
        return
    except Exception as problem:  # the next tile may do
        yield replace(blank, variant=name, error=None, note=f"failed: {common.reason(problem)}")


def rows_of(case: Case, dtype: torch.dtype, device: torch.device, replays: int, until: float) -> Iterator[Row]:
    """Shipped tiles, other libraries, then every other tile as long as there is time."""
    data = attention.inputs(case, dtype, device)
    want = attention.reference(case, data)
    plain = common.rms_error(attention.loop(case, data).results(), want)
    want = [x.to(dtype) for x in want]
    mode = "graph" if device.type == "cuda" else "eager"
    blank = Row("tiles", case.name, "", str(dtype)[6:], "both", mode, error=plain)
    ours = partial(attention.avfast, case, data)
    shipped = {row.phase: row for row in measure(OURS, ours, want, blank, replays)}
    yield from shipped.values()

    def with_ratio(row: Row) -> Row:
        base = shipped.get(row.phase)
        both = base is not None and base.median_ms and row.median_ms
        return replace(row, ratio=base.median_ms / row.median_ms) if both else row

    for name in BASELINES:
        build = partial(attention.VARIANTS[name], case, data)
        yield from map(with_ratio, measure(name, build, want, blank, replays))
    for choice in choices(case, dtype):
        if time.perf_counter() > until:
            return
        phase = "forward" if choice.kernel == "forward" else "both"
        with choice.used():
            yield from map(with_ratio, measure(str(choice), ours, want, blank, replays, [phase]))


def compile_all(cases: Sequence[Case], dtypes: Sequence[torch.dtype], device: torch.device, part: int, of: int) -> None:
    """Every ``of``-th variant once, on few rows: the compiler's cache on disk then has it."""
    kinds = {(case.dim, case.heads, dtype): case for case in cases for dtype in dtypes}
    lengths = (20, 20), (100, 100), (300, 300)
    number = 0
    for (_, _, dtype), case in kinds.items():
        for small in (replace(case, lengths=few) for few in lengths):
            data = attention.inputs(small, dtype, device)
            for choice in (None, *choices(small, dtype)):
                number += 1
                if number % of == part:
                    try:
                        with choice.used() if choice else nullcontext():
                            attention.avfast(small, data).both()
                    except Exception as problem:
                        print(f"{small.name} {dtype} variant {number}: {common.reason(problem)}", file=sys.stderr)


def compile_in_parallel(argv: Sequence[str]) -> None:
    count = min(14, os.cpu_count() or 1)
    command = [sys.executable, __file__, *argv, "--compile-part"]
    children = [subprocess.Popen([*command, f"{i}/{count}"]) for i in range(count)]
    for child in children:
        child.wait()


def main(argv: Sequence[str] | None = None) -> int:
    parse = common.parser(__doc__.splitlines()[0])
    parse.add_argument("--dtypes", default="bfloat16", help="comma-separated, * allowed")
    parse.add_argument("--tokens", type=int, default=16384, help="about this many per case")
    parse.add_argument("--seconds", type=float, default=600, help="no new tile is timed after so many")
    parse.add_argument("--compile-part", help="K/N: only compile every N-th variant")
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse.parse_args(argv)
    start = time.perf_counter()
    device = common.begin(args)
    known = all_cases(args.tokens)
    cases = [known[name] for name in common.chosen(known, args.cases or CASES)]
    dtypes = [DTYPES[name] for name in common.chosen(DTYPES, args.dtypes)]
    if args.compile_part:
        compile_all(cases, dtypes, device, *map(int, args.compile_part.split("/")))
        return 0
    if device.type == "cuda":
        compile_in_parallel(argv)
        print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    machine, refused = Machine.here(device), False
    for i, case in enumerate(cases):
        for dtype in dtypes:
            left = args.seconds - (time.perf_counter() - start)
            until = time.perf_counter() + max(left, 0) / (len(cases) - i)
            found = list(rows_of(case, dtype, device, args.rounds or 5, until))
            refused |= any(row.variant == OURS and row.median_ms is None for row in found)
            common.print_rows(found)
            sys.stdout.flush()
            if args.csv != "-":
                common.append_rows(common.results_file("tiles", machine, args.csv), found, machine)
    return int(refused)


if __name__ == "__main__":
    sys.exit(main())
