"""Frozen features of a set of clips, one vector per clip and modality."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from avfast.distributed import world_size


@torch.no_grad()
def pooled(
    model: nn.Module,
    loader: Iterable[Any],
    device: torch.device | str,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, Any]:
    """Mean over the tokens of ``model.encode`` for every clip of ``loader``, gathered from all processes.

    Args:
        model: with ``encode`` and ``frontend``; evaluated in eval mode, its mode is restored.
        loader: of :class:`avfast.data.clips.Batch`; in a distributed run each process brings its share.
        device: where the model lives.
        autocast: context under which the model runs.

    Returns:
        On the CPU and in the order of the clips' index: ``audio`` and ``visual`` ``(N, D)`` float32 (zeros where a clip
        lacks the modality), ``has_audio`` and ``has_visual`` ``(N,)`` bool, ``labels`` ``(N, C)`` or None, ``index``
        ``(N,)`` int64, and ``failures``, the list of clips that could not be read.
    """
    training = model.training
    model.eval()
    rows: dict[str, list[Tensor]] = {
        name: [] for name in ("audio", "visual", "has_audio", "has_visual", "index", "labels")
    }
    failures: list[Any] = []
    for batch in loader:
        failures.extend(batch.failures)
        if not len(batch.index):
            continue
        audio = model.frontend.audio(batch.waveform.to(device), batch.num_samples.to(device))
        visual = model.frontend.visual(batch.frames.to(device))
        with autocast():
            # one modality at a time: a fused pass would let a missing partner leak into the other's feature
            features = {"audio": model.encode(audio=audio).audio, "visual": model.encode(visual=visual).visual}
        for name, present in (("audio", batch.has_audio), ("visual", batch.has_visual)):
            present = torch.as_tensor(present)
            rows[name].append(features[name].float().mean(1).cpu().masked_fill(~present[:, None], 0))
            rows[f"has_{name}"].append(present)
        rows["index"].append(torch.as_tensor(batch.index))
        if batch.labels is not None:
            rows["labels"].append(batch.labels)
    model.train(training)
    found = _gather({name: torch.cat(parts) for name, parts in rows.items() if parts}, failures)
    found.setdefault("labels", None)
    return found


def _gather(local: dict[str, Tensor], failures: list[Any]) -> dict[str, Any]:
    shares: list[Any] = [(local, failures)]
    if world_size() > 1:
        shares = [None] * world_size()
        dist.all_gather_object(shares, (local, failures))
    filled = [part for part, _ in shares if part]
    if not filled:
        raise ValueError("no clip could be read: there are no features")
    order = torch.cat([part["index"] for part in filled]).argsort()
    found: dict[str, Any] = {name: torch.cat([part[name] for part in filled])[order] for name in filled[0]}
    return found | {"failures": [failure for _, more in shares for failure in more]}
