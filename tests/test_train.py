"""Runs on real media files, in one process and in several."""

import json
import shutil
import subprocess
import sys
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import MODEL, arguments, losses, settings

from avfast.models import create_model
from avfast.train import checkpoint, data
from avfast.train.__main__ import main
from avfast.train.config import SettingError
from avfast.train.log import read_metrics
from avfast.train.loop import run
from avfast.train.recipes import demo
from avfast.train.run import RunError
from avfast.train.trainer import Trainer


@pytest.fixture(scope="session")
def mixed(clips, tmp_path_factory):
    """A folder with sound only, a truncated file, a text and an empty file among the clips."""
    folder = tmp_path_factory.mktemp("mixed")
    files = sorted(clips.folder.rglob("*.mp4"))[:12]
    for file in files:
        shutil.copy(file, folder)
    (folder / "text.mp4").write_text("no film")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "cut.mp4").write_bytes(files[0].read_bytes()[:3000])
    for name in ("a", "b"):
        with wave.open(str(folder / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes((np.random.default_rng(0).standard_normal(24000) * 3000).astype("<i2").tobytes())
    return str(folder)


@pytest.fixture(scope="session")
def plain(clips, tmp_path_factory):
    """The folder of a small run that is over; not to be written to."""
    out = tmp_path_factory.mktemp("runs") / "plain"
    run(settings(out, clips))
    return out


@pytest.mark.parametrize("shard", ["none", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_equal_one(shard, tmp_path, clips, mixed):
    """20 steps; unequal shares (17 clips in a batch, 5 of them bad or without pictures), accumulation."""
    one = replace(settings(tmp_path / "one", clips), data=(mixed,), class_csv=None, evaluate=True, figures=3)
    one = replace(one, steps=20, batch_size=18, accumulate=2, max_bad_files=0.5, lr=3e-3, knn_every=10.0)
    with pytest.warns(UserWarning, match="batches of 17"):
        run(one)
    two = replace(one, out=str(tmp_path / "two"), batch_size=9, shard=shard, count_flops=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    command += ["--rdzv_endpoint=localhost:0", "-m", "avfast.train", *arguments(two)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert found.returncode == 0, found.stdout + found.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert all({"data_wait", "mfu"} < set(row) for row in read_metrics(tmp_path / "two/metrics.jsonl"))
    assert losses(tmp_path / "one")[-1] < 0.9 * losses(tmp_path / "one")[0]  # it did train
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    assert summaries[0]["bad_files"] == summaries[1]["bad_files"]
    assert {Path(p).name for p in summaries[0]["bad_files"]["files"]} == {"text.mp4", "empty.mp4", "cut.mp4"}
    assert summaries[1]["processes"] == 2 and summaries[1]["short_clips"] == 2
    assert summaries[0]["retrieval"] == summaries[1]["retrieval"] and summaries[0]["retrieval"]["gallery"] == 8
    assert summaries[0]["knn"] == summaries[1]["knn"]
    assert (tmp_path / "two/reconstruction.png").exists()


def test_a_batch_without_a_readable_clip_touches_every_parameter(clips):
    """Otherwise the other processes of the run would wait for this one's gradients for ever."""
    from avfast.data.clips import Failure, collate

    trainer = Trainer(create_model("avsiam_tiny", **MODEL), demo(), torch.device("cpu"))
    failure = Failure("x.mp4", "broken", index=0, step=0, position=3)
    batch = collate([failure], spec=trainer.model.frontend.spec)
    means = trainer.step([batch], lr=0.0)
    assert means["loss"] == 0
    assert [name for name, p in trainer.model.named_parameters() if p.grad is None] == []


def test_accumulation_is_the_mean_gradient(clips):
    from avfast.data.clips import ClipDataset, StepBatches, make_loader

    config = replace(demo(), model_args=MODEL)
    trainer = Trainer(create_model("avsiam_tiny", **MODEL), config, torch.device("cpu"))
    train = data.read([clips.train])
    dataset = ClipDataset(train, frontend=trainer.model.frontend, train=True)
    batches = list(make_loader(dataset, StepBatches(len(train), 4, steps=2)))
    gradients = []
    for given in ([batches[0]], [batches[1]], batches):
        trainer.step(given, lr=0.0)
        # the two single steps are clipped alike only if neither is: compare what the loss asks for
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).clone())
    unclipped = replace(config, clip_grad=None)
    trainer.config, raw = unclipped, []
    for given in ([batches[0]], [batches[1]], batches):
        trainer.step(given, lr=0.0)
        raw.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).clone())
    torch.testing.assert_close(raw[2], (raw[0] + raw[1]) / 2, rtol=1e-4, atol=1e-6)
    assert all(g.norm() <= 1.0001 for g in gradients) and raw[0].norm() > 1


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint_activations": True},
        {"precision": "bf16"},
        {"workers": 2, "cache_media": False},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
)
def test_what_must_not_change_the_losses(change, tmp_path, clips, plain):
    run(replace(settings(tmp_path / "changed", clips), **change))
    if "workers" in change:  # decoded per step: other windows than out of the cache
        run(settings(tmp_path / "plain", clips, cache_media=False, workers=0))
        plain = tmp_path / "plain"
    tolerance = 2e-2 if "precision" in change else 1e-5 if "compile" in change else 0
    assert losses(tmp_path / "changed") == pytest.approx(losses(plain), rel=tolerance, abs=0)


def test_half_precision_has_a_scaler_per_branch(tmp_path, clips):
    config = settings(tmp_path / "half", clips, precision="fp16", paper_batch=1536)
    with pytest.warns(UserWarning, match="sees 4 clips at once, the paper's 1536"):
        run(replace(config, model_args=MODEL | {"objective": "released"}))
    _, state = checkpoint.load(checkpoint.find(tmp_path / "half"))
    assert len(state["scalers"]) == 2 and all(s["scale"] > 0 for s in state["scalers"])


def test_summary_pictures_and_evaluation_of_a_checkpoint(tmp_path, clips, capsys):
    config = settings(tmp_path / "run", clips)
    summary = run(replace(config, evaluate=True, figures=2, knn_every=0.5))
    assert summary == json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["retrieval"]["gallery"] == 8 and summary["clips"] == {"train": 16, "held_out": 8}
    found = {"clips": 16, "looked_at": 16, "audio": 16, "video": 16, "both": 16, "unreadable": 0}
    assert summary["clips_present"] == 1 and summary["modalities"] == found and summary["truncated_files"] == []
    for direction in ("audio_to_visual", "visual_to_audio"):
        assert set(summary["retrieval"][direction]) == {"R@1", "R@5", "R@10", "MdR"}
        assert 0 <= summary["retrieval"][direction]["R@1"] <= summary["retrieval"][direction]["R@5"] <= 1
    assert {"accuracy", "chance", "fused", "audio", "visual"} <= set(summary["probe"])
    assert summary["clips_per_second"] > 0 and 0 <= summary["data_wait"] <= 1
    rows = {row["step"]: row.get("knn") for row in read_metrics(tmp_path / "run/metrics.jsonl")}
    assert rows[1] is None and rows[2]["score"] == "accuracy" and rows[4] == summary["knn"]
    assert {"audio", "visual", "fused", "sum", "chance"} < set(rows[2])
    for name in ("loss.png", "reconstruction.png"):
        assert (tmp_path / "run" / name).read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "16 clips: 16 with audio, 16 with video, 16 with both\n" in printed
    assert "audio to visual" in printed and "nearest neighbour, accuracy: chance" in printed
    assert "(one partner among 8, ranked at random)" in printed and "(1 of 16 classes)" in printed
    assert "joint: audio and visual features side by side; fused: " in printed

    from avfast.train.evaluate import main as evaluate

    assert evaluate([str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run/evaluation-step-4.json").read_text())
    assert all(report[name] == summary[name] for name in ("retrieval", "probe", "knn"))
    model = checkpoint.load_model(tmp_path / "run")
    assert torch.equal(
        model.state_dict()["pos_embed"], checkpoint.load(checkpoint.find(tmp_path / "run"))[0]["pos_embed"]
    )


def test_untrained_and_extended_runs(tmp_path, clips):
    untrained = run(replace(settings(tmp_path / "run", clips), steps=0, evaluate=True))
    assert untrained["clips_per_second"] is None and untrained["retrieval"]["gallery"] == 8
    run(settings(tmp_path / "more", clips))
    assert main(["--resume", "auto", "--out", str(tmp_path / "more"), "--steps", "6"]) == 0
    assert [p.name for p in checkpoint.complete(tmp_path / "more/checkpoints")] == ["step-4", "step-6"]


def test_too_many_bad_files_end_the_run(tmp_path, mixed, capsys):
    words = ["--data", mixed, "--out", str(tmp_path / "run"), "--batch_size", "4", "--steps", "9"]
    words += [f"--model.{k}={v}" for k, v in MODEL.items()] + ["--eval_fraction", "0", "--log_every", "1"]
    assert main(words) == 1
    printed = capsys.readouterr()
    assert "--max_bad_files: 3 of 17 clips cannot be decoded" in printed.err and printed.err.count("\n") == 1
    assert printed.out.count("bad file") == 3 and "Invalid data" in printed.out


def test_a_loss_that_is_not_finite_names_step_and_clips(tmp_path, clips, monkeypatch):
    step = Trainer.step

    def broken(self, batches, *rates):
        found = step(self, batches, *rates)
        return found | {"loss": found["loss"] * torch.nan} if batches[0].step == 2 else found

    monkeypatch.setattr(Trainer, "step", broken)
    with pytest.raises(RunError, match=r"step 3: the loss is nan, not finite, on rank 0 with clips \S+, \S+, \S+, \S+"):
        run(replace(settings(tmp_path / "run", clips), log_every=10))
    assert not checkpoint.complete(tmp_path / "run/checkpoints")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--data", "no/such/folder"], "--data: no such file or folder: no/such/folder"),
        (["--data", "{train}", "--class_csv", "{short}"], "label"),
        (["--data", "{train}", "--class_csv", "no.csv"], "no.csv: No such file"),
        (["--data", "{empty}"], "no media files under"),
        (["--data", "{train}", "--model", "avsiam_tny"], "did you mean avsiam_tiny"),
        (["--data", "{train}", "--model.dept", "3"], "dept"),
        (["--data", "{train}", "--model.frontend", '{"num_frames": 100}'], "audio must be (B, 192, "),
        (["--data", "{train}", "--eval_fraction", "1"], "all 16 were held out"),
        (["--data", "{train}", "--resume", "auto"], "--resume auto needs the run folder"),
        (["--data", "{train}", "--resume", "{empty}"], "no checkpoint"),
        (["--data", "{train}", "--device", "gpu"], "--device gpu"),
        (["--data", "{train}", "--shard", "fsdp2"], "more than one process"),
        (
            ["--data", "{train}", "--cuda_graph", "--device", "cpu"],
            "--cuda_graph needs a CUDA device, the run is on cpu",
        ),
        (
            ["--weights_csv", "x.csv", "--data", "{empty}"],
            "weights_csv: expected one CSV for each of the 0 manifests, got 1: x.csv",
        ),
        (["--class_csv", "x.csv"], "--class_csv x.csv goes with a manifest"),
        (["--demo_set", "tny", "--clips", "3"], "unknown flag '--clips'"),
    ],
)
def test_wrong_settings_are_answered_in_one_line(words, says, tmp_path, clips, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.csv").write_text("index,mid,display_name\n0,/m/none,nothing\n")
    places = {"train": clips.train, "empty": str(tmp_path / "empty"), "short": str(tmp_path / "short.csv")}
    words = [word if "{" not in word or ":" in word else word.format(**places) for word in words]
    if "auto" not in words:
        words += ["--out", str(tmp_path / "run")]
    assert main([*words, "--steps", "1", "--batch_size", "4"]) == 2
    printed = capsys.readouterr()
    assert says in printed.err and printed.err.count("\n") == 1, printed.err
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_continued_by_accident(clips, plain):
    config = settings(plain, clips)
    with pytest.raises(SettingError, match="holds checkpoints"):
        run(config)
    with pytest.raises(SettingError, match=r"lr 0.0015 -> 0.5; clips per forward pass over all processes 4 -> 8"):
        run(replace(config, resume="auto", lr=0.5, batch_size=8))


def test_a_run_goes_on_with_its_own_clips_wherever_they_are(tmp_path, clips, plain):
    shutil.copytree(plain, tmp_path / "run")
    moved = Path(shutil.copytree(clips.folder, tmp_path / "moved")) / Path(clips.train).relative_to(clips.folder)
    words = ["--resume", str(tmp_path / "run"), "--steps", "5", "--data"]
    assert main([*words, str(moved)]) == 0
    assert [p.name for p in checkpoint.complete(tmp_path / "run/checkpoints")] == ["step-4", "step-5"]


def test_other_clips_than_before_are_refused_unless_allowed(tmp_path, clips, plain, capsys):
    shutil.copytree(plain, tmp_path / "run")
    fewer = json.loads(Path(clips.train).read_text())["data"][:-1]
    fewer = [entry | {k: str(Path(clips.train).parent / entry[k]) for k in ("wav", "video_path")} for entry in fewer]
    (tmp_path / "fewer.json").write_text(json.dumps({"data": fewer}))
    words = ["--resume", str(tmp_path / "run"), "--steps", "5", "--data", str(tmp_path / "fewer.json")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "the training clips are others than the checkpoint's (16 clips, " in said and "-> 15 clips, " in said
    assert "--other_clips" in said and said.count("\n") == 1
    assert main([*words, "--other_clips"]) == 0
    assert "the training clips are others than before" in capsys.readouterr().out


def test_other_clips_are_judged_in_a_file_of_their_own(tmp_path, clips, plain, capsys):
    from avfast.train.evaluate import main as evaluate

    step = shutil.copytree(plain, tmp_path / "run") / "checkpoints/step-4"
    elsewhere = shutil.copytree(step, tmp_path / "copy")
    assert evaluate([str(tmp_path / "run"), "--eval_data", clips.train, "--eval_clips", "6", "--probe_clips", "0"]) == 0
    (report,) = (tmp_path / "run").glob("evaluation-*.json")
    assert report.name.startswith("evaluation-step-4-train-")
    scores = json.loads(report.read_text())
    assert scores["clips"]["eval_data"] == [clips.train] and scores["clips"]["held_out"].startswith("6 clips, ")
    assert scores["retrieval"]["gallery"] == 6
    assert evaluate([str(elsewhere), "--probe_clips", "0"]) == 0 and (elsewhere / "evaluation-copy.json").exists()


def test_a_run_on_demo_clips_is_judged_by_others(clips, tmp_path, monkeypatch):
    """They have classes of their own; the demo's stay what they were."""
    monkeypatch.setattr("avfast.demo.build", lambda *_, **__: clips)
    clips.class_csv = clips.classes
    (tmp_path / "more/bells").mkdir(parents=True)
    shutil.copy(next(clips.folder.rglob("*.mp4")), tmp_path / "more/bells")
    train, held_out = data.sources(replace(demo(), eval_data=(str(tmp_path / "more"),)))
    assert len(train) == 16 and len(held_out) == 1
    own = data.sources(demo())
    assert len(own[1]) == 8 and train.class_names == held_out.class_names == (*own[0].class_names, "bells")
    assert [clip.labels for clip in train.clips] == [clip.labels for clip in own[0].clips]


def test_a_model_that_has_diverged_has_no_scores(tmp_path, clips, plain, capsys):
    from avfast.train.evaluate import main as evaluate

    config = settings(tmp_path / "run", clips, init_from=str(plain))
    with pytest.raises(RunError, match="features are not finite: the model has diverged"):
        run(replace(config, steps=1, lr=1e30, warmup_steps=0, clip_grad=None, evaluate=True, figures=1))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["retrieval"] is summary["probe"] is summary["knn"] is None and summary["diverged"]
    capsys.readouterr()
    assert evaluate([str(tmp_path / "run")]) == 1
    assert "not finite: no scores" in capsys.readouterr().out
