"""benchmarks/avbert.py: what it compares is the same, and nothing wrong gets a time."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
MODULES = ("avbert", "common", "machine", "memory", "plot")


@pytest.fixture
def script(monkeypatch):
    """The script; floors and memory of other processes are not measured."""
    monkeypatch.syspath_prepend(str(FOLDER))
    avbert, common = importlib.import_module("avbert"), importlib.import_module("common")
    monkeypatch.setattr(common, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(common, "matmul_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(avbert, "memory_in_subprocess", lambda *args: {"tiny": (2.0, 1.0)})
    yield avbert
    for name in MODULES:
        sys.modules.pop(name, None)


def run(script, target, cases):
    common = ["--bare", "--device", "cpu", "--rounds", "3", "--csv", str(target)]
    code = script.main([*common, "--cases", cases, "--variants", "avfast,recomputed,cached"])
    with target.open(newline="") as file:
        return code, list(csv.DictReader(file))


def test_the_twins_agree_and_are_timed(script, tmp_path, capsys):
    code, rows = run(script, tmp_path / "rows.csv", "tiny")
    assert code == 0
    forms, phases = ("avfast", "recomputed", "cached"), ("forward", "backward", "both")
    assert {(r["variant"], r["phase"]) for r in rows} == {(v, p) for v in forms for p in phases}
    assert all(0 < float(r["error"]) < 1e-5 and float(r["median_ms"]) > 0 for r in rows)
    both = [r for r in rows if r["phase"] == "both"]
    assert all(r["peak_mib"] == "2" and r["saved_mib"] == "1" and float(r["matmul_share"]) > 0 for r in both)
    assert "x cached" in capsys.readouterr().out


def test_a_scheme_has_its_parameters_and_the_optimisers_memory(script, tmp_path):
    code, rows = run(script, tmp_path / "rows.csv", "tiny-part")
    assert code == 0 and {r["phase"] for r in rows} == {"forward", "backward", "optimiser", "both"}
    # U, biases and two norms, V and Sigma of each of three transformers
    count = 8 * (5 * 32 + 64) + 5 * 32 + 64 + 4 * 32 + 3 * (8 * (5 * 32 + 64) + 6 * 8 * 8)
    assert all(r["note"].startswith(f"{count:,} parameters, 0 MiB") for r in rows)


@pytest.mark.parametrize("fault", ["value", "gradient"])
def test_no_speed_of_a_wrong_transformer(script, monkeypatch, tmp_path, fault):
    right = script.SharedLowRankTransformer.forward

    def wrong(self, x, i, factors=None):
        out = right(self, x, i, factors)
        if fault == "value":
            return out + 1e-3 * x
        return out.detach() + 1.001 * (out - out.detach())

    monkeypatch.setattr(script.SharedLowRankTransformer, "forward", wrong)
    code, rows = run(script, tmp_path / "rows.csv", "tiny")
    ours = [r for r in rows if r["variant"] == "avfast"]
    assert code == 1 and len(ours) == 1 and not ours[0]["median_ms"] and "REFUSED" in ours[0]["note"]
    assert any(r["variant"] == "cached" and r["median_ms"] for r in rows)
