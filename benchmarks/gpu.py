"""One round on a GPU: is every kernel right, how fast is it, what is the next thing to look at.

    python benchmarks/gpu.py [--minutes 9] [--out DIR] [--only tests,kernels,step,models] [--dry]

The parts run in this order, each in processes of its own within its own share of the time, so that one that crashes or
hangs does not end the round; what a part leaves of its share goes to the next ones.

ceilings  a large copy, and matrix products of several shapes
smoke     the first launch of every kernel, against float64
tests     the tests marked gpu, file by file, in as many processes as there are cores
kernels   packed attention by tile, from CUDA graphs, beside other libraries
step      training steps of AVSiam-base and DeepAVFusion-base: eager, as a graph, compiled in a graph
models    quick rows of every benchmark

It needs torch, triton, timm, numpy, pytest and hypothesis. DIR (results/<device> unless given) gets rows as `*.csv`,
`round.log` and `round.md`, which is printed at the end. The same command again goes on where the last one stopped: what
passed is not repeated, unless the sources changed or --again is given. Lines of UNTESTED.md whose command passed are
struck. --dry runs everything on a CPU with tiny shapes, to see that it would run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

START = time.monotonic()

import common  # noqa: E402
import gpu_report  # noqa: E402
import torch  # noqa: E402
from machine import Machine, sources  # noqa: E402

BENCHMARKS = Path(__file__).resolve().parent
UNTESTED = BENCHMARKS / "results" / "UNTESTED.md"
STEPS = ("avsiam_base", "deepavfusion_base")
SMOKE = ("packed D64 bfloat16*", "packed D32*", "packed D64 float32*", "packed D80*", "packed D16*", "pair 16*",
         "pair 64*", "norm*,gather", "local*,mse*", "low_rank*")  # fmt: skip
CPU = "--device cpu --threads 1"
REPORT = 5.0  # seconds kept for the end


@dataclass(frozen=True)
class Job:
    """A command as a person would type it and UNTESTED.md names it, with what the round adds to it."""

    command: str
    extra: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return shlex.join([self.command, *self.tests])

    def arguments(self, seconds: float) -> list[str]:
        program, *rest = shlex.split(self.command)
        if program == "pytest":
            rest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-rpfE", "-m", "gpu", *self.tests]
        return [sys.executable, *rest, *(text.format(seconds=max(1, int(seconds - 5))) for text in self.extra)]


@dataclass(frozen=True)
class Part:
    """``seconds`` of a round of nine minutes, ``least`` to say anything at all; ``parallel`` jobs share the device."""

    name: str
    seconds: float
    least: float
    jobs: Callable[[Round], list[Job]]
    parallel: bool = False


class Round:
    """The state of a round, in ``round.json``, and its log."""

    def __init__(self, out: Path, dry: bool, again: bool, workers: int) -> None:
        self.out, self.dry, self.workers = out, dry, workers
        out.mkdir(parents=True, exist_ok=True)
        self.machine = Machine.here(torch.device("cpu" if dry else "cuda"))
        self.file = out / "round.json"
        self.state: dict[str, Any] = {"jobs": {}, "tests": {}, "parts": {}}
        if self.file.exists() and not again:
            before = json.loads(self.file.read_text())
            if before["sources"] == sources():
                self.state = before
        import numpy

        machine = vars(self.machine) | {"numpy": numpy.__version__}
        self.state |= {"sources": sources(), "machine": machine}
        self.log: IO[str] = (out / "round.log").open("a")

    def save(self) -> None:
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.state, indent=1))
        temporary.replace(self.file)

    def say(self, text: str) -> None:
        line = f"[{time.monotonic() - START:5.0f} s] {text}"
        print(line, flush=True)
        self.log.write(line + "\n")
        self.log.flush()

    def rows(self, name: str) -> tuple[str, str]:
        """The argument that sends a script's rows here."""
        return "--csv", str(self.out / f"{name}.csv")

    def run(self, part: Part, seconds: float) -> None:
        """All jobs of a part that have not passed before, none beyond the part's time."""
        begin = time.monotonic()
        end = begin + seconds
        self.say(f"{part.name}: at most {seconds:.0f} s")
        try:
            jobs = part.jobs(self)
        except Exception as problem:  # the other parts need not know
            self.say(f"{part.name}: {common.reason(problem)}")
            self.state["parts"][part.name] = {"seconds": 0.0, "passed": 0, "jobs": 0, "note": common.reason(problem)}
            return
        keys = {job.key for job in jobs}
        earlier = self.state["jobs"].items()
        self.state["jobs"] = {key: job for key, job in earlier if job["part"] != part.name or key in keys}
        waiting = [job for job in jobs if self.state["jobs"].get(job.key, {}).get("status") != "passed"]
        running: list[Running] = []
        parallel = part.parallel or self.dry
        while waiting or running:
            while waiting and len(running) < (self.workers if parallel else 1) and time.monotonic() < end:
                # One that hangs must leave something to the next ones.
                left = end - time.monotonic()
                own = left if parallel else min(left, 1.5 * left / len(waiting))
                running.append(Running(part.name, waiting.pop(0), own, self.out / f"{part.name}-{len(waiting)}.tmp"))
            for process in [p for p in running if p.ended()]:
                running.remove(process)
                self.finish(process)
            if not running and time.monotonic() >= end:
                break
            time.sleep(0.05)
        for job in waiting:
            self.state["jobs"][job.key] = {
                "part": part.name,
                "command": job.command,
                "status": "no time left",
                "tail": "",
            }
        status = [self.state["jobs"][job.key]["status"] for job in jobs]
        passed, taken = status.count("passed"), time.monotonic() - begin
        self.state["parts"][part.name] = {"seconds": taken, "passed": passed, "jobs": len(jobs), "note": ""}
        self.say(f"{part.name}: {passed} of {len(jobs)} passed in {taken:.0f} s")
        self.save()

    def finish(self, process: Running) -> None:
        job, (text, status) = process.job, process.result()
        self.log.write(f"\n$ {shlex.join(process.command)}\n{text}\n")
        tail = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
        entry = {"part": process.part, "command": job.command, "status": status, "tail": tail[:200]}
        self.state["jobs"][job.key] = entry
        self.state["tests"] |= gpu_report.test_results(text, job.tests, ended=status in ("passed", "exit code 1"))
        self.say(f"  {status}, {process.seconds():.0f} s: {job.command[:100]}")
        self.save()


class Running:
    """A job's process, in a session of its own so that what it started can be ended with it."""

    def __init__(self, part: str, job: Job, seconds: float, output: Path) -> None:
        self.part, self.job, self.output, self.command = part, job, output, job.arguments(seconds)
        self.begin, self.end, self.late = time.monotonic(), time.monotonic() + seconds, False
        path = os.pathsep.join(filter(None, [str(BENCHMARKS), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "1000", "PYTHONUNBUFFERED": "1"}
        with output.open("w") as file:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=BENCHMARKS.parent,
                env=environment, start_new_session=True,
            )  # fmt: skip

    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def ended(self) -> bool:
        if self.process.poll() is None and time.monotonic() > self.end:
            self.late = True
            self.stop()
        return self.process.poll() is not None

    def stop(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def result(self) -> tuple[str, str]:
        """What it printed, and "passed" or how it ended."""
        text = self.output.read_text(errors="replace")
        self.output.unlink()
        code = self.process.returncode
        return text, "out of time" if self.late else "passed" if code == 0 else f"exit code {code}"


def ceilings(run: Round) -> list[Job]:
    options = f" --quick {CPU} --dtypes float32" if run.dry else ""
    return [Job(f"python benchmarks/ceilings.py{options}", run.rows("ceilings"))]


def smoke(run: Round) -> list[Job]:
    if run.dry:
        return [Job("python benchmarks/smoke.py --tiny --device cpu", run.rows("smoke"))]
    # A kernel that reads out of bounds takes its whole process with it.
    return [Job(f"python benchmarks/smoke.py --only {shlex.quote(only)}", run.rows("smoke")) for only in SMOKE]


def tests(run: Round) -> list[Job]:
    """Pieces of one file each, as neighbours share kernels to compile; the largest files start first.

    Beside them the steps are compiled, in one process for the sake of memory: the compiler's cache has them later.
    """
    where = ["tests/test_patch_embed_kept.py"] if run.dry else ["tests"]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", *where]
    done = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True, timeout=120)
    known = [line for line in done.stdout.splitlines() if line.startswith("tests/") and "::" in line]
    if not known:
        raise RuntimeError(f"no test was collected: {done.stdout[-300:]} {done.stderr[-300:]}")
    run.state["tests"] = {name: run.state["tests"].get(name, "not run") for name in known}
    files: dict[str, list[str]] = {}
    for name in known:
        if run.state["tests"][name] not in ("passed", "skipped"):
            files.setdefault(name.split("::")[0], []).append(name)
    size = max(4, -(-sum(map(len, files.values())) // (2 * run.workers)))
    pieces = [
        Job(f"pytest -m gpu {file}", tests=tuple(names[i : i + size]))
        for file, names in sorted(files.items(), key=lambda item: -len(item[1]))
        for i in range(0, len(names), size)
    ]
    if not run.dry:
        models = ",".join(STEPS)
        pieces.insert(0, Job(f"python benchmarks/steptime.py --model {models} --launch compile --rounds 1 --csv -"))
    return pieces


def kernels(run: Round) -> list[Job]:
    rows = run.rows("tiles")
    if not run.dry:
        return [Job("python benchmarks/tiles.py", (*rows, "--seconds", "{seconds}"))]
    return [Job(f"python benchmarks/tiles.py {CPU} --cases tiny --tokens 1 --rounds 3", rows)]


def step(run: Round) -> list[Job]:
    if run.dry:
        options = f"{CPU} --launch graph --clips 2 --rounds 1"
        names = [name.replace("base", "tiny") for name in STEPS]
        return [Job(f"python benchmarks/steptime.py --model {name} {options}", run.rows("steps")) for name in names]
    return [
        Job(f"python benchmarks/steptime.py --model {name} --launch {launch}", run.rows("steps"))
        for launch in ("eager,graph", "compile+graph")
        for name in STEPS
    ]


def models(run: Round) -> list[Job]:
    if run.dry:
        options = {
            "attention": "--cases tiny --dtypes float32 --variants avfast,loop",
            "pair_attention": "--cases tiny --dtypes float32 --variants avfast,two_sdpa",
            "diffusion": "--cases tiny --variants avfast,eager",
            "masked_patch_mse": "--cases tiny --dtypes float32 --variants avfast,patches",
            "local_attention": "--cases tiny --dtypes float32 --variants avfast,windows_sdpa",
            "low_rank": "--cases tiny --dtypes float32 --variants avfast,wide",
            "skew_exp": "--cases tiny --variants avfast,matrix_exp",
            "avbert": "--cases 'tiny*' --variants avfast,cached",
            "avsiam": "--cases tiny --depth 1 --variants avfast,padded",
            "deepavfusion": "--cases none --size tiny --tokens masked",
            "mavil": "--cases MAViL,R4 --size tiny --clips 4 --depth 1",
        }
        options = {name: f"{text} --quick --bare --rounds 3 {CPU}" for name, text in options.items()}
    else:
        options = {
            "attention": "--quick --graph --cases n49,n196,n392,mix-0-50,decoder-708 --variants 'avfast,dense*,varlen'",
            "pair_attention": "--quick --graph --variants 'avfast,two_sdpa,summed_pairs'",
            "diffusion": "--quick --graph --variants 'avfast*,eager,compiled'",
            "masked_patch_mse": "--quick --graph --cases video-1254,audio-410 --dtypes bfloat16 --batch 32",
            "local_attention": "--quick --graph --cases 64x8-shifted --dtypes bfloat16",
            "low_rank": "--quick --graph --cases qkv-62,ffn-62 --dtypes bfloat16 --batch 16",
            "skew_exp": "--quick --cases norm-2",
            "avbert": "--quick --cases B8,part,none",
            "avsiam": "--quick --cases full-0-50",
            "deepavfusion": "--quick --tokens masked",
            "mavil": "--quick --cases MAViL,R1,R4",
        }
    return [Job(f"python benchmarks/{name}.py {text}", run.rows(name)) for name, text in options.items()]


PARTS = (
    Part("ceilings", 20, 18, ceilings),
    Part("smoke", 50, 40, smoke, parallel=True),
    Part("tests", 140, 65, tests, parallel=True),
    Part("kernels", 100, 45, kernels),
    Part("step", 140, 40, step),
    Part("models", 95, 30, models),
)


def shares(parts: Sequence[Part], end: float) -> Iterator[tuple[Part, float]]:
    """Each part with its seconds: the least it needs and its share of what nobody needs, never more than there is."""
    for i, part in enumerate(parts):
        left = max(0.0, end - time.monotonic())
        spare = max(0.0, left - sum(later.least for later in parts[i:]))
        share = spare * part.seconds / sum(later.seconds for later in parts[i:])
        yield part, min(left, part.least + share)


def main(argv: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parse.add_argument("--out", type=Path, help="folder for rows, log and report; default results/<device>")
    parse.add_argument("--only", help=f"comma-separated, of {','.join(part.name for part in PARTS)}")
    parse.add_argument("--again", action="store_true", help="repeat what passed before")
    parse.add_argument("--dry", action="store_true", help="on a CPU, with tiny shapes")
    parse.add_argument("--untested", type=Path, default=UNTESTED, help=argparse.SUPPRESS)
    args = parse.parse_args(argv)
    if not args.dry and not torch.cuda.is_available():
        parse.error("no CUDA device; --dry runs the round on a CPU with tiny shapes")
    names = common.chosen([part.name for part in PARTS], args.only)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    device = Machine.here(torch.device("cpu" if args.dry else "cuda")).device
    out = args.out or BENCHMARKS / "results" / (f"{device}-dry" if args.dry else device)
    run = Round(out.resolve(), args.dry, args.again, workers=min(14, cores))
    run.say(f"{run.machine.device}, {run.machine.commit}, Python {platform.python_version()}, {cores} cores -> {out}")
    for part, seconds in shares([part for part in PARTS if part.name in names], START + 60 * args.minutes - REPORT):
        run.run(part, seconds)
        conclude(run, args.untested)
    text = conclude(run, args.untested)
    print(text[:11_000])
    print(f"{out / 'round.md'}: the whole report; round.log: what every process printed")
    passed = all(part["passed"] == part["jobs"] and not part["note"] for part in run.state["parts"].values())
    return 0 if passed else 1


def conclude(run: Round, untested: Path) -> str:
    """Writes the report and UNTESTED.md, after every part, as the round may be cut short at any time."""
    text = gpu_report.report(run.state, run.out)
    (run.out / "round.md").write_text(text)
    label = f"{run.machine.device}, {run.machine.commit}, {time.strftime('%Y-%m-%d')}"
    struck = gpu_report.strike(untested.read_text(), run.state, label)
    (run.out / "UNTESTED.md").write_text(struck)
    if not run.dry:
        untested.write_text(struck)
    run.save()
    return text


if __name__ == "__main__":
    sys.exit(main())
