"""AVBERT's transformers with shared weights."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close

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
    """The sum of all transformers' outputs, of one on inputs of its own."""
    f = module.factors() if factors else None
    return [module(x, i, f) for i, x in enumerate(inputs)]


def inputs(module, dtype=torch.float32, batch=2):
    generator = torch.Generator().manual_seed(1)
    shapes = ((batch, 3 + i, module.embed_dim) for i in range(len(module.depths)))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize(
    "sharing, count",
    [
        ("none", 127_581_696),
        ("layers", 21_263_616),
        ("transformers", 42_527_232),
        ("all", 7_087_872),
        ("part", 3_843_840),
        # U of q, k, v and b with 3 (V, Sigma), biases and a norm; three MLPs, each with biases and a norm
        ("part_att", 4 * 98_304 * 4 + 12 * 16_384 + 4 * 768 + 1536 + 3 * (2 * 768 * 3072 + 3840 + 1536)),
    ],
)
def test_parameter_counts_are_the_papers(sharing, count):
    with torch.device("meta"):
        module = SharedLowRankTransformer(sharing=sharing)
    assert sum(p.numel() for p in module.parameters()) == count
    skew = module.orthogonal_parameters()
    assert [tuple(p.shape) for p in skew] == {"part": [(18, 128, 128)], "part_att": [(12, 128, 128)]}.get(sharing, [])


def test_parameter_counts_of_other_sizes():
    with torch.device("meta"):
        small = SharedLowRankTransformer(320, 2, 5, sharing="none")
        late = SharedLowRankTransformer(depth=(12, 12))
        ranks = [SharedLowRankTransformer(rank=rank) for rank in (32, 64, 256)]
    counts = [sum(p.numel() for p in m.parameters()) for m in (small, late, *ranks)]
    assert counts == [7_397_760, 2_860_800, 913_152, 1_853_184, 8_267_520]


def softmax(x):
    weights = (x - x.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def norm(x, parameters, name):
    centred = x - x.mean(-1, keepdim=True)
    centred = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
    return centred * parameters[f"{name}.norm.weight"] + parameters[f"{name}.norm.bias"]


def naive(module, parameters, x, transformer):
    """One transformer, head by head, every product by its whole weight or factor by factor; matrix_exp of torch."""
    count, heads, width = len(module.depths), module.attention[0].num_heads, module.embed_dim
    for layer in range(module.depths[transformer]):
        index = {
            "none": sum(module.depths[:transformer]) + layer,
            "layers": transformer,
            "transformers": layer,
        }.get(module.sharing, 0)
        attention = f"attention.{index}"
        mlp = f"mlp.{transformer if module.sharing == 'part_att' else index}"

        def project(x, name, chunk, rotation, out=width):
            if f"{name}.weight" in parameters:
                part = slice(chunk * out, (chunk + 1) * out)
                return x @ parameters[f"{name}.weight"][part].T + parameters[f"{name}.bias"][part]
            rank = module.rank
            v = parameters[f"{name}.v"][transformer, chunk * rank : (chunk + 1) * rank]
            a = parameters["skew"][rotation * count + transformer]
            skew = torch.stack([
                torch.stack([a[i, j] if i < j else -a[j, i] if i > j else 0 * a[i, i] for j in range(rank)])
                for i in range(rank)
            ])  # fmt: skip
            z = x @ v.T
            n = z / z.square().sum(-1, keepdim=True).sqrt()
            return (
                n @ torch.linalg.matrix_exp(skew) @ parameters[f"{name}.u"][chunk].T + parameters[f"{name}.bias"][chunk]
            )

        q, k, v = (project(x, f"{attention}.qkv", c, c).chunk(heads, -1) for c in range(3))
        attended = [softmax(a @ b.mT / math.sqrt(width // heads)) @ c for a, b, c in zip(q, k, v, strict=True)]
        x = norm(x + project(torch.cat(attended, -1), f"{attention}.proj", 0, 3), parameters, attention)
        hidden = project(x, f"{mlp}.fc1", 0, 4, out=2 * width)
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        x = norm(x + project(hidden, f"{mlp}.fc2", 0, 5), parameters, mlp)
    return x


def results(module, outs, given, leaves):
    """Outputs, and gradients of inputs and parameters by name; the loss is linear in each output."""
    generator = torch.Generator().manual_seed(2)
    loss = sum((out.double() * torch.randn(out.shape, generator=generator).double()).sum() for out in outs)
    grads = torch.autograd.grad(loss, [*given, *leaves.values()])
    names = [*(f"output {i}" for i in range(len(outs))), *(f"input {i}" for i in range(len(given))), *leaves]
    return dict(zip(names, [*outs, *grads], strict=True))


def compare(got, want, tol):
    largest = max(want[name].abs().max().item() for name in want if not name.startswith("output"))
    for name in want:
        assert_close(name, got[name], want[name], tol, largest)


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("sharing", SCHEMES)
def test_outputs_and_gradients_are_those_of_the_formulas(sharing, dtype, tol):
    module = transformer(sharing, depth=(2, 1, 3)).to(dtype)
    given = [x.requires_grad_() for x in inputs(module, dtype)]
    exact = [x.detach().double().requires_grad_() for x in given]
    leaves = {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
    outs = [naive(module, leaves, x, i) for i, x in enumerate(exact)]
    want = results(module, outs, exact, leaves)
    compare(results(module, run(module, given), given, dict(module.named_parameters())), want, tol)
    for i, x in enumerate(given):
        assert torch.equal(module(x, i), run(module, given)[i])


@pytest.mark.parametrize("sharing", LOW_RANK)
def test_rotations_start_as_plane_rotations_and_weights_small(sharing):
    torch.manual_seed(0)
    module = SharedLowRankTransformer(64, 1, 4, sharing=sharing, rank=31)
    (skew,) = module.orthogonal_parameters()
    angles = -skew.detach().diagonal(1, -2, -1)[:, ::2]
    assert angles.shape[1] == 15 and angles.min() >= 0 and 0.9 < angles.max() <= 1
    assert skew.count_nonzero() == angles.count_nonzero()
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0
        elif "norm" in name:
            assert (parameter == 1).all()
        elif name != "skew":
            assert parameter.std().item() == pytest.approx(0.01, rel=0.1), name


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sharing": "half"}, "sharing must be one of none, layers, .* got 'half'"),
        ({"embed_dim": 25}, "embed_dim 25 is not a multiple of num_heads 3"),
        ({"depth": ()}, r"of one layer at least, .* got \(\)"),
        ({"depth": (2, 0)}, r"got \(2, 0\), rank 6"),
        ({"rank": 0}, r"rank 0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SharedLowRankTransformer(**{**SIZES, **settings})


def test_inputs_that_do_not_fit_are_named():
    module = transformer("part")
    with pytest.raises(ValueError, match=r"x must be \(B, n, 24\), got \(2, 3, 23\)"):
        module(torch.zeros(2, 3, 23), 0)
    with pytest.raises(ValueError, match="there are 3 transformers, from 0 on; got 3"):
        module(torch.zeros(2, 3, 24), 3)
