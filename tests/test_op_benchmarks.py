from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = {
    "masked_patch_mse": ("patches",),
    "local_attention": ("windows", "windows_sdpa"),
    "low_rank": ("separate", "wide"),
    "skew_exp": ("matrix_exp", "orthogonal", "cayley"),
}


@pytest.fixture
def load(monkeypatch):
    """A benchmark module; floors and memory of other processes are not measured."""
    monkeypatch.syspath_prepend(str(FOLDER))
    common, runner = importlib.import_module("common"), importlib.import_module("op_runner")
    monkeypatch.setattr(common, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(common, "matmul_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(runner, "memory_in_subprocess", lambda *args: {"tiny torch.float32": (2.0, 1.0)})
    yield importlib.import_module
    for name in (*SCRIPTS, "common", "machine", "memory", "op_runner", "plot"):
        sys.modules.pop(name, None)


def run(script, target: Path) -> tuple[int, list[dict[str, str]]]:
    command = ["--quick", "--bare", "--device", "cpu", "--cases", "tiny", "--rounds", "3", "--csv", str(target)]
    code = script.main(command)
    with target.open(newline="") as file:
        return code, list(csv.DictReader(file))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_compares_with_what_one_would_write(load, tmp_path, capsys, name):
    code, rows = run(load(name), tmp_path / "rows.csv")
    assert code == 0
    phases = ("forward", "backward", "both")
    assert {(r["variant"], r["phase"]) for r in rows} == {(v, p) for v in ("avfast", *SCRIPTS[name]) for p in phases}
    assert all(float(r["error"]) < 1e-5 and float(r["median_ms"]) > 0 and float(r["copy_share"]) > 0 for r in rows)
    assert all(r["peak_mib"] == "2" and r["saved_mib"] == "1" for r in rows if r["phase"] == "both")
    assert f"x {SCRIPTS[name][0]}" in capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_memory_of_one_variant(load, capsys, name):
    assert load(name).main(["--device", "cpu", "--cases", "tiny", "--memory-of", SCRIPTS[name][0]]) == 0
    assert "tiny torch.float32" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["value", "gradient"])
def test_no_speed_of_a_wrong_operator(load, monkeypatch, tmp_path, fault):
    script = load("local_attention")
    right = script.local_attention

    def wrong(qkv, bias, scale, **kwargs):
        if fault == "gradient":
            bias = bias.detach() + 0.99 * (bias - bias.detach())
        out = right(qkv, bias, scale, **kwargs)
        return 1.001 * out if fault == "value" else out

    monkeypatch.setattr(script, "local_attention", wrong)
    code, rows = run(script, tmp_path / "rows.csv")
    ours = [r for r in rows if r["variant"] == "avfast"]
    assert code == 1 and len(ours) == 1 and not ours[0]["median_ms"] and "REFUSED" in ours[0]["note"]
    assert any(r["variant"] == "windows" and r["median_ms"] for r in rows)
