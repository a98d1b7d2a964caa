"""Frozen features of a set of clips, one vector per clip and kind of token."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from avfast.distributed import world_size
from avfast.models import Model

KINDS = ("audio", "visual", "fused")


@torch.no_grad()
def pooled(
    model: Model,
    loader: Iterable[Any],
    device: torch.device | str,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, Any]:
    """Mean over the tokens of ``model.encode`` for every clip of ``loader``, gathered from all processes.

    A clip is encoded with all the modalities it has. In models that fuse early, its audio tokens have then met the
    picture and the other way round, as in DeepAVFusion's own probes; elsewhere they have not.

    Args:
        model: with ``encode`` and ``frontend``; evaluated in eval mode, its mode is restored.
        loader: of :class:`avfast.data.clips.Batch`; in a distributed run each process brings its share.
        device: where the model lives.
        autocast: context under which the model runs.

    Returns:
        On the CPU and in the order of the clips' index: ``audio``, ``visual`` and ``fused`` ``(N, D)`` float32 (zeros
        where a clip lacks a modality that they need), ``has_audio``, ``has_visual`` and ``has_fused`` ``(N,)`` bool,
        ``labels`` ``(N, C)`` or None, ``index`` ``(N,)`` int64, and ``failures``, the list of clips that could not be
        read.

    Raises:
        ValueError: where no clip could be read.
    """
    training = model.training
    model.eval()
    rows: dict[str, list[Tensor]] = {"index": [], "labels": []}
    for kind in KINDS:
        rows |= {kind: [], f"index_{kind}": []}
    failures: list[Any] = []
    for batch in loader:
        failures.extend(batch.failures)
        if not len(batch.index):
            continue
        audio = model.frontend.audio(batch.waveform.to(device), batch.num_samples.to(device))
        visual = model.frontend.visual(batch.frames.to(device))
        has_audio, has_visual = torch.as_tensor(batch.has_audio), torch.as_tensor(batch.has_visual)
        index = torch.as_tensor(batch.index)
        # clips that have the same modalities together: a blank partner must not leak into what the other one gives
        for with_audio, with_visual in ((True, True), (True, False), (False, True)):
            some = ((has_audio == with_audio) & (has_visual == with_visual)).nonzero()[:, 0]
            if not len(some):
                continue
            place = some.to(device)
            with autocast():
                found = model.encode(audio[place] if with_audio else None, visual[place] if with_visual else None)
            for kind in KINDS:
                if (tokens := getattr(found, kind)) is not None:
                    rows[kind].append(tokens.float().mean(1).cpu())
                    rows[f"index_{kind}"].append(index[some])
        rows["index"].append(index)
        if batch.labels is not None:
            rows["labels"].append(batch.labels)
    model.train(training)
    return _gather({name: torch.cat(parts) for name, parts in rows.items() if parts}, failures)


def _gather(local: dict[str, Tensor], failures: list[Any]) -> dict[str, Any]:
    shares: list[Any] = [(local, failures)]
    if world_size() > 1:
        shares = [None] * world_size()
        dist.all_gather_object(shares, (local, failures))
    filled = [part for part, _ in shares if part]
    if not filled:
        raise ValueError("no clip could be read: there are no features")
    names = dict.fromkeys(name for part in filled for name in part)
    all_rows = {name: torch.cat([part[name] for part in filled if name in part]) for name in names}
    index, order = all_rows["index"].sort()
    found: dict[str, Any] = {"index": index, "labels": all_rows["labels"][order] if "labels" in all_rows else None}
    width = next(all_rows[kind].shape[1] for kind in KINDS if kind in all_rows)
    for kind in KINDS:
        values = all_rows.get(kind, torch.zeros(0, width, dtype=torch.float32))
        place = torch.searchsorted(index, all_rows.get(f"index_{kind}", index[:0]))
        found[kind] = torch.zeros(len(index), values.shape[1], dtype=torch.float32).index_copy(0, place, values)
        found[f"has_{kind}"] = torch.zeros(len(index), dtype=torch.bool).index_fill(0, place, True)
    return found | {"failures": [failure for _, more in shares for failure in more]}
