"""From files to batches: content, draws that depend on names only, and an account of what cannot be read."""

from __future__ import annotations

import inspect
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from media_files import CLICK, grey, rotate_header, shown, tone, write

from avfast.data.bad_files import BadFiles, TooManyBadFiles
from avfast.data.clip_list import Clip, ClipList
from avfast.data.clips import (
    TRAINER_SIGNALS,
    Batch,
    ClipDataset,
    Failure,
    StepBatches,
    _end_with_trainer,
    collate,
    eval_loader,
    make_loader,
)
from avfast.data.frontend import KaldiFrontend
from avfast.data.manifest import read_folder
from avfast.data.media import MediaError
from avfast.data.spec import ClipSpec, even
from avfast.random import DrawKey, progress

FRONTEND = KaldiFrontend(num_frames=128, image_size=32)  # 1.295 s


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as users have them: odd clips among good ones, and three files that cannot be decoded."""
    root = tmp_path_factory.mktemp("clips")
    for label in ("a", "b"):
        (root / label).mkdir()
        for i in range(2):
            write(root / label / f"plain{i}.mp4")
    write(root / "a" / "silent.mp4", codecs=("libx264", None, 0))
    write(root / "a" / "sound.wav")
    write(root / "a" / "8k.mp4", codecs=("libx264", "pcm_s16le", 8000), format="mov")
    write(root / "a" / "5.1.mp4", codecs=("libx264", "aac", 48000), layout="5.1")
    times = [0.0, 0.04, 0.3, 0.31, 0.9, 1.5]
    write(root / "b" / "vfr.mp4", codecs=("libx264", "aac", 16000), pictures=grey(6), times=times)
    write(root / "b" / "portrait.mp4", pictures=grey(20, 48, 96))
    rotate_header(root / "b" / "portrait.mp4", 90)
    write(root / "b" / "short.mp4", seconds=0.3, wave=tone(0.3, 44100, click=0.1))
    write(root / "b" / "ünïcode 名前.webm")
    whole = (root / "a" / "plain0.mp4").read_bytes()
    (root / "a" / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (root / "b" / "text.mp4").write_text("not a video\n" * 100)
    (root / "b" / "zero.mp4").write_bytes(b"")
    return root


BAD = {"a/truncated", "b/text", "b/zero"}


def by_name(clips: ClipList, batches: Any) -> tuple[dict[str, dict[str, Any]], list[Failure]]:
    rows, failures = {}, []
    for batch in batches:
        failures += batch.failures
        for i, index in enumerate(batch.index.tolist()):
            names = ("waveform", "num_samples", "frames", "has_audio", "has_visual", "labels", "short")
            values = {name: getattr(batch, name) for name in names}
            rows[clips.clips[index].id] = {name: value[i] for name, value in values.items() if value is not None}
    return rows, failures


def test_a_users_folder(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    clips = read_folder(folder)
    dataset = ClipDataset(clips, frontend=FRONTEND, train=False)
    with caplog.at_level(logging.WARNING, logger="avfast"):
        loader = eval_loader(dataset, 4)
        rows, failures = by_name(clips, loader)
        assert sum(len(batch) for batch in loader) == len(rows)  # once more, without a second warning
    assert {clips.clips[index].id for index in loader.short} == {"b/short"}
    assert set(rows) == {clip.id for clip in clips.clips} - BAD
    assert {os.path.relpath(f.path, folder).removesuffix(".mp4") for f in failures} == BAD
    assert all(len(f.reason) > 5 for f in failures)
    silent, sound = rows["a/silent"], rows["a/sound"]
    assert not silent["has_audio"] and not silent["waveform"].any() and silent["num_samples"] == 0
    assert not sound["has_visual"] and not sound["frames"].any()
    assert sum(row["has_audio"] and row["has_visual"] for row in rows.values()).item() == len(rows) - 2
    # 1.295 s of sound with its click, and the picture in the middle of it
    for name in set(rows) - {"a/silent", "b/short"}:
        wave = rows[name]["waveform"][: rows[name]["num_samples"]]
        assert len(wave) == FRONTEND.num_samples
        assert wave.abs().argmax().item() / 16000 == pytest.approx(CLICK, abs=1e-3)
    assert {name: shown(rows[name]["frames"])[0] for name in rows if rows[name]["has_visual"]} == {
        name: {"b/vfr": 3, "b/short": 1}.get(name, 6) for name in set(rows) - {"a/sound"}
    }
    assert rows["b/short"]["short"] and 4800 <= rows["b/short"]["num_samples"] <= 5600
    assert [name for name, row in rows.items() if row["short"]] == ["b/short"]
    assert [r.getMessage() for r in caplog.records] == [
        "some clips are shorter than the model's 1.29 s: their end is padded"
    ]
    assert {tuple(row["labels"].tolist()) for name, row in rows.items() if name[0] == "a"} == {(1.0, 0.0)}


def test_spectrogram_of_a_batch(folder: Path) -> None:
    """Every decodable clip becomes finite inputs; a clip without sound becomes padding."""
    clips = read_folder(folder)
    for batch in eval_loader(ClipDataset(clips, frontend=FRONTEND, train=False), 32):
        audio = FRONTEND.audio(batch.waveform, batch.num_samples)
        assert audio.shape == (12, 128, 128) and audio.isfinite().all()
        padding = (audio == (0 - FRONTEND.mean) / FRONTEND.std).all(2).sum(1)
        assert padding[~batch.has_audio].tolist() == [128] and (padding[batch.short] > 90).all()
        assert (padding[batch.has_audio & ~batch.short] == 0).all()
        assert FRONTEND.visual(batch.frames).shape == (12, 3, 32, 32)


def test_one_file_as_a_model_takes_it(folder: Path) -> None:
    clips = read_folder(folder)
    index = [clip.id for clip in clips.clips].index("a/plain0")
    batch = next(iter(eval_loader(ClipDataset(ClipList((clips.clips[index],)), frontend=FRONTEND, train=False), 1)))
    both, wanted = FRONTEND.load(folder / "a/plain0.mp4"), FRONTEND(batch)
    assert both.keys() == wanted.keys() == {"audio", "visual"}
    assert all(torch.equal(both[name], wanted[name]) for name in both)
    for name, kind, shape in (("sound.wav", "audio", (1, 128, 128)), ("silent.mp4", "visual", (1, 3, 32, 32))):
        assert {k: x.shape for k, x in FRONTEND.load(folder / "a" / name).items()} == {kind: shape}
    with pytest.raises(MediaError, match="text.mp4: "):
        FRONTEND.load(folder / "b/text.mp4")


@pytest.mark.parametrize("cache", [False, True])
def test_several_frames(folder: Path, cache: bool) -> None:
    clips = read_folder(folder / "b")
    dataset = ClipDataset(clips, frontend=replace(FRONTEND.spec, frames=even(4)), train=False, cache=cache)
    rows, failures = by_name(clips, eval_loader(dataset, 32))
    assert len(failures) == 2 and rows["plain0"]["frames"].shape == (4, 3, 32, 32)
    near = [1, 4, 8, 11]  # pictures at 0.16, 0.49, 0.81 and 1.13 s; a cache holds 16 of the 20
    assert np.abs(np.subtract(shown(rows["plain0"]["frames"]), near)).max() <= (1 if cache else 0)


def test_draws_depend_on_names_only(folder: Path) -> None:
    clips = read_folder(folder)
    make = partial(ClipDataset, clips, frontend=FRONTEND, train=True)
    names = [clip.id for clip in clips.clips]
    index = names.index("a/plain0")
    sample = make(seed=3)[index, 5, 2]
    again = make(seed=3)[index, 5, 2]
    assert torch.equal(sample.waveform, again.waveform) and torch.equal(sample.frames, again.frames)
    for other in (make(seed=4)[index, 5, 2], make(seed=3)[index, 6, 2], make(seed=3)[index, 5, 3]):
        assert other.frames.shape == (1, 3, 32, 32) and len(other.waveform) == FRONTEND.num_samples
        assert not torch.equal(other.waveform, sample.waveform)


def test_random_windows_and_frames_cover_the_clip(folder: Path) -> None:
    clips = ClipList((Clip("x", str(folder / "a/plain0.mp4"), str(folder / "a/plain0.mp4")),))
    dataset = ClipDataset(clips, frontend=FRONTEND, train=True)
    offsets, pictures = [], []
    for step in range(200):
        sample = dataset[0, step, 0]
        start = CLICK - sample.waveform.abs().argmax().item() / 16000
        (picture,) = shown(sample.frames)
        assert start * 10 - 1.01 <= picture <= (start + FRONTEND.seconds) * 10 + 0.01  # both from one window
        offsets.append(start)
        pictures.append(picture)
    assert min(offsets) < 0.05 and max(offsets) > 0.65 and {*range(2, 18)} <= set(pictures)


def test_cache_equals_decoding(folder: Path) -> None:
    clips = read_folder(folder)
    cached = ClipDataset(clips, frontend=FRONTEND, train=False, cache=True)
    seen: list[int] = []
    bad = cached.warm(lambda items: (seen.append(item) or item for item in items))  # type: ignore[func-returns-value]
    assert seen == list(range(len(clips)))
    got, failed = by_name(clips, make_eval(cached, workers=2))
    want, failures = by_name(clips, make_eval(ClipDataset(clips, frontend=FRONTEND, train=False)))
    assert failed == failures and {failure.path for failure in bad} == {failure.path for failure in failures}
    assert got.keys() == want.keys()
    for name, row in want.items():
        assert torch.equal(got[name]["waveform"][: got[name]["num_samples"]], row["waveform"][: row["num_samples"]])
        assert np.abs(np.subtract(shown(got[name]["frames"]), shown(row["frames"]))).max() <= 1
    with pytest.raises(ValueError, match="cache=True"):
        ClipDataset(clips, frontend=FRONTEND, train=False).warm()


def make_eval(dataset: ClipDataset, workers: int = 0) -> Any:
    return eval_loader(dataset, 16, workers)


ONE_BATCH = """
import sys
from avfast.data.clips import ClipDataset, StepBatches, make_loader
from avfast.data.frontend import KaldiFrontend
from avfast.data.manifest import read_folder
if __name__ == "__main__":
    data = ClipDataset(read_folder(sys.argv[1]), frontend=KaldiFrontend(num_frames=64, image_size=32), train=True)
    batches = iter(make_loader(data, StepBatches(1, 1, steps=10**9), 1))
    next(batches)
"""
LOADER = f"""{ONE_BATCH}
    for batch in batches:
        print("ready", flush=True)
"""
BARE = f"""
import multiprocessing, os, signal, threading, time
TRAINER_SIGNALS = {tuple(map(int, TRAINER_SIGNALS))}
{inspect.getsource(_end_with_trainer)}
def worker():
    _end_with_trainer(0)
    print("ready", flush=True)
    time.sleep(600)
if __name__ == "__main__":
    multiprocessing.get_context("forkserver").Process(target=worker, daemon=True).start()
    time.sleep(600)
"""


@pytest.mark.parametrize("script", [pytest.param(LOADER, marks=pytest.mark.slow), BARE], ids=["loader", "bare"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_a_killed_trainer(folder: Path, tmp_path: Path, script: str, number: int) -> None:
    """The bare script does without torch, which each of three processes would import."""
    (tmp_path / "trainer.py").write_text(script)
    command = [sys.executable, str(tmp_path / "trainer.py"), str(folder / "a/sound.wav")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None and trainer.stdout.readline() == b"ready\n"
        trainer.send_signal(number)
        # all processes hold the pipe: it ends when the last of them does
        ended = threading.Thread(target=trainer.stdout.read, daemon=True)
        ended.start()
        ended.join(10)
        assert not ended.is_alive()


def test_a_script_may_end_while_it_loads(folder: Path, tmp_path: Path) -> None:
    """The loader is alive until the interpreter has gone."""
    (tmp_path / "script.py").write_text(ONE_BATCH)
    subprocess.run([sys.executable, str(tmp_path / "script.py"), str(folder / "a/sound.wav")], check=True, timeout=60)


def test_workers_change_nothing(folder: Path) -> None:
    clips = read_folder(folder)
    dataset = ClipDataset(clips, frontend=FRONTEND, train=True, seed=1)
    batches = StepBatches(len(clips), 5, steps=3, seed=1)
    alone = list(make_loader(dataset, batches))
    helped = list(make_loader(dataset, batches, 2))
    assert len(alone) == len(helped) == 3
    for a, b in zip(alone, helped, strict=True):
        assert (a.positions, a.step, a.total, a.failures) == (b.positions, b.step, b.total, b.failures)
        for name in ("waveform", "num_samples", "frames", "has_audio", "has_visual", "labels", "index", "short"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert b.waveform.is_shared() and not b.has_audio.is_shared()  # each shared tensor costs a connection
        assert not a.waveform.is_shared()
    pickle.loads(pickle.dumps(dataset))


def test_ranks_share_one_global_batch(folder: Path) -> None:
    clips = read_folder(folder)
    dataset = ClipDataset(clips, frontend=FRONTEND, train=True)
    last = partial(StepBatches, len(clips), 7, steps=4, start_step=3, epochs=5)
    (whole,) = make_loader(dataset, last())
    parts = [next(iter(make_loader(dataset, last(rank=rank, world_size=2)))) for rank in range(2)]
    assert whole.total == parts[0].total == 7 and whole.step == parts[1].step == 3
    assert whole.positions == parts[0].positions + parts[1].positions
    assert torch.equal(whole.frames, torch.cat([part.frames for part in parts]))
    assert whole.failures == parts[0].failures + parts[1].failures
    assert {*whole.positions} | {f.position for f in whole.failures} == set(range(7))
    assert whole.key(9) == DrawKey(9, 3, whole.positions, 7, progress=0.25)  # of epoch 1


def test_batch_without_a_sample(folder: Path) -> None:
    clips = ClipList((Clip("gone", None, str(folder / "none.mp4"), (1,)),), ("x", "y"))
    (batch,) = make_loader(ClipDataset(clips, frontend=FRONTEND, train=True), StepBatches(1, 1, steps=1))
    assert len(batch) == 0 and batch.positions == () and batch.frames.shape == (0, 1, 3, 32, 32)
    assert batch.labels is not None and batch.labels.shape == (0, 2) and batch.waveform.shape == (0, 0)
    assert FRONTEND.audio(batch.waveform, batch.num_samples).shape == (0, 128, 128)
    assert FRONTEND.visual(batch.frames).shape == (0, 3, 32, 32)
    assert FRONTEND.audio(batch.waveform, batch.num_samples, train=True, key=batch.key(0)).shape == (0, 128, 128)
    (failure,) = batch.failures
    assert failure.path.endswith("none.mp4") and "No such file" in failure.reason and failure.position == 0


def test_batch_to_another_dtype_of_place(folder: Path) -> None:
    dataset = ClipDataset(read_folder(folder), frontend=FRONTEND, train=False)
    batch = next(iter(eval_loader(dataset, 3)))
    moved = batch.to("meta")
    assert isinstance(moved, Batch) and moved.frames.is_meta and moved.labels.is_meta
    assert moved.positions == batch.positions and not batch.frames.is_meta


def test_frames_of_the_field(tmp_path: Path) -> None:
    """CAV-MAE's frame_0 .. frame_9, with a hole that the next lower number fills."""
    from PIL import Image

    for i in (0, 1, 2, 3, 4, 6, 7, 8, 9):
        (tmp_path / f"frame_{i}").mkdir()
        Image.fromarray(grey(i + 1)[i]).save(tmp_path / f"frame_{i}" / "x.jpg")
    write(tmp_path / "x.wav")
    clip = Clip("x", str(tmp_path / "x.wav"), None, frames_dir=str(tmp_path))
    frontend = KaldiFrontend(num_frames=198, image_size=32)  # 1.995 s
    middle = ClipDataset(ClipList((clip,)), frontend=frontend, train=False)[0, 0, 0]
    assert shown(middle.frames) == [4] and len(middle.waveform) == frontend.num_samples
    every = ClipDataset(ClipList((clip,)), frontend=replace(frontend.spec, frames=even(10)), train=False)[0, 0, 0]
    assert shown(every.frames) == [0, 1, 2, 3, 4, 4, 6, 7, 8, 9]
    for cache in (False, True):
        train = ClipDataset(ClipList((clip,)), frontend=frontend, train=True, cache=cache)
        assert {n for step in range(60) for n in shown(train[0, step, 0].frames)} == {0, 1, 2, 3, 4, 6, 7, 8, 9}
    gone = ClipDataset(ClipList((Clip("y", None, None, frames_dir=str(tmp_path)),)), frontend=frontend, train=False)
    assert isinstance(gone[0, 0, 0], Failure) and gone[0, 0, 0].path.endswith("frame_0/y.jpg")
    (tmp_path / "frame_0" / "y.jpg").write_bytes(b"no jpeg")
    assert "y.jpg" in gone[0, 0, 0].path and "cannot identify" in gone[0, 0, 0].reason


# -- sampling -------------------------------------------------------------------------------------------------------


def test_epochs() -> None:
    batches = StepBatches(23, 5, steps=12, seed=2)
    assert batches.first_step(3) == 12 and len(batches) == 12
    steps = [batches.global_batch(step).tolist() for step in range(12)]
    for epoch in range(3):
        seen = sum(steps[4 * epoch : 4 * epoch + 4], [])
        assert len(set(seen)) == 20
    assert steps[:4] != steps[4:8]
    assert {clip for step in range(400) for clip in batches.global_batch(step)} == set(range(23))
    assert StepBatches(23, 5, steps=12, seed=3).global_batch(0).tolist() != steps[0]


def test_resuming_anywhere() -> None:
    whole = list(StepBatches(23, 5, steps=11, seed=2))
    assert list(StepBatches(23, 5, steps=11, start_step=6, seed=2)) == whole[6:]
    assert [step for _, step, _ in sum(whole, [])] == sorted(list(range(11)) * 5)
    for world_size in (2, 3, 5):
        parts = [list(StepBatches(23, 5, steps=11, seed=2, rank=r, world_size=world_size)) for r in range(world_size)]
        assert [sum(step, []) for step in zip(*parts, strict=True)] == whole


def growing(epoch: int) -> int:
    return (2, 5, 5, 11)[min(epoch, 3)]


def test_batches_that_grow_between_epochs() -> None:
    batches = StepBatches(11, growing, steps=14, seed=2)
    sizes = [2] * 5 + [5] * 4 + [11] * 5
    whole = list(batches)
    assert [len(items) for items in whole] == sizes and [batches.plan(step)[0] for step in range(14)] == sizes
    assert [batches.first_step(epoch) for epoch in range(6)] == [0, 5, 7, 9, 10, 11]
    assert [batches.epoch(step) for step in (0, 4, 5, 6, 7, 9, 13)] == [0, 0, 1, 1, 2, 3, 7]
    for epoch, (first, last) in enumerate(((0, 5), (5, 7), (7, 9), (9, 10))):
        clips = sum((batches.global_batch(step).tolist() for step in range(first, last)), [])
        assert len(set(clips)) == len(clips) == 10 + (epoch == 3)
    for start in range(15):  # a resumed run knows nothing of the steps before
        assert list(StepBatches(11, growing, steps=14, start_step=start, seed=2)) == whole[start:]
    parts = [list(StepBatches(11, growing, steps=14, seed=2, rank=rank, world_size=2)) for rank in range(2)]
    assert [sum(step, []) for step in zip(*parts, strict=True)] == whole
    constant = StepBatches(11, 5, steps=14, seed=2)  # an epoch's order does not depend on how it is cut
    assert constant.global_batch(2).tolist() == batches.global_batch(5).tolist()
    weighted = StepBatches(11, growing, steps=14, weights=[1.0] * 11)
    assert [len(items) for items in weighted] == sizes
    with pytest.raises(ValueError, match="at least 1, got -1 in epoch 1"):
        list(StepBatches(11, lambda epoch: 3 - 4 * epoch, steps=5))


def test_a_loader_tells_each_batch_its_size_and_the_progress(folder: Path) -> None:
    clips = read_folder(folder / "b")
    dataset = ClipDataset(clips, frontend=FRONTEND, train=True)
    batches = StepBatches(len(clips), lambda epoch: 2 + epoch, steps=5, epochs=3)  # which no worker could be sent
    for workers in (0, 1):
        made = list(make_loader(dataset, batches, workers))
        assert [batch.total for batch in made] == [batches.plan(step)[0] for step in range(5)]
        assert [batch.key(1).progress for batch in made] == [progress(batches.epoch(step), 3) for step in range(5)]
        assert made[0].progress == 0 and made[-1].progress > 0


def test_weighted_sampling() -> None:
    weights = [0.0, 1.0, 3.0, 0.0]
    batches = StepBatches(4, 4, steps=500, weights=weights)
    draws = np.concatenate([batches.global_batch(step) for step in range(500)])
    assert np.bincount(draws, minlength=4) / len(draws) == pytest.approx([0, 0.25, 0.75, 0], abs=0.04)
    assert list(StepBatches(4, 4, steps=9, start_step=8, weights=weights)) == [batches.at(8)]


def test_fewer_clips_than_a_batch() -> None:
    with pytest.warns(UserWarning, match="3 clips, fewer than a batch of 8: batches of 3"):
        batches = StepBatches(3, 8, steps=2)
    assert batches.plan(1) == (3, 0.0) and sorted(batches.global_batch(1).tolist()) == [0, 1, 2]
    for wrong, message in (
        ({"sizes": 2, "world_size": 3, "rank": 2}, "2 clips leaves some of the 3 processes"),
        ({"sizes": 0}, "batch of at least 1"),
        ({"sizes": 2, "rank": 1}, "rank: expected 0 .. 0, got 1"),
        ({"sizes": 2, "start_step": 3}, r"0 .. steps \(2\), got 3"),
        ({"sizes": 2, "weights": [1.0, 2.0]}, "expected 5 numbers"),
        ({"sizes": 2, "weights": [0.0] * 5}, "not all 0"),
    ):
        with pytest.raises(ValueError, match=message):
            StepBatches(5, steps=2, **wrong)


def test_evaluation_meets_every_clip_once(folder: Path) -> None:
    clips = read_folder(folder)
    dataset = ClipDataset(clips, frontend=FRONTEND, train=False)
    met = [
        [i for batch in eval_loader(dataset, 2, rank=rank, world_size=4) for i in batch.index.tolist()]
        + [f.index for batch in eval_loader(dataset, 2, rank=rank, world_size=4) for f in batch.failures]
        for rank in range(4)
    ]
    assert sorted(sum(met, [])) == list(range(len(clips)))
    assert max(map(len, met)) - min(map(len, met)) <= 1


# -- account --------------------------------------------------------------------------------------------------------


def test_bad_files() -> None:
    bad = BadFiles(100, 0.05)
    first = [Failure(f"/x/{i}.mp4", "moov atom not found") for i in range(5)]
    assert bad.add(first) == first and bad.add(first[:2]) == []
    bad.check()
    assert bad.add([Failure("/x/text.mp4", "Invalid data")])[0].path == "/x/text.mp4"
    with pytest.raises(
        TooManyBadFiles, match="6 of 100 .*0.05 .*/x/0.mp4: moov atom not found; .*text.mp4: Invalid data"
    ):
        bad.check()
    assert bad.summary() == {"count": 6, "total": 100, "files": bad.reasons} and len(bad.reasons) == 6
    bad.add([Failure(f"/y/{i}.mp4", "empty") for i in range(20)])
    with pytest.raises(TooManyBadFiles, match="26 of 100 .*and 16 more"):
        bad.check()
    BadFiles(0, 0.0).check()


def test_collate_checks_labels_into_rows() -> None:
    failure = Failure("/x.mp4", "broken", 4, 7, 1)
    batch = collate([failure], spec=ClipSpec(1.0, 16000, 8, even(2)))
    assert (batch.step, batch.total, len(batch), batch.labels) == (7, 2, 0, None)
    assert batch.frames.shape == (0, 2, 3, 8, 8) and batch.failures == [failure]
