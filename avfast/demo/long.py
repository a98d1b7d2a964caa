"""A film: clips of equal length, one after the other, that are worth remembering.

An object moves by the film's rule: from clip to clip its pitch (height) and its place across change by a fixed step and
turn round at their limits, so that a clip can be told from its neighbours, by ear as by eye. Twice, at least a third of
the film apart, it becomes another instrument and stays so: one of four *events*, each with a look and a sound of its
own. The class is which comes first and which second, 12 in all; whoever knows the events but not their order is right
half of the time. What names the class is seen as well as heard.

The sound is late by a whole number of clips, another one for each film. So sound and pictures of a film belong
together, those of a clip do not. What is heard before it was seen are the states from which the film goes on.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields, replace
from itertools import permutations

import numpy as np

from .scene import INSTRUMENTS, RADIUS, Scene, Source
from .synth import Waves

EVENTS = (0, 3, 6, 7)  # what the object becomes: bell, strings, organ, buzzer
# How each of them looks and sounds: loudness (size) and vibrato (hue), give or take, then colour and articulation. None
# is small: in frames of 32 pixels a network that starts from scratch sees little but the background beside such.
MANNERS = ((0.6, 0.1, 0, 0), (0.9, 0.9, 0, 1), (0.9, 0.1, 1, 0), (0.6, 0.9, 1, 1))
OTHERS = tuple(k for k in range(len(INSTRUMENTS)) if k not in EVENTS)
ORDERS = tuple(permutations(EVENTS, 2))  # (first, second), by class index


def film_class_names() -> list[str]:
    """Readable names of the 12 classes, in order, such as ``bell, then strings``."""
    return [f"{INSTRUMENTS[first]}, then {INSTRUMENTS[second]}" for first, second in ORDERS]


def event_places(clips: int, lag: int) -> list[tuple[int, int]]:
    """Where two events may be in a film of so many clips: not in the first, seen and heard, a third of it apart."""
    last = clips - lag
    return [(i, j) for i in range(1, last) for j in range(i + 1, last) if 3 * (j - i) >= clips]


@dataclass(frozen=True)
class Rule:
    """How the object changes from one clip to the next, in shares of what it can move over."""

    pitch: float
    x: float

    def at(self, source: Source, step: int) -> Source:
        """The object after so many steps."""
        across = (source.x - RADIUS[1]) / (1 - 2 * RADIUS[1])
        return replace(
            source,
            pitch=_turning(source.pitch + step * self.pitch),
            x=RADIUS[1] + (1 - 2 * RADIUS[1]) * _turning(across + step * self.x),
        )


def _turning(value: float) -> float:
    """Folded into 0 .. 1: what passes an end comes back."""
    return 1 - abs(1 - value % 2)


@dataclass(frozen=True)
class Film:
    """Several scenes as one file; clip ``k`` shows ``scenes[k + lag]`` while ``scenes[k]`` is heard."""

    id: str
    lag: int  # clips by which the sound is late
    events: tuple[int, int]  # the clips from which on they are seen; they are heard ``lag`` later
    rule: Rule
    scenes: tuple[Scene, ...]  # as many as there are clips, and ``lag`` more

    @property
    def seen(self) -> tuple[Scene, ...]:
        """The scenes that the pictures show, by clip."""
        return self.scenes[self.lag :]

    @property
    def heard(self) -> tuple[Scene, ...]:
        """The scenes that the sound is of, by clip."""
        return self.scenes[: len(self.scenes) - self.lag]

    @property
    def labels(self) -> tuple[int, ...]:
        """The class index, 0 to 11."""
        first, second = (self.seen[k].sources[0].instrument for k in self.events)
        return (ORDERS.index((first, second)),)

    @property
    def width(self) -> int:
        """Of the frames."""
        return self.scenes[0].width

    @property
    def height(self) -> int:
        """Of the frames."""
        return self.scenes[0].height

    @property
    def fps(self) -> int:
        """Frames per second; frame k shows the film at k / fps."""
        return self.scenes[0].fps

    @property
    def sample_rate(self) -> int:
        """Of the sound, in Hz."""
        return self.scenes[0].sample_rate

    @property
    def seconds(self) -> float:
        """Of the whole film."""
        return sum(scene.seconds for scene in self.seen)

    def frames(self) -> np.ndarray:
        """All frames before encoding: (num_frames, height, width, 3) uint8."""
        return np.concatenate([scene.frames() for scene in self.seen])

    def waves(self) -> Waves:
        """Every waveform before encoding, the clips' one after the other."""
        parts = [scene.waves() for scene in self.heard]
        return Waves(*(np.concatenate(part, axis=-1) for part in zip(*parts, strict=True)))

    def to_json(self) -> str:
        """One line of JSON; floats survive exactly."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Film:
        """The film of :meth:`to_json`. Raises ValueError for another record."""
        record = json.loads(line)
        if set(record) != {f.name for f in fields(cls)}:
            raise ValueError(f"Film: unknown or missing fields in {sorted(record)}")
        record["scenes"] = tuple(Scene.from_json(json.dumps(scene)) for scene in record["scenes"])
        return cls(**record | {"events": tuple(record["events"]), "rule": Rule(**record["rule"])})


def read_films(path: str | os.PathLike[str]) -> list[Film]:
    """The films of a JSON-lines file, in its order."""
    with open(path, encoding="utf-8") as file:
        return [Film.from_json(line) for line in file]
