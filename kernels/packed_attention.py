"""Attention within packed sequences, in Triton: launchers and tile table of one forward and three backward kernels.

A program owns one block of rows of one head and loops over the rows of the other side, so every element has one writer,
nothing is added atomically, and the result does not depend on the order in which programs run. Which block of which
sequence, a work list says (see :mod:`avfast.kernels.work_lists`), one list and one launch per length class. An item is
(first row, end of its sequence, first and end of the other side's rows), 16 bytes, so that a program's first loads wait
for one load only. Items with nothing to do exit at once.

The loop is over full tiles, which are loaded without masks; what is left over is one tile more, no wider than it must
be. Head dimensions between powers of two are two blocks of columns, as 64 + 16 for 80. Where a class of sequences fits
one program, that program does the whole backward: five products in place of the seven of dq and dkv.

Softmax runs in base 2 with the scale folded into one multiply-add: p = 2^(c s - m), c = scale log2(e) > 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from avfast.kernels.common import LN_2, LOG2_E, unit_stride
from avfast.kernels.packed_attention_backward import packed_dkv_kernel, packed_dq_kernel, packed_whole_kernel
from avfast.kernels.packed_tiles import clear_rows, item, last_full, load, multiply_add, products, store, zeros
from avfast.kernels.support import DTYPES, HEAD_DIMS
from avfast.kernels.work_lists import ROWS, SPARE
from torch import Tensor

from avfast.kernels import common


@triton.jit
def _attend(
    qs, q_rest, k, v, start, end, k_row, v_row, c, top, total, acc, acc_rest,
    D: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr, BLOCK_N: tl.constexpr, FULL: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of keys: running maximum, sum of weights, and weighted sum of values."""
    ks, k_rest = load(k, start, end, k_row, D, BLOCK_N, BLOCK_D, REST, FULL, UPCAST)  # (N, D)
    vs, v_rest = load(v, start, end, v_row, D, BLOCK_N, BLOCK_D, REST, FULL, UPCAST)
    s = products(qs, q_rest, ks, k_rest, REST, PRECISION)  # (M, N)
    if not FULL:
        s = tl.where((start + tl.arange(0, BLOCK_N) < end)[None, :], s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * c)  # (M,)
    p = tl.exp2(s * c - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    if REST:
        acc_rest = acc_rest * shrink[:, None]
    acc, acc_rest = multiply_add(p.to(vs.dtype), vs, v_rest, acc, acc_rest, REST, PRECISION)
    return new_top, total, acc, acc_rest


@triton.jit(do_not_specialize=["items", "rows", "split"], do_not_specialize_on_alignment=["boundary"])
def packed_forward_kernel(
    q, k, v, out, lse, work, boundary, q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head,
    heads, items, rows, split, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    index = tl.program_id(0) // heads
    out += head * out_head
    lse += head * rows
    if index == items:
        end = tl.load(boundary)
        clear_rows(out, end, rows, out_row, D, BLOCK_M, BLOCK_D, REST)
        for start in range(end, rows, BLOCK_M):
            i = start + tl.arange(0, BLOCK_M)
            tl.store(lse + i, float("-inf"), mask=i < rows)
        return
    begin, end, begin_k, end_k = item(work, index, split, BLOCK_M)
    if begin >= end:
        return
    k += head * k_head
    v += head * v_head
    qs, q_rest = load(q + head * q_head, begin, end, q_row, D, BLOCK_M, BLOCK_D, REST, False, UPCAST)  # (M, D)
    c = scale * LOG2_E
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc, acc_rest = zeros(BLOCK_M, BLOCK_D, REST)  # (M, D)
    full = last_full(begin_k, end_k, BLOCK_N, TAIL)
    for start in range(begin_k, full, BLOCK_N):
        top, total, acc, acc_rest = _attend(
            qs, q_rest, k, v, start, end_k, k_row, v_row, c, top, total, acc, acc_rest,
            D, BLOCK_D, REST, BLOCK_N, TAIL > 0, PRECISION, UPCAST,
        )  # fmt: skip
    if TAIL:
        left = end_k - full
        if left > TAIL:
            top, total, acc, acc_rest = _attend(
                qs, q_rest, k, v, full, end_k, k_row, v_row, c, top, total, acc, acc_rest,
                D, BLOCK_D, REST, BLOCK_N, False, PRECISION, UPCAST,
            )  # fmt: skip
        elif left > 0:
            top, total, acc, acc_rest = _attend(
                qs, q_rest, k, v, full, end_k, k_row, v_row, c, top, total, acc, acc_rest,
                D, BLOCK_D, REST, TAIL, False, PRECISION, UPCAST,
            )  # fmt: skip
    # A sequence without keys: total stays 0, the output 0 and the log-sum-exp -inf.
    share = tl.where(total > 0, total, 1.0)[:, None]
    store(out, acc / share, acc_rest / share, begin, end, out_row, D, BLOCK_M, BLOCK_D, REST)
    i = begin + tl.arange(0, BLOCK_M)
    tl.store(lse + i, (top + tl.log2(total)) * LN_2, mask=i < end)


KERNELS = {
    "forward": packed_forward_kernel,
    "dq": packed_dq_kernel,
    "dkv": packed_dkv_kernel,
    "whole": packed_whole_kernel,
}


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut.

    Args:
        own: rows of a program; for ``whole`` at least the longest sequence.
        other: rows of the other side per iteration.
        warps: per program.
        stages: of the loop's pipeline.
        tail: rows of the tile that takes what full tiles leave over, or one of ``other`` rows where more is left; 0:
            no tile is taken to be full and every load is masked, which needs fewer registers.
        registers: most per thread, which lets more programs run at once; 0 leaves it to the compiler.
    """

    own: int
    other: int
    warps: int
    stages: int
    tail: int = 0
    registers: int = 0


@dataclass(frozen=True)
class Row:
    """Tiles of a kernel for length classes, up to a head dimension, for values of so many bytes: what is shipped, then
    candidates whose worth only time on a GPU can tell. No tiles: the kernel does not take such sequences."""

    kernel: str
    sizes: tuple[str, ...]
    columns: int
    bytes: int
    tiles: tuple[Tile, ...]


EACH = tuple(ROWS)
BLOCKS_OF_64 = ("tiny", "short")
HALF, FLOAT32 = 2, 4
# fmt: off
TABLE = (
    Row("forward", BLOCKS_OF_64, 64, HALF, (
        Tile(64, 64, 4, 2, 16, 128), Tile(64, 64, 4, 2, 32, 128), Tile(64, 64, 4, 3, 16, 128), Tile(64, 32, 4, 2, 16))),
    Row("forward", ("long",), 64, HALF, (
        Tile(128, 64, 8, 3, 16), Tile(64, 64, 4, 2, 16, 128), Tile(128, 64, 8, 3, 32), Tile(128, 128, 8, 2, 32))),
    Row("forward", BLOCKS_OF_64, 96, HALF, (Tile(64, 64, 4, 2, 16), Tile(64, 32, 4, 2, 16, 128))),
    Row("forward", ("long",), 96, HALF, (Tile(64, 64, 4, 2, 16), Tile(128, 64, 8, 2, 16))),
    Row("forward", BLOCKS_OF_64, 128, HALF, (Tile(64, 32, 4, 2, 16),)),
    Row("forward", ("long",), 128, HALF, (Tile(128, 64, 8, 2, 16), Tile(64, 64, 4, 2, 16))),
    Row("forward", EACH, 64, FLOAT32, (Tile(64, 32, 4, 2),)),
    Row("forward", EACH, 128, FLOAT32, (Tile(16, 32, 4, 2),)),

    Row("dq", BLOCKS_OF_64, 64, HALF, (
        Tile(64, 64, 4, 2, 16, 128), Tile(64, 64, 4, 2, 32, 128), Tile(64, 64, 4, 3, 16, 128), Tile(64, 32, 4, 2, 16))),
    Row("dq", ("long",), 64, HALF, (
        Tile(128, 64, 8, 2, 16, 128), Tile(64, 64, 4, 2, 16, 128), Tile(128, 64, 8, 2, 32, 128),
        Tile(128, 32, 8, 2, 16))),
    Row("dq", BLOCKS_OF_64, 80, HALF, (Tile(64, 32, 4, 2, 16, 128), Tile(64, 64, 4, 2, 16))),
    Row("dq", ("long",), 80, HALF, (Tile(128, 32, 8, 2, 16, 128), Tile(64, 32, 4, 2, 16, 128))),
    Row("dq", BLOCKS_OF_64, 128, HALF, (Tile(64, 32, 4, 2, 16),)),
    Row("dq", ("long",), 128, HALF, (Tile(128, 32, 8, 2, 16),)),
    Row("dq", EACH, 64, FLOAT32, (Tile(64, 32, 4, 2),)),
    Row("dq", EACH, 128, FLOAT32, (Tile(16, 32, 4, 2),)),

    Row("dkv", EACH, 64, HALF, (
        Tile(64, 32, 4, 2, 16), Tile(64, 32, 4, 3, 16), Tile(64, 64, 4, 2, 16), Tile(64, 32, 4, 2))),
    Row("dkv", EACH, 96, HALF, (Tile(64, 32, 4, 2, 16), Tile(64, 16, 4, 2, 16))),
    Row("dkv", BLOCKS_OF_64, 128, HALF, (Tile(64, 32, 4, 2), Tile(64, 16, 4, 2, 16))),
    Row("dkv", ("long",), 128, HALF, (Tile(128, 32, 8, 2, 16), Tile(64, 32, 4, 2))),
    Row("dkv", EACH, 64, FLOAT32, (Tile(64, 16, 4, 2),)),
    Row("dkv", EACH, 128, FLOAT32, (Tile(16, 16, 4, 2),)),

    # The last two are for ROWS["tiny"] = 128.
    Row("whole", ("tiny",), 64, HALF, (
        Tile(64, 64, 4, 1), Tile(64, 64, 8, 1), Tile(128, 128, 8, 1), Tile(128, 32, 8, 1))),
    Row("whole", ("tiny",), 128, HALF, (Tile(64, 64, 4, 1),)),
)  # fmt: on
"""Chosen from the compiler's reports of registers and instructions (tests/test_kernels_compile.py); no times have been
taken on a GPU yet. The first row that fits counts."""

_overrides: dict[tuple[str, str], Tile | None] = {}


@cache
def candidates(kernel: str, head_dim: int, dtype: torch.dtype, size: str) -> tuple[Tile, ...]:
    """Tiles of a kernel for a length class of ``ROWS``: the shipped one first; none where it is never launched."""
    for row in TABLE:
        if row.kernel == kernel and size in row.sizes and head_dim <= row.columns and row.bytes == dtype.itemsize:
            return row.tiles
    return ()


def tile(kernel: str, head_dim: int, dtype: torch.dtype, size: str) -> Tile | None:
    """What a kernel runs with on a length class; None where it is not launched."""
    if (kernel, size) in _overrides:
        return _overrides[kernel, size]
    return next(iter(candidates(kernel, head_dim, dtype, size)), None)


@contextmanager
def override(kernel: str, size: str, tile: Tile | None) -> Iterator[None]:
    """Another tile for a kernel and a length class while the context lasts, whatever head dimension and dtype; None for
    ``whole`` makes dq and dkv run in its place."""
    _overrides[kernel, size] = tile
    try:
        yield
    finally:
        del _overrides[kernel, size]


def constants(
    kernel: str, head_dim: int, dtype: torch.dtype, size: str, upcast: bool = False, capability: int = 9
) -> dict[str, Any]:
    """Compile-time arguments and launch options of the tile in force.

    Registers are bounded on Hopper alone, whose tensor cores read from shared memory; elsewhere the same bound spills.
    """
    t = tile(kernel, head_dim, dtype, size)
    if t is None:
        raise ValueError(f"the {kernel} kernel has no tile for {size} sequences, {head_dim} columns, {dtype}")
    if t.own < ROWS[size] if kernel == "whole" else ROWS[size] % t.own:
        raise ValueError(f"the {kernel} kernel cannot have {t} for items of {ROWS[size]} rows ({size} sequences)")
    m, n = (t.other, t.own) if kernel == "dkv" else (t.own, t.other)
    width, rest = common.split_columns(head_dim, dtype)
    form: dict[str, Any] = {"ONE": t.other >= ROWS[size]} if kernel == "whole" else {"TAIL": t.tail}
    return form | {
        "D": head_dim, "BLOCK_D": width, "REST": rest, "BLOCK_M": m, "BLOCK_N": n, "PRECISION": common.precision(),
        "UPCAST": upcast, "num_warps": t.warps, "num_stages": t.stages,
        "maxnreg": t.registers if t.registers and capability == 9 else None,
    }  # fmt: skip


def variants() -> Iterator[tuple[str, int, torch.dtype, str]]:
    """(kernel, head dimension, dtype, length class): what is compiled for the head dimensions in use, once each."""
    for kernel in KERNELS:
        for head_dim in HEAD_DIMS:
            for dtype in DTYPES:
                tiles = set()
                for size in reversed(ROWS):
                    replaced = kernel in ("dq", "dkv") and size == "tiny" and tile("whole", head_dim, dtype, size)
                    chosen = tile(kernel, head_dim, dtype, size)
                    if chosen and not replaced and chosen not in tiles:
                        yield kernel, head_dim, dtype, size
                    tiles.add(chosen)


Work = Sequence[Tensor]
"""Lists of tiny, short and long sequences, see :func:`avfast.kernels.work_lists.work_lists`."""


def _launch(
    kernel: str, tensors: Sequence[Tensor], boundaries: Sequence[Tensor], strided: Sequence[Tensor],
    numbers: Sequence[int], scale: float, work: Work, sizes: Sequence[str], clear: bool,
) -> None:  # fmt: skip
    """One launch per length class that has items; where ``clear``, the first also clears the rows past the last one."""
    like = tensors[0]
    heads, head_dim = like.shape[1:]
    strides = [s for x in strided for s in x.stride()[:2]]
    capability = torch.cuda.get_device_capability(like.device)[0] if like.is_cuda else 9
    lists = {size: items for size, items in zip(ROWS, work, strict=True) if size in sizes}
    full = [size for size in reversed(lists) if len(lists[size]) > SPARE] or list(lists)[-1:] * clear
    for number, size in enumerate(full):
        settings = constants(kernel, head_dim, like.dtype, size, common.interpreted(), capability)
        split = () if kernel == "whole" else (ROWS[size] // settings["BLOCK_N" if kernel == "dkv" else "BLOCK_M"],)
        items = (len(lists[size]) - SPARE) * math.prod(split)
        arguments = (*tensors, lists[size], *boundaries, *strides, heads, items, *numbers, *split, scale)
        common.launch(KERNELS[kernel], (items + (clear and number == 0)) * heads, *arguments, **settings)


def forward(
    q: Tensor, k: Tensor, v: Tensor, end_q: Tensor, work: Work, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Writes ``out`` ``(Tq, H, D)`` and the natural log-sum-exp ``(H, Tq)``, rows beyond ``end_q`` included."""
    q, k, v = map(unit_stride, (q, k, v))
    _launch("forward", (q, k, v, out, lse), (end_q,), (q, k, v, out), (len(q),), scale, work, EACH, True)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, end_q: Tensor, end_k: Tensor,
    work_q: Work, work_k: Work, scale: float, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Writes ``dq``, ``dk``, ``dv``, which may be strided views, rows beyond the last sequence included."""
    for launch in backward_parts(
        grad, q, k, v, out, lse, end_q, end_k, work_q, work_k, scale, dq, dk, dv
    ).values():  # fmt: skip
        launch()


def backward_parts(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, end_q: Tensor, end_k: Tensor,
    work_q: Work, work_k: Work, scale: float, dq: Tensor, dk: Tensor, dv: Tensor,
) -> dict[str, Callable[[], None]]:  # fmt: skip
    """The launches of :func:`backward` per kernel, in their order."""
    grad, q, k, v = map(unit_stride, (grad, q, k, v))
    parts: dict[str, Callable[[], None]] = {}
    whole = tile("whole", q.shape[-1], q.dtype, "tiny") is not None
    cut = EACH[whole:]
    alone = whole and not any(len(x) > SPARE for x in (*work_q[1:], *work_k[1:]))
    if not alone:
        delta = torch.empty_like(lse)
        parts["dq"] = partial(
            _launch, "dq", (grad, q, k, v, out, lse, delta, dq), (end_q,), (grad, q, k, v, out, dq), (len(q),), scale,
            work_q, cut, True,
        )  # fmt: skip
        parts["dkv"] = partial(
            _launch, "dkv", (grad, q, k, v, lse, delta, dk, dv), (end_k,), (grad, q, k, v, dk, dv), (len(k), len(q)),
            scale, work_k, cut, True,
        )  # fmt: skip
    if whole:
        parts["whole"] = partial(
            _launch, "whole", (grad, q, k, v, out, lse, dq, dk, dv), (end_q, end_k), (grad, q, k, v, out, dq, dk, dv),
            (len(q), len(k)), scale, work_q, ("tiny",), alone,
        )  # fmt: skip
    return parts
