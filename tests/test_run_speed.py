"""How fast a run says it is, and by which means."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from small_runs import MODEL, losses, settings

from avfast import backend, flops
from avfast.models import create_model
from avfast.train import speed
from avfast.train.config import SettingError
from avfast.train.log import read_metrics
from avfast.train.loop import run


def test_each_line_says_how_fast_the_run_is(tmp_path, clips, capsys):
    config = settings(tmp_path / "run", clips, count_flops=True)
    run(replace(config, model_args=MODEL | {"objective": "released"}))
    speed.matmul_rate.cache_clear()
    run(replace(config, out=str(tmp_path / "again")))  # counts FLOPs and measures without a draw of the run's own
    run(replace(config, out=str(tmp_path / "plain"), count_flops=False))
    assert losses(tmp_path / "again") == losses(tmp_path / "plain")
    rows = read_metrics(tmp_path / "again/metrics.jsonl")
    model = create_model("avsiam_tiny", **MODEL)
    size = model.img_size
    step = flops.count(model, torch.randn(4, *model.audio_size), torch.randn(4, 3, size, size), backward=True)
    for row in rows:
        assert row["flops_per_second"] == pytest.approx(step / 4 * row["clips_per_second"])
        assert row["mfu"] > 0 and 0 <= row["data_wait"] < 1 and 1e8 < row["peak_memory"] < 1e11
    printed = capsys.readouterr().out.splitlines()
    assert (
        "on cpu in fp32, every op by native or reference, matmul " in printed[0] and max(map(len, printed[:1])) <= 120
    )
    lines = [line for line in printed if line.startswith("step ")]
    assert len(lines) == 12 and max(map(len, lines)) <= 120
    assert all(word in lines[0] for word in (" clips/s mfu ", "% wait ", " GB  eta "))


def test_a_model_that_cannot_be_counted_trains_without_flops(tmp_path, clips, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("asks for values")

    monkeypatch.setattr(flops, "count", refuse)
    with pytest.warns(UserWarning, match="no FLOP/s: avsiam_tiny cannot be counted on meta: asks for values"):
        run(settings(tmp_path / "run", clips, count_flops=True))
    assert all("clips_per_second" in row and "mfu" not in row for row in read_metrics(tmp_path / "run/metrics.jsonl"))


def test_the_first_line_names_the_backends(tmp_path, clips):
    before, cpu = backend.get_backend(), torch.device("cpu")
    try:
        backend.set_backend("reference")
        assert speed.backends(cpu) == "every op by reference"
        backend.set_backend("varlen")
        assert speed.backends(cpu).startswith("packed_attention by varlen, other ops by ")
        backend.set_backend("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            with pytest.raises(SettingError, match="AVFAST_BACKEND=triton: "):
                run(settings(tmp_path / "run", clips))
    finally:
        backend.set_backend(before)
