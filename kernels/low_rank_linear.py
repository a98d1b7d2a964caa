"""A low-rank linear layer with a normalisation between its factors: each pass one kernel for all that needs no sum over
tokens.

A program of the forward has a tile of tokens and a chunk: it walks over the columns of x for z, whose rows lie whole in
its registers, normalises them there, and walks over columns of the output. Few tokens would leave most multiprocessors
idle, so the output's columns are split among programs, each of which computes z again. n is stored from registers where
a backward pass will want it for its product with the gradient, and is not read here.

The backward's program walks over the gradient's columns for dn and takes the derivative of the normalisation in
registers. The products that sum over tokens, and dz V, are PyTorch's: n and dz have to be in memory for those anyway.

Names beside those of common.py:
  split, splits   which of so many parts of the output's columns a program has
  steps           tiles of columns in a part
  vs, gs          tiles (R, K) of V and (R, N) of G
  z, dn, ns       (M, R), the last in the inputs' dtype
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from avfast.kernels.common import block_of, interpreted, launch, precision, unit_stride
from torch import Tensor

PROGRAMS = 132  # about how many at once: an H100 or H200 has as many multiprocessors
LEAST_NORM = tl.constexpr(1e-12)


@triton.jit
def load_columns(pointer, row, live, stride, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    """``(rows, BLOCK)`` values from column ``first``; zeros from column ``WIDTH`` on and in rows that are not live."""
    column = first + tl.arange(0, BLOCK)
    inside = column < WIDTH if WIDTH % BLOCK else column >= 0
    x = tl.load(pointer + row[:, None] * stride + column[None, :], live[:, None] & inside[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit(do_not_specialize=["rows", "splits", "steps"], do_not_specialize_on_alignment=["bias", "length"])
def low_rank_forward_kernel(
    x, v, g, bias, out, n, length, rows, splits, steps, x_row,
    CHUNKS: tl.constexpr, IN: tl.constexpr, RANK: tl.constexpr, OUT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, KEEP: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0) % splits  # programs of a tile are neighbours: they read the same x
    chunk = tl.program_id(0) // splits % CHUNKS
    row = (tl.program_id(0) // splits // CHUNKS * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    live = row < rows
    rank = tl.arange(0, BLOCK_R)
    ranked = rank < RANK
    z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, IN, BLOCK_K):
        xs = load_columns(x, row, live, x_row, k, IN, BLOCK_K, UPCAST)
        vs = load_columns(v + chunk * RANK * IN, rank, ranked, IN, k, IN, BLOCK_K, UPCAST)
        z = tl.dot(xs, tl.trans(vs), z, input_precision=PRECISION)
    norm = tl.maximum(tl.sqrt(tl.sum(z * z, 1)), LEAST_NORM)  # (M,)
    ns = (z / norm[:, None]).to(n.dtype.element_ty)
    where = row * CHUNKS + chunk
    if KEEP:
        if split == 0:
            tl.store(n + where[:, None] * RANK + rank[None, :], ns, live[:, None] & ranked[None, :])
            tl.store(length + where, norm, live)
    if UPCAST:
        ns = ns.to(tl.float32)
    begin = split * steps
    end = tl.minimum(begin + steps, tl.cdiv(OUT, BLOCK_N))
    for step in range(begin, end):
        gs = load_columns(g + chunk * RANK * OUT, rank, ranked, OUT, step * BLOCK_N, OUT, BLOCK_N, UPCAST)
        column = step * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = column < OUT
        y = tl.dot(ns, gs, input_precision=PRECISION) + tl.load(bias + chunk * OUT + column, inside, other=0.0)[None, :]
        mask = live[:, None] & inside[None, :]
        tl.store(out + where[:, None] * OUT + column[None, :], y.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["length"])
def low_rank_backward_kernel(
    grad, g, n, length, dz, rows, grad_row, grad_part,
    CHUNKS: tl.constexpr, RANK: tl.constexpr, OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0) % CHUNKS
    row = (tl.program_id(0) // CHUNKS * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    live = row < rows
    rank = tl.arange(0, BLOCK_R)
    ranked = rank < RANK
    dn = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in range(0, OUT, BLOCK_N):
        do = load_columns(grad + chunk * grad_part, row, live, grad_row, first, OUT, BLOCK_N, UPCAST)
        gs = load_columns(g + chunk * RANK * OUT, rank, ranked, OUT, first, OUT, BLOCK_N, UPCAST)
        dn = tl.dot(do, tl.trans(gs), dn, input_precision=PRECISION)
    where = row * CHUNKS + chunk
    norm = tl.load(length + where, live, other=1.0)
    mask = live[:, None] & ranked[None, :]
    place = where[:, None] * RANK + rank[None, :]
    ns = tl.load(n + place, mask, other=0.0).to(tl.float32)
    # A vector shorter than the least norm is divided by that, and has no direction to keep.
    along = tl.where(norm > LEAST_NORM, tl.sum(dn * ns, 1), 0.0)
    out = (dn - ns * along[:, None]) / norm[:, None]
    tl.store(dz + place, out.to(dz.dtype.element_ty), mask)


KERNELS = {"forward": low_rank_forward_kernel, "backward": low_rank_backward_kernel}


def constants(
    name: str, chunks: int, width: int, rank: int, out: int, dtype: torch.dtype
) -> dict[str, int | bool | str]:
    """Compile-time arguments and options of a kernel."""
    block = block_of(rank)
    # In float32 n is twice in the registers, as the two halves of which TF32 products are made.
    rows, columns = (64, 64) if dtype != torch.float32 else (32 if block <= 64 else 16, 32)
    chosen = {
        "CHUNKS": chunks, "RANK": rank, "OUT": out, "BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_R": block,
        "UPCAST": interpreted(), "PRECISION": precision(),
        "num_warps": 8 if rows * block > 64 * 128 else 4, "num_stages": 3,
    }  # fmt: skip
    return chosen | ({"IN": width, "BLOCK_K": columns, "KEEP": True} if name == "forward" else {})


def forward(x: Tensor, v: Tensor, g: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y ``(T, C, O)``, n ``(T, C, r)`` and its divisors ``(T, C)``; the last two empty unless kept."""
    x, v, g, bias = unit_stride(x), v.contiguous(), g.contiguous(), bias.contiguous()
    rows, (chunks, rank, width) = x.shape[0], g.shape
    out = x.new_empty((rows, chunks, width))
    n, length = x.new_empty((rows * keep, chunks, rank)), bias.new_empty((rows * keep, chunks))
    fixed = constants("forward", chunks, x.shape[1], rank, width, x.dtype) | {"KEEP": keep}
    tiles, columns = triton.cdiv(rows, fixed["BLOCK_M"]) * chunks, triton.cdiv(width, fixed["BLOCK_N"])
    steps = triton.cdiv(columns, min(columns, max(1, PROGRAMS // max(1, tiles))))
    splits = triton.cdiv(columns, steps)
    launch(
        low_rank_forward_kernel, tiles * splits,
        x, v, g, bias, out, n, length, rows, splits, steps, x.stride(0), **fixed,
    )  # fmt: skip
    return out, n, length


def backward(grad: Tensor, g: Tensor, n: Tensor, length: Tensor) -> Tensor:
    """dz ``(T, C, r)``."""
    grad, g, n, length = unit_stride(grad), g.contiguous(), n.contiguous(), length.contiguous()
    rows, (chunks, rank, width) = grad.shape[0], g.shape
    dz = n.new_empty(n.shape)
    fixed = constants("backward", chunks, 0, rank, width, n.dtype)
    launch(
        low_rank_backward_kernel, triton.cdiv(rows, fixed["BLOCK_M"]) * chunks,
        grad, g, n, length, dz, rows, *grad.stride()[:2], **fixed,
    )  # fmt: skip
    return dz
