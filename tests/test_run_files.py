"""What a run reads and writes: its clips, checkpoints, the state of its generators, its log."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from avfast.models import create_model
from avfast.train import checkpoint, data, parallel
from avfast.train.config import SettingError
from avfast.train.log import Log, short
from avfast.train.recipes import demo

MODEL = {"embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16, "decoder_num_heads": 2}


def test_checkpoints_are_kept_by_number(tmp_path):
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, {"w": torch.ones(2)}, {"step": step}, keep=2)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-2", "step-10"]
    model, state = checkpoint.load(tmp_path / "step-10")
    assert torch.equal(model["w"], torch.ones(2)) and state == {"step": 10}


def test_a_checkpoint_loads_wherever_it_is(tmp_path, monkeypatch):
    config = replace(demo(), model_args=MODEL)
    model, state = create_model(config.model, **MODEL), {"config": json.loads(config.to_json())}
    umask = os.umask(0o022)
    try:
        step = checkpoint.save(tmp_path / "run/checkpoints", 1, model.state_dict(), state)
    finally:
        os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in step.iterdir()} == {0o644}
    shutil.copytree(step, tmp_path / "elsewhere")
    monkeypatch.chdir(step)
    places = (tmp_path / "run", step.parent, step, step / "model.safetensors", tmp_path / "elsewhere", ".", "../..")
    for where in places:
        for name, value in checkpoint.load_model(where).state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), (where, name)
    assert checkpoint.settings_of(checkpoint.find(tmp_path / "elsewhere")) == config
    (tmp_path / "elsewhere/train_state.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="elsewhere/train_state.pt is empty"):
        checkpoint.load_model(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/train_state.pt").unlink()
    with pytest.raises(SettingError, match="elsewhere: no train_state.pt, which holds the model's settings"):
        checkpoint.load_model(tmp_path / "elsewhere")


def test_random_state_survives_a_file(tmp_path):
    path = tmp_path / "rng.pt"
    torch.save(checkpoint.rng_state(), path)
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    checkpoint.set_rng_state(torch.load(path, weights_only=True))
    assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())


def test_losses_in_few_columns():
    losses = {"contrastive": 2.16234, "reconstruction_audio": 1.5, "reconstruction_visual": 0.25, "audio": 3.0}
    assert short(4.0, losses) == "loss 4  contrastive 2.162  reconstruction a 1.5 v 0.25  audio 3"


def test_the_log_says_names_that_are_no_utf8(tmp_path, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    Log(tmp_path, 1).say("bad file caf\udce9, \u540d")
    assert written.getvalue() == b"bad file caf\\udce9, \\u540d\n"


def test_one_process_needs_no_group():
    assert parallel.rank() == 0 and parallel.gather("x") == ["x"] and parallel.first_only(lambda: 3) == 3


def test_held_out_clips_keep_their_side(clips):
    every = data.read([clips.train, clips.test], clips.classes)
    train, held_out = data.split(every, 0.4)
    assert {c.id for c in train.clips} | {c.id for c in held_out.clips} == {c.id for c in every.clips}
    assert len(train) + len(held_out) == 24 and 3 < len(held_out) < 17
    fewer = data.split(replace(every, clips=every.clips[:16]), 0.4)[1]
    assert set(fewer.clips) <= set(held_out.clips)
    assert len(data.first(every, 5)) == 5 and data.first(every, 5) == data.first(data.first(every, 9), 5)


def test_shuffled_pairs_never_match(clips):
    every = data.read([clips.train], clips.classes)
    mixed = data.shuffled(every, 3)
    assert mixed == data.shuffled(every, 3) != data.shuffled(every, 4)
    assert [c.audio_path for c in mixed.clips] == [c.audio_path for c in every.clips]
    assert sorted(c.video_path for c in mixed.clips) == sorted(c.video_path for c in every.clips)
    assert all(c.audio_path != c.video_path for c in mixed.clips)
    assert all(c.video_path.endswith(f"{c.id}.mp4") for c in mixed.clips)
