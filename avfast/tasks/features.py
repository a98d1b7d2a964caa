"""Frozen features of a set of clips, one vector per clip and kind of token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from avfast.data.clips import Batch, Failure
from avfast.distributed import world_size
from avfast.models import Features, Model
from avfast.packing import PackedTokens

KINDS = ("audio", "visual", "fused")


@dataclass(frozen=True)
class Pooled:
    """One vector per clip and kind of token, on the CPU, in the order of the clips' index.

    Args:
        index: ``(N,)`` int64, which clips.
        labels: ``(N, C)`` multi-hot, None without classes.
        features: by kind, ``(N, D)`` float32; zeros where a clip lacks a modality that they need. A kind that no clip
            has is not there.
        present: by the same kinds, ``(N,)`` bool, which clips have it.
        failures: the clips that could not be read.
    """

    index: Tensor
    labels: Tensor | None
    features: dict[str, Tensor]
    present: dict[str, Tensor]
    failures: list[Failure]

    def have(self, *kinds: str) -> Tensor:
        """``(N,)`` bool, which clips have all these kinds."""
        none = torch.zeros(len(self.index), dtype=torch.bool)
        return torch.stack([self.present.get(kind, none) for kind in kinds]).all(0)

    def labelled(self, *kinds: str) -> tuple[dict[str, Tensor], Tensor]:
        """Features of these kinds and labels, of the clips that have a class and all the kinds."""
        labels = torch.zeros(len(self.index), 0, dtype=torch.float32) if self.labels is None else self.labels
        usable = self.have(*kinds) & (labels.sum(1) > 0)
        return {kind: self.features[kind][usable] for kind in kinds if kind in self.features}, labels[usable]


@torch.no_grad()
def pooled(
    model: Model,
    loader: Iterable[Batch],
    device: torch.device | str,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Pooled:
    """Mean over the tokens of ``model.encode`` for every clip of ``loader``, gathered from all processes.

    A clip is encoded with all the modalities it has, of those that the model takes. In models that fuse early, its
    audio tokens have then met the frame and the other way round, as in DeepAVFusion's own probes; elsewhere they have
    not.

    Args:
        model: evaluated in eval mode, its mode is restored.
        loader: in a distributed run each process brings its share.
        device: where the model lives.
        autocast: context under which the model runs.

    Raises:
        ValueError: where no clip could be read.
    """
    training = model.training
    model.eval()
    index: list[Tensor] = []
    labels: list[Tensor] = []
    failures: list[Failure] = []
    rows: dict[str, list[Tensor]] = {}
    places: dict[str, list[Tensor]] = {}
    for batch in loader:
        failures.extend(batch.failures)
        if not len(batch):
            continue
        for some, tokens in encoded(model, batch, device, autocast):
            for kind, x in tokens.items():
                rows.setdefault(kind, []).append(mean(x).cpu())
                places.setdefault(kind, []).append(batch.index[some])
        index.append(batch.index)
        if batch.labels is not None:
            labels.append(batch.labels)
    model.train(training)
    own = {kind: (torch.cat(rows[kind]), torch.cat(places[kind])) for kind in rows}
    return _gather((index, labels, own, failures))


def encoded(
    model: Model,
    batch: Batch,
    device: torch.device | str,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[tuple[Tensor, dict[str, Tensor | PackedTokens]]]:
    """Tokens of the samples of a batch, each encoded with all the modalities it has, of those that the model takes.

    Samples that have the same modalities go together: a blank partner must not leak into what the other one gives.

    Yields:
        ``(n,)`` rows of the batch, on the CPU, and by kind their tokens ``(n, N, D)``. Samples without any of the
        model's modalities are left out.
    """
    inputs = model.frontend(batch.to(device))
    has = {name: there.cpu() for name, there in batch.has.items() if name in inputs}
    table = torch.stack(list(has.values()), 1)
    for made_up in table.unique(dim=0).flip(0):
        if not made_up.any():
            continue
        some = (table == made_up).all(1).nonzero()[:, 0]
        absent = {name for name, there in zip(has, made_up.tolist(), strict=True) if not there}
        with autocast():
            given = {name: x[some.to(x.device)] for name, x in inputs.items() if name not in absent}
            found: Features = model.encode(**given)
        kinds = zip(KINDS, (found.audio, found.visual, found.fused), strict=True)
        yield some, {kind: x for kind, x in kinds if x is not None}


def mean(tokens: Tensor | PackedTokens) -> Tensor:
    """``(B, D)`` float32, over the tokens of each instance."""
    return tokens.mean(torch.float32) if isinstance(tokens, PackedTokens) else tokens.float().mean(1)


_Share = tuple[list[Tensor], list[Tensor], dict[str, tuple[Tensor, Tensor]], list[Failure]]


def _gather(local: _Share) -> Pooled:
    shares: list[_Share] = [local]
    if world_size() > 1:
        shares = [local] * world_size()
        dist.all_gather_object(shares, local)
    if not any(share[2] for share in shares):
        raise ValueError("no clip could be read: there are no features")
    index, order = torch.cat([x for share in shares for x in share[0]]).sort()
    labels = [x for share in shares for x in share[1]]
    features: dict[str, Tensor] = {}
    present: dict[str, Tensor] = {}
    for kind in KINDS:
        found = [share[2][kind] for share in shares if kind in share[2]]
        if not found:
            continue
        values, places = (torch.cat(part) for part in zip(*found, strict=True))
        place = torch.searchsorted(index, places)
        features[kind] = values.new_zeros(len(index), values.shape[1]).index_copy(0, place, values)
        present[kind] = torch.zeros(len(index), dtype=torch.bool).index_fill(0, place, True)
    failures = [failure for share in shares for failure in share[3]]
    return Pooled(index, torch.cat(labels)[order] if labels else None, features, present, failures)
