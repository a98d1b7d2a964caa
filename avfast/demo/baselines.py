"""What can be reached on a demo set without learning a representation: by chance, by knowing, by shortcuts.

Everything is held-out: fitted on the training clips, measured on the test clips, on the decoded files, as models are
measured (:mod:`avfast.tasks`). Only the command imports this file, so the clips themselves need nothing above them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch

from avfast.data.media import read_audio, read_frames
from avfast.tasks.retrieval import chance, recall

from . import DemoSet
from .long import EVENTS, ORDERS, Film, film_class_names
from .scene import INSTRUMENTS, NUM_CLASSES, Scene, class_names

Array = np.ndarray
RANKS = (1, 5, 10)


@dataclass(frozen=True)
class Features:
    """Simple features of the clips of one split, in the manifest's order; of films with a second axis, their clips'."""

    colour: Array  # (clips, 6): mean and spread of red, green and blue in the middle frame
    pixels: Array  # (clips, 768): that frame at 16 x 16
    level: Array  # (clips, 1): loudness of the clip in dB
    spectrum: Array  # (clips, 321): over time: mean, spread and upper tail of 64 log bands, quantiles of the level


def features(demo: DemoSet, split: str) -> Features:
    """Decodes every clip or film of a split."""
    if demo.preset.clips == 1:
        return _table([_row(*_decode(demo, scene, 1)[0], scene.sample_rate) for scene in demo.scenes(split)])
    films = [
        _table([_row(*clip, film.sample_rate) for clip in _decode(demo, film, demo.preset.clips)])
        for film in demo.films(split)
    ]
    return Features(*(np.stack([getattr(film, kind.name) for film in films]) for kind in fields(Features)))


def _table(rows: list[tuple[Array, ...]]) -> Features:
    return Features(*(np.array(column, dtype=np.float64) for column in zip(*rows, strict=True)))


def _row(frame: Array, samples: Array, sample_rate: int) -> tuple[Array, ...]:
    """The fields of :class:`Features` of one clip."""
    bands = _bands(samples, sample_rate)
    power = np.log(np.exp(bands).sum(1))
    change = np.abs(np.diff(bands, axis=0)).mean(0)
    over_time = [bands.mean(0), bands.std(0), np.quantile(bands, 0.1, 0), np.quantile(bands, 0.95, 0), change]
    return (
        np.concatenate([frame.mean((0, 1)), frame.std((0, 1))]),
        _shrink(frame).ravel(),
        np.array([10 * np.log10(np.mean(samples**2) + 1e-9)]),
        np.concatenate([*over_time, np.quantile(power, (0.1, 0.5, 0.8, 0.9, 0.95))]),
    )


def _decode(demo: DemoSet, scene: Scene | Film, clips: int) -> list[tuple[Array, Array]]:
    """Of each of so many equal parts the frame in its middle, in [0, 1], and its samples."""
    path, length = demo.path(scene), scene.seconds / clips
    frames = read_frames(path, [length * (k + 0.5) for k in range(clips)])
    samples = read_audio(path, sample_rate=scene.sample_rate, seconds=scene.seconds)
    if frames is None or samples is None:
        raise RuntimeError(f"{path}: expected frames and audio, found only one of them")
    parts = np.split(samples.numpy().astype(np.float64), clips)
    return [(frame.numpy().astype(np.float64) / 255, part) for frame, part in zip(frames, parts, strict=True)]


def _shrink(frame: Array) -> Array:
    rows, columns = (np.linspace(0, n, 17).astype(int)[:-1] for n in frame.shape[:2])
    sums = np.add.reduceat(np.add.reduceat(frame, rows, 0), columns, 1)
    return sums / sums.shape[0] / sums.shape[1]


def _bands(samples: Array, sample_rate: int) -> Array:
    """Log power in 64 bands, even on a mel scale up to 8 kHz, of windows of 32 ms every 16: (windows, 64)."""
    window = round(0.032 * sample_rate)
    pieces = np.lib.stride_tricks.sliding_window_view(samples, window)[:: window // 2] * np.hanning(window)
    power = np.abs(np.fft.rfft(pieces)) ** 2
    mel = 2595 * np.log10(1 + np.fft.rfftfreq(window, 1 / sample_rate) / 700)
    centres = np.linspace(0, 2840, 66)[1:-1]
    weights = np.clip(1 - np.abs(mel - centres[:, None]) / (centres[1] - centres[0]), 0, None)
    return np.log(power @ weights.T + 1e-8)


def _ridge(train: Array, targets: Array, test: Array) -> Array:
    """Linear least squares with the penalty that leave-one-out error picks; targets (N, K) -> predictions (M, K)."""
    try:
        from sklearn.linear_model import RidgeCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise ImportError("the demo's baselines need scikit-learn: pip install avfast[eval]") from None
    model = make_pipeline(StandardScaler(), RidgeCV(alphas=len(train) * 10.0 ** np.arange(-4, 3)))
    return model.fit(train, targets).predict(test).reshape(len(test), -1)


def accuracy(train: Array, labels: Array, test: Array, test_labels: Array) -> float:
    """Of a linear classifier, 0 to 1."""
    scores = _ridge(train, np.eye(int(labels.max()) + 1)[labels], test)
    return float((scores.argmax(1) == test_labels).mean())


def explained(train: Array, values: Array, test: Array, test_values: Array) -> float:
    """Share of variance a linear regression explains, at most 1."""
    predicted = _ridge(train, values[:, None], test)[:, 0]
    return float(1 - ((predicted - test_values) ** 2).mean() / test_values.var())


def retrieval_baselines(train: Features, test: Features, scenes: list[Scene]) -> dict[str, dict[str, float]]:
    """Recall of chance, of perfect knowledge of the instrument, and of shortcuts, on the test clips as gallery."""
    instruments = torch.tensor([scene.sources[0].instrument for scene in scenes])
    result = {"chance": chance(len(scenes)), "knowing the instrument": chance(len(scenes), instruments)}
    for name, seen, heard in (
        ("mean colour <-> loudness", "colour", "level"),
        ("mean colour <-> spectrum", "colour", "spectrum"),
        ("pixels <-> spectrum (linear)", "pixels", "spectrum"),
    ):
        x, y = getattr(train, heard), getattr(test, heard)
        guess = _ridge(getattr(train, seen), x, getattr(test, seen))
        # with a one beside them, since cosine knows nothing of a single number but its sign
        sides = [np.pad((z - x.mean(0)) / (x.std(0) + 1e-9), ((0, 0), (0, 1)), constant_values=1) for z in (guess, y)]
        result[name] = recall(torch.from_numpy(sides[0]), torch.from_numpy(sides[1]))
    return result


def class_ceilings(scenes: list[Scene]) -> dict[str, float]:
    """Best expected accuracy of naming the class of a solo from what can be known; off screen, the colour cannot."""
    hidden = np.array([not scene.sources[0].on_screen for scene in scenes])
    return {
        "chance": 1 / NUM_CLASSES,
        "visual alone": float(np.where(hidden, 1 / NUM_CLASSES, 1 / 2).mean()),
        "audio alone": 1 / 2,
        "both": float(np.where(hidden, 1 / 2, 1).mean()),
    }


def class_shortcuts(train: Features, test: Features, scenes: list[Scene], test_scenes: list[Scene]) -> dict[str, float]:
    """Class accuracy of linear classifiers over simple features."""
    labels, answers = (np.array([scene.labels[0] for scene in part]) for part in (scenes, test_scenes))
    both, both_test = (np.hstack([part.pixels, part.spectrum]) for part in (train, test))
    return {
        "mean colour": accuracy(train.colour, labels, test.colour, answers),
        "pixels": accuracy(train.pixels, labels, test.pixels, answers),
        "loudness": accuracy(train.level, labels, test.level, answers),
        "spectrum": accuracy(train.spectrum, labels, test.spectrum, answers),
        "pixels and spectrum": accuracy(both, labels, both_test, answers),
    }


def readouts(train: Features, test: Features, scenes: list[Scene], test_scenes: list[Scene]) -> dict[str, float]:
    """How well each attribute can be read off linearly: accuracy of the discrete ones, R2 of the continuous ones."""

    def values(part: list[Scene], name: str) -> Array:
        return np.array([getattr(s if name == "background" else s.sources[0], name) for s in part])

    result = {}
    for modality, kind in (("audio", "spectrum"), ("visual", "pixels")):
        for name in ("instrument", "colour", "articulation", "pitch", "loudness", "vibrato", "background"):
            discrete = name in ("instrument", "colour", "articulation")
            measure = accuracy if discrete else explained
            key = f"{name} from {modality} ({'accuracy' if discrete else 'R2'})"
            result[key] = measure(
                getattr(train, kind), values(scenes, name), getattr(test, kind), values(test_scenes, name)
            )
    return result


def film_ceilings() -> dict[str, float]:
    """Best expected accuracy of naming the class of a film from what can be known of its events."""
    return {
        "chance": 1 / len(ORDERS),
        "one event": 1 / (2 * (len(EVENTS) - 1)),
        "one event, and which one it is": 1 / (len(EVENTS) - 1),
        "both events, not their order": 1 / 2,
        "visual alone, audio alone, both": 1.0,
    }


def film_shortcuts(train: Features, test: Features, films: list[Film], test_films: list[Film]) -> dict[str, float]:
    """Class accuracy of linear classifiers over simple features of the clips, kept in order or not."""
    labels, answers = (np.array([film.labels[0] for film in part]) for part in (films, test_films))
    result = {}
    for name, kind in (("mean colour", "colour"), ("pixels", "pixels"), ("spectrum", "spectrum")):
        x, y = getattr(train, kind), getattr(test, kind)
        lost = [np.hstack([z.mean(1), z.min(1), z.max(1), z.std(1)]) for z in (x, y)]
        result[f"{name}, order lost"] = accuracy(lost[0], labels, lost[1], answers)
        result[f"{name}, in order"] = accuracy(x.reshape(len(x), -1), labels, y.reshape(len(y), -1), answers)
    return result


def report(demo: DemoSet) -> str:
    """All of the above as text. Sets with several sounding sources get their composition and chance only."""
    if demo.preset.clips > 1:
        return _film_report(demo)
    scenes, test_scenes = demo.scenes("train"), demo.scenes("test")
    lines = [f"{demo.preset.name}: {demo.root}", "", *composition(scenes, test_scenes), ""]
    solos = demo.preset.sounding == (1, 1)
    if not (solos and scenes and test_scenes):
        return "\n".join(lines)
    train, test = features(demo, "train"), features(demo, "test")
    title = f"retrieval among {len(test_scenes)} test clips"
    lines.append(f"{title:36}" + "".join(f"{f'R@{k}':>8}" for k in RANKS))
    for name, row in retrieval_baselines(train, test, test_scenes).items():
        rates = "".join(f"{row[f'R@{k}']:8.3f}" for k in RANKS)
        lines.append(f"  {name:34}{rates}   median rank {row['MdR']:g}")
    tables = {
        "class accuracy: ceilings": class_ceilings(test_scenes),
        "class accuracy: linear shortcuts": class_shortcuts(train, test, scenes, test_scenes),
        "attributes: linear readout": readouts(train, test, scenes, test_scenes),
    }
    return "\n".join([*lines, *_printed(tables)])


def _film_report(demo: DemoSet) -> str:
    films, test_films = demo.films("train"), demo.films("test")
    lines = [f"{demo.preset.name}: {demo.root}", ""]
    for split, part in (("train", films), ("test", test_films)):
        late = ", ".join(f"{count} by {lag}" for lag, count in sorted(Counter(film.lag for film in part).items()))
        lines.append(f"{split}: {len(part)} films of {demo.preset.clips} clips, their sound late by clips: {late or 0}")
    lines.append(f"{len(EVENTS)} events, {len(ORDERS)} classes: {film_class_names()[0]}, ...")
    tables = {"class accuracy: ceilings": film_ceilings()}
    if films and test_films:
        shortcuts = film_shortcuts(features(demo, "train"), features(demo, "test"), films, test_films)
        tables["class accuracy: linear shortcuts"] = shortcuts
    return "\n".join([*lines, *_printed(tables)])


def _printed(tables: dict[str, dict[str, float]]) -> Iterator[str]:
    for title, table in tables.items():
        yield from ("", title, *(f"  {name:44}{value:6.3f}" for name, value in table.items()))


def composition(scenes: list[Scene], test_scenes: list[Scene]) -> list[str]:
    """A few lines on what the set holds."""
    lines = []
    for split, part in (("train", scenes), ("test", test_scenes)):
        sounding = Counter(len(scene.sounding) for scene in part)
        silent = sum(len(scene.sources) > len(scene.sounding) for scene in part)
        hidden = sum(not scene.sources[0].on_screen for scene in part)
        counts = ", ".join(f"{count} with {number} sounding" for number, count in sorted(sounding.items()))
        lines.append(f"{split}: {len(part)} clips ({counts}), {silent} with a silent distractor, {hidden} off screen")
    labels = Counter(label for scene in scenes for label in scene.labels)
    ordered = ", ".join(f"{class_names()[label]} {count}" for label, count in labels.most_common(3))
    lines.append(f"{len(INSTRUMENTS)} instruments, {len(labels)} classes; most frequent: {ordered}")
    return lines
