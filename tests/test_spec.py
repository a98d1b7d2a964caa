"""Which frames of a clip a model gets: their times, to the frame, and their shape."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from media_files import RATE, grey, shown, write

from avfast.data.clip_list import Clip, ClipList
from avfast.data.clips import StepBatches, eval_loader, make_loader
from avfast.data.dataset import ClipDataset
from avfast.data.frontend import KaldiFrontend
from avfast.data.spec import ClipSpec, Frames, clips, even, one, video

SPEC = ClipSpec(1.2, 16000, 32)
PICTURES = 20  # in 2 s


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> ClipList:
    """Twenty numbered pictures in two seconds, in two containers; and one that ends after seven of them."""
    root = tmp_path_factory.mktemp("films")
    for name, count in (("long.mp4", PICTURES), ("long.mkv", PICTURES), ("short.mp4", 7)):
        write(root / name, pictures=grey(count), seconds=count / RATE)
    return ClipList(tuple(Clip(path.name, str(path), str(path)) for path in sorted(root.iterdir())))


@pytest.mark.parametrize(
    ("frames", "long", "short"),
    [
        (one, [6], [3]),
        (even(4), [1, 4, 7, 10], [0, 2, 4, 6]),
        # 0.8 s in the middle of 1.2: 0.25, 0.35 ... 0.95 s, and 0.05 ... 0.65 s of a clip of 0.7 s, whose end stays
        (video(8, 0.8), [2, 3, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 4, 5, 6, 6]),
        (video(4, 1.2), [1, 4, 7, 10], [1, 4, 6, 6]),
        (clips(2, 4), [0, 2, 3, 5, 6, 8, 9, 11], [0, 2, 3, 5, 6, 6, 6, 6]),
    ],
    ids=["one", "even", "video", "slow video", "clips"],
)
@pytest.mark.parametrize("cache", [False, True])
def test_evaluation_takes_the_frames_shown_at_their_times(
    films: ClipList, frames: Frames, long: list[int], short: list[int], cache: bool
) -> None:
    dataset = ClipDataset(films, frontend=replace(SPEC, frames=frames), train=False, cache=cache)
    (batch,) = eval_loader(dataset, 3)
    assert batch.frames.shape == (3, frames.count, 3, 32, 32) and batch.frames.dtype == torch.uint8
    slack = 1 if cache else 0  # a cache holds 16 of the 20
    for row, clip in enumerate(films.clips):
        wanted = short if clip.id == "short.mp4" else long
        assert np.abs(np.subtract(shown(batch.frames[row]), wanted)).max() <= slack, clip.id


@pytest.mark.parametrize("frames", [even(3), video(4, 0.4), clips(2, 3)], ids=["even", "video", "clips"])
def test_training_takes_them_from_anywhere(films: ClipList, frames: Frames) -> None:
    dataset = ClipDataset(films.take([1]), frontend=replace(SPEC, frames=frames), train=True, crop_scale=(1.0, 1.0))
    rows = [shown(dataset[0, step, 0].frames) for step in range(60)]
    assert rows[7] == shown(dataset[0, 7, 0].frames)
    gaps = np.diff(rows, axis=1)
    assert (gaps >= 0).all() and {first for first, *_ in rows} >= set(range(1, 8))
    distance = {"even": 0.4, "video": 0.1, "clips": 0.2}[frames.kind] * RATE
    within = distance if frames.kind == "even" else 0  # each anywhere in its part; the others keep their distance
    assert np.abs(gaps - distance).max() <= within + 1 and abs(np.mean(gaps) - distance) < 0.3


def test_one_frame_draws_as_it_always_did() -> None:
    draw, rng = SPEC.draw(np.random.default_rng(5)), np.random.default_rng(5)
    start, place = rng.random() * (2.0 - 1.2), rng.random()
    assert SPEC.window(2.0, draw) == (start, [start + 1.2 * place])


def test_a_front_end_shapes_them_for_its_model(films: ClipList) -> None:
    class Front(KaldiFrontend):
        pass

    still = KaldiFrontend(num_frames=100, image_size=8)
    frames = torch.arange(2 * 6, dtype=torch.uint8).view(2, 6, 1, 1, 1).expand(2, 6, 3, 8, 8)
    for choice, shape, place in (
        (even(6), (2, 6, 3, 8, 8), lambda x, i: x[:, i]),
        (video(6, 0.5), (2, 3, 6, 8, 8), lambda x, i: x[:, :, i]),
        (clips(2, 3), (2, 2, 3, 3, 8, 8), lambda x, i: x[:, i // 3, :, i % 3]),
    ):
        Front.frames = choice
        front = Front(num_frames=100, image_size=8)
        visual = front.visual(frames)
        assert visual.shape == shape and visual.is_contiguous() and front.spec == ClipSpec(1.015, 16000, 8, choice)
        for i in range(6):
            assert torch.equal(place(visual, i), still.visual(frames[:, i]))
    Front.frames = video(4, 0.5)
    front = Front(num_frames=100, image_size=32)
    dataset = ClipDataset(films, frontend=front, train=True)
    (batch,) = make_loader(dataset, StepBatches(3, 3, steps=1))
    inputs = front(batch, train=True, key=batch.key(0))
    assert {name: x.shape for name, x in inputs.items()} == {"audio": (3, 100, 128), "visual": (3, 3, 4, 32, 32)}
    assert front.load(films.clips[0].path)["visual"].shape == (1, 3, 4, 32, 32)


@pytest.mark.parametrize("cache", [False, True])
def test_a_model_that_only_listens_opens_no_pictures(films: ClipList, cache: bool) -> None:
    class Listening(KaldiFrontend):
        frames = None

    heard = ClipList((Clip("x", films.clips[0].audio_path, "/no/such.mp4"),))
    front = Listening(num_frames=64, image_size=32)
    (batch,) = eval_loader(ClipDataset(heard, frontend=front, train=False, cache=cache), 1)
    assert batch.has_audio.all() and not batch.has_visual.any() and batch.frames.shape == (1, 0, 3, 32, 32)
    silent = ClipList((Clip("x", None, films.clips[0].path),))
    failure = ClipDataset(silent, frontend=front, train=False, cache=cache)[0, 0, 0]
    assert (failure.path, failure.reason) == (films.clips[0].path, "holds no audio")
    assert list(front(batch)) == ["audio"] and list(front.load(films.clips[0].path)) == ["audio"]


def test_what_cannot_be_is_refused() -> None:
    for make, message in (
        (lambda: even(0), "even: expected at least 1 frame, got 0"),
        (lambda: clips(3, 0), "clips: expected at least 1 frame, got 3 x 0"),
        (lambda: video(8, 0.0), "more than 0 seconds"),
        (lambda: replace(SPEC, frames=video(8, 4.0)), "4.0 s does not fit a window of 1.200 s"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
