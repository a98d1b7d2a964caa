"""A low-rank projection normalised between its factors against the same in PyTorch's operators.

    python benchmarks/low_rank.py [--quick] [--cases 'qkv*'] [--dtypes float32,bfloat16] [--batch B] [--graph]

Cases are AVBERT's projections at rank 128, for B sequences of 31 tokens, or 62 in the multimodal transformer.
`separate` projects queries, keys and values one after the other, as the released code does (but with Sigma U^T folded);
`wide` shares one product with x among them; `*_compiled` are the same under torch.compile. The floor is reading tokens
and both factors and writing the output, and in the backward reading these and the gradient and writing gradients.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import op_runner
import torch
import torch.nn.functional as F
from common import OURS
from torch import Tensor

from avfast.ops import low_rank_linear


@dataclass(frozen=True)
class Case:
    """So many tokens, projected to ``chunks`` outputs of their own."""

    tokens: int
    chunks: int = 1
    width: int = 768
    out: int = 768
    rank: int = 128

    @property
    def weights(self) -> int:
        return self.chunks * self.rank * (self.width + self.out)


def cases(batch: int) -> dict[str, Case]:
    return {
        "qkv-31": Case(31 * batch, 3),
        "qkv-62": Case(62 * batch, 3),
        "dense-62": Case(62 * batch),
        "ffn-62": Case(62 * batch, out=3072),
        "ffn_output-62": Case(62 * batch, width=3072),
        "tiny": Case(5, 3, 32, 24, 16),
    }


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    x = torch.randn(case.tokens, case.width)
    v = torch.randn(case.chunks * case.rank, case.width) / case.width**0.5
    g, bias = torch.randn(case.chunks, case.rank, case.out), torch.randn(case.chunks, case.out)
    return [t.to(device, dtype) for t in (x, v, g, bias)], []


def avfast(case: Case, x: Tensor, v: Tensor, g: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return low_rank_linear(x, v, g, bias)


def separate(case: Case, x: Tensor, v: Tensor, g: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    parts = zip(v.split(case.rank), g, bias, strict=True)
    return tuple(torch.addmm(b, F.normalize(x @ factor.mT, dim=-1), m) for factor, m, b in parts)


def wide(case: Case, x: Tensor, v: Tensor, g: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    n = F.normalize((x @ v.mT).unflatten(1, (case.chunks, case.rank)), dim=-1)
    return torch.baddbmm(bias[:, None], n.transpose(0, 1), g).unbind()


def moved(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    x, y = case.tokens * case.width, case.tokens * case.chunks * case.out
    return (x + y + case.weights) * dtype.itemsize, 2 * (x + y / 2 + case.weights) * dtype.itemsize


OP = op_runner.Operator(
    "low_rank",
    cases,
    {OURS: avfast, "separate": separate, "wide": wide, "separate_compiled": separate, "wide_compiled": wide},
    inputs,
    moved,
    lambda case: 2 * case.tokens * case.weights,
)


def main(argv: list[str] | None = None) -> int:
    return op_runner.main(OP, __file__, __doc__.splitlines()[0], argv)


if __name__ == "__main__":
    sys.exit(main())
