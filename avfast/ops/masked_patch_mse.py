"""Reconstruction loss of masked autoencoders, its target read from the input itself.

For M predicted patches x^ of P values and the patches x that they stand for:
  sum over patches of mean_p (x^_p - x_p)^2  /  number of patches
(He et al., Masked Autoencoders, section 3). With ``norm_pix`` the target is (x - mean) / sqrt(var + 1e-6) per patch,
var unbiased. The gradient is 2 (x^ - x) / P over that number.

Neither the target patches nor their differences from the prediction are ever in memory as a whole: both passes read
patches out of the input where they lie. On a CPU they do so for a few patches at a time, which stay in its cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from avfast import backend
from avfast.distributed import all_sum, world_size
from avfast.ops._shared import at_least_float32, register_autograd

CHUNK = 2**18  # values that the eager body has at a time


def normalise_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patches ``(..., P)`` with zero mean and unit variance, and the ``(..., 1)`` mean and deviation that undo it.

    All in at least float32. Patches need two values: a single one has no variance.
    """
    patches = patches.to(at_least_float32(patches))
    mean = patches.mean(-1, keepdim=True)
    centred = patches - mean
    variance = centred.square().sum(-1, keepdim=True) / (patches.shape[-1] - 1)
    deviation = (variance + 1e-6).sqrt()
    return centred / deviation, mean, deviation


def masked_patch_mse(
    prediction: Tensor, x: Tensor, ids: Tensor, *, patch: int | Sequence[int], norm_pix: bool = False
) -> Tensor:
    """Squared error of predicted patches, divided by their number in the batches of all processes.

    Patches are numbered row by row (with time: frame by frame) of the grid that ``patch`` cuts ``x`` into; remainders
    are left out. The values of a patch run (frame, row, column, channel), the channel fastest. The target is a
    constant: no gradient flows into ``x``. The gradient is one more operator: it cannot be differentiated again, and
    ``torch.func`` transforms do not pass through.

    Args:
        prediction: ``(B, M, P)``, or ``(M, P)``.
        x: images ``(B, C, H, W)``, videos ``(B, C, T, H, W)`` or spectrograms ``(B, frames, mels)``, any strides.
        ids: int64 patch that each prediction is of: ``(B, M)`` numbers within an instance, or ``(M,)`` entries of the
            flattened (B, N) patches. Predictions with a negative id do not count.
        patch: (rows, columns) of a patch, for videos (frames, rows, columns); a number p stands for (p, p).
        norm_pix: normalise each target patch.

    Returns:
        Scalar in at least float32; 0 if nothing counts. The mean over processes is the loss of the global batch.

    Raises:
        ValueError: on shapes that do not fit, ids that are not int64 or beyond the grid (checked on the CPU only),
            predictions or inputs that are not floating point.
    """
    at_least_float32(prediction, x)
    size = (patch, patch) if isinstance(patch, int) else tuple(patch)
    if x.ndim not in (3, 4, 5) or len(size) != (3 if x.ndim == 5 else 2):
        raise ValueError(
            "x must be (B, frames, mels) or (B, C, H, W) with a patch of (rows, columns), or (B, C, T, H, W) with one "
            f"of (frames, rows, columns), got {tuple(x.shape)} and {size}"
        )
    volume = x[:, None, None] if x.ndim == 3 else x[:, :, None] if x.ndim == 4 else x
    size = (1, *size) if len(size) == 2 else size
    if min(size) < 1 or any(n < p for n, p in zip(volume.shape[2:], size, strict=True)):
        raise ValueError(f"x {tuple(x.shape)} holds no patch of {patch}")
    values = volume.shape[1] * size[0] * size[1] * size[2]
    if ids.dtype != torch.int64 or ids.ndim not in (1, 2) or (ids.ndim == 2 and ids.shape[0] != x.shape[0]):
        raise ValueError(f"ids must be (B, M) or (M,) int64 with B = {x.shape[0]}, got {tuple(ids.shape)} {ids.dtype}")
    if prediction.shape != (*ids.shape, values):
        raise ValueError(
            f"prediction must be {(*ids.shape, values)}: a patch of {size} has {values} values and there are "
            f"{tuple(ids.shape)} ids; got {tuple(prediction.shape)}"
        )
    count = patches_in(volume.shape, size)
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        limit = count if ids.ndim == 2 else count * x.shape[0]
        if (largest := int(ids.max())) >= limit:
            raise ValueError(f"ids must be below {limit}, the number of patches, got {largest}")
    rows = ids
    if ids.ndim == 2:
        first = torch.arange(0, count * x.shape[0], count, device=ids.device)[:, None]
        rows = torch.where(ids < 0, ids, ids + first).flatten()
    errors = _forward(prediction.reshape(-1, values), volume.detach(), rows, list(size), norm_pix)
    return errors.sum() * world_size() / all_sum((rows >= 0).sum()).clamp(min=1)


def patches_in(shape: Sequence[int], patch: Sequence[int]) -> int:
    """N, the patches of an instance of ``(B, C, T, H, W)``."""
    t, h, w = (n // p for n, p in zip(shape[2:], patch, strict=True))
    return t * h * w


def _lines(x: Tensor, patch: list[int]) -> tuple[Tensor, Tensor, tuple[int, ...], bool]:
    """How patches of ``(B, C, T, H, W)`` are read: lines of neighbouring values, the lines of patch 0, the grid and the
    steps from patch to patch in lines, whether the lines run down the columns."""
    transposed = x.stride(4) != 1 and x.stride(3) == 1  # spectrograms: neighbours in memory are in a column
    if transposed:
        x, patch = x.mT, [patch[0], patch[2], patch[1]]
    (t, p, q), (_, channels, frames, height) = patch, x.shape[:4]
    columns = x.shape[4] // q
    lines = x[..., : columns * q].reshape(-1, q)
    c, f, i = (torch.arange(n, device=x.device) for n in (channels, t, p))
    within = (((c[:, None, None] * frames + f[:, None]) * height + i) * columns).flatten()
    steps = (channels * frames * height * columns, t * height * columns, p * columns, 1)
    return lines, within, steps, transposed


def _differences(
    prediction: Tensor, x: Tensor, rows: Tensor, patch: list[int], norm_pix: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Some patches at a time: which, and ``(n, C, P / C)`` by how much their predictions are off."""
    values, channels = prediction.shape[1], x.shape[1]
    dtype, (_, height, width) = (
        at_least_float32(prediction, x),
        (n // p for n, p in zip(x.shape[2:], patch, strict=True)),
    )
    lines, within, (per_image, per_frame, per_row, per_column), transposed = _lines(x, patch)
    if transposed:
        per_row, per_column = per_column, per_row
    count = patches_in(x.shape, patch)
    image, number = rows.clamp(min=0) // count, rows.clamp(min=0) % count
    starts = image * per_image + number // (height * width) * per_frame
    starts += number // width % height * per_row + number % width * per_column
    step = max(1, CHUNK // values)
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        target = lines.index_select(0, (starts[part, None] + within).flatten()).to(dtype)
        if transposed:
            target = target.view(-1, patch[2], patch[1]).mT.contiguous()
        target = target.view(-1, values)
        if norm_pix:
            target -= target.mean(1, keepdim=True)
            target /= (target.square().sum(1, keepdim=True) / (values - 1) + 1e-6).sqrt_()
        target = target.view(-1, channels, values // channels)
        guess = prediction[part].unflatten(1, (values // channels, channels)).mT
        yield part, torch.sub(guess, target, out=target)


@torch.library.custom_op("avfast::masked_patch_mse", mutates_args=())
def _forward(prediction: Tensor, x: Tensor, rows: Tensor, patch: list[int], norm_pix: bool) -> Tensor:
    """``(M,)`` mean squared error of each patch, 0 where it does not count."""
    if backend.use_kernels("masked_patch_mse", prediction, x):
        from avfast.kernels import masked_patch_mse as kernels

        return kernels.forward(prediction, x, rows, patch, norm_pix)
    errors = x.new_empty(rows.shape, dtype=at_least_float32(prediction, x))
    for part, difference in _differences(prediction, x, rows, patch, norm_pix):
        errors[part] = difference.square_().mean((1, 2))
    return errors.masked_fill_(rows < 0, 0.0)


@_forward.register_fake
def _(prediction: Tensor, x: Tensor, rows: Tensor, patch: list[int], norm_pix: bool) -> Tensor:
    return x.new_empty(rows.shape, dtype=at_least_float32(prediction, x))


@torch.library.custom_op("avfast::masked_patch_mse_backward", mutates_args=())
def _backward(grad: Tensor, prediction: Tensor, x: Tensor, rows: Tensor, patch: list[int], norm_pix: bool) -> Tensor:
    """Gradient of the prediction."""
    if backend.use_kernels("masked_patch_mse", prediction, x):
        from avfast.kernels import masked_patch_mse as kernels

        return kernels.backward(grad, prediction, x, rows, patch, norm_pix)
    out = prediction.new_empty(prediction.shape)
    scale = (grad * (2 / prediction.shape[1]))[:, None, None]
    for part, difference in _differences(prediction, x, rows, patch, norm_pix):
        difference *= scale[part]
        pixels = out[part].unflatten(1, (difference.shape[2], difference.shape[1]))
        for channel in range(pixels.shape[2]):  # one by one: neighbours in the loop are neighbours of one channel
            pixels[:, :, channel] = difference[:, channel]
    if rows.device.type == "cpu":
        return out.index_fill_(0, (rows < 0).nonzero()[:, 0], 0.0)  # a few rows, not a pass over all
    return out.masked_fill_((rows < 0)[:, None], 0.0)


@_backward.register_fake
def _(grad: Tensor, prediction: Tensor, x: Tensor, rows: Tensor, patch: list[int], norm_pix: bool) -> Tensor:
    return prediction.new_empty(prediction.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    prediction, x, rows, ctx.patch, ctx.norm_pix = inputs
    ctx.save_for_backward(prediction, x, rows)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(grad, *ctx.saved_tensors, ctx.patch, ctx.norm_pix), None, None, None, None


register_autograd("masked_patch_mse", _forward, _backward, _differentiate, _save)
