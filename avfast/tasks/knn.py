"""Accuracy of the nearest neighbour: do clips that look alike to a model belong together?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from avfast.tasks.probe import average_precision


def knn(features: Mapping[str, Tensor], labels: Tensor, chunk: int = 2048) -> dict[str, Any]:
    """Classifies each clip by the most similar other clip (cosine), by each kind of features and by their sum.

    DeepAVFusion's measure during training (Figure 3): mean tokens of a modality or of the fusion tokens, clips of one
    set, a clip never its own neighbour. ``sum`` adds the similarities of all kinds. Where every clip has exactly one
    label the score is accuracy. Otherwise each class is ranked by the similarity of the neighbours that have it, and
    the score is mean average precision over the classes that occur, as in the released code.

    Args:
        features: by name, ``(N, D)`` each; D may differ.
        labels: ``(N, C)`` multi-hot.
        chunk: queries per block of the similarity matrix.

    Returns:
        ``{"score": "accuracy" | "mAP", "chance": ..., <name>: ..., "sum": ...}``; chance is a neighbour drawn at random
        (accuracy) or the mean share of positives (mAP). ``sum`` only for several kinds of features.

    Raises:
        ValueError: fewer than two clips, or a value that is not finite.
    """
    count = len(labels)
    if count < 2:
        raise ValueError(f"a nearest neighbour needs at least 2 clips, got {count}")
    unit = {}
    for name, x in features.items():
        if x.ndim != 2 or len(x) != count:
            raise ValueError(f"{name}: expected ({count}, D), got {tuple(x.shape)}")
        if not torch.isfinite(x).all():
            raise ValueError(f"{name} hold values that are not finite; no neighbour can be given")
        unit[name] = F.normalize(x.double(), dim=1)
    names = [*unit, "sum"] if len(unit) > 1 else list(unit)
    nearest: dict[str, list[Tensor]] = {name: [] for name in names}
    similar: dict[str, list[Tensor]] = {name: [] for name in names}
    for start in range(0, count, chunk):
        rows = torch.arange(start, min(start + chunk, count), device=labels.device)
        cosines = {name: x[rows] @ x.T for name, x in unit.items()}
        if "sum" in names:
            cosines["sum"] = torch.stack(list(cosines.values())).mean(0)
        for name, similarity in cosines.items():
            similarity[rows - start, rows] = -torch.inf
            best = similarity.max(1)
            nearest[name].append(best.indices)
            similar[name].append(best.values)
    found = {name: (torch.cat(nearest[name]), torch.cat(similar[name])) for name in names}
    if bool((labels.sum(1) == 1).all()):
        truth = labels.argmax(1)
        sizes = labels.double().sum(0)
        chance = (sizes * (sizes - 1)).sum().item() / (count * (count - 1))
        scores = {name: (truth[index] == truth).double().mean().item() for name, (index, _) in found.items()}
        return {"score": "accuracy", "chance": chance} | scores
    occurs = (labels.sum(0) > 0).nonzero()[:, 0].tolist()
    if not occurs:
        raise ValueError("no clip has a class")
    precisions: dict[str, float] = {}
    for name, (index, cosine) in found.items():
        ranking = labels[index] * (1 + cosine)[:, None]
        precisions[name] = sum(average_precision(ranking[:, c], labels[:, c]) for c in occurs) / len(occurs)
    return {"score": "mAP", "chance": labels[:, occurs].double().mean().item()} | precisions
