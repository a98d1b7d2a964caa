from __future__ import annotations

import csv
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"
UNTESTED = FOLDER / "results" / "UNTESTED.md"
MODULES = (
    "attention",
    "attention_cases",
    "common",
    "gpu",
    "gpu_report",
    "local_attention",
    "low_rank",
    "machine",
    "masked_patch_mse",
    "memory",
    "op_runner",
    "smoke",
    "steptime",
)


@pytest.fixture
def load(monkeypatch):
    """Imports a script as the scripts import one another."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


# The whole suite and what is still untested


def test_the_suite_collects_with_few_packages_and_has_what_is_untested(load, monkeypatch):
    missing = "av,torchaudio,sklearn,scipy,matplotlib,tensorboard,xdist"
    command = [
        "tests/without.py",
        missing,
        "--collect-only",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-2000:]
    collected = {line.split("[")[0] for line in result.stdout.splitlines() if "::" in line}
    files = {name.split("::")[0] for name in collected}
    table = UNTESTED.read_text()
    commands = re.findall(r"^\| ~*[^|]+ \| `([^`]+)` \|[^|]*\|$", table, re.MULTILINE)
    assert len(commands) == table.count("\n| ") - 1  # every line but the head, whose rule has no space
    for command in commands:
        program, *words = shlex.split(command)
        named = [word for word in words if word.startswith(("tests/", "benchmarks/"))]
        if program == "pytest":
            assert named and set(named) <= collected | files, f"UNTESTED.md names tests that are not there: {command}"
        elif named:
            assert (ROOT / named[0]).exists(), command

    gpu = load("gpu")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *args, **kwargs: result)
    run = SimpleNamespace(dry=False, workers=14, state={"tests": {}})
    pieces = gpu.tests(run)
    assert sorted(name for piece in pieces for name in piece.tests) == sorted(run.state["tests"])
    assert all(piece.command.endswith(f" {name.split('::')[0]}") for piece in pieces for name in piece.tests)
    assert 14 < len(pieces) < 60 and files == {piece.command.split()[-1] for piece in pieces if piece.tests}
    run.state["tests"] |= dict.fromkeys(pieces[1].tests, "passed")
    assert sum(len(piece.tests) for piece in gpu.tests(run)) == len(run.state["tests"]) - len(pieces[1].tests)


def test_the_round_runs_what_is_untested(load, tmp_path):
    gpu = load("gpu")
    run = SimpleNamespace(dry=False, rows=lambda name: ())
    commands = {job.command for part in (gpu.kernels, gpu.step) for job in part(run)}
    assert commands <= set(re.findall(r"`(python benchmarks/[^`]+)`", UNTESTED.read_text()))


TABLE = """# Head

| What | Command | Ran on |
|---|---|---|
| a | `pytest -m gpu tests/test_a.py::test_one tests/test_b.py` | |
| b | `pytest -m gpu tests/test_a.py` | |
| c | `python benchmarks/x.py --quick` | |
| d | `python benchmarks/x.py` | |

Prose with a | and `python benchmarks/x.py --quick`.
"""


def test_only_lines_whose_command_passed_are_struck(load):
    report = load("gpu_report")
    names = {"tests/test_a.py::test_one[1]": "passed", "tests/test_a.py::test_one[2]": "skipped"}
    names |= {"tests/test_a.py::test_one_more": "failed: x", "tests/test_b.py::test_two": "passed"}
    jobs = {shlex.join([c]): {"status": s} for c, s in (("python benchmarks/x.py --quick", "passed"),
                                                        ("python benchmarks/x.py", "out of time"))}  # fmt: skip
    struck = report.strike(TABLE, {"tests": names, "jobs": jobs}, "H100, abc")
    lines = struck.splitlines()
    assert (
        lines[4]
        == "| ~~a~~ | `pytest -m gpu tests/test_a.py::test_one tests/test_b.py` | H100, abc: 2 passed, 1 skipped |"
    )
    assert lines[6] == "| ~~c~~ | `python benchmarks/x.py --quick` | H100, abc |"
    assert [lines[i] for i in (0, 5, 7, 9)] == [TABLE.splitlines()[i] for i in (0, 5, 7, 9)]
    assert report.strike(struck, {"tests": names, "jobs": jobs}, "other") == struck  # only once
    names["tests/test_b.py::test_two"] = "skipped"  # all of a file skipped proves nothing
    assert "~~a~~" not in report.strike(TABLE, {"tests": names, "jobs": jobs}, "H100")


def test_fates_of_tests_are_read_from_the_summary(load):
    names = ("t.py::test[a b]", "t.py::test[a]", "t.py::other", "t.py::third")
    text = "PASSED t.py::test[a b]\nFAILED t.py::test[a] - assert 1 == 2\nERROR t.py::other\nPASSED elsewhere"
    fates = load("gpu_report").test_results(text, names, ended=True)
    assert fates == dict(zip(names, ("passed", "failed: assert 1 == 2", "failed: no message", "skipped"), strict=True))
    assert load("gpu_report").test_results(text, names, ended=False)["t.py::third"] == "not run"


# The round


def job(gpu, code):
    return gpu.Job(f"python -c {shlex.quote(code)}")


def test_a_part_that_fails_hangs_or_cannot_start_ends_no_round(load, monkeypatch, tmp_path, capsys):
    gpu, count = load("gpu"), tmp_path / "count"
    passes = f"open({str(count)!r}, 'a').write('x'); print('fine')"
    hangs = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    monkeypatch.setattr(gpu, "START", gpu.time.monotonic())
    monkeypatch.setattr(gpu, "PARTS", (
        gpu.Part("first", 1, 0.1, lambda run: [job(gpu, "import os; os.abort()"), job(gpu, passes)], parallel=True),
        gpu.Part("second", 1, 0.1, lambda run: 1 / 0),
        gpu.Part("third", 1, 0.1, lambda run: [job(gpu, hangs)]),
        gpu.Part("fourth", 10, 0.1, lambda run: [job(gpu, passes + ";'again'")]),
    ))  # fmt: skip
    untested = tmp_path / "UNTESTED.md"
    untested.write_text(TABLE)
    arguments = ["--dry", "--minutes", "0.3", "--out", str(tmp_path / "out"), "--untested", str(untested)]
    assert gpu.main(arguments) == 1
    text = (tmp_path / "out" / "round.md").read_text()
    assert "exit code -6: `python -c" in text and "out of time" in text and "ZeroDivisionError" in text
    assert capsys.readouterr().out.count("passed in") == 3 and count.read_text() == "xx"
    assert "fine" in (tmp_path / "out" / "round.log").read_text() and untested.read_text() == TABLE

    monkeypatch.setattr(gpu, "START", gpu.time.monotonic())
    assert gpu.main([*arguments, "--only", "first,fourth"]) == 1
    assert count.read_text() == "xx"  # what passed is not repeated
    assert gpu.main([*arguments, "--only", "fourth", "--again"]) == 0
    assert count.read_text() == "xxx"


def test_shares_leave_time_to_later_parts(load, monkeypatch):
    gpu, now = load("gpu"), [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    for minutes in (2, 4, 9):
        now[0], given = 0.0, {}
        for part, seconds in gpu.shares(gpu.PARTS, 60.0 * minutes):
            given[part.name] = seconds
            now[0] += seconds
        assert now[0] == pytest.approx(60 * minutes)
        assert minutes < 4 or all(given[part.name] >= part.least for part in gpu.PARTS)
        assert given["smoke"] >= 40
    # What a part leaves goes to the next ones.
    now[0] = 0.0
    assert [seconds for _, seconds in gpu.shares(gpu.PARTS, 540.0)][-1] == pytest.approx(540.0)


def test_without_a_device_the_round_says_what_to_do(load, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        load("gpu").main([])
    assert "--dry" in capsys.readouterr().err


def test_dry_round(tmp_path):
    command = [sys.executable, str(FOLDER / "gpu.py"), "--dry", "--minutes", "20", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    report = (tmp_path / "round.md").read_text()
    assert report[:10_000] in result.stdout and "nothing: all that ran passed" in report
    assert (tmp_path / "UNTESTED.md").read_text() == UNTESTED.read_text()
    state = json.loads((tmp_path / "round.json").read_text())
    assert list(state["parts"]) == ["ceilings", "smoke", "tests", "kernels", "step", "models"]
    assert all(part["passed"] == part["jobs"] > 0 for part in state["parts"].values())
    of_ops = ("attention", "pair_attention", "masked_patch_mse", "local_attention", "low_rank", "skew_exp")
    for name in ("ceilings", "smoke", "tiles", "steps", *of_ops, "avbert", "avsiam", "mavil", "deepavfusion"):
        with (tmp_path / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows and not any(row["note"].startswith(("FAILED", "REFUSED", "failed")) for row in rows), name
        assert all(row["commit"] for row in rows)
    assert {row["case"].split()[0] for row in rows} == {"none"}
    assert "avsiam_tiny 2 clips | graph" in report and "aten::mm" in report


# What its parts rest on


def test_a_wrong_kernel_is_seen(load, monkeypatch, capsys):
    smoke = load("smoke")
    right = smoke.ops.packed_attention_qkv
    monkeypatch.setattr(smoke.ops, "packed_attention_qkv", lambda *args, **kwargs: right(*args, **kwargs) * 1.02)
    assert smoke.main(["--tiny", "--device", "cpu", "--only", "packed*,gather"]) == 1
    text = capsys.readouterr().out
    assert text.count("WRONG") == 4 and "gather: 0.0e+00" in text  # two problems, each said and in the table


def test_the_device_waits_while_the_host_launches(load, monkeypatch):
    common, said = load("common"), []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            said.append("record")

        def elapsed_time(self, other):
            return 1.0

    def launch():
        gpu_time.sleep(0.02)
        said.append("launch")

    gpu_time = common.time
    for name, value in (("Event", Event), ("_sleep", said.append), ("synchronize", lambda device=None: None)):
        monkeypatch.setattr(torch.cuda, name, value)
    clock = common._cuda_phases(torch.device("cpu"))
    phases = {"forward": launch, "backward": launch}
    assert clock(phases) == {"forward": 1e-3, "backward": 1e-3}
    assert said[:2] == ["launch", "launch"] and said[3:] == ["record", "launch", "record", "launch", "record"]
    assert said[2] >= 0.04 * common.CYCLES  # cycles: at least as long as the host took
    del said[:]
    clock(phases)
    assert said[0] <= 0.1 * common.CYCLES and said.count("launch") == 2


def test_a_failed_capture_is_a_row_and_no_end(load, monkeypatch):
    attention, common = load("attention"), load("common")
    real = attention.VARIANTS["loop"]

    def graphed(run):
        if run.__self__.call.__qualname__.startswith("loop"):
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return run

    monkeypatch.setattr(common, "graphed", graphed)
    case = attention.all_cases(1)["tiny"]
    rows, good = attention.measure(case, torch.float32, torch.device("cpu"), ["avfast", "loop"], 3, 1.0, True)
    notes = {row.variant: (row.median_ms is None, row.note) for row in rows}
    assert notes["loop"] == (True, "no graph: RuntimeError: operation not permitted")
    assert notes["avfast"] == (False, "") and real is attention.VARIANTS["loop"] and set(good) == {"avfast", "loop"}


def test_sources_without_a_repository_have_a_name_of_their_own(load, monkeypatch, tmp_path):
    machine = load("machine")
    for folder in ("avfast", "kernels", "benchmarks"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.delenv("AVFAST_COMMIT", raising=False)
    first = machine._commit()
    assert re.fullmatch("tree-[0-9a-f]{12}", first)
    (tmp_path / "kernels" / "a.py").write_text("x = 2\n")
    machine.sources.cache_clear()
    assert machine._commit() != first
    monkeypatch.setenv("AVFAST_COMMIT", "abc1234")
    assert machine._commit() == "abc1234"
    # Inside somebody else's repository as well.
    subprocess.run(["git", "init", "-q", str(tmp_path.parent)], check=True)
    try:
        assert machine._commit() == "abc1234"
    finally:
        os.rename(tmp_path.parent / ".git", tmp_path / "gone")


def test_the_reference_of_a_large_step_recomputes(load):
    load("avsiam")
    variants = importlib.import_module("avsiam_variants")
    from avfast.models import create_model

    torch.manual_seed(0)
    model = create_model("avsiam_tiny", depth=2, decoder_depth=1)
    draws = model.draw(6, torch.Generator().manual_seed(2))
    inputs = torch.randn(6, *model.audio_size), torch.randn(6, 3, model.img_size, model.img_size)
    memory, found = importlib.import_module("memory"), []
    for recompute in (False, True):
        variant = variants.Padded(model, draws)
        variant.recompute = recompute
        model.zero_grad(set_to_none=True)
        loss = variant(*inputs)
        loss.backward()
        kept = memory.saved_bytes(lambda v=variant: v(*inputs), model.parameters())
        found.append((loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None], kept))
    (plain, grads, kept), (again, same, less) = found
    assert plain == again and all(torch.equal(a, b) for a, b in zip(grads, same, strict=True)) and less < kept / 3
    for name in ("avsiam", "avsiam_variants"):
        sys.modules.pop(name, None)
