"""The steps of a run over its epochs: rates, batches of other sizes in other epochs, and where it goes on."""

import dataclasses
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from small_runs import arguments, assert_same, losses, settings

from avfast import create_model, list_models
from avfast.data.clips import StepBatches
from avfast.models.masked_pair import MaskedPair
from avfast.random import DrawKey
from avfast.train import checkpoint
from avfast.train.config import Config, SettingError
from avfast.train.log import read_metrics
from avfast.train.loop import run
from avfast.train.recipes import RECIPES
from avfast.train.schedule import Schedule, batch_sizes, learning_rate, unimodal_factor
from avfast.train.speed import Work


def test_step_decay_is_multi_step_lr():
    import torch

    recipe, per_epoch = RECIPES["avsiam_base_pretrain"](), 3
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.lr)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(range(10, 1000, 5)), gamma=0.5)
    for epoch in range(20):
        for step in range(per_epoch):
            assert learning_rate(recipe, epoch * per_epoch + step, per_epoch, 60) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()


def test_warm_up_and_cosine():
    config = Config(schedule="cosine", lr=1.0, warmup_steps=4, min_lr=0.1)
    rates = [learning_rate(config, step, 10, 24) for step in range(25)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[14] == pytest.approx(0.55) and rates[24] == pytest.approx(0.1)


def test_the_rate_grows_with_the_batch_and_warms_up_by_epochs():
    config = Config(schedule="cosine", lr=1.5e-4, lr_batch=256, batch_size=64, accumulate=8, warmup_epochs=0.5)
    rates = [learning_rate(config, step, 8, 100) for step in range(5)]
    assert rates == pytest.approx([x * 3e-4 for x in (0.25, 0.5, 0.75, 1.0, 1.0)])
    assert learning_rate(dataclasses.replace(config, warmup_steps=8), 3, 8, 100) == pytest.approx(1.5e-4)


def test_linear_decay_after_a_share_of_warm_up():
    """The first 6 % of 50 steps, then one line to the smallest rate at the end and no further."""
    config = Config(schedule="linear", lr=1.0, warmup_share=0.06, min_lr=0.06)
    rates = [learning_rate(config, step, 10, 50) for step in range(60)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[3:51] == pytest.approx([1 - 0.02 * step for step in range(48)])
    assert rates[50:] == pytest.approx([0.06] * 10)
    longer = dataclasses.replace(config, warmup_steps=6)
    assert learning_rate(longer, 2, 10, 50) == pytest.approx(0.5)
    assert learning_rate(dataclasses.replace(config, warmup_share=0.0), 0, 10, 50) == 1


def test_the_ramp_is_half_a_cosine_over_a_share_of_training():
    config = Config(unimodal_ramp=0.5)
    assert [unimodal_factor(config, step, 40) for step in (0, 10, 20, 39)] == pytest.approx([0, 0.5, 1, 1])
    assert unimodal_factor(config, 5, 40) == pytest.approx(0.1464466)
    assert unimodal_factor(Config(), 0, 40) == 1 and unimodal_factor(config, 0, 0) == 1


# -- batches of other sizes in other epochs -------------------------------------------------------------------------

RATES = [
    {"schedule": "cosine", "min_lr": 1e-6, "warmup_epochs": 1.5, "unimodal_ramp": 0.5},
    {"schedule": "cosine", "warmup_steps": 7, "lr_batch": 256},
    {"schedule": "step", "decay_start": 2.0, "decay_every": 1.5},
    {"schedule": "linear", "warmup_share": 0.3, "lr_batch": 256},
]


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_with_batches_of_one_size_the_rates_are_those_of_the_step_to_the_last_bit(rates, accumulate):
    for count, size in ((23, 5), (100, 7), (7, 7)):
        config = Config(epochs=5.0, accumulate=accumulate, batch_size=size, **rates)
        per_epoch = count // size / accumulate
        for given in (size, lambda epoch, size=size: size):
            schedule = Schedule(config, StepBatches(count, given, steps=0))
            assert schedule.total == -(-5 * (count // size) // accumulate)
            for step in range(schedule.total):
                want = learning_rate(config, step, per_epoch, schedule.total)
                assert schedule.rates(step) == (want, unimodal_factor(config, step, schedule.total))


def test_the_batch_of_diffmavil():
    """0.9 to 0.8 in 60 epochs: facts of the paper's B_e, and a quarter of the steps less."""
    config = Config(epochs=60.0, batch_size=2048, adaptive_batch=True)
    sizes = batch_sizes(config, lambda progress: 0.1 + 0.1 * progress)
    found = [sizes(epoch) / 2048 for epoch in (0, 20, 30, 40, 59, 70)]
    assert found == pytest.approx([2.0, 1.49, 1.33, 1.19, 1.0, 1.0], abs=0.006)
    steps = [Schedule(config, StepBatches(1_730_000, s, steps=0)).total for s in (sizes, 2048)]
    assert steps[0] / steps[1] == pytest.approx(0.75, abs=0.002)
    rising = batch_sizes(config, lambda progress: 0.2 - 0.1 * progress)
    assert [rising(epoch) for epoch in (0, 59)] == [2048, 4096]  # the base batch is that of the smallest ratio
    assert batch_sizes(replace(config, adaptive_batch=False), lambda progress: 1 / 0) == 2048
    assert [batch_sizes(replace(config, epochs=n), lambda progress: 0.1 + 0.1 * progress)(0) for n in (0.5, 1.0)] == [
        2048, 2048
    ]  # fmt: skip


SIZES = (8, 5, 4)  # of 16 clips: 2, 3 and 4 passes


def sizes(epoch):
    return SIZES[min(epoch, 2)]


def test_rates_follow_the_epochs_and_not_the_steps():
    config = Config(epochs=3.0, schedule="cosine", lr=1.0, warmup_epochs=1.0)
    schedule = Schedule(config, StepBatches(16, sizes, steps=0))
    assert schedule.total == 9 and [schedule.epochs(step) for step in (0, 1, 2, 5, 9)] == [0, 0.5, 1, 2, 3]
    even = Schedule(config, StepBatches(16, lambda epoch: 8, steps=0))
    starts = [schedule.rates(step)[0] for step in (0, 1, 2, 5, 7, 9)]
    assert starts == pytest.approx([even.rates(step)[0] for step in (0, 1, 2, 4, 5, 6)])
    assert starts[-1] == pytest.approx(0) and starts[4] == pytest.approx(0.1464466)
    stepped = Schedule(replace(config, schedule="step", decay_start=2.0), StepBatches(16, sizes, steps=0))
    assert [stepped.rates(step)[0] for step in (2, 4, 5, 8)] == [1, 1, 0.5, 0.5]
    assert [schedule.steps(epochs) for epochs in (0, 0.5, 1, 1.5, 2, 3, 4)] == [0, 1, 2, 4, 5, 9, 13]
    assert [step for step in range(9) if schedule.ends(step, 1)] == [1, 4, 8]
    assert [step for step in range(9) if schedule.ends(step, 0.5)] == [0, 1, 3, 4, 6, 8]
    tenths = Schedule(config, StepBatches(20, 2, steps=0))
    assert all(tenths.ends(step, 0.1) for step in range(30))
    longer = Schedule(replace(config, steps=12), StepBatches(16, sizes, steps=0))
    assert longer.total == 12 and longer.epochs(12) == 3.75
    accumulated = Schedule(replace(config, accumulate=2), StepBatches(16, sizes, steps=0))
    assert accumulated.total == 5 and accumulated.epochs(2) == pytest.approx(1 + 2 / 3)
    assert [step for step in range(5) if accumulated.ends(step, 1)] == [0, 2, 4]


OF_VIEWS = ("audio_mae_tiny", "mavil_tiny", "diffmavil_tiny")


@pytest.mark.parametrize("name", [n for n in list_models("*_tiny") if n not in (*OF_VIEWS, "avbert_tiny")])
def test_what_models_say_they_see_is_what_their_draws_keep(name):
    model, rows = create_model(name, depth=1, decoder_depth=1), 60
    parts = sum(part.num_patches for part in model.parts.values())
    seen = []
    for only in model.passes:
        draws = model.draw(rows, key=DrawKey(0, 0, range(rows), rows), only=only)
        seen.append(sum(sum(kept.lengths) for kept in (draws.audio_keep, draws.visual_keep)) / rows / parts)
    assert model.visible(0.0) == model.visible(1.0) == pytest.approx(sum(seen) / len(seen), abs=0.02)


@pytest.mark.parametrize("name", OF_VIEWS)
def test_what_models_of_views_say_they_see_follows_their_curriculum(name):
    model = create_model(name, depth=1, decoder_depth=1, mask_ratio=(0.9, 0.8))
    for progress, share in ((0.0, 0.1), (0.5, 0.15), (1.0, 0.2)):
        assert model.visible(progress) == pytest.approx(share)
        draws = model.draw(2, key=DrawKey(0, 0, range(2), 2, progress))
        for modality in {"audio", "visual"} & vars(draws).keys():
            kept = getattr(draws, modality).kept.shape[2] / getattr(model, modality).num_patches
            assert kept == pytest.approx(share, abs=0.02)


def seeing_more(self, progress):
    return 0.5 + 0.5 * progress


@pytest.fixture
def adaptive(clips, monkeypatch):
    """Settings of a run of 3 epochs of 2, 3 and 4 passes."""
    monkeypatch.setattr(MaskedPair, "visible", seeing_more)

    def make(out, **changes):
        base = replace(settings(out, clips), steps=None, epochs=3.0, adaptive_batch=True, checkpoint_every=None)
        return replace(base, **changes)

    return make


def test_a_run_whose_batches_shrink(adaptive, tmp_path, capsys):
    config = adaptive(tmp_path / "run", keep_checkpoints=0, knn_every=1.5, count_flops=True)
    assert [batch_sizes(config, lambda p: seeing_more(None, p))(epoch) for epoch in range(3)] == list(SIZES)
    assert run(config)["steps"] == 9
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["epoch"] for row in rows] == pytest.approx([0.5, 1, 4 / 3, 5 / 3, 2, 2.25, 2.5, 2.75, 3])
    assert [row["batch"] for row in rows] == [8] * 2 + [5] * 3 + [4] * 4
    assert [row["step"] for row in rows if "knn" in row] == [4, 9]
    assert all(row["flops_per_second"] > 0 for row in rows)
    assert [path.name for path in checkpoint.complete(tmp_path / "run/checkpoints")] == ["step-2", "step-5", "step-9"]
    assert "1 x 4 clips a step (8 clips in the first epoch, 4 in the last), 9 steps" in capsys.readouterr().out
    _, state = checkpoint.load(tmp_path / "run/checkpoints/step-2")
    assert state["global_batch"] == 4
    with pytest.raises(SettingError, match="differ from the checkpoint's: epochs 3.0 -> 4.0"):
        run(replace(config, resume=str(tmp_path / "run/checkpoints/step-2"), out=str(tmp_path / "more"), epochs=4.0))


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_it_goes_on_in_the_middle_of_an_epoch_bit_for_bit(accumulate, adaptive, tmp_path):
    """With two passes a step, some steps begin in one epoch and end in the next."""
    whole = adaptive(tmp_path / "whole", accumulate=accumulate, checkpoint_every=1, keep_checkpoints=0)
    total, middle = (9, 3) if accumulate == 1 else (5, 2)
    assert run(whole)["steps"] == total
    out = tmp_path / "rest"
    run(replace(whole, resume=str(tmp_path / f"whole/checkpoints/step-{middle}"), out=str(out)))
    assert_same(tmp_path / f"whole/checkpoints/step-{total}", out / f"checkpoints/step-{total}")
    assert losses(out) == losses(tmp_path / "whole")[middle:]


def test_shapes_of_the_epoch_before_are_forgotten_by_the_compiler_and_the_count_of_flops(
    adaptive, tmp_path, monkeypatch
):
    """Of one function a compiler keeps eight; the others would run as they are."""
    forgotten, counted = [], []
    monkeypatch.setattr("avfast.train.loop.check_compiler", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(torch.compiler, "reset", lambda: forgotten.append(1))
    monkeypatch.setattr(Work, "count", lambda self, batch: counted.append((len(batch), batch.progress)) or 1)
    run(adaptive(tmp_path / "run", compile=True, count_flops=True))
    assert len(forgotten) == 2 and counted == [(8, 0.0), (5, 0.5), (4, 1.0)]


TWO = """
import sys
from avfast.models.masked_pair import MaskedPair
from avfast.train.__main__ import main
from avfast.train.config import command
MaskedPair.visible = lambda self, progress: 0.5 + 0.5 * progress
command(main)
"""


@pytest.mark.slow
def test_two_processes_equal_one_where_batches_shrink(adaptive, tmp_path):
    """Batches of 8, 5 and 4 clips, shared by 4, 2 or 3, and 2."""
    one = adaptive(tmp_path / "one", lr=3e-3)
    run(one)
    two = replace(one, out=str(tmp_path / "two"), batch_size=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    command += ["--rdzv_endpoint=localhost:0", "--no-python", sys.executable, "-c", TWO, *arguments(two)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert found.returncode == 0, found.stdout + found.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert len(losses(tmp_path / "two")) == 9
