from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_close, interpreter
from hypothesis import given, settings
from hypothesis import strategies as st

from avfast import backend, flops
from avfast.ops import low_rank_linear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMES = ("x", "v", "g", "bias")
TINY = 1e-12


def naive(x, v, g, bias):
    """Token by token and chunk by chunk."""
    sets = [(v, g, bias)] if g.ndim == 2 else list(zip(v.split(g.shape[1]), g, bias, strict=True))
    outs = []
    for token in x.reshape(-1, x.shape[-1]):
        parts = []
        for factor, matrix, shift in sets:
            z = (factor * token).sum(1)
            length = z.square().sum() ** 0.5 if z.detach().abs().max() > 0 else z.sum() * 0
            divisor = length if length > TINY else torch.tensor(TINY, dtype=z.dtype)
            parts.append(((z / divisor)[:, None] * matrix).sum(0) + shift)
        outs.append(parts[0] if g.ndim == 2 else torch.stack(parts))
    shape = (*x.shape[:-1], *bias.shape)
    if not outs:
        return sum(t.sum() for t in (x, v, g, bias)) * x.new_zeros(shape)
    return torch.stack(outs).view(shape)


def random_inputs(tokens, chunks, width, rank, out, dtype=torch.float64):
    """chunks 0: without that dimension."""
    one = (chunks,) if chunks else ()
    shapes = (tokens, width), (max(1, chunks) * rank, width), (*one, rank, out), (*one, out)
    x, v, g, bias = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    inputs = [x.to(dtype), (v / width**0.5).to(dtype), g.to(dtype), bias.to(torch.promote_types(dtype, torch.float32))]
    return [t.requires_grad_() for t in inputs]


def stacked(*inputs):
    """The outputs of chunks in one tensor, as the naive form has them."""
    outs = low_rank_linear(*inputs)
    return torch.stack(outs, -2) if isinstance(outs, tuple) else outs


def check(inputs, tol):
    exact = [t.detach().double().requires_grad_() for t in inputs]
    got, want = stacked(*inputs), naive(*exact)
    assert got.dtype == inputs[0].dtype
    assert_close("out", got, want, tol)
    grad = torch.randn(*want.shape[:-1], want.shape[-1] + 2)[..., 1:-1].to(got.dtype)  # not contiguous
    grads = torch.autograd.grad(got, inputs, grad)
    exact_grads = torch.autograd.grad(want, exact, grad.double())
    largest = max([t.abs().max().item() for t in exact_grads if t.numel()], default=1.0)
    for name, t, a, b in zip(NAMES, inputs, grads, exact_grads, strict=True):
        assert a.dtype == t.dtype
        assert_close(f"gradient of {name}", a, b, tol, largest)


@pytest.mark.skipif(INTERPRETED, reason="float64 does not run on the kernels")
@settings(deadline=None, max_examples=25)
@given(st.integers(0, 5), st.integers(0, 3), st.sampled_from([2, 7]), st.sampled_from([2, 5, 16]), st.integers(1, 9))
def test_token_by_token(tokens, chunks, width, rank, out):
    torch.manual_seed(tokens)
    check(random_inputs(tokens, chunks, width, rank, out), 1e-11)


CASES = [(5, 0, 24, 16, 40), (3, 3, 16, 16, 16), (70, 0, 80, 48, 100), (40, 2, 32, 128, 48), (1, 0, 16, 256, 16)]


@pytest.mark.parametrize(
    "case, dtype",
    [(case, torch.float32) for case in CASES]
    + [(case, half) for case in CASES[:3] for half in (torch.bfloat16, torch.float16)],
)
def test_in_float32_and_half_precision(case, dtype):
    if INTERPRETED:
        assert backend.get_backend() == "triton"
    # In half precision z, n and their gradients are rounded once before a product.
    check(random_inputs(*case, dtype), 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


def test_many_columns_are_split_among_programs_and_any_strides():
    x, v, g, bias = random_inputs(33, 3, 48, 16, 400, torch.float32)
    x = torch.randn(33, 50)[:, 1:-1]
    v, g = v.detach().T.contiguous().T, g.detach().mT.contiguous().mT
    check([t.detach().requires_grad_() for t in (x, v, g, bias[:, :1].expand(3, 400))], 1e-5)


def test_a_vector_without_a_length_keeps_no_direction():
    """As in the formula its gradient is divided by the least norm."""
    x, v, g, bias = random_inputs(4, 0, 16, 16, 8, torch.float32)
    with torch.no_grad():
        x[1] = 0
        v[:, 0] = 1.0
        x[2] = 0
        x[2, 0] = 1e-13  # z is 4e-13 long
    exact = [t.detach().double().requires_grad_() for t in (x, v, g, bias)]
    out, want = low_rank_linear(x, v, g, bias), naive(*exact)
    assert_close("out", out, want, 1e-5)
    (got,), (right,) = torch.autograd.grad(out.sum(), x), torch.autograd.grad(want.sum(), exact[0])
    for row in range(4):
        assert_close(f"row {row}", got[row], right[row], 1e-5)


@interpreter
@pytest.mark.skipif(INTERPRETED, reason="is the run itself")
def test_the_kernels_under_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "AVFAST_BACKEND": "triton"}
    command = [sys.executable, "-m", "pytest", "-q", "-k", "half_precision or split or length or kept", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stdout + run.stderr
    assert "14 passed" in run.stdout


def test_nothing_is_kept_without_a_gradient():
    x, v, g, bias = (t.detach() for t in random_inputs(9, 3, 16, 16, 8, torch.float32))
    out, n, length = torch.ops.avfast.low_rank_linear(x, v, g, bias, False)
    assert n.shape == (0, 3, 16) and length.shape == (0, 3)
    kept, n, length = torch.ops.avfast.low_rank_linear(x, v, g, bias, True)
    assert torch.equal(kept, out)
    assert_close("n", n * length[..., None], (x @ v.T).unflatten(1, (3, 16)), 1e-5)


def test_leading_dimensions_are_tokens():
    x, v, g, bias = (t.detach() for t in random_inputs(12, 3, 16, 8, 8))
    flat = stacked(x, v, g, bias)
    assert flat.shape == (12, 3, 8)
    assert torch.equal(stacked(x.view(2, 6, 16), v, g, bias), flat.view(2, 6, 3, 8))
    assert_close("one", low_rank_linear(x[0], v[:8], g[0], bias[0]), flat[0, 0], 1e-12)


@pytest.mark.skipif(INTERPRETED, reason="opcheck compares with fake tensors in float64")
def test_opcheck():
    x, v, g, bias = random_inputs(5, 2, 6, 4, 7)
    x = torch.randn(6, 5, dtype=torch.float64).T.requires_grad_()
    torch.library.opcheck(torch.ops.avfast.low_rank_linear, (x, v, g, bias, True))
    plain = [t.detach() for t in (x, v, g, bias)]
    torch.library.opcheck(torch.ops.avfast.low_rank_linear, (*plain, False))
    for dtype in (torch.float64, torch.bfloat16):
        x, v, g = (t.to(dtype) for t in plain[:3])
        bias = plain[3].to(torch.promote_types(dtype, torch.float32))
        _, n, length = torch.ops.avfast.low_rank_linear(x, v, g, bias, True)
        grad = torch.randn(5, 2, 9)[..., 1:-1].to(dtype)
        torch.library.opcheck(torch.ops.avfast.low_rank_linear_backward, (grad, x, v, g, n, length))


@pytest.fixture
def operator(monkeypatch):
    """Eager float32 on a CPU is the operator too."""
    monkeypatch.setattr(sys.modules[low_rank_linear.__module__], "_HAS_ONEDNN", False)


@pytest.mark.parametrize("case", CASES)
def test_the_operator_in_float32(case, operator):
    check(random_inputs(*case, torch.float32), 2e-6)


@pytest.mark.skipif(INTERPRETED, reason="compares PyTorch paths")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_eager_equals_compiled_with_and_without_autocast(dtype, half, operator):
    """float32 parameters; activations of either kind."""
    x, *rest = random_inputs(9, 3, 32, 16, 24, torch.float32)
    x = x.detach().to(half or torch.float32).requires_grad_()
    compiled = torch.compile(stacked, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        got, want = compiled(x, *rest), stacked(x, *rest)
    assert got.dtype == want.dtype == (dtype or half or torch.float32)
    assert torch.equal(got, want)
    grads = [torch.autograd.grad(out.float().square().sum(), [x, *rest]) for out in (got, want)]
    for name, t, a, b in zip(NAMES, (x, *rest), *grads, strict=True):
        assert a.dtype == b.dtype == t.dtype and torch.equal(a, b), name
    tol = 4 * max(torch.finfo(want.dtype).eps, torch.finfo(x.dtype).eps)
    assert_close("out", want, naive(*(t.detach().double() for t in (x, *rest))), max(tol, 1e-5))


@pytest.mark.skipif(INTERPRETED, reason="compares PyTorch paths")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_second_derivative_is_refused(dtype):
    inputs = random_inputs(3, 0, 8, 4, 6, dtype)
    grad = torch.autograd.grad(low_rank_linear(*inputs).square().sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="low_rank_linear has no second derivative"):
        torch.autograd.grad(grad.sum(), inputs[0])


@pytest.mark.skipif(INTERPRETED, reason="counts on meta")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_are_those_of_the_factors(device):
    inputs = [t.detach().to(device).requires_grad_() for t in random_inputs(5, 3, 32, 16, 24)]
    products = 2 * 5 * 3 * (32 * 16 + 16 * 24)
    assert flops.count(lambda: stacked(*inputs).sum(), backward=True) == 3 * products


@pytest.mark.skipif(INTERPRETED, reason="asks the dispatch")
def test_kernels_take_ranks_up_to_256(monkeypatch):
    monkeypatch.setattr(backend, "which", lambda device: "triton")
    assert backend.use_kernels("low_rank_linear", torch.zeros(256, 1000).mT)
    with pytest.warns(UserWarning, match="low_rank_linear take ranks up to 256 .* got 257 in torch.float32"):
        assert not backend.use_kernels("low_rank_linear", torch.zeros(257, 8).mT)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"g": torch.zeros(2, 4, 6)}, r"g must be .*, got \(2, 4, 6\) and \(3, 6\)"),
        ({"bias": torch.zeros(6)}, r"or \(C, r, O\) and \(C, O\), got \(3, 4, 6\) and \(6,\)"),
        ({"v": torch.zeros(4, 8)}, r"v must be \(12, 8\), .*, got \(4, 8\)"),
        ({"x": torch.zeros(5, 7)}, r"v must be \(12, 7\), .* width of x \(5, 7\), got \(12, 8\)"),
        ({"x": torch.zeros(5, 8).long()}, "got torch.int64"),
    ],
)
def test_errors_name_what_does_not_fit(change, message):
    given = dict(zip(NAMES, random_inputs(5, 3, 8, 4, 6, torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        low_rank_linear(**(given | change))


@pytest.mark.skipif(INTERPRETED, reason="full size")
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.float64, 1e-8)])
def test_the_released_projections(dtype, tol):
    """Those of AVBERT's multimodal transformer, with synthetic weights that follow from their names; queries, keys and
    values as chunks of one call."""
    with np.load(Path(__file__).parent / "fixtures" / "low_rank_linear.npz") as file:
        expected = {name: torch.from_numpy(value) for name, value in file.items()}
    layer = "avbert.transformer.encoder.albert_layer_groups.0.albert_layers.0."

    def normal(name, *shape):
        return np.random.RandomState(zlib.crc32(f"public/{name}".encode())).standard_normal(shape)

    def matrix(name, *shape):
        return torch.from_numpy(normal(name, *shape) / shape[1] ** 0.5).float().double()

    def factors(kind, width, out):
        name = f"{layer}{'attention.' if kind in ('query', 'key', 'value') else ''}factor_{kind}."
        a = torch.from_numpy(0.05 * normal(f"{name}orthogonal_ms2_linear.A", 128, 128)).float().double().triu(1)
        g = torch.linalg.matrix_exp(a - a.T) @ matrix(f"{name}s_linear.weight", out, 128).T
        bias = torch.from_numpy(0.02 * normal(f"{name}s_linear.bias", out)).float()
        return [t.to(dtype) for t in (matrix(f"{name}ms2_linear.weight", 128, width), g, bias)]

    x = {width: torch.from_numpy(normal(f"input:a.x{width}", 3, 7, width)).float().to(dtype) for width in (768, 3072)}
    v, g, bias = zip(*(factors(kind, 768, 768) for kind in ("query", "key", "value")), strict=True)
    outs = low_rank_linear(x[768], torch.cat(v), torch.stack(g), torch.stack(bias))
    for kind, out in zip(("query", "key", "value"), outs, strict=True):
        assert_close(kind, out[..., ::16], expected[f"out.{kind}"], tol)
    for kind, width, every in (("ffn", 768, 64), ("ffn_output", 3072, 16)):
        got = low_rank_linear(x[width], *factors(kind, width, 3840 - width))
        assert_close(kind, got[..., ::every], expected[f"out.{kind}"], tol)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case",
    [(992, 3, 768, 128, 768), (496, 0, 768, 128, 3072), (496, 0, 3072, 128, 768), (33, 2, 320, 32, 200),
     (300, 0, 768, 256, 768), (5, 0, 50, 48, 70)],
)  # fmt: skip
def test_the_kernels_on_a_gpu(case, dtype):
    inputs = [t.detach().cuda().requires_grad_() for t in random_inputs(*case, dtype)]

    def results(given, grad):
        out = stacked(*given)
        return [out, *torch.autograd.grad(out, given, grad)]

    grad = torch.randn(stacked(*inputs).shape, device="cuda").to(dtype)
    got, again = results(inputs, grad), results(inputs, grad)
    exact = results([t.detach().cpu().double().requires_grad_() for t in inputs], grad.cpu().double())
    tol = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for name, a, b, c in zip(("out", *NAMES), got, again, exact, strict=True):
        assert torch.equal(a, b), f"{name} differs between two runs"
        assert_close(name, a, c, tol)
