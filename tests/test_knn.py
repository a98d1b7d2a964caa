import numpy as np
import pytest
import torch

from avfast.tasks.knn import knn
from avfast.tasks.probe import average_precision


def by_hand(similarity):
    """The most similar other clip, by a loop."""
    return [max((j for j in range(len(row)) if j != i), key=lambda j: row[j]) for i, row in enumerate(similarity)]


def cosines(x):
    x = x.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x @ x.T


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_accuracy_equals_a_loop(chunk):
    torch.manual_seed(0)
    features = {"audio": torch.randn(23, 5), "visual": torch.randn(23, 3), "fused": torch.randn(23, 8)}
    classes = torch.randint(0, 4, (23,))
    found = knn(features, torch.eye(5)[classes], chunk=chunk)
    similarities = {name: cosines(x) for name, x in features.items()}
    similarities["sum"] = sum(similarities.values())
    for name, similarity in similarities.items():
        right = [bool(classes[j] == classes[i]) for i, j in enumerate(by_hand(similarity))]
        assert found[name] == pytest.approx(np.mean(right)), name
    pairs = [classes[i] == classes[j] for i in range(23) for j in range(23) if i != j]
    assert found["chance"] == pytest.approx(np.mean(pairs)) and found["score"] == "accuracy"


def test_clusters_are_found_and_a_clip_is_not_its_own_neighbour():
    labels = torch.eye(4).repeat(10, 1)
    x = labels @ torch.randn(4, 16) + 0.01 * torch.randn(40, 16)
    assert knn({"x": x}, labels) == {
        "score": "accuracy",
        "chance": pytest.approx(9 / 39),
        "x": 1.0,
    }
    alone = knn({"x": torch.randn(6, 3)}, torch.eye(6))  # its neighbour always has another class
    assert alone["x"] == 0


def test_several_labels_are_mean_average_precision():
    torch.manual_seed(0)
    x = torch.randn(30, 4)
    labels = (torch.rand(30, 5) < 0.4).float()
    labels[:, 3] = 0  # a class that never occurs is left out
    found = knn({"x": x}, labels)
    similarity = cosines(x)
    neighbours = by_hand(similarity)
    scores = torch.stack([labels[j] * (1 + similarity[i, j]) for i, j in enumerate(neighbours)])
    expected = np.mean([average_precision(scores[:, c], labels[:, c]) for c in (0, 1, 2, 4)])
    assert found["score"] == "mAP" and found["x"] == pytest.approx(expected)
    assert found["chance"] == pytest.approx(labels[:, [0, 1, 2, 4]].mean().item())


def test_what_has_no_neighbour_is_refused():
    with pytest.raises(ValueError, match="at least 2 clips, got 1"):
        knn({"x": torch.ones(1, 2)}, torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"x: expected \(3, D\), got \(2, 2\)"):
        knn({"x": torch.ones(2, 2)}, torch.ones(3, 1))
    with pytest.raises(ValueError, match="x hold values that are not finite"):
        knn({"x": torch.full((2, 2), torch.nan)}, torch.ones(2, 1))
    with pytest.raises(ValueError, match="no clip has a class"):
        knn({"x": torch.ones(2, 2)}, torch.zeros(2, 3))
