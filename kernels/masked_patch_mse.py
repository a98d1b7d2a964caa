"""Squared error of predicted patches against the input they are cut from, of any strides. Memory-bound.

A program holds a few whole patches in registers, target and prediction, so that each is read once in either pass and
the statistics of a normalised target never leave it. Each program writes rows of its own: the same bits in every run.

  value       place in a patch, (frame, row, column, channel) with the channel fastest
  counts      the prediction is of a patch and not left out
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from avfast.kernels.common import launch, unit_stride
from torch import Tensor

TILE = 2048  # values per program: whole patches


@triton.jit
def patch_difference(
    prediction_ptr, x_ptr, rows_ptr, num_rows, prediction_stride,
    frames, height, width,
    stride_image, stride_channel, stride_frame, stride_row, stride_column,
    CHANNELS: tl.constexpr, T: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, VALUES: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, NORM_PIX: tl.constexpr,
):  # fmt: skip
    """``(ROWS, BLOCK)`` prediction less target, 0 beyond a patch and where a row does not count; rows, which exist."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    here = row < num_rows
    entry = tl.load(rows_ptr + row, here, other=-1)
    counts = entry >= 0
    entry = tl.where(counts, entry, 0)
    patch = entry % (frames * height * width)
    corner = entry // (frames * height * width) * stride_image  # (ROWS,)
    corner += patch // (height * width) * T * stride_frame
    corner += patch // width % height * P * stride_row + patch % width * Q * stride_column
    value = tl.arange(0, BLOCK)
    channel, column, line = value % CHANNELS, value // CHANNELS % Q, value // (CHANNELS * Q)
    place = channel.to(tl.int64) * stride_channel + line // P * stride_frame + line % P * stride_row
    place += column * stride_column
    mask = counts[:, None] & (value < VALUES)[None, :]  # (ROWS, BLOCK)
    target = tl.load(x_ptr + corner[:, None] + place[None, :], mask, other=0.0).to(tl.float32)
    if NORM_PIX:
        mean = tl.sum(target, 1) / VALUES  # (ROWS,)
        target = tl.where(mask, target - mean[:, None], 0.0)
        variance = tl.sum(target * target, 1) / (VALUES - 1)
        target = target / tl.sqrt(variance + 1e-6)[:, None]
    guess = tl.load(prediction_ptr + row[:, None] * prediction_stride + value[None, :], mask, other=0.0)
    return guess.to(tl.float32) - target, row, here


@triton.jit(
    do_not_specialize=["num_rows", "frames", "height", "width"],
    do_not_specialize_on_alignment=["rows_ptr", "errors_ptr"],
)
def patch_mse_forward_kernel(
    prediction_ptr, x_ptr, rows_ptr, errors_ptr, num_rows, prediction_stride,
    frames, height, width,
    stride_image, stride_channel, stride_frame, stride_row, stride_column,
    CHANNELS: tl.constexpr, T: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, VALUES: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, NORM_PIX: tl.constexpr,
):  # fmt: skip
    difference, row, here = patch_difference(
        prediction_ptr, x_ptr, rows_ptr, num_rows, prediction_stride, frames, height, width,
        stride_image, stride_channel, stride_frame, stride_row, stride_column,
        CHANNELS, T, P, Q, VALUES, BLOCK, ROWS, NORM_PIX,
    )  # fmt: skip
    tl.store(errors_ptr + row, tl.sum(difference * difference, 1) / VALUES, here)


@triton.jit(
    do_not_specialize=["num_rows", "frames", "height", "width", "grad_stride"],
    do_not_specialize_on_alignment=["rows_ptr", "grad_ptr"],
)
def patch_mse_backward_kernel(
    prediction_ptr, x_ptr, rows_ptr, grad_ptr, out_ptr, num_rows, prediction_stride, grad_stride,
    frames, height, width,
    stride_image, stride_channel, stride_frame, stride_row, stride_column,
    CHANNELS: tl.constexpr, T: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, VALUES: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, NORM_PIX: tl.constexpr,
):  # fmt: skip
    difference, row, here = patch_difference(
        prediction_ptr, x_ptr, rows_ptr, num_rows, prediction_stride, frames, height, width,
        stride_image, stride_channel, stride_frame, stride_row, stride_column,
        CHANNELS, T, P, Q, VALUES, BLOCK, ROWS, NORM_PIX,
    )  # fmt: skip
    grad = tl.load(grad_ptr + row * grad_stride, here, other=0.0).to(tl.float32) * (2.0 / VALUES)
    value = tl.arange(0, BLOCK)
    mask = here[:, None] & (value < VALUES)[None, :]
    out = (difference * grad[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * VALUES + value[None, :], out, mask)


def constants(channels: int, patch: list[int], norm_pix: bool) -> dict[str, int | bool]:
    """Compile-time arguments and options."""
    t, p, q = patch
    values = channels * t * p * q
    block = triton.next_power_of_2(values)
    return {
        "CHANNELS": channels, "T": t, "P": p, "Q": q, "VALUES": values, "BLOCK": block,
        "ROWS": max(1, TILE // block), "NORM_PIX": norm_pix, "num_warps": 4 if block <= 2048 else 8,
    }  # fmt: skip


def forward(prediction: Tensor, x: Tensor, rows: Tensor, patch: list[int], norm_pix: bool) -> Tensor:
    """``(M,)`` float32 mean squared error of each patch."""
    prediction, rows = unit_stride(prediction), rows.contiguous()
    errors = x.new_empty(rows.shape, dtype=torch.float32)
    fixed, grid = constants(x.shape[1], patch, norm_pix), [n // p for n, p in zip(x.shape[2:], patch, strict=True)]
    launch(
        patch_mse_forward_kernel, triton.cdiv(len(rows), fixed["ROWS"]),
        prediction, x, rows, errors, len(rows), prediction.stride(0), *grid, *x.stride(), **fixed,
    )  # fmt: skip
    return errors


def backward(grad: Tensor, prediction: Tensor, x: Tensor, rows: Tensor, patch: list[int], norm_pix: bool) -> Tensor:
    """Gradient of the prediction."""
    prediction, rows = unit_stride(prediction), rows.contiguous()
    out = prediction.new_empty(prediction.shape)
    fixed, grid = constants(x.shape[1], patch, norm_pix), [n // p for n, p in zip(x.shape[2:], patch, strict=True)]
    launch(
        patch_mse_backward_kernel, triton.cdiv(len(rows), fixed["ROWS"]),
        prediction, x, rows, grad, out, len(rows), prediction.stride(0), grad.stride(0), *grid, *x.stride(), **fixed,
    )  # fmt: skip
    return out
