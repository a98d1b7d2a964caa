"""What the benchmarks share: timing, measured floors, the correctness gate, rows, tables and arguments."""

from __future__ import annotations

import argparse
import csv
import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path

import torch
from machine import Machine
from memory import MIB
from torch import Tensor

try:
    import fcntl
except ImportError:
    fcntl = None  # not on Windows

RESULTS = Path(__file__).parent / "results"
OURS = "avfast"
HALF_LIMIT, FLOAT_LIMIT = 0.005, 1e-5
UNLIKE = "another function"  # note of a row that is no baseline of a ratio
CYCLES = 2e9  # per second of waiting on a GPU, about its clock


@dataclass(frozen=True)
class Timing:
    """Seconds: median and the 20 % and 80 % quantiles of ``rounds`` runs."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        ordered = sorted(seconds)
        at = [ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8)]
        return cls(statistics.median(ordered), at[0], at[1], len(ordered))


@dataclass(frozen=True)
class Row:
    """One line of a results file; times in milliseconds, memory in MiB, None where it does not apply.

    ``ratio`` is the best baseline's time over this row's; ``matmul_share`` and ``copy_share`` are useful work over the
    measured rate of a large matrix product and of a large copy; ``ideal`` is the speed-up over this row that the FLOP
    counts allow; ``error`` is what the gate saw. A row without times was refused by the gate, or failed.
    """

    benchmark: str
    case: str
    variant: str
    dtype: str
    phase: str
    launch: str = "eager"
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int | None = None
    ratio: float | None = None
    tflops: float | None = None
    matmul_share: float | None = None
    copy_share: float | None = None
    peak_mib: float | None = None
    saved_mib: float | None = None
    clips_per_s: float | None = None
    ideal: float | None = None
    error: float | None = None
    note: str = ""

    def timed(self, timing: Timing) -> Row:
        return replace(
            self,
            median_ms=timing.median * 1e3,
            p20_ms=timing.low * 1e3,
            p80_ms=timing.high * 1e3,
            rounds=timing.rounds,
        )


def reason(problem: BaseException) -> str:
    """The first line of an error, for a note."""
    return f"{type(problem).__name__}: {problem}".strip().splitlines()[0][:100]


# Timing.

Phases = Mapping[str, Callable[[], object]]


def interleave(
    variants: Mapping[str, Phases], device: torch.device, *, rounds: int, budget: float
) -> dict[str, dict[str, Timing]]:
    """Times every variant once per round, so that a change of the machine's load meets all of them.

    Args:
        variants: the phases of each, run in order; more than one also give their sum under ``"both"``.
        device: CUDA times with events and cold L2, anything else with a host clock.
        rounds: at most this many, at least 3.
        budget: seconds after which no new round starts.

    Every variant is taken to have run before.
    """
    names = list(variants)
    clock = _cuda_phases(device) if device.type == "cuda" else _host_phases
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    start = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for number in range(max(rounds, 3)):
            if number >= 3 and time.perf_counter() - start > budget:
                break
            shift = number % len(names) if names else 0
            for name in names[shift:] + names[:shift]:
                taken = clock(variants[name])
                if len(taken) > 1:
                    taken["both"] = sum(taken.values())
                for phase, value in taken.items():
                    seconds[name].setdefault(phase, []).append(value)
            gc.collect()
    finally:
        gc.enable()
    return {name: {phase: Timing.of(values) for phase, values in taken.items()} for name, taken in seconds.items()}


def _host_phases(phases: Phases) -> dict[str, float]:
    taken, before = {}, time.perf_counter()
    for name, run in phases.items():
        run()
        now = time.perf_counter()
        taken[name], before = now - before, now
    return taken


def _cuda_phases(device: torch.device) -> Callable[[Phases], dict[str, float]]:
    flush = torch.empty(256 * MIB, dtype=torch.int8, device=device)
    ahead: dict[int, float] = {}

    def clock(phases: Phases) -> dict[str, float]:
        if id(phases) not in ahead:
            start = time.perf_counter()
            for run in phases.values():
                run()
            ahead[id(phases)] = min(2 * (time.perf_counter() - start), 0.1)
            torch.cuda.synchronize(device)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(phases) + 1)]
        flush.zero_()
        # The device waits while the host launches everything; without, the times would hold the host's own.
        torch.cuda._sleep(int(ahead[id(phases)] * CYCLES))
        events[0].record()
        for run, event in zip(phases.values(), events[1:], strict=True):
            run()
            event.record()
        torch.cuda.synchronize(device)
        pairs = zip(phases, zip(events, events[1:], strict=False), strict=True)
        return {name: a.elapsed_time(b) / 1e3 for name, (a, b) in pairs}

    return clock


def graphed(run: Callable[[], object], times: int = 1) -> Callable[[], object]:
    """``run``, so many times, captured in a CUDA graph; the result replays it.

    All graphs share one memory pool, so many large steps fit; what a replay computes lasts until the next one.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_graph_pool()):
        for _ in range(times):
            run()
    return graph.replay


def captured(runs: Mapping[str, Callable[[], object]]) -> tuple[dict[str, Phases], dict[str, str]]:
    """What :func:`interleave` takes, a graph of each run; and, by name, why the others could not be captured."""
    graphs: dict[str, Phases] = {}
    failures: dict[str, str] = {}
    for name, run in runs.items():
        try:
            graphs[name] = {"both": graphed(run)}
        except Exception as problem:  # one capture that fails must not end the run
            failures[name] = f"no graph: {reason(problem)}"
            _graph_pool.cache_clear()  # the pool of a broken capture takes no other
    return graphs, failures


@cache
def _graph_pool() -> tuple[int, int]:
    return torch.cuda.graph_pool_handle()


# Floors.


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of a copy far larger than any cache."""
    source = torch.empty((2048 if device.type == "cuda" else 128) * MIB, dtype=torch.int8, device=device).fill_(1)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _median_of(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of matrix products on random data: the most of several shapes, as none is best everywhere."""
    return max(matmul_rates(device, dtype).values())


def matmul_rates(device: torch.device, dtype: torch.dtype, budget: float = 1.0) -> dict[str, float]:
    """FLOP per second by shape, ``batch x rows x inner x columns``; no new shape once ``budget`` seconds are over."""
    rates: dict[str, float] = {}
    start = time.perf_counter()
    for batch, m, k, n in PRODUCTS[device.type == "cuda"]:
        # A CPU without half-precision units takes seconds for a large product in half precision.
        if rates and time.perf_counter() - start > budget:
            break
        a, b = torch.randn(batch, m, k, device=device).to(dtype), torch.randn(batch, k, n, device=device).to(dtype)
        rates[f"{batch}x{m}x{k}x{n}"] = 2 * batch * m * k * n / _median_of(partial(torch.matmul, a, b), device)
    return rates


# (batch, rows, inner, columns) on the CPU and on CUDA, small ones first: squares, layers of ViT-B, attention.
PRODUCTS = (
    ((1, 256, 256, 256), (1, 512, 512, 512), (12, 392, 64, 392), (1, 1024, 1024, 1024), (1, 1568, 768, 3072)),
    ((192, 512, 64, 512), (1, 4096, 4096, 4096), (1, 16384, 768, 3072), (1, 16384, 3072, 768), (1, 8192, 8192, 8192)),
)


def _median_of(run: Callable[[], object], device: torch.device) -> float:
    run()
    return interleave({"it": {"run": run}}, device, rounds=7, budget=0.2)["it"]["run"].median


# The gate.


def rms_error(got: Iterable[Tensor], want: Iterable[Tensor]) -> float:
    """Largest ||got - want|| / ||want|| of pairs of tensors; infinite where anything is not finite."""
    worst = 0.0
    for x, y in zip(got, want, strict=True):
        x, y = x.detach().double(), y.detach().double()
        error = ((x - y).norm() / y.norm().clamp_min(1e-300)).item()
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def limit(dtype: torch.dtype, plain: float) -> float:
    """The largest error that passes, given that of plain PyTorch in the same dtype."""
    return FLOAT_LIMIT if dtype == torch.float32 else max(HALF_LIMIT, 2 * plain)


# Rows and tables.


def with_ratios(rows: list[Row]) -> list[Row]:
    """Fills in ``ratio``: the best baseline's time, however launched, over the row's, in one case, dtype and phase."""

    def key(row: Row) -> tuple[str, ...]:
        return row.case, row.dtype, row.phase

    best: dict[tuple[str, ...], float] = {}
    for row in rows:
        if not row.variant.startswith(OURS) and row.median_ms is not None and row.note != UNLIKE:
            best[key(row)] = min(best.get(key(row), math.inf), row.median_ms)
    return [
        replace(row, ratio=best[key(row)] / row.median_ms) if row.median_ms is not None and key(row) in best else row
        for row in rows
    ]


def append_rows(path: Path, rows: Iterable[Row], machine: Machine) -> None:
    """Adds rows to a CSV file, which is made with its header if need be."""
    columns = [f.name for f in fields(Row)] + [f.name for f in fields(Machine)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        if fcntl is not None:  # several processes may write one file
            fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if file.seek(0, os.SEEK_END) == 0:
            writer.writeheader()
        for row in rows:
            values = {**asdict(row), **asdict(machine)}
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in values.items()})


def print_rows(rows: Sequence[Row]) -> None:
    """A table without the columns that are empty for all rows."""
    shown: list[tuple[str, Callable[[Row], str]]] = [
        ("case", lambda r: r.case),
        ("dtype", lambda r: r.dtype),
        ("phase", lambda r: r.phase),
        ("variant", lambda r: r.variant),
        ("ms", lambda r: "-" if r.median_ms is None else f"{r.median_ms:.4g}"),
        ("20-80 %", lambda r: "" if r.p20_ms is None else f"{r.p20_ms:.4g}-{r.p80_ms:.4g}"),
        ("ratio", lambda r: "" if r.ratio is None else f"{r.ratio:.2f}"),
        ("ideal", lambda r: "" if r.ideal is None else f"{r.ideal:.2f}"),
        ("clips/s", lambda r: "" if r.clips_per_s is None else f"{r.clips_per_s:.3g}"),
        ("TFLOP/s", lambda r: "" if r.tflops is None else f"{r.tflops:.3g}"),
        ("matmul", lambda r: "" if r.matmul_share is None else f"{r.matmul_share:.0%}"),
        ("copy", lambda r: "" if r.copy_share is None else f"{r.copy_share:.0%}"),
        ("peak MiB", lambda r: "" if r.peak_mib is None else f"{r.peak_mib:.0f}"),
        ("saved MiB", lambda r: "" if r.saved_mib is None else f"{r.saved_mib:.0f}"),
        ("error", lambda r: "" if r.error is None else f"{r.error:.1e}"),
        ("note", lambda r: r.note),
    ]
    cells = [[name, *(show(row) for row in rows)] for name, show in shown]
    cells = [column for column in cells if any(column[1:])]
    widths = [max(map(len, column)) for column in cells]
    for line in zip(*cells, strict=True):
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def print_speedups(rows: Sequence[Row]) -> None:
    """How many times faster ours is than each variant, over all phases of a step."""
    for ours in rows:
        if ours.variant != OURS or ours.phase != "both" or ours.median_ms is None:
            continue
        same = (ours.case, ours.dtype, ours.phase)
        others = [r for r in rows if (r.case, r.dtype, r.phase) == same and not r.variant.startswith(OURS)]
        text = [f"{r.median_ms / ours.median_ms:.2f} x {r.variant} ({r.launch})" for r in others if r.median_ms]
        if text:
            print(f"{ours.case} {ours.dtype} ({ours.launch}): {', '.join(text)}")


# Arguments.


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes."""
    parse = argparse.ArgumentParser(description=description)
    parse.add_argument("--quick", action="store_true", help="smaller cases and fewer rounds, for two CPU cores")
    parse.add_argument("--cases", help="comma-separated names, * allowed")
    parse.add_argument("--variants", help="comma-separated names, * allowed")
    parse.add_argument("--csv", help="file the rows are added to; default results/<device>/<benchmark>.csv; - for none")
    parse.add_argument("--threads", type=int, help="CPU threads")
    parse.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parse.add_argument("--rounds", type=int, help="timed rounds per case")
    parse.add_argument("--bare", action="store_true", help="no plot, on the CPU no memory")
    parse.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parse


def chosen(names: Iterable[str], patterns: str | None, hidden: Iterable[str] = ()) -> list[str]:
    """Names that match, in their order; all but the hidden ones without patterns. Unknown patterns end the program."""
    names = list(names)
    if patterns is None:
        return [name for name in names if name not in hidden]
    wanted = patterns.split(",")
    for pattern in wanted:
        if not any(fnmatch(name, pattern) for name in names):
            raise SystemExit(f"nothing is called {pattern!r}; there are {', '.join(names)}")
    return [name for name in names if any(fnmatch(name, pattern) for pattern in wanted)]


@dataclass(frozen=True)
class Floors:
    """Bytes per second of a copy, FLOP per second of a matrix product by dtype."""

    copy: float
    matmul: dict[torch.dtype, float]

    def share(self, row: Row, dtype: torch.dtype, flops: float, moved: float | None = None) -> Row:
        """``row`` with its rates, for so much useful work."""
        if row.median_ms is None:
            return row
        seconds = row.median_ms / 1e3
        shares = {"tflops": flops / seconds / 1e12, "matmul_share": flops / seconds / self.matmul[dtype]}
        return replace(row, **shares, copy_share=None if moved is None else moved / seconds / self.copy)


def begin(args: argparse.Namespace) -> torch.device:
    """Sets threads; returns the device."""
    if args.threads:
        torch.set_num_threads(args.threads)
    return torch.device(args.device)


def header(device: torch.device, dtypes: Iterable[torch.dtype]) -> tuple[Machine, Floors]:
    """Measures the floors and prints where this runs."""
    machine = Machine.here(device)
    floors = Floors(copy_bandwidth(device), {dtype: matmul_rate(device, dtype) for dtype in dtypes})
    print(", ".join(f"{name} {value}" for name, value in asdict(machine).items()))
    rates = ", ".join(f"{dtype} matmul {rate / 1e12:.4g} TFLOP/s" for dtype, rate in floors.matmul.items())
    print(f"copy {floors.copy / 1e9:.4g} GB/s, {rates}", flush=True)
    return machine, floors


def report(name: str, rows: list[Row], machine: Machine, csv_path: str | None) -> list[Row]:
    """Prints and stores the rows of one case, at once: a run that is cut short keeps what it measured."""
    rows = with_ratios(rows)
    print()
    print_rows(rows)
    sys.stdout.flush()
    if csv_path != "-":
        append_rows(results_file(name, machine, csv_path), rows, machine)
    return rows


def results_file(name: str, machine: Machine, csv_path: str | None) -> Path:
    """Where rows go."""
    return Path(csv_path) if csv_path else RESULTS / machine.device / f"{name}.csv"


def finish(name: str, rows: list[Row], machine: Machine, csv_path: str | None, plotted: bool = True) -> int:
    """Prints the summary and draws the plot; the exit code is 1 if the gate refused one of ours."""
    print()
    print_speedups(rows)
    if csv_path != "-" and plotted:
        from plot import plot

        path = results_file(name, machine, csv_path)
        print(f"rows: {path}; plot: {plot(path)}")
    return int(any(row.variant == OURS and row.median_ms is None for row in rows))
