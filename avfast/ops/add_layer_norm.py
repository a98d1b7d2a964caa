"""Residual addition and LayerNorm in one pass, with an affine set per group of rows.

With the stream x and an update u, both (T, D), and rows in consecutive groups (all audio tokens, then all visual
tokens), group g with scale w_g and shift b_g:
  s = x + u,   y = (s - mean(s)) / sqrt(var(s) + eps) * w_g + b_g
Both s and y are returned: s continues the residual stream, y feeds the next layer. Mean and biased variance run over D.
With c = w_g dy, z = (s - mean(s)) * r and r = 1 / sqrt(var(s) + eps) the gradients are
  dx = du = ds + r (c - mean(c) - z mean(c z)),   dw_g = sum over the group of dy z,   db_g = sum of dy.

PyTorch alone reads and writes the stream once for the addition, once for the norm and, under autocast, once more to
cast the norm's float32 result; the backward adds the two gradients of the stream in a pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avfast import backend
from avfast.ops._shared import autocast_dtype, register_autograd


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int] | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """LayerNorm of ``x + residual``, and that sum.

    Statistics and the affine map are computed in float32 (float64 for float64 inputs). The gradient is one more
    operator: it cannot be differentiated again, and ``torch.func`` transforms do not pass through.

    Args:
        x: ``(T, D)``.
        residual: ``(T, D)``, added to x; either may be the wider type.
        weight: ``(sets, D)`` scales, or ``(D,)`` for one set.
        bias: shifts of the same shape.
        sizes: rows of each group, adding up to T; may be left out with one set.
        eps: added to the variance.

    Returns:
        The norm in x's dtype, or under autocast in its dtype (what the next linear layer would cast to); and the sum in
        the wider of the two input types.

    Raises:
        ValueError: on shapes that do not fit.
    """
    if x.ndim != 2 or x.shape != residual.shape:
        raise ValueError(f"x and residual must both be (T, D), got {tuple(x.shape)} and {tuple(residual.shape)}")
    if weight.ndim == 1:
        weight, bias = weight[None], bias[None]
    if weight.shape != bias.shape or weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} do not fit x {tuple(x.shape)}")
    sizes = check_sizes(sizes, weight.shape[0], x.shape[0])
    dtype = autocast_dtype(x)
    if not backend.use_kernels("add_layer_norm", x, residual):
        # Without kernels an operator costs more host time than it saves.
        return _composed(x, residual, weight, bias, sizes, eps, dtype)
    normed, total, _, _ = _forward(x, residual, weight, bias, sizes, eps, dtype)
    return normed, total


def check_sizes(sizes: Sequence[int] | None, sets: int, rows: int) -> list[int]:
    """The rows of each affine set, which must add up to ``rows``."""
    sizes = [rows] if sizes is None or (sets == 1 and len(sizes) == 0) else list(sizes)
    if len(sizes) != sets:
        raise ValueError(f"this norm has {sets} affine sets, got {len(sizes)} group sizes")
    if sum(sizes) != rows:
        raise ValueError(f"group sizes {tuple(sizes)} add up to {sum(sizes)} rows, there are {rows}")
    return sizes


def _composed(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, sizes: list[int], eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """PyTorch's own operators, differentiated by autograd."""
    total = x + residual
    wide = _wide(total.dtype)
    groups = zip(total.to(wide).split(sizes), weight.to(wide), bias.to(wide), strict=True)
    parts = [F.layer_norm(part, part.shape[1:], w, b, eps) for part, w, b in groups]
    return _joined(parts).to(dtype), total


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What statistics are computed in."""
    return torch.promote_types(dtype, torch.float32)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@torch.library.custom_op("avfast::add_layer_norm", mutates_args=())
def _forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, sizes: list[int], eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """normed, sum, mean (T,) and 1 / deviation (T,)."""
    if backend.use_kernels("add_layer_norm", x, residual):
        from avfast.kernels import add_layer_norm as kernels

        return kernels.forward(x, residual, weight, bias, sizes, eps, dtype)
    total = torch.add(x, residual).contiguous()
    rows = total.to(_wide(total.dtype))
    mean = rows.mean(1)
    rstd = ((rows - mean[:, None]).square().mean(1) + eps).rsqrt()
    standard = (rows - mean[:, None]) * rstd[:, None]
    groups = zip(standard.split(sizes), weight.to(rows.dtype), bias.to(rows.dtype), strict=True)
    return _joined([part * w + b for part, w, b in groups]).to(dtype), total, mean, rstd


@_forward.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, sizes: list[int], eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    mean = total.new_empty(x.shape[:1], dtype=_wide(total.dtype))
    return total.new_empty(x.shape, dtype=dtype), total, mean, torch.empty_like(mean)


@torch.library.custom_op("avfast::add_layer_norm_backward", mutates_args=())
def _backward(
    grad_normed: Tensor,
    grad_total: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sizes: list[int],
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the residual (empty where x's serves: same dtype), and of weight and bias."""
    if backend.use_kernels("add_layer_norm", total):
        from avfast.kernels import add_layer_norm as kernels

        return kernels.backward(grad_normed, grad_total, total, weight, mean, rstd, sizes, x_dtype, residual_dtype)
    wide = mean.dtype
    standard = (total.to(wide) - mean[:, None]) * rstd[:, None]
    grad = grad_normed.to(wide)
    scaled = _joined([part * w for part, w in zip(grad.split(sizes), weight.to(wide), strict=True)])
    along = (scaled * standard).mean(1, keepdim=True)
    grad_x = grad_total.to(wide) + rstd[:, None] * (scaled - scaled.mean(1, keepdim=True) - standard * along)
    grad_weight = torch.stack([part.sum(0) for part in (grad * standard).split(sizes)])
    grad_bias = torch.stack([part.sum(0) for part in grad.split(sizes)])
    same = x_dtype == residual_dtype
    grad_residual = grad_x.new_empty(0, dtype=residual_dtype) if same else grad_x.to(residual_dtype, copy=True)
    return grad_x.to(x_dtype), grad_residual, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


@_backward.register_fake
def _(
    grad_normed: Tensor,
    grad_total: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sizes: list[int],
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (0,) if x_dtype == residual_dtype else total.shape
    grad_x, grad_residual = total.new_empty(total.shape, dtype=x_dtype), total.new_empty(shape, dtype=residual_dtype)
    return grad_x, grad_residual, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, sizes, _, _ = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(total, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.sizes, ctx.dtypes = sizes, (x.dtype, residual.dtype)


def _differentiate(ctx: Any, grad_normed: Tensor, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grad_x, grad_residual, grad_weight, grad_bias = _backward(
        grad_normed, grad_total, *ctx.saved_tensors, ctx.sizes, *ctx.dtypes
    )
    if ctx.dtypes[0] == ctx.dtypes[1]:
        grad_residual = grad_x
    return grad_x, grad_residual, grad_weight, grad_bias, None, None, None


register_autograd("add_layer_norm", _forward, _backward, _differentiate, _save)
