"""Demo clips: rendered moving shapes with synthesised sounds, written as real media files, with full ground truth.

    demo = build()                      # 1,000 + 256 clips in the cache, written on the first call only
    demo.train, demo.test               # CAV-MAE manifests, read like those of any other clips
    demo.scenes("test")[0].mask(0.5, (64, 64))
    demo.scenes("test")[0].waves().sources
    build("long").films("test")[0].events    # films of eight clips, whose classes are orders of events

``python -m avfast.demo`` prints what chance, perfect knowledge and shortcuts reach on them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from .long import Film, film_class_names, read_films
from .sampling import HELD_OUT_PAIRS, PRESETS, SPLITS, Preset, is_test, sample, sample_films
from .scene import ARTICULATIONS, COLOURS, INSTRUMENTS, NUM_CLASSES, Scene, Source, class_names, read_scenes
from .synth import Waves
from .write import build_folder, cache_folder

__all__ = [
    "ARTICULATIONS",
    "COLOURS",
    "HELD_OUT_PAIRS",
    "INSTRUMENTS",
    "NUM_CLASSES",
    "PRESETS",
    "DemoSet",
    "Film",
    "Preset",
    "Scene",
    "Source",
    "Waves",
    "build",
    "class_names",
    "film_class_names",
    "is_test",
    "sample",
    "sample_films",
]


@dataclass(frozen=True)
class DemoSet:
    """A set on disk. The manifests name the clips relative to ``root``."""

    root: Path
    preset: Preset
    seed: int

    @property
    def train(self) -> Path:
        """CAV-MAE manifest of the training clips."""
        return self.root / "train.json"

    @property
    def test(self) -> Path:
        """CAV-MAE manifest of the held-out clips."""
        return self.root / "test.json"

    @property
    def class_csv(self) -> Path:
        """``index,mid,display_name`` of the classes: 32, or 12 of films."""
        return self.root / "classes.csv"

    def scenes(self, split: str) -> list[Scene]:
        """What happens in the clips of ``"train"`` or ``"test"``, in the manifest's order."""
        return read_scenes(self._truth(split, films=False))

    def films(self, split: str) -> list[Film]:
        """What happens in the films of ``"train"`` or ``"test"``, in the manifest's order."""
        return read_films(self._truth(split, films=True))

    def _truth(self, split: str, films: bool) -> Path:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        if films != (self.preset.clips > 1):
            raise ValueError(f"{self.preset.name!r} is a set of {'scenes' if films else 'films'}, ask for these")
        return self.root / f"{split}.jsonl"

    def path(self, scene: Scene | Film) -> Path:
        """The media file of a scene or film."""
        return self.root / "clips" / f"{scene.id}.mp4"


def build(
    name: str | Preset = "tiny",
    root: str | os.PathLike[str] | None = None,
    *,
    clips: int | None = None,
    test_clips: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> DemoSet:
    """The demo set of these arguments, written first if it is not there yet.

    Args:
        name: ``tiny`` (64 x 64, 2 s), ``field`` (320 x 240, 10 s), ``multi`` (as tiny, 1 to 3 sounding instruments,
            Zipf frequencies), ``duets`` (as tiny; test pairs never sound together in training), ``long`` (films of
            eight clips of 1 s), or a Preset.
        root: folder of the sets; default ``$AVFAST_CACHE/demo``, AVFAST_CACHE being ``~/.cache/avfast`` if unset.
        clips: training clips, default the preset's (1,000).
        test_clips: held-out clips, default the preset's (256).
        seed: of everything random.
        workers: processes that render; default one per usable core; 0 or 1 renders in this one.
        progress: show a bar.

    Raises:
        ValueError: for an unknown name or a negative count.
    """
    if isinstance(name, str):
        if name not in PRESETS:
            raise ValueError(f"unknown demo set {name!r}, expected one of {', '.join(PRESETS)}")
        name = PRESETS[name]
    preset = replace(
        name,
        train=name.train if clips is None else clips,
        test=name.test if test_clips is None else test_clips,
    )
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    folder = cache_folder(preset, seed, root)
    build_folder(preset, seed, folder, min(workers, preset.train + preset.test), progress)
    return DemoSet(folder, preset, seed)
