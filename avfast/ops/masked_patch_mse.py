"""Reconstruction loss of masked autoencoders.

For predicted patches x^ and target patches x of P values each, over the masked patches of the batch:
  sum over masked patches of mean_p (x^_p - x_p)^2  /  number of masked patches
(He et al., Masked Autoencoders, section 3). With ``norm_pix`` the target is (x - mean) / sqrt(var + 1e-6) per patch,
var unbiased.
"""

from __future__ import annotations

import torch
from torch import Tensor

from avfast.distributed import all_sum, world_size
from avfast.ops._shared import at_least_float32


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


def masked_patch_mse(prediction: Tensor, patches: Tensor, mask: Tensor, *, norm_pix: bool = True) -> Tensor:
    """Squared error over masked patches, divided by their number in the batches of all processes.

    Args:
        prediction: ``(B, N, P)``.
        patches: ``(B, N, P)`` targets.
        mask: ``(B, N)`` bool, True where the patch counts.
        norm_pix: normalise each target patch.

    Returns:
        Scalar in at least float32; 0 if nothing is masked. The mean over processes is the loss of the global batch.

    Raises:
        ValueError: on shapes that do not fit, a mask that is not bool, predictions or patches that are not floating
            point.
    """
    if prediction.shape != patches.shape or mask.shape != patches.shape[:2]:
        raise ValueError(
            f"prediction {tuple(prediction.shape)}, patches {tuple(patches.shape)} and mask {tuple(mask.shape)} "
            "do not fit"
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, True where the patch counts, got {mask.dtype}")
    dtype = at_least_float32(prediction, patches)
    target = normalise_patches(patches)[0] if norm_pix else patches
    error = (prediction.to(dtype) - target.to(dtype)).square().mean(-1)
    count = all_sum(mask.sum()).clamp(min=1)
    return (error * mask).sum() * world_size() / count
