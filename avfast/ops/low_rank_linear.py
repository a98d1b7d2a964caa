"""A linear layer whose weight has low rank and whose input is normalised between the two factors, as in AVBERT.

For a token x of width I, V of shape (r, I), G of shape (r, O) and a bias b of width O
  z = x V^T,   n = z / max(|z|, 1e-12),   y = n G + b
(Lee et al., ICLR 2021, "Sharing across Transformers": W = U Sigma V, with V and Sigma private to a transformer and U
shared, and V x put on the unit sphere, for which reason the factors cannot become one matrix; the least norm is the
released code's. For tokens as rows G = Sigma U^T, folded once for all tokens and layers.) Chunk c of several has r rows
of V and a G and a bias of its own and is normalised by itself, so that queries, keys and values share one wide product
with x. With dn = dy G^T
  dz = (dn - n (n . dn)) / |z|, or dn / 1e-12 where |z| is below that,
  dx = dz V,   dV = dz^T x,   dG = n^T dy,   db = sum of dy.
n and |z| are kept for the backward pass when there is to be one.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avfast import backend
from avfast.ops._shared import at_least_float32, autocast_dtype, register_autograd

LEAST_NORM = 1e-12


def low_rank_linear(x: Tensor, v: Tensor, g: Tensor, bias: Tensor) -> Tensor:
    """``normalize(x v^T) g + bias``.

    Products are of the dtype of x, or under autocast of its dtype, norms of float32 (float64 for float64 inputs). v, g
    and bias are cast to that dtype at every call: who uses them for many layers casts v and g once. The gradient is one
    more operator: it cannot be differentiated again, and ``torch.func`` transforms do not pass through.

    Args:
        x: ``(..., I)``.
        v: ``(r, I)``, or ``(C r, I)`` for C chunks, one under the other.
        g: ``(r, O)``, or ``(C, r, O)``.
        bias: ``(O,)``, or ``(C, O)``.

    Returns:
        ``(..., O)``, or ``(..., C, O)``, in the dtype of the products.

    Raises:
        ValueError: on shapes that do not fit, and on tensors that are not floating point.
    """
    chunked = g.ndim == 3
    if g.ndim not in (2, 3) or bias.shape != (*g.shape[:-2], g.shape[-1]):
        raise ValueError(
            f"g must be (r, O) and bias (O,), or (C, r, O) and (C, O), got {tuple(g.shape)} and {tuple(bias.shape)}"
        )
    if x.ndim < 1 or v.shape != (g.shape[:-1].numel(), x.shape[-1]):
        raise ValueError(
            f"v must be {(g.shape[:-1].numel(), *x.shape[-1:])}, a row for each of {tuple(g.shape)} and the width of x "
            f"{tuple(x.shape)}, got {tuple(v.shape)}"
        )
    at_least_float32(x, v, g, bias)
    dtype = autocast_dtype(x)
    x, v, g = x.to(dtype), v.to(dtype), g.to(dtype)
    bias = bias.to(at_least_float32(x))
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, v, g, bias))
    shape = (*x.shape[:-1], *bias.shape)
    if not chunked:
        g, bias = g[None], bias[None]
    rows = x.reshape(-1, x.shape[-1])
    if backend.inlined(x):
        return _plain(rows, v, g, bias).reshape(shape)
    return _forward(rows, v, g, bias, keep)[0].view(shape)


def _plain(x: Tensor, v: Tensor, g: Tensor, bias: Tensor) -> Tensor:
    """The same in operators that leave their inputs as they are, as exported programs have them."""
    z = (x @ v.mT).unflatten(1, g.shape[:2]).to(bias.dtype)
    n = F.normalize(z, dim=-1, eps=LEAST_NORM).to(x.dtype)
    return torch.baddbmm(bias.to(x.dtype)[:, None], n.transpose(0, 1), g).transpose(0, 1)


def _uses_onednn(x: Tensor) -> bool:
    """Whether float32 products on a CPU are oneDNN's.

    PyTorch's own are MKL's, which leaves the widest vectors of some processors unused (AMD's; benchmarks/low_rank.py
    compares).
    """
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0 and _has_onednn()


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``."""
    if not _uses_onednn(x):
        return F.linear(x, weight, bias)
    # It is slow, or wrong, for layouts other than these two.
    x, weight = (t.contiguous() if t.stride(1) == 1 else t.mT.contiguous().mT for t in (x, weight))
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _products(x: Tensor, weight: Tensor, bias: Tensor | None = None, chunk_axis: int = 0) -> Tensor:
    """That of each chunk: ``(C, N, I), (C, O, I), (C, O) -> (C, N, O)``, or with the chunks along another axis."""
    if _uses_onednn(x):
        biases = [None] * len(x) if bias is None else bias
        parts = [_product(*each) for each in zip(x, weight, biases, strict=True)]
        return torch.stack(parts, chunk_axis) if len(parts) > 1 else parts[0].unsqueeze(chunk_axis)
    shape = [x.shape[1], weight.shape[1]]
    shape.insert(chunk_axis, len(x))
    out = x.new_empty(shape)
    by_chunk = out.movedim(chunk_axis, 0)
    if bias is None:
        torch.bmm(x, weight.mT, out=by_chunk)
    else:
        torch.baddbmm(bias[:, None], x, weight.mT, out=by_chunk)
    return out


@torch.library.custom_op("avfast::low_rank_linear", mutates_args=())
def _forward(x: Tensor, v: Tensor, g: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y ``(T, C, O)``, n ``(T, C, r)`` and max(|z|, 1e-12) ``(T, C)``; the last two are empty unless kept."""
    if backend.use_kernels("low_rank_linear", g.mT):
        from avfast.kernels import low_rank_linear as kernels

        return kernels.forward(x, v, g, bias, keep)
    z = _product(x, v).unflatten(1, g.shape[:2])
    length = torch.linalg.vector_norm(z, dim=-1, dtype=bias.dtype).clamp_(min=LEAST_NORM)
    n = z.div_(length[..., None]) if z.dtype == length.dtype else (z / length[..., None]).to(z.dtype)
    out = _products(n.transpose(0, 1), g.mT, bias.to(x.dtype), chunk_axis=1)
    return (out, n, length) if keep else (out, *_nothing(x, g, bias))


def _nothing(x: Tensor, g: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What stands for n and |z| where they are not kept."""
    return x.new_empty((0, *g.shape[:2])), bias.new_empty((0, g.shape[0]))


@_forward.register_fake
def _(x: Tensor, v: Tensor, g: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[0]
    out = x.new_empty((rows, g.shape[0], g.shape[2]))
    if not keep:
        return out, *_nothing(x, g, bias)
    return out, x.new_empty((rows, *g.shape[:2])), bias.new_empty((rows, g.shape[0]))


@torch.library.custom_op("avfast::low_rank_linear_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, v: Tensor, g: Tensor, n: Tensor, length: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, v, g and bias."""
    if backend.use_kernels("low_rank_linear", g.mT):
        from avfast.kernels import low_rank_linear as kernels

        dz = kernels.backward(grad, g, n, length)
    else:
        dz = _products(grad.transpose(0, 1), g, chunk_axis=1)
        wide = dz.to(length.dtype)
        along = (wide * n).sum(-1, keepdim=True)
        # A vector that is shorter than the least norm is divided by that, and has no direction to keep.
        along *= (length > LEAST_NORM)[..., None]
        dz = wide.addcmul_(along, n.to(wide.dtype), value=-1).div_(length[..., None]).to(n.dtype)
    dz, grad_g = dz.flatten(1), _products(n.permute(1, 2, 0), grad.permute(1, 2, 0))
    return _product(dz, v.mT), _product(dz.mT, x.mT), grad_g, grad.sum(0, dtype=length.dtype)


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, v: Tensor, g: Tensor, n: Tensor, length: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias = length.new_empty((g.shape[0], g.shape[2]))
    return x.new_empty(x.shape), v.new_empty(v.shape), g.new_empty(g.shape), bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, v, g, *_ = inputs
    _, n, length = output
    ctx.save_for_backward(x, v, g, n, length)
    ctx.mark_non_differentiable(n, length)
    ctx.set_materialize_grads(False)  # n and |z| have none


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors), None


register_autograd("low_rank_linear", _forward, _backward, _differentiate, _save)
