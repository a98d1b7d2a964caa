"""What happens in one clip: a description small enough for a line of JSON, from which pixels, waveforms, masks and
boxes are rendered again at any time.

Eight instruments are each one shape and texture (seen) tied to one timbre (heard). A class is instrument x colour x
articulation; colour is only seen and articulation only heard, so one modality alone names the class of half of the
clips at best. Four attributes hold for the whole clip and show in any single frame:

=============  =========================  ======================================
attribute      seen                       heard
=============  =========================  ======================================
``pitch``      mean height of the object  fundamental, 131 to 1048 Hz
``loudness``   size of the object         -34 to -16 dBFS while a note sounds
``vibrato``    hue within its colour      vibrato rate, 2.5 to 9 Hz
``background`` tint and grain             spectral slope of the ambient noise
=============  =========================  ======================================

Two vary in time: the object flashes at every onset, and moves up and down with the glissando.

A longer work (a film made of one-second clips, see :mod:`.long`) is a list of scenes; nothing here knows about it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .render import Renderer
from .render import mask as visible
from .synth import Waves, waves

if TYPE_CHECKING:
    from .long import Film

INSTRUMENTS = ("bell", "flute", "clarinet", "strings", "marimba", "choir", "organ", "buzzer")
COLOURS = ("red", "blue")
ARTICULATIONS = ("staccato", "sustained")
NUM_CLASSES = len(INSTRUMENTS) * len(COLOURS) * len(ARTICULATIONS)

PITCH_HZ = (131.0, 1048.0)
LOUDNESS_DB = (-34.0, -16.0)
HEIGHT = (0.82, 0.18)  # centre of the object as a fraction of the frame's height, lowest pitch to highest
RADIUS = (0.14, 0.28)  # as a fraction of the frame's shorter side, quietest to loudest
SEMITONES = 12 * float(np.log2(PITCH_HZ[1] / PITCH_HZ[0]))


def class_index(instrument: int, colour: int, articulation: int) -> int:
    """Position of a class in the class list, 0 to 31."""
    return (instrument * len(COLOURS) + colour) * len(ARTICULATIONS) + articulation


def class_names() -> list[str]:
    """Readable names of the 32 classes, in order, such as ``bell, red, staccato``."""
    return [f"{i}, {c}, {a}" for i in INSTRUMENTS for c in COLOURS for a in ARTICULATIONS]


@dataclass(frozen=True)
class Source:
    """One object. Attributes run from 0 to 1 over the ranges at the head of this file; times are seconds."""

    instrument: int
    colour: int
    articulation: int
    pitch: float
    loudness: float
    vibrato: float
    x: float  # centre, fraction of the frame's width
    brightness: float  # 0 to 1
    glide: float  # semitones up and down
    glide_cycles: int  # whole cycles in the clip, so that the mean height is the pitch
    glide_phase: float  # radians
    onsets: tuple[float, ...]
    sounding: bool = True
    on_screen: bool = True

    @property
    def label(self) -> int:
        """Class index, 0 to 31."""
        return class_index(self.instrument, self.colour, self.articulation)

    @property
    def hertz(self) -> float:
        """Mean fundamental."""
        return PITCH_HZ[0] * 2 ** (self.pitch * SEMITONES / 12)

    @property
    def decibels(self) -> float:
        """Level while a note sounds, in dB of full scale."""
        return LOUDNESS_DB[0] + self.loudness * (LOUDNESS_DB[1] - LOUDNESS_DB[0])

    @property
    def radius(self) -> float:
        """Of the circle around the shape, as a fraction of the frame's shorter side."""
        return RADIUS[0] * (RADIUS[1] / RADIUS[0]) ** self.loudness

    def semitones(self, time: float | np.ndarray, seconds: float) -> float | np.ndarray:
        """Distance from the mean pitch at ``time`` (a number or an array) in a clip of ``seconds``."""
        return self.glide * np.sin(2 * np.pi * self.glide_cycles * time / seconds + self.glide_phase)

    def height(self, time: float, seconds: float) -> float:
        """Centre at ``time`` as a fraction of the frame's height, 0 at the top."""
        position = self.pitch + float(self.semitones(time, seconds)) / SEMITONES
        return HEIGHT[0] + position * (HEIGHT[1] - HEIGHT[0])


@dataclass(frozen=True)
class Scene:
    """One clip. Sounding sources come first; the silent distractor, if any, is the last and is drawn behind them."""

    id: str
    seed: int  # of textures and noises
    width: int
    height: int
    fps: int
    seconds: float
    sample_rate: int
    background: float  # 0 (brown noise) to 1 (violet noise)
    drift: tuple[float, float]  # of the background, fractions of the frame per second
    snr_db: float  # sounding sources over the unrelated noise
    noise_hz: float  # centre of the unrelated noise
    sources: tuple[Source, ...]

    @property
    def num_frames(self) -> int:
        """Frames of the clip; frame k shows the scene at k / fps."""
        return round(self.seconds * self.fps)

    @property
    def num_samples(self) -> int:
        """Audio samples of the clip."""
        return round(self.seconds * self.sample_rate)

    @property
    def sounding(self) -> tuple[Source, ...]:
        """The sources that are heard, on screen or not."""
        return tuple(s for s in self.sources if s.sounding)

    @property
    def labels(self) -> tuple[int, ...]:
        """Class indices of the sounding sources, ascending."""
        return tuple(sorted(s.label for s in self.sounding))

    def frame(self, time: float) -> np.ndarray:
        """The frame at ``time`` in seconds, before encoding: (height, width, 3) uint8."""
        return Renderer(self).frame(time)

    def frames(self) -> np.ndarray:
        """All frames before encoding: (num_frames, height, width, 3) uint8."""
        renderer = Renderer(self)
        return np.stack([renderer.frame(k / self.fps) for k in range(self.num_frames)])

    def waves(self) -> Waves:
        """Every waveform before encoding, aligned with the decoded file's audio from its first sample on."""
        return waves(self)

    def mask(
        self,
        time: float,
        size: tuple[int, int],
        crop: tuple[float, float, float, float] | None = None,
        source: int = 0,
    ) -> np.ndarray:
        """Where a source is visible at ``time``: (H, W) bool for ``size`` = (H, W).

        ``crop`` is (left, top, right, bottom) in fractions of the frame (default: all of it) and is stretched to
        ``size``. A pixel belongs to the source that covers its centre and is in front. Empty for one off screen.
        """
        return visible(self, time, size, crop, source)

    def boxes(
        self,
        time: float,
        size: tuple[int, int],
        crop: tuple[float, float, float, float] | None = None,
    ) -> np.ndarray:
        """Tight boxes around the masks of all sources: (sources, 4) float32.

        Each row is (left, top, right, bottom) in pixels of ``size`` = (H, W), right and bottom exclusive; a row of NaN
        for a source without a visible pixel. Silent sources have boxes too: see ``Source.sounding``.
        """
        boxes = np.full((len(self.sources), 4), np.nan, dtype=np.float32)
        for index in range(len(self.sources)):
            rows, columns = np.nonzero(visible(self, time, size, crop, index))
            if rows.size:
                boxes[index] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        return boxes

    def to_json(self) -> str:
        """One line of JSON; floats survive exactly."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Scene:
        """The scene of :meth:`to_json`. Raises ValueError naming unknown or missing fields."""
        record = json.loads(line)
        record["sources"] = tuple(_restore(Source, {**s, "onsets": tuple(s["onsets"])}) for s in record["sources"])
        record["drift"] = tuple(record["drift"])
        return _restore(cls, record)


Record = TypeVar("Record", Source, Scene)


def _restore(kind: type[Record], record: dict[str, Any]) -> Record:
    expected = {f.name for f in fields(kind)}
    if set(record) != expected:
        unknown, missing = sorted(set(record) - expected), sorted(expected - set(record))
        raise ValueError(f"{kind.__name__}: unknown fields {unknown}, missing {missing}")
    return kind(**record)


def read_scenes(path: str | os.PathLike[str]) -> list[Scene]:
    """The scenes of a JSON-lines file, in its order."""
    with open(path, encoding="utf-8") as file:
        return [Scene.from_json(line) for line in file]


def write_scenes(path: str | os.PathLike[str], scenes: Sequence[Scene | Film]) -> None:
    """One scene or film per line."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(scene.to_json() + "\n" for scene in scenes)
