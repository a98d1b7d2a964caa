"""What autocast means for an op."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matrix product casts ``x`` to here and now; its own without autocast and for float64."""
    kind = x.device.type
    if x.dtype != torch.float64 and kind != "meta" and torch.is_autocast_enabled(kind):  # there is none on meta
        return torch.get_autocast_dtype(kind)
    return x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which operators on ``x``'s device compute in the dtypes they are given."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def at_least_float32(*tensors: Tensor) -> torch.dtype:
    """The dtype of a loss: float32 for half precision, float64 where there is one.

    Raises:
        ValueError: on integers and booleans.
    """
    dtype = torch.float32
    for x in tensors:
        if not x.is_floating_point():
            raise ValueError(f"a loss is computed from floating-point tensors, got {x.dtype} {tuple(x.shape)}")
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype
