"""benchmarks/data.py: what it writes, and that it gives no speed of what is not the media's."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import pytest


@pytest.fixture
def script(monkeypatch):
    """The benchmark; its model is known as long as the test lasts."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    from avfast.models import registry

    yield importlib.import_module("data")
    registry.PRESETS.pop("nothing", None)
    for name in ("data", "common", "machine", "memory"):
        sys.modules.pop(name, None)


def run(script, target: Path) -> tuple[int, list[dict[str, str]]]:
    command = ["--quick", "--cases", "tiny", "--clips", "4", "--rounds", "1", "--csv", str(target)]
    code = script.main(command)
    with target.open(newline="") as file:
        return code, list(csv.DictReader(file))


@pytest.mark.slow
def test_shards_against_media(script, tmp_path):
    code, rows = run(script, tmp_path / "rows.csv")
    phases = ("one core", "training", "two workers", "training, two workers")
    assert code == 0 and {(r["variant"], r["phase"]) for r in rows} == {
        (v, p) for v in ("avfast", "media") for p in phases
    }
    assert all(float(r["median_ms"]) > 0 and float(r["clips_per_s"]) > 0 and float(r["ratio"]) > 0 for r in rows)


def test_no_speed_of_other_samples(script, monkeypatch, tmp_path):
    read = script.ShardFile.frames
    monkeypatch.setattr(script.ShardFile, "frames", lambda self, times: read(self, times) // 2)
    for name in ("reading", "training"):
        monkeypatch.setattr(script, name, lambda *_: script.Timing.of([1.0]))
    code, rows = run(script, tmp_path / "rows.csv")
    assert code == 1 and {r["variant"]: r["note"][:7] for r in rows}["avfast"] == "REFUSED"
    assert all(not r["median_ms"] for r in rows if r["variant"] == "avfast")
