"""Runs that are killed, that signals end, that go on with other processes."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import MODEL, arguments, assert_same, losses, python, settings

from avfast.train import checkpoint
from avfast.train.__main__ import main
from avfast.train.config import SettingError
from avfast.train.log import read_metrics
from avfast.train.loop import run
from avfast.train.trainer import Trainer

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
def test_a_signal_ends_a_run_with_a_checkpoint_and_says_how_to_go_on(number, code, tmp_path, clips, monkeypatch, capfd):
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
        run(settings(tmp_path / "whole", clips))
        assert_same(tmp_path / "whole/checkpoints/step-4", out / "checkpoints/step-4")


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
