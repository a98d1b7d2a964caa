"""Which clips a run trains on and which it is judged by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from avfast.data.clip_list import Clip, ClipList, PackedClips, ShardRow, merge
from avfast.data.csv_lists import MediaFiles
from avfast.data.dataset import Modalities
from avfast.data.manifest import is_manifest, read_all, read_manifest
from avfast.data.remote import RemoteSet
from avfast.data.shard_cache import Cache
from avfast.train import parallel
from avfast.train.config import Config, SettingError


def sources(config: Config) -> tuple[ClipList, ClipList]:
    """Training and held-out clips. Demo clips are made by rank 0 while the others wait."""
    if config.class_csv and not any(map(is_manifest, config.data + config.eval_data)):
        raise SettingError(
            f"--class_csv {config.class_csv} goes with a manifest; demo clips have their classes, and the classes of a "
            "folder are its sub-folders"
        )
    try:
        media = MediaFiles(config.media) if config.media else None
    except ValueError as error:
        raise SettingError(f"--{error}") from None
    found = _sources(config, media)
    if media is not None and not media.asked:
        raise SettingError(f"--media {' '.join(config.media)} goes with AudioSet's or VGGSound's CSV")
    return found


def _sources(config: Config, media: MediaFiles | None) -> tuple[ClipList, ClipList]:
    if config.data_weights and not config.data:
        raise SettingError("--data_weights goes with --data")
    listed = partial(read, media=media, cache=cache(config))
    if config.data:
        train = listed(config.data, config.class_csv, config.weights_csv, data_weights=config.data_weights)
        if not config.eval_data:
            return split(train, config.eval_fraction)
    else:

        def build() -> tuple[str, str, str]:
            from avfast.demo import build

            made = build(config.demo_set, clips=config.demo_clips)
            return str(made.train), str(made.test), str(made.class_csv)

        train_json, test_json, class_csv = parallel.first_only(build)
        train = read_manifest(train_json, class_csv)
        if not config.eval_data:
            return train, read_manifest(test_json, class_csv)
    # merged, so that a class has the same number on both sides
    both = merge([train, listed(config.eval_data, config.class_csv, flag="--eval_data")])
    return both.take(range(len(train))), both.take(range(len(train), len(both)))


def read(
    paths: Sequence[str],
    class_csv: str | None = None,
    weights_csv: Sequence[str] = (),
    *,
    data_weights: Sequence[float] = (),
    media: MediaFiles | None = None,
    cache: Cache | None = None,
    flag: str = "--data",
) -> ClipList:
    """:func:`avfast.data.read_all`; what is wrong with a list is wrong with the setting that names it."""
    try:
        return read_all(paths, class_csv, weights_csv, data_weights=data_weights, media=media, cache=cache, source=flag)
    except ValueError as error:
        raise SettingError(str(error)) from None


def check_pairs(found: Modalities, contrasts: bool) -> None:
    """Refuses to contrast audio and video that belong to different clips; with one of them alone a run is said."""
    if contrasts and found.audio and found.video and not found.both:
        raise SettingError(f"--data: the model contrasts audio with video, and no clip has both ({found})")


def weights(config: Config, clips: ClipList) -> np.ndarray | None:
    """(clips,) sampling weights; None where every clip has its turn in each epoch."""
    found = np.fromiter((clip.weight for clip in clips.clips), np.float64, len(clips))
    return found if config.weights_csv or config.data_weights or (found != 1).any() else None


def cache(config: Config) -> Cache:
    """Where shards of object stores are kept."""
    return Cache(config.shard_cache, config.shard_cache_gb)


def shards(config: Config, clips: ClipList) -> np.ndarray | None:
    """(clips,) the number of each clip's shard; None unless ``shuffle_shards`` is set."""
    _check_cache(config, clips)
    if config.shuffle_shards is None:
        return None
    flag = f"--shuffle_shards {config.shuffle_shards}"
    if weights(config, clips) is not None:
        raise SettingError(f"{flag}: clips with sampling weights are drawn from all shards at any time; use none")
    numbers: dict[tuple[str, int], int] = {}
    found = np.empty(len(clips), dtype=np.int64)
    for i, clip in enumerate(clips.clips):
        row = clip.video_path or clip.audio_path
        if not isinstance(row, ShardRow):
            raise SettingError(f"{flag}: {clip.path} is in no shard")
        place = (str(row.shards.folder), row.shards.shard(row.number))
        found[i] = numbers.setdefault(place, len(numbers))
    return found


def _check_cache(config: Config, clips: ClipList) -> None:
    """Refuses to read sets of object stores in an order for which the cache is too small."""
    assert isinstance(clips.clips, PackedClips)
    sizes = [size for part in clips.clips.sets if isinstance(part, RemoteSet) for size in part.sizes]
    together = config.shuffle_shards
    wanted = sum(sizes) if together is None else sum(sorted(sizes)[-2 * together :])
    if wanted > config.shard_cache_gb * 1e9:
        what = "give --shuffle_shards N" if together is None else f"two groups of --shuffle_shards {together}"
        raise SettingError(
            f"--shard_cache_gb {config.shard_cache_gb:g} is too small for {wanted / 1e9:.3g} GB of shards: {what}"
        )


def digest(clips: ClipList) -> str:
    """Which clips these are, and in which order: by id, modalities and weight, wherever their files are."""
    found = hashlib.sha256()
    for clip in clips.clips:
        video = clip.video_path is not None or clip.frames_dir is not None
        found.update(repr((clip.id, clip.audio_path is not None, video, clip.weight)).encode())
    return f"{len(clips)} clips, {found.hexdigest()[:12]}"


def share(clip_id: str) -> float:
    """A number in [0, 1) that depends on the clip's id only."""
    # file names that are no UTF-8 hold lone surrogates
    return int.from_bytes(hashlib.sha256(clip_id.encode(errors="surrogatepass")).digest()[:6], "big") / 2**48


def split(clips: ClipList, fraction: float) -> tuple[ClipList, ClipList]:
    """Training and held-out clips by a hash of the id, so that a clip keeps its side when others are added."""
    held_out = [share(clip.id) < fraction for clip in clips.clips]
    kept = clips.take(i for i, out in enumerate(held_out) if not out)
    return kept, clips.take(i for i, out in enumerate(held_out) if out)


def first(clips: ClipList, limit: int | None) -> ClipList:
    """At most ``limit`` clips, those of smallest hash, in their order."""
    if limit is None or len(clips) <= limit:
        return clips
    places = [share(clip.id) for clip in clips.clips]
    return clips.take(sorted(sorted(range(len(clips)), key=places.__getitem__)[:limit]))


def shuffled(clips: ClipList, seed: int) -> ClipList:
    """The audio of every clip with the video of another: a random cycle through all clips, fixed by the seed.

    A control for pre-training: what is learned from such pairs cannot come from the correspondence.
    """
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(clips))
    partner = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    return replace(clips, clips=PackedClips(_pair(clips.clips, i, partner[i]) for i in range(len(clips))))


def _pair(clips: Sequence[Clip], audio: int, video: int) -> Clip:
    # the id goes with the video: extracted frames are found by it
    return replace(clips[video], audio_path=clips[audio].audio_path, labels=clips[audio].labels)
