from __future__ import annotations

import csv
import sys
import time
from pathlib import Path

import fake_attention
import pytest
import torch

from avfast import backend, ops

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """The benchmark modules, imported as their scripts import one another."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import attention
    import avsiam
    import common
    import memory

    yield {"attention": attention, "avsiam": avsiam, "common": common, "memory": memory}
    for name in ("attention", "attention_cases", "avsiam", "avsiam_variants", "common", "machine", "memory", "plot"):
        sys.modules.pop(name, None)


@pytest.fixture
def no_floors(scripts, monkeypatch):
    """Floors and memory of other processes are not measured again."""
    monkeypatch.setattr(scripts["common"], "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(scripts["common"], "matmul_rate", lambda device, dtype: 1e11)
    for name in ("attention", "avsiam"):
        monkeypatch.setattr(scripts[name], "memory_in_subprocess", lambda *args: {})


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_attention_script_writes_times_memory_machine_and_picture(scripts, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    target, threads = tmp_path / "attention.csv", torch.get_num_threads()
    real = scripts["memory"].memory_in_subprocess  # a process of the script itself, for one variant of two
    monkeypatch.setattr(
        scripts["attention"], "memory_in_subprocess", lambda *args: real(*args) if args[2] == "avfast" else {}
    )
    command = ["--quick", "--device", "cpu", "--threads", "1", "--cases", "tiny", "--dtypes", "float32"]
    assert scripts["attention"].main([*command, "--variants", "avfast,loop", "--csv", str(target)]) == 0
    torch.set_num_threads(threads)
    rows = _rows(target)
    assert {(r["variant"], r["phase"]) for r in rows} == {
        (v, p) for v in ("avfast", "loop") for p in ("forward", "backward", "both")
    }
    for row in rows:
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["tflops"]) > 0 and float(row["matmul_share"]) > 0 and float(row["copy_share"]) > 0
        assert float(row["error"]) < 1e-5 and float(row["ratio"]) > 0 and int(row["rounds"]) >= 3
        assert row["device"].startswith("cpu-") and "avx512_bf16" in row["cpu_flags"] and row["commit"]
        assert row["torch"] == torch.__version__ and row["threads"] == "1"
    both = {r["variant"]: r for r in rows if r["phase"] == "both"}
    assert float(both["avfast"]["saved_mib"]) > 0 and both["avfast"]["peak_mib"]
    best = float(both["loop"]["median_ms"]) / float(both["avfast"]["median_ms"])
    assert float(both["avfast"]["ratio"]) == pytest.approx(best, rel=1e-3)
    assert target.with_suffix(".png").stat().st_size > 1000
    assert "x loop" in capsys.readouterr().out


def test_avsiam_script_compares_schedules(scripts, no_floors, tmp_path, capsys):
    target = tmp_path / "avsiam.csv"
    arguments = ["--quick", "--device", "cpu", "--cases", "tiny", "--depth", "1", "--csv", str(target)]
    assert scripts["avsiam"].main(arguments) == 0
    rows = _rows(target)
    assert {r["variant"] for r in rows} == {"avfast", "padded", "group_by_group", "packed_groups"}
    both = {r["variant"]: r for r in rows if r["phase"] == "both"}
    assert all(float(r["error"]) < 1e-4 and float(r["clips_per_s"]) > 0 for r in both.values())
    assert float(both["padded"]["ideal"]) > 1.2 and float(both["group_by_group"]["ideal"]) == 1
    assert "x padded" in capsys.readouterr().out


@pytest.mark.parametrize("case, variants", [("masking", 5), ("models", 3)])
def test_avsiam_script_tables(scripts, no_floors, tmp_path, case, variants):
    target = tmp_path / "avsiam.csv"
    arguments = ["--size", "tiny", "--depth", "1", "--pairs", "2", "--rounds", "3", "--device", "cpu"]
    assert scripts["avsiam"].main([*arguments, "--cases", case, "--csv", str(target)]) == 0
    rows = _rows(target)
    assert len(rows) == variants and all(float(r["clips_per_s"]) > 0 for r in rows)


OF_LIBRARIES = ["varlen", "flash_attn", "flash_attn_4", "xformers", "dense_cudnn"]


@pytest.mark.parametrize("name", [*OF_LIBRARIES, *(f"avfast_{name}" for name in backend.ATTENTION_LIBRARIES)])
def test_attention_of_other_libraries_is_called_rightly(scripts, monkeypatch, name):
    attention = scripts["attention"]
    monkeypatch.setattr(attention, "_cuda_half", lambda data: None)
    case = attention.Case("small", (9, 9) if "cudnn" in name else (9, 5, 1), heads=2, dim=16)
    data = attention.inputs(case, torch.bfloat16, torch.device("cpu"))
    with fake_attention.installed(monkeypatch) as calls:
        got = attention.VARIANTS[name](case, data).results()
    assert calls == [name.removeprefix("avfast_").removeprefix("dense_")] and backend.get_backend() == "auto"
    assert scripts["common"].rms_error(got, attention.reference(case, data)) < 0.005


@pytest.mark.parametrize("fault", ["value", "gradient", "nan"])
def test_no_speed_of_a_wrong_attention(scripts, no_floors, monkeypatch, tmp_path, capsys, fault):
    right = ops.packed_attention

    def wrong(q, k, v, *args, **kwargs):
        if fault == "gradient":
            k = k.detach() + 0.99 * (k - k.detach())
        out = right(q, k, v, *args, **kwargs)
        return out if fault == "gradient" else out * (1.001 if fault == "value" else float("nan"))

    monkeypatch.setattr(ops, "packed_attention", wrong)
    target = tmp_path / "attention.csv"
    arguments = ["--quick", "--device", "cpu", "--cases", "tiny", "--dtypes", "float32", "--csv", str(target)]
    assert scripts["attention"].main([*arguments, "--variants", "avfast,loop"]) == 1
    ours = [r for r in _rows(target) if r["variant"] == "avfast"]
    assert len(ours) == 1 and not ours[0]["median_ms"] and "REFUSED" in ours[0]["note"]
    assert any(r["variant"] == "loop" and r["median_ms"] for r in _rows(target))
    assert "REFUSED" in capsys.readouterr().out

    assert scripts["avsiam"].main(["--size", "tiny", "--depth", "1", "--device", "cpu", "--cases", "models",
                                   "--pairs", "2", "--rounds", "3", "--csv", str(target)]) == 0  # fmt: skip
    refused = [r for r in _rows(target) if r["benchmark"] == "avsiam"]
    assert len(refused) == 3 and not any(r["median_ms"] for r in refused)


def test_no_speed_of_a_wrong_schedule(scripts, no_floors, monkeypatch, tmp_path):
    variants = sys.modules["avsiam_variants"]
    right = variants.GroupByGroup.pooled
    monkeypatch.setattr(variants.GroupByGroup, "pooled", lambda *args: tuple(x.roll(1, 0) for x in right(*args)[:1])
                        + right(*args)[1:])  # fmt: skip
    target = tmp_path / "avsiam.csv"
    arguments = ["--quick", "--device", "cpu", "--cases", "tiny", "--depth", "1", "--rounds", "3"]
    scripts["avsiam"].main([*arguments, "--variants", "avfast,group_by_group", "--csv", str(target)])
    rows = _rows(target)
    assert [r["note"][:7] for r in rows if r["variant"] == "group_by_group"] == ["REFUSED"]
    assert any(r["variant"] == "avfast" and r["median_ms"] for r in rows)


@pytest.fixture
def diffusion(scripts, no_floors, monkeypatch):
    import diffusion

    monkeypatch.setattr(diffusion, "memory_in_subprocess", lambda *args: {})
    yield diffusion
    sys.modules.pop("diffusion", None)


DIFFUSION = ["--quick", "--device", "cpu", "--cases", "tiny", "--rounds", "3", "--bare"]


def test_diffusion_script_compares_with_plain_operators(diffusion, tmp_path):
    target = tmp_path / "diffusion.csv"
    assert diffusion.main([*DIFFUSION, "--dtypes", "*", "--csv", str(target)]) == 0
    rows = _rows(target)
    assert {(r["variant"], r["dtype"]) for r in rows} == {
        (variant, dtype) for variant in ("avfast", "eager", "eager_patchify") for dtype in ("float32", "bfloat16")
    }
    assert all(float(r["median_ms"]) > 0 and "x a clone" in r["note"] for r in rows)
    assert all(0 < float(r["error"]) < 0.005 for r in rows if r["variant"] == "avfast")


@pytest.mark.parametrize(
    "wrong",
    [lambda out: 1.01 * out, lambda out: out.roll(1, 1), lambda out: out + 0.2 * torch.randn_like(out)],
    ids=["scaled", "other patches", "more noise"],
)
def test_no_speed_of_a_wrong_noise(diffusion, monkeypatch, tmp_path, wrong):
    for name in ("avfast", "eager"):
        right = diffusion.VARIANTS[name]
        monkeypatch.setitem(diffusion.VARIANTS, name, lambda *args, f=right: wrong(f(*args)))
    target = tmp_path / "diffusion.csv"
    assert diffusion.main([*DIFFUSION, "--variants", "avfast,eager,eager_patchify", "--csv", str(target)]) == 1
    refused = {r["variant"]: "REFUSED" in r["note"] and not r["median_ms"] for r in _rows(target)}
    assert refused == {"avfast": True, "eager": True, "eager_patchify": False}


def test_interleaved_timing_takes_every_variant_each_round(scripts):
    order = []

    def phases(name: str, seconds: float) -> dict:
        return {"forward": lambda: (order.append(name), time.sleep(seconds)), "backward": lambda: time.sleep(0.001)}

    variants = {"a": phases("a", 0.002), "b": phases("b", 0.02)}
    timings = scripts["common"].interleave(variants, torch.device("cpu"), rounds=4, budget=60)
    assert sorted(order[:2]) == sorted(order[2:4]) == ["a", "b"] and len(order) == 8 and order[0] != order[2]
    assert timings["a"]["forward"].median < timings["b"]["forward"].median
    for timing in timings.values():
        assert timing["both"].median > timing["forward"].median and timing["both"].rounds == 4


def test_saved_bytes_counts_storages_once_and_not_what_was_there(scripts):
    x = torch.randn(1000, requires_grad=True)
    saved = scripts["memory"].saved_bytes
    assert saved(lambda: (x * 2).exp(), [x]) == 4000  # exp keeps its result, the product nothing
    assert saved(lambda: x * x, [x]) == 0


def test_unknown_names_end_in_the_list_of_known_ones(scripts):
    with pytest.raises(SystemExit, match="n50.*n49"):
        scripts["attention"].main(["--cases", "n50", "--device", "cpu"])


def test_mixes_pad_as_the_papers_ratios_say(scripts):
    from attention_cases import RAGGED

    cases = scripts["attention"].all_cases(1)
    factors = {n: 708 * len(cases[n].lengths) / 2 / sum(cases[n].lengths) for n in ("mix-0-50", "mix-0-80")}
    assert factors == pytest.approx({"mix-0-50": 4 / 3, "mix-0-80": 5 / 3}, rel=0.01)
    assert cases["ragged-100-400"].lengths == RAGGED
