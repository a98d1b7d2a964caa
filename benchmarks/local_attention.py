"""Windowed cosine attention from packed projections against windows that are rolled, cut and attended in PyTorch.

    python benchmarks/local_attention.py [--quick] [--cases '64x8*'] [--dtypes float32,bfloat16] [--batch B] [--graph]

`windows` writes out both products and the softmax, as the released code does; `windows_sdpa` normalises queries and
keys and calls scaled_dot_product_attention with bias and mask; `*_compiled` are the same under torch.compile. The
floor is reading queries, keys and values and writing the output, and in the backward reading these and the gradient and
writing three.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import op_runner
import torch
import torch.nn.functional as F
from common import OURS
from torch import Tensor

from avfast.ops import local_attention
from avfast.ops.local_attention import APART, window_regions


@dataclass(frozen=True)
class Case:
    """B samples of a grid of tokens in 4 x 4 windows."""

    batch: int
    grid: tuple[int, int] = (64, 8)
    shift: tuple[int, int] = (0, 0)
    heads: int = 16
    dim: int = 32

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]


WINDOW = (4, 4)


def cases(batch: int) -> dict[str, Case]:
    return {
        "64x8": Case(batch),
        "64x8-shifted": Case(batch, shift=(2, 0)),
        "8x8-shifted": Case(8 * batch, (8, 8), (2, 0)),
        "tiny": Case(2, (8, 4), (2, 0), 2, 16),
    }


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    qkv = torch.randn(case.batch, case.tokens, 3, case.heads, case.dim)
    bias, scale = torch.randn(case.heads, 16, 16), 1 + torch.rand(case.heads)
    return [qkv.to(device, dtype), bias.to(device), scale.to(device)], []


def avfast(case: Case, qkv: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    return local_attention(qkv, bias, scale, grid=case.grid, window=WINDOW, shift=case.shift)


def cut(case: Case, qkv: Tensor) -> Tensor:
    """``(3, B, windows, H, 16, D)``."""
    x = qkv.unflatten(1, case.grid)
    if any(case.shift):
        x = x.roll([-s for s in case.shift], (1, 2))
    x = x.unflatten(2, (-1, 4)).unflatten(1, (-1, 4)).permute(5, 0, 1, 3, 6, 2, 4, 7)
    return x.flatten(5, 6).flatten(2, 3)


def join(case: Case, out: Tensor) -> Tensor:
    x = out.unflatten(3, (4, 4)).unflatten(1, (case.grid[0] // 4, -1)).permute(0, 1, 4, 2, 5, 3, 6)
    x = x.flatten(3, 4).flatten(1, 2)
    return (x.roll(case.shift, (1, 2)) if any(case.shift) else x).flatten(1, 2)


def added(case: Case, bias: Tensor) -> Tensor:
    """Bias ``(H, 16, 16)``, with the mask of shifted windows ``(windows, H, 16, 16)``."""
    if not any(case.shift):
        return bias
    region = window_regions(case.grid, WINDOW, case.shift, bias.device)
    return bias + ((region[:, :, None] != region[:, None]) * APART)[:, None]


def windows(case: Case, qkv: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    q, k, v = cut(case, qkv)
    cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    logits = cosine * scale[:, None, None] + added(case, bias)
    return join(case, logits.softmax(-1).to(v.dtype) @ v)


def windows_sdpa(case: Case, qkv: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    q, k, v = cut(case, qkv).flatten(1, 2)
    q = F.normalize(q, dim=-1) * scale[:, None, None].to(q.dtype)
    mask = added(case, bias).to(q.dtype)
    if any(case.shift):
        mask = mask.repeat(case.batch, 1, 1, 1)
    out = F.scaled_dot_product_attention(q, F.normalize(k, dim=-1), v, attn_mask=mask, scale=1.0)
    return join(case, out.unflatten(0, (case.batch, -1)))


def moved(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    one = case.batch * case.tokens * case.heads * case.dim * dtype.itemsize
    return 4 * one, 7 * one


OP = op_runner.Operator(
    "local_attention",
    cases,
    {
        OURS: avfast,
        "windows": windows,
        "windows_sdpa": windows_sdpa,
        "windows_compiled": windows,
        "windows_sdpa_compiled": windows_sdpa,
    },
    inputs,
    moved,
    lambda case: 4 * case.batch * case.tokens * 16 * case.heads * case.dim,
)


def main(argv: list[str] | None = None) -> int:
    return op_runner.main(OP, __file__, __doc__.splitlines()[0], argv)


if __name__ == "__main__":
    sys.exit(main())
