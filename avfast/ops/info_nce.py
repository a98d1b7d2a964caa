"""Contrastive loss between the two modalities of a batch.

With L2-normalised rows a_i, v_i of matching pairs and temperature t, the audio-to-visual direction is
  -1/B sum_i log( exp(a_i.v_i / t) / sum_j exp(a_i.v_j / t) )
(AVSiam, eq. of L_c); the visual-to-audio direction exchanges the roles. B counts the pairs of all processes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from avfast.distributed import all_sum, gather_rows, world_size
from avfast.ops._shared import at_least_float32, without_autocast

Direction = Literal["both", "audio_to_visual", "visual_to_audio"]
DIRECTIONS = get_args(Direction)


class InfoNCE(NamedTuple):
    """The loss, and the share of rows whose best match is their own pair; both scalars, mean over the directions."""

    loss: Tensor
    accuracy: Tensor


def info_nce(audio: Tensor, visual: Tensor, temperature: float = 0.05, direction: Direction = "both") -> InfoNCE:
    """InfoNCE over the pairs of all processes, in at least float32 also under autocast.

    Args:
        audio: ``(n, D)`` features of this process's pairs, normalised here; n may differ between processes or be 0.
        visual: ``(n, D)``, row i belongs to row i of ``audio``.
        temperature: t, positive.
        direction: ``"both"`` averages the two directions, ``"audio_to_visual"`` and ``"visual_to_audio"`` are one each.

    Returns:
        Loss and accuracy. The mean over processes of the loss is the loss of the global batch, so gradients averaged by
        DistributedDataParallel are those of one process that holds the whole batch. The accuracy has no gradient.

    Raises:
        ValueError: if the shapes differ or are not two-dimensional, on features that are not floating point, on a
            temperature that is not positive, and on another direction.
    """
    if audio.ndim != 2 or audio.shape != visual.shape:
        raise ValueError(f"audio and visual must both be (n, D), got {tuple(audio.shape)} and {tuple(visual.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    dtype = at_least_float32(audio, visual)
    with without_autocast(audio):  # the logits of nearly equal features differ by less than half precision tells
        audio, visual = F.normalize(audio.to(dtype), dim=1), F.normalize(visual.to(dtype), dim=1)
        all_audio, offset = gather_rows(audio)
        all_visual, _ = gather_rows(visual)
        own = torch.arange(offset, offset + audio.shape[0], device=audio.device)
        logits = []
        if direction != "visual_to_audio":
            logits.append(audio @ all_visual.T / temperature)
        if direction != "audio_to_visual":
            logits.append(visual @ all_audio.T / temperature)
        total = max(all_audio.shape[0], 1) * len(logits)
        loss = torch.stack([F.cross_entropy(x, own, reduction="sum") for x in logits]).sum() * (world_size() / total)
    with torch.no_grad():
        hits = torch.stack([(x.argmax(1) == own).sum() if len(own) else own.sum() for x in logits]).sum()
        return InfoNCE(loss, all_sum(hits) / total)
