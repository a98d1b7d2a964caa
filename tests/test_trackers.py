"""Metrics that go to TensorBoard, Weights & Biases and Trackio; modules stand in for the latter two."""

from __future__ import annotations

import json
import sys

import pytest

from avfast.train import Config, trackers
from avfast.train.__main__ import main
from avfast.train.config import SettingError
from avfast.train.log import Log, read_metrics

ROW = {
    "loss": 1.5, "losses": {"contrastive": 1.0}, "metrics": {"contrastive_accuracy": 0.25}, "clips_per_second": 9.0,
    "data_wait": 0.0, "peak_memory": 1e9, "lr": 0.1, "epoch": 1.0, "batch": 4,
    "knn": {"score": "accuracy", "chance": 0.1, "audio": 0.2},
}  # fmt: skip
VALUES = {
    "loss": 1.5, "contrastive": 1.0, "contrastive_accuracy": 0.25, "clips_per_second": 9.0, "data_wait": 0.0,
    "peak_memory": 1e9, "lr": 0.1, "epoch": 1.0, "batch": 4, "knn/chance": 0.1, "knn/audio": 0.2,
}  # fmt: skip
FAKE = """
calls = []


class Run:
    def log(self, values, step):
        calls.append(("log", step, values))
        if step == 99:
            raise ConnectionError("no\\nroute")

    def finish(self):
        calls.append(("finish",))


def init(**given):
    if given["name"] == "refused":
        raise RuntimeError("no account")
    calls.append(("init", given))
    return Run()
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """What was asked of each stand-in."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    for name in ("wandb", "trackio"):
        (folder / f"{name}.py").write_text(FAKE)
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield lambda name: sys.modules[name].calls
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


def logged(out, config, done=0, steps=(1,)):
    out.mkdir(exist_ok=True)
    log = Log(out, 2, done, trackers.start(config, out, done))
    for step in steps:
        log.record(step, ROW)
    log.close()
    log.close()  # a run that ends in an error closes once more


def test_several_at_once_and_again_after_resuming(tmp_path, calls):
    out, config = tmp_path / "mine", Config(tracker=("wandb", "trackio", "wandb"), lr=0.5)
    logged(out, config)
    logged(out, config, done=1, steps=(2,))
    for name in ("wandb", "trackio"):
        kinds = [call[0] for call in calls(name)]
        assert kinds == ["init", "log", "finish"] * 2
        assert [call[1:] for call in calls(name) if call[0] == "log"] == [(1, VALUES), (2, VALUES)]
        first, second = (call[1] for call in calls(name) if call[0] == "init")
        assert first["project"] == "avfast" and first["name"] == "mine" and first["config"]["lr"] == 0.5
        json.dumps(first["config"])
    given = [call[1] for call in calls("wandb") if call[0] == "init"]
    assert given[0]["id"] == given[1]["id"] and given[0]["dir"] == str(out) and given[1]["resume"] == "allow"
    assert [call[1]["resume"] for call in calls("trackio") if call[0] == "init"] == ["never", "allow"]
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == [1, 2]
    logged(out, config)
    assert calls("wandb")[-3][1]["id"] != given[0]["id"], "a fresh run in the folder is another run"


def test_one_that_fails_is_left_out(tmp_path, calls, capsys):
    logged(tmp_path / "mine", Config(tracker=("wandb", "trackio")), steps=(99, 100))
    assert [call[0] for call in calls("wandb")] == ["init", "log"]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert said[0].startswith("warning: wandb failed and is left out (ConnectionError: no route); all metrics are in")
    assert [row["step"] for row in read_metrics(tmp_path / "mine/metrics.jsonl")] == [99, 100]
    with pytest.raises(SettingError, match="--tracker wandb: RuntimeError: no account"):
        logged(tmp_path / "refused", Config(tracker=("wandb",)))


def test_tensorboard_holds_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged(tmp_path, Config(tracker=("tensorboard",)))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == set(VALUES)
    (event,) = events.Scalars("knn/audio")
    assert event.step == 1 and event.value == pytest.approx(0.2)


def test_what_is_missing_or_unknown_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else object())
    words = ["demo", "--out", str(tmp_path / "run"), "--device", "cpu", "--tracker"]
    for given, message in (
        (["trackio", "wandb"], "avfast: --tracker wandb: wandb is not installed (pip install wandb)"),
        (["wandbb"], "avfast: --tracker wandbb: expected tensorboard or wandb or trackio"),
    ):
        assert main([*words, *given]) == 2
        assert capsys.readouterr().err.strip() == message
    assert not (tmp_path / "run").exists()
    assert trackers.start(Config(), tmp_path, 0) == {}
