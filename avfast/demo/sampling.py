"""Which scenes a set holds.

Train and test are disjoint in attributes. Each of pitch, loudness, vibrato and background is cut into ten cells; a
combination of cells belongs to the test set if a weighted sum of the four cell numbers is divisible by five. So a
fifth of all combinations is never trained on, while every attribute alone has the same, uniform distribution in both.
Instrument pairs of ``HELD_OUT_PAIRS`` sound together in test sets only.

Films (:mod:`.long`) are held out by the combination with which they begin.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .long import EVENTS, MANNERS, ORDERS, OTHERS, Film, Rule, event_places
from .scene import ARTICULATIONS, COLOURS, INSTRUMENTS, NUM_CLASSES, RADIUS, Scene, Source

CELLS = 10
SPLITS = ("train", "test")
# Every instrument is in exactly two of the eight pairs.
HELD_OUT_PAIRS = frozenset({(0, 4), (1, 5), (2, 6), (3, 7), (0, 1), (2, 3), (4, 5), (6, 7)})
# Class of Zipf rank 1, 2, ...: neighbouring ranks differ in instrument, colour and articulation alike.
ZIPF_ORDER = tuple(13 * rank % NUM_CLASSES for rank in range(NUM_CLASSES))


@dataclass(frozen=True)
class Preset:
    """A kind of set. Sizes in pixels, times in seconds, shares from 0 to 1, ranges inclusive."""

    name: str
    width: int = 64
    height: int = 64
    fps: int = 12
    seconds: float = 2.0
    sample_rate: int = 16000
    train: int = 1000  # clips
    test: int = 256
    sounding: tuple[int, int] = (1, 1)  # fewest and most sounding sources of a clip
    zipf: bool = False  # class frequencies of 1 / rank instead of balanced
    held_out_only: bool = False  # every test clip is a held-out pair
    silent_share: float = 0.5  # clips with a silent distractor
    off_screen_share: float = 0.05  # clips whose (first) sounding source is not in the frames
    lit: tuple[float, float] = (0.75, 1.0)  # brightness of sounding objects
    dim: tuple[float, float] = (0.3, 0.6)  # of silent ones; where these ranges overlap only flashes tell
    snr_db: tuple[float, float] = (5.0, 20.0)
    clips: int = 1  # more than one: films of so many clips, ``seconds`` in all
    lag: int = 0  # most clips by which the sound of a film is late

    def __post_init__(self) -> None:
        if self.width % 2 or self.height % 2:
            raise ValueError(f"width and height must be even (chroma is subsampled), got {self.width} x {self.height}")
        if not 1 <= self.sounding[0] <= self.sounding[1] <= 3:
            raise ValueError(f"sounding must be (fewest, most) between 1 and 3, got {self.sounding}")
        if self.held_out_only and self.sounding != (2, 2):
            raise ValueError(f"held_out_only needs sounding=(2, 2), got {self.sounding}")
        if self.train < 0 or self.test < 0:
            raise ValueError(f"train and test must be >= 0 clips, got {self.train} and {self.test}")
        if self.clips > 1:
            self._check_film()

    def _check_film(self) -> None:
        length = self.seconds / self.clips
        if length < 0.5 or (length * self.fps) % 1 or (length * self.sample_rate) % 1:
            raise ValueError(
                f"a film's clips must last 0.5 s or more, whole frames and samples: got {length:.3f} s "
                f"({self.seconds} s of {self.clips} clips)"
            )
        if self.lag < 0 or not event_places(self.clips, self.lag):
            raise ValueError(
                f"two events a third of a film apart, {self.lag} clips late, do not fit {self.clips} clips"
            )
        if self.sounding != (1, 1) or self.silent_share or self.off_screen_share:
            raise ValueError("a film shows one object that sounds: sounding=(1, 1), silent_share=off_screen_share=0")


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("tiny"),
        Preset("field", width=320, height=240, fps=25, seconds=10.0, sample_rate=44100),
        Preset("multi", sounding=(1, 3), zipf=True),
        Preset("duets", sounding=(2, 2), held_out_only=True),
        Preset("long", seconds=8.0, clips=8, lag=2, silent_share=0.0, off_screen_share=0.0),
    )
}


def is_test(pitch: float, loudness: float, vibrato: float, background: float) -> bool:
    """Whether this combination of attributes (each 0 to 1) belongs to the test set."""
    cells = [min(int(value * CELLS), CELLS - 1) for value in (pitch, loudness, vibrato, background)]
    return sum(weight * cell for weight, cell in zip((1, 2, 3, 4), cells, strict=True)) % 5 == 0


def sample(preset: Preset, split: str, seed: int) -> list[Scene]:
    """All scenes of one split, a pure function of the arguments."""
    count, key, plan = _plan(preset, split, seed)
    balanced = _balanced(plan, count, NUM_CLASSES)
    silent = plan.permutation(count) < round(count * preset.silent_share)
    off_screen = plan.permutation(count) < round(count * preset.off_screen_share)
    return [
        _scene(
            preset,
            split,
            f"{split}_{index:05d}",
            int(balanced[index]),
            bool(silent[index]),
            bool(off_screen[index]),
            np.random.default_rng([*key, 1, index]),
        )
        for index in range(count)
    ]


def sample_films(preset: Preset, split: str, seed: int) -> list[Film]:
    """All films of one split, a pure function of the arguments."""
    count, key, plan = _plan(preset, split, seed)
    return [
        _film(preset, split, f"{split}_{index:05d}", int(label), np.random.default_rng([*key, 1, index]))
        for index, label in enumerate(_balanced(plan, count, len(ORDERS)))
    ]


def _plan(preset: Preset, split: str, seed: int) -> tuple[int, list[int], np.random.Generator]:
    """How many, the seed of each but its index, and what draws for the whole split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    key = [seed, SPLITS.index(split)]
    return preset.train if split == "train" else preset.test, key, np.random.default_rng([*key, 0])


def _balanced(plan: np.random.Generator, count: int, classes: int) -> np.ndarray:
    blocks = [plan.permutation(classes) for _ in range(-(-count // classes))]
    return np.array(blocks, dtype=int).reshape(-1)[:count]


def _attributes(split: str, background: float, rng: np.random.Generator) -> np.ndarray:
    """Pitch, loudness and vibrato, which the split allows beside the background."""
    while True:
        pitch, loudness, vibrato = found = rng.random(3)
        if is_test(pitch, loudness, vibrato, background) == (split == "test"):
            return found


def _film(preset: Preset, split: str, id: str, label: int, rng: np.random.Generator) -> Film:
    clip = replace(preset, seconds=preset.seconds / preset.clips, clips=1)
    lag = int(rng.integers(preset.lag + 1))
    places = event_places(preset.clips, lag)
    events = places[rng.integers(len(places))]
    background, noise_hz, snr_db = rng.random(), float(200 * 20 ** rng.random()), float(rng.uniform(*preset.snr_db))
    drift = (float(rng.uniform(-0.4, 0.4)), float(rng.uniform(-0.4, 0.4)))
    look = int(rng.choice(OTHERS)) * 4 + int(rng.integers(4))
    first = _source(clip, look, _attributes(split, background, rng), [], True, True, rng)
    pitch, x = rng.uniform(0.1, 0.3, 2) * rng.choice([-1, 1], 2)
    rule = Rule(float(pitch), float(x))
    sources = [rule.at(first, step) for step in range(preset.clips + lag)]
    for place, instrument in zip(events, ORDERS[label], strict=True):
        loudness, vibrato, colour, articulation = MANNERS[EVENTS.index(instrument)]
        change: dict[str, Any] = {
            "instrument": instrument,
            "colour": colour,
            "articulation": articulation,
            "loudness": loudness + float(rng.uniform(-0.1, 0.1)),
            "vibrato": vibrato + float(rng.uniform(-0.1, 0.1)),
        }
        sources[place + lag :] = [replace(source, **change) for source in sources[place + lag :]]
    scenes = [
        Scene(
            id=f"{id}.{step}",
            seed=int(rng.integers(2**62)),
            width=clip.width,
            height=clip.height,
            fps=clip.fps,
            seconds=clip.seconds,
            sample_rate=clip.sample_rate,
            background=background,
            drift=drift,
            snr_db=snr_db,
            noise_hz=noise_hz,
            sources=(source,),
        )
        for step, source in enumerate(sources)
    ]
    return Film(id, lag, events, rule, tuple(scenes))


def _scene(
    preset: Preset, split: str, id: str, first: int, silent: bool, off_screen: bool, rng: np.random.Generator
) -> Scene:
    classes = _classes(preset, split, first, rng)
    background = rng.random()
    sources: list[Source] = []
    for position, label in enumerate(classes):
        attributes = _attributes(split, background, rng)
        visible = not (off_screen and position == 0)
        sources.append(_source(preset, label, attributes, sources, True, visible, rng))
    if silent:
        taken = {s.instrument for s in sources}
        free = [i for i in range(len(INSTRUMENTS)) if i not in taken]
        label = int(rng.choice(free)) * 4 + int(rng.integers(4))
        # Silent objects are free to roam: of several places the one that hides the least.
        places = [_source(preset, label, rng.random(3), sources, False, True, rng) for _ in range(8)]
        sources.append(max(places, key=lambda place: _gap(preset, place, sources)))
    return Scene(
        id=id,
        seed=int(rng.integers(2**62)),
        width=preset.width,
        height=preset.height,
        fps=preset.fps,
        seconds=preset.seconds,
        sample_rate=preset.sample_rate,
        background=background,
        drift=(float(rng.uniform(-0.4, 0.4)), float(rng.uniform(-0.4, 0.4))),
        snr_db=float(rng.uniform(*preset.snr_db)),
        noise_hz=float(200 * 20 ** rng.random()),
        sources=tuple(sources),
    )


def _classes(preset: Preset, split: str, first: int, rng: np.random.Generator) -> list[int]:
    """The classes of the sounding sources: distinct instruments, no held-out pair in training."""
    count = int(rng.integers(preset.sounding[0], preset.sounding[1] + 1))
    if preset.held_out_only and split == "test":
        pairs = sorted(HELD_OUT_PAIRS)
        return [instrument * 4 + int(rng.integers(4)) for instrument in pairs[rng.integers(len(pairs))]]
    weights = np.ones(NUM_CLASSES)
    if preset.zipf:
        weights[list(ZIPF_ORDER)] = 1 / np.arange(1, NUM_CLASSES + 1)
        first = int(rng.choice(NUM_CLASSES, p=weights / weights.sum()))
    classes = [first]
    while len(classes) < count:
        allowed = weights.copy()
        for label in range(NUM_CLASSES):
            pairs_with = [tuple(sorted((label // 4, other // 4))) for other in classes]
            same = any(a == b for a, b in pairs_with)
            if same or (split == "train" and any(pair in HELD_OUT_PAIRS for pair in pairs_with)):
                allowed[label] = 0
        classes.append(int(rng.choice(NUM_CLASSES, p=allowed / allowed.sum())))
    return classes


def _source(
    preset: Preset,
    label: int,
    attributes: Iterable[float],
    others: Sequence[Source],
    sounding: bool,
    on_screen: bool,
    rng: np.random.Generator,
) -> Source:
    pitch, loudness, vibrato = (float(value) for value in attributes)
    interval = rng.uniform(0.35, 0.65)
    onsets = np.arange(rng.uniform(0.05, 0.2), preset.seconds - 0.1, interval)
    onsets[1:] += rng.uniform(-0.04, 0.04, len(onsets) - 1)
    brightness = rng.uniform(*(preset.lit if sounding else preset.dim))
    glide = rng.uniform(0.5, 2.0) * (rng.random() < 0.6)
    cycles, phase = int(rng.integers(1, 2 + int(preset.seconds / 2))), rng.uniform(0, 2 * np.pi)
    candidates = [
        Source(
            instrument=label // (len(COLOURS) * len(ARTICULATIONS)),
            colour=label // len(ARTICULATIONS) % len(COLOURS),
            articulation=label % len(ARTICULATIONS),
            pitch=pitch,
            loudness=loudness,
            vibrato=vibrato,
            x=float(x),
            brightness=float(brightness),
            glide=float(glide),
            glide_cycles=cycles,
            glide_phase=float(phase),
            onsets=tuple(float(onset) for onset in onsets) if sounding else (),
            sounding=sounding,
            on_screen=on_screen,
        )
        for x in rng.uniform(RADIUS[1], 1 - RADIUS[1], 12)
    ]
    return max(candidates, key=lambda place: min(_gap(preset, place, others), 0.05))


def _gap(preset: Preset, place: Source, others: Sequence[Source]) -> float:
    """Smallest distance between the circles around two objects, in shorter sides of the frame."""
    shorter = min(preset.width, preset.height)
    gaps = [1.0]
    for other in others:
        if other.on_screen:
            across = (place.x - other.x) * preset.width / shorter
            down = (place.height(0, 1) - other.height(0, 1)) * preset.height / shorter
            gaps.append(float(np.hypot(across, down)) - place.radius - other.radius)
    return min(gaps)
