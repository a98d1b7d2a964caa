"""Shard sets: what is in them, who may build them and be interrupted, and that damage is named."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from media_files import shown, write
from shard_files import files, groups

from avfast.data.clip_list import Clip, ClipList
from avfast.data.manifest import read_folder
from avfast.data.media import read_audio
from avfast.data.shard_layout import Entry, ShardError, ShardSettings, index_bytes, open_set
from avfast.data.shard_tar import key_of
from avfast.shards import ShardSpec, build, build_shard, pool
from avfast.shards.__main__ import main
from avfast.shards.verify import verify

SETTINGS = ShardSettings(frames=5)
BYTES = 1.1e6  # three shards of the clips below
LONG = "long " * 30


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve clips: two of one name, one without sound, one without pictures, odd names, two that are none."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "cats").mkdir()
    (folder / "dogs").mkdir()
    write(folder / "cats" / "one.mp4")
    write(folder / "cats" / "one.mkv", seconds=1.0)
    write(folder / "cats" / "silent.mp4", codecs=("libx264", None, 0), seconds=1.0)
    write(folder / "cats" / "v. 1.0~ü.mp4", seconds=1.0)
    write(folder / "dogs" / "heard.wav", seconds=3.0)
    write(folder / "dogs" / f"{LONG}.mp4", seconds=0.5)
    for i in range(4):
        write(folder / "dogs" / f"{i}.mp4", seconds=1.0)
    (folder / "dogs" / "none.mp4").write_bytes(b"no media file")
    (folder / "dogs" / "empty.mp4").touch()
    return folder


@pytest.fixture(scope="module")
def clip_list(media: Path) -> ClipList:
    return read_folder(media)


def built_by(clip_list: ClipList, folder: Path, **options: object) -> dict[str, bytes]:
    """The files of a set that :func:`build` makes."""
    build(clip_list, folder, **{"settings": SETTINGS, "shard_bytes": BYTES, "progress": False, **options})
    return files(folder)


@pytest.fixture(scope="module")
def whole(clip_list: ClipList, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set, not to be changed."""
    folder = tmp_path_factory.mktemp("sets") / "whole"
    built_by(clip_list, folder)
    assert sorted(path.name for path in folder.glob("*.tar")) == [f"shard-00000{i}.tar" for i in range(3)]
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


# -- what is in them ------------------------------------------------------------------------------------------------


def test_a_set_holds_every_readable_clip_once(whole: Path, clip_list: ClipList, media: Path) -> None:
    found = dict(groups(whole))
    clips = [clip for clip in clip_list.clips if Path(clip.path).stat().st_size > 100]
    assert len(clips) == 10 and len(found) == 10
    about = {key: json.loads(members["json"]) for key, members in found.items()}
    paths = [(a["id"], a["audio_path"], a["video_path"]) for a in about.values()]
    assert sorted(paths, key=str) == sorted(((c.id, c.audio_path, c.video_path) for c in clips), key=str)
    assert {key for key, a in about.items() if a["id"] == "cats/one"} == {"cats%2Fone", "cats%2Fone~2"}
    frames = [f"{i}.jpg" for i in range(5)]
    for key, members in found.items():
        expected = ["s16", *frames, "json"]
        if "silent" in key:
            expected, absent = [*frames, "json"], ["audio"]
        elif "heard" in key:
            expected, absent = ["s16", "json"], ["video"]
        else:
            absent = []
        assert list(members) == expected and about[key]["absent"] == absent


def test_sound_and_frames_are_the_files_own(whole: Path, media: Path) -> None:
    from torchvision.io import decode_jpeg

    shards = open_set(whole)
    one = next(i for i in range(len(shards)) if shards.key(i) == "cats%2Fone")
    clip = shards.clip(one)
    found = read_audio(media / "cats" / json.loads(shards.read(one, "json"))["audio_path"].rsplit("/", 1)[1])
    assert found is not None and clip.samples == len(found)
    stored = torch.frombuffer(bytearray(shards.read(one, "s16")), dtype=torch.int16) / 2**15
    assert (stored - found).abs().max() <= 0.5 / 2**15
    images = [
        decode_jpeg(torch.frombuffer(bytearray(shards.read(one, f"{i}.jpg")), dtype=torch.uint8)) for i in range(5)
    ]
    at = clip.frame_times
    assert at == pytest.approx([clip.duration * (i + 0.5) / 5 for i in range(5)])
    assert shown([image.permute(1, 2, 0) for image in images]) == [int(time * 10 + 1e-3) for time in at]


def test_the_index_says_what_the_tars_hold(whole: Path, clip_list: ClipList) -> None:
    shards = open_set(whole)
    assert open_set(whole) is shards and len(shards) == 10 and shards.class_names == ("cats", "dogs")
    for index, (key, members) in enumerate(groups(whole)):
        clip = shards.clip(index)
        about = json.loads(members["json"])
        assert clip.key == key and [name for name, _, _ in shards.members(index)] == list(members)
        assert (clip.id, list(clip.labels), clip.duration) == (about["id"], about["labels"], about["duration"])
        assert clip.frame_times == pytest.approx(about["frame_times"])
        for name, content in members.items():
            assert shards.read(index, name) == content
    with pytest.raises(ShardError, match=r"shard-.*\.tar: .*\.9\.jpg: no such member, it has s16, 0\.jpg"):
        shards.read(0, "9.jpg")
    with pytest.raises(IndexError, match="clip 10 of 10"):
        shards.clip(10)
    build_json = json.loads((whole / "build.json").read_text())
    assert build_json["clips"] == {
        "listed": 12, "built": 10, "share": 10 / 12, "audio": 9, "video": 9, "both": 8, "truncated": 0
    }  # fmt: skip
    lines = [json.loads(line) for line in (whole / "unreadable.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["dogs/empty", "dogs/none"] and all(line["reason"] for line in lines)


@pytest.mark.parametrize(
    "name", ["abc_-1", "a.b", "../a", "a/b.c", "", "~", "a~2", "ü €", "a" * 500, "\udcff", "." * 90, "x" * 70 + "ü"]
)
def test_keys_are_names_that_every_reader_takes(name: str) -> None:
    key = key_of(name)
    assert re.fullmatch(r"[A-Za-z0-9_%~-]{1,72}", key)
    if len(name) < 20:
        assert unquote(key, errors="surrogateescape") == (name or "~")
    assert key_of(name + "a") != key


def test_frames_per_second() -> None:
    assert ShardSettings().count(10.0, 25.0) == 10 and ShardSettings().count(0.2, 25.0) == 5
    assert ShardSettings(fps=8).count(10.0, 25.0) == 80 and ShardSettings(fps=8).count(10.0, 5.0) == 50
    assert ShardSettings(fps=8).count(0.0, 25.0) == 1 and ShardSettings(fps=2).count(3.3, 0.0) == 7


def test_a_clip_costs_at_most_120_bytes_of_index(tmp_path: Path) -> None:
    entries = [
        Entry(f"clip{i:07d}", 2000 * i, [320000, *[30000] * 10, 300], 10.0, True, [1, 2, 500]) for i in range(5000)
    ]
    assert len(index_bytes(iter([entries[:2000], [], entries[2000:]]), "x")) / 5000 <= 120
    weighted = [Entry("a", 0, [2, 300], 1.0, True, [70000], 0.5)]
    assert b'"weight"' in index_bytes(iter([weighted]), "x") and b'"weight"' not in index_bytes(iter([entries]), "x")


# -- who builds them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_the_same_bytes_whatever_the_number_of_processes(
    clip_list: ClipList, whole: Path, tmp_path: Path, workers: int
) -> None:
    assert built_by(clip_list, tmp_path / "set", run=partial(pool.processes, workers=workers)) == files(whole)


def test_a_second_call_builds_what_is_missing(clip_list: ClipList, whole: Path, copy: Path) -> None:
    expected = files(whole)
    (copy / "build.json").unlink()  # killed between the second shard and its report
    (copy / ".build" / "shard-000001.json").unlink()
    (copy / "shard-000002.tar").unlink()
    (copy / ".build" / "shard-000002.tar.0.tmp").write_bytes(b"half a shard")
    with pytest.raises(ShardError, match="not finished: run the same"):
        open_set(copy)
    built: list[int] = []

    def run(specs: Iterator[ShardSpec], count: int, tick: Callable[[int], None]) -> None:
        for spec in specs:
            built.append(spec.number)
            build_shard(spec)

    assert built_by(clip_list, copy, run=run) == expected and built == [1, 2]
    assert built_by(clip_list, copy, run=run) == expected and built == [1, 2]
    (copy / "shard-000000.tar").write_bytes(b"damaged")
    assert built_by(clip_list, copy, run=run) == expected and built == [1, 2, 0]


def test_what_does_not_belong_together_is_refused(clip_list: ClipList, copy: Path, media: Path, tmp_path: Path) -> None:
    before = files(copy)
    for change, message in (
        ({"settings": ShardSettings(frames=5, quality=80)}, "built with quality 90, not 80"),
        ({"shard_bytes": 1e6}, "built with shard_bytes 1100000, not 1000000"),
    ):
        with pytest.raises(ValueError, match=message):
            built_by(clip_list, copy, **change)
    with pytest.raises(ValueError, match="built with another list of clips"):
        built_by(clip_list.take([0, 1]), copy)
    with pytest.raises(ValueError, match=r"is no folder of shards \(it holds cats\)"):
        built_by(clip_list, media)
    with pytest.raises(ValueError, match="no clips"):
        built_by(ClipList([]), tmp_path / "set")
    with (copy / ".build" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another build is at work there"):
            built_by(clip_list, copy)
    assert files(copy) == before and not (media / ".build").exists()


@dataclass(frozen=True)
class Deadly(ShardSettings):
    """Kills the process that builds the clip of half a second: once, or (``flag`` is no path) always."""

    flag: str = ""

    def count(self, duration: float, rate: float) -> int:
        if duration < 0.6 and multiprocessing.parent_process() and not os.path.exists(self.flag):
            if self.flag:
                Path(self.flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().count(duration, rate)


def test_a_process_that_dies_is_replaced_once(clip_list: ClipList, whole: Path, tmp_path: Path) -> None:
    run = partial(pool.processes, workers=2)
    built_by(clip_list, tmp_path / "a", settings=Deadly(frames=5, flag=str(tmp_path / "flag")), run=run)
    assert (tmp_path / "flag").exists() and not list(verify(tmp_path / "a"))
    tars = [{k: v for k, v in files(f).items() if k.endswith("tar")} for f in (tmp_path / "a", whole)]
    assert tars[0] == tars[1]
    with pytest.raises(pool.BuildError, match=rf"shard-\d+.tar \(SIGKILL at clip dogs/{LONG}, .*again"):
        built_by(clip_list, tmp_path / "b", settings=Deadly(frames=5), run=run)
    assert len(list((tmp_path / "b").glob("*.tar"))) == 2  # the others were built
    assert [line for line in verify(tmp_path / "b") if "not finished" in line]


def test_a_shard_that_cannot_be_written_ends_the_build(clip_list: ClipList, tmp_path: Path) -> None:
    (tmp_path / "set" / ".build").mkdir(parents=True)
    (tmp_path / "set" / "shard-000001.tar").mkdir()  # in place of a full disk
    with pytest.raises(OSError, match="shard-000001.tar") as error:
        built_by(clip_list, tmp_path / "set", run=partial(pool.processes, workers=1))
    assert error.value.strerror == "Is a directory" and not list((tmp_path / "set").rglob("*.tmp"))


# -- damage ---------------------------------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    path = folder / "shard-000001.tar"
    os.truncate(path, path.stat().st_size // 2)


def flip(folder: Path, header: bool = False) -> None:
    """A bit of the fourth frame of the first clip, or of its header."""
    _, offset, _ = open_set(folder).members(0)[4]
    with (folder / "shard-000000.tar").open("r+b") as file:
        file.seek(offset + (3 if header else 600))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def delete_member(folder: Path) -> None:
    path = folder / "shard-000000.tar"
    shards = open_set(folder)
    (_, first, _), (_, last, _) = shards.members(0)[2:4]
    data = path.read_bytes()
    path.write_bytes(data[:first] + data[last:])


def foreign_index(folder: Path) -> None:
    other = build(ClipList([open_clip(folder)]), folder / "other", settings=SETTINGS, progress=False)
    assert other["clips"]["built"] == 1
    shutil.copy(folder / "other" / "index.safetensors", folder)
    shutil.rmtree(folder / "other")


def open_clip(folder: Path) -> Clip:
    about = json.loads(open_set(folder).read(0, "json"))
    return Clip(about["id"], about["audio_path"], about["video_path"])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"shard-000001\.tar: truncated, \d+ of \d+ bytes\n.*: \d+ members missing: \S+, .* and"),
    "flipped byte": (flip, r"shard-000000\.tar: cats%2F\S+\.3\.jpg: damaged content .*"),
    "flipped header": (partial(flip, header=True), r"shard-000000\.tar: cats%2F\S+\.3\.jpg: (damaged header|missing)"),
    "deleted member": (
        delete_member, r"shard-000000\.tar: truncated, .*\n.*: 1 members missing: cats%2F\S+\.1\.jpg"
    ),
    "foreign index": (foreign_index, r"index\.safetensors: belongs to another shard set"),
    "deleted shard": (lambda f: (f / "shard-000002.tar").unlink(), r"shard-000002\.tar: missing"),
    "another shard": (lambda f: (f / "shard-000007.tar").touch(), r"shard-000007\.tar: belongs to no shard"),
    "damaged index": (lambda f: os.truncate(f / "index.safetensors", 900), r"index\.safetensors: damaged"),
    "damaged build.json": (lambda f: os.truncate(f / "build.json", 90), r"build\.json: damaged"),
    "no list": (lambda f: (f / "unreadable.jsonl").unlink(), r"unreadable\.jsonl: missing"),
    "no set": (lambda f: shutil.rmtree(f), r"copy: no shard set"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(copy: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copy)]) == 0 and "as it was built" in capsys.readouterr().out
    damage, message = DAMAGE[name]
    damage(copy)
    assert main(["verify", str(copy)]) == 1
    said = capsys.readouterr().out
    assert re.search(message, said) and len(said.splitlines()) <= 3, said


def test_reading_names_damage_and_goes_on(copy: Path) -> None:
    shards = open_set(copy)
    flip(copy)
    truncate(copy)
    (copy / "shard-000002.tar").unlink()
    said, read = [], 0
    for index in range(len(shards)):
        for name, _, _ in shards.members(index):
            try:
                shards.read(index, name)
                read += 1
            except ShardError as error:
                said.append(str(error))
    assert read > 10 and all(str(copy) in line for line in said)
    assert [line for line in said if re.search(r"shard-000000\.tar: cats\S+\.3\.jpg: damaged content", line)]
    assert [line for line in said if re.search(r"shard-000001\.tar: .*: the shard is truncated", line)]
    assert [line for line in said if re.search(r"shard-000002\.tar: .*: No such file", line)]


def test_a_reader_notices_a_shard_that_another_took_the_place_of(copy: Path) -> None:
    shutil.copy(copy / "shard-000001.tar", copy / "shard-000000.tar")
    with pytest.raises(
        ShardError, match=r"shard-000000\.tar: cats.*index is another set's: dogs\S+ stands in its place"
    ):
        open_set(copy).read(0, "s16")
    with pytest.raises(ShardError, match=r"shard-000000\.tar: cats\S+json: damaged header, or the index is another"):
        open_set(copy).read(0, "json")


# -- the command line -----------------------------------------------------------------------------------------------


def test_the_command_line(media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "build",
        "--data",
        str(media / "cats"),
        str(media / "dogs"),
        "--out",
        str(tmp_path / "set"),
        "--frames",
        "2",
    ]
    assert main([*given, "--workers", "2"]) == 0
    out, bar = capsys.readouterr()
    assert "10 of 12 clips in 1 shards" in out and "2 clips could not be read: see unreadable.jsonl" in out
    assert "12/12" in bar and "clip/s" in bar.replace("s/clip", "clip/s")
    assert main(["info", str(tmp_path / "set")]) == 0
    out = capsys.readouterr().out
    assert "10 of 12 listed (83.3 %)" in out and "frames 2" in out and "9 with audio" in out
    for wrong, message in (
        (["--quality", "0"], "quality: expected 1 to 100, got 0"),
        (["--quality", "80"], "built with quality 90, not 80"),
        (["--workers", "-1"], "--workers: expected 0 or more"),
    ):
        assert main([*given, *wrong]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
    assert main(["info", str(media)]) == 2 and "no shard set" in capsys.readouterr().err
    assert main(["build", "--data", "nowhere", "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err == "avfast: --data: no such file or folder: nowhere\n"


def test_ray(clip_list: ClipList, whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason='needs Ray: pip install "avfast[shards]"')
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        run = partial(pool.ray, address=cluster.address)
        assert built_by(clip_list, tmp_path / "set", run=run) == files(whole)
    finally:
        cluster.shutdown()


def test_without_ray(clip_list: ClipList, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "avfast\[shards\]"'):
        built_by(clip_list, tmp_path / "set", run=partial(pool.ray, address="auto"))
