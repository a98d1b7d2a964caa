import numpy as np
import pytest
import torch

from avfast.tasks.features import KINDS, pooled
from avfast.tasks.probe import average_precision, linear_probe
from avfast.tasks.retrieval import chance, ranks, recall, retrieval


def by_hand(queries, gallery, groups=None):
    """Ranks by a double loop, in numpy."""
    q, g = (x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (queries, gallery))
    found = []
    for i in range(len(q)):
        others = [j for j in range(len(g)) if j != i and (groups is None or groups[i] == groups[j])]
        found.append(1 + sum(float(q[i] @ g[j]) >= float(q[i] @ g[i]) for j in others))
    return found


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_ranks_equal_a_double_loop(chunk):
    torch.manual_seed(0)
    audio, visual = torch.randn(23, 5), torch.randn(23, 5)
    groups = torch.randint(0, 4, (23,))
    assert ranks(audio, visual, chunk=chunk).tolist() == by_hand(audio, visual)
    assert ranks(audio, visual, groups, chunk=chunk).tolist() == by_hand(audio, visual, groups)


def test_recall_of_known_ranks():
    # similarities fall with the distance in angle, so that the partner's rank can be read off
    angles = torch.tensor([0.0, 0.3, 1.0, 1.5])
    audio = torch.stack([angles.cos(), angles.sin()], 1)
    moved = angles + torch.tensor([0.0, 0.4, 0.0, -1.3])
    visual = torch.stack([moved.cos(), moved.sin()], 1)
    assert ranks(audio, visual).tolist() == by_hand(audio, visual)
    scores = recall(audio, visual, ks=(1, 2))
    assert scores["R@1"] == np.mean([r <= 1 for r in by_hand(audio, visual)])
    assert scores["MdR"] == np.median(by_hand(audio, visual))


def test_ties_count_against_the_query():
    same = torch.ones(50, 8) / 3
    assert recall(same, same) == {"R@1": 0.0, "R@5": 0.0, "R@10": 0.0, "MdR": 50.0}
    twice = torch.eye(4).repeat(2, 1)
    assert ranks(twice, twice).tolist() == [2] * 8


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        recall(torch.full((4, 2), torch.nan), torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"\(4, 2\), \(5, 2\)"):
        recall(torch.ones(4, 2), torch.ones(5, 2))


def test_chance_is_what_random_features_reach():
    torch.manual_seed(1)
    groups = torch.arange(200) % 5
    groups[0] = 77  # alone in its group: not a query
    for given in (None, groups):
        runs = [recall(torch.randn(200, 16), torch.randn(200, 16), given) for _ in range(30)]
        for name, value in chance(200, given).items():
            assert np.mean([run[name] for run in runs]) == pytest.approx(value, rel=0.3), name


def test_retrieval_has_both_directions():
    torch.manual_seed(0)
    audio = torch.randn(30, 8)
    found = retrieval(audio, 3 * audio)
    assert found["gallery"] == 30
    assert found["audio_to_visual"] == found["visual_to_audio"] == {"R@1": 1.0, "R@5": 1.0, "R@10": 1.0, "MdR": 1.0}
    assert found["chance"]["R@5"] == pytest.approx(5 / 30)


def clusters(n, classes=4, spread=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.eye(classes, 6) * 2 + 5
    return centres[labels] + spread * torch.randn(n, 6, generator=generator), torch.eye(classes)[labels]


def test_probe_separates_clusters_and_not_noise():
    x, y = clusters(120)
    test_x, test_y = clusters(60, seed=1)
    found = linear_probe(x, y, test_x, test_y)
    assert found["accuracy"] > 0.95 and found["chance"] == 0.25
    noise = linear_probe(torch.randn(120, 6), y, torch.randn(400, 6), clusters(400)[1])
    assert noise["accuracy"] < 0.4
    assert linear_probe(x * 0 + 1, y, test_x * 0 + 1, test_y)["accuracy"] == pytest.approx(0.25)  # constant features


def test_probe_of_several_labels_is_mean_average_precision():
    x, y = clusters(120)
    y = torch.cat([y, y[:, :2].sum(1, keepdim=True), torch.zeros(120, 1)], 1)  # a class that never occurs is left out
    test_x, test_y = clusters(60, seed=1)
    test_y = torch.cat([test_y, test_y[:, :2].sum(1, keepdim=True), torch.zeros(60, 1)], 1)
    found = linear_probe(x, y, test_x, test_y)
    assert found["mAP"] > 0.95 and found["chance"] == pytest.approx(0.3)
    with pytest.raises(ValueError, match="needs clips"):
        linear_probe(x[:0], y[:0], test_x, test_y)


def test_average_precision_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(0)
    for scores in (torch.randn(50), torch.randint(0, 5, (50,)).float()):  # the second has ties
        positive = torch.rand(50) < 0.3
        expected = metrics.average_precision_score(positive.numpy(), scores.numpy())
        assert average_precision(scores, positive) == pytest.approx(expected, abs=1e-12)


def test_pooled_features_read_what_a_clip_has():
    from avfast import create_model
    from avfast.data.clips import Failure, Sample, collate

    model = create_model("avsiam_tiny", embed_dim=32, depth=1, decoder_depth=0)
    has = {7: (True, True), 2: (True, False), 5: (False, True), 4: (True, True)}
    samples = {
        index: Sample(
            index, 0, place, torch.randn(16000) if sound else None,
            torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8) if pictures else None, (place,), False,
        )
        for place, (index, (sound, pictures)) in enumerate(has.items())
    }  # fmt: skip
    broken = Failure("x.mp4", "broken", index=9)
    batches = [[samples[7], samples[2]], [broken], [samples[5], samples[4]]]
    loader = [collate(batch, spec=model.frontend.spec, num_classes=4) for batch in batches]
    found = pooled(model, loader, "cpu")
    assert found.index.tolist() == [2, 4, 5, 7] and found.failures == [broken] and model.training
    assert found.labels.argmax(1).tolist() == [1, 3, 2, 0]
    assert found.have("audio", "visual").tolist() == [False, True, False, True] and not found.have("other").any()
    model.eval()
    for row, index in enumerate(found.index.tolist()):
        sample, (sound, pictures) = samples[index], has[index]
        audio = model.frontend.audio(sample.waveform[None]) if sound else None
        visual = model.frontend.visual(sample.frames[None]) if pictures else None
        with torch.no_grad():
            features = model.encode(audio, visual)
        for kind in KINDS:
            tokens = getattr(features, kind)
            assert found.present[kind][row] == (tokens is not None)
            want = torch.zeros(32) if tokens is None else tokens[0].mean(0)
            torch.testing.assert_close(found.features[kind][row], want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no clip could be read"):
        pooled(model, [collate([broken], spec=model.frontend.spec)], "cpu")


def test_a_diverged_model_gives_no_figure():
    features, labels = torch.randn(8, 3), torch.eye(2).repeat(4, 1)
    broken = features.index_fill(0, torch.tensor([5]), torch.nan)
    for pair, words in (((broken, features), "train_features"), ((features, broken), "test_features")):
        with pytest.raises(ValueError, match=f"{words} hold values that are not finite"):
            linear_probe(pair[0], labels, pair[1], labels)
