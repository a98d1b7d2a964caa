"""What ops share: what autocast means for them, the scale of logits, and their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from avfast.tensors import exporting


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matrix product casts ``x`` to here and now; its own without autocast and for float64."""
    kind = x.device.type
    if x.dtype != torch.float64 and kind != "meta" and torch.is_autocast_enabled(kind):  # there is none on meta
        return torch.get_autocast_dtype(kind)
    return x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which operators on ``x``'s device compute in the dtypes they are given."""
    kind = x.device.type
    if kind == "meta" or (exporting() and not torch.is_autocast_enabled(kind)):
        return nullcontext()  # a context that changes nothing would be a graph of its own in an exported program
    return torch.autocast(kind, enabled=False)


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


def logit_scale(scale: float | None, head_dim: int) -> float:
    """The factor of attention's logits, ``head_dim ** -0.5`` unless given.

    Raises:
        ValueError: when it is not positive.
    """
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    return head_dim**-0.5 if scale is None else scale


def register_autograd(
    name: str, op: CustomOpDef, backward: CustomOpDef, differentiate: Callable, setup_context: Callable
) -> None:
    """Gives an operator its derivative; that of its backward is an error that names the op."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{name} has no second derivative (double backward)")

    op.register_autograd(differentiate, setup_context=setup_context)
    backward.register_autograd(refuse)
