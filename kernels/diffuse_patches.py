"""Gather of masked patches and their noise in one pass. One lane per block of noise, that is per four values.

A program takes BLOCK neighbouring blocks of the (B M, Q) list, Q = ceil(P / 4), so that no lane is idle and lanes
beside one another read and write neighbours in each of the four words. The numbers do not depend on BLOCK. Philox is
about 100 integer instructions a block, near what memory leaves time for. Logarithm, sine and cosine are the
polynomials of csrc/philox.h, which says why; ``tl.philox`` is Philox4x32-10.

Names beside those of :mod:`avfast.kernels.common`:
  m, count, VALUES         patches of a sample, of all samples; P
  time, height, width      patches along each, in noised() places within one
  PT, PH, PW, CHANNELS     sizes of a patch
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from avfast.kernels.common import launch
from torch import Tensor

BLOCK, WARPS = 512, 4


@triton.jit
def turned(x):
    """Cosine and sine of 2 pi x / 2^32, x uint32."""
    quarter = x + 0x20000000
    y = (x << 2).to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10
    w = y * y
    s = (((-3.5954507e-05 * w + 2.49000713e-03) * w - 8.07454348e-02) * w + 7.85398161e-01) * y
    c = ((-3.18880508e-04 * w + 1.58499153e-02) * w - 3.08424254e-01) * w + 9.99999972e-01
    swap = (quarter & 0x40000000) != 0
    cosine, sine = tl.where(swap, s, c), tl.where(swap, c, s)
    cosine = tl.where((quarter + 0x40000000) & 0x80000000 != 0, -cosine, cosine)
    return cosine, tl.where(quarter & 0x80000000 != 0, -sine, sine)


@triton.jit
def minus_two_log(x):
    """Of u = ((x >> 8) + 1) 2^-24, x uint32."""
    bits = ((x >> 8) + 1).to(tl.int32).to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = ((0.20213785767555237 * f - 0.32445159554481506) * f + 0.34501659870147705) * f - 0.39800330996513367
    p = (((p * f + 0.4993981719017029) * f - 0.6667011976242065) * f + 1.0000072717666626) * f - 1.9999998807907104
    return (24 - exponent).to(tl.float32) * 1.3862943611198906 + f * p


@triton.jit
def normal_pair(x, y):
    radius = tl.sqrt(minus_two_log(x))
    cosine, sine = turned(y)
    return radius * cosine, radius * sine


@triton.jit
def noised(x_ptr, out_ptr, z, corner, row, value, live, right, signal, level, c_stride, t_stride, h_stride, w_stride,
           PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, VALUES: tl.constexpr):  # fmt: skip
    """Reads, mixes and writes one word's values; NaN where the patch or its step does not exist."""
    here = live & (value < VALUES)
    channel, time, line, column = value // (PT * PH * PW), value // (PH * PW) % PT, value // PW % PH, value % PW
    place = channel.to(tl.int64) * c_stride + time.to(tl.int64) * t_stride + line * h_stride + column * w_stride
    x = tl.load(x_ptr + corner + place, mask=here & right, other=0.0).to(tl.float32)
    mixed = tl.where(right, signal * x + level * z, float("nan"))
    tl.store(out_ptr + row.to(tl.int64) * VALUES + value, mixed.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit(
    do_not_specialize=["count", "m", "time", "height", "width", "steps", "stream"],
    do_not_specialize_on_alignment=["ids_ptr", "t_ptr", "tables_ptr", "seed_ptr", "names_ptr"],
)
def diffuse_kernel(
    x_ptr, ids_ptr, t_ptr, tables_ptr, seed_ptr, names_ptr, out_ptr,
    count, m, time, height, width, steps, stream, b_stride, c_stride, t_stride, h_stride, w_stride,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    Q: tl.constexpr = (VALUES + 3) // 4
    first = tl.program_id(0).to(tl.int64) * BLOCK
    item = (first % Q).to(tl.int32) + tl.arange(0, BLOCK)  # (BLOCK,), in 32 bits, whose divisions are cheap
    row, block = (first // Q).to(tl.int32) + item // Q, item % Q
    if Q % 16 == 0:  # which the compiler does not see through the division
        row, block = tl.max_constancy(row, 16), tl.max_contiguous(tl.multiple_of(block, 16), 16)
    live = row < count
    sample = row // m
    patch = tl.load(ids_ptr + row, mask=live, other=0)
    step = tl.load(t_ptr + sample, mask=live, other=0)
    right = (patch >= 0) & (patch < tl.cast(time, tl.int64) * height * width) & (step >= 0) & (step < steps)
    patch, step = tl.where(right, patch, 0).to(tl.int32), tl.where(right, step, 0).to(tl.int32)
    signal = tl.load(tables_ptr + step)
    level = tl.load(tables_ptr + steps + step)
    name = tl.load(names_ptr + sample, mask=live, other=0)
    seed = tl.load(seed_ptr)
    counter = patch.to(tl.uint32) * Q + block.to(tl.uint32)
    constant = (block * 0 + stream).to(tl.uint32)
    v0, w0, v1, w1 = tl.philox(seed, counter, constant, name.to(tl.uint32), (name >> 32).to(tl.uint32))
    z0, z1 = normal_pair(v0, w0)
    z2, z3 = normal_pair(v1, w1)
    corner = (
        sample.to(tl.int64) * b_stride
        + (patch // (height * width) * PT).to(tl.int64) * t_stride
        + (patch // width % height * PH).to(tl.int64) * h_stride
        + (patch % width * PW).to(tl.int64) * w_stride
    )
    noised(x_ptr, out_ptr, z0, corner, row, block, live, right, signal, level,
           c_stride, t_stride, h_stride, w_stride, PT, PH, PW, VALUES)  # fmt: skip
    noised(x_ptr, out_ptr, z1, corner, row, block + Q, live, right, signal, level,
           c_stride, t_stride, h_stride, w_stride, PT, PH, PW, VALUES)  # fmt: skip
    noised(x_ptr, out_ptr, z2, corner, row, block + 2 * Q, live, right, signal, level,
           c_stride, t_stride, h_stride, w_stride, PT, PH, PW, VALUES)  # fmt: skip
    noised(x_ptr, out_ptr, z3, corner, row, block + 3 * Q, live, right, signal, level,
           c_stride, t_stride, h_stride, w_stride, PT, PH, PW, VALUES)  # fmt: skip


def diffuse(
    x: Tensor,
    ids: Tensor,
    t: Tensor,
    tables: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    stream: int,
    patch: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """``(B, M, P)``, see :func:`avfast.ops.diffuse_patches.diffuse_patches`; x (B, C, T, H, W) of any strides."""
    (batch, channels), sizes, m = x.shape[:2], x.shape[2:], ids.shape[1]
    values = channels * patch[0] * patch[1] * patch[2]
    out = x.new_empty((batch, m, values), dtype=dtype)
    grid = [n // size for n, size in zip(sizes, patch, strict=True)]
    count = batch * m
    launch(
        diffuse_kernel, triton.cdiv(count * -(-values // 4), BLOCK),
        x, ids.contiguous(), t.contiguous(), tables, seed, sample_ids.contiguous(), out,
        count, m, *grid, tables.shape[1], stream, *x.stride(),
        PT=patch[0], PH=patch[1], PW=patch[2], VALUES=values, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return out
