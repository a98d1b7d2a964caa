"""Lists of clips: what is read, and the one line that says what is wrong."""

from __future__ import annotations

import json
import mmap
import os
import pickle
import socket
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import pytest

from avfast.data import clip_list
from avfast.data.clip_list import Clip, ClipList, PackedClips, merge
from avfast.data.manifest import read_all, read_folder, read_manifest
from avfast.train import data
from avfast.train.config import Config

CLASSES = 'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n2,/t/dd00003,Bark\n'


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    path = tmp_path / "class_labels_indices.csv"
    path.write_text(CLASSES)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    base = {"video_id": "a", "wav": "sound/a.wav", "video_path": "clips/a.mp4", "labels": "/m/09x0r,/t/dd00003"}
    return {key: value for key, value in (base | changes).items() if value is not ...}


def manifest(folder: Path, *entries: Any, name: str = "train.json") -> Path:
    path = folder / name
    path.write_text(json.dumps({"data": list(entries)}))
    return path


def test_manifest_of_the_field(tmp_path: Path, classes: Path) -> None:
    path = manifest(
        tmp_path,
        entry(),
        entry(video_id="--4gqARaEJE_0.000", wav="/data/b.flac", video_path="/data/frames", labels="/m/05zppz"),
        entry(video_id="ü", wav=None, labels=""),
        entry(video_id="d", video_path="", labels="/m/09x0r, /m/09x0r", extra=1),
    )
    weights = tmp_path / "train_weight.csv"
    weights.write_text("0.5\n1e-3\n2\n0\n")
    clips = read_manifest(path, classes, weights)
    assert clips.class_names == ("Speech", "Male speech, man speaking", "Bark")
    assert clips.clips == (
        Clip("a", f"{tmp_path}/sound/a.wav", f"{tmp_path}/clips/a.mp4", (0, 2), 0.5),
        Clip("--4gqARaEJE_0.000", "/data/b.flac", None, (1,), 1e-3, "/data/frames"),
        Clip("ü", None, f"{tmp_path}/clips/a.mp4", (), 2.0),
        Clip("d", f"{tmp_path}/sound/a.wav", None, (0,), 0.0),
    )


def test_manifest_without_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest(tmp_path, entry(labels="/m/unknown"), entry(labels=...))
    monkeypatch.chdir(tmp_path)
    clips = read_manifest("train.json")
    assert clips.class_names == () and all(clip.labels == () and clip.weight == 1 for clip in clips.clips)
    assert clips.clips[0].video_path == f"{tmp_path}/clips/a.mp4"


@pytest.mark.parametrize(("content", "message"), [
    ("{'data'", "train.json: not valid JSON: .*line 1"),
    ("[]", r'train.json: expected {"data": \[...\]}, got a list'),
    ('{"data": 3}', 'train.json: expected {"data"'),
    ('{"data": []}', "train.json: its list of clips is empty"),
    ('{"data": ["x"]}', "entry 0: expected an object .*got a string"),
    (json.dumps({"data": [entry(), entry(wav=...)]}), "entry 1: missing wav; it has video_id, video_path, labels"),
    (json.dumps({"data": [entry(labels=...)]}), "entry 0: missing labels"),
    (json.dumps({"data": [entry(video_path=5)]}), "entry 0: video_path: expected a string, got a number"),
    (json.dumps({"data": [entry(labels=None)]}), "entry 0: labels: expected a string, got null"),
    (json.dumps({"data": [entry(wav="", video_path=None)]}), r"entry 0 \(a\): both wav and video_path are empty"),
    (json.dumps({"data": [entry(labels="/m/09x0r,/m/zzz")]}), r"label '/m/zzz' .*3 mids of .*indices.csv"),
])  # fmt: skip
def test_faulty_manifests(tmp_path: Path, classes: Path, content: str, message: str) -> None:
    path = tmp_path / "train.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_manifest(path, classes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "message"), [
    ("mid,name\n", "expected the header index,mid,display_name, got mid,name"),
    ("", "got nothing"),
    ("index,mid,display_name\nzero,/m/a,A\n", "row 2: expected index,mid,display_name, got zero,/m/a,A"),
    ("index,mid,display_name\n0,/m/a,A\n0,/m/b,B\n", "row 3: .*occurs twice"),
    ("index,mid,display_name\n0,/m/a,A\n2,/m/b,B\n", "indices 0 .. 1, each once"),
])  # fmt: skip
def test_faulty_classes(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "classes.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"classes.csv: .*{message}"):
        read_manifest(manifest(tmp_path, entry()), path)


@pytest.mark.parametrize(("content", "message"), [
    ("1\n", "expected 2 weights, one per clip of .*train.json, got 1"),
    ("1\nx\n", "line 2: expected a number, got 'x'"),
    ("1\n-1\n", "line 2: expected a weight of 0 or more, got -1"),
])  # fmt: skip
def test_faulty_weights(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "weights.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_manifest(manifest(tmp_path, entry(), entry()), None, path)


def test_missing_files(tmp_path: Path, classes: Path) -> None:
    path = manifest(tmp_path, entry())
    for call, name in (
        (lambda: read_manifest(tmp_path / "none.json"), "manifest .*none.json: No such file"),
        (lambda: read_manifest(path, tmp_path / "none.csv"), "class CSV .*none.csv: No such file"),
        (lambda: read_manifest(path, classes, tmp_path / "w.csv"), "weights CSV .*w.csv: No such file"),
        (lambda: read_folder(tmp_path / "nowhere"), "no such folder: .*nowhere"),
        (lambda: read_all([str(path), f"{tmp_path}/none.json"]), "no such file or folder: .*none.json"),
    ):
        with pytest.raises(ValueError, match=name):
            call()


def test_folder_of_classes(tmp_path: Path) -> None:
    for name in (
        "dog/b.MP4",
        "dog/deep/a.wav",
        "cat/ü 1.webm",
        "loose.mkv",
        ".hidden/x.mp4",
        "cat/._c.mp4",
        "cat/notes.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    clips = read_folder(tmp_path)
    assert clips.class_names == ("cat", "dog")
    at = {clip.id: clip for clip in clips.clips}
    assert {name: clip.labels for name, clip in at.items()} == {
        "loose": (), "cat/ü 1": (0,), "dog/b": (1,), "dog/deep/a": (1,),
    }  # fmt: skip
    assert at["dog/deep/a"].video_path is None and at["dog/deep/a"].audio_path == f"{tmp_path}/dog/deep/a.wav"
    assert at["dog/b"].video_path == at["dog/b"].audio_path == f"{tmp_path}/dog/b.MP4"
    assert clips == read_folder(tmp_path)


def test_links_pipes_and_strangers(tmp_path: Path) -> None:
    """What is met again under another name is left out, whatever the order of the names; the rest is counted."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for file in (root / "dog/a.wav", root / "cat/b.mp4", elsewhere / "c.mp4", elsewhere / "d.mp4", root / "x.txt"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    for link, to in (
        ("dog/back", root), ("all", root / "dog"), ("bird", elsewhere), ("cow", elsewhere),
        ("cat/same.mp4", root / "cat/b.mp4"), ("again.mp4", elsewhere / "c.mp4"), ("gone.mp4", tmp_path / "nowhere"),
        ("self", root / "self"),
    ):  # fmt: skip
        (root / link).symlink_to(to)
    os.mkfifo(root / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "socket.wav"))
        clips = read_folder(root)
    assert [clip.id for clip in clips.clips] == ["again", "gone", "bird/d", "cat/b", "dog/a"]
    assert clips.class_names == ("bird", "cat", "dog")
    (note,) = clips.notes
    assert note.startswith(f"{root}: left out ") and "5 met before under another name" in note
    assert "2 pipes, sockets or devices" in note and "1 .txt files" in note and "1 files without extension" in note
    inside = [clip.id for clip in read_folder(root / "all").clips]  # the link back leads to the whole
    assert inside == ["a", "back/again", "back/gone", "back/bird/d", "back/cat/b"]


def test_a_film_and_a_sound_of_one_name_are_one_clip(tmp_path: Path) -> None:
    for name in ("a/1.mp4", "a/1.wav", "a/2.wav", "b/1.mp4", "c/3.MKV", "c/3.flac", "c/3.wav", "4.m4a", "4.webm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    clips = read_folder(tmp_path)
    found = [(clip.audio_path, clip.video_path) for clip in clips.clips]
    here = f"{tmp_path}/"
    assert found == [
        (here + "4.m4a", here + "4.webm"),
        (here + "a/1.wav", here + "a/1.mp4"),
        (here + "a/2.wav", None),
        (here + "b/1.mp4", here + "b/1.mp4"),
        (here + "c/3.MKV", here + "c/3.MKV"),  # which of the two sounds is its own?
        (here + "c/3.flac", None),
        (here + "c/3.wav", None),
    ]
    assert [clip.id for clip in clips.clips][:2] == ["4", "a/1"]
    assert clips.notes == (f"{tmp_path}: the audio of 4.webm is taken from 4.m4a and 1 more, by name",)


def test_a_single_file(tmp_path: Path, classes: Path) -> None:
    for name in ("one.MP4", "two.wav"):
        (tmp_path / name).touch()
    one = Clip("one", f"{tmp_path}/one.MP4", f"{tmp_path}/one.MP4")
    assert read_all([f"{tmp_path}/one.MP4"]) == ClipList((one,)) == read_folder(tmp_path / "one.MP4")
    path = manifest(tmp_path, entry())
    both = read_all([f"{tmp_path}/one.MP4", str(path), f"{tmp_path}/two.wav"], str(classes))
    assert [clip.id for clip in both.clips] == ["one", "a", "two"] and both.clips[1].labels == (0, 2)


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.mkdir(folder)
    for name in (b"\xff\xfe.wav", b"a.wav"):
        with open(os.path.join(folder, name), "wb"):
            pass
    clips = read_folder(tmp_path)
    assert clips.class_names == ("caf\udce9",) and [clip.labels for clip in clips.clips] == [(0,), (0,)]
    assert all(os.path.exists(clip.path) for clip in clips.clips)
    kept, out = data.split(clips, 0.5)
    assert len(kept) + len(out) == 2 and len(data.first(clips, 1)) == 1
    assert pickle.loads(pickle.dumps(clips)) == clips


def test_classes_of_one_name_stay_apart(tmp_path: Path) -> None:
    """AudioSet-like lists hold the animal and the club under one display name."""
    path = tmp_path / "classes.csv"
    path.write_text("index,mid,display_name\n0,/m/animal,Bat\n1,/m/club,Bat\n2,/m/x,Bark\n")
    lists = [
        read_manifest(manifest(tmp_path, entry(labels=labels), name=name), path)
        for name, labels in (("train.json", "/m/animal"), ("test.json", "/m/club,/m/x"))
    ]
    both = merge(lists)
    assert both.class_names == ("Bat (/m/animal)", "Bat (/m/club)", "Bark")
    assert [clip.labels for clip in both.clips] == [(0,), (1, 2)]


def test_held_out_clips_of_the_other_kind(tmp_path: Path, classes: Path) -> None:
    (tmp_path / "more/Bark").mkdir(parents=True)
    (tmp_path / "more/Bark/x.mp4").touch()
    folder, listed = str(tmp_path / "more"), str(manifest(tmp_path, entry()))
    for train, held_out in ((listed, folder), (folder, listed)):
        sides = data.sources(Config(data=(train,), eval_data=(held_out,), class_csv=str(classes)))
        names = [{side.class_names[c] for clip in side.clips for c in clip.labels} for side in sides]
        assert names == [{"Speech", "Bark"}, {"Bark"}][:: 1 if train == listed else -1]
        assert sides[0].class_names == sides[1].class_names
    with pytest.raises(ValueError, match="--class_csv .* goes with a manifest"):
        data.sources(Config(data=(folder,), eval_data=(folder,), class_csv=str(classes)))
    with pytest.raises(ValueError, match="--eval_data: no such file or folder: none"):
        data.sources(Config(data=(folder,), eval_data=("none",)))


def test_packed_clips() -> None:
    clips = (
        Clip("x", None, "/v/x.mp4", (3, 1), 0.1),
        Clip("name\udcff", "/name\udcff/name\udcff.wav", None, frames_dir="/frames"),
        Clip("b/clip", "/b/clip.mp4", "/b/clip.mp4", (2,)),
        Clip("", "\0", ""),
    )
    packed = PackedClips(clips)
    assert packed == clips and list(packed) == list(clips) and packed != clips[:3] and hash(packed) == hash(packed[:])
    assert packed[-1] == clips[-1] and packed[1:] == clips[1:] and packed[::-2] == clips[::-2]
    assert packed.take([2, 0, 2]) == (clips[2], clips[0], clips[2]) and PackedClips() == ()
    assert clips[1] in packed and packed.index(clips[2]) == 2 and pickle.loads(pickle.dumps(packed)) == clips
    with pytest.raises(IndexError):
        packed[4]
    assert ClipList(clips) == ClipList(packed) and ClipList(clips).take([1]).clips == clips[1:2]


def test_a_worker_maps_the_list_of_its_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of clips, a worker is sent a few bytes and a descriptor."""
    names = [f"{i:011d}_000030" for i in range(1000)]
    clips = [Clip(n, f"/data/train/{n[8:11]}/{n}.wav", f"/data/train/{n[8:11]}/{n}.mp4", (7, 5)) for n in names]
    packed = PackedClips(clips)

    class Handle:
        def __init__(self, fd: int) -> None:
            self.fd = fd

        def detach(self) -> int:
            return os.dup(self.fd)

    class Popen:
        DupFd, duplicate_for_child = Handle, staticmethod(lambda fd: fd)

    monkeypatch.setattr(clip_list, "get_spawning_popen", Popen)
    monkeypatch.setattr(reduction.context, "get_spawning_popen", Popen)
    (make, (count, handle, rows)), (_, (_, again, _)) = packed.__reduce__(), packed.__reduce__()
    assert handle.fd == again.fd  # one for all workers
    received = make(count, handle, rows)
    assert isinstance(received._buffer, mmap.mmap) and isinstance(packed._buffer, mmap.mmap)
    assert received == clips == packed and len(received._buffer) < 100 * len(clips)


def test_flat_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no media files under .*\.mp4"):
        read_folder(tmp_path)
    (tmp_path / "a.mp4").touch()
    assert read_folder(tmp_path) == ClipList((Clip("a", f"{tmp_path}/a.mp4", f"{tmp_path}/a.mp4"),))


def test_several_at_once(tmp_path: Path, classes: Path) -> None:
    for name in ("more/Bark/x.mp4", "more/Meow/y.mp4"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    first = manifest(tmp_path, entry())
    second = manifest(tmp_path, entry(video_id="b", labels="/m/05zppz"), name="second,part.json")
    weights = tmp_path / "w.csv"
    weights.write_text("3\n")
    both = read_all([str(first), f"{tmp_path}/more"], str(classes), [str(weights)])
    assert both.class_names == ("Speech", "Male speech, man speaking", "Bark", "Meow")
    assert [(clip.id, clip.labels, clip.weight) for clip in both.clips] == [
        ("a", (0, 2), 3.0),
        ("Bark/x", (2,), 1.0),
        ("Meow/y", (3,), 1.0),
    ]
    assert read_all([str(first), str(second)]).class_names == ()
    with pytest.raises(ValueError, match="one CSV for each of the 2 manifests, got 1"):
        read_all([str(first), str(first)], None, [str(weights)])
