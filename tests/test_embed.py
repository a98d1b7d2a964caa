"""Embeddings of a folder of odd files: equal to encode by hand, in every format, interrupted, in two processes."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from media_files import write
from safetensors.torch import load_file

import avfast
from avfast.data.augment import eval_crop
from avfast.data.media import read_audio, read_frames
from avfast.embed import Embeddings, load, run
from avfast.embed.__main__ import main
from avfast.embed.windows import window_starts
from avfast.train import checkpoint
from avfast.train.config import Config

SECONDS = 1.935  # avsiam_tiny's window: 192 frames
KINDS = ("audio", "visual", "fused")


def pictures(seconds: float) -> list[np.ndarray]:
    """Ten a second, each of a grey of its own for as long as it is looked at."""
    return [np.full((48, 64, 3), 20 + (37 * i) % 200, np.uint8) for i in range(round(10 * seconds))]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> SimpleNamespace:
    """A folder of clips of odd lengths and kinds, and a run folder."""
    root = tmp_path_factory.mktemp("embed")
    (clips := root / "clips").mkdir()
    for name, seconds in (("film", 5.0), ("long", 30.0), ("short", 0.5)):
        write(clips / f"{name}.mp4", seconds=seconds, pictures=pictures(seconds))
    write(clips / "silent.mp4", codecs=("libx264", None, 0), pictures=pictures(2.5))
    write(clips / "sound.wav", seconds=3.0)
    (clips / "broken.mp4").write_bytes(b"no film")
    model = avfast.create_model("avsiam_tiny", depth=2).eval()
    for table in (model.pos_embed, model.pos_embed_a):  # so that places count
        torch.nn.init.normal_(table)
    state = {"config": json.loads(Config(model="avsiam_tiny", model_args={"depth": 2}).to_json())}
    checkpoint.save(root / "run" / "checkpoints", 1, model.state_dict(), state)
    return SimpleNamespace(clips=clips, model=model, run=root / "run", found=avfast.embed(model, clips))


@torch.no_grad()
def by_hand(model, path: Path, start: float, length: float, frames: int = 1) -> dict[str, torch.Tensor]:
    """Means over tokens and frames of the window at ``start``, which holds ``length`` seconds."""
    frontend, kinds = model.frontend, {}
    given = {}
    waveform = None if "silent" in path.name else read_audio(path, start=start, seconds=SECONDS)
    if waveform is not None:
        given["audio"] = frontend.audio(waveform[None])
    shown = None
    if path.suffix == ".mp4":
        shown = read_frames(path, [start + length * (i + 0.5) / frames for i in range(frames)]).permute(0, 3, 1, 2)
    for i in range(frames if shown is not None else 1):
        if shown is not None:
            given["visual"] = frontend.visual(eval_crop(shown[i : i + 1], 64))
        features = model.encode(**given)
        for kind in KINDS:
            if (x := getattr(features, kind)) is not None:
                kinds.setdefault(kind, []).append(x[0])
    return {kind: torch.stack(x).mean(0) for kind, x in kinds.items()}


def row(found: Embeddings, name: str) -> int:
    return [Path(path).name for path in found.path].index(name)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-6 * b.abs().max())


def test_windows_cover_a_clip():
    assert window_starts(0.5, 2.0, 2.0) == [0.0]
    assert window_starts(2.0, 2.0, 2.0) == [0.0]
    assert window_starts(2.09, 2.0, 2.0) == [0.0]  # less than 5 % of a window goes on
    assert window_starts(2.2, 2.0, 2.0) == pytest.approx([0.0, 0.2])
    assert window_starts(6.0, 2.0, 2.0) == [0.0, 2.0, 4.0]
    assert window_starts(5.0, 2.0, 0.75) == [0.0, 0.75, 1.5, 2.25, 3.0]
    assert window_starts(5.5, 2.0, 3.0) == [0.0, 3.0, 3.5]


def test_features_are_those_of_encode(files):
    found = files.found
    assert {Path(path).name for path in found.path} == {p.name for p in files.clips.iterdir()} - {"broken.mp4"}
    assert [Path(path).name for path in found.failures] == ["broken.mp4"]
    windows = {
        "short.mp4": [0.0], "film.mp4": [0.0, SECONDS, 5.0 - SECONDS], "silent.mp4": [0.0, 2.5 - SECONDS],
        "sound.wav": [0.0, 3.0 - SECONDS], "long.mp4": [*(i * SECONDS for i in range(15)), 30.0 - SECONDS],
    }  # fmt: skip
    for name, starts in windows.items():
        path = files.clips / name
        each = [by_hand(files.model, path, start, min(SECONDS, 0.5 if "short" in name else 9)) for start in starts]
        for kind in KINDS:
            got = found[kind][row(found, name)]
            if kind not in each[0]:
                assert got.isnan().all(), (name, kind)
                continue
            assert close(got, torch.stack([x[kind].mean(0) for x in each]).mean(0)), (name, kind)


def test_windows_tokens_frames_and_modalities(files):
    film, model = files.clips / "film.mp4", files.model
    found = avfast.embed(model, film, per_window=True, hop=1.2, tokens=True, frames=3, batch_size=2)
    assert found.start.tolist() == pytest.approx([0.0, 1.2, 2.4, 5.0 - SECONDS], abs=1e-9)
    for i, start in enumerate(found.start.tolist()):
        hand = by_hand(model, film, start, SECONDS, frames=3)
        assert all(close(found[kind][i], hand[kind]) for kind in KINDS)
    listened = avfast.embed(model, [film, files.clips / "silent.mp4"], modality="audio", pool="max")
    assert listened.keys() == ["id", "path", "start", "audio"] and len(listened) == 1
    assert list(listened.failures.values()) == ["holds no audio"]
    assert "holds no video" in avfast.embed(model, files.clips, modality="visual").failures.values()


@pytest.mark.parametrize("ending", ["safetensors", "npz", "parquet"])
def test_files_read_back(files, tmp_path, ending):
    if ending == "parquet":
        pytest.importorskip("pyarrow", reason="reads and writes Parquet")
    file = files.found.save(tmp_path / f"all.{ending}")
    back = Embeddings.load(file)
    assert back.id == files.found.id and back.path == files.found.path
    assert torch.equal(back.start, files.found.start) and back.settings == files.found.settings
    assert back.failures == files.found.failures and [*back.features] == [*KINDS]
    for kind in KINDS:
        assert torch.equal(back[kind].nan_to_num(7), files.found[kind].nan_to_num(7))
    assert os.listdir(tmp_path) == [file.name]


def test_what_cannot_be_is_said(files, tmp_path, capsys):
    clips = str(files.clips)
    cases = [
        ([str(files.run), clips, "--out", str(tmp_path / "a.csv")], "ends in .safetensors, .npz, .parquet"),
        ([str(files.run), clips, "--out", str(tmp_path / "no" / "a.npz")], "no such folder"),
        ([str(tmp_path), clips, "--out", str(tmp_path / "a.npz")], "no checkpoint"),
        ([str(files.run), str(tmp_path / "b"), "--out", str(tmp_path / "a.npz")], "CLIPS: no such file or folder"),
        ([str(files.run), clips, "--out", str(tmp_path / "a.npz"), "--hop", "0"], "hop: expected more than 0"),
        ([str(files.run), f"{clips}/broken.mp4", "--out", str(tmp_path / "a.npz")], "no clip gave features"),
        (
            [str(files.run), clips, "--out", str(tmp_path / "a.npz"), "--preset", "big"],
            "unknown model 'big'; did you mean",
        ),
    ]
    for words, message in cases:
        assert main([*words, "--workers", "0"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    with pytest.raises(ValueError, match="only listens"):
        avfast.embed(avfast.create_model("audio_mae_tiny"), clips, modality="visual")
    with pytest.raises(ValueError, match="the model takes 8 at once"):
        avfast.embed(avfast.create_model("mavil_tiny"), clips, frames=2)


def test_an_interrupted_command_goes_on(files, tmp_path, monkeypatch, capsys):
    out = tmp_path / "all.safetensors"
    words = [str(files.run), str(files.clips), "--out", str(out), "--workers", "0", "--batch_size", "1"]
    monkeypatch.setattr(run, "BLOCK", 2)
    encode, calls = run._Job._encode, []

    def counted(self, batch, *given):
        calls.append(int(batch.index[0]))
        if len(calls) == 5 and calls[0] == 1:
            raise KeyboardInterrupt
        encode(self, batch, *given)

    monkeypatch.setattr(run._Job, "_encode", counted)
    assert main(words) == 130 and not out.exists()  # within the long clip: film's block is done
    assert "goes on" in capsys.readouterr().err
    assert [p.name for p in sorted(Path(f"{out}.parts").glob("0*"))] == ["00000000.safetensors"]
    assert main([*words, "--pool", "max"]) == 2
    assert "other settings (pool)" in capsys.readouterr().err
    calls.clear()
    assert main(words) == 0
    assert 1 not in calls and "could not be read" in capsys.readouterr().out
    found = Embeddings.load(out)
    assert found.path == files.found.path and found.failures == files.found.failures
    assert all(close(found[kind].nan_to_num(), files.found[kind].nan_to_num()) for kind in KINDS)
    assert load_file(out)["id"].dtype == torch.uint8 and os.listdir(tmp_path) == [out.name]


def process(rank: int, port: int, words: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    run.BLOCK = 2  # so that both have some
    assert main(words) == 0


@pytest.mark.slow
def test_two_processes_write_the_same(files, tmp_path):
    out = tmp_path / "all.npz"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = [str(files.run), str(files.clips), "--out", str(out), "--workers", "0"]
    torch.multiprocessing.spawn(process, (port, words), nprocs=2)
    found = Embeddings.load(out)
    assert found.path == files.found.path and found.failures == files.found.failures
    assert all(close(found[kind].nan_to_num(), files.found[kind].nan_to_num()) for kind in KINDS)


def test_a_model_from_where_it_lies(files, tmp_path):
    loaded = load(files.run)
    assert all(torch.equal(x, loaded.state_dict()[k]) for k, x in files.model.state_dict().items())
    with pytest.raises(ValueError, match="audio_size: a run's own settings say"):
        load(files.run, audio_size=(96, 64))
    published = files.model.save_pretrained(tmp_path / "published")
    assert torch.equal(load(published).pos_embed_a, files.model.pos_embed_a)
    shorter = load(published, audio_size=(96, 64)).pos_embed_a  # the first 6 of 12 columns
    assert torch.equal(shorter[0].view(4, 6, -1), files.model.pos_embed_a[0].view(4, 12, -1)[:, :6])
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(tmp_path / "none")
