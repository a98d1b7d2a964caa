"""Runs of DiffMAViL and AudioMAE: a curriculum with its batches, noised patches, audio alone."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import QUIET, arguments, assert_same, losses

from avfast import create_model
from avfast.demo import PRESETS
from avfast.train import checkpoint
from avfast.train.loop import run
from avfast.train.recipes.audio_mae import audiomae_diffusion_pretrain
from avfast.train.recipes.mavil import diffmavil_demo

MODEL = {"embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 2}
MODEL |= {"decoder_num_heads": 2}


def settings(out, clips, **changes):
    """A small run of the demo's recipe: 16 clips, 4 at a time in the second and last epoch, 8 in the first."""
    base = replace(diffmavil_demo(), data=(clips.train,), class_csv=clips.classes, eval_data=(clips.test,), **QUIET)
    base = replace(base, batch_size=4, epochs=2.0, warmup_epochs=0.5, model_args=base.model_args | MODEL, out=str(out))
    return replace(base, **changes)


def rows(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_ends_with_probes_retrieval_and_figures(tmp_path, clips):
    summary = run(settings(tmp_path / "run", clips, evaluate=True, figures=2))
    assert summary["retrieval"] is not None and {"accuracy", "chance", "audio", "visual"} <= set(summary["probe"])
    for name in ("loss.png", "reconstruction.png"):
        assert (tmp_path / "run" / name).read_bytes()[:4] == b"\x89PNG"
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == list(range(1, 7)) and found[1]["epoch"] == 1  # 2 of 8 clips, 4 of 4
    names = {"reconstruction_audio", "reconstruction_visual", "inter_modal", "intra_modal_audio", "intra_modal_visual"}
    assert set(found[-1]["losses"]) == names


def test_the_demo_hears_and_sees_whole_clips():
    config = diffmavil_demo()
    spec = create_model(config.model, **config.model_args).frontend.spec
    seconds = PRESETS[config.demo_set].seconds
    assert 0.9 * seconds <= spec.frames.seconds <= spec.seconds <= seconds


def test_stopped_within_an_epoch_and_resumed_is_bit_for_bit(tmp_path, clips, monkeypatch):
    whole = settings(tmp_path / "whole", clips, checkpoint_every=1, keep_checkpoints=0)
    run(whole)
    save = checkpoint.save

    def stopping(folder, step, *rest):
        save(folder, step, *rest)
        if step == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", stopping)
    stopped = replace(whole, out=str(tmp_path / "stopped"))
    with pytest.raises(KeyboardInterrupt):
        run(stopped)
    monkeypatch.undo()
    run(replace(stopped, resume="auto"))
    assert_same(tmp_path / "whole/checkpoints/step-6", tmp_path / "stopped/checkpoints/step-6")
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")


@pytest.mark.slow
def test_two_processes_with_an_adaptive_batch_equal_one(tmp_path, clips):
    """Draws, noise and the larger batches of the first epoch are those of the whole, however it is split."""
    one = settings(tmp_path / "one", clips)
    run(one)
    two = replace(one, out=str(tmp_path / "two"), batch_size=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    command += ["--rdzv_endpoint=localhost:0", "-m", "avfast.train", *arguments(two)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert found.returncode == 0, found.stdout + found.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    a, b = (checkpoint.load(tmp_path / name / "checkpoints/step-6")[0] for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=2e-3) for name in a)


def test_audio_mae_trains_on_what_it_hears(tmp_path, clips):
    config = replace(audiomae_diffusion_pretrain(), model="audio_mae_tiny")
    config = replace(config, data=(clips.train,), eval_data=(clips.test,), class_csv=clips.classes, **QUIET)
    config = replace(config, model_args=config.model_args | MODEL, steps=2, batch_size=4, workers=0)
    summary = run(replace(config, evaluate=True, figures=2, out=str(tmp_path / "a")))
    assert summary["retrieval"] is None and "audio" in summary["probe"] and "visual" not in summary["probe"]
    assert all(set(row["losses"]) == {"reconstruction_audio"} for row in rows(tmp_path / "a"))
    assert (tmp_path / "a/reconstruction.png").read_bytes()[:4] == b"\x89PNG"
