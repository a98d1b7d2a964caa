from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compiled import compile_for_hopper
from helpers import assert_close, interpreter
from hypothesis import given, settings
from hypothesis import strategies as st

from avfast import backend
from avfast.nn import PatchEmbed
from avfast.ops import patch_embed_kept

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def naive(images, weight, bias, rows):
    """All patches by convolution, then a choice."""
    return F.conv2d(images, weight, bias, weight.shape[2]).flatten(2).mT.flatten(0, 1)[rows]


def operator(images, weight, bias, rows):
    """What runs on a GPU; here its eager body, or the kernel under Triton's interpreter."""
    patches = torch.ops.avfast.gather_patches(images, rows, weight.shape[2], images.dtype)
    return F.linear(patches, weight.flatten(1), bias)


def layouts(shape, dtype):
    """Images as frames are stored, as spectrograms are, and as slices."""
    b, c, h, w = shape
    yield torch.randn(shape, dtype=dtype)
    yield torch.randn(b, c, w, h, dtype=dtype).mT
    yield torch.randn(b, h + 1, w, c + 1, dtype=dtype).permute(0, 3, 1, 2)[:, 1:, 1:]


def check(call, images, patch, rows, tol):
    weight = torch.randn(5, images.shape[1], patch, patch, dtype=images.dtype)
    inputs = [x.requires_grad_() for x in (images, weight, torch.randn(5, dtype=images.dtype))]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, want = call(*inputs, rows), naive(*exact, rows)
    assert_close("tokens", got, want, tol)
    factor = torch.randn_like(want)
    grads = torch.autograd.grad(got, inputs, factor.to(got.dtype))
    exact_grads = torch.autograd.grad(want, exact, factor)
    for name, a, b in zip(("images", "weight", "bias"), grads, exact_grads, strict=True):
        assert_close(f"gradient of {name}", a, b, tol, scale=1.0)


@pytest.mark.skipif(INTERPRETED, reason="float64 does not run on the kernel")
@pytest.mark.parametrize("call", [patch_embed_kept, operator])
@settings(deadline=None, max_examples=20)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(4, 9), st.integers(4, 13)),
    st.sampled_from([1, 3, 4]),
    st.integers(0, 6),
)
def test_equal_to_embedding_all_patches_and_choosing(call, shape, patch, count):
    torch.manual_seed(count)
    total = shape[0] * (shape[2] // patch) * (shape[3] // patch)
    rows = torch.randint(total, (count,))  # a patch may be named twice
    for images in layouts(shape, torch.float64):
        check(call, images, patch, rows, 1e-11)


@pytest.mark.parametrize("shape, patch", [((2, 3, 9, 14), 4), ((3, 1, 12, 8), 3), ((1, 2, 4, 4), 4)])
def test_the_operator_in_float32(shape, patch):
    if INTERPRETED:
        assert backend.get_backend() == "triton"
    total = shape[0] * (shape[2] // patch) * (shape[3] // patch)
    for images in layouts(shape, torch.float32):
        for rows in (torch.randperm(total), torch.randperm(total)[: total // 2], torch.arange(0)):
            check(operator, images, patch, rows, 1e-5)


@interpreter
@pytest.mark.skipif(INTERPRETED, reason="is the run itself")
def test_the_kernel_under_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "AVFAST_BACKEND": "triton"}
    command = [sys.executable, "-m", "pytest", "-q", "-k", "operator_in_float32", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 passed" in run.stdout


@pytest.mark.skipif(INTERPRETED, reason="opcheck compares with fake tensors in float64")
def test_opcheck():
    images = torch.randn(2, 9, 8, 3, dtype=torch.float64).permute(0, 3, 1, 2).requires_grad_()
    rows = torch.tensor([3, 0, 5])
    torch.library.opcheck(torch.ops.avfast.gather_patches, (images, rows, 4, torch.float64))
    grad = torch.randn(3, 48).bfloat16()
    torch.library.opcheck(torch.ops.avfast.gather_patches_backward, (grad, rows, [2, 3, 9, 8], 4, torch.float32))


@pytest.mark.skipif(INTERPRETED, reason="compares PyTorch with itself")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_eager_equals_compiled_in_dtype_and_value_with_and_without_autocast(dtype):
    images, rows = torch.randn(2, 3, 8, 8), torch.tensor([5, 0, 2])
    weight, bias = torch.randn(6, 3, 4, 4), torch.randn(6)
    compiled = torch.compile(patch_embed_kept, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        got, want = (call(images, weight, bias, rows) for call in (compiled, patch_embed_kept))
    assert got.dtype == want.dtype == (dtype or torch.float32)
    assert torch.equal(got, want)
    assert_close("eager", want, naive(images, weight, bias, rows), 4 * torch.finfo(want.dtype).eps)


def test_the_module_embeds_kept_patches_or_all():
    module = PatchEmbed((9, 14), 4, 3, 5)
    images, rows = torch.randn(2, 3, 9, 14), torch.tensor([11, 0, 7])
    assert_close("kept", module(images, rows), module(images)[rows], 1e-6)
    assert_close("all", module(images), naive(images, module.proj.weight, module.proj.bias, slice(None)), 1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (lambda x, w, r: (x, w[:, :1], None, r), r"got \(2, 3, 8, 8\) and \(6, 1, 4, 4\)"),
        (lambda x, w, r: (x[0], w, None, r), r"must be \(B, C, H, W\)"),
        (lambda x, w, r: (x, w, None, r.int()), r"rows must be \(T,\) int64, got torch.int32"),
    ],
)
def test_errors_name_the_shapes(arguments, message):
    with pytest.raises(ValueError, match=message):
        patch_embed_kept(*arguments(torch.randn(2, 3, 8, 8), torch.randn(6, 3, 4, 4), torch.arange(3)))


@pytest.mark.skipif(INTERPRETED, reason="interpreted functions do not compile")
@pytest.mark.parametrize("patch, channels", [(16, 1), (16, 3), (14, 3)])
def test_the_kernel_compiles_for_hopper_without_spills(patch, channels):
    triton = pytest.importorskip("triton")
    from avfast.kernels.patch_embed_kept import gather_patches_kernel

    values = channels * patch**2
    constants = {"P": patch, "VALUES": values, "BLOCK": triton.next_power_of_2(values)}
    types = {"images_ptr": "*fp32", "rows_ptr": "*i64", "out_ptr": "*bf16"}
    usage = compile_for_hopper(gather_patches_kernel, types, constants, 4)
    assert usage.stack == 0 and usage.registers <= 64, usage


@pytest.mark.gpu
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spectrogram", [False, True])
def test_the_kernel_on_a_gpu(half, spectrogram):
    images = torch.randn(3, 1, 1024, 128, device="cuda").mT if spectrogram else torch.randn(3, 3, 224, 224).cuda()
    total = 3 * (images.shape[2] // 16) * (images.shape[3] // 16)
    rows = torch.randperm(total, device="cuda")[: total // 2]
    patches = torch.ops.avfast.gather_patches(images, rows, 16, half)
    every = images.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1)
    assert torch.equal(patches, every[rows].to(half))
