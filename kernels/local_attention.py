"""Windowed cosine attention straight from packed projections, forward and backward; memory-bound.

A program has a head and a tile of windows: one of 16 tokens, several smaller ones one under the other. One product
gives the logits of all pairs of rows, of which those within a window count. (Four windows of 16 in a tile of 64 rows
took twice the instructions a row, and 64 rows spilled in the backward.) Windows, shifts and the wrap are places that
rows are read from and written to: nothing is rolled, cut or copied. The backward walks over its windows, computes their
weights again and adds the gradients of bias and scale up in registers; what the programs of a head have found is
added in a second step, in a fixed order.

Names beside those of common.py:
  slot, SLOTS      place in a window, and how many a window has in the tile: W, up to a power of two
  token            the token of each row, in the grid's own order
  region           which side of the wrap of rows and of columns it is on
  rq, rk           1 / length of queries and of keys
  biases           tile of the bias
  cosine, ds       of all pairs of rows; ds is 0 where they are not of one window
  dbias, dscales   partial sums, those of a program side by side
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from avfast.kernels.common import block_of, interpreted, launch, precision, unit_stride
from torch import Tensor

ROWS = 16  # of a tile, or those of one window if it has more
PROGRAMS = 2048  # about how many share the backward: more than an H100 or H200 runs at once
LEAST_NORM = tl.constexpr(1e-6)


@triton.jit
def window_rows(
    first, windows, rows, columns, shift_rows, shift_columns,
    W0: tl.constexpr, W1: tl.constexpr, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Of the ``BLOCK_M`` rows from window ``first`` on: sample, token and region, whether they exist, slot, window."""
    row = tl.arange(0, BLOCK_M)
    slot = row % SLOTS
    window = first + row // SLOTS
    live = (window < windows) & (slot < W0 * W1)
    per_sample = (rows // W0) * (columns // W1)
    sample, place = window // per_sample, window % per_sample
    r = place // (columns // W1) * W0 + slot // W1 + shift_rows
    c = place % (columns // W1) * W1 + slot % W1 + shift_columns
    region = (r >= rows).to(tl.int32) * 2 + (c >= columns).to(tl.int32)
    token = tl.where(r >= rows, r - rows, r) * columns + tl.where(c >= columns, c - columns, c)
    return sample.to(tl.int64), token.to(tl.int64), region, live, slot, window


@triton.jit
def load_rows(pointer, place, live, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """``(M, BLOCK_D)`` values of rows that begin at ``place``; zeros from column ``D`` on and in dead rows."""
    d = tl.arange(0, BLOCK_D)
    x = tl.load(pointer + place[:, None] + d[None, :], live[:, None] & (d < D)[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def store_rows(pointer, x, place, live, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes the live rows of ``x``, up to column ``D``."""
    d = tl.arange(0, BLOCK_D)
    tl.store(pointer + place[:, None] + d[None, :], x.to(pointer.dtype.element_ty), live[:, None] & (d < D)[None, :])


@triton.jit
def window_weights(
    q, k, biases, scale, region, window, slot,
    W: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax ``(M, M)`` over the keys of a query's window, cosines, and 1 / length of queries and of keys ``(M,)``."""
    wide_q, wide_k = q.to(tl.float32), k.to(tl.float32)
    rq = 1.0 / tl.maximum(tl.sqrt(tl.sum(wide_q * wide_q, 1)), LEAST_NORM)
    rk = 1.0 / tl.maximum(tl.sqrt(tl.sum(wide_k * wide_k, 1)), LEAST_NORM)
    cosine = tl.dot(q, tl.trans(k), input_precision=PRECISION) * rq[:, None] * rk[None, :]
    s = cosine * scale + biases
    if SHIFTED:
        s += tl.where(region[:, None] != region[None, :], -100.0, 0.0)
    # Rows that do not exist see the slots of their own window too, which hold zeros: finite, and stored nowhere.
    s = tl.where((window[:, None] == window[None, :]) & (slot < W)[None, :], s, -float("inf"))
    p = tl.exp(s - tl.max(s, 1)[:, None])
    return p / tl.sum(p, 1)[:, None], cosine, rq, rk


@triton.jit
def load_bias(bias, head, slot, W: tl.constexpr):
    """``(M, M)`` bias of the slots of queries and keys."""
    inside = (slot < W)[:, None] & (slot < W)[None, :]
    return tl.load(bias + head * W * W + slot[:, None] * W + slot[None, :], inside, other=0.0)


@triton.jit(
    do_not_specialize=["windows", "rows", "columns", "shift_rows", "shift_columns"],
    do_not_specialize_on_alignment=["bias", "scales"],
)
def local_forward_kernel(
    qkv, bias, scales, out, windows, rows, columns, shift_rows, shift_columns,
    heads, qkv_batch, qkv_row, qkv_part, qkv_head, out_batch, out_row, out_head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, SHIFTED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads  # heads are neighbours: they share the lines of memory that tokens lie in
    first = tl.program_id(0) // heads * (BLOCK_M // SLOTS)
    sample, token, region, live, slot, window = window_rows(
        first, windows, rows, columns, shift_rows, shift_columns, W0, W1, SLOTS, BLOCK_M
    )
    place = sample * qkv_batch + token * qkv_row + head * qkv_head
    q = load_rows(qkv, place, live, D, BLOCK_D, UPCAST)  # (M, D)
    k = load_rows(qkv + qkv_part, place, live, D, BLOCK_D, UPCAST)
    v = load_rows(qkv + 2 * qkv_part, place, live, D, BLOCK_D, UPCAST)
    biases, scale = load_bias(bias, head, slot, W0 * W1), tl.load(scales + head)
    p, _, _, _ = window_weights(q, k, biases, scale, region, window, slot, W0 * W1, SHIFTED, PRECISION)
    o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    store_rows(out, o, sample * out_batch + token * out_row + head * out_head, live, D, BLOCK_D)


@triton.jit(
    do_not_specialize=["windows", "rows", "columns", "shift_rows", "shift_columns", "per_program"],
    do_not_specialize_on_alignment=["bias", "scales", "dscales"],
)
def local_backward_kernel(
    grad, qkv, bias, scales, dqkv, dbias, dscales,
    windows, per_program, rows, columns, shift_rows, shift_columns,
    heads, grad_batch, grad_row, grad_head, qkv_batch, qkv_row, qkv_part, qkv_head,
    dqkv_batch, dqkv_row, dqkv_part, dqkv_head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, SHIFTED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = W0 * W1
    GROUP: tl.constexpr = BLOCK_M // SLOTS
    head, program = tl.program_id(0) % heads, tl.program_id(0) // heads
    slots = tl.arange(0, BLOCK_M) % SLOTS
    biases, scale = load_bias(bias, head, slots, W), tl.load(scales + head)
    acc_bias = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    acc_scale = tl.zeros((BLOCK_M,), tl.float32)
    begin = program * per_program
    for first in range(begin, tl.minimum(begin + per_program, windows), GROUP):
        sample, token, region, live, slot, window = window_rows(
            first, windows, rows, columns, shift_rows, shift_columns, W0, W1, SLOTS, BLOCK_M
        )
        place = sample * qkv_batch + token * qkv_row + head * qkv_head
        q = load_rows(qkv, place, live, D, BLOCK_D, UPCAST)  # (M, D)
        k = load_rows(qkv + qkv_part, place, live, D, BLOCK_D, UPCAST)
        v = load_rows(qkv + 2 * qkv_part, place, live, D, BLOCK_D, UPCAST)
        do = load_rows(grad, sample * grad_batch + token * grad_row + head * grad_head, live, D, BLOCK_D, UPCAST)
        p, cosine, rq, rk = window_weights(q, k, biases, scale, region, window, slot, W, SHIFTED, PRECISION)
        to = sample * dqkv_batch + token * dqkv_row + head * dqkv_head
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
        store_rows(dqkv + 2 * dqkv_part, dv, to, live, D, BLOCK_D)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])  # (M, M)
        acc_bias += ds
        along = ds * cosine
        along_q, along_k = tl.sum(along, 1), tl.sum(along, 0)  # (M,)
        acc_scale += along_q
        wide_q, wide_k = q.to(tl.float32), k.to(tl.float32)
        unit_q, unit_k = wide_q * rq[:, None], wide_k * rk[:, None]
        # A vector shorter than the least norm is divided by that, and has no direction to keep.
        along_q = tl.where(tl.sum(wide_q * wide_q, 1) > LEAST_NORM * LEAST_NORM, along_q, 0.0)
        along_k = tl.where(tl.sum(wide_k * wide_k, 1) > LEAST_NORM * LEAST_NORM, along_k, 0.0)
        half = ds.to(q.dtype)
        dq = tl.dot(half, unit_k.to(q.dtype), input_precision=PRECISION) - unit_q * along_q[:, None]
        store_rows(dqkv, dq * (scale * rq)[:, None], to, live, D, BLOCK_D)
        dk = tl.dot(tl.trans(half), unit_q.to(q.dtype), input_precision=PRECISION) - unit_k * along_k[:, None]
        store_rows(dqkv + dqkv_part, dk * (scale * rk)[:, None], to, live, D, BLOCK_D)
    # Only the blocks on the diagonal, one per window of the tile, are not 0.
    part = tl.sum(tl.sum(tl.reshape(acc_bias, (GROUP, SLOTS, GROUP, SLOTS)), 2), 0)  # (SLOTS, SLOTS)
    i = tl.arange(0, SLOTS)
    where = tl.program_id(0).to(tl.int64) * W * W + i[:, None] * W + i[None, :]
    tl.store(dbias + where, part, (i < W)[:, None] & (i < W)[None, :])
    tl.store(dscales + tl.program_id(0), tl.sum(acc_scale, 0))


KERNELS = {"forward": local_forward_kernel, "backward": local_backward_kernel}


def constants(dim: int, window: list[int], shift: list[int]) -> dict[str, int | bool | str]:
    """Compile-time arguments and options."""
    slots = triton.next_power_of_2(window[0] * window[1])
    tile, block = max(ROWS, slots), block_of(dim)
    warps = tile // 16 * (1 if block <= 32 else 2 if block <= 64 else 4)
    return {
        "D": dim, "BLOCK_D": block, "W0": window[0], "W1": window[1], "SLOTS": slots, "BLOCK_M": tile,
        "SHIFTED": any(shift), "UPCAST": interpreted(), "PRECISION": precision(),
        "num_warps": min(warps, 8), "num_stages": 1,
    }  # fmt: skip


def forward(qkv: Tensor, bias: Tensor, scale: Tensor, grid: list[int], window: list[int], shift: list[int]) -> Tensor:
    """``(B, N, H, D)``."""
    qkv, bias, scale = unit_stride(qkv), bias.contiguous(), scale.contiguous()
    batch, tokens, _, heads, dim = qkv.shape
    out = qkv.new_empty((batch, tokens, heads, dim))
    fixed = constants(dim, window, shift)
    windows = batch * tokens // (window[0] * window[1])
    launch(
        local_forward_kernel, triton.cdiv(windows, fixed["BLOCK_M"] // fixed["SLOTS"]) * heads,
        qkv, bias, scale, out, windows, *grid, *shift, heads, *qkv.stride()[:4], *out.stride()[:3], **fixed,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor, qkv: Tensor, bias: Tensor, scale: Tensor, grid: list[int], window: list[int], shift: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, bias and scale."""
    grad, qkv, bias, scale = unit_stride(grad), unit_stride(qkv), bias.contiguous(), scale.contiguous()
    batch, tokens, _, heads, dim = qkv.shape
    out = qkv.new_empty(qkv.shape)
    fixed = constants(dim, window, shift)
    windows, group = batch * tokens // (window[0] * window[1]), fixed["BLOCK_M"] // fixed["SLOTS"]
    per_program = triton.cdiv(triton.cdiv(windows, group), max(1, PROGRAMS // heads)) * group
    programs = triton.cdiv(windows, per_program) if windows else 0
    dbias = qkv.new_empty((programs, *bias.shape), dtype=torch.float32)
    dscales = qkv.new_empty((programs, heads), dtype=torch.float32)
    launch(
        local_backward_kernel, programs * heads,
        grad, qkv, bias, scale, out, dbias, dscales, windows, per_program, *grid, *shift, heads,
        *grad.stride()[:3], *qkv.stride()[:4], *out.stride()[:4], **fixed,
    )  # fmt: skip
    return out, dbias.sum(0), dscales.sum(0)
