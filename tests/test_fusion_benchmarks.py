from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

from avfast.nn import fusion

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = ("pair_attention", "deepavfusion")


@pytest.fixture
def scripts(monkeypatch):
    """The benchmark modules; floors and memory of other processes are not measured."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import common
    import deepavfusion
    import pair_attention

    monkeypatch.setattr(common, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(common, "matmul_rate", lambda device, dtype: 1e11)
    found = {"pair_attention": pair_attention, "deepavfusion": deepavfusion}
    for script in found.values():
        monkeypatch.setattr(script, "memory_in_subprocess", lambda *args: {})
    yield found
    for name in (*SCRIPTS, "common", "machine", "memory", "plot", "materialised"):
        sys.modules.pop(name, None)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_pair_script_compares_forms(scripts, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    target = tmp_path / "pair_attention.csv"
    command = ["--quick", "--device", "cpu", "--cases", "tiny", "--rounds", "3", "--csv", str(target)]
    assert scripts["pair_attention"].main(command) == 0
    rows = _rows(target)
    names = ("avfast", "materialised", "summed_pairs", "two_sdpa")
    assert {(r["variant"], r["phase"]) for r in rows} == {
        (v, p) for v in names for p in ("forward", "backward", "both")
    }
    assert all(float(r["error"]) < 1e-5 and float(r["median_ms"]) > 0 and "GFLOP" in r["note"] for r in rows)
    ideal = {r["variant"]: float(r["ideal"]) for r in rows}
    assert ideal["avfast"] == ideal["two_sdpa"] == 1 and ideal["materialised"] > ideal["summed_pairs"] > 1
    assert target.with_suffix(".png").stat().st_size > 1000
    assert "x materialised" in capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_memory_of_one_variant(scripts, capsys, name):
    arguments = {
        "pair_attention": ["--cases", "tiny", "--memory-of", "materialised"],
        "deepavfusion": ["--size", "tiny", "--tokens", "masked", "--memory-of", "dense/published"],
    }[name]
    assert scripts[name].main(["--device", "cpu", *arguments]) == 0
    text = capsys.readouterr().out
    assert ("tiny torch.float32" if name == "pair_attention" else "masked both") in text


def test_encoder_script_makes_the_table(scripts, tmp_path, capsys):
    target = tmp_path / "deepavfusion.csv"
    command = ["--size", "tiny", "--device", "cpu", "--rounds", "3", "--clips", "2", "--csv", str(target)]
    assert scripts["deepavfusion"].main(command) == 0
    rows = _rows(target)
    phases, forms = ("forward", "backward", "both", "inference"), ("avfast", "published")
    cases = {f"{a} {t} tiny 2 clips" for a in ("none", "late", "dense", "factorized") for t in ("full", "masked")}
    assert {(r["case"], r["variant"], r["phase"]) for r in rows} == {
        (c, v, p) for c in cases for v in forms for p in phases
    }
    assert all(float(r["error"]) < 1e-5 and float(r["clips_per_s"]) > 0 for r in rows)
    published = {r["case"].split()[0]: float(r["ideal"]) for r in rows if r["variant"] == "published"}
    assert published["dense"] > published["late"] > published["none"] >= 1
    assert "x published factorized" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["value", "gradient"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_no_speed_of_a_wrong_form(scripts, monkeypatch, tmp_path, capsys, name, fault):
    right = fusion.pair_attention

    def wrong(q, k_a, *args, **kwargs):
        k_a = k_a.detach() + 0.99 * (k_a - k_a.detach())
        return right(q, k_a, *args, **kwargs) * (1.001 if fault == "value" else 1)

    monkeypatch.setattr(fusion, "pair_attention", wrong)
    target = tmp_path / "rows.csv"
    arguments = ["--device", "cpu", "--rounds", "3", "--csv", str(target)]
    arguments += ["--cases", "tiny"] if name == "pair_attention" else ["--cases", "dense", "--size", "tiny"]
    arguments += ["--variants", "avfast,materialised"] if name == "pair_attention" else ["--tokens", "full"]
    assert scripts[name].main(arguments) == 1
    rows = _rows(target)
    ours = [r for r in rows if r["variant"] == "avfast"]
    assert len(ours) == 1 and not ours[0]["median_ms"] and "REFUSED" in ours[0]["note"]
    assert any(r["variant"] != "avfast" and r["median_ms"] for r in rows)
    assert "REFUSED" in capsys.readouterr().out


@pytest.mark.parametrize("tokens", ["full", "masked"])
@pytest.mark.parametrize("arch", ["dense", "factorized"])
def test_published_form_is_the_same_function_in_float64(scripts, arch, tokens):
    script = scripts["deepavfusion"]
    setting = script.Setting(torch.device("cpu"), torch.float32, "tiny", 2, None)
    model = setting.model(arch).double()
    outcomes = []
    for form in script.FORMS:
        step = script.build(setting, model, tokens, form, "cpu")
        step = script.Step(step.encoder, tuple(x.double() for x in step.inputs), torch.float32)
        outcomes.append(([x.double() for x in step.outputs()], step.results()[1]))
    assert common_error(outcomes) < 1e-6


def common_error(outcomes) -> float:
    """Largest difference over the largest magnitude; gradients have gone through float32."""
    (outs, grads), (want, want_grads) = outcomes
    pairs = [*zip(outs, want, strict=True), *((grads[k], want_grads[k]) for k in want_grads)]
    scale = max(y.abs().max().item() for _, y in pairs[3:])
    worst = [(x - y).abs().max().item() / max(y.abs().max().item(), 1e-4 * scale) for x, y in pairs]
    return max(worst)
