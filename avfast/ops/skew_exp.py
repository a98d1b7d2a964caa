"""Exponentials of skew-symmetric matrices: orthogonal matrices from free parameters, a batch at a time.

With K = triu(A, 1) - triu(A, 1)^T the result is Q = exp(K), a rotation (Lee et al., Parameter efficient multimodal
transformers, section 3.2: Sigma of the low-rank factors; Lezcano-Casado and Martinez-Rubio, Cheap orthogonal
constraints). PyTorch's own ``matrix_exp`` knows nothing of K's structure, reads norms on the host to choose its method,
and differentiates through the exponential of a matrix of twice the size.

Forward, for X = K / 2^s with spectral norm at most theta. K^4 has every eigenvalue sigma^4 twice, so
(|K^4|_F / sqrt 2)^(1/4) bounds the largest sigma, at most (n/2)^(1/8) above it, and gives s. X^2 is symmetric with
eigenvalues in [-theta^2, 0], so that Chebyshev polynomials T_k of T_1 = I + 2 X^2 / theta^2 are bounded by 1 and
  exp(X) = sum_k c_k T_k + X sum_k d_k T_k,   k = 0..6,
c and d those of cos and sin(x) / x, reaches rounding with theta = 3.6 in float32: six products with those of the bound.
Then s squarings, and one Newton-Schulz step, Q + Q (I - Q^T Q) / 2, which takes back what they lost of orthogonality.

Backward is the reverse of that from the stored powers, with ten products: a square Y^2 of a symmetric or skew Y needs
one and not two, as what G Y + Y G gives to a symmetric or skew argument is Z + Z^T or Z - Z^T, Z = G Y, once G is
symmetric. The Newton-Schulz step is skipped: at an orthogonal matrix it only projects onto directions that the
exponential has anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from avfast import backend
from avfast.ops._shared import register_autograd, without_autocast

# Largest norm of a polynomial's argument, and how often its value is squared at most: 3.6 * 2^9 = 0.9 * 2^11.
THETA = {torch.float32: 3.6, torch.float64: 0.9}
SQUARINGS = {torch.float32: 9, torch.float64: 11}
_TERMS = 7  # of each polynomial: what _series and its reverse are written for


def skew_exp(a: Tensor) -> Tensor:
    """``exp(K)`` with ``K = triu(a, 1) - triu(a, 1).mT``.

    Computed in float32 whatever autocast and the TF32 switches say (in float64 for float64 input). It never waits for
    the device, so a CUDA graph can hold it; there the largest number of squarings is always computed, and masked, while
    a CPU does as many as the batch needs. The gradient is one more operator: it cannot be differentiated again, and
    ``torch.func`` transforms do not pass through.

    Args:
        a: ``(..., n, n)``; what is not above the diagonal is not read and has zero gradient.

    Returns:
        ``(..., n, n)`` in at least float32. A matrix whose norm may be too large is NaN, in value and gradient, and
        leaves the others of the batch as they are: none of spectral norm up to 1000 with n up to 256, all above 1843.

    Raises:
        ValueError: when ``a`` is not square, or not floating point.
    """
    if a.ndim < 2 or a.shape[-1] != a.shape[-2] or not a.is_floating_point():
        raise ValueError(f"skew_exp takes floating-point matrices (..., n, n), got {tuple(a.shape)} {a.dtype}")
    matrices = a.to(torch.promote_types(a.dtype, torch.float32)).reshape(a.shape[:-2].numel(), *a.shape[-2:])
    if backend.inlined(a):  # an exported program cannot write into parts of a tensor, as the eager body does
        upper = matrices.triu(1)
        return torch.linalg.matrix_exp(upper - upper.mT).reshape(a.shape)
    return _forward(matrices)[0].reshape(a.shape)


@contextmanager
def _full_precision(a: Tensor) -> Iterator[None]:
    """Matrix products of ``a``'s device in float32 and not in TF32 or bfloat16, and no autocast."""
    matmul = (torch.backends.cuda if a.device.type == "cuda" else torch.backends.mkldnn).matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with without_autocast(a):
            yield
    finally:
        matmul.fp32_precision = before


@cache
def _coefficients(theta: float) -> tuple[list[float], list[float]]:
    """Chebyshev coefficients on y = T_1 in [-1, 1] of cos(x) and sin(x) / x, where x^2 = theta^2 (1 - y) / 2."""
    count = 64
    angles = [math.pi * (j + 0.5) / count for j in range(count)]
    arguments = [theta * math.sin(angle / 2) for angle in angles]
    found = []
    for values in ([math.cos(x) for x in arguments], [math.sin(x) / x for x in arguments]):
        sums = [sum(v * math.cos(k * t) for v, t in zip(values, angles, strict=True)) for k in range(_TERMS)]
        found.append([(1 if k == 0 else 2) / count * total for k, total in enumerate(sums)])
    return found[0], found[1]


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.mT).mul_(0.5)


def _add_identity(x: Tensor, factor: float) -> Tensor:
    x.diagonal(dim1=-2, dim2=-1).add_(factor)
    return x


def _high(powers: Tensor, c: list[float], out: Tensor | None = None) -> Tensor:
    """What T_3 is multiplied by in a series: T_(3+k) = 2 T_3 T_k - T_(3-k)."""
    high = torch.mul(powers[1], 2 * c[4], out=out).add_(powers[2], alpha=2 * c[5]).add_(powers[3], alpha=2 * c[6])
    return _add_identity(high, c[3])


def _series(powers: Tensor, c: list[float]) -> Tensor:
    """sum c_k T_k from T_1, T_2 and T_3."""
    low = (powers[1] * (c[1] - c[5])).add_(powers[2], alpha=c[2] - c[4])
    return _add_identity(low, c[0] - c[6]).baddbmm_(powers[3], _high(powers, c))


def _steps(scale: Tensor) -> int:
    """How many squarings are computed; only a CPU looks at the values."""
    if scale.device.type != "cpu":
        return SQUARINGS[scale.dtype]
    return round(-math.log2(scale.nan_to_num(1.0).min().item())) if scale.numel() else 0


def _squared(scale: Tensor, step: int) -> Tensor:
    """``(B, 1, 1)``: which matrices need more than ``step`` squarings."""
    return scale < 2 ** -(step + 0.5)


@torch.library.custom_op("avfast::skew_exp", mutates_args=())
def _forward(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(K) ``(B, n, n)``; X, T_1, T_2, T_3, sin(X) / X and what each squaring squares ``(5 + squarings, B, n, n)``;
    the scale 2^-s ``(B, 1, 1)``, NaN where the norm is too large."""
    theta, most = THETA[a.dtype], SQUARINGS[a.dtype]
    even, odd = _coefficients(theta)
    powers = a.new_empty(5 + most, *a.shape)
    x, t1, t2, t3 = powers[:4]
    with _full_precision(a):
        upper = a.triu(1)
        torch.sub(upper, upper.mT, out=x)
        square = torch.bmm(x, x)
        fourth = torch.bmm(square, square)
        bound = (torch.linalg.matrix_norm(fourth)[:, None, None] / math.sqrt(2)).sqrt().sqrt()
        scale = (bound / theta).log2().ceil().clamp(0, most).neg().exp2()
        scale = scale.masked_fill(~(bound <= theta * 2**most), torch.nan)
        unit = (scale / theta).square()
        x.mul_(scale)
        _add_identity(torch.mul(square, 2 * unit, out=t1), 1)
        _add_identity(torch.mul(square, 8 * unit, out=t2).addcmul_(fourth, 8 * unit.square()), 1)
        torch.baddbmm(t1, t1, t2, beta=-1, alpha=2, out=t3)
        powers[4] = _series(powers, odd)
        q = _series(powers, even).baddbmm_(x, powers[4])
        steps = _steps(scale)
        for step in range(steps):
            power = powers[5 + step].copy_(q)
            torch.where(_squared(scale, step), torch.bmm(power, power, out=q), power, out=q)
        if steps:
            gap = _add_identity(torch.bmm(q.mT, q), -1)
            torch.where(_squared(scale, 0), torch.baddbmm(q, q, gap, alpha=-0.5), q, out=q)
    return q, powers, scale


@_forward.register_fake
def _(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    powers = a.new_empty(5 + SQUARINGS[a.dtype], *a.shape)
    return a.new_empty(a.shape), powers, a.new_empty(a.shape[0], 1, 1)


@torch.library.custom_op("avfast::skew_exp_backward", mutates_args=())
def _backward(grad: Tensor, a: Tensor, powers: Tensor, scale: Tensor) -> Tensor:
    """Gradient of a, which is here so that a second derivative is refused and not silently left out."""
    theta = THETA[a.dtype]
    even, odd = _coefficients(theta)
    x, t1, t2, t3, sinc = powers[:5]
    # Fresh memory costs a CPU as much as a pass over it, so everything is computed in these.
    grad1, grad2, grad3, of_root, other = (torch.zeros_like(a) for _ in range(5))
    with _full_precision(a):
        for step in reversed(range(_steps(scale))):
            q = powers[5 + step].mT
            squared = torch.bmm(grad, q, out=other).baddbmm_(q, grad)
            grad = torch.where(_squared(scale, step), squared, grad, out=of_root)
        minus = torch.bmm(x, grad)  # minus the gradient of sin(X) / X
        for part, c in ((grad, even), (minus, [-value for value in odd])):
            torch.bmm(t3, part, out=other)
            grad1.add_(part, alpha=c[1] - c[5]).add_(other, alpha=2 * c[4])
            grad2.add_(part, alpha=c[2] - c[4]).add_(other, alpha=2 * c[5])
            grad3.add_(other, alpha=2 * c[6]).baddbmm_(part, _high(powers, c, out=other))
        grad1.sub_(grad3).baddbmm_(grad3, t2, alpha=2)  # T_3 = 2 T_1 T_2 - T_1
        grad2.baddbmm_(t1, grad3, alpha=2)
        grad1.baddbmm_(torch.add(grad2, grad2.mT, out=other), t1, alpha=2)  # T_2 = 2 T_1^2 - I
        square = torch.add(grad1, grad1.mT, out=other)
        half = torch.bmm(grad, sinc, out=grad3).baddbmm_(square, x, alpha=-2 / theta**2)
        return torch.sub(half, half.mT, out=grad2).mul_(scale).triu_(1)


@_backward.register_fake
def _(grad: Tensor, a: Tensor, powers: Tensor, scale: Tensor) -> Tensor:
    return a.new_empty(a.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, powers, scale = output
    ctx.save_for_backward(*inputs, powers, scale)
    ctx.mark_non_differentiable(powers, scale)
    ctx.set_materialize_grads(False)  # the other two have none


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> Tensor:
    return _backward(grad, *ctx.saved_tensors)


register_autograd("skew_exp", _forward, _backward, _differentiate, _save)
