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

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avfast import backend
from avfast.ops._shared import at_least_float32, autocast_dtype, register_autograd

LEAST_NORM = 1e-12
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def low_rank_linear(x: Tensor, v: Tensor, g: Tensor, bias: Tensor) -> Tensor | tuple[Tensor, ...]:
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
        ``(..., O)``, or with a third dimension of g a tuple of C of them, in the dtype of the products.

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
    shape = (*x.shape[:-1], bias.shape[-1])
    if not chunked:
        g, bias = g[None], bias[None]
    rows = x.reshape(-1, x.shape[-1])
    parts: Sequence[Tensor]
    if backend.inlined(x):
        parts = _plain(rows, v, g, bias).unbind()
    elif _uses_onednn(rows):
        parts = _OneDNN.apply(rows, v, g, bias)
    else:
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, v, g, bias))
        parts = _forward(rows, v, g, bias, keep)[0].unbind(1)
    return tuple(part.view(shape) for part in parts) if chunked else parts[0].view(shape)


def _plain(x: Tensor, v: Tensor, g: Tensor, bias: Tensor) -> Tensor:
    """The same in operators that leave their inputs as they are, as exported programs have them."""
    z = (x @ v.mT).unflatten(1, g.shape[:2]).to(bias.dtype)
    n = F.normalize(z, dim=-1, eps=LEAST_NORM).to(x.dtype)
    return torch.baddbmm(bias.to(x.dtype)[:, None], n.transpose(0, 1), g)


def _directions(z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """n, perhaps in the memory of z, and in ``dtype`` max(|z|, 1e-12)."""
    length = torch.linalg.vector_norm(z, dim=-1, dtype=dtype).clamp_(min=LEAST_NORM)
    return (z.div_(length[..., None]) if z.dtype == dtype else (z / length[..., None]).to(z.dtype)), length


def _through_norm(dn: Tensor, n: Tensor, length: Tensor) -> Tensor:
    """dz, perhaps in the memory of dn."""
    wide = dn.to(length.dtype)
    along = (wide * n).sum(-1, keepdim=True)
    # A vector that is shorter than the least norm is divided by that, and has no direction to keep.
    along *= (length > LEAST_NORM)[..., None]
    return wide.addcmul_(along, n.to(wide.dtype), value=-1).div_(length[..., None]).to(n.dtype)


@torch.library.custom_op("avfast::low_rank_linear", mutates_args=())
def _forward(x: Tensor, v: Tensor, g: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y ``(T, C, O)``, n ``(T, C, r)`` and max(|z|, 1e-12) ``(T, C)``; the last two are empty unless kept."""
    if backend.use_kernels("low_rank_linear", g.mT):
        from avfast.kernels import low_rank_linear as kernels

        return kernels.forward(x, v, g, bias, keep)
    n, length = _directions(F.linear(x, v).unflatten(1, g.shape[:2]), bias.dtype)
    out = x.new_empty((len(x), g.shape[0], g.shape[2]))
    torch.baddbmm(bias.to(x.dtype)[:, None], n.transpose(0, 1), g, out=out.transpose(0, 1))
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
        dn = n.new_empty(n.shape)
        torch.bmm(grad.transpose(0, 1), g.mT, out=dn.transpose(0, 1))
        dz = _through_norm(dn, n, length)
    dz, grad_g = dz.flatten(1), torch.bmm(n.permute(1, 2, 0), grad.transpose(0, 1))
    return dz @ v, dz.mT @ x, grad_g, grad.sum(0, dtype=length.dtype)


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


def _uses_onednn(x: Tensor) -> bool:
    """Whether :class:`_OneDNN` runs and not the operator, which compilers, fake tensors and counters look for."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.numel() == 0 or not _HAS_ONEDNN:
        return False
    watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return not watched and backend.which(x.device) == "reference"


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` of matrices that are contiguous or the transpose of one: it is wrong for other layouts."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


class _OneDNN(torch.autograd.Function):
    """The eager body with oneDNN's products, without the dispatcher, and with chunks that never lie in one tensor.

    PyTorch's own products are MKL's, which leaves the widest vectors of some processors unused (AMD's); in small steps
    dispatcher and copies count beside the products (benchmarks/low_rank.py and benchmarks/avbert.py compare).
    ``forward`` has x as rows ``(T, I)`` and the shapes of C chunks, and gives C times ``(T, O)``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, g: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        x, v, g, bias = x.contiguous(), v.contiguous(), g.contiguous(), bias.contiguous()
        n, length = _directions(_linear(x, v).unflatten(1, g.shape[:2]), bias.dtype)
        n = n.transpose(0, 1).contiguous()
        ctx.save_for_backward(x, v, g, n, length)
        return tuple(_linear(*each) for each in zip(n, g.mT, bias, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, v, g, n, length = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative, which the operator refuses
            return _backward(torch.stack(grads, 1), x, v, g, n.transpose(0, 1), length)
        grads = tuple(grad.contiguous() for grad in grads)
        dn = _stacked([_linear(grad, own) for grad, own in zip(grads, g, strict=True)], 1)
        dz = _through_norm(dn, n.transpose(0, 1), length).flatten(1)
        grad_g = _stacked([_linear(own.mT, grad.mT) for own, grad in zip(n, grads, strict=True)])
        return _linear(dz, v.mT), _linear(dz.mT, x.mT), grad_g, _stacked([grad.sum(0) for grad in grads])


def _stacked(parts: list[Tensor], dim: int = 0) -> Tensor:
    """``torch.stack`` that does not copy what is alone."""
    return torch.stack(parts, dim) if len(parts) > 1 else parts[0].unsqueeze(dim)
