"""What autocast means for an op."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matrix product casts ``x`` to here and now; its own without autocast and for float64."""
    kind = x.device.type
    if x.dtype != torch.float64 and kind != "meta" and torch.is_autocast_enabled(kind):  # there is none on meta
        return torch.get_autocast_dtype(kind)
    return x.dtype
