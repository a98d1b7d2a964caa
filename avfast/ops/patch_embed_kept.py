"""Embedding of the patches that masking keeps, straight from the images.

For kept entry t, which names patch (i, j) of image b with p x p pixels and C channels:
  x_t = W vec(image[b, :, i p : (i + 1) p, j p : (j + 1) p]) + bias
equal to embedding all patches and selecting, without their copy and their products. A gather writes the kept patches
(T, C p p), pixels in the order of a convolution kernel; the product is PyTorch's. The gradient with respect to images,
where asked for, adds every patch's gradient back to its place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avfast import backend
from avfast.ops._shared import autocast_dtype, register_autograd


def patch_embed_kept(images: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """Embed some patches of a batch.

    Args:
        images: ``(B, C, H, W)``, any strides; remainders of H and W by p are left out.
        weight: ``(D, C, p, p)`` kernel.
        bias: ``(D,)`` or None.
        rows: ``(T,)`` int64 entries of the row-major (B, H // p, W // p) patch list, b * N + i * (W // p) + j.

    Returns:
        ``(T, D)``, in the autocast dtype under autocast.

    Raises:
        ValueError: on shapes that do not fit.
    """
    if images.ndim != 4 or weight.ndim != 4 or weight.shape[2] != weight.shape[3] or images.shape[1] != weight.shape[1]:
        raise ValueError(
            f"images must be (B, C, H, W) and weight (D, C, p, p), got {tuple(images.shape)} and {tuple(weight.shape)}"
        )
    if rows.ndim != 1 or rows.dtype != torch.int64:
        raise ValueError(f"rows must be (T,) int64, got {rows.dtype} of {tuple(rows.shape)}")
    return F.linear(gather_patches(images, rows, weight.shape[2]), weight.flatten(1), bias)


def gather_patches(images: Tensor, rows: Tensor, patch_size: int) -> Tensor:
    """``(T, C p p)`` pixels of the patches that ``rows`` names, see :func:`patch_embed_kept`."""
    if not backend.use_kernels("patch_embed_kept", images):
        return _composed(images, rows, patch_size)
    return _gather(images, rows, patch_size, autocast_dtype(images))


def _composed(images: Tensor, rows: Tensor, patch_size: int) -> Tensor:
    """Selects lines of p neighbouring pixels, so that only kept patches are copied."""
    p, channels, (height, width) = patch_size, images.shape[1], (n // patch_size for n in images.shape[2:])
    b, i, j = rows // (height * width), rows // width % height, rows % width
    transposed = images.stride(3) != 1 and images.stride(2) == 1  # spectrograms: neighbours in memory are in a column
    if transposed:
        images, i, j, width = images.mT, j, i, height
    size = images.shape[2]
    lines = images[..., : width * p].reshape(-1, p)
    line = torch.arange(channels, device=rows.device)[:, None] * size + torch.arange(p, device=rows.device)
    places = ((b * channels * size + i * p) * width + j)[:, None] + line.flatten() * width
    patches = lines.index_select(0, places.flatten()).view(-1, channels, p, p)
    return (patches.mT if transposed else patches).flatten(1)


@torch.library.custom_op("avfast::gather_patches", mutates_args=())
def _gather(images: Tensor, rows: Tensor, patch_size: int, dtype: torch.dtype) -> Tensor:
    if backend.use_kernels("patch_embed_kept", images):
        from avfast.kernels import patch_embed_kept as kernels

        return kernels.gather(images, rows, patch_size, dtype)
    return _composed(images, rows, patch_size).to(dtype).contiguous()


@_gather.register_fake
def _(images: Tensor, rows: Tensor, patch_size: int, dtype: torch.dtype) -> Tensor:
    return images.new_empty((rows.shape[0], images.shape[1] * patch_size**2), dtype=dtype)


@torch.library.custom_op("avfast::gather_patches_backward", mutates_args=())
def _scatter(grad: Tensor, rows: Tensor, shape: list[int], patch_size: int, dtype: torch.dtype) -> Tensor:
    """Gradient of images; a patch named twice gets both, added in a fixed order."""
    p, (batch, channels, height, width) = patch_size, shape
    grid = (height // p, width // p)
    wide = torch.promote_types(dtype, grad.dtype)
    patches = grad.new_zeros((batch * grid[0] * grid[1], channels * p * p), dtype=wide)
    patches.index_put_((rows,), grad.to(wide), accumulate=True)
    pixels = patches.view(batch, *grid, channels, p, p).permute(0, 3, 1, 4, 2, 5)
    out = grad.new_zeros(shape, dtype=dtype)
    out[..., : grid[0] * p, : grid[1] * p] = pixels.reshape(batch, channels, grid[0] * p, grid[1] * p)
    return out


@_scatter.register_fake
def _(grad: Tensor, rows: Tensor, shape: list[int], patch_size: int, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(shape, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, rows, patch_size, _ = inputs
    ctx.save_for_backward(rows)
    ctx.shape, ctx.patch_size, ctx.dtype = list(images.shape), patch_size, images.dtype


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _scatter(grad, ctx.saved_tensors[0], ctx.shape, ctx.patch_size, ctx.dtype), None, None, None


register_autograd("patch_embed_kept", _gather, _scatter, _differentiate, _save)
