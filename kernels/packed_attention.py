"""Attention within packed sequences, in Triton: one forward kernel, two backward kernels, no atomics.

A program owns one block of rows of one head and loops over the rows of the other side, so every element has one writer
and the result does not depend on the order in which programs run. Which block of which sequence, a work list says
(see :mod:`avfast.ops.packed_attention`): an item is (first row, end of its sequence, first and end of the other side's
rows), 16 bytes, so that a program's first loads wait for one load only. Items with nothing to do exit at once.

Softmax runs in base 2 with the scale folded into one multiply-add: p = 2^(c s - m), c = scale log2(e) > 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

HEAD_DIMS = (16, 32, 64, 80, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

WorkLists = Sequence[tuple[int, Tensor]]
"""(rows per item, ``(N, 4)`` int32 items) per length class, see :func:`avfast.ops.packed_attention.work_lists`."""


@triton.jit
def _rows(
    pointer, begin, end, stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr
):
    """``(BLOCK, BLOCK_D)`` rows from ``begin``; zeros from row ``end`` and from column ``D`` on."""
    i = tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = begin + i < end
    if D < BLOCK_D:
        mask = mask & (d < D)
    x = tl.load(pointer + tl.cast(begin, tl.int64) * stride + i * stride + d, mask=mask, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _store_rows(pointer, x, begin, end, stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    i = tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = begin + i < end
    if D < BLOCK_D:
        mask = mask & (d < D)
    tl.store(pointer + tl.cast(begin, tl.int64) * stride + i * stride + d, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _zero_rows(pointer, begin, end, stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    zeros = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK):
        _store_rows(pointer, zeros, start, end, stride, D, BLOCK, BLOCK_D)


@triton.jit
def _item(work, index, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """(first own row, end of the own rows, first other row, end of the other rows)."""
    entry = work + (index // SPLIT) * 4
    begin = tl.load(entry) + (index % SPLIT) * BLOCK
    return begin, tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit(do_not_specialize=["items", "rows"])
def forward_kernel(
    q, k, v, out, lse, work, boundary, q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head,
    heads, items, rows, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    index = tl.program_id(0) // heads
    out += head * out_head
    lse += head * rows
    if index == items:
        end = tl.load(boundary)
        _zero_rows(out, end, rows, out_row, D, BLOCK_M, BLOCK_D)
        for start in range(end, rows, BLOCK_M):
            i = start + tl.arange(0, BLOCK_M)
            tl.store(lse + i, float("-inf"), mask=i < rows)
        return
    begin, end, begin_k, end_k = _item(work, index, SPLIT, BLOCK_M)
    if begin >= end:
        return
    k += head * k_head
    v += head * v_head
    qs = _rows(q + head * q_head, begin, end, q_row, D, BLOCK_M, BLOCK_D, UPCAST)
    c = scale * 1.4426950408889634
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(begin_k, end_k, BLOCK_N):
        ks = _rows(k, start, end_k, k_row, D, BLOCK_N, BLOCK_D, UPCAST)
        vs = _rows(v, start, end_k, v_row, D, BLOCK_N, BLOCK_D, UPCAST)
        s = tl.dot(qs, tl.trans(ks), input_precision=PRECISION)
        s = tl.where((start + tl.arange(0, BLOCK_N) < end_k)[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * c)
        p = tl.exp2(s * c - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(vs.dtype), vs, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    # A sequence without keys: total stays 0, the output 0 and the log-sum-exp -inf.
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    _store_rows(out, acc, begin, end, out_row, D, BLOCK_M, BLOCK_D)
    i = begin + tl.arange(0, BLOCK_M)
    tl.store(lse + i, (top + tl.log2(total)) * 0.6931471805599453, mask=i < end)


@triton.jit(do_not_specialize=["items", "rows"])
def dq_kernel(
    grad, q, k, v, out, lse, delta, dq, work, boundary, grad_row, grad_head, q_row, q_head, k_row, k_head,
    v_row, v_head, out_row, out_head, dq_row, dq_head, heads, items, rows, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dQ of one block of queries of one head, and delta = sum_d dO O, which the other kernel needs as well."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    index = tl.program_id(0) // heads
    dq += head * dq_head
    if index == items:
        _zero_rows(dq, tl.load(boundary), rows, dq_row, D, BLOCK_M, BLOCK_D)
        return
    begin, end, begin_k, end_k = _item(work, index, SPLIT, BLOCK_M)
    if begin >= end:
        return
    k += head * k_head
    v += head * v_head
    i = begin + tl.arange(0, BLOCK_M)
    do = _rows(grad + head * grad_head, begin, end, grad_row, D, BLOCK_M, BLOCK_D, UPCAST)
    o = _rows(out + head * out_head, begin, end, out_row, D, BLOCK_M, BLOCK_D, UPCAST)
    de = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + head * rows + i, de, mask=i < end)
    qs = _rows(q + head * q_head, begin, end, q_row, D, BLOCK_M, BLOCK_D, UPCAST)
    c = scale * 1.4426950408889634
    # +inf makes p = 0 in rows beyond the sequence.
    top = tl.load(lse + head * rows + i, mask=i < end, other=float("inf")) * 1.4426950408889634
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(begin_k, end_k, BLOCK_N):
        ks = _rows(k, start, end_k, k_row, D, BLOCK_N, BLOCK_D, UPCAST)
        vs = _rows(v, start, end_k, v_row, D, BLOCK_N, BLOCK_D, UPCAST)
        s = tl.dot(qs, tl.trans(ks), input_precision=PRECISION)
        # Beyond the last key s = 0 and p may overflow; its product with the zero row of K would be NaN.
        p = tl.where((start + tl.arange(0, BLOCK_N) < end_k)[None, :], tl.exp2(s * c - top[:, None]), 0.0)
        dp = tl.dot(do, tl.trans(vs), input_precision=PRECISION)
        ds = p * (dp - de[:, None])
        acc = tl.dot(ds.to(ks.dtype), ks, acc, input_precision=PRECISION)
    _store_rows(dq, acc * scale, begin, end, dq_row, D, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["items", "rows", "rows_q"])
def dkv_kernel(
    grad, q, k, v, lse, delta, dk, dv, work, boundary, grad_row, grad_head, q_row, q_head, k_row, k_head,
    v_row, v_head, dk_row, dk_head, dv_row, dv_head, heads, items, rows, rows_q, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys of one head."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    index = tl.program_id(0) // heads
    dk += head * dk_head
    dv += head * dv_head
    if index == items:
        end = tl.load(boundary)
        _zero_rows(dk, end, rows, dk_row, D, BLOCK_N, BLOCK_D)
        _zero_rows(dv, end, rows, dv_row, D, BLOCK_N, BLOCK_D)
        return
    begin, end, begin_q, end_q = _item(work, index, SPLIT, BLOCK_N)
    if begin >= end:
        return
    grad += head * grad_head
    q += head * q_head
    lse += head * rows_q
    delta += head * rows_q
    ks = _rows(k + head * k_head, begin, end, k_row, D, BLOCK_N, BLOCK_D, UPCAST)
    vs = _rows(v + head * v_head, begin, end, v_row, D, BLOCK_N, BLOCK_D, UPCAST)
    c = scale * 1.4426950408889634
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(begin_q, end_q, BLOCK_M):
        qs = _rows(q, start, end_q, q_row, D, BLOCK_M, BLOCK_D, UPCAST)
        do = _rows(grad, start, end_q, grad_row, D, BLOCK_M, BLOCK_D, UPCAST)
        i = start + tl.arange(0, BLOCK_M)
        # +inf makes p = 0 beyond the last query.
        top = tl.load(lse + i, mask=i < end_q, other=float("inf")) * 1.4426950408889634
        de = tl.load(delta + i, mask=i < end_q, other=0.0)
        s = tl.dot(ks, tl.trans(qs), input_precision=PRECISION)
        p = tl.exp2(s * c - top[None, :])
        acc_v = tl.dot(p.to(do.dtype), do, acc_v, input_precision=PRECISION)
        dp = tl.dot(vs, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - de[None, :])
        acc_k = tl.dot(ds.to(qs.dtype), qs, acc_k, input_precision=PRECISION)
    _store_rows(dk, acc_k * scale, begin, end, dk_row, D, BLOCK_N, BLOCK_D)
    _store_rows(dv, acc_v, begin, end, dv_row, D, BLOCK_N, BLOCK_D)


@dataclass(frozen=True)
class Tile:
    """Rows a program owns, rows of the other side per iteration, warps, pipeline stages."""

    own: int
    other: int
    warps: int
    stages: int


def tile(kernel: str, head_dim: int, dtype: torch.dtype, block: int) -> Tile:
    """What a kernel runs with on work items of ``block`` rows.

    Chosen from the compiler's reports of registers and shared memory (tests/test_kernels_compile.py); times on a GPU
    have not been taken yet.
    """
    if dtype == torch.float32:
        if head_dim <= 64:
            return Tile(64, 16 if kernel == "dkv" else 32, 4, 2)
        return Tile(16, 16 if kernel == "dkv" else 32, 4, 2)
    warps = 4 if block == 64 else 8
    if head_dim > 64:
        return Tile(block, 64 if kernel == "forward" and block > 64 else 32, warps, 2)
    if kernel == "dkv":
        return Tile(block, 32 if block == 64 else 64, warps, 2)
    return Tile(block, 64, warps, 3 if kernel == "forward" and block > 64 else 2)


def constants(kernel: str, head_dim: int, dtype: torch.dtype, block: int, upcast: bool = False) -> dict:
    """Compile-time arguments and launch options."""
    t = tile(kernel, head_dim, dtype, block)
    m, n = (t.other, t.own) if kernel == "dkv" else (t.own, t.other)
    # Three TF32 products keep float32's accuracy on tensor cores; one alone is what the user may allow for matmuls.
    exact = torch.get_float32_matmul_precision() == "highest"
    return {
        "D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "BLOCK_M": m, "BLOCK_N": n,
        "SPLIT": block // t.own, "PRECISION": "tf32x3" if exact else "tf32", "UPCAST": upcast,
        "num_warps": t.warps, "num_stages": t.stages,
    }  # fmt: skip


KERNELS = {"forward": forward_kernel, "dq": dq_kernel, "dkv": dkv_kernel}


def variants(blocks: Sequence[int]) -> Iterator[tuple[str, int, torch.dtype, int]]:
    """(kernel, head dimension, dtype, rows per item): all that the launchers can ask for."""
    for kernel in KERNELS:
        for head_dim in HEAD_DIMS:
            for dtype in DTYPES:
                for block in blocks:
                    yield kernel, head_dim, dtype, block


def supports(q: Tensor) -> bool:
    """Whether these kernels take this head dimension and dtype."""
    return q.shape[-1] in HEAD_DIMS and q.dtype in DTYPES


def _launch(kernel: str, tensors: Sequence[Tensor], strided: Sequence[Tensor], lists: WorkLists, boundary: Tensor,
            like: Tensor, numbers: Sequence[int], scale: float) -> None:  # fmt: skip
    strides = [s for x in strided for s in x.stride()[:2]]
    heads, head_dim = like.shape[1:]
    # The interpreter computes on raw bits of bfloat16.
    upcast = triton.knobs.runtime.interpret
    for i, (block, work) in enumerate(lists):
        settings = constants(kernel, head_dim, like.dtype, block, upcast)
        items = work.shape[0] * settings["SPLIT"]
        # One program per head after the first list's items clears the rows beyond the last sequence.
        programs = (items + (i == 0)) * heads
        if programs:
            KERNELS[kernel][(programs,)](*tensors, work, boundary, *strides, heads, items, *numbers, scale, **settings)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(q: Tensor) -> None:
    if not supports(q):
        raise ValueError(
            f"the Triton kernels of packed_attention take head dimensions {HEAD_DIMS} in float32, float16 and "
            f"bfloat16, got {q.shape[-1]} in {q.dtype}; AVFAST_BACKEND=reference takes any"
        )


def forward(
    q: Tensor, k: Tensor, v: Tensor, end_q: Tensor, lists: WorkLists, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Writes ``out`` ``(Tq, H, D)`` and the natural log-sum-exp ``(H, Tq)``, rows beyond ``end_q`` included."""
    _check(q)
    q, k, v = map(_unit_stride, (q, k, v))
    with torch.cuda.device_of(q):
        _launch("forward", (q, k, v, out, lse), (q, k, v, out), lists, end_q, q, (q.shape[0],), scale)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, end_q: Tensor, end_k: Tensor,
    lists_q: WorkLists, lists_k: WorkLists, scale: float, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Writes ``dq``, ``dk``, ``dv``, which may be strided views, rows beyond the last sequence included."""
    _check(q)
    grad, q, k, v = map(_unit_stride, (grad, q, k, v))
    delta = torch.empty_like(lse)
    rows_q, rows_k = q.shape[0], k.shape[0]
    with torch.cuda.device_of(q):
        _launch(
            "dq", (grad, q, k, v, out, lse, delta, dq), (grad, q, k, v, out, dq), lists_q, end_q, q, (rows_q,), scale
        )
        _launch("dkv", (grad, q, k, v, lse, delta, dk, dv), (grad, q, k, v, dk, dv), lists_k, end_k, q,
                (rows_k, rows_q), scale)  # fmt: skip
