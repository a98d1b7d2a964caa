"""AVBERT's choices and objectives against their definitions."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from avfast.models import avbert_losses as losses
from avfast.models.avbert_draws import Sampling, derangement
from avfast.random import DrawKey

T = 5
STRATEGIES = ("similar", "dissimilar", "current_sequence", "current_minibatch")
DEFAULTS = {
    "num_clips": T, "mask_ratio": 0.3, "masks": "pool", "negatives": "similar", "num_negatives": 3, "pool_size": None,
    "cross_rank": False, "cpp_positions": 2,
}  # fmt: skip


def sampling(**settings):
    return Sampling(**DEFAULTS | settings)


def chance_of(counts, expected=None):
    """The p-value of counts by Pearson's test; equally many are expected by default."""
    counts = np.asarray(counts, dtype=float)
    expected = np.full(len(counts), counts.mean()) if expected is None else np.asarray(expected)
    statistic = ((counts - expected) ** 2 / expected).sum()
    half = torch.tensor([(len(counts) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


def key(positions, total=None, step=1, seed=3):
    return DrawKey(seed, step, positions, total or max(positions) + 1)


# Negatives.


def brute_force(x, video, clip, members, strategy):
    """The weight of each clip of a modality as a negative of one clip, told clip by clip."""
    near = {(v, t): np.linalg.norm(x[v, t] - x[video, clip]) for v in members for t in range(x.shape[1])}
    del near[video, clip]
    found = np.zeros(x.shape[:2])
    if strategy.startswith("current"):
        for v, t in near:
            found[v, t] = strategy == "current_minibatch" or v == video
        return found
    far = np.array(list(near.values()))
    low, high = np.percentile(far, 2.5, method="lower"), np.percentile(far, 97.5, method="higher")
    for place, d in near.items():
        if low <= d <= high:
            scaled = (d - far.min()) / (far.max() - far.min())
            found[place] = 1 - scaled if strategy == "similar" else scaled
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("pool_size", [None, 3, 6])  # of 83, 20 and 41 candidates 2, 0 and 1 are dropped on each side
def test_weights_of_negatives_equal_a_brute_force_reference(strategy, pool_size):
    videos, clips = 12, 7
    x = torch.randn(videos, clips, 6, dtype=torch.float64)
    draws = sampling(num_clips=clips, negatives=strategy, pool_size=pool_size).draw(videos, key=key(range(videos)))
    allowed = losses.candidates(draws.places, draws.places, draws.masked, clips, strategy)
    weight = allowed.double()
    if draws.noise is not None:
        positives = x.take_along_dim(draws.masked[..., None], 1)
        weight = losses.sampling_weights(positives, x.flatten(0, 1), allowed, strategy)
    assert (draws.noise is None) == strategy.startswith("current")
    size = pool_size or videos
    for video in range(videos):
        first = video - video % size
        for m, clip in enumerate(draws.masked[video].tolist()):
            want = brute_force(x.numpy(), video, clip, range(first, min(first + size, videos)), strategy)
            assert_close("weights", weight[video, m], torch.from_numpy(want.ravel()), 1e-12)


def likelihoods(weight, count):
    """How likely each set of so many is drawn one after another."""
    found = {}
    for chosen in combinations(np.flatnonzero(weight), count):
        ways = []
        for order in permutations(chosen):
            left, way = weight.sum(), 1.0
            for i in order:
                way, left = way * weight[i] / left, left - weight[i]
            ways.append(way)
        found[chosen] = sum(ways)
    return found


@pytest.fixture(scope="module")
def noise():
    """Of 10^5 draws from eight clips: of as many samples."""
    setting = sampling(num_clips=4, pool_size=2, masks="video", cpp_positions=None)
    return setting.draw(100_000, key=key(range(100_000))).noise[:, 0, 0]


@pytest.mark.parametrize("strategy", STRATEGIES[:2])
@pytest.mark.parametrize("count", [1, 2])
def test_negatives_are_drawn_as_likely_as_their_weights_say(strategy, count, noise):
    draws, x = len(noise), torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(5))
    weight = torch.from_numpy(brute_force(x.numpy(), 0, 1, (0, 1), strategy).ravel())
    chosen = losses.choose(weight.float().expand(draws, -1), noise, count)
    assert (chosen.sum(1) == count).all()
    want = likelihoods(weight.numpy(), count)
    assert len(want) > 4 and abs(sum(want.values()) - 1) < 1e-12
    seen = torch.stack([chosen[:, list(some)].all(1).sum() for some in want])
    assert chance_of(seen.numpy(), draws * np.array(list(want.values()))) > 1e-3
    assert chance_of(seen.numpy(), np.full(len(seen), draws / len(seen))) < 1e-6, "the weights are seen"


@pytest.mark.parametrize("strategy", STRATEGIES[2:])
def test_the_other_strategies_take_every_candidate(strategy):
    x = torch.randn(3, T, 4)
    draws = sampling(negatives=strategy).draw(3, key=key(range(3)))
    drawn = losses.draw_negatives(x, draws.places, draws.masked, None, strategy, 1)
    count = T - 1 if strategy == "current_sequence" else 3 * T - 1
    assert (drawn.chosen.sum(-1) == count).all() and not drawn.chosen.gather(-1, drawn.own[..., None]).any()
    videos = drawn.chosen.unflatten(-1, (3, T)).any(-1)
    assert torch.equal(videos[:, 0], torch.eye(3) > 0 if strategy == "current_sequence" else torch.ones(3, 3) > 0)


def test_equal_distances_few_candidates_and_none():
    setting = sampling(num_clips=2, mask_ratio=0.5, num_negatives=64)
    for strategy in STRATEGIES[:2]:
        draws = setting.draw(2, key=key(range(2)))
        same = losses.draw_negatives(torch.zeros(2, 2, 3), draws.places, draws.masked, draws.noise[:, 0], strategy, 64)
        assert (same.chosen.sum(-1) == 3).all(), "equally far: all are equally likely"
        one = losses.draw_negatives(torch.randn(1, 2, 3), *(x[:1] for x in (draws.places, draws.masked)),
                                    draws.noise[:1, 0], strategy, 64)  # fmt: skip
        assert one.chosen.sum() == 1
    weight = losses.sampling_weights(torch.zeros(1, 3), torch.randn(4, 3), torch.zeros(1, 4) > 0, "similar")
    assert not weight.any() and not losses.choose(weight, torch.randn(1, 4), 2).any()


def test_distances_have_no_gradient_and_keep_float32_under_autocast():
    x = torch.randn(3, T, 64, requires_grad=True)
    draws = sampling().draw(3, key=key(range(3)))
    places = draws.places, draws.masked, draws.noise[:, 0]
    want = losses.draw_negatives(x, *places, "similar", 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses.draw_negatives(x, *places, "similar", 3).chosen, want.chosen)
        weight = losses.sampling_weights(x[:, :2], x.flatten(0, 1), want.chosen, "similar")
    assert weight.dtype == torch.float32 and not weight.requires_grad and want.clips.requires_grad


# The losses.


def test_infonce_equals_its_definition():
    torch.manual_seed(1)
    head, outputs, clips = losses.PredictionHead(6, 7, 5).double(), torch.randn(2, 2, 6).double(), torch.randn(8, 6)
    clips = clips.double()
    own, chosen = torch.tensor([[1, 3], [4, 7]]), torch.rand(2, 2, 8) < 0.5
    chosen.scatter_(-1, own[..., None], False)
    chosen[1, 1] = False  # none to be told from
    found = head(outputs, clips, own, chosen)
    total, hits = 0.0, 0
    for i in range(2):
        for m in range(2):
            guess = head.fc2(F.gelu(head.fc1(outputs[i, m])))
            scores = [torch.exp(guess @ head.target(clip)) for clip in clips]
            others = [scores[j] for j in chosen[i, m].nonzero()[:, 0]]
            total -= torch.log(scores[own[i, m]] / (scores[own[i, m]] + sum(others)))
            hits += all(scores[own[i, m]] >= s for s in others)
    assert_close("loss", found.loss, total, 1e-12)
    assert found.total == 4 and found.hits == hits and 0 < hits < 4
    loss, accuracy = losses.means({"mep": found})["mep"]
    assert_close("mean", loss, total / 4, 1e-12)
    assert accuracy == hits / 4


def test_pair_prediction_equals_its_definition():
    torch.manual_seed(1)
    head = losses.PairClassifier(6, 2).double()
    matched, deranged = (tuple(torch.randn(3, 3, 6).double() for _ in range(2)) for _ in range(2))
    found = head(matched, deranged)
    total, hits = 0.0, 0.0
    for (visual, audio), truth in ((matched, 1.0), (deranged, 0.0)):
        for v, a in zip(visual, audio, strict=True):
            p = torch.sigmoid(head.layers(torch.cat([v, a], -1))[:, 0])
            entropy = F.binary_cross_entropy(p, torch.full_like(p, truth), reduction="none")
            total += entropy[0] + entropy[1:].mean()
            hits += ((p > 0.5) == bool(truth)).double().mean()
    assert_close("loss", found.loss, total, 1e-12)
    assert_close("hits", found.hits, hits, 1e-12)
    assert found.total == 6
    alone = head(*((v[:, :1], a[:, :1]) for v, a in (matched, deranged)))
    assert alone.loss < found.loss and torch.isfinite(alone.loss)


def test_nothing_to_predict_is_no_loss():
    head, none = losses.PredictionHead(4, 4, 4), torch.zeros(0, 2, dtype=torch.int64)
    for clips in (0, 6):
        found = head(torch.zeros(0, 2, 4), torch.zeros(clips, 4), none, torch.zeros(0, 2, clips) > 0)
        loss, accuracy = losses.means({"mep": found})["mep"]
        loss.backward()
        assert loss == 0 == accuracy and all(p.grad is not None for p in head.parameters())
    pair = losses.PairClassifier(4, 2)
    empty = torch.zeros(0, 3, 4), torch.zeros(0, 3, 4)
    loss, _ = losses.means({"cpp": pair(empty, empty)})["cpp"]
    loss.backward()
    assert loss == 0 and all(p.grad is not None for p in pair.parameters())


# The draws.


@given(st.integers(2, 9), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_every_derangement_moves_everything(count, seed):
    order = derangement(count, np.random.default_rng(seed))
    assert sorted(order) == list(range(count)) and all(i != j for i, j in enumerate(order))


def test_derangements_are_equally_likely():
    generator = np.random.default_rng(2)
    seen = [tuple(derangement(4, generator)) for _ in range(9000)]
    found, counts = np.unique(seen, axis=0, return_counts=True)
    assert len(found) == 9 and chance_of(counts) > 1e-3
    with pytest.raises(ValueError, match="1 cannot be deranged"):
        derangement(1, generator)


presence = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=9)


@given(presence, st.sampled_from([None, 2, 3]), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_partners_are_other_videos_of_the_pool_that_have_both(has, pool_size, step):
    audio, visual = zip(*has, strict=True)
    setting, batch = sampling(pool_size=pool_size), len(has)
    draws = setting.draw(batch, key=key(range(batch), step=step), has_audio=audio, has_visual=visual)
    both = [i for i in range(batch) if all(has[i])]
    sides = [list(range(batch)) if rows is None else rows.tolist() for rows in (draws.visual_rows, draws.audio_rows)]
    if draws.pairs is None:
        assert len(both) == batch
    else:
        assert [[side[i] for i in some] for side, some in zip(sides, draws.pairs.tolist(), strict=True)] == [both] * 2
    matched = range(len(both)) if draws.matched is None else draws.matched.tolist()
    pool = [row // pool_size if pool_size else 0 for row in both]
    assert sorted(matched) == sorted(draws.partner.tolist()) and draws.positions.shape == (len(matched), 2)
    assert [i for i in range(len(both)) if pool.count(pool[i]) > 1] == list(matched)
    for i, j in zip(matched, draws.partner.tolist(), strict=True):
        assert i != j and pool[i] == pool[j]


@pytest.mark.parametrize("masks", ["pool", "video"])
@pytest.mark.parametrize("cross_rank", [False, True])
def test_draws_of_fixed_pools_do_not_depend_on_the_split(masks, cross_rank):
    setting = sampling(pool_size=2, masks=masks, cross_rank=cross_rank)
    whole = setting.draw(6, key=key(range(6)))
    parts = [setting.draw(len(rows), key=key(rows, 6)) for rows in (range(4), range(4, 6))]
    for name in ("masked", "places", "noise", "positions"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name
    assert torch.equal(whole.partner, torch.cat([parts[0].partner, 4 + parts[1].partner]))
    alike = [torch.equal(whole.masked[i], whole.masked[i + 1]) for i in range(0, 6, 2)]
    assert all(alike) == (masks == "pool") and len({*map(tuple, whole.masked.tolist())}) > 1


def test_masks_are_of_so_many_clips_at_random():
    setting = sampling(num_clips=8, mask_ratio=0.15, masks="video", pool_size=2)
    masked = setting.draw(4000, key=key(range(4000))).masked
    assert masked.shape == (4000, 1) and chance_of(masked.flatten().bincount().numpy()) > 1e-3
    assert sampling(num_clips=30, mask_ratio=0.15).num_masked == 5 and sampling(mask_ratio=0.01).num_masked == 1


def test_what_is_given_is_not_drawn():
    setting = sampling()
    given = {"masked": torch.tensor([[3, 1], [0, 4], [2, 3]]), "partner": [1, 0, 2],
             "positions": torch.tensor([[0, 4], [1, 2], [2, 3]]), "noise": torch.randn(3, 2, 2, 15)}  # fmt: skip
    draws = setting.draw(3, **given)
    assert draws.masked.tolist() == [[1, 3], [0, 4], [2, 3]] and torch.equal(draws.noise, given["noise"])
    assert draws.matched.tolist() == [0, 1] and draws.partner.tolist() == [1, 0]
    assert draws.positions.tolist() == [[0, 4], [1, 2]]
    for wrong, reason in (
        ({"masked": torch.tensor([[1, 1]] * 3)}, "masked must be distinct clips 0 .. 4"),
        ({"masked": torch.zeros(3, 1)}, r"masked must be \(3, 2\)"),
        ({"partner": [1, 2, 1]}, "each once"),
        ({"partner": [1, 0]}, "partner must name one video for each of 3"),
        ({"partner": [1, 0, 2], "has_audio": [True, False, True]}, "that have both modalities"),
        ({"noise": torch.zeros(3, 2, 2, 5)}, r"noise must be \(3, 2, 2, 15\)"),
        ({"only": "audio"}, "only must be joint"),
        ({"key": key(range(2))}, "the key names 2 positions for a batch of 3"),
    ):
        with pytest.raises(ValueError, match=reason):
            setting.draw(3, **wrong)
    with pytest.raises(ValueError, match="are of cpp=True"):
        sampling(cpp_positions=None).draw(3, partner=[1, 0, 2])
    with pytest.raises(ValueError, match="noise is of negatives"):
        sampling(negatives="current_sequence").draw(3, noise=given["noise"])


def test_a_batch_of_one_has_no_pairs():
    with pytest.raises(ValueError, match="there is 1 .a larger batch, or cpp=False"):
        sampling().draw(1)
    assert not len(sampling().draw(1, training=False).partner)
    assert not len(sampling().draw(1, key=key([2], 4)).partner), "another one could not be read"
    assert not len(sampling().draw(1, has_audio=[False], has_visual=[False]).partner)
    assert sampling(cpp_positions=None).draw(1).partner is None


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"masks": "clip"}, "masks must be one of pool, video"),
        ({"negatives": "hard"}, "negatives must be one of similar"),
        ({"num_clips": 1}, "num_clips must be at least 2"),
        ({"mask_ratio": 0.9}, "leave one of 5 clips"),
        ({"num_negatives": 0}, "num_negatives must be"),
        ({"cpp_positions": 6}, "cpp_positions must be 0 .. 5"),
        ({"pool_size": 1}, "with cpp at least 2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, reason):
    with pytest.raises(ValueError, match=reason):
        sampling(**wrong)
