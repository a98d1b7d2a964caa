"""Exponentials of skew matrices against torch.linalg.matrix_exp and PyTorch's orthogonal parametrization.

    python benchmarks/skew_exp.py [--quick] [--cases 'norm*'] [--graph]

The batch is AVBERT's, the 18 factors of 128 x 128 that its layers and transformers share, in float32: `init` as the
model starts (64 plane rotations of at most 1 radian in each), `norm-2` to `norm-8` normal entries with that spectral
norm. `orthogonal` is torch.nn.utils.parametrizations.orthogonal with the matrix exponential. `cayley`,
(I - K/2)^-1 (I + K/2), is another map, which no weights of AVBERT go with: it is held against itself in float64 and no
ratio counts it. The floor is reading the input and writing the output in each pass.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import op_runner
import torch
from common import OURS
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import orthogonal as parametrize

from avfast.ops import skew_exp


@dataclass(frozen=True)
class Case:
    """So many n x n matrices of a spectral norm, or as AVBERT starts."""

    count: int
    n: int
    norm: float | None

    @property
    def bytes(self) -> float:
        return 4.0 * self.count * self.n**2


def cases(batch: int) -> dict[str, Case]:
    """The batch is the model's, whatever is asked for."""
    return {
        "init": Case(18, 128, None),
        "norm-2": Case(18, 128, 2.0),
        "norm-4": Case(18, 128, 4.0),
        "norm-8": Case(18, 128, 8.0),
        "tiny": Case(2, 8, 1.0),
    }


def skew(a: Tensor) -> Tensor:
    upper = a.triu(1)
    return upper - upper.mT


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    if case.norm is None:
        a = torch.zeros(case.count, case.n, case.n)
        a.diagonal(1, -2, -1)[:, ::2] = -(torch.pi / 4 * torch.rand(case.count, case.n // 2)).tan()
    else:
        a = torch.randn(case.count, case.n, case.n)
        a *= (case.norm / torch.linalg.matrix_norm(skew(a), 2))[:, None, None]
    return [a.to(device, dtype)], []


def avfast(case: Case, a: Tensor) -> Tensor:
    return skew_exp(a)


def matrix_exp(case: Case, a: Tensor) -> Tensor:
    return torch.linalg.matrix_exp(skew(a))


def orthogonal(case: Case, a: Tensor) -> Tensor:
    module = nn.Linear(case.n, case.n, bias=False)
    module = parametrize(module, "weight", "matrix_exp", use_trivialization=False)  # of the lower triangle: exp(-K)
    weight = functional_call(_Weight(module), {"module.parametrizations.weight.original": a.mT}, ())
    return weight.mT


class _Weight(nn.Module):
    """A module whose output is its only child's weight."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self) -> Tensor:
        return self.module.weight


def cayley(case: Case, a: Tensor) -> Tensor:
    half, one = skew(a) / 2, torch.eye(case.n, dtype=a.dtype, device=a.device)
    return torch.linalg.solve_ex(one - half, one + half)[0]  # solve would wait for the device


OP = op_runner.Operator(
    "skew_exp",
    cases,
    {OURS: avfast, "matrix_exp": matrix_exp, "orthogonal": orthogonal, "cayley": cayley},
    inputs,
    lambda case, dtype: (2 * case.bytes, 2 * case.bytes),
    flops=lambda case: 6 * 2.0 * case.count * case.n**3,
    backward=10 / 6,
    unlike=("cayley",),
)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return op_runner.main(OP, __file__, __doc__.splitlines()[0], ["--dtypes", "float32", *argv])


if __name__ == "__main__":
    sys.exit(main())
