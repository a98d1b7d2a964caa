"""Which clips a run trains on and which it is judged by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from avfast.data.manifest import Clip, ClipList, merge, read_folder, read_manifest
from avfast.train import parallel
from avfast.train.config import Config, SettingError


def sources(config: Config) -> tuple[ClipList, ClipList]:
    """Training and held-out clips. Demo clips are made by rank 0 while the others wait."""
    if not config.data:
        if config.eval_data or config.class_csv:
            raise SettingError("--eval_data and --class_csv go with --data; the demo clips bring their own")

        def build() -> tuple[str, str, str]:
            from avfast.data.demo import build

            made = build(config.demo_set, clips=config.demo_clips)
            return str(made.train), str(made.test), str(made.class_csv)

        train_json, test_json, class_csv = parallel.first_only(build)
        return read_manifest(train_json, class_csv), read_manifest(test_json, class_csv)
    train = read(config.data, config.class_csv, config.weights_csv)
    if not config.eval_data:
        return split(train, config.eval_fraction)
    # merged, so that a class has the same number on both sides
    both = merge([train, read(config.eval_data, config.class_csv)])
    return replace(both, clips=both.clips[: len(train)]), replace(both, clips=both.clips[len(train) :])


def read(paths: Sequence[str], class_csv: str | None = None, weights_csv: Sequence[str] = ()) -> ClipList:
    """One list of the clips of several folders and manifests; classes are united by name."""
    manifests = [path for path in paths if not Path(path).is_dir()]
    for path in manifests:
        if not Path(path).exists():
            raise SettingError(f"--data {path}: no such folder or manifest")
    if class_csv and not manifests:
        raise SettingError(f"--class_csv {class_csv} goes with a manifest; the classes of a folder are its sub-folders")
    if weights_csv and len(weights_csv) != len(manifests):
        raise SettingError(f"--weights_csv: expected {len(manifests)}, one CSV per manifest, got {len(weights_csv)}")
    weights: dict[str, str | None] = dict.fromkeys(manifests) | dict(zip(manifests, weights_csv, strict=False))
    return merge([read_manifest(p, class_csv, weights[p]) if p in weights else read_folder(p) for p in paths])


def share(clip_id: str) -> float:
    """A number in [0, 1) that depends on the clip's id only."""
    return int.from_bytes(hashlib.sha256(clip_id.encode()).digest()[:6], "big") / 2**48


def split(clips: ClipList, fraction: float) -> tuple[ClipList, ClipList]:
    """Training and held-out clips by a hash of the id, so that a clip keeps its side when others are added."""
    out = [clip for clip in clips.clips if share(clip.id) < fraction]
    kept = [clip for clip in clips.clips if share(clip.id) >= fraction]
    return replace(clips, clips=tuple(kept)), replace(clips, clips=tuple(out))


def first(clips: ClipList, limit: int | None) -> ClipList:
    """At most ``limit`` clips, those of smallest hash, in their order."""
    if limit is None or len(clips) <= limit:
        return clips
    chosen = set(sorted(range(len(clips)), key=lambda i: share(clips.clips[i].id))[:limit])
    return replace(clips, clips=tuple(c for i, c in enumerate(clips.clips) if i in chosen))


def shuffled(clips: ClipList, seed: int) -> ClipList:
    """Every sound with the picture of another clip: a random cycle through all clips, fixed by the seed.

    A control for pre-training: what is learned from such pairs cannot come from the correspondence.
    """
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(clips))
    partner = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    return replace(clips, clips=tuple(_pair(clips.clips, i, partner[i]) for i in range(len(clips))))


def _pair(clips: Sequence[Clip], sound: int, picture: int) -> Clip:
    # the id goes with the picture: extracted frames are found by it
    return replace(clips[picture], audio_path=clips[sound].audio_path, labels=clips[sound].labels)
