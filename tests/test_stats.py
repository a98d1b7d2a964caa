"""Mean and deviation of filter banks, against all values in one array."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from avfast.data import AudioMAEFrontend, HTKFrontend, KaldiFrontend, htk_log_mel, log_mel, read_audio, read_folder
from avfast.data.clip_list import ClipList
from avfast.data.stats import filter_bank_stats, main


@pytest.fixture(scope="module")
def folder(clips: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Films of some seconds, a sound of half a second, silence, one shorter than a frame, and no film at all."""
    root = tmp_path_factory.mktemp("stats")
    for file in sorted(clips.folder.rglob("*.mp4"))[:4]:
        (root / file.name).symlink_to(file)
    noise = np.random.default_rng(0).standard_normal(8000) * 3000
    for name, samples in (("half", noise), ("silence", noise[:6000] * 0), ("tiny", noise[:300])):
        with wave.open(str(root / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(samples.astype("<i2").tobytes())
    (root / "text.mp4").write_text("no film")
    return root


@pytest.mark.parametrize("frontend", [KaldiFrontend(), KaldiFrontend(num_frames=100), AudioMAEFrontend()], ids=repr)
def test_equals_brute_force(frontend: KaldiFrontend, folder: Path) -> None:
    clips = read_folder(folder)
    found = filter_bank_stats(clips, frontend)
    waves = [read_audio(path, sample_rate=16000)[: frontend.num_samples] for path in sorted(map(str, folder.iterdir()))
             if not path.endswith("text.mp4")]  # fmt: skip
    banks = np.concatenate([log_mel(x[None])[0].double().numpy() for x in waves if len(x) >= 400])
    assert (found.clips, found.values) == (6, banks.size)
    assert (found.mean, found.std) == pytest.approx((banks.mean(), banks.std()), rel=1e-6)
    assert list(found.failures) == [f"{folder}/text.mp4"]


def test_htk(folder: Path) -> None:
    frontend = HTKFrontend(num_frames=120)
    films = ClipList([clip for clip in read_folder(folder).clips if clip.path.endswith(".mp4") and clip.id != "text"])
    waves = [read_audio(clip.path, sample_rate=16000)[: frontend.num_samples] for clip in films.clips]
    banks = htk_log_mel(torch.stack(waves))[:, :-1].double()
    found = filter_bank_stats(films, frontend)
    assert (found.mean, found.std) == pytest.approx((banks.mean().item(), banks.std(correction=0).item()), rel=1e-6)


def test_a_sample_is_drawn_once_and_for_all(folder: Path) -> None:
    clips = read_folder(folder)
    few = [filter_bank_stats(clips, KaldiFrontend(num_frames=50), limit=3) for _ in range(2)]
    assert few[0] == few[1] and few[0].clips + len(few[0].failures) <= 3


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(folder)])
    printed = capsys.readouterr().out
    assert "6 of 8 clips, " in printed and "left out 1 without audio" in printed
    said = printed.splitlines()[-1].removeprefix("--model.frontend ").strip("'")
    found = filter_bank_stats(read_folder(folder), KaldiFrontend())
    assert json.loads(said) == {"mean": pytest.approx(found.mean, abs=6e-4), "std": pytest.approx(found.std, abs=6e-4)}
    main([str(folder), "--frontend", "htk", "--clips", "2"])
    assert "does not normalise" in capsys.readouterr().out
    for words, says in (
        ([str(folder / "text.mp4")], "avfast: none of 1 clips has audio that can be read: "),
        ([str(tmp_path / "none")], "avfast: CLIPS: no such file or folder: "),
    ):
        with pytest.raises(SystemExit) as caught:
            main(words)
        printed = capsys.readouterr().err
        assert caught.value.code == 2 and says in printed and printed.count("\n") == 1
