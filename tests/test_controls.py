"""What cannot come from the correspondence of sound and picture must not show in retrieval."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

import pytest

from avfast.demo import build
from avfast.train.loop import run
from avfast.train.recipes import demo

GALLERY = 128


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return build("tiny", tmp_path_factory.mktemp("controls"), clips=96, test_clips=GALLERY, workers=1, progress=False)


@pytest.mark.parametrize("changes", [{"steps": 0}, {"steps": 24, "shuffle_pairs": True}], ids=["untrained", "shuffled"])
@pytest.mark.parametrize("seeds", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_controls_stay_at_chance(changes, seeds, clips, tmp_path):
    rows = []
    for seed in range(seeds):
        config = replace(
            demo(), data=(str(clips.train),), class_csv=str(clips.class_csv), eval_data=(str(clips.test),), seed=seed,
            out=str(tmp_path / str(seed)), figures=0, probe_clips=0, batch_size=24,
            model_args={"embed_dim": 64, "depth": 2, "decoder_embed_dim": 32}, **changes,
        )  # fmt: skip
        summary = run(config)["retrieval"]
        rows += [summary["audio_to_visual"], summary["visual_to_audio"]]
    assert 0.3 * GALLERY < mean(row["MdR"] for row in rows) < 0.7 * GALLERY
    assert mean(row["R@10"] for row in rows) < 2 * 10 / GALLERY
