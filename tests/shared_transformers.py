"""Small transformers with shared weights, for several test files."""

from __future__ import annotations

import torch
from torch import nn

from avfast.nn import SharedLowRankTransformer

SCHEMES = ("none", "layers", "transformers", "all", "part", "part_att")
LOW_RANK = ("part", "part_att")
SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0, "rank": 6, "init_std": 0.3}


def transformer(sharing, **settings):
    torch.manual_seed(0)
    module = SharedLowRankTransformer(**{**SIZES, "sharing": sharing, **settings})
    with torch.no_grad():
        for parameter in module.parameters():  # norms and biases too, and more than plane rotations
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return module


def run(module, inputs, factors=True):
    """Outputs of all transformers, each on inputs of its own."""
    f = module.factors() if factors else None
    return [module(x, i, f) for i, x in enumerate(inputs)]


def inputs(module, dtype=torch.float32, batch=2):
    generator = torch.Generator().manual_seed(1)
    shapes = ((batch, 3 + i, module.embed_dim) for i in range(len(module.depths)))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


class Parent(nn.Module):
    """A model as the library's are: the transformer's methods run within its forward."""

    def __init__(self, sharing):
        super().__init__()
        self.inner = transformer(sharing)

    def forward(self, *given):
        factors = self.inner.factors()
        return sum(self.inner(x, i, factors).square().mean() for i, x in enumerate(given))


def add_in_place(module):
    with torch.no_grad():
        module.skew[0, 0, 1] += 0.5
