"""Models and recipes of a user's own file train, draw, evaluate and resume like the built-in ones."""

from __future__ import annotations

import json
import shutil
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from avfast.demo import build
from avfast.models import registry
from avfast.train import checkpoint
from avfast.train.__main__ import main
from avfast.train.evaluate import main as evaluate
from avfast.train.log import read_metrics

OWN = Path(__file__).with_name("own_models.py")
# by recipe: its losses, the kinds of its features, its figures
MODELS = {
    "listener": ({"reconstruction_audio"}, {"audio"}, {"reconstruction.png"}),
    "watcher": ({"intra_modal_visual", "reconstruction_visual"}, {"visual"}, {"reconstruction.png"}),
    "matcher": ({"contrastive", "matching"}, {"audio", "visual", "fused"}, set()),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of clips; one file is sound alone, one cannot be read."""
    root = tmp_path_factory.mktemp("own")
    made = build("tiny", root / "demo", clips=14, test_clips=2, workers=1, progress=False)
    files = sorted(Path(made.train).parent.rglob("*.mp4"))
    for i, file in enumerate(files):
        (root / "clips" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / "clips" / "ab"[i % 2])
    (root / "clips/a/broken.mp4").write_bytes(b"no film")
    with wave.open(str(root / "clips/b/sound.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((np.random.default_rng(0).standard_normal(32000) * 3000).astype("<i2").tobytes())
    return root / "clips"


@pytest.fixture(scope="module", autouse=True)
def registered():
    """What the file registers is gone afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "PRESETS", dict(registry.PRESETS))
        yield
    sys.modules.pop("own_models", None)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_ones_own_trains_through_the_command_line(name, folder, tmp_path, capsys):
    losses, kinds, drawn = MODELS[name]
    out = tmp_path / "run"
    words = ["--recipe", f"{OWN}:{name}", "--data", str(folder), "--out", str(out), "--eval_fraction", "0.4"]
    words += ["--max_bad_files", "0.1", "--steps", "3", "--checkpoint_every", "2"]
    assert main(words) == 0, capsys.readouterr().err
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3] and all(set(row["losses"]) == losses for row in rows)
    assert all(len(row["metrics"]) == (name != "listener") for row in rows)
    assert all(np.isfinite(row["loss"]) for row in rows) and all(row["mfu"] > 0 for row in rows)
    assert {path.name for path in out.glob("*.png")} == {"loss.png"} | drawn
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in out.glob("*.png"))
    summary = json.loads((out / "summary.json").read_text())
    joint = {"joint"} if {"audio", "visual"} <= kinds else set()
    every = {"audio", "visual", "fused"}
    assert summary["probe"]["of"] in joint | kinds and summary["probe"].keys() & every == kinds
    assert summary["knn"].keys() & every == kinds and summary["bad_files"]["count"] <= 1
    assert (summary["retrieval"] is not None) == (name == "matcher")
    said = capsys.readouterr().out
    assert not any(f"  {kind} " in said for kind in every - kinds), "no line of what the model does not give"

    assert evaluate([str(out)]) == 0
    report = json.loads((out / "evaluation-step-3.json").read_text())
    assert all(report[part] == summary[part] for part in ("retrieval", "probe", "knn"))
    words = ["--resume", str(out / "checkpoints/step-2"), "--out", str(tmp_path / "resumed"), "--figures", "0"]
    assert main([*words, "--no-evaluate"]) == 0
    resumed, whole = (checkpoint.load(checkpoint.find(place))[0] for place in (tmp_path / "resumed", out))
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], x) for name, x in whole.items())
