"""Samples from shard sets: those of the media they were built of; and what is wrong with a set is named."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from media_files import RATE, grey, shown, tone, write

from avfast.data.clip_list import Clip, ClipList, PackedClips, ShardRow, merge
from avfast.data.clips import Batch, ClipDataset, Failure, Sample, StepBatches, eval_loader, make_loader
from avfast.data.dataset import modalities
from avfast.data.frontend import KaldiFrontend
from avfast.data.manifest import read_all, read_folder
from avfast.data.shard_layout import Entry, ShardError, ShardSettings, index_bytes, open_set
from avfast.data.shard_source import ShardFile, read_set
from avfast.data.shard_tar import shard_name
from avfast.data.spec import ClipSpec, even
from avfast.shards.build import build
from avfast.train import data
from avfast.train.config import Config, SettingError
from avfast.train.setup import check_jpeg

SPEC = KaldiFrontend(num_frames=128, image_size=32).spec  # 1.295 s
FIELDS = ("waveform", "num_samples", "frames", "has_audio", "has_visual", "labels", "index", "short")


def textured(count: int) -> list[np.ndarray]:
    """Pictures whose grey level tells the time and whose columns and rows tell the place."""
    rows, columns = np.mgrid[0:48, 0:64]
    place = np.stack([columns, rows, np.zeros_like(rows)], -1)
    return [np.clip(picture + place, 0, 255).astype(np.uint8) for picture in grey(count)]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of two classes: whole ones, a short one, one without sound, one without pictures, one that is no film."""
    root = tmp_path_factory.mktemp("media")
    for label in ("a", "b"):
        (root / label).mkdir()
        for i in range(3):
            wave = tone(2.0, 16000, 300.0 + 100 * i)
            write(root / label / f"plain {i}.mp4", codecs=("libx264", "aac", 16000), pictures=textured(20), wave=wave)
    write(root / "a" / "silent.mp4", codecs=("libx264", None, 0))
    write(root / "b" / "sound.wav")
    write(root / "b" / "short.mp4", seconds=0.5, wave=tone(0.5, 44100, click=0.1))
    (root / "b" / "text.mp4").write_text("no film")
    return root


@pytest.fixture(scope="module")
def built(media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shard set of them, two clips a shard, with every picture of the films; not to be written to."""
    folder = tmp_path_factory.mktemp("shards") / "set"
    build(read_folder(media), folder, settings=ShardSettings(fps=RATE), shard_bytes=1.5e6, progress=False)
    assert len(list(folder.glob("*.tar"))) > 2
    return folder


@pytest.fixture
def damaged(built: Path, tmp_path: Path) -> Path:
    """A copy of the set: the audio of a clip has a wrong bit, the last shard is cut off, the first is not there."""
    folder = tmp_path / "damaged"
    shutil.copytree(built, folder)
    shards = open_set(folder)
    number = 4
    place = {name: (offset, size) for name, offset, size in shards.members(number)}
    change(folder / shard_name(shards.shard(number)), place["s16"][0] + 512 + place["s16"][1] // 2)
    last = folder / shard_name(shards.shard(len(shards) - 1))
    os.truncate(last, 2000)
    (folder / shard_name(0)).unlink()
    return folder


@pytest.fixture
def lacking(built: Path, tmp_path: Path) -> Path:
    """A copy of the set: of clip 2, the first of two in a shard, a frame is deleted: what follows has moved up."""
    folder = Path(shutil.copytree(built, tmp_path / "lacking"))
    shards = open_set(folder)
    assert list(shards.clips_of(1)) == [2, 3]
    (_, first, _), (_, last, _) = shards.members(2)[2:4]
    content = (folder / shard_name(1)).read_bytes()
    (folder / shard_name(1)).write_bytes(content[:first] + content[last:])
    return folder


def change(path: Path, place: int) -> None:
    """One bit of a file."""
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 4]))


def ids(clips: ClipList) -> list[str]:
    return [clip.id for clip in clips.clips]


def same(a: Batch, b: Batch) -> bool:
    plain = (a.positions, a.step, a.total, a.failures) == (b.positions, b.step, b.total, b.failures)
    return plain and all(torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS)


# -- samples --------------------------------------------------------------------------------------------------------


def test_windows_frames_and_crops_are_those_of_the_media(media: Path, built: Path) -> None:
    files, stored = read_folder(media), read_set(str(built))
    assert ids(stored) == [name for name in ids(files) if name != "b/text"] and stored.class_names == ("a", "b")
    assert [clip.labels for clip in stored.clips] == [c.labels for c in files.clips if c.id != "b/text"]
    one, other = (ClipDataset(clips, frontend=SPEC, train=True, seed=5) for clips in (files, stored))
    levels = set()
    for number, name in enumerate(ids(stored)):
        for step in range(4):
            want, got = one[ids(files).index(name), step, 1], other[number, step, 1]
            assert isinstance(want, Sample) and isinstance(got, Sample) and got.short == want.short, name
            assert (got.waveform is None, got.frames is None) == (want.waveform is None, want.frames is None)
            if got.waveform is not None and want.waveform is not None:
                assert abs(len(got.waveform) - len(want.waveform)) <= 1
                count = min(len(got.waveform), len(want.waveform))
                one_wave, other_wave = want.waveform[:count], got.waveform[:count]
                assert abs(one_wave.argmax() - other_wave.argmax()) <= 1, name  # the click
                if "plain" in name:  # no resampling, whose phase depends on the beginning of a window
                    assert count == len(want.waveform) and (one_wave - other_wave).abs().max() < 2.0**-15, name
            if got.frames is not None and want.frames is not None:
                error = (got.frames.float() - want.frames.float()).abs()
                assert error.mean() < 3 and error.max() < 40, (
                    name,
                    step,
                )  # a JPEG of quality 90, and that of another frame differs by 10
                levels.add(round(got.frames.float().mean().item()))
    assert len(levels) > 10


def test_the_nearest_stored_frame_is_taken(media: Path, tmp_path: Path) -> None:
    clips = read_folder(media / "a").take([0])
    build(clips, tmp_path / "few", settings=ShardSettings(frames=4), progress=False)
    (clip,) = read_set(str(tmp_path / "few")).clips
    assert isinstance(clip.video_path, ShardRow)
    found = ShardFile(clip.video_path)
    assert found.info.duration == pytest.approx(2.0, abs=0.1) and found.info.frame_rate == pytest.approx(2, abs=0.1)
    every = found.frames([0.25, 0.75, 1.25, 1.75])
    nearest = found.frames([1.7, 0.0, 0.49, 0.6, 1.1, 9.0])
    assert every is not None and nearest is not None and every.shape == (4, 48, 64, 3)
    assert torch.equal(nearest, every[[3, 0, 0, 1, 2, 3]]) and len({frame.sum().item() for frame in every}) == 4
    spec = ClipSpec(1.9, 16000, 32, even(4))
    sample = ClipDataset(ClipList((clip,)), frontend=spec, train=False)[0, 0, 0]
    assert isinstance(sample, Sample) and sample.frames is not None
    assert np.diff(sample.frames.float().mean((1, 2, 3)).tolist()).min() > 30  # four pictures, in order


@pytest.mark.parametrize("rate", [8000, 22050])
def test_audio_at_another_rate_than_the_models(media: Path, built: Path, rate: int) -> None:
    clips = read_set(str(built))
    row = clips.clips[ids(clips).index("a/plain 1")].audio_path
    assert isinstance(row, ShardRow)
    stored, found = (
        ShardFile(row).audio(sample_rate=16000),
        ShardFile(row).audio(sample_rate=rate, start=0.5, seconds=1.0),
    )
    assert stored is not None and found is not None and len(found) == rate and found.dtype == torch.float32
    spectrum = torch.fft.rfft(found * torch.hann_window(rate)).abs()
    assert spectrum.argmax() == 400 and found.abs().max() < 1  # a tone of 400 Hz, for one second
    assert found.square().mean() == pytest.approx(stored[8000:24000].square().mean().item(), rel=0.05)


def test_a_cache_of_shards(built: Path) -> None:
    clips = read_set(str(built))
    plain, cached = (ClipDataset(clips, frontend=SPEC, train=False, cache=cache) for cache in (False, True))
    for i in range(len(clips)):
        one, other = plain[i, 0, i], cached[i, 0, i]
        assert isinstance(one, Sample) and isinstance(other, Sample)
        assert one.waveform is None or torch.equal(one.waveform, other.waveform)
        assert one.frames is None or abs(one.frames.float().mean() - other.frames.float().mean()) < 11


@pytest.mark.parametrize("workers", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_workers_processes_and_resuming_change_nothing(damaged: Path, workers: int) -> None:
    clips = read_set(str(damaged))
    dataset = ClipDataset(clips, frontend=SPEC, train=True, seed=1)
    plan = partial(StepBatches, len(clips), 6, seed=1)
    whole = list(make_loader(dataset, plan(steps=7)))
    failures = [failure for batch in whole for failure in batch.failures]
    kinds = {bool(has) for batch in whole for has in (*batch.has_audio, *batch.has_visual)}
    assert len(whole) == 7 and failures and kinds == {True, False}
    helped = list(make_loader(dataset, plan(steps=7), workers))
    assert all(same(a, b) for a, b in zip(whole, helped, strict=True))
    for start in range(7):
        (batch,) = make_loader(dataset, plan(steps=start + 1, start_step=start))
        assert same(batch, whole[start])
        parts = [
            next(iter(make_loader(dataset, plan(steps=start + 1, start_step=start, rank=rank, world_size=2))))
            for rank in range(2)
        ]
        assert sum((part.positions for part in parts), ()) == whole[start].positions
        assert sum((part.failures for part in parts), []) == whole[start].failures
        assert torch.equal(torch.cat([part.frames for part in parts]), whole[start].frames)
        rows = [row[:n] for part in parts for row, n in zip(part.waveform, part.num_samples, strict=True)]
        assert all(torch.equal(row, want[: len(row)]) for row, want in zip(rows, whole[start].waveform, strict=True))


def test_processes_that_are_forked_share_the_files(built: Path) -> None:
    """They only read: torch's threads do not outlive a fork."""
    shards = open_set(built)
    members = [(i, name) for i in range(len(shards)) for name, _, _ in shards.members(i)]
    want = [zlib.crc32(shards.read(*member)) for member in members]  # opens the shards
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(partial(checksum, str(built)), members * 5, chunksize=3) == want * 5
    dataset = ClipDataset(read_set(str(built)), frontend=SPEC, train=False)
    one, other = (made[0, 0, 0] for made in (dataset, pickle.loads(pickle.dumps(dataset))))
    assert isinstance(one, Sample) and isinstance(other, Sample) and torch.equal(one.waveform, other.waveform)  # type: ignore[arg-type]


def checksum(folder: str, member: tuple[int, str]) -> int:
    return zlib.crc32(open_set(folder).read(*member))


@pytest.mark.parametrize("train", [True, False])
def test_frames_that_a_batch_decodes_are_those_of_the_workers(built: Path, media: Path, train: bool) -> None:
    """On the CPU; no GPU has run it. Clips of media files are in the same batch."""
    clips = merge([read_set(str(built)), read_folder(media).take([0, 9])])
    several = replace(SPEC, frames=even(4))
    early, late = (ClipDataset(clips, frontend=several, train=train, jpegs=jpegs) for jpegs in (False, True))
    one, other = (next(iter(eval_loader(dataset, 16))) for dataset in (early, late))
    assert len(other.jpegs) == 8 and other.failures == one.failures and len(other.failures) == 1
    assert not other.frames[list(other.jpegs)].any() and not same(one, other)
    moved = other.to("cpu")
    assert same(one, moved) and not moved.jpegs and same(other.to("cpu"), moved)
    with pytest.raises(ValueError, match="jpegs: a cache"):
        ClipDataset(clips, frontend=several, train=train, jpegs=True, cache=True)
    with pytest.raises(SettingError, match="--gpu_jpeg needs a CUDA device; this run is on cpu"):
        check_jpeg(Config(gpu_jpeg=True), torch.device("cpu"))


# -- what is wrong with a set ---------------------------------------------------------------------------------------


def test_shard_and_member_of_what_is_damaged_are_named(built: Path, damaged: Path, tmp_path: Path) -> None:
    dataset = ClipDataset(read_set(str(damaged)), frontend=SPEC, train=False)
    found = {i: sample for i in range(len(dataset)) if isinstance(sample := dataset[i, 0, i], Failure)}
    shards = open_set(damaged)
    last = shards.shard(len(shards) - 1)
    assert set(found) == {*shards.clips_of(0), 4, *shards.clips_of(last)}
    assert all(failure.path == shards.where(i) for i, failure in found.items())
    assert all("No such file" in found[i].reason for i in shards.clips_of(0))
    assert found[4].path.endswith(f"{shard_name(shards.shard(4))}/{shards.key(4)}")
    assert found[4].reason.startswith(f"{shards.key(4)}.s16: damaged content")
    assert all("truncated" in found[i].reason for i in shards.clips_of(last))
    # audio and frames of one set, the index of another
    folder = tmp_path / "foreign"
    shutil.copytree(built, folder)
    shutil.copy(built / "shard-000001.tar", folder / "shard-000000.tar")
    foreign = ClipDataset(read_set(str(folder)), frontend=SPEC, train=False)[0, 0, 0]
    assert isinstance(foreign, Failure) and "stands in its place" in foreign.reason
    (folder / "build.json").write_text((folder / "build.json").read_text().replace('"set": "', '"set": "0'))
    with pytest.raises(ShardError, match="belongs to another shard set"):
        read_set(str(folder))


def test_a_member_that_was_deleted_is_named(built: Path, lacking: Path) -> None:
    shards, wrong = open_set(lacking), r"(missing, or|damaged header|the shard is truncated)"
    sound, first, frame, *later = (name for name, _, _ in shards.members(2))
    for name in (sound, first):
        assert shards.read(2, name) == open_set(built).read(2, name)
    with pytest.raises(
        ShardError, match=rf"shard-000001.tar: .*1.jpg: missing, or .*: {shards.key(2)}.2.jpg stands in"
    ):
        shards.read(2, frame)
    for clip, names in ((2, later), (3, [name for name, _, _ in shards.members(3)])):
        for name in names:
            with pytest.raises(ShardError, match=rf"shard-000001.tar: {shards.key(clip)}.{name}: {wrong}"):
                shards.read(clip, name)
    found = ClipDataset(read_set(str(lacking)), frontend=SPEC, train=False)
    failures = {i: sample for i in range(len(found)) if isinstance(sample := found[i, 0, i], Failure)}
    assert set(failures) == {2, 3} and all(failure.path == shards.where(i) for i, failure in failures.items())


def test_a_set_of_a_set_is_refused(built: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shard-000000.tar/a%2Fplain%200 is in a shard set already"):
        build(read_all([str(built)]), tmp_path / "again", progress=False)


def test_a_frame_that_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, media: Path) -> None:
    monkeypatch.setattr("torchvision.io.encode_jpeg", lambda *_, **__: torch.arange(99, dtype=torch.uint8))
    build(read_folder(media / "a").take([0]), tmp_path / "set", progress=False)
    for jpegs in (False, True):
        found = ClipDataset(read_set(str(tmp_path / "set")), frontend=SPEC, train=False, jpegs=jpegs)[0, 0, 0]
        assert isinstance(found, Failure) and found.reason.startswith("plain%200.3.jpg: ") and "\n" not in found.reason


# -- lists ----------------------------------------------------------------------------------------------------------


def test_lists_of_shards_are_lists(media: Path, built: Path) -> None:
    files, stored = read_folder(media), read_all([str(built)])
    good = files.take(i for i, name in enumerate(ids(files)) if name != "b/text")
    whole = [[i for i, name in enumerate(ids(part)) if "plain" in name] for part in (stored, good)]
    assert data.digest(stored.take(whole[0])) == data.digest(good.take(whole[1]))
    one, other = data.split(stored, 0.4), data.split(good, 0.4)
    assert [ids(side) for side in one] == [ids(side) for side in other] and min(map(len, one)) > 0
    assert ids(data.first(stored, 3)) == ids(data.first(good, 3))
    assert ids(stored.take([2, 0])) == [ids(stored)[2], ids(stored)[0]] and stored.clips[-1] == list(stored.clips)[-1]
    assert pickle.loads(pickle.dumps(stored)) == stored
    found = modalities(stored.clips)
    assert (found.clips, found.audio, found.video, found.both, found.unreadable) == (9, 8, 8, 7, 0)
    mixed = data.shuffled(stored, 0).clips
    assert all((b.audio_path, b.labels) == (a.audio_path, a.labels) for a, b in zip(stored.clips, mixed, strict=True))
    videos = {clip.id: clip.video_path for clip in stored.clips}
    assert all(videos[clip.id] == clip.video_path != clip.audio_path for clip in mixed)
    assert sorted(clip.id for clip in mixed) == sorted(videos)


def test_shards_beside_media_and_other_shards(media: Path, built: Path, tmp_path: Path) -> None:
    (tmp_path / "more" / "b").mkdir(parents=True)
    (tmp_path / "more" / "z").mkdir()
    for label in ("b", "z"):
        shutil.copy(media / "a" / "plain 0.mp4", tmp_path / "more" / label / f"{label}.mp4")
    build(read_folder(tmp_path / "more"), tmp_path / "second", progress=False)
    both = read_all([str(tmp_path / "more"), str(built), str(tmp_path / "second")])
    assert both.class_names == ("b", "z", "a") and len(both) == 2 + 9 + 2
    names = {"a": (2,), "b": (0,), "z": (1,)}
    assert all(clip.labels == names[clip.id[0]] for clip in both.clips)
    assert both.clips[0].video_path == str(tmp_path / "more/b/b.mp4")
    kept = pickle.loads(pickle.dumps(both.clips[-2:]))
    assert [clip.id for clip in kept] == ["b/b", "z/z"] and kept[1].labels == (1,)
    assert isinstance(kept[1].video_path, ShardRow) and kept[1].video_path.shards is open_set(tmp_path / "second")
    dataset = ClipDataset(both, frontend=SPEC, train=False)
    rows = [dataset[i, 0, i] for i in (0, 11)]
    assert all(isinstance(row, Sample) for row in rows) and rows[0].labels == rows[1].labels == (0,)  # type: ignore[union-attr]
    assert merge([both]) is both
    alone = ClipList((Clip("x", None, kept[1].video_path, (), 0.5),))
    assert list(alone.clips) == [Clip("x", None, kept[1].video_path, (), 0.5)]


def test_a_clip_of_a_set_takes_few_bytes(built: Path) -> None:
    names = [f"{i * 7919:011d}_{i:06d}" for i in range(2000)]  # with the index, which all processes map, 120 bytes
    entries = [
        Entry(name, 1200, [320000, *[30000] * 10, 400], 10.0, True, [i % 527, 5]) for i, name in enumerate(names)
    ]
    assert len(index_bytes(iter([entries]), "")) + 13 * len(names) < 120 * len(names)
    clips = PackedClips.of_set(open_set(built))
    assert len(clips._buffer) == 8 + 13 * len(clips)
    assert len(PackedClips(clips)._buffer) == len(clips._buffer)
    light = PackedClips(Clip(c.id, c.audio_path, c.video_path, c.labels, 0.5) for c in clips)
    assert [c.weight for c in light] == [0.5] * len(clips) and len(light._buffer) < 36 * len(clips)


def test_sources_are_mixed_with_weights(built: Path, media: Path) -> None:
    paths = (str(built), str(media / "a"))
    clips = data.read(paths, data_weights=(3.0, 1.0))
    weights = data.weights(Config(data=paths, data_weights=(3.0, 1.0)), clips)
    assert weights is not None and weights[:9].sum() == pytest.approx(3) and weights[9:].sum() == pytest.approx(1)
    assert len(set(weights)) == 2
    batches = StepBatches(len(clips), 8, steps=400, weights=weights)
    drawn = np.concatenate([batches.global_batch(step) for step in range(400)])
    assert (drawn < 9).mean() == pytest.approx(0.75, abs=0.03)
    for wrong in ((3.0,), (3.0, -1.0), (float("nan"), 1.0)):
        with pytest.raises(SettingError, match=r"data_weights .*: expected a number of 0 or more for each of .*set, "):
            data.read(paths, data_weights=wrong)
    assert data.weights(Config(data=paths), data.read(paths)) is None
    with pytest.raises(SettingError, match="--data_weights goes with --data"):
        data.sources(Config(data_weights=(1.0,)))


def test_groups_of_shards_are_read_together() -> None:
    shards = np.repeat(np.random.default_rng(0).permutation(6), [5, 1, 7, 4, 3, 4])
    plan = partial(StepBatches, 24, 6, seed=4, shards=shards, together=2)
    whole = plan(steps=8)
    for epoch in range(2):
        order = np.concatenate([whole.global_batch(4 * epoch + step) for step in range(4)])
        assert sorted(order) == list(range(24))
        met = shards[order]
        firsts = list(dict.fromkeys(met))
        for group in range(3):
            own = firsts[2 * group : 2 * group + 2]
            places = np.flatnonzero(np.isin(met, own))
            assert np.ptp(places) == len(places) - 1, (epoch, group)  # one stretch
            assert len(own) == 2 and (len(places) < 8 or (np.diff(met[places]) != 0).sum() > 1)  # both within it
    assert [whole.global_batch(s).tolist() for s in range(4)] != [whole.global_batch(s).tolist() for s in range(4, 8)]
    assert list(plan(steps=8, start_step=5)) == list(whole)[5:]
    parts = [list(plan(steps=8, rank=rank, world_size=2)) for rank in range(2)]
    assert [sum(step, []) for step in zip(*parts, strict=True)] == list(whole)
    for wrong in ({"shards": shards[:5]}, {"together": 0}, {"weights": np.ones(24)}):
        with pytest.raises(ValueError, match="shards: expected 24 numbers"):
            plan(**({"steps": 1} | wrong))


def test_which_shard_a_clip_is_in(built: Path, media: Path) -> None:
    clips, config = read_set(str(built)), Config(shuffle_shards=2)
    shards = open_set(built)
    assert data.shards(config, clips).tolist() == [shards.shard(i) for i in range(9)]  # type: ignore[union-attr]
    assert data.shards(Config(), clips) is None
    with pytest.raises(SettingError, match="--shuffle_shards 2: .*plain 0.mp4 is in no shard"):
        data.shards(config, read_folder(media))
    with pytest.raises(SettingError, match="--shuffle_shards 2: clips with sampling weights"):
        data.shards(config, data.read((str(built),), data_weights=(1.0,)))


# -- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["damaged", "lacking"])
def test_a_run_from_shards(
    wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    from avfast.train.__main__ import main

    folder = request.getfixturevalue(wrong)

    model = '{"embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16, "decoder_num_heads": 2}'
    words = f"demo --data {folder} --steps 3 --batch_size 4 --workers 0 --figures 0 --log_every 1 --no-count_flops "
    words += "--eval_fraction 0.3 --shuffle_shards 2 --probe_clips 0 --model_args"
    assert main([*words.split(), model, "--out", str(tmp_path / "run"), "--max_bad_files", "0.9"]) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    bad = summary["bad_files"]["files"]
    assert bad and all(path.startswith(str(folder / "shard-")) for path in bad)
    assert f"bad file {next(iter(bad))}: " in capsys.readouterr().out
    assert main([*words.split(), model, "--out", str(tmp_path / "strict"), "--max_bad_files", "0"]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "cannot be decoded" in said[0] and str(folder / "shard-") in said[0]


def test_evaluation_in_order(built: Path) -> None:
    clips = read_set(str(built))
    batches = list(eval_loader(ClipDataset(clips, frontend=SPEC, train=False), 4))
    assert [i for batch in batches for i in batch.index.tolist()] == list(range(9))
    middle = batches[0].frames[ids(clips).index("a/silent")]
    assert shown(middle) == [6]
