"""Films of the demo: what can be told from what, and what the files hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from avfast.data.frontend_clips import ClipsFrontend
from avfast.data.manifest import read_manifest
from avfast.demo import PRESETS, DemoSet, Film, build, film_class_names, is_test, sample_films
from avfast.demo.baselines import film_ceilings, report
from avfast.demo.long import EVENTS, MANNERS, ORDERS, OTHERS, event_places

LONG = replace(PRESETS["long"], train=360, test=96)


@pytest.fixture(scope="module")
def films() -> list[Film]:
    return sample_films(LONG, "train", 0)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> DemoSet:
    return build("long", tmp_path_factory.mktemp("films"), clips=12, test_clips=4, workers=1, progress=False)


def instruments(film: Film) -> list[int]:
    return [scene.sources[0].instrument for scene in film.scenes]


def test_films_are_a_function_of_split_and_seed(films: list[Film]) -> None:
    assert sample_films(LONG, "train", 0)[:20] == films[:20]
    assert sample_films(LONG, "train", 1)[0] != films[0] != sample_films(LONG, "test", 0)[0]
    assert [Film.from_json(film.to_json()) for film in films[:20]] == films[:20]
    with pytest.raises(ValueError, match="Film: unknown or missing"):
        Film.from_json(films[0].to_json().replace('"lag"', '"delay"'))


def test_the_class_is_the_order_of_two_events(films: list[Film]) -> None:
    assert len(ORDERS) == len(set(film_class_names())) == 12 and {*EVENTS} | {*OTHERS} == set(range(8))
    assert film_class_names()[films[0].labels[0]].count(", then ") == 1
    counts = Counter(film.labels[0] for film in films)
    assert set(counts.values()) == {30} and len(counts) == 12
    for film in films:
        names = [scene.sources[0].instrument for scene in film.seen]
        first, second = ORDERS[film.labels[0]]
        assert [names[k] for k in film.events] == [first, second]
        assert names.index(second) - names.index(first) >= 8 / 3  # so the other order is another class
        begin, change = (place + film.lag for place in film.events)
        found = instruments(film)
        assert set(found[begin:change]) == {first} and set(found[change:]) == {second}
        assert len(set(found[:begin])) == 1 and set(found[:begin]) <= set(OTHERS)


def test_places_lags_and_the_others_do_not_tell_the_class(films: list[Film]) -> None:
    assert event_places(8, 2) == [(1, 4), (1, 5), (2, 5)] and len(event_places(8, 0)) == 10
    tables = (
        {(film.lag, film.events) for film in films},
        {instruments(film)[0] for film in films},
    )
    assert tables[0] == {(lag, places) for lag in range(3) for places in event_places(8, lag)}
    assert tables[1] == set(OTHERS)
    for value in (lambda film: film.lag > 0, lambda film: film.events[0] > 1, lambda film: film.events[1] > 5):
        shares = [np.mean([value(film) for film in films if film.labels[0] == label]) for label in range(12)]
        assert np.ptp(shares) < 0.45


def test_a_clip_can_be_told_from_its_neighbours(films: list[Film]) -> None:
    """By the rule of the film; that is 0.1 to 0.3 a step, and where it does not turn the mean of both sides."""
    straight = 0
    for film in films[:200]:
        sources = [scene.sources[0] for scene in film.scenes]
        for value, step in (
            ([s.pitch for s in sources], film.rule.pitch),
            ([(s.x - 0.28) / 0.44 for s in sources], film.rule.x),
        ):
            assert 0.1 <= abs(step) <= 0.3 and 0 <= min(value) and max(value) <= 1
            moved = np.diff(value)
            assert (np.abs(moved) <= abs(step) + 1e-9).all()
            for before, now, after in zip(value, value[1:], value[2:], strict=False):
                ways = [now - before, after - now]
                if np.allclose(ways, ways[0]):
                    assert abs(abs(ways[0]) - abs(step)) < 1e-9 and abs(now - (before + after) / 2) < 1e-9
                    straight += 1
                else:  # a turn in one of the two steps: still known from the step and the nearer end
                    turned = now - before if abs(abs(ways[0]) - abs(step)) > 1e-9 else after - now
                    assert abs(turned) <= abs(step)
        assert len({s.onsets for s in sources}) == 1 and len({scene.background for scene in film.scenes}) == 1
        manners = {(s.instrument, s.loudness, s.vibrato, s.colour, s.articulation) for s in sources}
        assert len(manners) == len(set(instruments(film)))  # they change with the instrument alone
        for instrument, *manner in manners:
            if instrument in EVENTS:
                assert (np.abs(np.subtract(manner, MANNERS[EVENTS.index(instrument)])) <= (0.1, 0.1, 0, 0)).all()
    assert straight > 0.5 * 200 * 2 * 6


def test_train_and_test_films_begin_in_other_cells(films: list[Film]) -> None:
    for split, part in (("train", films), ("test", sample_films(LONG, "test", 0))):
        for film in part:
            first = film.scenes[0].sources[0]
            assert is_test(first.pitch, first.loudness, first.vibrato, film.scenes[0].background) == (split == "test")


def test_sound_is_late_by_whole_clips(films: list[Film]) -> None:
    assert 0.25 < min(Counter(film.lag for film in films).values()) / len(films)
    for lag in range(3):
        film = next(film for film in films if film.lag == lag)
        heard, seen = film.waves(), film.frames()
        assert heard.mixture.shape == (128000,) and seen.shape == (96, 64, 64, 3)
        for k in range(8):
            scene = film.scenes[k]  # heard now, seen `lag` clips before
            assert np.array_equal(heard.sources[:, 16000 * k :][:, :16000], scene.waves().sources)
            if k >= lag:
                assert np.array_equal(seen[12 * (k - lag) :][:12], scene.frames())
                assert scene == film.seen[k - lag] == film.heard[k]


def test_files_hold_what_the_truth_says(small: DemoSet) -> None:
    """Pictures and sound of every clip are its own and not those of the clip before or after."""
    from avfast.data.media import read_audio, read_frames

    for film in small.films("test"):
        frames = read_frames(small.path(film), [k / 12 for k in range(96)]).numpy().astype(int)
        sound = read_audio(small.path(film), seconds=8.0).numpy()
        assert frames.shape == (96, 64, 64, 3) and sound.shape == (128000,)
        pictures = film.frames().astype(int).reshape(8, -1)
        errors = np.abs(frames.reshape(8, 1, -1) - pictures[None]).mean(2)
        assert (errors.argmin(1) == np.arange(8)).all() and errors.diagonal().max() < 8
        waves = film.waves().mixture.reshape(8, -1)
        alike = np.corrcoef(np.concatenate([sound.reshape(8, -1), waves]))[:8, 8:]
        assert (alike.argmax(1) == np.arange(8)).all() and alike.diagonal().min() > 0.9


def test_a_manifest_names_their_classes(small: DemoSet) -> None:
    listed = read_manifest(small.train, small.class_csv)
    assert list(listed.class_names) == film_class_names()
    assert [clip.labels for clip in listed.clips] == [film.labels for film in small.films("train")]
    front = ClipsFrontend(
        num_clips=8, num_frames=32, num_mel_bins=16, frames_per_clip=4, image_size=16, sample_rate=16000
    )
    loaded = front.load(listed.clips[0].video_path)
    assert loaded["audio"].shape == (1, 8, 32, 16) and loaded["visual"].shape == (1, 8, 3, 4, 16, 16)
    assert film_ceilings()["both events, not their order"] == 0.5 and film_ceilings()["chance"] == 1 / 12
    with pytest.raises(ValueError, match="'long' is a set of films"):
        small.scenes("train")
    with pytest.raises(ValueError, match="split must be one of"):
        small.films("validation")


def test_what_is_reached_without_learning(small: DemoSet) -> None:
    text = report(small)
    for line in ("12 films of 8 clips", "both events, not their order", "spectrum, in order", "spectrum, order lost"):
        assert line in text


def test_several_processes_write_films_too(tmp_path: Path) -> None:
    films = build(replace(LONG, train=3, test=1), tmp_path, workers=2, progress=False)
    assert sorted(path.stem for path in (films.root / "clips").iterdir()) == [
        "test_00000", "train_00000", "train_00001", "train_00002",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clips": 24}, r"got 0.333 s \(8.0 s of 24 clips\)"),
        ({"fps": 13, "clips": 16}, "whole frames"),
        ({"lag": 6}, "6 clips late, do not fit 8 clips"),
        ({"lag": -1}, "do not fit"),
        ({"silent_share": 0.5}, "one object that sounds"),
        ({"sounding": (1, 2)}, "one object that sounds"),
    ],
)
def test_wrong_films_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LONG, **settings)
