"""Shard sets behind URLs: the samples of the local set, whatever the cache holds; and what goes wrong is named."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from media_files import tone, write

from avfast.data import shard_cache
from avfast.data.ahead import ahead
from avfast.data.clips import ClipDataset, Failure, Sample, StepBatches, make_loader
from avfast.data.frontend import KaldiFrontend
from avfast.data.manifest import read_all, read_folder
from avfast.data.remote import RemoteSet
from avfast.data.shard_cache import Cache
from avfast.data.shard_layout import ShardError, ShardSettings, open_set
from avfast.data.shard_source import read_set
from avfast.shards import build
from avfast.shards.__main__ import main
from avfast.shards.verify import verify
from avfast.train import data
from avfast.train.config import Config, SettingError

SPEC = KaldiFrontend(num_frames=64, image_size=32).spec


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of eight clips in four shards; one lacks sound, one pictures, one has a long name."""
    root = tmp_path_factory.mktemp("remote")
    media = root / "media"
    media.mkdir()
    for i in range(5):
        write(media / f"{i}.mp4", seconds=1.0, wave=tone(1.0, 16000, 300.0 + 50 * i))
    write(media / f"{'long ' * 30}.mp4", seconds=1.0)
    write(media / "silent.mp4", codecs=("libx264", None, 0), seconds=1.0)
    write(media / "sound.wav", seconds=1.0)
    build(read_folder(media), root / "set", settings=ShardSettings(frames=3), shard_bytes=3e5, progress=False)
    assert len(list((root / "set").glob("*.tar"))) == 4
    return root / "set"


@pytest.fixture
def url(local: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same in memory, as a store; failed tries follow each other at once."""
    monkeypatch.setattr(shard_cache, "_PAUSES", (0.0, 0.0))
    store = fsspec.filesystem("memory")
    store.store.clear()
    for path in local.iterdir():
        if path.is_file():
            store.pipe_file(f"/bucket/set/{path.name}", path.read_bytes())
    return "memory://bucket/set"


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(str(tmp_path / "cache"))


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are asked of the store in memory, as they are."""
    names: list[str] = []
    real = MemoryFileSystem.get_file

    def get_file(self: MemoryFileSystem, rpath: str, *given: object, **named: object) -> None:
        names.append(rpath.rpartition("/")[2])
        real(self, rpath, *given, **named)

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    return names


def tars(cache: Cache) -> list[str]:
    return sorted(path.name for path in cache.root.glob("*/*.tar"))


def remote(url: str, cache: Cache) -> RemoteSet:
    found = open_set(url, cache)
    assert isinstance(found, RemoteSet)
    return found


def same(a: object, b: object) -> bool:
    assert isinstance(a, Sample) and isinstance(b, Sample)
    pairs = ((a.waveform, b.waveform), (a.frames, b.frames))
    return all((x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in pairs)  # type: ignore[arg-type]


# -- reading --------------------------------------------------------------------------------------------------------


def test_samples_are_those_of_the_local_set(local: Path, url: str, cache: Cache, fetched: list[str]) -> None:
    clips = [read_set(str(local)), read_all([f"{url}/"], cache=cache)]
    assert [clip.id for clip in clips[0].clips] == [clip.id for clip in clips[1].clips]
    assert data.digest(clips[0]) == data.digest(clips[1])
    assert fetched == ["index.safetensors"]  # to list them no shard is needed
    one, other = (ClipDataset(part, frontend=SPEC, train=True, seed=3) for part in clips)
    for _ in range(2):
        assert all(same(one[i, 4, i], other[i, 4, i]) for i in range(8))
    assert sorted(fetched) == ["index.safetensors", *tars(cache)] and len(tars(cache)) == 4
    assert clips[1].clips[0].path == f"{url}/shard-000000.tar/0" and remote(url, cache) is clips[1].clips.sets[0]  # type: ignore[attr-defined]
    again = ClipDataset(read_set(url, Cache(cache.folder, 50.0)), frontend=SPEC, train=True, seed=3)
    assert same(again[7, 0, 0], one[7, 0, 0]) and len(fetched) == 5  # what an earlier run fetched


@pytest.mark.parametrize("workers", [0, 2])
def test_groups_of_shards_through_a_small_cache(local: Path, tmp_path: Path, workers: int) -> None:
    shards = open_set(local)
    sizes = [part["bytes"] for part in shards.build["shards"]]
    cache = Cache(str(tmp_path / "cache"), sum(sorted(sizes)[-2:]) / 1e9)
    clips = [read_set(str(local)), read_set(f"file://{local}", cache)]
    numbers = data.shards(Config(shuffle_shards=1, shard_cache_gb=cache.gigabytes), clips[1])
    assert numbers is not None and numbers.tolist() == [shards.shard(i) for i in range(8)]
    plan = partial(StepBatches, 8, 2, seed=1, shards=numbers)
    one, other = (
        list(make_loader(ClipDataset(part, frontend=SPEC, train=True, seed=1), plan(steps=9, start_step=1), count))
        for part, count in zip(clips, (0, workers), strict=True)
    )
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.waveform, b.waveform) and torch.equal(a.frames, b.frames) and a.positions == b.positions
    assert not any(batch.failures for batch in other) and 1 <= len(tars(cache)) <= 3


def test_the_next_group_is_fetched_ahead(url: str, cache: Cache) -> None:
    clips = read_set(url, cache)
    numbers = data.shards(Config(shuffle_shards=1), clips)
    assert numbers is not None
    batches = StepBatches(8, 1, steps=16, seed=2, shards=numbers)
    order = list(dict.fromkeys(numbers[np.concatenate([batches.global_batch(step) for step in range(8)])].tolist()))
    drawn = iter(ahead(batches, clips.clips))
    assert len(ahead(batches, clips.clips)) == 16 and next(drawn) == batches.at(0)
    until(lambda: tars(cache) == sorted(f"shard-00000{i}.tar" for i in order[:2]))
    assert [next(drawn) for _ in range(2)] == [batches.at(step) for step in (1, 2)]  # the second shard has begun
    until(lambda: tars(cache) == sorted(f"shard-00000{i}.tar" for i in order[:3]))
    assert list(drawn) == [batches.at(step) for step in range(3, 16)]
    until(lambda: not any(thread.name == "avfast-ahead" for thread in threading.enumerate()))


def until(true: object) -> None:
    end = time.monotonic() + 5
    while not true() and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.01)
    assert true()  # type: ignore[operator]


def test_local_clips_are_drawn_as_they_are(local: Path) -> None:
    batches = StepBatches(8, 2, steps=3)
    assert ahead(batches, read_set(str(local)).clips) is batches


# -- the cache ------------------------------------------------------------------------------------------------------


def test_shards_used_longest_ago_make_room(url: str, tmp_path: Path, fetched: list[str]) -> None:
    shards = remote(url, Cache(str(tmp_path)))
    shards = remote(url, Cache(str(tmp_path), (sum(shards.sizes[:3]) + 10) / 1e9))
    stray, busy = (shards.folder / f"shard-000003.tar.{name}.tmp" for name in ("old", "new"))
    for path in (stray, busy):
        path.write_bytes(b"half")
    os.utime(stray, (0, 0))
    for shard, age in ((0, 50), (1, 70), (2, 60)):
        shards.fetch(shard)
        os.utime(shards.folder / f"shard-00000{shard}.tar", (time.time() - age,) * 2)
    assert not stray.exists() and busy.exists()
    busy.unlink()
    first = shards.read(shards.clips_of(1)[0], "json")  # opened, and used now
    shards.fetch(3)
    assert tars(shards.cache) == [f"shard-00000{i}.tar" for i in (0, 1, 3)]
    os.utime(shards.folder / "shard-000001.tar", (0, 0))
    shards.fetch(2)
    assert "shard-000001.tar" not in tars(shards.cache)
    assert shards.read(shards.clips_of(1)[0], "json") == first  # still open here
    shards.read(shards.clips_of(2)[0], "json")
    assert 1 not in shards._handles and len(fetched) == 1 + 5
    with pytest.raises(ShardError, match=r"memory://bucket/set: a shard has .* GB, too large for a cache of 1e-06 GB"):
        open_set(url, Cache(str(tmp_path), 1e-6))
    clips, room = read_set(url, Cache(str(tmp_path))), sum(shards.sizes) / 1e9 - 1e-9
    with pytest.raises(
        SettingError, match=r"--shard_cache_gb .* is too small for .* GB of shards: give --shuffle_shards"
    ):
        data.shards(Config(shard_cache_gb=room), clips)
    assert data.shards(Config(shard_cache_gb=room, shuffle_shards=1), clips) is not None
    with pytest.raises(SettingError, match="two groups of --shuffle_shards 2"):
        data.shards(Config(shard_cache_gb=room, shuffle_shards=2), clips)


def test_one_fetches_and_the_others_wait(
    url: str, cache: Cache, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MemoryFileSystem.get_file
    monkeypatch.setattr(MemoryFileSystem, "get_file", lambda *given: (time.sleep(0.1), real(*given)))
    sets = [RemoteSet(url, cache, str(remote(url, cache).folder)) for _ in range(4)]
    threads = [threading.Thread(target=part.fetch, args=(2,)) for part in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched.count("shard-000002.tar") == 1 and tars(cache) == ["shard-000002.tar"]
    assert not list(cache.root.rglob("*.tmp"))


def test_a_set_that_is_built_anew_is_fetched_anew(url: str, cache: Cache) -> None:
    store, first = fsspec.filesystem("memory"), remote(url, cache)
    store.pipe_file("/bucket/set/build.json", store.cat_file("/bucket/set/build.json") + b" ")
    assert remote(url, cache).folder != first.folder
    store.pipe_file("/bucket/set/build.json", store.cat_file("/bucket/set/build.json") + b" ")
    store.pipe_file("/bucket/set/index.safetensors", b"another")
    with pytest.raises(ShardError, match=r"^memory://bucket/set/index.safetensors: damaged, or of another set"):
        open_set(url, cache)


# -- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_store_that_fails_is_tried_again_and_named(
    url: str, cache: Cache, monkeypatch: pytest.MonkeyPatch, fetched: list[str]
) -> None:
    dataset = ClipDataset(read_set(url, cache), frontend=SPEC, train=False)
    real, failures = MemoryFileSystem.get_file, iter([ConnectionError("reset"), RuntimeError()])

    def flaky(*given: object, **named: object) -> None:
        real(*given, **named)
        for failure in failures:
            raise failure

    monkeypatch.setattr(MemoryFileSystem, "get_file", flaky)
    assert isinstance(dataset[0, 0, 0], Sample) and fetched.count("shard-000000.tar") == 3
    failures = iter([ConnectionError(f"reset\n{i}") for i in range(9)])
    for index in (2, 3, 2):
        found = dataset[index, 0, 0]
        assert isinstance(found, Failure) and found.path.startswith(f"{url}/shard-000001.tar/")
        assert "could not be fetched in 3 tries (reset 2)" in found.reason
    assert fetched.count("shard-000001.tar") == 3 and tars(cache) == ["shard-000000.tar"]  # not again for each clip
    assert not list(cache.root.rglob("*.tmp"))


def test_damage_in_the_store(url: str, cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    store = fsspec.filesystem("memory")
    assert main(["verify", url, "--shard_cache", str(cache.root)]) == 0 and not tars(cache)
    content = bytearray(store.cat_file("/bucket/set/shard-000002.tar"))
    content[700] ^= 1
    store.pipe_file("/bucket/set/shard-000002.tar", bytes(content))
    store.pipe_file("/bucket/set/shard-000001.tar", store.cat_file("/bucket/set/shard-000001.tar")[:3000])
    store.rm("/bucket/set/shard-000000.tar")
    said = "\n".join(verify(url, cache=cache))
    for name, what in ((0, "missing"), (1, "truncated, 3000 of"), (2, r"damaged content")):
        assert f"{url}/shard-00000{name}.tar: " in said and what in said
    dataset = ClipDataset(read_set(url, cache), frontend=SPEC, train=False)
    found = [dataset[i, 0, i] for i in range(8)]
    reasons = [part.reason for part in found if isinstance(part, Failure)]
    assert [isinstance(part, Failure) for part in found] == [True] * 5 + [False] * 3
    assert all("No such file" in reason for reason in reasons[:2]) and "damaged content" in reasons[4]
    assert all("could not be fetched in 3 tries (3000 bytes where build.json says" in r for r in reasons[2:4])
    capsys.readouterr()
    assert main(["info", url, "--shard_cache", str(cache.root)]) == 0
    assert capsys.readouterr().out.startswith(f"{url}: built by avfast")


def test_what_is_no_set_is_named(url: str, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match=r"^memory://bucket/other: no finished shard set \(build.json: No such file"):
        data.sources(Config(data=("memory://bucket/other",), shard_cache=str(tmp_path)))
    with pytest.raises(ShardError, match="^nosuch://bucket: .*nosuch"):
        open_set("nosuch://bucket", cache)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ImportError, match=r"^s3://bucket/set: Install s3fs .*: pip install s3fs$"):
        open_set("s3://bucket/set", cache)
    with pytest.raises(ValueError, match=r"^s3://bucket/set: sets are built in folders"):
        build(read_set(url, cache), "s3://bucket/set")
    shutil.rmtree(cache.root)
    monkeypatch.setenv("AVFAST_CACHE", str(tmp_path / "home"))
    assert remote(url, Cache()).folder.parent == tmp_path / "home" / "shards"
