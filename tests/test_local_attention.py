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
from torch import nn

from avfast import backend, flops
from avfast.nn import LocalBlock, LocalBlocks
from avfast.nn.block import Read
from avfast.ops import AttentionPlan, local_attention
from avfast.ops.local_attention import APART, window_regions

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMES = ("qkv", "bias", "scale")


def naive(qkv, bias, scale, grid, window, shift):
    """Every token by itself: looks for the others of its window by their places."""
    (rows, columns), (p, q) = grid, window
    out = torch.zeros(qkv.shape[0], qkv.shape[1], *qkv.shape[3:], dtype=qkv.dtype)
    places = [((r - shift[0]) % rows, (c - shift[1]) % columns) for r in range(rows) for c in range(columns)]
    number = [(i % p) * q + j % q for i, j in places]
    part = [(i >= rows - shift[0], j >= columns - shift[1]) for i, j in places]
    directions = qkv / qkv.square().sum(-1, keepdim=True).clamp(min=1e-12).sqrt()
    outs = []
    for n, (i, j) in enumerate(places):
        own = [m for m, (a, b) in enumerate(places) if (a // p, b // q) == (i // p, j // q)]
        cosine = (directions[:, n, None, 0] * directions[:, own, 1]).sum(-1)  # (B, W, H)
        logits = cosine * scale + bias[:, number[n], [number[m] for m in own]].T
        apart = torch.tensor([APART * (part[m] != part[n]) for m in own], dtype=qkv.dtype)
        weights = (logits + apart[:, None]).softmax(1)
        outs.append((weights[..., None] * qkv[:, own, 2]).sum(1))
    return torch.stack(outs, 1) if outs else out


def random_inputs(batch, grid, window, heads, dim, dtype=torch.float64, scale=5.0):
    size = window[0] * window[1]
    qkv = torch.randn(batch, grid[0] * grid[1], 3, heads, dim, dtype=torch.float64).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    inputs = (qkv, torch.randn(heads, size, size, dtype=wide), scale * torch.rand(heads, dtype=wide) + 0.5)
    return [x.requires_grad_() for x in inputs]


def check(inputs, grid, window, shift, tol, factor=1.0):
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got = local_attention(*inputs, grid=grid, window=window, shift=shift)
    want = naive(*exact, grid, window, shift)
    assert got.dtype == inputs[0].dtype
    assert_close("out", got, want, tol)
    grad = torch.randn(*want.shape[:-1], want.shape[-1] + 2)[..., 1:-1]  # not contiguous
    grads = torch.autograd.grad(got, inputs, grad.to(got.dtype))
    exact_grads = torch.autograd.grad(want, exact, grad.to(got.dtype).double())
    largest = max([x.abs().max().item() for x in exact_grads if x.numel()], default=1.0)
    for name, x, a, b in zip(NAMES, inputs, grads, exact_grads, strict=True):
        assert a.dtype == x.dtype
        assert_close(f"gradient of {name}", a, b, factor * tol, largest)


@pytest.mark.skipif(INTERPRETED, reason="float64 does not run on the kernels")
@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 3),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from([((4, 4), (2, 0)), ((4, 4), (0, 0)), ((2, 3), (1, 2)), ((1, 1), (0, 0)), ((3, 1), (1, 0))]),
    st.sampled_from([1, 2**21]),
)
def test_token_by_token(batch, windows, case, chunk):
    torch.manual_seed(batch)
    window, shift = case
    grid = [n * w for n, w in zip(windows, window, strict=True)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys.modules["avfast.ops.local_attention"], "CHUNK", chunk)
        check(random_inputs(batch, grid, window, 2, 5), grid, window, shift, 1e-11)


CASES = [
    ((8, 8), (4, 4), (2, 0), 32),
    ((4, 4), (4, 4), (2, 1), 24),
    ((12, 4), (4, 4), (0, 0), 16),
    ((3, 6), (3, 3), (1, 2), 8),
    ((8, 4), (8, 4), (4, 0), 16),
]


@pytest.mark.parametrize(
    "grid, window, shift, dim, dtype",
    [(*case, torch.float32) for case in CASES]
    + [(*case, half) for case in CASES[:2] for half in (torch.bfloat16, torch.float16)],
)
def test_in_float32_and_half_precision(grid, window, shift, dim, dtype):
    if INTERPRETED:
        assert backend.get_backend() == "triton"
    inputs = random_inputs(2, grid, window, 2, dim, dtype)
    # In half precision the weights and their gradients are rounded once before a product.
    tol = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    check(inputs, grid, window, shift, tol, factor=1.0 if dtype == torch.float32 else 2.0)


def test_vectors_of_no_length_have_finite_gradients():
    inputs = random_inputs(1, (4, 4), (4, 4), 2, 16, torch.float32)
    with torch.no_grad():
        inputs[0][:, 3, 0] = 0
        inputs[0][:, 5, 1] = 1e-8
    out = local_attention(*inputs, grid=(4, 4))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = naive(*exact, (4, 4), (4, 4), (0, 0))
    assert_close("out", out, want, 1e-5)
    grads, exact_grads = (torch.autograd.grad(x.sum(), y) for x, y in ((out, inputs), (want, exact)))
    for a, b in zip(grads, exact_grads, strict=True):
        assert a.isfinite().all()
        assert_close("gradient", a, b, 1e-4)


@interpreter
@pytest.mark.skipif(INTERPRETED, reason="is the run itself")
def test_the_kernels_under_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "AVFAST_BACKEND": "triton"}
    command = [sys.executable, "-m", "pytest", "-q", "-k", "float32 or no_length or partial_sums", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stdout + run.stderr
    assert "11 passed" in run.stdout


def test_many_windows_are_added_up_in_partial_sums():
    with pytest.MonkeyPatch.context() as patched:
        if INTERPRETED:
            patched.setattr("avfast.kernels.local_attention.PROGRAMS", 2)
        check(random_inputs(3, (8, 4), (4, 4), 1, 16, torch.float32), (8, 4), (4, 4), (2, 0), 1e-5)


@pytest.mark.skipif(INTERPRETED, reason="opcheck compares with fake tensors in float64")
def test_opcheck():
    qkv, bias, scale = random_inputs(2, (4, 2), (2, 2), 3, 4)
    qkv = qkv.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    geometry = [4, 2], [2, 2], [1, 0]
    torch.library.opcheck(torch.ops.avfast.local_attention, (qkv, bias, scale, *geometry))
    half = qkv.detach().bfloat16()
    arguments = (half[:, :, 0].mT.contiguous().mT, half, bias.detach().float(), scale.detach().float(), *geometry)
    torch.library.opcheck(torch.ops.avfast.local_attention_backward, arguments)


@pytest.mark.skipif(INTERPRETED, reason="compares PyTorch paths")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_block_eager_equals_compiled_with_and_without_autocast(dtype):
    block = LocalBlock(32, 2, shift=(2, 0))
    x = torch.randn(2, 32, 32)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        got, want = compiled(x, (8, 4)), block(x, (8, 4))
        qkv = block.attn.qkv(x).unflatten(-1, (3, 2, 16))
        bias, scale = block.attn.meta_mlp(block.attn.distances), 1 / block.attn.tau
        attended = local_attention(qkv.float(), bias, scale, grid=(8, 4))
    assert got.dtype == want.dtype == torch.float32 and bias.dtype == torch.float32
    assert attended.dtype == (dtype or torch.float32)
    assert_close("out", got, want, 1e-6 if dtype is None else torch.finfo(dtype).eps)
    grads = [torch.autograd.grad(y.square().sum(), list(block.parameters())) for y in (got, want)]
    largest = max(x.abs().max().item() for x in grads[1])
    for (name, _), a, b in zip(block.named_parameters(), *grads, strict=True):
        assert_close(name, a, b, 1e-5 if dtype is None else 2 * torch.finfo(dtype).eps, largest)
    with pytest.raises(RuntimeError, match="local_attention has no second derivative"):
        first = torch.autograd.grad(block(x, (8, 4)).square().sum(), block.attn.tau, create_graph=True)[0]
        torch.autograd.grad(first.sum(), block.attn.tau)


@pytest.mark.skipif(INTERPRETED, reason="of the eager body")
def test_autocast_rounds_the_input_alone():
    """The bits of the call on rounded input, in the backward pass too when autocast is still on in it."""
    qkv, bias, scale = (x.detach().float() for x in random_inputs(2, (8, 4), (4, 4), 2, 8))
    inputs = [x.bfloat16().requires_grad_() for x in (qkv, qkv)]
    want = local_attention(inputs[0], bias, scale, grid=(8, 4), shift=(2, 0))
    want.square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(local_attention(qkv, bias, scale, grid=(8, 4), shift=(2, 0)), want)
        local_attention(inputs[1], bias, scale, grid=(8, 4), shift=(2, 0)).square().sum().backward()
    assert torch.equal(inputs[1].grad, inputs[0].grad)


@pytest.mark.skipif(INTERPRETED, reason="full size")
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.float64, 1e-8)])
def test_the_block_gives_the_numbers_of_the_released_one(dtype, tol):
    """AudioMAE's ``decoder_blocks.1`` (shifted), with synthetic weights that follow from their names."""
    with np.load(Path(__file__).parent / "fixtures" / "local_block.npz") as file:
        expected = {name: torch.from_numpy(value) for name, value in file.items()}

    def normal(name, shape):
        return torch.from_numpy(np.random.RandomState(zlib.crc32(f"public/{name}".encode())).standard_normal(shape))

    def released(number):
        block = LocalBlock(512, 16, shift=(2 * (number % 2), 0))
        for name, x in block.named_parameters():
            n = normal(f"decoder_blocks.{number}.{name}", x.shape)
            matrix = x.ndim == 2
            value = (
                n / x.shape[1] ** 0.5
                if matrix
                else 1 + 0.1 * n
                if name.endswith(("tau", "m1.weight", "m2.weight"))
                else 0.02 * n
            )
            x.data = value.float()
        return block.to(dtype)

    with torch.no_grad():
        first = released(0).attn
        assert_close("bias", first.meta_mlp(first.distances)[:4], expected["swin_bias_block0"], tol)
        block, x = released(1), normal("input:swin_block_x", (2, 512, 512)).float().to(dtype)
        name = "_slice_0_16_16"
        assert_close("block", block(x, (64, 8))[:, ::16, ::16], expected[f"swin_block_out{name}"], tol)
        block.attn.tau.data = (0.02 * normal("swin_block_clamp.tau", (16,))).float().to(dtype)
        assert_close("clamped", block(x, (64, 8))[:, ::16, ::16], expected[f"swin_block_clamped_tau_out{name}"], tol)
    region = window_regions((64, 8), (4, 4), (2, 0), torch.device("cpu"))[[0, 1, 30, 31]]
    apart = (region[:, :, None] != region[:, None]) * APART
    assert torch.equal(apart.double(), expected["swin_attn_mask_shift"].double())


@pytest.mark.skipif(INTERPRETED, reason="compares PyTorch paths")
def test_the_stack_shifts_odd_blocks_reads_rows_and_recomputes():
    stack, norm = LocalBlocks(32, 3, 2, grid=(8, 4)), nn.LayerNorm(32)
    assert [block.attn.shift for block in stack] == [(0, 0), (2, 0), (0, 0)]
    assert "1.attn.meta_mlp.fc1.weight" in stack.state_dict() and not any("distances" in k for k in stack.state_dict())
    x, plan, rows = torch.randn(2 * 32, 32), AttentionPlan.from_lengths([32, 32]), torch.tensor([3, 40, 41])
    want = x.unflatten(0, (2, 32))
    for block in stack:
        want = block(want, (8, 4))
    want = norm(want).flatten(0, 1)
    for recompute in (False, True):
        got = stack(x, plan, None, None, norm, recompute)
        assert torch.equal(got, want)
        assert_close("rows", stack(x, plan, None, Read(rows, plan), norm, recompute), want[rows], 1e-6)
        grads = torch.autograd.grad(got.square().sum(), list(stack.parameters()))
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.skipif(INTERPRETED, reason="counts on meta")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_are_those_of_the_windows(device):
    batch, tokens, heads, dim, size = 2, 32, 2, 8, 16
    inputs = [x.detach().to(device).requires_grad_() for x in random_inputs(batch, (8, 4), (4, 4), heads, dim)]
    products = 2 * 2 * batch * tokens * size * heads * dim  # q k and p v, 2 FLOP a multiply-add
    counted = flops.count(lambda: local_attention(*inputs, grid=(8, 4)).sum(), backward=True)
    assert counted == 3 * products


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grid": (6, 4)}, r"grid of \(6, 4\) tokens cannot be cut into windows of \(4, 4\)"),
        ({"grid": (32,)}, r"must be \(rows, columns\), got \[32\]"),
        ({"shift": (4, 0)}, r"below the window \(4, 4\), got \(4, 0\)"),
        ({"grid": (4, 4)}, r"qkv must be \(B, 16, 3, H, D\).*got .*\[1, 32, 3, 2, 8\]"),
        ({"bias": torch.zeros(2, 4, 4)}, r"bias must be \(2, 16, 16\) and scale \(2,\), got \(2, 4, 4\)"),
        ({"qkv": torch.zeros(1, 32, 3, 2, 8).long()}, "got torch.int64"),
    ],
)
def test_errors_name_what_does_not_fit(change, message):
    given = dict(zip(NAMES, random_inputs(1, (8, 4), (4, 4), 2, 8, torch.float32), strict=True)) | {"grid": (8, 4)}
    with pytest.raises(ValueError, match=message):
        local_attention(**(given | change))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "batch, grid, window, shift, heads, dim",
    [
        (64, (64, 8), (4, 4), (2, 0), 16, 32),
        (3, (8, 8), (4, 4), (0, 0), 3, 64),
        (2, (14, 7), (7, 7), (3, 2), 2, 80),
        (5, (4, 6), (2, 2), (1, 1), 4, 16),
    ],
)
def test_the_kernels_on_a_gpu(batch, grid, window, shift, heads, dim, dtype):
    inputs = [x.detach().cuda().requires_grad_() for x in random_inputs(batch, grid, window, heads, dim, dtype)]
    grad = torch.randn(batch, grid[0] * grid[1], heads, dim, device="cuda").to(dtype)

    def results(given, factor):
        out = local_attention(*given, grid=grid, window=window, shift=shift)
        return [out, *torch.autograd.grad(out, given, factor)]

    got, again = results(inputs, grad), results(inputs, grad)
    exact = results([x.detach().cpu().double().requires_grad_() for x in inputs], grad.cpu().double())
    largest = max(x.abs().max().item() for x in exact[1:])
    tol = 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for name, a, b, c in zip(("out", *NAMES), got, again, exact, strict=True):
        assert torch.equal(a, b), f"{name} differs between two runs"
        assert_close(name, a, c, tol, largest)
