from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled import compile_for_hopper
from helpers import assert_close, interpreter
from hypothesis import given, settings
from hypothesis import strategies as st

from avfast import backend
from avfast.nn import patchify
from avfast.ops import masked_patch_mse
from avfast.ops.masked_patch_mse import normalise_patches

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def naive(prediction, x, ids, patch, norm_pix):
    """Patch by patch, each cut out of the input by slices."""
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim == 4:
        x, patch = x[:, :, None], (1, *patch)
    t, p, q = patch
    grid = [n // k for n, k in zip(x.shape[2:], patch, strict=True)]
    count = grid[0] * grid[1] * grid[2]
    terms = []
    for place in torch.cartesian_prod(*(torch.arange(n) for n in ids.shape)).reshape(-1, ids.ndim).tolist():
        number = int(ids[tuple(place)])
        if number < 0:
            continue
        b, n = (place[0], number) if ids.ndim == 2 else divmod(number, count)
        f, i, j = n // (grid[1] * grid[2]), n // grid[2] % grid[1], n % grid[2]
        cut = x[b, :, f * t : (f + 1) * t, i * p : (i + 1) * p, j * q : (j + 1) * q]
        target = cut.permute(1, 2, 3, 0).flatten()
        if norm_pix:
            target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6) ** 0.5
        terms.append((prediction[tuple(place)] - target).square().mean())
    return torch.stack(terms).mean() if terms else prediction.sum() * 0


def layouts(shape, dtype):
    """As stored, as spectrograms are, and as slices."""
    yield torch.randn(shape, dtype=dtype)
    if len(shape) > 2:
        yield torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=dtype).mT
    yield torch.randn(*shape[:-1], shape[-1] + 1, dtype=dtype)[..., 1:].flip(0)


def values_of(shape, patch):
    return (1 if len(shape) == 3 else shape[1]) * torch.tensor(patch).prod().item()


def random_ids(shape, patch, count):
    """``(B, M)`` ids, some of which do not count."""
    sizes = shape[1:] if len(shape) == 3 else shape[2:]
    total = torch.tensor([n // p for n, p in zip(sizes, patch, strict=True)]).prod().item()
    return torch.randint(-1, total, (shape[0], count)), total


def check(x, patch, ids, norm_pix, tol, dtype=None):
    values = values_of(x.shape, patch)
    prediction = torch.randn(*ids.shape, values, dtype=torch.float64).to(dtype or x.dtype).requires_grad_()
    exact = prediction.detach().double().requires_grad_()
    got = masked_patch_mse(prediction, x, ids, patch=patch, norm_pix=norm_pix)
    want = naive(exact, x.double(), ids, patch, norm_pix)
    assert_close("loss", got, want, tol)
    (grad,), (exact_grad,) = torch.autograd.grad(3 * got, prediction), torch.autograd.grad(3 * want, exact)
    assert grad.dtype == prediction.dtype
    assert_close("gradient", grad, exact_grad, tol if dtype is None else torch.finfo(dtype).eps)


SHAPES = [
    ((2, 3, 8, 12), (4, 4)),
    ((2, 3, 4, 9, 8), (2, 3, 4)),
    ((3, 12, 10), (4, 3)),
    ((1, 1, 6, 9), (2, 3)),
    ((2, 2, 3, 4, 4), (3, 4, 4)),
]


@pytest.mark.skipif(INTERPRETED, reason="float64 does not run on the kernels")
@pytest.mark.parametrize("norm_pix", [False, True])
@settings(deadline=None, max_examples=15)
@given(st.sampled_from(SHAPES), st.integers(0, 5), st.sampled_from([1, 100, 2**18]))
def test_the_formula_patch_by_patch(norm_pix, case, count, chunk):
    torch.manual_seed(count)
    shape, patch = case
    ids, total = random_ids(shape, patch, count)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys.modules["avfast.ops.masked_patch_mse"], "CHUNK", chunk)
        for x in layouts(shape, torch.float64):
            check(x, patch, ids, norm_pix, 1e-11)
            entries = torch.where(ids < 0, ids, ids + torch.arange(len(x))[:, None] * total).flatten()
            check(x, patch, entries, norm_pix, 1e-11)


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("shape, patch", SHAPES)
def test_in_float32_and_half_precision(shape, patch, norm_pix):
    if INTERPRETED:
        assert backend.get_backend() == "triton"
    ids, _ = random_ids(shape, patch, 7)
    ids[0, :2] = torch.tensor([0, -1])
    for x in layouts(shape, torch.float32):
        check(x, patch, ids, norm_pix, 1e-5)
    check(x + 3, patch, ids, norm_pix, 1e-5, torch.bfloat16)
    check((x + 3).half(), patch, ids, norm_pix, 1e-5, torch.float16)


@interpreter
@pytest.mark.skipif(INTERPRETED, reason="is the run itself")
def test_the_kernels_under_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "AVFAST_BACKEND": "triton"}
    command = [sys.executable, "-m", "pytest", "-q", "-k", "float32 or nothing or not_count", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stdout + run.stderr
    assert "12 passed" in run.stdout


def test_of_nothing_is_zero_and_keeps_the_graph():
    prediction = torch.randn(2, 3, 16, requires_grad=True)
    loss = masked_patch_mse(prediction, torch.randn(2, 1, 8, 8), torch.full((2, 3), -1), patch=4)
    loss.backward()
    assert loss == 0 and torch.equal(prediction.grad, torch.zeros(2, 3, 16))


def test_what_does_not_count_may_hold_anything():
    prediction = torch.randn(2, 3, 16)
    prediction[:, 1] = torch.nan
    prediction.requires_grad_()
    loss = masked_patch_mse(prediction, torch.randn(2, 8, 8), torch.tensor([[0, -1, 3], [1, -1, 2]]), patch=4)
    loss.backward()
    assert loss.isfinite() and prediction.grad.isfinite().all() and not prediction.grad[:, 1].any()


@pytest.mark.skipif(INTERPRETED, reason="compares PyTorch paths")
def test_values_run_as_patchify_has_them():
    x = torch.randn(2, 3, 8, 12)
    patches = patchify(x, (4, 4))
    ids = torch.arange(6).expand(2, 6)
    assert masked_patch_mse(patches, x, ids, patch=4) == 0
    assert masked_patch_mse(normalise_patches(patches)[0], x, ids, patch=4, norm_pix=True) < 1e-12


@pytest.mark.skipif(INTERPRETED, reason="opcheck compares with fake tensors in float64")
def test_opcheck():
    prediction = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    x, rows = torch.randn(2, 3, 2, 6, 4, dtype=torch.float64).transpose(3, 4), torch.tensor([0, 5, -1, 7, 7])
    torch.library.opcheck(torch.ops.avfast.masked_patch_mse, (prediction, x, rows, [2, 2, 2], True))
    wide = torch.randn(48, 5).bfloat16().T[:, ::2]
    arguments = (torch.randn(5), wide, x.float(), rows, [2, 2, 2], False)
    torch.library.opcheck(torch.ops.avfast.masked_patch_mse_backward, arguments)


@pytest.mark.skipif(INTERPRETED, reason="compares PyTorch paths")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_eager_equals_compiled_with_and_without_autocast(dtype):
    prediction, x = torch.randn(2, 3, 48).to(dtype or torch.float32).requires_grad_(), torch.randn(2, 3, 8, 8)
    ids = torch.tensor([[0, 1, -1], [3, -1, 2]])

    def call(prediction, x):
        return masked_patch_mse(prediction, x, ids, patch=4, norm_pix=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        got, want = compiled(prediction, x), call(prediction, x)
    assert got.dtype == want.dtype == torch.float32
    assert_close("loss", got, want, 1e-6)
    grads = [torch.autograd.grad(loss, prediction)[0] for loss in (got, want)]
    assert_close("gradient", *grads, 1e-6)
    with pytest.raises(RuntimeError, match="masked_patch_mse has no second derivative"):
        first = torch.autograd.grad(call(prediction, x), prediction, create_graph=True)[0]
        torch.autograd.grad(first.sum(), prediction)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 8)}, r"got \(2, 8\) and \(4, 4\)"),
        ({"patch": (1, 4, 4)}, r"got \(2, 1, 8, 8\) and \(1, 4, 4\)"),
        ({"patch": 9}, r"x \(2, 1, 8, 8\) holds no patch of 9"),
        ({"ids": torch.zeros(3, 5, dtype=torch.int64)}, r"ids must be .* B = 2, got \(3, 5\)"),
        ({"ids": torch.ones(2, 5, dtype=torch.bool)}, "ids must be .* got .*bool"),
        ({"ids": torch.full((2, 5), 4)}, "ids must be below 4, the number of patches, got 4"),
        ({"prediction": torch.zeros(2, 5, 15)}, r"prediction must be \(2, 5, 16\).*got \(2, 5, 15\)"),
        ({"x": torch.zeros(2, 1, 8, 8, dtype=torch.int64)}, "floating-point tensors, got torch.int64"),
    ],
)
def test_errors_name_what_does_not_fit(change, message):
    given = {
        "prediction": torch.zeros(2, 5, 16),
        "x": torch.zeros(2, 1, 8, 8),
        "ids": torch.ones(2, 5).long(),
        "patch": 4,
    }
    with pytest.raises(ValueError, match=message):
        masked_patch_mse(**(given | change))


@pytest.mark.skipif(INTERPRETED, reason="interpreted functions do not compile")
@pytest.mark.parametrize(
    "channels, patch, norm_pix", [(3, [2, 16, 16], True), (3, [1, 16, 16], False), (1, [1, 16, 16], True)]
)
def test_the_kernels_compile_for_hopper_without_spills(channels, patch, norm_pix):
    pytest.importorskip("triton")
    from avfast.kernels import masked_patch_mse as kernels

    types = {"prediction_ptr": "*bf16", "x_ptr": "*fp32", "rows_ptr": "*i64"}
    constants = kernels.constants(channels, patch, norm_pix)
    warps = constants.pop("num_warps")
    forward, backward = kernels.patch_mse_forward_kernel, kernels.patch_mse_backward_kernel
    assert compile_for_hopper(forward, {**types, "errors_ptr": "*fp32"}, constants, warps).stack == 0
    usage = compile_for_hopper(backward, {**types, "grad_ptr": "*fp32", "out_ptr": "*bf16"}, constants, warps)
    assert usage.stack == 0 and max(usage.accesses) == 128, usage


@pytest.mark.gpu
@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("half", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape, patch", [((4, 3, 16, 224, 224), (2, 16, 16)), ((5, 3, 224, 224), (16, 16)), ((5, 1024, 128), (16, 16))]
)
def test_the_kernels_on_a_gpu(shape, patch, half, norm_pix):
    ids, _ = random_ids(shape, patch, 101)
    x, ids = torch.randn(shape).cuda(), ids.cuda()
    for source in (x, x.mT.contiguous().mT):
        prediction = torch.randn(*ids.shape, values_of(shape, patch)).to("cuda", half).requires_grad_()
        exact = prediction.detach().cpu().double().requires_grad_()
        want = masked_patch_mse(exact, x.cpu().double(), ids.cpu(), patch=patch, norm_pix=norm_pix)
        (exact_grad,) = torch.autograd.grad(want, exact)
        losses = [masked_patch_mse(prediction, source, ids, patch=patch, norm_pix=norm_pix) for _ in range(2)]
        grads = [torch.autograd.grad(loss, prediction)[0] for loss in losses]
        assert torch.equal(*losses) and torch.equal(*grads)
        assert_close("loss", losses[0], want, 1e-5)
        assert_close("gradient", grads[0], exact_grad, max(1e-5, torch.finfo(half).eps))
