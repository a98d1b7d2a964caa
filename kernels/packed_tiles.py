"""Tiles of packed rows in two blocks of columns: the pieces that the packed attention kernels are made of.

A tile of D columns is a pair (first BLOCK_D columns, REST columns more). Where REST is 0 the second is a stand-in that
nobody reads and the compiler drops.
"""

from __future__ import annotations

import triton
import triton.language as tl
from avfast.kernels.common import load_tile, store_tile


@triton.jit
def load(pointer, begin, end, stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr,
         FULL: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Rows from ``begin`` as a pair; zeros from row ``end``, which FULL says is not reached, and column ``D`` on."""
    live = begin + tl.arange(0, BLOCK) < end
    x = load_tile(pointer, begin, live, stride, D, BLOCK, BLOCK_D, FULL, UPCAST)
    rest = x
    if REST:
        rest = load_tile(pointer + BLOCK_D, begin, live, stride, D - BLOCK_D, BLOCK, REST, FULL, UPCAST)
    return x, rest


@triton.jit
def store(pointer, x, rest, begin, end, stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
          REST: tl.constexpr):  # fmt: skip
    """Writes a pair to the rows from ``begin``, up to row ``end``."""
    live = begin + tl.arange(0, BLOCK) < end
    store_tile(pointer, x, begin, live, stride, D, BLOCK, BLOCK_D)
    if REST:
        store_tile(pointer + BLOCK_D, rest, begin, live, stride, D - BLOCK_D, BLOCK, REST)


@triton.jit
def zeros(BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr):
    """A pair of float32 zeros."""
    x = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    rest = x
    if REST:
        rest = tl.zeros((BLOCK, REST), tl.float32)
    return x, rest


@triton.jit
def clear_rows(pointer, begin, end, stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
               REST: tl.constexpr):  # fmt: skip
    x, rest = zeros(BLOCK, BLOCK_D, REST)
    for start in range(begin, end, BLOCK):
        store(pointer, x, rest, start, end, stride, D, BLOCK, BLOCK_D, REST)


@triton.jit
def products(a, a_rest, b, b_rest, REST: tl.constexpr, PRECISION: tl.constexpr):
    """``a b^T`` over all columns."""
    s = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if REST:
        s = tl.dot(a_rest, tl.trans(b_rest), s, input_precision=PRECISION)
    return s


@triton.jit
def multiply_add(p, x, rest, acc, acc_rest, REST: tl.constexpr, PRECISION: tl.constexpr):
    """The pair ``acc + p x``."""
    acc = tl.dot(p, x, acc, input_precision=PRECISION)
    if REST:
        acc_rest = tl.dot(p, rest, acc_rest, input_precision=PRECISION)
    return acc, acc_rest


@triton.jit
def item(work, index, split, BLOCK: tl.constexpr):
    """(first own row, end of the own rows, first other row, end of the other rows)."""
    entry = work + (index // split) * 4
    begin = tl.load(entry) + (index % split) * BLOCK
    return begin, tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def last_full(begin, end, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """Where full tiles end; without a tail the loop masks, and runs to the end."""
    full = end
    if TAIL:
        full = begin + (end - begin) // BLOCK * BLOCK
    return full
