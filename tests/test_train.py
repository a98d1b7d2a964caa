"""Runs on real media files, in this process or in others that are killed."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from avfast.models import create_model
from avfast.train import checkpoint, data
from avfast.train.__main__ import main
from avfast.train.config import SettingError
from avfast.train.log import read_metrics
from avfast.train.loop import run
from avfast.train.recipes import demo
from avfast.train.run import RunError
from avfast.train.trainer import Trainer

MODEL = {"embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16, "decoder_num_heads": 2}
QUIET = {"count_flops": False, "figures": 0, "evaluate": False, "log_every": 1}


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


def settings(out, clips, **changes):
    """A small run that takes a second or two."""
    base = replace(demo(), data=(clips.train,), class_csv=clips.classes, eval_data=(clips.test,), batch_size=4, **QUIET)
    return replace(base, model_args=MODEL, out=str(out), steps=4, warmup_steps=2, **changes)


def arguments(config):
    """The command line of a configuration."""
    path = Path(config.out).parent / f"{Path(config.out).name}.json"
    path.write_text(config.to_json())
    return ["--config", str(path), "--out", config.out]


def python(code, *words, timeout=120):
    """Runs Python code in a process of its own."""
    found = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=timeout)
    return found.returncode, found.stdout + found.stderr


def losses(out):
    return [json.loads(line)["loss"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def assert_same(a, b):
    """Two checkpoints hold the same parameters and optimiser states, bit for bit."""
    (model, state), (model_b, state_b) = checkpoint.load(a), checkpoint.load(b)
    assert model.keys() == model_b.keys() and all(torch.equal(model[k], model_b[k]) for k in model)
    assert len(state["optimizers"]) == len(state_b["optimizers"])
    for one, other in zip(state["optimizers"], state_b["optimizers"], strict=True):
        assert one["state"].keys() == other["state"].keys() and one["state"]
        for k, values in one["state"].items():
            assert all(torch.equal(value, other["state"][k][name]) for name, value in values.items())


KILLED = """
import os, signal, sys, torch
from avfast.train.__main__ import main
save, calls = torch.save, []
def half(value, path):
    save(value, path)
    calls.append(path)
    if len(calls) == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
main(sys.argv[1:])
"""


def test_killed_and_resumed_is_bit_for_bit(tmp_path, clips):
    """6 steps == kill -9 while the second checkpoint is written, --resume; two optimisers, accumulation, clipping."""
    changes = {"checkpoint_every": 2, "accumulate": 2, "model_args": MODEL | {"objective": "released"}}
    whole = replace(settings(tmp_path / "whole", clips), steps=6, **changes)
    run(whole)
    code, _ = python(KILLED, *arguments(replace(whole, out=str(tmp_path / "killed"))))
    folder = tmp_path / "killed/checkpoints"
    assert code == -signal.SIGKILL and sorted(p.name for p in folder.iterdir()) == [".writing-step-4", "step-2"]
    (folder / "step-9").mkdir()  # as a copy that was cut short leaves it
    (folder / "step-9" / checkpoint.MODEL).write_bytes(b"x")
    assert main(["--resume", str(tmp_path / "killed")]) == 0
    assert not (folder / ".writing-step-4").exists()
    assert_same(tmp_path / "whole/checkpoints/step-6", folder / "step-6")
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed") and len(losses(tmp_path / "whole")) == 6


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGUSR1, 0)])
def test_a_signal_ends_a_run_with_a_checkpoint_and_says_how_to_go_on(
    number, code, tmp_path, clips, plain, monkeypatch, capfd
):
    step, out, before = Trainer.step, tmp_path / "run", signal.getsignal(number)

    def met(self, batches, *rates):
        found = step(self, batches, *rates)
        if batches[0].step == 1:
            os.kill(os.getpid(), number)
            if number != signal.SIGINT:
                os.kill(os.getpid(), signal.SIGTERM)  # another one changes nothing
        return found

    monkeypatch.setattr(Trainer, "step", met)
    assert main(arguments(settings(out, clips, checkpoint_every=4))) == code
    assert [p.name for p in checkpoint.complete(out / "checkpoints")] == ["step-2"]
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2 and "stopping after this step" in said[0]
    assert f"{number.name}: " in said[1] and f"-m avfast.train --resume {out}" in said[1]
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    if number == signal.SIGUSR1:
        assert main(["--resume", str(out)]) == 0
        assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == [1, 2, 3, 4]
        assert_same(plain / "checkpoints/step-4", out / "checkpoints/step-4")


def test_a_second_interrupt_ends_a_run_at_once(tmp_path, clips, monkeypatch, capfd):
    def met(self, batches, *rates):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Trainer, "step", met)
    assert main(arguments(settings(tmp_path / "run", clips))) == 130
    assert "SIGINT before the first checkpoint" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_job_of_slurm_asks_to_be_started_again(tmp_path, clips, monkeypatch, capfd):
    """After SIGUSR1 and not after SIGTERM, when the checkpoint is written; the same command then goes on."""
    run_folder, asked = tmp_path / "run", tmp_path / "asked"
    words = [*arguments(settings(run_folder, clips)), "--resume", "auto", "--requeue"]
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert main(words) == 2 and "SLURM_JOB_ID is not set" in capfd.readouterr().err
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    assert main(words) == 2 and "needs scontrol on PATH" in capfd.readouterr().err
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/scontrol").write_text(f'#!/bin/sh\necho "$@" {run_folder}/checkpoints/* >> {asked}\n')
    (tmp_path / "bin/scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{path}")
    assert main([*words, "--resume", "none"]) == 2 and "--out RUN --resume auto" in capfd.readouterr().err
    step = Trainer.step

    def met(self, batches, *rates):
        os.kill(os.getpid(), number)
        return step(self, batches, *rates)

    monkeypatch.setattr(Trainer, "step", met)
    number = signal.SIGUSR1
    assert main(words) == 0
    number = signal.SIGTERM
    assert main(words) == 0
    said = capfd.readouterr().err
    assert f"--resume {run_folder}; SLURM starts the job again\n" in said and said.count("starts the job") == 1
    assert asked.read_text() == f"requeue 123 {run_folder}/checkpoints/step-1\n"
    (tmp_path / "bin/scontrol").write_text("#!/bin/sh\necho disabled >&2\nexit 1\n")
    number = signal.SIGUSR1
    assert main(words) == 128 + number
    assert "; scontrol requeue 123 failed: disabled\n" in capfd.readouterr().err
    assert [row["step"] for row in read_metrics(run_folder / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_after_the_same_step(tmp_path, clips):
    config = replace(settings(tmp_path / "run", clips), workers=1, cache_media=False, checkpoint_every=1000, steps=1000)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    command += ["--rdzv_endpoint=localhost:0", "--no-python", sys.executable, "-c", SIGNALLED, *arguments(config)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert f"SIGTERM: {config.out}/checkpoints/step-" in found.stderr, found.stdout + found.stderr
    assert "continue: torchrun --nproc_per_node=2 -m avfast.train --resume" in found.stderr
    (kept,) = checkpoint.complete(Path(config.out) / "checkpoints")
    assert 3 <= int(kept.name[5:]) <= 6


SIGNALLED = """
import os, signal, sys
from avfast.train.__main__ import main
from avfast.train.config import command
from avfast.train.trainer import Trainer
step = Trainer.step
def met(self, batches, *rates):
    if batches[0].step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, batches, *rates)
Trainer.step = met
command(main)
"""


def launch(count, words):
    """``count`` processes of one run, started as SLURM starts them: by their environment, without torchrun."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    command = [sys.executable, "-m", "avfast.train", *words]
    return [
        subprocess.Popen(command, env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]


@pytest.mark.slow
def test_no_signal_costs_a_step(tmp_path, clips):
    """20 of them at random moments, to one of two processes or both: what is trained is what a run without is."""
    out, rng = tmp_path / "run", random.Random(0)
    config = settings(out, clips, schedule="step", workers=1, cache_media=False, checkpoint_every=10**6)
    config = replace(config, batch_size=2, steps=10**6)  # the step schedule does not know the number of steps
    words = [*arguments(config), "--resume", "auto"]
    done = 0
    for _ in range(20):
        ranks = launch(2, words)
        try:
            while not (rows := read_metrics(out / "metrics.jsonl")) or rows[-1]["step"] <= done:
                assert all(rank.poll() is None for rank in ranks)
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.5))
            for rank in rng.choice([ranks[:1], ranks[1:], ranks, ranks[::-1]]):
                rank.send_signal(rng.choice([signal.SIGTERM, signal.SIGUSR1]))
            assert [rank.wait(100) for rank in ranks] == [0, 0]
        finally:
            for rank in ranks:
                rank.kill()
        found = [row["step"] for row in read_metrics(out / "metrics.jsonl")]
        assert found == list(range(1, found[-1] + 1)) and found[-1] > done
        done = found[-1]
        assert checkpoint.find(out).name == f"step-{done}"
    whole = replace(config, out=str(tmp_path / "whole"), steps=done)
    assert [rank.wait(600) for rank in launch(2, arguments(whole))] == [0, 0]
    assert losses(out) == losses(tmp_path / "whole")
    assert_same(checkpoint.find(out), checkpoint.find(tmp_path / "whole"))


@pytest.mark.slow
def test_the_number_of_processes_may_change(tmp_path, clips):
    """1, 2 and 1 again, as long as the clips of a step are as many."""
    config = settings(tmp_path / "whole", clips, schedule="step", lr=3e-3)
    run(replace(config, steps=12))
    moved = replace(config, out=str(tmp_path / "moved"), resume="auto")
    run(replace(moved, steps=4))
    with pytest.raises(SettingError, match="over all processes 4 -> 2"):
        run(replace(moved, steps=8, batch_size=2))
    words = [*arguments(replace(moved, steps=8, batch_size=2)), "--resume", "auto"]
    assert [rank.wait(200) for rank in launch(2, words)] == [0, 0]
    summary = run(replace(moved, steps=12))
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert len(losses(tmp_path / "moved")) == 12 and summary["processes"] == 1
    assert losses(tmp_path / "moved")[-1] < 0.95 * losses(tmp_path / "moved")[0]  # it did train


def test_a_signal_before_the_first_step_leaves_nothing(tmp_path, clips, monkeypatch, capsys):
    monkeypatch.setattr("avfast.train.loop.fit", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert main(arguments(settings(tmp_path / "run", clips))) == 130
    assert "nothing to continue" in capsys.readouterr().err and not (tmp_path / "run").exists()


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
