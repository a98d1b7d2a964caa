"""Crops of frames: the boxes drawn, and where the pixels of a crop come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avfast.data.augment import eval_crop, random_crop_box, train_crop


def test_crop_boxes() -> None:
    rng = np.random.default_rng(0)
    boxes = [random_crop_box(90, 160, rng, (0.2, 0.6)) for _ in range(500)]
    areas, aspects = zip(*[(h * w / 14400, w / h) for _, _, h, w in boxes], strict=True)
    assert all(0 <= t <= 90 - h and 0 <= x <= 160 - w for t, x, h, w in boxes)
    assert 0.19 < min(areas) < 0.22 and 0.57 < max(areas) < 0.61
    assert 0.7 < min(aspects) < 0.8 and 1.25 < max(aspects) < 1.4
    assert random_crop_box(10, 400, rng, (0.9, 1.0)) == (0, 193, 10, 13)  # none fits: the middle


def test_crops() -> None:
    ramp = torch.arange(64, dtype=torch.uint8).mul(4).expand(2, 3, 48, 64)  # brighter to the right
    flips, spans = set(), []
    for seed in range(20):
        out = train_crop(ramp, 24, np.random.default_rng(seed), scale=(0.3, 0.5))
        assert out.shape == (2, 3, 24, 24) and out.dtype == torch.uint8 and torch.equal(out[0], out[1])
        steps = out[0, 0, 12].int().diff()
        assert (steps >= 0).all() or (steps <= 0).all()
        flips.add(bool(out[0, 0, 0, 0] > out[0, 0, 0, -1]))
        spans.append(abs(int(out[0, 0, 0, 0]) - int(out[0, 0, 0, -1])) / 4)
    assert flips == {True, False} and 24 < min(spans) and max(spans) < 46
    centre = eval_crop(ramp, 24)
    assert centre.shape == (2, 3, 24, 24)
    assert centre[0, 0, 0, 0].item() / 4 == pytest.approx(8, abs=1.5)
    assert centre[0, 0, 0, -1].item() / 4 == pytest.approx(55, abs=1.5)
    assert eval_crop(torch.full((1, 3, 7, 5), 50, dtype=torch.uint8), 24).unique().tolist() == [50]


def test_many_frames_are_resized_as_one_is() -> None:
    frames = torch.randint(256, (70, 3, 24, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    crop = train_crop(frames, 16, np.random.default_rng(4))
    assert crop.shape == (70, 3, 16, 16) and eval_crop(frames, 12).shape == (70, 3, 12, 12)
    for i in (0, 31, 32, 69):
        assert torch.equal(crop[i], train_crop(frames[i : i + 1], 16, np.random.default_rng(4))[0])
        assert torch.equal(eval_crop(frames, 12)[i], eval_crop(frames[i : i + 1], 12)[0])
