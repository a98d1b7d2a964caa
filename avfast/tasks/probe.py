"""Linear probe: a logistic regression on frozen features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    l2: float = 1e-2,
    iterations: int = 100,
) -> dict[str, float]:
    """Fits a linear classifier on frozen features and scores it on others.

    Features are standardised by the training set. If every clip has exactly one label the loss is softmax cross-entropy
    and the score accuracy, otherwise one sigmoid per class and the score mean average precision.

    Args:
        train_features: ``(N, D)``.
        train_labels: ``(N, C)`` multi-hot.
        test_features: ``(M, D)``.
        test_labels: ``(M, C)`` multi-hot.
        l2: weight of the penalty ``l2 / 2 |W|^2`` on the mean loss.
        iterations: of L-BFGS.

    Returns:
        ``{"accuracy": ..., "chance": 1 / classes, "majority": ...}``, where ``majority`` is the accuracy of always
        answering the most frequent training class; or ``{"mAP": ..., "chance": ...}`` over the classes that have a
        clip on both sides, with the mean share of positives as chance.

    Raises:
        ValueError: without clips on both sides, with label matrices that do not fit, or for a value that is not finite.
    """
    if len(train_features) == 0 or len(test_features) == 0:
        raise ValueError(f"a probe needs clips on both sides, got {len(train_features)} and {len(test_features)}")
    if train_labels.shape[1] != test_labels.shape[1]:
        raise ValueError(f"label widths differ: {train_labels.shape[1]} and {test_labels.shape[1]} classes")
    for name, x in (("train_features", train_features), ("test_features", test_features)):
        if not torch.isfinite(x).all():
            raise ValueError(f"{name} hold values that are not finite; no probe can be fitted")
    train, test = train_features.double(), test_features.double()
    mean, std = train.mean(0), train.std(0, correction=0)
    train, test = ((x - mean) / torch.where(std > 1e-6 * std.max(), std, torch.inf) for x in (train, test))
    single = bool((train_labels.sum(1) == 1).all() and (test_labels.sum(1) == 1).all())
    weight, bias = _fit(train, train_labels.double(), single, l2, iterations)
    scores = test @ weight + bias
    if single:
        truth = test_labels.argmax(1)
        counts = train_labels.sum(0)
        return {
            "accuracy": (scores.argmax(1) == truth).double().mean().item(),
            "chance": 1 / int((counts > 0).sum()),
            "majority": (truth == counts.argmax()).double().mean().item(),
        }
    positive = (test_labels.sum(0) > 0) & (train_labels.sum(0) > 0)
    if not positive.any():
        raise ValueError("no class has a labelled clip on both sides of the probe")
    precisions = [average_precision(scores[:, c], test_labels[:, c]) for c in positive.nonzero()[:, 0].tolist()]
    chance = test_labels[:, positive].double().mean().item()
    return {"mAP": sum(precisions) / len(precisions), "chance": chance}


def _fit(x: Tensor, y: Tensor, single: bool, l2: float, iterations: int) -> tuple[Tensor, Tensor]:
    weight = x.new_zeros(x.shape[1], y.shape[1], requires_grad=True)
    bias = x.new_zeros(y.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = x @ weight + bias
        if single:
            fit = F.cross_entropy(logits, y)
        else:
            fit = F.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(1).mean()
        loss = fit + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """Area under the stepwise precision-recall curve; clips of equal score are taken together (as scikit-learn)."""
    order = scores.argsort(descending=True)
    hits = positive[order].double().cumsum(0)
    last_of_tie = torch.ones(len(scores), dtype=torch.bool)
    last_of_tie[:-1] = scores[order].diff() != 0
    hits = hits[last_of_tie]
    precision = hits / (last_of_tie.nonzero()[:, 0] + 1)
    return (hits.diff(prepend=hits.new_zeros(1)) * precision).sum().item() / positive.sum().item()
