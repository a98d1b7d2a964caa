"""What a GPU round found, in words: `round.md`, and which lines of UNTESTED.md it settles."""

from __future__ import annotations

import csv
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import common

State = Mapping[str, Any]
Cells = dict[str, str]
LINE = re.compile(r"^\| (?P<what>[^|]+?) \| `(?P<command>[^`]+)` \|(?P<run>[^|]*)\|$")
GAIN = 1.03  # a tile is taken where it wins by more, in these cases
SCRIPTS = (
    "attention", "pair_attention", "masked_patch_mse", "local_attention", "low_rank", "skew_exp", "avbert",
    "avsiam", "deepavfusion",
)  # fmt: skip
DECISIVE = ("n196", "n392", "n512", "mix-0-50")


def test_results(text: str, names: Sequence[str], ended: bool) -> dict[str, str]:
    """The fate of each test of a run from pytest's summary: passed, skipped, not run, or a message of its failure."""
    found = dict.fromkeys(names, "skipped" if ended else "not run")
    for line in text.splitlines():
        verdict, _, rest = line.partition(" ")
        if verdict not in ("PASSED", "FAILED", "ERROR"):
            continue
        for name in names:
            if rest == name or rest.startswith(f"{name} - "):
                message = rest[len(name) + 3 :].strip() or "no message"
                found[name] = "passed" if verdict == "PASSED" else f"failed: {message[:160]}"
    return found


# UNTESTED.md.


def strike(text: str, state: State, label: str) -> str:
    """The text with each line of its table struck whose command passed; the last cell says where.

    A line is `| what | command | where it ran |`. A pytest command passed if each test it names came to its end
    and some passed; those that skip for want of a library do no harm. Any other is struck if the round ran just that.
    """
    lines = []
    for line in text.splitlines():
        match = LINE.match(line)
        if match and not match["what"].startswith("~~"):
            verdict = passed(match["command"], state)
            if verdict is not None:
                line = f"| ~~{match['what']}~~ | `{match['command']}` | {label}{verdict} |"
        lines.append(line)
    return "\n".join(lines) + "\n"


def passed(command: str, state: State) -> str | None:
    """How a command passed, None if it did not."""
    if not command.startswith("pytest "):
        job = state["jobs"].get(shlex.join([command]))
        return "" if job and job["status"] == "passed" else None
    counts = {"passed": 0, "skipped": 0}
    for node in (word for word in shlex.split(command) if word.startswith("tests/")):
        fates = [fate for name, fate in state["tests"].items() if covers(node, name)]
        if "passed" not in fates or any(fate not in counts for fate in fates):
            return None
        for fate in fates:
            counts[fate] += 1
    return f": {counts['passed']} passed" + (f", {counts['skipped']} skipped" if counts["skipped"] else "")


def covers(node: str, name: str) -> bool:
    """Whether pytest runs test ``name`` when asked for ``node``, a file, a function or a single case."""
    return name == node or name.startswith((f"{node}::", f"{node}["))


# The report.


def report(state: State, out: Path) -> str:
    """`round.md`, from the state and the rows written so far by these sources."""
    machine = state["machine"]
    rows = {path.stem: list(read(path, machine["commit"])) for path in sorted(out.glob("*.csv"))}
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "triton", "numpy"))
    sections = [
        f"# GPU round: {machine['device']}\n\n{machine['commit']}, {machine['date']}; {versions}",
        table(("part", "passed", "of", "seconds", ""), parts(state)),
        "## Look at first\n\n" + "\n".join(f"{i}. {text}" for i, text in enumerate(first(state, rows), 1)),
        "## Ceilings\n\n" + ceilings(rows.get("ceilings", [])),
        "## Kernels, microseconds\n\n" + table(KERNELS, kernels(rows.get("tiles", []))),
        "## Steps\n\n" + table(STEPS, steps(rows.get("steps", []))),
        "## Benchmarks, forward and backward\n\n" + table(BENCHMARKS, benchmarks(rows)),
        "## Longest kernels of a step\n\n" + longest(rows.get("steps", [])),
        "## Tests\n\n" + table(("file", "passed", "skipped", "failed", "not run"), tests(state)),
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def read(path: Path, commit: str) -> Iterator[Cells]:
    """Rows of this commit, the last of each kind."""
    keys = ("benchmark", "case", "variant", "dtype", "phase", "launch")
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["commit"] == commit]
    yield from {tuple(row[key] for key in keys): row for row in rows}.values()


def table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    if not lines:
        return "nothing measured"
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in cells)


def parts(state: State) -> list[Sequence[Any]]:
    return [
        (name, part["passed"], part["jobs"], f"{part['seconds']:.0f}", part["note"])
        for name, part in state["parts"].items()
    ]


def first(state: State, rows: Mapping[str, list[Cells]]) -> list[str]:
    """Findings, the gravest first."""
    found = [f"smoke, {row['case']}: {row['note']} (error {row['error'] or '-'})" for row in wrong(rows)]
    found += hints(wrong(rows))
    failures: dict[str, list[str]] = {}
    for name, fate in state["tests"].items():
        if fate.startswith("failed"):
            failures.setdefault(name.split("::")[0], []).append(f"`{name}` {fate}")
    found += [f"{len(names)} tests of {file} failed, first {names[0]}" for file, names in failures.items()]
    for job in state["jobs"].values():
        # What a kernel or test has said itself is above; a process that was ended or crashed says nothing.
        told = job["status"] == "exit code 1" and job["command"].startswith(("pytest", "python benchmarks/smoke.py"))
        if job["status"] != "passed" and not told:
            found.append(f"{job['status']}: `{job['command'][:100]}`: {job['tail'][:120]}")
    for name in ("tiles", "steps", *SCRIPTS):
        notes = [row for row in rows.get(name, []) if re.match("REFUSED|FAILED|failed|no graph", row["note"])]
        found += [f"{name}, {row['case']}, {row['variant']} {row['launch']}: {row['note'][:120]}" for row in notes[:4]]
    for row in rows.get("steps", []):
        waits = re.search(r"(?!0 )(\d+) waits.*", row["note"])
        if waits:
            found.append(f"{row['case']} {row['launch']}: the host {waits[0]}")
        busy = re.search(r"busy (\d+)%", row["note"])
        if busy and int(busy[1]) < 90:
            found.append(f"{row['case']} {row['launch']}: the device is busy {busy[1]} % of the time")
    for variant, gains in faster_tiles(rows.get("tiles", [])).items():
        text = ", ".join(f"{case} {phase} {ratio:.2f}" for (case, phase), ratio in gains.items())
        found.append(f"a faster tile, {variant}: {text}")
    return found or ["nothing: all that ran passed"]


def wrong(rows: Mapping[str, list[Cells]]) -> list[Cells]:
    return [row for row in rows.get("smoke", []) if row["note"]]


def hints(bad: Sequence[Cells]) -> list[str]:
    """What the pattern of wrong kernels suggests."""
    names = [row["case"] for row in bad]
    if len(names) > 8:
        return ["most kernels are wrong: look at what launches them"]
    if names and all("float32" in name for name in names):
        return ["wrong in float32 alone: look at how TF32 products are split (`input_precision`)"]
    if names and all("D80" in name for name in names):
        return ["wrong with a head dimension of 80 alone: look at the columns beyond it"]
    return []


def faster_tiles(rows: Sequence[Cells]) -> dict[str, dict[tuple[str, str], float]]:
    """Tiles that beat the shipped ones in a case that decides, with their gains."""
    found: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        ours = row["variant"].startswith(f"{common.OURS} ")
        if ours and row["case"] in DECISIVE and row["ratio"] and float(row["ratio"]) > GAIN:
            found.setdefault(row["variant"], {})[row["case"], row["phase"]] = float(row["ratio"])
    return dict(sorted(found.items(), key=lambda item: -max(item[1].values())))


def ceilings(rows: Sequence[Cells]) -> str:
    best = {}
    for row in rows:
        if row["variant"] == "matmul" and float(row["tflops"]) > float(best.get(row["dtype"], row)["tflops"]) * 0.9999:
            best[row["dtype"]] = row
    texts = [row["note"] for row in rows if row["variant"] == "copy"]
    texts += [f"{dtype} {float(row['tflops']):.4g} TFLOP/s at {row['case']}" for dtype, row in best.items()]
    return "; ".join(f"copy {text}" if "GB/s" in text else text for text in texts) or "nothing measured"


KERNELS = ("case", "phase", "ours", "others", "best other tile")


def kernels(rows: Sequence[Cells]) -> list[Sequence[Any]]:
    """Ours with shipped tiles, other libraries and the best other tile, by case and phase."""
    lines = []
    timed = [row for row in rows if row["median_ms"]]
    for ours in (row for row in timed if row["variant"] == common.OURS):
        same = [row for row in timed if all(row[key] == ours[key] for key in ("case", "dtype", "phase"))]
        tiles = [row for row in same if row["variant"].startswith(f"{common.OURS} ")]
        others = [row for row in same if not row["variant"].startswith(common.OURS)]
        best = min(tiles, key=lambda row: float(row["median_ms"]), default=None)
        lines.append((
            ours["case"], ours["phase"], micro(ours), ", ".join(f"{row['variant']} {micro(row)}" for row in others),
            f"{micro(best)} {best['variant'].removeprefix(common.OURS)}" if best else "",
        ))  # fmt: skip
    return lines


def micro(row: Cells) -> str:
    return f"{float(row['median_ms']) * 1e3:.0f}"


STEPS = ("model", "launch", "ms", "clips/s", "of matmul", "peak GiB", "host, device, waits")


def steps(rows: Sequence[Cells]) -> list[Sequence[Any]]:
    return [
        (row["case"], row["launch"], f"{float(row['median_ms']):.1f}", f"{float(row['clips_per_s']):.0f}",
         f"{float(row['matmul_share']):.0%}", f"{float(row['peak_mib'] or 0) / 1024:.1f}", row["note"][:150])
        for row in rows if row["phase"] == "step" and row["median_ms"]
    ]  # fmt: skip


def longest(rows: Sequence[Cells]) -> str:
    texts: dict[str, list[str]] = {}
    for row in rows:
        if row["phase"].startswith("kernel"):
            text = f"{float(row['median_ms']):.2f} ms {row['note']}"
            texts.setdefault(f"{row['case']} {row['launch']}", []).append(text)
    return "\n".join(f"- {name}: {'; '.join(kernels)}" for name, kernels in texts.items()) or "nothing measured"


BENCHMARKS = ("benchmark", "case", "launch", "ms", "best other over ours", "error")


def benchmarks(rows: Mapping[str, list[Cells]]) -> list[Sequence[Any]]:
    return [
        (name, row["case"], row["launch"], row["median_ms"], row["ratio"][:4], row["error"])
        for name in SCRIPTS
        for row in rows.get(name, [])
        if row["variant"] == common.OURS and row["phase"] == "both" and row["median_ms"]
    ]


def tests(state: State) -> list[Sequence[Any]]:
    counts: dict[str, dict[str, int]] = {}
    for name, fate in state["tests"].items():
        of_file = counts.setdefault(name.split("::")[0], dict.fromkeys(("passed", "skipped", "failed", "not run"), 0))
        of_file[fate.split(":")[0]] += 1
    return [(file, *of_file.values()) for file, of_file in counts.items()]
