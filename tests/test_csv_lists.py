"""AudioSet's and VGGSound's CSVs, and the files of their clips."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from avfast.data import csv_lists
from avfast.data.clip_list import ClipList
from avfast.data.csv_lists import MediaFiles
from avfast.data.manifest import read_all
from avfast.train import data
from avfast.train.__main__ import main
from avfast.train.config import Config, SettingError

AUDIOSET = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=4, num_segs=4, num_unique_labels=3, num_positive_labels=6
# YTID, start_seconds, end_seconds, positive_labels
--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"
--ZhevVpy1s, 50.000, 60.000, "/m/012xff"
--aE2O5G5WE, 0.000, 10.000, "/m/03fwl,/m/09x0r"
-0DdlOuIFUI, 2.500, 12.500, "/m/012xff"
"""
VGGSOUND = """---g-f_I2yQ,1,people marching,test
--0PQM4-hqg,30,waterfall burbling,train
--56QUhyDQM,185,"child speech, kid speaking",train
-02DfG-n1yE,70,people marching,train
"""
CLASSES = "index,mid,display_name\n0,/m/09x0r,Speech\n1,/m/012xff,Toot\n2,/m/03fwl,Goat\n3,/t/dd00088,Gush\n"


def touch(root: Path, *names: str) -> str:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return str(root)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def read(path: str, *roots: str, **others: object) -> ClipList:
    return read_all([path], media=MediaFiles(roots), **others)  # type: ignore[arg-type]


def test_audioset(tmp_path: Path) -> None:
    """By content, whatever the name; audio of one root, video of another; what has no file is left out and counted."""
    path, classes = write(tmp_path / "list.txt", AUDIOSET), write(tmp_path / "classes.csv", CLASSES)
    sound = touch(tmp_path / "sound", "x/Y--PJHxphWEs.wav", "--aE2O5G5WE_0_10000.flac")
    films = touch(tmp_path / "films", "--PJHxphWEs_30.mp4", "-0DdlOuIFUI_2500_12500.webm", "--ZhevVpy1s_7.mp4", "z.mp4")
    clips = read(path, sound, films, class_csv=classes)
    assert [(clip.id, clip.audio_path, clip.video_path, clip.labels) for clip in clips.clips] == [
        ("--PJHxphWEs", f"{sound}/x/Y--PJHxphWEs.wav", f"{films}/--PJHxphWEs_30.mp4", (0, 3)),
        ("--aE2O5G5WE", f"{sound}/--aE2O5G5WE_0_10000.flac", None, (2, 0)),
        ("-0DdlOuIFUI", f"{films}/-0DdlOuIFUI_2500_12500.webm", f"{films}/-0DdlOuIFUI_2500_12500.webm", (1,)),
    ]
    assert clips.class_names == ("Speech", "Toot", "Goat", "Gush") and clips.missing == 1
    assert clips.notes == (f"{path}: 3 of 4 clips are in {sound}, {films} (75.0%)",)
    own = read(path, sound)
    assert own.class_names == ("/m/012xff", "/m/03fwl", "/m/09x0r", "/t/dd00088") and own.missing == 2
    assert [clip.labels for clip in own.clips] == [(2, 3), (1, 2)]


def test_vggsound_and_its_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "anything.csv", "\ufeff" + VGGSOUND)
    root = touch(
        tmp_path / "vgg", "a/---g-f_I2yQ_000001.mp4", "b/--0PQM4-hqg_30.mp4", "b/--56QUhyDQM-185-195.mkv",
        "-02DfG-n1yE_70.0.mp4",
    )  # fmt: skip
    names = ("child speech, kid speaking", "people marching", "waterfall burbling")
    for split, labels in ((":train", [(2,), (0,), (1,)]), (":test", [(1,)]), ("", [(1,), (2,), (0,), (1,)])):
        clips = read(path + split, root)
        assert [clip.labels for clip in clips.clips] == labels and clips.class_names == names
        assert len(clips.notes) == (2 if split == "" else 1)
    assert f"{path}:train takes those of one split" in clips.notes[1]
    sides = data.sources(Config(data=(f"{path}:train",), eval_data=(f"{path}:test",), media=(root,)))
    assert [len(side) for side in sides] == [3, 1] and sides[0].missing == 0 and sides[1].class_names == names
    with pytest.raises(ValueError, match="expected a split, one of test, train; got 'tran'"):
        read(path + ":tran", root)
    named = "index,mid,display_name\n0,/m/a,people marching\n1,/m/b,waterfall burbling\n"
    named += '2,/m/c,"child speech, kid speaking"\n'
    clips = read(path, root, class_csv=write(tmp_path / "classes.csv", named))
    assert [clip.labels for clip in clips.clips] == [(0,), (1,), (2,), (0,)]
    weights = write(tmp_path / "weights.csv", "1\n2\n3\n4\n")
    assert [clip.weight for clip in read(path + ":train", root, weights_csv=[weights]).clips] == [2, 3, 4]


@pytest.mark.parametrize("name", [
    "{}", "Y{}", "{}_30", "{}_30.0", "{}_30.000", "{}_000030", "{}_30000", "{}_30_40", "{}_30.000_40.000",
    "{}_30000_40000", "{}-30-40", "{}_30-40", "Y{}_30",
])  # fmt: skip
@pytest.mark.parametrize("id_", ["Yabcdefghij", "_-_12_34_56", "-0123456_30"])
def test_spellings(name: str, id_: str, tmp_path: Path) -> None:
    touch(tmp_path, f"{name.format(id_)}.mp4", f"{id_}_31.mp4", f"{id_}x.mp4", f"{id_}_30.part.mp4", f"x{id_}.mp4")
    found = MediaFiles([str(tmp_path)]).find(id_, 30.0)
    assert found == (f"{tmp_path}/{name.format(id_)}.mp4",) * 2


def test_an_id_listed_twice_needs_files_with_a_start(tmp_path: Path) -> None:
    path = write(tmp_path / "v.csv", "aaaaaaaaaaa,1,cat,train\naaaaaaaaaaa,9,dog,train\nbbbbbbbbbbb,1,cat,train\n")
    root = touch(tmp_path / "m", "aaaaaaaaaaa.mp4", "aaaaaaaaaaa_9.mp4", "bbbbbbbbbbb.mp4")
    assert [(clip.id, clip.labels) for clip in read(path, root).clips] == [("aaaaaaaaaaa", (1,)), ("bbbbbbbbbbb", (0,))]


def test_folders_are_searched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, root = write(tmp_path / "v.csv", VGGSOUND), touch(tmp_path / "m", "---g-f_I2yQ_1.mp4", "--0PQM4-hqg_30.mp4")
    searched, walk = [], csv_lists.walk
    monkeypatch.setattr(csv_lists, "walk", lambda root: searched.append(root) or walk(root))
    config = Config(data=(f"{path}:train",), eval_data=(f"{path}:test",), media=(root,))
    train, held_out = data.sources(config)
    assert searched == [root] and (len(train), len(held_out), train.missing) == (1, 1, 2)


def test_a_run_says_how_many_clips_are_there(
    tmp_path: Path, clips: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m").mkdir()
    for i, file in enumerate(sorted(clips.folder.rglob("*.mp4"))[:6]):
        (tmp_path / f"m/clip-{i:06d}_000030.mp4").symlink_to(file)
    rows = [f"clip-{i:06d},30,{'dog' if i % 2 else 'cat'},{'test' if i in (4, 5, 9) else 'train'}\n" for i in range(10)]
    path = write(tmp_path / "v.csv", "".join(rows))
    run = ["--data", f"{path}:train", "--eval_data", f"{path}:test", "--media", str(tmp_path / "m")]
    words = ["--steps=1", "--batch_size=4", "--figures=0", "--no-evaluate", "--no-count_flops"]
    assert main([*run, *words, "--model.depth=1", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert f"{path}:train: 4 of 7 clips are in {tmp_path}/m (57.1%)\n" in printed
    assert f"{path}:test: 2 of 3 clips are in {tmp_path}/m (66.7%)\n" in printed
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["clips"] == {"train": 4, "held_out": 2} and summary["clips_present"] == 0.6


@pytest.mark.parametrize(("content", "says"), [
    ("hello\n", r"CSV .*list: expected YTID,start_seconds,end_seconds,labels \(AudioSet\) or .*, got no such row"),
    ("hello,1,dog,train\n", "got hello,1,dog,train"),
    (VGGSOUND + "-02DfG-n1yE,x,people marching,train\n", "got -02DfG-n1yE,x,people marching,train"),
    (VGGSOUND + '-02DfG-n1yE, 30.000, 40.000, "/m/09x0r"\n', "got -02DfG-n1yE,30.000,40.000,/m/09x0r"),
    (AUDIOSET, r"label '/t/dd00088' is not among the 1 mids"),
    ("\x00\xff", "not a readable CSV"),
    ("", "not valid JSON"),
])  # fmt: skip
def test_faulty_lists(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(content, encoding="latin1")
    classes = write(tmp_path / "classes.csv", "index,mid,display_name\n0,/m/09x0r,Speech\n")
    with pytest.raises(ValueError, match=says) as caught:
        read(str(tmp_path / "list"), touch(tmp_path / "m", "---g-f_I2yQ.mp4"), class_csv=classes)
    assert "\n" not in str(caught.value)


def test_what_is_wrong_with_media(tmp_path: Path) -> None:
    path, root = write(tmp_path / "v.csv", VGGSOUND), touch(tmp_path / "m", "a.mp4", "b.mp4")
    for config, says in (
        (Config(data=(path,)), f"CSV {path}: a list of YouTube clips needs --media FOLDER"),
        (Config(data=(path,), media=(f"{root}/x",)), f"--media: no such folder: {root}/x"),
        (Config(data=(root,), media=(root,)), f"--media {root} goes with AudioSet's or VGGSound's CSV"),
        (Config(data=(path,), media=(root,)), f"media: {root}: no file of the 4 clips of {path} .looked for "
         r"---g-f_I2yQ\.\*, ---g-f_I2yQ_1\.\*, ---g-f_I2yQ_000001\.\* and the like among 2 media files"),
        (Config(data=(f"{path}x:train",), media=(root,)), "--data: no such file or folder: .*v.csvx:train"),
    ):  # fmt: skip
        with pytest.raises(SettingError, match=says):
            data.sources(config)
