"""The demo clips: what they hold, what is seen and heard of it, and the files and cache they are written to."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from avfast.data.manifest import read_manifest
from avfast.demo import HELD_OUT_PAIRS, PRESETS, Preset, Scene, baselines, build, class_names, is_test, sample
from avfast.demo import write as demo_write
from avfast.demo.baselines import accuracy, class_ceilings, explained, features, report
from avfast.demo.sampling import ZIPF_ORDER

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def scenes():
    return sample(TINY, "train", 0)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return build("tiny", tmp_path_factory.mktemp("demo"), clips=128, test_clips=64, progress=False)


def decode(path):
    import av

    with av.open(str(path)) as container:
        sound = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)[0]
    with av.open(str(path)) as container:
        return sound, np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def fingerprint(scenes):
    digest = hashlib.sha256()
    for scene in scenes:
        digest.update(scene.to_json().encode() + scene.frames().tobytes())
        for part in scene.waves():
            digest.update(part.tobytes())
    return digest.hexdigest()


def on_screen(scenes):
    return [scene for scene in scenes if scene.sources[0].on_screen]


# What a set holds


def test_same_seed_same_bits_in_another_process(scenes):
    code = (
        "from test_demo import PRESETS, TINY, fingerprint, sample\n"
        "print(fingerprint(sample(TINY, 'train', 0)[:4] + sample(PRESETS['multi'], 'test', 3)[:2]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(Path(__file__).parent)}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert other.stdout.strip() == fingerprint(scenes[:4] + sample(PRESETS["multi"], "test", 3)[:2]), other.stderr


def test_another_seed_gives_other_clips(scenes):
    other = sample(TINY, "train", 1)[0]
    assert not np.array_equal(other.frames(), scenes[0].frames())
    assert not np.array_equal(other.waves().mixture, scenes[0].waves().mixture)


def test_a_scene_survives_json(scenes):
    assert [Scene.from_json(scene.to_json()) for scene in scenes[:50]] == scenes[:50]
    with pytest.raises(ValueError, match=r"Scene: unknown fields \['more'\], missing \['snr_db'\]"):
        Scene.from_json(scenes[0].to_json().replace('"snr_db"', '"more"'))


def test_classes_and_shares_are_balanced(scenes):
    assert set(Counter(label for scene in scenes for label in scene.labels).values()) == {31, 32}
    assert sum(len(scene.sources) == 2 for scene in scenes) == 500
    assert all(not scene.sources[1].sounding for scene in scenes if len(scene.sources) == 2)
    assert sum(not scene.sources[0].on_screen for scene in scenes) == 50
    assert len(set(class_names())) == 32
    # Onsets do not give the articulation away.
    onsets = [
        np.mean([len(s.sources[0].onsets) for s in scenes if s.sources[0].articulation == articulation])
        for articulation in (0, 1)
    ]
    assert abs(onsets[0] - onsets[1]) < 0.2


def test_shares_are_parameters():
    part = sample(replace(TINY, silent_share=0.0, off_screen_share=0.25, train=40), "train", 0)
    assert sum(not scene.sources[0].on_screen for scene in part) == 10
    assert all(len(scene.sources) == 1 for scene in part)


def test_train_and_test_share_no_attribute_cell(scenes):
    def attributes(part):
        return np.array([(s.sources[0].pitch, s.sources[0].loudness, s.sources[0].vibrato, s.background) for s in part])

    seen, held_out = attributes(scenes), attributes(sample(TINY, "test", 0))
    assert not any(is_test(*row) for row in seen) and all(is_test(*row) for row in held_out)
    cells = [{tuple(row) for row in (part * 10).astype(int)} for part in (seen, held_out)]
    assert not cells[0] & cells[1]
    for part in (seen, held_out):  # the same range in both
        assert np.all(part.min(0) < 0.05) and np.all(part.max(0) > 0.95)
        assert np.all(np.abs(part.mean(0) - 0.5) < 0.06)


def test_multi_has_zipf_frequencies_and_keeps_pairs_back():
    part = sample(replace(PRESETS["multi"], train=1200), "train", 0)
    assert Counter(len(scene.sounding) for scene in part).keys() == {1, 2, 3}
    counts = Counter(label for scene in part for label in scene.labels)
    ranks = np.arange(1, 33)
    slope = np.polyfit(np.log(ranks), np.log([counts[label] for label in ZIPF_ORDER]), 1)[0]
    assert -1.15 < slope < -0.75
    for scene in part:
        instruments = sorted(source.instrument for source in scene.sources)
        assert len(set(instruments)) == len(instruments)
        sounding = sorted(source.instrument for source in scene.sounding)
        assert not any((a, b) in HELD_OUT_PAIRS for a in sounding for b in sounding)


def test_duets_are_tested_on_pairs_never_heard_together():
    preset = replace(PRESETS["duets"], train=400, test=128)
    pairs = {
        split: {tuple(sorted(s.instrument for s in scene.sounding)) for scene in sample(preset, split, 0)}
        for split in ("train", "test")
    }
    assert pairs["test"] == HELD_OUT_PAIRS
    assert len(pairs["train"]) == 20 and not pairs["train"] & pairs["test"]


# What is seen


def test_masks_fit_rendered_pixels():
    part = on_screen(sample(replace(TINY, width=320, height=240, train=64), "train", 0))
    assert {scene.sources[0].instrument for scene in part} == set(range(8))
    for scene in part:
        for k, source in enumerate(scene.sources):
            alone = replace(scene, sources=(source,))
            empty = replace(scene, sources=())
            changed = np.abs(alone.frame(0.7).astype(int) - empty.frame(0.7)).max(-1) > 8
            mask = alone.mask(0.7, (240, 320))
            both = (changed & mask).sum() / (changed | mask).sum()
            assert both > 0.75, (scene.id, k, both)  # some of a silent object may be as dark as the background
            assert (changed & ~mask).sum() < 0.1 * mask.sum()


def test_mask_of_a_crop_is_the_crop_of_the_mask(scenes):
    for scene in on_screen(scenes)[:20]:
        whole = scene.mask(0.4, (128, 256))
        assert np.array_equal(scene.mask(0.4, (64, 64), crop=(0.5, 0.25, 0.75, 0.75)), whole[32:96, 128:192])
    with pytest.raises(ValueError, match="left < right"):
        scene.mask(0.4, (8, 8), crop=(0.5, 0, 0.5, 1))
    with pytest.raises(IndexError, match="got source=7"):
        scene.mask(0.4, (8, 8), source=7)


def test_masks_do_not_overlap_and_boxes_fit_them():
    seen = 0
    for scene in sample(PRESETS["multi"], "train", 0)[:60]:
        masks = np.stack([scene.mask(1.0, (96, 96), source=k) for k in range(len(scene.sources))])
        assert masks.sum(0).max() <= 1
        for mask, box, source in zip(masks, scene.boxes(1.0, (96, 96)), scene.sources, strict=True):
            if not source.on_screen:
                assert not mask.any() and np.isnan(box).all()
                continue
            left, top, right, bottom = box.astype(int)
            inside = mask[top:bottom, left:right]
            assert inside.sum() == mask.sum()
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            seen += 1
    assert seen > 60


def test_height_is_pitch_and_size_is_loudness(scenes):
    part = [scene for scene in on_screen(scenes) if scene.sources[0].instrument == 2][:40]  # squares
    heights, sizes = [], []
    for scene in part:
        masks = np.stack([scene.mask(t, (64, 64)) for t in np.arange(0, 2, 0.1)])
        heights.append(np.nonzero(masks)[1].mean())
        sizes.append(np.sqrt(masks[0].sum()))
    for seen, name, sign in ((heights, "pitch", -1), (sizes, "loudness", 1)):
        heard = [getattr(scene.sources[0], name) for scene in part]
        assert sign * np.corrcoef(seen, heard)[0, 1] > 0.95


def test_flash_tells_onsets_and_silence(scenes):
    def brightness(scene, index, moment):
        return scene.frame(moment)[scene.mask(moment, (64, 64), source=index)].mean()

    for scene in [s for s in on_screen(scenes) if len(s.sources) == 2][:20]:
        onset = scene.sources[0].onsets[1]
        assert brightness(scene, 0, onset + 0.01) > brightness(scene, 0, onset - 0.01) + 10
        silent = [brightness(scene, 1, moment) for moment in np.arange(0, 2, 0.1)]
        assert np.ptp(silent) < 12


def test_articulation_is_not_seen_and_colour_is_not_heard(scenes):
    for scene in scenes[:10]:
        first = scene.sources[0]
        spoken = replace(scene, sources=(replace(first, articulation=1 - first.articulation), *scene.sources[1:]))
        painted = replace(scene, sources=(replace(first, colour=1 - first.colour), *scene.sources[1:]))
        assert np.array_equal(spoken.frames(), scene.frames())
        assert not np.array_equal(spoken.waves().mixture, scene.waves().mixture)
        assert np.array_equal(painted.waves().mixture, scene.waves().mixture)
        assert np.array_equal(painted.frames(), scene.frames()) is not first.on_screen


# What is heard


def test_waves_add_up_at_the_promised_levels(scenes):
    for scene in scenes[:40]:
        waves = scene.waves()
        assert waves.sources.shape == (len(scene.sources), 32000) and waves.mixture.dtype == np.float32
        total = waves.sources.sum(0) + waves.ambient + waves.noise
        assert np.abs(total - waves.mixture).max() < 1e-6 and np.abs(waves.mixture).max() < 1
        snr = 10 * np.log10(np.mean(waves.sources.sum(0) ** 2) / np.mean(waves.noise**2))
        assert snr == pytest.approx(scene.snr_db, abs=0.01) and 5 <= snr <= 20
        for source, wave in zip(scene.sources, waves.sources, strict=True):
            assert wave.any() == source.sounding
        first, last = scene.sources[0], round(scene.sources[0].onsets[0] * 16000)
        assert not waves.sources[0, :last].any()  # silence before the first onset, sound right after
        assert np.abs(waves.sources[0, last : last + 1600]).max() > 0.3 * 10 ** (first.decibels / 20)


def test_pitch_and_loudness_are_heard(scenes):
    flutes = [scene for scene in scenes if scene.sources[0].instrument == 1][:20]
    for scene in flutes:
        source, wave = scene.sources[0], scene.waves().sources[0]
        spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave)))) ** 2
        hertz = np.fft.rfftfreq(len(wave), 1 / 16000)
        near = (hertz > 0.8 * source.hertz) & (hertz < 1.25 * source.hertz)
        assert spectrum[near].sum() > 0.8 * spectrum.sum()
        if source.articulation:
            level = 20 * np.log10(np.sqrt(np.mean(wave[wave != 0] ** 2)))
            assert level == pytest.approx(source.decibels, abs=1.5)
    levels = [scene.sources[0].decibels for scene in scenes]
    assert np.ptp(levels) > 17 and max(s.sources[0].hertz for s in scenes) > 7 * min(s.sources[0].hertz for s in scenes)


# What is in the files


def lag(decoded, wave):
    """Samples by which ``decoded`` is late against ``wave``."""
    count = len(wave)
    product = np.fft.rfft(decoded[:count], 2 * count) * np.conj(np.fft.rfft(wave, 2 * count))
    peak = int(np.argmax(np.fft.irfft(product)))
    return peak if peak < count else peak - 2 * count


def test_decoded_clips_are_aligned_with_the_ground_truth(small):
    for scene in on_screen(small.scenes("test"))[:16]:
        sound, pictures = decode(small.path(scene))
        waves = scene.waves()
        assert abs(lag(sound, waves.mixture)) <= 16 and abs(lag(sound, waves.sources[0])) <= 16
        assert len(sound) >= 32000 and np.corrcoef(sound[:32000], waves.mixture)[0, 1] > 0.95
        assert pictures.shape == (24, 64, 64, 3)
        assert np.abs(pictures.astype(int) - scene.frames()).mean() < 8
        rendered = scene.frames().astype(int)
        flash = 1 + np.abs(np.diff(rendered, axis=0)).mean((1, 2, 3)).argmax()
        for shown, other in ((flash, flash - 1), (flash - 1, flash)):
            errors = [np.abs(pictures[shown] - rendered[k]).mean() for k in (shown, other)]
            assert errors[0] < errors[1]


def test_field_clips_are_aligned_too(tmp_path):
    field = PRESETS["field"]
    assert (field.width, field.height, field.seconds, field.sample_rate) == (320, 240, 10.0, 44100)
    scene = sample(replace(field, seconds=3.0), "train", 0)[0]
    demo_write.write_clip(scene, tmp_path / "clip.mp4")
    sound, pictures = decode(tmp_path / "clip.mp4")
    assert abs(lag(sound, scene.waves().mixture)) <= 44
    assert pictures.shape == (75, 240, 320, 3)


def test_manifests_are_read_like_those_of_other_clips(small):
    for split, path, count in (("train", small.train, 128), ("test", small.test, 64)):
        entries = json.loads(path.read_text())["data"]
        assert set(entries[0]) == {"video_id", "wav", "video_path", "labels"}
        listed = read_manifest(path, small.class_csv)
        assert list(listed.class_names) == class_names() and len(listed.clips) == count
        for clip, scene in zip(listed.clips, small.scenes(split), strict=True):
            assert clip.id == scene.id and tuple(clip.labels) == scene.labels
            assert Path(clip.video_path) == Path(clip.audio_path) == small.path(scene)
            assert small.path(scene).stat().st_size > 1000


def test_mpeg4_where_there_is_no_h264(monkeypatch, tmp_path, scenes):
    import av

    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    demo_write.write_clip(scenes[0], tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
    assert np.abs(decode(tmp_path / "clip.mp4")[1].astype(int) - scenes[0].frames()).mean() < 8


# The cache


def quick(root, **arguments):
    preset = replace(TINY, name="quick", seconds=0.5, train=4, test=2)
    return build(preset, root, workers=1, progress=False, **arguments)


def test_a_built_set_is_used_again(tmp_path, monkeypatch):
    first = quick(tmp_path)
    assert len(list((first.root / "clips").iterdir())) == 6
    monkeypatch.setattr(demo_write, "write_clip", None)
    assert quick(tmp_path) == first
    monkeypatch.undo()
    assert quick(tmp_path, seed=1).root != first.root
    assert quick(tmp_path, clips=3).root != first.root
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        first.root.name,
        quick(tmp_path, seed=1).root.name,
        quick(tmp_path, clips=3).root.name,
    }


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("AVFAST_CACHE", str(tmp_path / "here"))
    assert quick(None).root.parent == tmp_path / "here" / "demo"


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    write_clip, calls = demo_write.write_clip, []

    def interrupted(scene, path):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write_clip(scene, path)

    monkeypatch.setattr(demo_write, "write_clip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    assert len(list((quick(tmp_path).root / "clips").iterdir())) == 6


def test_a_killed_build_is_done_again(tmp_path):
    code = f"""if True:
        from avfast.demo import build
        build("tiny", {str(tmp_path)!r}, clips=20, test_clips=0, workers=1, progress=False)
    """
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".*.tmp/clips/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob(".*.tmp")) and not list(tmp_path.glob("tiny-*"))
    demo = build("tiny", tmp_path, clips=20, test_clips=0, workers=1, progress=False)
    assert len(list((demo.root / "clips").iterdir())) == 20
    assert not list(tmp_path.glob(".*.tmp"))


def test_writers_end_with_their_builder(tmp_path):
    """Their end of a pipe tells them, however the builder ended."""
    for split in ("train", "test"):
        demo_write.write_scenes(tmp_path / f"{split}.jsonl", sample(TINY, split, 0))
    (tmp_path / "clips").mkdir()
    process = subprocess.Popen(demo_write.writer(tmp_path, 0, 1), stdin=subprocess.PIPE)
    process.stdin.close()
    assert process.wait(60) == 1 and len(list((tmp_path / "clips").iterdir())) < 500


def test_builders_at_the_same_time_write_once(tmp_path, monkeypatch):
    write_clip, calls = demo_write.write_clip, []
    monkeypatch.setattr(demo_write, "write_clip", lambda scene, path: (calls.append(path), write_clip(scene, path)))
    threads = [threading.Thread(target=quick, args=(tmp_path,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 6 and len(list((quick(tmp_path).root / "clips").iterdir())) == 6


def test_a_script_without_a_main_guard_may_use_several_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from avfast.demo import build\n"
        f"demo = build('tiny', {str(tmp_path)!r}, clips=3, test_clips=1, workers=2)\n"
        "print(len(list((demo.root / 'clips').iterdir())))\n"
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert result.stdout.split() == ["4"], result.stderr


def test_a_failing_process_says_why(tmp_path):
    blocked = replace(TINY, name="quick", train=2, test=2, sample_rate=1234)  # AAC has no such rate
    with pytest.raises(RuntimeError, match=r"(?s)writing demo clips failed.*1234|Error"):
        build(blocked, tmp_path, workers=2, progress=False)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_wrong_arguments_are_named(small):
    with pytest.raises(ValueError, match="unknown demo set 'huge', expected one of tiny, field, multi, duets, long"):
        build("huge")
    with pytest.raises(ValueError, match="got -1 and 256"):
        build("tiny", clips=-1)
    with pytest.raises(ValueError, match="must be even"):
        Preset("odd", width=63)
    with pytest.raises(ValueError, match="split must be one of"):
        small.scenes("validation")


# What can be reached


def test_ceilings(scenes):
    ceilings = class_ceilings([replace(s, sources=(replace(s.sources[0], on_screen=True),)) for s in scenes])
    assert ceilings == {"chance": 1 / 32, "visual alone": 0.5, "audio alone": 0.5, "both": 1.0}
    assert class_ceilings(scenes)["both"] == pytest.approx(0.975)


def test_clips_can_be_learned_from_but_not_by_shortcuts(small, monkeypatch):
    train, test = features(small, "train"), features(small, "test")
    monkeypatch.setattr(baselines, "features", lambda demo, split: {"train": train, "test": test}[split])
    seen, held_out = ([scene.sources[0] for scene in small.scenes(split)] for split in ("train", "test"))

    def values(sources, name):
        return np.array([getattr(source, name) for source in sources])

    def score(measure, kind, name):
        return measure(getattr(train, kind), values(seen, name), getattr(test, kind), values(held_out, name))

    assert score(accuracy, "spectrum", "articulation") > 0.95
    assert score(accuracy, "spectrum", "instrument") > 0.5
    assert score(explained, "spectrum", "loudness") > 0.8
    assert score(accuracy, "pixels", "articulation") < 0.7 and score(accuracy, "spectrum", "colour") < 0.7
    text = report(small)
    assert "knowing the instrument" in text and "visual alone" in text and "mean colour <-> loudness" in text
