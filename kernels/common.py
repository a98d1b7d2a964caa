"""What the kernels share: the split of a head's columns, tiles, launch conventions, and names.

Names in kernels; capitals are compile-time constants, and a comment (M, D) gives the shape of a tile:
  q, k, v, out, lse, grad, dq, ...    pointers, as the launcher's tensors; x_ptr where x is a tile
  x_row, x_head, x_batch, x_stride    strides of x in elements; x_stride of its rows
  qs, ks, vs, do, o                   tiles of queries, keys, values, gradient of the output, output
  x_rest                              second block of a tile's columns, see avfast.kernels.packed_tiles
  x_a, x_v                            of the first and the second modality
  begin, end, start                   rows of the program, or with _q and _k of the other side; first row of a tile
  live, own, here, inside             masks: rows that count, queries, rows that exist, columns
  s, p, dp, ds                        logits before the scale, weights, their gradients
  c, top, total, shrink               scale log2(e); in base 2 the maximum so far or the log-sum-exp; sum of weights;
                                      what an older maximum is multiplied with
  delta, de                           sum_d dO O per query: in memory, as a tile
  acc                                 float32 sum that a loop adds to
  D, DV                               columns of queries and keys, of values
  M, N, F                             BLOCK_M, BLOCK_N, BLOCK_F: rows of a tile of queries, of keys, of all queries
  FULL, TAIL, REST, ONE               no row is masked; rows of the last tile; columns of x_rest; one tile has all keys
  UPCAST                              tiles become float32 as they are loaded, for Triton's interpreter
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def block_of(columns: int) -> int:
    """The power of two, at least 16 as tensor cores want it, that holds so many columns."""
    return max(16, triton.next_power_of_2(columns))


def split_columns(columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """Widths of the first block of columns and of the second, 0 where one block serves.

    80 columns are 64 + 16, not 128; 112 are 128, as 64 + 64 would save nothing. In float32 two blocks do not fit in the
    registers.
    """
    whole = block_of(columns)
    rest = block_of(columns - whole // 2) if columns > whole // 2 else whole
    return (whole, 0) if dtype == torch.float32 or rest >= whole // 2 else (whole // 2, rest)


def precision() -> str:
    """Three TF32 products keep float32's accuracy on tensor cores; one alone is what the user may allow for matmuls."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def interpreted() -> bool:
    """Whether kernels run in the interpreter, which computes on raw bits of bfloat16 unless they are cast first."""
    return triton.knobs.runtime.interpret


def unit_stride(x: Tensor) -> Tensor:
    """``x`` with neighbouring values in its rows; other strides are free."""
    return x if x.stride(-1) == 1 else x.contiguous()


def launch(kernel: Any, programs: int, *arguments: Any, **settings: Any) -> None:
    """Runs so many programs of a kernel on the device of its first argument, whichever is the current one."""
    if programs:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **settings)


@triton.jit
def load_tile(pointer, begin, live, stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
              FULL: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """``(BLOCK, BLOCK_D)`` values from row ``begin``; zeros from column ``D`` on and in rows that are not ``live``.

    FULL takes all rows to be live.
    """
    i = tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    place = pointer + tl.cast(begin, tl.int64) * stride + i * stride + d
    if FULL:
        if D < BLOCK_D:
            x = tl.load(place, mask=(d < D) & (i >= 0), other=0.0)
        else:
            x = tl.load(place)
    else:
        mask = live[:, None] & (d < D) if D < BLOCK_D else live[:, None] & (d >= 0)
        x = tl.load(place, mask=mask, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def store_tile(pointer, x, begin, live, stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes the ``live`` rows of a ``(BLOCK, BLOCK_D)`` tile to the rows from ``begin``, up to column ``D``."""
    i = tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    place = pointer + tl.cast(begin, tl.int64) * stride + i * stride + d
    mask = live[:, None] & (d < D) if D < BLOCK_D else live[:, None] & (d >= 0)
    tl.store(place, x.to(pointer.dtype.element_ty), mask=mask)
