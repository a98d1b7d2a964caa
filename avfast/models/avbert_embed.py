"""What AVBERT reads its clips with: adapters and time embeddings; and what picks rows and places of its sequences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfast.packing import take_rows


class Adapter(nn.Module):
    """A CNN's features as clip embeddings x, and the sequence that a transformer reads.

    Args:
        features: of the CNN, C.
        dim: D.
        eps: of the LayerNorm.
    """

    def __init__(self, features: int, dim: int, eps: float) -> None:
        super().__init__()
        self.proj, self.norm = nn.Linear(features, dim), nn.LayerNorm(dim, eps=eps)
        self.bos, self.mask = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))

    def forward(self, features: Tensor) -> Tensor:
        """``(n, T, C) -> (n, T, D)``."""
        return self.norm(self.proj(features))

    def sequence(self, x: Tensor, masked: Tensor | None = None) -> Tensor:
        """``(n, T, D) -> (n, 1 + T, D)``: BOS and the clips, those of ``masked`` ``(n, M)`` as the mask vector."""
        if masked is not None:
            hidden = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, masked, True)
            x = torch.where(hidden[..., None], self.mask.to(x.dtype), x)
        return torch.cat([self.bos.to(x.dtype).expand(x.shape[0], 1, -1), x], 1)


class TimeEmbedding(nn.Module):
    """LayerNorm(sequence + time embedding), and with modalities + that of each (eqs. 2 and 3).

    Args:
        length: 1 + T.
        dim: D.
        modalities: with an embedding each.
        eps: of the LayerNorm.
        dropout: after it.
    """

    def __init__(self, length: int, dim: int, modalities: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(length, dim))
        self.modality = nn.Parameter(torch.empty(modalities, dim)) if modalities else None
        self.norm, self.dropout = nn.LayerNorm(dim, eps=eps), dropout

    def forward(self, *sequences: Tensor) -> Tensor:
        """Sequences ``(n, L, D)``, L at most 1 + T, one after another: ``(n, S L, D)``, with the same times."""
        parts = [x + self.positions[: x.shape[1]] for x in sequences]
        if self.modality is not None:
            parts = [x + kind for x, kind in zip(parts, self.modality, strict=True)]
        return F.dropout(self.norm(torch.cat(parts, 1)), self.dropout, self.training)


@contextmanager
def fixed(cnn: nn.Module) -> Iterator[None]:
    """Within it nothing learns, and the CNN's batch norms neither use nor change the statistics of a batch."""
    training = cnn.training
    with torch.no_grad():
        cnn.eval()
        try:
            yield
        finally:
            cnn.train(training)


def take(x: Tensor, rows: Tensor | None) -> Tensor:
    """Some rows; all for None."""
    return x if rows is None else take_rows(x, rows)


def outputs_at(x: Tensor, places: Tensor) -> Tensor:
    """``(n, L, D)`` at ``(n, M)``: ``(n, M, D)``."""
    return x.take_along_dim(places[..., None], 1)
