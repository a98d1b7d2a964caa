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
from torch._dynamo.testing import CompileCounterWithBackend

from avfast import backend
from avfast.ops import add_layer_norm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMES = ("x", "residual", "weight", "bias")


def naive(x, residual, weight, bias, sizes, eps):
    """Row by row."""
    total = x + residual
    sets = [group for group, size in enumerate(sizes) for _ in range(size)]
    rows = []
    for row, group in zip(total, sets, strict=True):
        mean = row.sum() / len(row)
        variance = ((row - mean) ** 2).sum() / len(row)
        rows.append((row - mean) / (variance + eps) ** 0.5 * weight[group] + bias[group])
    return (torch.stack(rows) if rows else total * 1), total


def composed(x, residual, weight, bias, sizes, eps):
    """What runs on a CPU."""
    return add_layer_norm(x, residual, weight, bias, sizes, eps)


def operator(x, residual, weight, bias, sizes, eps):
    """What runs on a GPU; here its eager body, or the kernels under Triton's interpreter."""
    return torch.ops.avfast.add_layer_norm(x, residual, weight, bias, sizes, eps, x.dtype)[:2]


def random_inputs(sizes, dim, dtype=torch.float64, residual_dtype=None):
    rows, sets = sum(sizes), len(sizes)
    shapes = ((rows, dim), (rows, dim), (sets, dim), (sets, dim))
    inputs = [torch.randn(shape, dtype=dtype) for shape in shapes]
    inputs[1] = inputs[1].to(residual_dtype or dtype)
    return [x.requires_grad_() for x in inputs]


def check(call, inputs, sizes, tol):
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, want = call(*inputs, sizes, 1e-3), naive(*exact, sizes, 1e-3)
    factors = [torch.randn(len(out), out.shape[1] + 3).to(out.dtype)[:, 2:-1] for out in got]  # not contiguous
    grads = torch.autograd.grad(got, inputs, factors)
    exact_grads = torch.autograd.grad(want, exact, [f.double() for f in factors], materialize_grads=True)
    scale = max([g.abs().max().item() for g in exact_grads if g.numel()], default=1.0)
    for name, a, b in zip(("normed", "sum"), got, want, strict=True):
        assert_close(name, a, b, tol)
    for name, x, a, b in zip(NAMES, inputs, grads, exact_grads, strict=True):
        assert a.dtype == x.dtype
        assert_close(f"gradient of {name}", a, b, tol, scale)


@pytest.mark.skipif(INTERPRETED, reason="float64 does not run on the kernels")
@pytest.mark.parametrize("call", [composed, operator])
@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.sampled_from([2, 5, 16]))
def test_forward_and_gradients_against_the_written_out_formula(call, sizes, dim):
    torch.manual_seed(sum(sizes))
    check(call, random_inputs(sizes, dim), sizes, 1e-11)


@pytest.mark.parametrize("sizes, dim", [([7], 16), ([5, 0, 6], 48), ([0, 1], 33), ([0], 8)])
@pytest.mark.parametrize("residual", [torch.float32, torch.float16])
def test_the_operator_in_float32(sizes, dim, residual):
    if INTERPRETED:
        assert backend.get_backend() == "triton"
    check(operator, random_inputs(sizes, dim, torch.float32, residual), sizes, 1e-5 if residual.itemsize == 4 else 1e-3)


def test_many_rows_are_added_up_over_many_partial_sums():
    sizes = [1100, 30]
    check(operator, random_inputs(sizes, 8, torch.float32), sizes, 1e-5)


@interpreter
@pytest.mark.skipif(INTERPRETED, reason="is the run itself")
def test_the_kernels_under_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "AVFAST_BACKEND": "triton"}
    command = [sys.executable, "-m", "pytest", "-q", "-k", "operator_in_float32 or partial_sums or strides", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stdout + run.stderr
    assert "10 passed" in run.stdout


def test_any_strides():
    wide = torch.randn(6, 20)
    x, residual = wide[:, 3:11], torch.randn(8, 6).T
    weight, bias = torch.randn(2, 8), torch.randn(2, 16)[:, ::2]
    inputs = [t.requires_grad_() for t in (x, residual, weight, bias)]
    check(operator, inputs, [2, 4], 1e-5)


@pytest.mark.skipif(INTERPRETED, reason="opcheck compares with fake tensors in float64")
def test_opcheck():
    _, residual, weight, bias = random_inputs([3, 4], 6)
    x = torch.randn(6, 7, dtype=torch.float64).T.requires_grad_()
    torch.library.opcheck(torch.ops.avfast.add_layer_norm, (x, residual, weight, bias, [3, 4], 1e-6, torch.float64))
    half = [t.detach().to(d) for t, d in zip((x, residual), (torch.float32, torch.bfloat16), strict=True)]
    w, b = weight.detach().float(), bias.detach().float()
    normed, total, mean, rstd = torch.ops.avfast.add_layer_norm(*half, w, b, [3, 4], 1e-6, torch.bfloat16)
    backward = (normed, total, total, w, mean, rstd, [3, 4], torch.float32, torch.bfloat16)
    torch.library.opcheck(torch.ops.avfast.add_layer_norm_backward, backward)


@pytest.mark.skipif(INTERPRETED, reason="compares the two PyTorch paths")
@pytest.mark.parametrize("call", [composed, operator])
def test_a_second_derivative_is_right_or_refused(call):
    inputs = random_inputs([2, 3], 4)
    normed, total = call(*inputs, [2, 3], 1e-3)
    grad = torch.autograd.grad((normed**2).sum(), inputs[0], create_graph=True)[0]
    if call is operator:
        with pytest.raises(RuntimeError, match="add_layer_norm has no second derivative"):
            torch.autograd.grad(grad.sum(), inputs[0])
    else:
        torch.autograd.grad(grad.sum(), inputs[0])


@pytest.mark.skipif(INTERPRETED, reason="compares the two PyTorch paths")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_eager_equals_compiled_in_dtype_and_value_with_and_without_autocast(dtype, stream):
    x, residual = torch.randn(9, 16, dtype=stream), torch.randn(9, 16).to(dtype or stream)
    weight, bias = torch.randn(2, 16), torch.randn(2, 16)

    def call(x, residual):
        return add_layer_norm(x, residual, weight, bias, (4, 5))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        got, want = compiled(x, residual), call(x, residual)
    assert want[0].dtype == (dtype or stream) and want[1].dtype == torch.promote_types(stream, residual.dtype)
    exact = naive(*(t.double() for t in (x, residual, weight, bias)), (4, 5), 1e-6)
    for a, b, c in zip(got, want, exact, strict=True):
        assert a.dtype == b.dtype
        assert_close("compiled", a, b, 1e-6)
        assert_close("eager", b, c, 4 * max(torch.finfo(t).eps for t in (b.dtype, want[1].dtype)))


@pytest.mark.skipif(INTERPRETED, reason="compares the two PyTorch paths")
@pytest.mark.parametrize("call", [composed, operator])
def test_new_group_sizes_recompile_once(call):
    weight, bias = torch.randn(2, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)

    def step(audio, visual):
        x = torch.cat([audio, visual])
        return call(x, 2 * x, weight, bias, [audio.shape[0], visual.shape[0]], 1e-6)[0].square().mean()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for rows in ((5, 9), (7, 4), (12, 3), (2, 30), (6, 6)):
        parts = [torch.randn(n, 8) for n in rows]
        loss = compiled(*parts)
        assert_close("loss", loss, step(*parts), 1e-6)
        loss.backward()
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (lambda x, w: (x, x[:2], w[0], w[0]), r"must both be \(T, D\), got \(5, 4\) and \(2, 4\)"),
        (lambda x, w: (x, x, w[:, :3], w[:, :3]), r"weight \(2, 3\) and bias \(2, 3\) do not fit x \(5, 4\)"),
        (lambda x, w: (x, x, w, w), "2 affine sets, got 1 group sizes"),
        (lambda x, w: (x, x, w, w, (2, 2)), r"\(2, 2\) add up to 4 rows, there are 5"),
    ],
)
def test_errors_name_the_shapes(arguments, message):
    with pytest.raises(ValueError, match=message):
        add_layer_norm(*arguments(torch.randn(5, 4), torch.randn(2, 4)))


@pytest.mark.skipif(INTERPRETED, reason="interpreted functions do not compile")
@pytest.mark.parametrize("dim", [192, 768, 4096])
@pytest.mark.parametrize("stream, update", [("fp32", "bf16"), ("fp32", "fp32"), ("fp16", "fp16")])
def test_the_kernels_compile_for_hopper_without_spills(dim, stream, update):
    pytest.importorskip("triton")
    from avfast.kernels import add_layer_norm as kernels

    statistics = {"mean_ptr": "*fp32", "rstd_ptr": "*fp32", "weight_ptr": "*fp32"}
    stream_, update_ = f"*{stream}", f"*{update}"
    forward = {"x_ptr": stream_, "residual_ptr": update_, "normed_ptr": update_, "total_ptr": stream_}
    constants = kernels.tile(dim, kernels.FORWARD_TILE)
    warps = constants.pop("num_warps")
    types = {**statistics, **forward, "bias_ptr": "*fp32", "eps": "fp32"}
    usage = compile_for_hopper(kernels.norm_forward_kernel, types, constants, warps)
    assert usage.stack == 0 and max(usage.accesses) == 128, usage
    gradients = {"grad_normed_ptr": update_, "grad_total_ptr": stream_, "grad_x_ptr": stream_}
    partials = {"partial_weight_ptr": "*fp32", "partial_bias_ptr": "*fp32"}
    constants = {**kernels.tile(dim, kernels.BACKWARD_TILE), "WRITE_RESIDUAL": stream != update}
    warps = constants.pop("num_warps")
    types = {**statistics, **gradients, **partials, "total_ptr": stream_, "grad_residual_ptr": update_}
    usage = compile_for_hopper(kernels.norm_backward_kernel, types, constants, warps)
    assert usage.stack == 0 and max(usage.accesses) == 128, usage


@pytest.mark.skipif(INTERPRETED, reason="interpreted functions do not compile")
def test_a_spill_would_be_seen():
    pytest.importorskip("triton")
    from avfast.kernels import add_layer_norm as kernels

    pointers = [name for name in kernels.norm_backward_kernel.arg_names if name.endswith("_ptr")]
    constants = {"D": 2048, "BLOCK_D": 2048, "ROWS": 2, "WRITE_RESIDUAL": True}
    usage = compile_for_hopper(kernels.norm_backward_kernel, dict.fromkeys(pointers, "*fp32"), constants, 1)
    assert usage.stack > 0, usage


@pytest.mark.gpu
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [48, 768, 1024])
def test_the_kernels_on_a_gpu(half, dim):
    sizes = [1003, 0, 517]
    inputs = [t.detach().cuda().requires_grad_() for t in random_inputs(sizes, dim, torch.float32, half)]
    with torch.autocast("cuda", half):
        normed, total = add_layer_norm(*inputs, sizes)
    assert normed.dtype == half and total.dtype == torch.float32
    factors = torch.randn_like(normed), torch.randn_like(total)
    grads = torch.autograd.grad((normed, total), inputs, factors)
    again = torch.autograd.grad(add_layer_norm(*inputs, sizes), inputs, [f.to(torch.float32) for f in factors])
    saved = backend.get_backend()
    backend.set_backend("reference")
    try:
        exact = [t.detach().double().requires_grad_() for t in inputs]
        want = add_layer_norm(*exact, sizes)
        want_grads = torch.autograd.grad(want, exact, [f.double() for f in factors])
    finally:
        backend.set_backend(saved)
    tol = 2 * torch.finfo(half).eps
    assert_close("normed", normed, want[0], tol)
    for name, a, b, c in zip(NAMES, grads, again, want_grads, strict=True):
        assert_close(f"gradient of {name}", a, c, tol if a.dtype == half else 1e-5)
        assert torch.equal(a, b), f"gradient of {name} differs between two runs"
