"""AVBERT's transformers with shared weights."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close
from shared_transformers import LOW_RANK, SCHEMES, SIZES, Parent, add_in_place, inputs, run, transformer

from avfast import flops
from avfast.nn import SharedLowRankTransformer


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


@pytest.mark.parametrize("sharing", SCHEMES)
def test_activation_checkpointing_changes_no_bit(sharing):
    module = transformer(sharing, dropout=0.3)
    given = inputs(module)

    def gradients():
        torch.manual_seed(3)
        loss = sum(out.square().sum() for out in run(module, given))
        return torch.autograd.grad(loss, list(module.parameters()))

    want = gradients()
    module.grad_checkpointing = True
    assert all(torch.equal(a, b) for a, b in zip(gradients(), want, strict=True))


def test_dropout_is_for_training():
    module = transformer("part", dropout=0.3)
    x = inputs(module)[0]
    assert not torch.equal(module(x, 0), module(x, 0))
    plain = transformer("part")
    assert torch.equal(module.eval()(x, 0), plain(x, 0))


def test_compiled_in_one_graph():
    model = Parent("part")
    given = inputs(model.inner)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    names = list(model.parameters())
    got, want = compiled(*given), model(*given)
    assert_close("loss", got, want, 1e-6)
    for a, b in zip(torch.autograd.grad(got, names), torch.autograd.grad(want, names), strict=True):
        assert_close("gradient", a, b, 1e-5, 1.0)
    with torch.no_grad():
        model.eval()
        before = compiled(*given)
        add_in_place(model.inner)
        assert not torch.equal(compiled(*given), before)
        assert_close("evaluated", compiled(*given), model(*given), 1e-6)


def test_on_meta_and_made_real():
    with torch.device("meta"):
        module = SharedLowRankTransformer(**SIZES)
    assert module(torch.empty(2, 5, 24, device="meta"), 2).shape == (2, 5, 24)
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    assert torch.isfinite(module(torch.randn(2, 5, 24), 2)).all()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_are_those_of_the_factors_once_and_of_the_tokens(device):
    module = SharedLowRankTransformer(**SIZES).to(device)
    given = [torch.randn(2, n, 24, device=device, requires_grad=True) for n in (3, 4, 7)]
    tokens, pairs = 2 * (3 + 4 + 7), 2 * (9 + 16 + 49)
    each = 4 * (6 * 24 + 6 * 24) + (24 * 6 + 6 * 48) + (48 * 6 + 6 * 24)
    layers = 2 * (2 * tokens * each + 4 * pairs * 24)  # a pair costs twice D multiply-adds
    folded = 2 * 3 * 6 * 6 * (5 * 24 + 48)
    rotations = 12 * 18 * 6**3  # without squarings
    assert flops.count(lambda: sum(x.sum() for x in run(module, given))) == layers + folded + rotations
    got = flops.count(lambda: sum(x.sum() for x in run(module, given)), backward=True)
    assert got == 3 * (layers + folded) + rotations * (1 + 10 / 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_factors_once_and_errs_as_plain_pytorch(dtype):
    module = transformer("part", init_std=0.1)
    dense = transformer("all", init_std=0.1)
    errors = {}
    for name, each in (("low rank", module), ("dense", dense)):
        given = inputs(each)
        want = run(each, given)
        with torch.autocast("cpu", dtype):
            got = run(each, given)
        assert all(x.dtype == torch.float32 for x in got)
        errors[name] = max((a - b).norm() / b.norm() for a, b in zip(got, want, strict=True))
    assert errors["low rank"] <= max(0.005, 2 * errors["dense"])
    with torch.autocast("cpu", dtype):
        v, g, bias = module.factors()[1]["fc1"]
    assert v.dtype == g.dtype == dtype and bias.dtype == torch.float32


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("sharing", SCHEMES)
def test_every_scheme_on_a_gpu(sharing):
    """In float32, and under autocast against plain PyTorch there."""
    module = transformer(sharing, embed_dim=192, rank=64, init_std=0.1).cuda()
    given = [x.cuda() for x in inputs(module)]
    leaves = {name: p.detach().double() for name, p in module.named_parameters()}
    want = [naive(module, leaves, x.double(), i) for i, x in enumerate(given)]
    parameters = dict(module.named_parameters())
    for i, exact in enumerate(want):
        assert_close(f"transformer {i}", module(given[i], i), exact, 1e-5)
        with torch.autocast("cuda", torch.bfloat16):
            got, plain = module(given[i], i), naive(module, parameters, given[i], i)
        error, usual = (((x.double() - exact).norm() / exact.norm()).item() for x in (got, plain))
        assert error <= max(0.005, 2 * usual)
