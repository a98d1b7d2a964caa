"""Contrastive loss between the two modalities of a batch.

With L2-normalised rows a_i, v_i of matching pairs and temperature t, the audio-to-visual direction is
  -1/B sum_i log( exp(a_i.v_i / t) / sum_j exp(a_i.v_j / t) )
(AVSiam, eq. of L_c); the visual-to-audio direction exchanges the roles. B counts the pairs of all processes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from avfast.distributed import all_sum, gather_rows, world_size

Direction = Literal["both", "audio_to_visual", "visual_to_audio"]


class InfoNCE(NamedTuple):
    """The loss, and the share of rows whose best match is their own pair; both scalars, mean over the directions."""

    loss: Tensor
    accuracy: Tensor


def info_nce(audio: Tensor, visual: Tensor, temperature: float = 0.05, direction: Direction = "both") -> InfoNCE:
    """InfoNCE over the pairs of all processes.

    Args:
        audio: ``(n, D)`` features of this process's pairs, normalised here. n may differ between processes and may be
        0.
        visual: ``(n, D)``, row i belongs to row i of ``audio``.
        temperature: t.
        direction: ``"both"`` averages the two directions.

    Returns:
        Loss and accuracy. The mean over processes of the loss is the loss of the global batch, so gradients averaged by
        DistributedDataParallel are those of one process that holds the whole batch. The accuracy has no gradient.

    Raises:
        ValueError: if the shapes differ or are not two-dimensional.
    """
    if audio.ndim != 2 or audio.shape != visual.shape:
        raise ValueError(f"audio and visual must both be (n, D), got {tuple(audio.shape)} and {tuple(visual.shape)}")
    audio, visual = F.normalize(audio, dim=1), F.normalize(visual, dim=1)
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
