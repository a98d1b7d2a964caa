"""Attention over all pairs of two token sets as two softmaxes with shared queries, in Triton: one kernel per direction.

A program owns one head of one sample. Its few queries are one block that stays in registers while the program loops
over tiles of keys, those of modality a, then those of v; every element has one writer, so nothing depends on the order
in which programs run. The backward goes over the keys twice: first for delta = sum_i p_i dO.V_i, which the output does
not hold per modality, then for the gradients; the second reading comes from cache.

What is known of a side's keys is a compile-time choice: all take part, a byte per token says which do, or the keys are
packed and boundaries say which rows belong to a sample. Tokens that take no part are not loaded.

Softmax runs in base 2 with the scale folded into one multiply-add: p = 2^(c s - m), c = scale log2(e) > 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from avfast.kernels.common import LN_2, LOG2_E, block_of, load_tile, store_tile, unit_stride
from avfast.kernels.support import DTYPES, HEAD_DIMS
from torch import Tensor

from avfast.kernels import common

QUERIES = {torch.float32: 16, torch.float16: 32, torch.bfloat16: 32}
"""Size of the block of queries: what fits in the registers. More queries make several launches, of which the later ones
add to the gradients of keys and values.
"""
Kind = Literal["dense", "masked", "packed"]
"""What is known of a side's keys: all take part, a byte per token says which do, boundaries say whose the rows are."""


@triton.jit
def _span(keys, sample, n, KIND: tl.constexpr):
    """First row of a sample's keys, and their end."""
    begin = 0
    end = n
    if KIND == "packed":
        begin = tl.load(keys + sample)
        end = tl.load(keys + sample + 1)
    return begin, end


@triton.jit
def _live(keys, start, end, BLOCK_N: tl.constexpr, KIND: tl.constexpr):
    """Which of the keys from ``start`` on take part; ``keys`` points at the sample's first token."""
    i = start + tl.arange(0, BLOCK_N)
    live = i < end
    if KIND == "masked":
        live = live & (tl.load(keys + i, mask=live, other=0) != 0)
    return live


@triton.jit
def _attend(
    qs, k, v, keys, begin, end, k_row, v_row, c,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``softmax(scale Q K^T) V`` and its log-sum-exp; zeros and -inf where no key takes part."""
    top = tl.full((BLOCK_F,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_F,), tl.float32)
    acc = tl.zeros((BLOCK_F, BLOCK_DV), tl.float32)
    for start in range(begin, end, BLOCK_N):
        live = _live(keys, start, end, BLOCK_N, KIND)
        ks = load_tile(k, start, live, k_row, D, BLOCK_N, BLOCK_D, False, UPCAST)  # (N, D)
        vs = load_tile(v, start, live, v_row, DV, BLOCK_N, BLOCK_DV, False, UPCAST)  # (N, DV)
        # s and p are (F, N).
        s = tl.where(live[None, :], tl.dot(qs, tl.trans(ks), input_precision=PRECISION), float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * c)
        # A tile may be masked as a whole, and -inf minus -inf is no number.
        pivot = tl.where(new_top > float("-inf"), new_top, 0.0)
        p = tl.exp2(s * c - pivot[:, None])
        shrink = tl.exp2(top - pivot)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(vs.dtype), vs, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    return acc, (top + tl.log2(total)) * LN_2


@triton.jit(
    do_not_specialize=["heads", "queries", "all_queries", "n_a", "n_v"],
    do_not_specialize_on_alignment=["keys_a", "keys_v"],
)
def pair_forward_kernel(
    q, k_a, v_a, keys_a, k_v, v_v, keys_v, bias, out, lse_a, lse_v,
    q_batch, q_head, q_row, k_a_batch, k_a_head, k_a_row, v_a_batch, v_a_head, v_a_row,
    k_v_batch, k_v_head, k_v_row, v_v_batch, v_v_head, v_v_row, out_batch, out_head, out_row, bias_head, bias_column,
    heads, queries, all_queries, n_a, n_v, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr, KIND_A: tl.constexpr, KIND_V: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """All queries of one head of one sample."""
    sample = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    f = tl.arange(0, BLOCK_F)
    own = f < queries
    statistics = tl.program_id(0).to(tl.int64) * all_queries + f
    qs = load_tile(q + sample * q_batch + head * q_head, 0, own, q_row, D, BLOCK_F, BLOCK_D, False, UPCAST)
    c = scale * LOG2_E
    begin, end = _span(keys_a, sample, n_a, KIND_A)
    sum_a, lse = _attend(
        qs, k_a + sample * k_a_batch + head * k_a_head, v_a + sample * v_a_batch + head * v_a_head,
        keys_a + sample * n_a, begin, end, k_a_row, v_a_row, c,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_F, BLOCK_N, KIND_A, PRECISION, UPCAST,
    )  # fmt: skip
    tl.store(lse_a + statistics, lse, mask=own)
    begin, end = _span(keys_v, sample, n_v, KIND_V)
    sum_v, lse = _attend(
        qs, k_v + sample * k_v_batch + head * k_v_head, v_v + sample * v_v_batch + head * v_v_head,
        keys_v + sample * n_v, begin, end, k_v_row, v_v_row, c,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_F, BLOCK_N, KIND_V, PRECISION, UPCAST,
    )  # fmt: skip
    tl.store(lse_v + statistics, lse, mask=own)
    acc = sum_a + sum_v
    if BIAS:
        d = tl.arange(0, BLOCK_DV)
        shift = tl.load(bias + head * bias_head + d * bias_column, mask=d < DV, other=0.0)
        acc += shift.to(tl.float32)[None, :]
    store_tile(out + sample * out_batch + head * out_head, acc, 0, own, out_row, DV, BLOCK_F, BLOCK_DV)


@triton.jit
def _probabilities(
    qs, do, k, v, keys, start, end, k_row, v_row, c, top,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    KIND: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Keys of a tile, and p and dp = dO V^T as (N, F): so queries and dO are right factors and lie in shared memory,
    not in registers."""
    live = _live(keys, start, end, BLOCK_N, KIND)
    ks = load_tile(k, start, live, k_row, D, BLOCK_N, BLOCK_D, False, UPCAST)  # (N, D)
    vs = load_tile(v, start, live, v_row, DV, BLOCK_N, BLOCK_DV, False, UPCAST)  # (N, DV)
    s = tl.dot(ks, tl.trans(qs), input_precision=PRECISION)  # (N, F)
    # Where no key takes part top is -inf, and elsewhere s = 0 of an absent key may overflow.
    p = tl.where(live[:, None], tl.exp2(s * c - top[None, :]), 0.0)
    return ks, p, tl.dot(vs, tl.trans(do), input_precision=PRECISION)


@triton.jit
def _differentiate(
    dq, qs, do, k, v, dk, dv, keys, begin, end, k_row, v_row, dk_row, dv_row, scale, top,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr, KIND: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``dq`` with this side's part added; writes dK and dV, or adds to them."""
    c = scale * LOG2_E
    products = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for start in range(begin, end, BLOCK_N):
        _, p, dp = _probabilities(
            qs, do, k, v, keys, start, end, k_row, v_row, c, top,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, KIND, PRECISION, UPCAST,
        )  # fmt: skip
        products += p * dp
    delta = tl.sum(products, 0)  # (F,)
    for start in range(begin, end, BLOCK_N):
        ks, p, dp = _probabilities(
            qs, do, k, v, keys, start, end, k_row, v_row, c, top,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, KIND, PRECISION, UPCAST,
        )  # fmt: skip
        here = start + tl.arange(0, BLOCK_N) < end
        dv_tile = tl.dot(p.to(do.dtype), do, input_precision=PRECISION)
        if ADD:
            dv_tile += load_tile(dv, start, here, dv_row, DV, BLOCK_N, BLOCK_DV, False, True)
        store_tile(dv, dv_tile, start, here, dv_row, DV, BLOCK_N, BLOCK_DV)
        ds = (p * (dp - delta[None, :])).to(ks.dtype)
        dk_tile = tl.dot(ds, qs, input_precision=PRECISION) * scale
        if ADD:
            dk_tile += load_tile(dk, start, here, dk_row, D, BLOCK_N, BLOCK_D, False, True)
        store_tile(dk, dk_tile, start, here, dk_row, D, BLOCK_N, BLOCK_D)
        dq = tl.dot(tl.trans(ds), ks, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _clear_rest(
    dk, dv, begin, end, dk_row, dv_row, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Zeros in packed rows that belong to no sample."""
    for start in range(begin, end, BLOCK_N):
        here = start + tl.arange(0, BLOCK_N) < end
        store_tile(dk, tl.zeros((BLOCK_N, BLOCK_D), tl.float32), start, here, dk_row, D, BLOCK_N, BLOCK_D)
        store_tile(dv, tl.zeros((BLOCK_N, BLOCK_DV), tl.float32), start, here, dv_row, DV, BLOCK_N, BLOCK_DV)


@triton.jit(
    do_not_specialize=["batch", "heads", "queries", "all_queries", "n_a", "n_v"],
    do_not_specialize_on_alignment=["keys_a", "keys_v"],
)
def pair_backward_kernel(
    grad, q, k_a, v_a, keys_a, k_v, v_v, keys_v, lse_a, lse_v, dq, dk_a, dv_a, dk_v, dv_v,
    grad_batch, grad_head, grad_row, q_batch, q_head, q_row,
    k_a_batch, k_a_head, k_a_row, v_a_batch, v_a_head, v_a_row,
    k_v_batch, k_v_head, k_v_row, v_v_batch, v_v_head, v_v_row,
    dq_batch, dq_head, dq_row, dk_a_batch, dk_a_head, dk_a_row, dv_a_batch, dv_a_head, dv_a_row,
    dk_v_batch, dk_v_head, dk_v_row, dv_v_batch, dv_v_head, dv_v_row,
    batch, heads, queries, all_queries, n_a, n_v, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr, KIND_A: tl.constexpr, KIND_V: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """All gradients of one head of one sample."""
    sample = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    f = tl.arange(0, BLOCK_F)
    own = f < queries
    statistics = tl.program_id(0).to(tl.int64) * all_queries + f
    qs = load_tile(q + sample * q_batch + head * q_head, 0, own, q_row, D, BLOCK_F, BLOCK_D, False, UPCAST)
    grad += sample * grad_batch + head * grad_head
    do = load_tile(grad, 0, own, grad_row, DV, BLOCK_F, BLOCK_DV, False, UPCAST)
    acc = tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
    begin, end = _span(keys_a, sample, n_a, KIND_A)
    dk = dk_a + sample * dk_a_batch + head * dk_a_head
    dv = dv_a + sample * dv_a_batch + head * dv_a_head
    # +inf makes p = 0 in rows beyond the last query.
    top = tl.load(lse_a + statistics, mask=own, other=float("inf")) * LOG2_E
    acc = _differentiate(
        acc, qs, do, k_a + sample * k_a_batch + head * k_a_head, v_a + sample * v_a_batch + head * v_a_head, dk, dv,
        keys_a + sample * n_a, begin, end, k_a_row, v_a_row, dk_a_row, dv_a_row, scale, top,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_F, BLOCK_N, KIND_A, ADD, PRECISION, UPCAST,
    )  # fmt: skip
    if KIND_A == "packed":
        if sample == batch - 1:
            _clear_rest(dk, dv, end, n_a, dk_a_row, dv_a_row, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N)
    begin, end = _span(keys_v, sample, n_v, KIND_V)
    dk = dk_v + sample * dk_v_batch + head * dk_v_head
    dv = dv_v + sample * dv_v_batch + head * dv_v_head
    top = tl.load(lse_v + statistics, mask=own, other=float("inf")) * LOG2_E
    acc = _differentiate(
        acc, qs, do, k_v + sample * k_v_batch + head * k_v_head, v_v + sample * v_v_batch + head * v_v_head, dk, dv,
        keys_v + sample * n_v, begin, end, k_v_row, v_v_row, dk_v_row, dv_v_row, scale, top,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_F, BLOCK_N, KIND_V, ADD, PRECISION, UPCAST,
    )  # fmt: skip
    if KIND_V == "packed":
        if sample == batch - 1:
            _clear_rest(dk, dv, end, n_v, dk_v_row, dv_v_row, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N)
    store_tile(dq + sample * dq_batch + head * dq_head, acc * scale, 0, own, dq_row, D, BLOCK_F, BLOCK_D)


@dataclass(frozen=True)
class Tile:
    """Keys per iteration, warps, pipeline stages."""

    keys: int
    warps: int
    stages: int


def tile(kernel: str, dim_qk: int, dim_v: int, dtype: torch.dtype) -> Tile:
    """What a kernel runs with.

    Chosen from the compiler's reports of registers and shared memory (tests/test_kernels_compile.py); times on a GPU
    have not been taken yet.
    """
    dim_qk, dim_v = block_of(dim_qk), block_of(dim_v)
    wide = max(dim_qk, dim_v) > 64
    if dtype == torch.float32:
        if kernel == "forward":
            return Tile(16 if dim_qk > 64 else 32, 8 if wide else 4, 1)
        return Tile(16, 8 if wide or dim_qk > max(dim_v, 32) else 4, 1)
    if kernel == "forward":
        return Tile(32, 8 if wide else 4, 1 if wide else 2)
    return Tile(32 if dim_qk > 32 and wide else 64, 8 if wide else 4, 1 if wide else 2)


def constants(
    kernel: str, dim_qk: int, dim_v: int, dtype: torch.dtype, kind_a: Kind, kind_v: Kind, upcast: bool = False
) -> dict:
    """Compile-time arguments and launch options."""
    t = tile(kernel, dim_qk, dim_v, dtype)
    return {
        "D": dim_qk, "DV": dim_v, "BLOCK_D": block_of(dim_qk), "BLOCK_DV": block_of(dim_v), "BLOCK_F": QUERIES[dtype],
        "BLOCK_N": t.keys, "KIND_A": kind_a, "KIND_V": kind_v, "PRECISION": common.precision(), "UPCAST": upcast,
        "num_warps": t.warps, "num_stages": t.stages,
    }  # fmt: skip


KERNELS = {"forward": pair_forward_kernel, "backward": pair_backward_kernel}


def variants() -> Iterator[tuple[str, int, int, torch.dtype]]:
    """(kernel, dimension of queries and keys, of values, dtype): all that the launchers can ask for."""
    for kernel in KERNELS:
        for dim_qk in HEAD_DIMS:
            for dim_v in HEAD_DIMS:
                for dtype in DTYPES:
                    yield kernel, dim_qk, dim_v, dtype


def _chunks(q: Tensor) -> Iterator[slice]:
    """Queries of one launch each; one empty launch where there are none."""
    size = QUERIES[q.dtype]
    for begin in range(0, max(q.shape[2], 1), size):
        yield slice(begin, min(begin + size, q.shape[2]))


def _strides(*tensors: Tensor) -> list[int]:
    """Of sample, head and token; all samples of packed tensors start at the same place."""
    return [s for x in tensors for s in (x.stride()[:3] if x.ndim == 4 else (0, x.stride(1), x.stride(0)))]


def _known(k: Tensor, keys: Tensor | None) -> tuple[Kind, int, Tensor]:
    """Kind, rows, and what the kernel reads to know which keys take part."""
    if keys is None:
        return "dense", k.shape[2], k
    if k.ndim == 3:
        return "packed", k.shape[0], keys.contiguous()
    return "masked", k.shape[2], keys.contiguous().view(torch.uint8)


def _launch(kernel: str, arguments: Sequence, q: Tensor, v: Tensor, kinds: tuple[Kind, Kind], extra: dict) -> None:
    settings = constants(kernel, q.shape[-1], v.shape[-1], q.dtype, *kinds, common.interpreted())
    common.launch(KERNELS[kernel], q.shape[0] * q.shape[1], *arguments, **settings, **extra)


def forward(
    q: Tensor, k_a: Tensor, v_a: Tensor, keys_a: Tensor | None, k_v: Tensor, v_v: Tensor, keys_v: Tensor | None,
    bias: Tensor | None, scale: float, out: Tensor, lse_a: Tensor, lse_v: Tensor,
) -> None:  # fmt: skip
    """Writes ``out`` ``(B, H, F, Dv)`` and the natural log-sum-exp ``(B, H, F)`` of either side."""
    q, k_a, v_a, k_v, v_v = map(unit_stride, (q, k_a, v_a, k_v, v_v))
    (kind_a, n_a, keys_a), (kind_v, n_v, keys_v) = _known(k_a, keys_a), _known(k_v, keys_v)
    shift, bias_strides = (q, (0, 0)) if bias is None else (bias, bias.stride())
    strides = (*_strides(q, k_a, v_a, k_v, v_v, out), *bias_strides)
    for own in _chunks(q):
        part = q[:, :, own]
        arguments = (
            part, k_a, v_a, keys_a, k_v, v_v, keys_v, shift, out[:, :, own], lse_a[:, :, own], lse_v[:, :, own],
            *strides, q.shape[1], part.shape[2], q.shape[2], n_a, n_v, scale,
        )  # fmt: skip
        _launch("forward", arguments, q, v_a, (kind_a, kind_v), {"BIAS": bias is not None})


def backward(
    grad: Tensor, q: Tensor, k_a: Tensor, v_a: Tensor, keys_a: Tensor | None, k_v: Tensor, v_v: Tensor,
    keys_v: Tensor | None, lse_a: Tensor, lse_v: Tensor, scale: float, dq: Tensor, dk_a: Tensor, dv_a: Tensor,
    dk_v: Tensor, dv_v: Tensor,
) -> None:  # fmt: skip
    """Writes all gradients, zeros included."""
    grad, q, k_a, v_a, k_v, v_v = map(unit_stride, (grad, q, k_a, v_a, k_v, v_v))
    (kind_a, n_a, keys_a), (kind_v, n_v, keys_v) = _known(k_a, keys_a), _known(k_v, keys_v)
    grads = (dk_a, dv_a, dk_v, dv_v)
    if not q.shape[0]:
        for x in grads:  # packed rows without a sample have no program
            x.zero_()
    strides = _strides(grad, q, k_a, v_a, k_v, v_v, dq, *grads)
    for own in _chunks(q):
        part = q[:, :, own]
        arguments = (
            grad[:, :, own], part, k_a, v_a, keys_a, k_v, v_v, keys_v, lse_a[:, :, own], lse_v[:, :, own],
            dq[:, :, own], *grads, *strides, *part.shape[:3], q.shape[2], n_a, n_v, scale,
        )  # fmt: skip
        _launch("backward", arguments, q, v_a, (kind_a, kind_v), {"ADD": own.start > 0})
