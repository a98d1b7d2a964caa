"""Clips whose files hold less than they seem to: truncated ones, a modality that ends early or is not there."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from media_files import CLICK, grey, shown, tone, write

from avfast.data.clip_list import Clip
from avfast.data.clips import ClipDataset, eval_loader
from avfast.data.dataset import Modalities, modalities
from avfast.data.frontend import KaldiFrontend
from avfast.data.manifest import read_folder
from avfast.data.spec import even
from avfast.train.config import SettingError
from avfast.train.data import check_pairs

FRONTEND = KaldiFrontend(num_frames=128, image_size=32)  # 1.295 s


@pytest.fixture(scope="module")
def truncated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Headers that promise four seconds, files cut off halfway, and a film whose sound ends after one of four."""
    root = tmp_path_factory.mktemp("truncated")
    rng = np.random.default_rng(0)
    noisy = [np.clip(p + rng.integers(-9, 10, p.shape), 0, 255).astype(np.uint8) for p in slow()]
    for name, codecs, options in (
        ("cut.mkv", ("libx264", "flac", 16000), {}),
        ("cut.mp4", ("libx264", "aac", 16000), {"movflags": "faststart"}),
        ("film.mkv", ("libx264", None, 0), {}),
    ):
        container = {"mkv": "matroska", "mp4": "mp4"}[name[-3:]]
        write(root / "whole", codecs=codecs, pictures=noisy, wave=tone(4.0, 16000), options=options, format=container)
        data = (root / "whole").read_bytes()
        (root / name).write_bytes(data[: len(data) // 2])
    write(root / "film.wav", codecs=(None, "pcm_s16le", 16000), wave=tone(4.0, 16000))
    write(root / "quiet.mp4", codecs=("libx264", "aac", 16000), pictures=slow(), wave=tone(1.4, 16000, click=0.7))
    (root / "whole").unlink()
    return root


def slow() -> list[np.ndarray]:
    """Four seconds of pictures whose grey level tells the half second."""
    return [grey(8)[i // 5] for i in range(40)]


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("name", ["cut.mkv", "cut.mp4", "film.wav", "quiet.mp4"])
def test_sound_and_pictures_of_a_truncated_file_belong_together(truncated: Path, name: str, cache: bool) -> None:
    clips = read_folder(truncated)
    (index,) = [i for i, clip in enumerate(clips.clips) if clip.audio_path == str(truncated / name)]
    clips = clips.take([index])
    click = 0.7 if name == "quiet.mp4" else CLICK
    dataset = ClipDataset(clips, frontend=FRONTEND, train=True, cache=cache)
    starts = []
    for step in range(20):
        sample = dataset[0, step, 0]
        assert len(sample.waveform) > 0.95 * FRONTEND.num_samples and not sample.short
        starts.append(click - sample.waveform.abs().argmax().item() / 16000)
        (picture,) = shown(sample.frames)
        assert 2 * starts[-1] - 1.2 <= picture <= 2 * (starts[-1] + FRONTEND.seconds) + 0.2
        if cache or name == "quiet.mp4":
            assert sample.truncated == (() if name == "quiet.mp4" else (clips.clips[0].video_path,))
    assert max(starts) - min(starts) > (0.03 if name == "quiet.mp4" else 0.2) and min(starts) > -0.01


def test_truncated_files_are_named(truncated: Path, caplog: pytest.LogCaptureFixture) -> None:
    clips = read_folder(truncated)
    frontend = KaldiFrontend(num_frames=398, image_size=32)  # 3.995 s: all of what the headers promise
    with caplog.at_level(logging.WARNING, logger="avfast"):
        loader = eval_loader(ClipDataset(clips, frontend=replace(frontend.spec, frames=even(2)), train=False), 2)
        batches = list(loader)
    cut = {str(truncated / name) for name in ("cut.mkv", "cut.mp4", "film.mkv")}
    assert not any(batch.failures for batch in batches) and loader.truncated == cut
    assert sum("end before their headers say" in record.getMessage() for record in caplog.records) == 1
    assert loader.short == set(range(4))
    for batch in batches:  # the two frames stand at a quarter and at three quarters of what is there
        for row, index in enumerate(batch.index.tolist()):
            name = clips.clips[index].id
            there = batch.num_samples[row].item() / 16000 if name != "film" else 2.0
            assert np.abs(np.subtract(shown(batch.frames[row]), [there / 2, 3 * there / 2])).max() <= 1, name


def test_what_clips_hold(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "sound.wav", seconds=0.3)
    write(folder / "silent.mp4", codecs=("libx264", None, 0), seconds=0.3)
    write(folder / "both.mp4", seconds=0.3)
    (folder / "text.mp4").write_text("no film")
    found = modalities(read_folder(folder).clips)
    assert found == Modalities(clips=4, looked_at=4, audio=2, video=2, both=1, unreadable=1)
    assert str(found) == "4 clips: 2 with audio, 2 with video, 1 with both, 1 unreadable"
    some = modalities(read_folder(folder).clips, limit=2)
    assert (some.clips, some.looked_at) == (4, 2) and str(some).startswith("2 of 4 clips looked at: ")
    tmp_path = tmp_path / "apart"
    tmp_path.mkdir()
    for name in ("x.wav", "y.mp4", "z.mp4"):
        shutil.copy(folder / ("sound.wav" if name == "x.wav" else "silent.mp4"), tmp_path / name)
    apart = modalities(read_folder(tmp_path).clips)
    check_pairs(apart, contrasts=False)
    with pytest.raises(SettingError, match=r"no clip has both \(3 clips: 1 with audio, 2 with video, 0 with both\)"):
        check_pairs(apart, contrasts=True)
    shutil.copy(folder / "sound.wav", tmp_path / "y.wav")
    assert modalities(read_folder(tmp_path).clips).both == 1  # paired by name
    alone = modalities([Clip("x", str(tmp_path / "x.wav"), None)])
    check_pairs(alone, contrasts=True)  # said, not refused
    assert str(alone).endswith("0 with both; audio alone: there is no pair to learn from")
    assert modalities([]) == Modalities(0, 0, 0, 0, 0, 0)
