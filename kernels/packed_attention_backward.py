"""The backward kernels of packed attention, see :mod:`avfast.kernels.packed_attention`."""

from __future__ import annotations

import triton
import triton.language as tl
from avfast.kernels.common import LOG2_E
from avfast.kernels.packed_tiles import clear_rows, item, last_full, load, multiply_add, products, store, zeros


@triton.jit
def _row_sums(a, a_rest, b, b_rest, REST: tl.constexpr):
    """``sum_d a b`` per row: of (M, D) pairs to (M,)."""
    total = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    if REST:
        total += tl.sum(a_rest.to(tl.float32) * b_rest.to(tl.float32), 1)
    return total


@triton.jit
def _add_dq(
    qs, q_rest, do, do_rest, k, v, start, end, k_row, v_row, c, top, de, acc, acc_rest,
    D: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr, BLOCK_N: tl.constexpr, FULL: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What one tile of keys adds to dQ."""
    ks, k_rest = load(k, start, end, k_row, D, BLOCK_N, BLOCK_D, REST, FULL, UPCAST)  # (N, D)
    vs, v_rest = load(v, start, end, v_row, D, BLOCK_N, BLOCK_D, REST, FULL, UPCAST)
    p = tl.exp2(products(qs, q_rest, ks, k_rest, REST, PRECISION) * c - top[:, None])  # (M, N)
    if not FULL:
        # Beyond the last key s = 0 and p may overflow; its product with the zero row of K would be NaN.
        p = tl.where((start + tl.arange(0, BLOCK_N) < end)[None, :], p, 0.0)
    dp = products(do, do_rest, vs, v_rest, REST, PRECISION)  # (M, N)
    ds = p * (dp - de[:, None])
    return multiply_add(ds.to(ks.dtype), ks, k_rest, acc, acc_rest, REST, PRECISION)


@triton.jit(do_not_specialize=["items", "rows", "split"], do_not_specialize_on_alignment=["boundary"])
def packed_dq_kernel(
    grad, q, k, v, out, lse, delta, dq, work, boundary, grad_row, grad_head, q_row, q_head, k_row, k_head,
    v_row, v_head, out_row, out_head, dq_row, dq_head, heads, items, rows, split, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dQ of one block of queries of one head, and delta = sum_d dO O, which dK needs as well."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    index = tl.program_id(0) // heads
    dq += head * dq_head
    if index == items:
        clear_rows(dq, tl.load(boundary), rows, dq_row, D, BLOCK_M, BLOCK_D, REST)
        return
    begin, end, begin_k, end_k = item(work, index, split, BLOCK_M)
    if begin >= end:
        return
    k += head * k_head
    v += head * v_head
    i = begin + tl.arange(0, BLOCK_M)
    do, do_rest = load(grad + head * grad_head, begin, end, grad_row, D, BLOCK_M, BLOCK_D, REST, False, UPCAST)
    o, o_rest = load(out + head * out_head, begin, end, out_row, D, BLOCK_M, BLOCK_D, REST, False, UPCAST)
    de = _row_sums(do, do_rest, o, o_rest, REST)  # (M,)
    tl.store(delta + head * rows + i, de, mask=i < end)
    qs, q_rest = load(q + head * q_head, begin, end, q_row, D, BLOCK_M, BLOCK_D, REST, False, UPCAST)
    c = scale * LOG2_E
    # +inf makes p = 0 in rows beyond the sequence.
    top = tl.load(lse + head * rows + i, mask=i < end, other=float("inf")) * LOG2_E
    acc, acc_rest = zeros(BLOCK_M, BLOCK_D, REST)  # (M, D)
    full = last_full(begin_k, end_k, BLOCK_N, TAIL)
    for start in range(begin_k, full, BLOCK_N):
        acc, acc_rest = _add_dq(
            qs, q_rest, do, do_rest, k, v, start, end_k, k_row, v_row, c, top, de, acc, acc_rest,
            D, BLOCK_D, REST, BLOCK_N, TAIL > 0, PRECISION, UPCAST,
        )  # fmt: skip
    if TAIL:
        left = end_k - full
        if left > TAIL:
            acc, acc_rest = _add_dq(
                qs, q_rest, do, do_rest, k, v, full, end_k, k_row, v_row, c, top, de, acc, acc_rest,
                D, BLOCK_D, REST, BLOCK_N, False, PRECISION, UPCAST,
            )  # fmt: skip
        elif left > 0:
            acc, acc_rest = _add_dq(
                qs, q_rest, do, do_rest, k, v, full, end_k, k_row, v_row, c, top, de, acc, acc_rest,
                D, BLOCK_D, REST, TAIL, False, PRECISION, UPCAST,
            )  # fmt: skip
    store(dq, acc * scale, acc_rest * scale, begin, end, dq_row, D, BLOCK_M, BLOCK_D, REST)


@triton.jit
def _add_dkv(
    ks, k_rest, vs, v_rest, q, grad, lse, delta, start, end, q_row, grad_row, c, acc_k, acc_k_rest, acc_v, acc_v_rest,
    D: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, FULL: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What one tile of queries adds to dK and dV."""
    qs, q_rest = load(q, start, end, q_row, D, BLOCK_M, BLOCK_D, REST, FULL, UPCAST)  # (M, D)
    do, do_rest = load(grad, start, end, grad_row, D, BLOCK_M, BLOCK_D, REST, FULL, UPCAST)
    i = start + tl.arange(0, BLOCK_M)
    if FULL:
        top = tl.load(lse + i) * LOG2_E
        de = tl.load(delta + i)
    else:
        # +inf makes p = 0 beyond the last query.
        top = tl.load(lse + i, mask=i < end, other=float("inf")) * LOG2_E
        de = tl.load(delta + i, mask=i < end, other=0.0)
    p = tl.exp2(products(ks, k_rest, qs, q_rest, REST, PRECISION) * c - top[None, :])  # (N, M)
    acc_v, acc_v_rest = multiply_add(p.to(do.dtype), do, do_rest, acc_v, acc_v_rest, REST, PRECISION)
    ds = p * (products(vs, v_rest, do, do_rest, REST, PRECISION) - de[None, :])
    acc_k, acc_k_rest = multiply_add(ds.to(qs.dtype), qs, q_rest, acc_k, acc_k_rest, REST, PRECISION)
    return acc_k, acc_k_rest, acc_v, acc_v_rest


@triton.jit(do_not_specialize=["items", "rows", "rows_q", "split"], do_not_specialize_on_alignment=["boundary"])
def packed_dkv_kernel(
    grad, q, k, v, lse, delta, dk, dv, work, boundary, grad_row, grad_head, q_row, q_head, k_row, k_head,
    v_row, v_head, dk_row, dk_head, dv_row, dv_head, heads, items, rows, rows_q, split, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys of one head."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    index = tl.program_id(0) // heads
    dk += head * dk_head
    dv += head * dv_head
    if index == items:
        end = tl.load(boundary)
        clear_rows(dk, end, rows, dk_row, D, BLOCK_N, BLOCK_D, REST)
        clear_rows(dv, end, rows, dv_row, D, BLOCK_N, BLOCK_D, REST)
        return
    begin, end, begin_q, end_q = item(work, index, split, BLOCK_N)
    if begin >= end:
        return
    grad += head * grad_head
    q += head * q_head
    lse += head * rows_q
    delta += head * rows_q
    ks, k_rest = load(k + head * k_head, begin, end, k_row, D, BLOCK_N, BLOCK_D, REST, False, UPCAST)
    vs, v_rest = load(v + head * v_head, begin, end, v_row, D, BLOCK_N, BLOCK_D, REST, False, UPCAST)
    c = scale * LOG2_E
    acc_k, acc_k_rest = zeros(BLOCK_N, BLOCK_D, REST)  # (N, D)
    acc_v, acc_v_rest = zeros(BLOCK_N, BLOCK_D, REST)
    full = last_full(begin_q, end_q, BLOCK_M, TAIL)
    for start in range(begin_q, full, BLOCK_M):
        acc_k, acc_k_rest, acc_v, acc_v_rest = _add_dkv(
            ks, k_rest, vs, v_rest, q, grad, lse, delta, start, end_q, q_row, grad_row, c,
            acc_k, acc_k_rest, acc_v, acc_v_rest, D, BLOCK_D, REST, BLOCK_M, TAIL > 0, PRECISION, UPCAST,
        )  # fmt: skip
    if TAIL:
        left = end_q - full
        if left > TAIL:
            acc_k, acc_k_rest, acc_v, acc_v_rest = _add_dkv(
                ks, k_rest, vs, v_rest, q, grad, lse, delta, full, end_q, q_row, grad_row, c,
                acc_k, acc_k_rest, acc_v, acc_v_rest, D, BLOCK_D, REST, BLOCK_M, False, PRECISION, UPCAST,
            )  # fmt: skip
        elif left > 0:
            acc_k, acc_k_rest, acc_v, acc_v_rest = _add_dkv(
                ks, k_rest, vs, v_rest, q, grad, lse, delta, full, end_q, q_row, grad_row, c,
                acc_k, acc_k_rest, acc_v, acc_v_rest, D, BLOCK_D, REST, TAIL, False, PRECISION, UPCAST,
            )  # fmt: skip
    store(dk, acc_k * scale, acc_k_rest * scale, begin, end, dk_row, D, BLOCK_N, BLOCK_D, REST)
    store(dv, acc_v, acc_v_rest, begin, end, dv_row, D, BLOCK_N, BLOCK_D, REST)


@triton.jit
def _all_gradients(
    qs, q_rest, do, do_rest, k, v, dk, dv, start, end, k_row, v_row, dk_row, dv_row, scale, top, de, acc, acc_rest,
    D: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Writes dK and dV of one tile of keys, which sees all queries here, and adds to dQ."""
    ks, k_rest = load(k, start, end, k_row, D, BLOCK_N, BLOCK_D, REST, False, UPCAST)  # (N, D)
    vs, v_rest = load(v, start, end, v_row, D, BLOCK_N, BLOCK_D, REST, False, UPCAST)
    s = products(ks, k_rest, qs, q_rest, REST, PRECISION)  # (N, M)
    live = (start + tl.arange(0, BLOCK_N) < end)[:, None]
    p = tl.where(live, tl.exp2(s * (scale * LOG2_E) - top[None, :]), 0.0)
    tile, rest = zeros(BLOCK_N, BLOCK_D, REST)
    tile, rest = multiply_add(p.to(do.dtype), do, do_rest, tile, rest, REST, PRECISION)
    store(dv, tile, rest, start, end, dv_row, D, BLOCK_N, BLOCK_D, REST)
    ds = (p * (products(vs, v_rest, do, do_rest, REST, PRECISION) - de[None, :])).to(ks.dtype)
    tile, rest = zeros(BLOCK_N, BLOCK_D, REST)
    tile, rest = multiply_add(ds, qs, q_rest, tile, rest, REST, PRECISION)
    store(dk, tile * scale, rest * scale, start, end, dk_row, D, BLOCK_N, BLOCK_D, REST)
    return multiply_add(tl.trans(ds), ks, k_rest, acc, acc_rest, REST, PRECISION)


@triton.jit(do_not_specialize=["items", "rows", "rows_k"], do_not_specialize_on_alignment=["boundary", "boundary_k"])
def packed_whole_kernel(
    grad, q, k, v, out, lse, dq, dk, dv, work, boundary, boundary_k, grad_row, grad_head, q_row, q_head, k_row, k_head,
    v_row, v_head, out_row, out_head, dq_row, dq_head, dk_row, dk_head, dv_row, dv_head,
    heads, items, rows, rows_k, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ONE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """All gradients of one head of one sequence, whose queries are one block; ONE says that its keys are, too."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    index = tl.program_id(0) // heads
    dq += head * dq_head
    dk += head * dk_head
    dv += head * dv_head
    if index == items:
        clear_rows(dq, tl.load(boundary), rows, dq_row, D, BLOCK_M, BLOCK_D, REST)
        end = tl.load(boundary_k)
        clear_rows(dk, end, rows_k, dk_row, D, BLOCK_N, BLOCK_D, REST)
        clear_rows(dv, end, rows_k, dv_row, D, BLOCK_N, BLOCK_D, REST)
        return
    begin, end, begin_k, end_k = item(work, index, 1, BLOCK_M)
    if begin >= end and begin_k >= end_k:
        return
    k += head * k_head
    v += head * v_head
    i = begin + tl.arange(0, BLOCK_M)
    qs, q_rest = load(q + head * q_head, begin, end, q_row, D, BLOCK_M, BLOCK_D, REST, False, UPCAST)
    do, do_rest = load(grad + head * grad_head, begin, end, grad_row, D, BLOCK_M, BLOCK_D, REST, False, UPCAST)
    o, o_rest = load(out + head * out_head, begin, end, out_row, D, BLOCK_M, BLOCK_D, REST, False, UPCAST)
    de = _row_sums(do, do_rest, o, o_rest, REST)  # (M,)
    # +inf makes p = 0 in rows beyond the sequence.
    top = tl.load(lse + head * rows + i, mask=i < end, other=float("inf")) * LOG2_E
    acc, acc_rest = zeros(BLOCK_M, BLOCK_D, REST)  # (M, D)
    if ONE:
        acc, acc_rest = _all_gradients(
            qs, q_rest, do, do_rest, k, v, dk, dv, begin_k, end_k, k_row, v_row, dk_row, dv_row, scale, top, de,
            acc, acc_rest, D, BLOCK_D, REST, BLOCK_N, PRECISION, UPCAST,
        )  # fmt: skip
    else:
        for start in range(begin_k, end_k, BLOCK_N):
            acc, acc_rest = _all_gradients(
                qs, q_rest, do, do_rest, k, v, dk, dv, start, end_k, k_row, v_row, dk_row, dv_row, scale, top, de,
                acc, acc_rest, D, BLOCK_D, REST, BLOCK_N, PRECISION, UPCAST,
            )  # fmt: skip
    store(dq, acc * scale, acc_rest * scale, begin, end, dq_row, D, BLOCK_M, BLOCK_D, REST)
