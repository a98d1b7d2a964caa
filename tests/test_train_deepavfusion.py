"""Runs of DeepAVFusion: what its training does beyond what every model's does."""

import json
import subprocess
import sys
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import QUIET, arguments, assert_same, losses

from avfast import create_model
from avfast.data.clips import StepBatches
from avfast.demo import PRESETS
from avfast.models import Output
from avfast.train import checkpoint, data
from avfast.train.loop import run
from avfast.train.recipes.deepavfusion import deepavfusion_demo
from avfast.train.trainer import Trainer

MODEL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "decoder_embed_dim": 16, "decoder_num_heads": 2}


def settings(out, clips, **changes):
    """A small run of the demo's recipe."""
    base = replace(deepavfusion_demo(), data=(clips.train,), class_csv=clips.classes, eval_data=(clips.test,), **QUIET)
    base = replace(base, batch_size=4, steps=4, warmup_steps=2, model_args=base.model_args | MODEL, out=str(out))
    return replace(base, **changes)


def test_a_run_ends_with_probes_knn_and_figures(tmp_path, clips, capsys):
    summary = run(settings(tmp_path / "run", clips, evaluate=True, figures=2, knn_every=0.5))
    assert summary["retrieval"] is None and any("no retrieval" in note for note in summary["notes"])
    assert {"accuracy", "chance", "audio", "visual", "fused"} <= set(summary["probe"])
    assert {"audio", "visual", "fused", "sum", "chance"} <= set(summary["knn"])
    printed = capsys.readouterr().out
    assert "linear probe" in printed and "audio to visual" not in printed
    for name in ("loss.png", "reconstruction.png", "attention.png"):
        assert (tmp_path / "run" / name).read_bytes()[:4] == b"\x89PNG"
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert set(rows[-1]["losses"]) == {"reconstruction_audio", "reconstruction_visual"}
    assert [row["step"] for row in rows if "knn" in row] == [2, 4]


def test_the_demos_spectrogram_is_as_long_as_its_clips():
    config = deepavfusion_demo()
    model = create_model(config.model, **config.model_args)
    assert model.frontend.seconds == PRESETS[config.demo_set].seconds
    assert (model.frontend.num_frames, model.frontend.num_mel_bins) == model.audio_size


def test_stopped_and_resumed_is_bit_for_bit(tmp_path, clips, monkeypatch):
    """With the released ramp: four groups of parameters with rates of their own."""
    whole = settings(tmp_path / "whole", clips, checkpoint_every=2, unimodal_ramp=0.75, accumulate=2)
    run(whole)
    save = checkpoint.save

    def stopping(folder, step, *rest):
        save(folder, step, *rest)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", stopping)
    stopped = replace(whole, out=str(tmp_path / "stopped"))
    with pytest.raises(KeyboardInterrupt):
        run(stopped)
    monkeypatch.undo()
    run(replace(stopped, resume="auto"))
    assert_same(tmp_path / "whole/checkpoints/step-4", tmp_path / "stopped/checkpoints/step-4")
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped") and len(losses(tmp_path / "whole")) == 4


def test_the_ramp_starts_at_zero_and_leaves_fusion_alone(clips):
    from avfast.data.clips import ClipDataset, make_loader

    config = replace(deepavfusion_demo(), unimodal_ramp=0.5, weight_decay=0.0)
    model = create_model("deepavfusion_tiny", **MODEL)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer, train = Trainer(model, config, torch.device("cpu")), data.read([clips.train])
    dataset = ClipDataset(train, frontend=model.frontend, train=True)
    trainer.step(list(make_loader(dataset, StepBatches(len(train), 4, steps=1))), 1e-2, 0.0)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved == {name for name in trained if not name.startswith(model.unimodal_parts)}
    assert {"fusion_tokens", "fusion_blocks.1.attn.q.weight", "decoders.audio.pred.weight"} < moved < trained


def test_two_processes_equal_one_where_a_modality_is_missing(tmp_path, clips):
    """Two films and six sounds: in some steps a process has no picture at all."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for file in sorted(clips.folder.rglob("*.mp4"))[:2]:
        (folder / file.name).write_bytes(file.read_bytes())
    for name in "abcdef":
        with wave.open(str(folder / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes((np.random.default_rng(0).standard_normal(24000) * 3000).astype("<i2").tobytes())
    read = data.read([str(folder)]).clips
    batches = [StepBatches(8, 8, steps=6).global_batch(step) for step in range(6)]
    shares = [[read[i].video_path is not None for i in half] for batch in batches for half in (batch[:4], batch[4:])]
    assert any(not any(share) for share in shares)

    one = settings(tmp_path / "one", clips, data=(str(folder),), class_csv=None, eval_fraction=0.0, eval_data=())
    one = replace(one, steps=6, batch_size=8)
    run(one)
    two = replace(one, out=str(tmp_path / "two"), batch_size=4)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    command += ["--rdzv_endpoint=localhost:0", "-m", "avfast.train", *arguments(two)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert found.returncode == 0, found.stdout + found.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    a, b = (checkpoint.load(Path(tmp_path / name / "checkpoints/step-6"))[0] for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=2e-3) for name in a)
    idle = create_model(one.model, **one.model_args).unused_parts  # what nothing trains does not decay either
    assert idle and all(torch.equal(a[name], b[name]) for name in a if name.startswith(idle))


def test_maps_are_what_the_layers_weigh():
    model = create_model("deepavfusion_tiny", **MODEL | {"depth": 4})
    audio, visual = torch.randn(2, *model.audio_size), torch.randn(2, 3, 64, 64)
    draws = model.draw(2)

    def shown(model):
        return model.figures({"audio": audio, "visual": visual}, draws, Output(torch.zeros(()))).attention

    maps, grids = shown(model), (model.patch_embed_a.grid_size, model.patch_embed.grid_size)
    for side, of_layers in enumerate((maps.p, maps.r)):
        assert list(of_layers) == [0, 2, 3]
        for layer, found in of_layers.items():
            assert found.shape == (2, *grids[side])
            torch.testing.assert_close(found.sum((1, 2)), torch.ones(2))
            want = model.fusion_attention(audio, visual)[layer][side].mean((1, 2))
            torch.testing.assert_close(found.flatten(1), want)
    for without in ({"fusion_arch": "token"}, {"fusion_layers": "none"}):
        assert shown(create_model("deepavfusion_tiny", **MODEL | without)) is None
