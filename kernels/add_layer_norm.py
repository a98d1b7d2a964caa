"""Residual addition and LayerNorm: one pass over the rows each way.

Memory-bound. A program holds a tile of whole rows in registers, so every tensor is read and written once; sums over a
row never leave the program. The backward walks a fixed number of row chunks and writes one partial sum of the weight's
and the bias's gradient per chunk; adding those up in a second step keeps the result the same from run to run.
Every affine set is a launch of its own over its rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from avfast.kernels.common import launch, unit_stride
from torch import Tensor

FORWARD_TILE, BACKWARD_TILE = 4096, 2048  # elements per program or, in the backward, per step of its loop
PARTIALS = 512  # chunks per affine set in the backward: four per multiprocessor of an H100 or H200


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["mean_ptr", "rstd_ptr"])
def norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, normed_ptr, total_ptr, mean_ptr, rstd_ptr,
    num_rows, x_stride, residual_stride, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    live, inside = row < num_rows, column < D
    mask = live[:, None] & inside[None, :]  # (ROWS, BLOCK_D)
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask, other=0.0).to(tl.float32)
    update = tl.load(residual_ptr + row[:, None] * residual_stride + column[None, :], mask, other=0.0).to(tl.float32)
    out = row[:, None] * D + column[None, :]
    total = (x + update).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + out, total, mask)
    total = total.to(tl.float32)  # the backward sees the rounded sum
    mean = tl.sum(total, 1) / D  # (ROWS,)
    centred = tl.where(mask, total - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    weight = tl.load(weight_ptr + column, inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, inside, other=0.0).to(tl.float32)
    normed = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + out, normed.to(normed_ptr.dtype.element_ty), mask)
    tl.store(mean_ptr + row, mean, live)
    tl.store(rstd_ptr + row, rstd, live)


@triton.jit(do_not_specialize=["num_rows", "rows_per_program"], do_not_specialize_on_alignment=["mean_ptr", "rstd_ptr"])
def norm_backward_kernel(
    grad_normed_ptr, grad_total_ptr, total_ptr, weight_ptr, mean_ptr, rstd_ptr,
    grad_x_ptr, grad_residual_ptr, partial_weight_ptr, partial_bias_ptr,
    num_rows, rows_per_program, grad_normed_stride, grad_total_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, WRITE_RESIDUAL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    weight = tl.load(weight_ptr + column, inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((ROWS, BLOCK_D), tl.float32)  # summed over rows at the end
    grad_bias = tl.zeros((ROWS, BLOCK_D), tl.float32)
    first = program * rows_per_program
    end = tl.minimum(first + rows_per_program, num_rows)
    for start in range(first, end, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        live = row < end
        mask = live[:, None] & inside[None, :]
        place = row[:, None] * D + column[None, :]
        grad = tl.load(grad_normed_ptr + row[:, None] * grad_normed_stride + column[None, :], mask, other=0.0)
        grad = grad.to(tl.float32)
        stream = tl.load(grad_total_ptr + row[:, None] * grad_total_stride + column[None, :], mask, other=0.0)
        total = tl.load(total_ptr + place, mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, live, other=0.0)
        rstd = tl.load(rstd_ptr + row, live, other=0.0)
        standard = tl.where(mask, (total - mean[:, None]) * rstd[:, None], 0.0)
        scaled = grad * weight[None, :]
        along = tl.sum(scaled * standard, 1) / D  # (ROWS,)
        level = tl.sum(scaled, 1) / D
        grad_x = stream.to(tl.float32) + rstd[:, None] * (scaled - level[:, None] - standard * along[:, None])
        tl.store(grad_x_ptr + place, grad_x.to(grad_x_ptr.dtype.element_ty), mask)
        if WRITE_RESIDUAL:
            tl.store(grad_residual_ptr + place, grad_x.to(grad_residual_ptr.dtype.element_ty), mask)
        grad_weight += grad * standard
        grad_bias += grad
    partial = program.to(tl.int64) * D + column
    tl.store(partial_weight_ptr + partial, tl.sum(grad_weight, 0), inside)
    tl.store(partial_bias_ptr + partial, tl.sum(grad_bias, 0), inside)


def tile(dim: int, elements: int) -> dict[str, int]:
    """Rows of D values per tile, about ``elements`` in all, and the warps that hold them."""
    block = triton.next_power_of_2(dim)
    return {"D": dim, "BLOCK_D": block, "ROWS": max(1, elements // block), "num_warps": 4 if block <= 2048 else 8}


def forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, sizes: list[int], eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """normed, sum, mean and 1 / deviation."""
    x, residual, weight, bias = unit_stride(x), unit_stride(residual), weight.contiguous(), bias.contiguous()
    rows, dim = x.shape
    total = x.new_empty((rows, dim), dtype=torch.promote_types(x.dtype, residual.dtype))
    normed = x.new_empty((rows, dim), dtype=dtype)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    shape = tile(dim, FORWARD_TILE)
    first = 0
    for group, size in enumerate(sizes):
        if size:
            part = slice(first, first + size)
            launch(
                norm_forward_kernel, triton.cdiv(size, shape["ROWS"]),
                x[part], residual[part], weight[group], bias[group], normed[part], total[part], mean[part], rstd[part],
                size, x.stride(0), residual.stride(0), eps, **shape,
            )  # fmt: skip
        first += size
    return normed, total, mean, rstd


def backward(
    grad_normed: Tensor,
    grad_total: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sizes: list[int],
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the residual (empty where x's serves), of weight and of bias."""
    grad_normed, grad_total, weight = unit_stride(grad_normed), unit_stride(grad_total), weight.contiguous()
    rows, dim = total.shape
    grad_x = total.new_empty((rows, dim), dtype=x_dtype)
    write = x_dtype != residual_dtype
    grad_residual = total.new_empty((rows, dim) if write else (0,), dtype=residual_dtype)
    grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(weight)
    shape = tile(dim, BACKWARD_TILE)
    first = 0
    for group, size in enumerate(sizes):
        if size:
            part = slice(first, first + size)
            per_program = triton.cdiv(triton.cdiv(size, PARTIALS), shape["ROWS"]) * shape["ROWS"]
            programs = triton.cdiv(size, per_program)
            partial = total.new_empty((2, programs, dim), dtype=torch.float32)
            launch(
                norm_backward_kernel, programs,
                grad_normed[part], grad_total[part], total[part], weight[group], mean[part], rstd[part],
                grad_x[part], grad_residual[part] if write else grad_residual, partial[0], partial[1],
                size, per_program, grad_normed.stride(0), grad_total.stride(0), WRITE_RESIDUAL=write, **shape,
            )  # fmt: skip
            grad_weight[group], grad_bias[group] = partial.sum(1)
        first += size
    return grad_x, grad_residual, grad_weight, grad_bias
