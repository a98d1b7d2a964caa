"""Images and spectrograms to patch tokens and back."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from avfast.ops.patch_embed_kept import patch_embed_kept


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """``(B, C, H, W)`` to ``(B, N, P)`` patches, row-major; the P = p * p * C values of a patch run (row, column,
    channel).

    Rows and columns beyond a multiple of ``patch_size`` are dropped.
    """
    p = patch_size
    rows, columns = images.shape[-2] // p, images.shape[-1] // p
    cut = images[..., : rows * p, : columns * p]
    return cut.unflatten(2, (rows, p)).unflatten(4, (columns, p)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Undo :func:`patchify`: ``(B, N, P)`` to ``(B, C, rows * p, columns * p)``."""
    p = patch_size
    split = patches.unflatten(1, grid).unflatten(3, (p, p, patches.shape[2] // p**2))
    return split.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class PatchEmbed(nn.Module):
    """Patches to tokens, for all patches or only for the kept ones.

    Args:
        img_size: (H, W) of the input.
        patch_size: p.
        in_chans: C.
        embed_dim: D.

    ``proj`` is timm's convolution ``(D, C, p, p)``. Remainders of H and W by p are dropped.
    """

    def __init__(self, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.img_size, self.patch_size = tuple(img_size), patch_size
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        if self.num_patches == 0:
            raise ValueError(f"an input of {tuple(img_size)} holds no patch of {patch_size} x {patch_size}")
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, images: Tensor, rows: Tensor | None = None) -> Tensor:
        """Embed patches.

        Args:
            images: ``(B, C, H, W)``.
            rows: ``(T,)`` int64, entries of the flattened (B, N) patch list; default all of them.

        Returns:
            ``(T, D)``, or ``(B * N, D)`` without ``rows``.
        """
        if images.shape[-2:] != self.img_size or images.shape[1] != self.proj.in_channels:
            raise ValueError(
                f"expected (B, {self.proj.in_channels}, {self.img_size[0]}, {self.img_size[1]}), "
                f"got {tuple(images.shape)}"
            )
        if rows is not None:
            return patch_embed_kept(images, self.proj.weight, self.proj.bias, rows)
        p, (height, width) = self.patch_size, self.grid_size
        cut = images[..., : height * p, : width * p].unflatten(2, (height, p)).unflatten(4, (width, p))
        patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)
