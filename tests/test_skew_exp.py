from __future__ import annotations

import math
import sys

import pytest
import torch
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avfast import flops
from avfast.ops import skew_exp

op = sys.modules["avfast.ops.skew_exp"]


def skew(a: Tensor) -> Tensor:
    upper = a.triu(1)
    return upper - upper.mT


def of_norm(norm: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal entries, the spectral norm of the skew matrix given, something in what is not read."""
    a = torch.randn(*shape, dtype=torch.float64)
    return (a * (norm / torch.linalg.matrix_norm(skew(a), 2))[..., None, None]).to(dtype)


def naive(a: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient in float64 by PyTorch."""
    exact = a.detach().double().requires_grad_()
    out = torch.linalg.matrix_exp(skew(exact))
    return out.detach(), torch.autograd.grad(out, exact, grad.double())[0]


def value_and_gradient(a: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = a.detach().requires_grad_()
    out = skew_exp(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


def distance(got: Tensor, want: Tensor) -> float:
    """In spectral norm, the largest of the batch."""
    return torch.linalg.matrix_norm(got.double() - want.double(), 2).max().item()


def from_orthogonal(q: Tensor) -> float:
    return distance(q.double().mT @ q.double(), torch.eye(q.shape[-1], dtype=torch.float64))


def limits(norm: float) -> tuple[float, float]:
    """What value and orthogonality may be off by in float32."""
    return (2e-6, 5e-6) if norm <= 4 else (5e-6, 2e-6) if norm <= 30 else (1e-6 * norm, 2e-6)


@pytest.mark.parametrize("norm", [1e-20, 0.1, 1.0, 2.0, 3.0, 4.0, 8.0, 16.0, 30.0, 200.0, 1000.0])
def test_error_against_scipy_and_orthogonality(norm):
    linalg = pytest.importorskip("scipy.linalg")
    a = of_norm(norm, 18, 128, 128)
    some = [0, 7, 17]
    want = torch.stack([torch.from_numpy(linalg.expm(skew(a[i].double()).numpy())) for i in some])
    got = skew_exp(a)
    error, orthogonal = limits(norm)
    assert distance(got[some], want) <= error
    assert from_orthogonal(got) <= orthogonal


@pytest.mark.parametrize(
    "norm, tol", [(0.0, 5e-6), (0.5, 5e-6), (3.0, 5e-6), (4.0, 5e-6), (30.0, 2e-5), (1000.0, 5e-4)]
)
def test_gradient_in_float32(norm, tol):
    a = torch.zeros(2, 128, 128) if norm == 0 else of_norm(norm, 2, 128, 128)
    grad = torch.randn(2, 128, 128)
    _, got = value_and_gradient(a, grad)
    assert_close("gradient", got, naive(a, grad)[1], tol)
    assert not got.tril().any()


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(0, 13),
    norm=st.just(0.0) | st.floats(1e-30, 1000.0),
    huge=st.none() | st.floats(1.0, 1000.0),
    seed=st.integers(0, 99),
)
def test_any_norm_and_one_huge_entry(n, norm, huge, seed):
    torch.manual_seed(seed)
    a, grad = torch.randn(2, 3, n, n, dtype=torch.float64)
    if n > 1:
        a *= (norm / torch.linalg.matrix_norm(skew(a), 2))[:, None, None]
        if huge is not None:  # in one matrix of the batch
            a[1, 0, n - 1] = huge
            a[1] *= min(1.0, 1000.0 / torch.linalg.matrix_norm(skew(a[1]), 2))
    a[~torch.ones(n, n, dtype=torch.bool).triu(1).expand(3, n, n)] = torch.nan  # is not read
    zeros = a.nan_to_num(0.0)
    for got, want in zip(value_and_gradient(a, grad), naive(zeros, grad), strict=True):
        assert (got - want).abs().max() <= 1e-11 if n else got.shape == want.shape
    a, zeros, grad = a.float(), zeros.float(), grad.float()
    (q, got), (want, exact) = value_and_gradient(a, grad), naive(zeros, grad)
    for i in range(3 if n else 0):
        error, orthogonal = limits(torch.linalg.matrix_norm(skew(zeros[i]), 2).item())
        assert distance(q[i], want[i]) <= error and from_orthogonal(q[i]) <= orthogonal
        # A small gradient may be what is left of large terms.
        assert (got[i] - exact[i]).abs().max() <= 1e-4 * n * grad[i].abs().max()


@pytest.mark.parametrize("wrong", [2000.0, 1e8, 1e30, float("inf"), float("nan")])
def test_too_large_a_norm_is_nan_in_that_matrix_only(wrong):
    a, grad = of_norm(3.0, 4, 8, 8), torch.randn(4, 8, 8)
    want = value_and_gradient(a, grad)
    a[2, 1, 5] = wrong
    got = value_and_gradient(a, grad)
    rest = torch.tensor([0, 1, 3])
    upper = torch.ones(8, 8, dtype=torch.bool).triu(1)
    assert got[0][2].isnan().all() and got[1][2][upper].isnan().all()
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x[rest], y[rest])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_bound_of_a_norm_of_1000_is_no_nan(dtype):
    """All planes of 256 dimensions turned by the same angle: the bound is (n/2)^(1/8) times the norm."""
    a = torch.zeros(1, 256, 256, dtype=dtype)
    a.diagonal(1, -2, -1)[:, ::2] = 1000.0
    q = skew_exp(a)
    assert (q[0, 0, 0].item(), q[0, 0, 1].item()) == pytest.approx((math.cos(1000.0), math.sin(1000.0)), abs=1e-3)
    assert q.isfinite().all() and skew_exp(1.9 * a).isnan().all()


def test_a_rotation_by_hand_and_leading_dimensions():
    """The exponential of the plane rotation [[0, t], [-t, 0]], of no dimensions and of empty ones."""
    t = torch.tensor([[0.3, -2.0, 7.0]])
    a = torch.zeros(1, 3, 2, 2)
    a[..., 0, 1] = t
    want = torch.stack([torch.stack([t.cos(), t.sin()], -1), torch.stack([-t.sin(), t.cos()], -1)], -2)
    assert_close("rotations", skew_exp(a), want, 1e-6)
    assert torch.equal(skew_exp(a[0, 1]), skew_exp(a)[0, 1])
    assert_close("of one row", skew_exp(torch.full((2, 1, 1), 5.0)), torch.ones(2, 1, 1), 1e-6)
    for shape in ((0, 4, 4), (2, 0, 0)):
        got = value_and_gradient(torch.zeros(shape), torch.zeros(shape))
        assert got[0].shape == got[1].shape == shape


def test_a_matrix_does_not_depend_on_its_neighbours():
    a = torch.cat([of_norm(size, 1, 16, 16) for size in (0.5, 40.0, 3.0, 900.0)])
    alone = torch.stack([skew_exp(x) for x in a])
    assert_close("each alone", skew_exp(a), alone, 1e-6)


def test_opcheck():
    a = of_norm(1500.0, 2, 10, 10, dtype=torch.float64)  # all squarings: on a CPU, room for the others stays unwritten
    for x in (a, a.mT.contiguous().mT, torch.stack([a, a], 3).flatten(2)[:, :, ::2]):
        torch.library.opcheck(torch.ops.avfast.skew_exp, (x.detach().requires_grad_(),))
    a = a.float()
    _, powers, scale = torch.ops.avfast.skew_exp(a)
    torch.library.opcheck(torch.ops.avfast.skew_exp_backward, (torch.randn(2, 10, 10).mT, a, powers, scale))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_eager_equals_compiled_and_stays_in_float32_under_autocast(dtype):
    a, weight = of_norm(5.0, 2, 3, 12, 12).requires_grad_(), torch.randn(2, 3, 12, 12)

    def call(a):
        return skew_exp(a)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    plain = skew_exp(a)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        outs = skew_exp(a), compiled(a)
    want = torch.autograd.grad(plain, a, weight)[0]
    for out in outs:
        assert out.dtype == torch.float32 and torch.equal(out, plain)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            assert torch.equal(torch.autograd.grad(out, a, weight)[0], want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_give_float32(dtype):
    a = of_norm(2.0, 2, 8, 8, dtype=dtype).requires_grad_()
    out = skew_exp(a)
    assert out.dtype == torch.float32 and torch.equal(out, skew_exp(a.float()))
    assert torch.autograd.grad(out.sum(), a)[0].dtype == dtype


def test_the_precision_of_matrix_products_is_full_and_put_back():
    a, matmul = of_norm(3.0, 2, 64, 64), torch.backends.mkldnn.matmul
    want, before = skew_exp(a), matmul.fp32_precision
    seen = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "bmm" in str(func):
                seen.append(matmul.fp32_precision)
            return func(*args, **(kwargs or {}))

    matmul.fp32_precision = "bf16"
    try:
        with Seen():
            got = op._forward._init_fn(a)[0]
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before
    assert torch.equal(got, want) and set(seen) == {"ieee"}


def test_nothing_depends_on_values_off_the_cpu():
    """Both bodies run on meta tensors, where whatever asks for a value raises."""
    a = torch.empty(18, 128, 128, device="meta")
    outs = op._forward._init_fn(a)
    grad = op._backward._init_fn(torch.empty_like(a), a, *outs[1:])
    fake = torch.ops.avfast.skew_exp(a)
    assert [x.shape for x in outs] == [x.shape for x in fake] and grad.shape == a.shape
    out = skew_exp(a.requires_grad_())
    out.sum().backward()
    assert out.shape == a.grad.shape == a.shape and out.device.type == "meta"


def test_what_a_gpu_masks_changes_nothing(monkeypatch):
    """All squarings computed, as off the CPU."""
    a, grad = torch.cat([of_norm(s, 2, 9, 9) for s in (1e-3, 2.0, 9.0, 700.0)]), torch.randn(8, 9, 9)
    want = value_and_gradient(a, grad)
    monkeypatch.setattr(op, "_steps", lambda scale: op.SQUARINGS[scale.dtype])
    for got, other in zip(value_and_gradient(a, grad), want, strict=True):
        assert torch.equal(got, other)


def test_flops_are_the_products_of_a_small_norm_on_any_device():
    product = 2 * 3 * 10**3
    for device in ("cpu", "meta"):
        a = torch.zeros(3, 10, 10, device=device, requires_grad=True)
        assert flops.count(skew_exp, a) == 6 * product
        assert flops.count(lambda a: skew_exp(a).sum(), a, backward=True) == 16 * product
    seen = []

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append("bmm" in str(func))
            return func(*args, **(kwargs or {}))

    with Products():
        a = torch.zeros(3, 10, 10)
        outs = op._forward._init_fn(a)
        assert sum(seen) == 6
        op._backward._init_fn(a, a, *outs[1:])
    assert sum(seen) == 16


def test_no_second_derivative():
    a = of_norm(1.0, 1, 4, 4).requires_grad_()
    (grad,) = torch.autograd.grad(skew_exp(a).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="skew_exp has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "a, message",
    [
        (torch.zeros(3), r"\(\.\.\., n, n\), got \(3,\)"),
        (torch.zeros(2, 3, 4), r"got \(2, 3, 4\)"),
        (torch.zeros(2, 2, dtype=torch.int64), "floating-point .*int64"),
    ],
)
def test_errors_name_what_does_not_fit(a, message):
    with pytest.raises(ValueError, match=message):
        skew_exp(a)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [0.5, 3.0, 4.0, 30.0, 1000.0])
def test_on_a_gpu_without_tf32(norm):
    a, grad = of_norm(norm, 18, 128, 128), torch.randn(18, 128, 128)
    want, exact = naive(a, grad)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        q, got = (x.cpu() for x in value_and_gradient(a.cuda(), grad.cuda()))
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    error, orthogonal = limits(norm)
    assert distance(q, want) <= error and from_orthogonal(q) <= orthogonal
    assert_close("gradient", got, exact, 1e-4)


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_other_norms_and_the_host_never_waits():
    a, weight = of_norm(1.0, 18, 128, 128).cuda().requires_grad_(), torch.randn(18, 128, 128, device="cuda")

    def step():
        out = skew_exp(a)
        return out, torch.autograd.grad(out, a, weight)[0]

    torch.cuda.set_sync_debug_mode("error")
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for norm in (1.0, 20.0, 500.0):
        with torch.no_grad():
            a.copy_(of_norm(norm, 18, 128, 128))
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            assert torch.equal(got, want)
