"""Gather of kept patches out of images of any strides, cast on the way. One program per patch; memory-bound."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from avfast.kernels.common import launch
from torch import Tensor


@triton.jit(do_not_specialize=["width", "num_patches"], do_not_specialize_on_alignment=["rows_ptr"])
def gather_patches_kernel(
    images_ptr, rows_ptr, out_ptr, width, num_patches,
    stride_image, stride_channel, stride_row, stride_column,
    P: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    entry = tl.load(rows_ptr + token)
    image, patch = entry // num_patches, entry % num_patches
    corner = image * stride_image + (patch // width) * P * stride_row + (patch % width) * P * stride_column
    value = tl.arange(0, BLOCK)  # of the C p p values of a patch
    inside = value < VALUES
    channel, row, column = value // (P * P), value // P % P, value % P
    place = channel.to(tl.int64) * stride_channel + row * stride_row + column * stride_column
    pixels = tl.load(images_ptr + corner + place, inside)
    tl.store(out_ptr + token * VALUES + value, pixels.to(out_ptr.dtype.element_ty), inside)


def gather(images: Tensor, rows: Tensor, patch_size: int, dtype: torch.dtype) -> Tensor:
    """``(T, C p p)`` pixels of the patches that ``rows`` names."""
    height, width = (n // patch_size for n in images.shape[2:])
    values = images.shape[1] * patch_size**2
    out = images.new_empty((rows.shape[0], values), dtype=dtype)
    launch(
        gather_patches_kernel, rows.shape[0] if values else 0,
        images, rows.contiguous(), out, width, height * width, *images.stride(),
        P=patch_size, VALUES=values, BLOCK=triton.next_power_of_2(values),
    )  # fmt: skip
    return out
