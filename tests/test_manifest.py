"""Lists of clips: what is read, and the one line that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from avfast.data.manifest import Clip, ClipList, merge, read, read_folder, read_manifest

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
        (lambda: read(f"{path},{tmp_path}/none.json"), "no such file or folder: .*none.json"),
        (lambda: read(""), "expected a folder or a JSON manifest, got an empty name"),
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
    both = read(f"{first},{tmp_path / 'more'}", str(classes), str(weights))
    assert both.class_names == ("Speech", "Male speech, man speaking", "Bark", "Meow")
    assert [(clip.id, clip.labels, clip.weight) for clip in both.clips] == [
        ("a", (0, 2), 3.0),
        ("Bark/x", (2,), 1.0),
        ("Meow/y", (3,), 1.0),
    ]
    assert read(second, str(classes)).clips[0].labels == (1,)  # a name with a comma is taken whole
    assert merge([read(first), read(second)]).class_names == ()
    with pytest.raises(ValueError, match="one CSV for each of the 2 manifests, got 1"):
        read(f"{first},{first}", None, str(weights))
    with pytest.raises(ValueError, match="goes with a JSON manifest"):
        read(tmp_path / "more", str(classes))
