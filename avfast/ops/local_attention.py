"""Attention within the windows of a grid of tokens, with cosine logits, as in Swin Transformer V2.

The (rows, columns) grid is cut into windows of W tokens; shifted windows begin ``shift`` further on and wrap around the
grid. For query i and key j of one window of head h
  s_ij = scale_h cos(q_i, k_j) + bias_h,ij  - 100 where one of the two is beyond the wrap and the other is not
  out_i = sum_j softmax_j(s_ij) v_j,   cos(q, k) = q . k / (max(|q|, 1e-6) max(|k|, 1e-6))
(Liu et al., Swin Transformer V2, Eq. 2, with the scale 1 / tau and the bias from a small network; AudioMAE's local
decoder: windows of 4 x 4 on 64 x 8 patches, every other block shifted by half a window in time). With p the softmax,
  ds = p (dp - sum_j p dp),  dp = do . v,  dbias = sum ds,  dscale = sum ds cos,  dv = sum p do,
  dq = scale / |q| (sum_j ds_ij k_j / |k_j| - q / |q| sum_j ds_ij cos_ij), and dk likewise
over all windows of all samples. Only the inputs are kept for the backward pass: the weights of a window are cheaper to
compute again than to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from avfast import backend
from avfast.ops._shared import at_least_float32, autocast_dtype, register_autograd, without_autocast

LEAST_NORM = 1e-6
APART = -100.0  # added to logits across the wrap
CHUNK = 2**19  # values of qkv that the eager body has at a time


def local_attention(
    qkv: Tensor,
    bias: Tensor,
    scale: Tensor,
    *,
    grid: Sequence[int],
    window: Sequence[int] = (4, 4),
    shift: Sequence[int] = (0, 0),
) -> Tensor:
    """Attention of every token to those of its window.

    Computed in float32 (float64 for float64 inputs), products of half-precision inputs with sums in float32. The
    gradient is one more operator: it cannot be differentiated again, and ``torch.func`` transforms do not pass through.

    Args:
        qkv: ``(B, N, 3, H, D)`` queries, keys and values of the N = rows * columns tokens, row by row.
        bias: ``(H, W, W)`` added to the logits of each query and key, numbered row by row within a window.
        scale: ``(H,)`` factor of the cosines.
        grid: (rows, columns) of tokens, multiples of the window's.
        window: (rows, columns) of a window.
        shift: tokens by which windows begin later, each below the window's.

    Returns:
        ``(B, N, H, D)`` in the dtype of ``qkv``, or under autocast in its dtype.

    Raises:
        ValueError: on shapes that do not fit.
    """
    grid, window, shift = ([int(n) for n in pair] for pair in (grid, window, shift))
    if not len(grid) == len(window) == len(shift) == 2:
        raise ValueError(f"grid, window and shift must be (rows, columns), got {grid}, {window} and {shift}")
    if min(window) < 1 or any(g < 1 or g % w for g, w in zip(grid, window, strict=True)):
        raise ValueError(f"a grid of {tuple(grid)} tokens cannot be cut into windows of {tuple(window)}")
    if any(not 0 <= s < w for s, w in zip(shift, window, strict=True)):
        raise ValueError(f"shift must be from 0 to below the window {tuple(window)}, got {tuple(shift)}")
    if qkv.ndim != 5 or qkv.shape[1:3] != (grid[0] * grid[1], 3):
        raise ValueError(f"qkv must be (B, {grid[0] * grid[1]}, 3, H, D) for a grid of {tuple(grid)}, got {qkv.shape}")
    heads, size = qkv.shape[3], window[0] * window[1]
    if bias.shape != (heads, size, size) or scale.shape != (heads,):
        raise ValueError(
            f"bias must be {(heads, size, size)} and scale ({heads},), got {tuple(bias.shape)} and {tuple(scale.shape)}"
        )
    qkv = qkv.to(autocast_dtype(qkv))
    wide = at_least_float32(qkv)
    return _forward(qkv, bias.to(wide), scale.to(wide), grid, window, shift)


def window_regions(grid: Sequence[int], window: Sequence[int], shift: Sequence[int], device: torch.device) -> Tensor:
    """``(windows, W)`` which of the four parts that a wrap leaves apart each token of each window is in."""
    rows, columns = (
        torch.arange(n, device=device) + by >= n for n, by in zip(grid, shift, strict=True)
    )  # in shifted order
    return _cut((rows[:, None] * 2 + columns)[None, ..., None], window).flatten(0, 1)[..., 0]


def _cut(x: Tensor, window: Sequence[int]) -> Tensor:
    """``(B, rows, columns, ...)`` to ``(B, windows, W, ...)``."""
    (p, q), (rows, columns) = window, x.shape[1:3]
    x = x.unflatten(2, (columns // q, q)).unflatten(1, (rows // p, p)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def _join(x: Tensor, grid: Sequence[int], window: Sequence[int]) -> Tensor:
    """Undoes :func:`_cut`."""
    (p, q), (rows, columns) = window, grid
    x = x.unflatten(2, (p, q)).unflatten(1, (rows // p, columns // q)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def _windows(x: Tensor, grid: list[int], window: list[int], shift: list[int]) -> Tensor:
    """``(B, N, parts, H, D)`` to ``(parts, B, windows, H, W, D)`` in at least float32."""
    x = x.unflatten(1, grid)
    if any(shift):
        x = x.roll([-s for s in shift], (1, 2))
    return _cut(x, window).permute(3, 0, 1, 4, 2, 5).to(at_least_float32(x), memory_format=torch.contiguous_format)


def _tokens(x: Tensor, grid: list[int], window: list[int], shift: list[int], dtype: torch.dtype) -> Tensor:
    """Undoes :func:`_windows`."""
    x = _join(x.permute(1, 2, 4, 0, 3, 5), grid, window)
    if any(shift):
        x = x.roll(shift, (1, 2))
    return x.flatten(1, 2).to(dtype, memory_format=torch.contiguous_format)


def _weights(
    q: Tensor, k: Tensor, bias: Tensor, scale: Tensor, grid: list[int], window: list[int], shift: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax and cosines ``(B, windows, H, W, W)``, lengths of queries and of keys ``(B, windows, H, W, 1)``."""
    norms = [torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=LEAST_NORM) for x in (q, k)]
    cosine = q @ k.mT
    cosine /= norms[0]
    cosine /= norms[1].mT
    logits = torch.addcmul(bias, cosine, scale[:, None, None])
    if any(shift):
        region = window_regions(grid, window, shift, q.device)
        logits += ((region[:, :, None] != region[:, None, :]) * APART)[:, None].to(logits.dtype)
    return logits.softmax(-1), cosine, norms[0], norms[1]


@torch.library.custom_op("avfast::local_attention", mutates_args=())
def _forward(qkv: Tensor, bias: Tensor, scale: Tensor, grid: list[int], window: list[int], shift: list[int]) -> Tensor:
    if backend.use_kernels("local_attention", qkv, bias):
        from avfast.kernels import local_attention as kernels

        return kernels.forward(qkv, bias, scale, grid, window, shift)
    with without_autocast(qkv):
        return _composed(qkv, bias, scale, grid, window, shift)


@_forward.register_fake
def _(qkv: Tensor, bias: Tensor, scale: Tensor, grid: list[int], window: list[int], shift: list[int]) -> Tensor:
    return qkv.new_empty((*qkv.shape[:2], *qkv.shape[3:]))


@torch.library.custom_op("avfast::local_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, qkv: Tensor, bias: Tensor, scale: Tensor, grid: list[int], window: list[int], shift: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, bias and scale."""
    if backend.use_kernels("local_attention", qkv, bias):
        from avfast.kernels import local_attention as kernels

        return kernels.backward(grad, qkv, bias, scale, grid, window, shift)
    with without_autocast(qkv):
        return _composed_backward(grad, qkv, bias, scale, grid, window, shift)


@_backward.register_fake
def _(
    grad: Tensor, qkv: Tensor, bias: Tensor, scale: Tensor, grid: list[int], window: list[int], shift: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), torch.empty_like(bias), torch.empty_like(scale)


def _composed(qkv: Tensor, bias: Tensor, scale: Tensor, grid: list[int], window: list[int], shift: list[int]) -> Tensor:
    """The reference, outside autocast."""
    out = qkv.new_empty((*qkv.shape[:2], *qkv.shape[3:]))
    for part in _samples(qkv):
        q, k, v = _windows(qkv[part], grid, window, shift)
        weights = _weights(q, k, bias, scale, grid, window, shift)[0]
        out[part] = _tokens((weights @ v)[None], grid, window, shift, qkv.dtype)[:, :, 0]
    return out


def _composed_backward(
    grad: Tensor, qkv: Tensor, bias: Tensor, scale: Tensor, grid: list[int], window: list[int], shift: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference, outside autocast."""
    grad_qkv, grad_bias, grad_scale = qkv.new_empty(qkv.shape), torch.zeros_like(bias), torch.zeros_like(scale)
    for part in _samples(qkv):
        q, k, v = _windows(qkv[part], grid, window, shift)
        (grad_out,) = _windows(grad[part, :, None], grid, window, shift)
        weights, cosine, norm_q, norm_k = _weights(q, k, bias, scale, grid, window, shift)
        out = torch.empty((3, *q.shape), dtype=q.dtype, device=q.device)
        torch.matmul(weights.mT, grad_out, out=out[2])
        ds = grad_out @ v.mT
        ds -= (weights * ds).sum(-1, keepdim=True)
        ds *= weights
        grad_bias += ds.sum((0, 1))
        cosine *= ds
        grad_scale += cosine.sum((0, 1, 3, 4))
        ds /= norm_q / scale[:, None, None]
        ds /= norm_k.mT
        torch.matmul(ds, k, out=out[0])
        torch.matmul(ds.mT, q, out=out[1])
        for i, (x, norm, along) in enumerate(((q, norm_q, cosine.sum(-1)), (k, norm_k, cosine.sum(-2)))):
            # A vector that is shorter than the least norm is divided by that, and has no direction to keep.
            along = along[..., None] * scale[:, None, None] * (norm > LEAST_NORM) / norm.square()
            out[i].addcmul_(x, along, value=-1)
        grad_qkv[part] = _tokens(out, grid, window, shift, qkv.dtype)
    return grad_qkv, grad_bias, grad_scale


def _samples(qkv: Tensor) -> list[slice]:
    """A few at a time, so that on a CPU what stands between the products stays in its cache."""
    step = max(1, CHUNK // max(1, qkv[:1].numel())) if qkv.device.type == "cpu" else max(1, len(qkv))
    return [slice(first, first + step) for first in range(0, len(qkv), step)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, bias, scale, *ctx.geometry = inputs
    ctx.save_for_backward(qkv, bias, scale)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, *ctx.geometry), None, None, None


register_autograd("local_attention", _forward, _backward, _differentiate, _save)
