"""Packed attention by every implementation under one contract, and what a named library answers."""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType

import fake_attention
import pytest
import torch
from attention_contract import HALVES, assert_right, draw, outcome
from torch._dynamo.testing import CompileCounterWithBackend

from avfast import backend, flops
from avfast.ops import AttentionPlan, packed_attention, packed_attention_qkv
from avfast.ops import _attention_libraries as libraries
from avfast.packing import cumulative

LIBRARIES = backend.ATTENTION_LIBRARIES
CASES = {
    "ragged": ([5, 40, 0, 1, 40, 0], None),
    "equal": ([24] * 3, None),
    "cross": ([3, 9, 0, 5], [7, 0, 4, 5]),
    "equal cross": ([8] * 3, [24] * 3),
}
DIMS = (16, 32, 64, 80, 128)
PAIRS = [(name, case) for name in LIBRARIES for case in CASES if name != "cudnn" or "equal" in case]
OURS = [(name, case) for name in ("reference", "triton") for case in CASES]


@pytest.fixture(autouse=True)
def restored():
    name = backend.get_backend()
    yield
    backend.set_backend(name)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fakes(monkeypatch):
    """All libraries, on the CPU; which of them were called."""
    with fake_attention.installed(monkeypatch) as calls:
        yield calls


def contract(dim, dtype, case, device="cpu", heads=2):
    """Values and gradients against float64, with rows past the end."""
    lengths_q, lengths_k = CASES[case]
    plan = AttentionPlan.from_lengths(lengths_q, lengths_k, device=device)
    keys = lengths_q if lengths_k is None else lengths_k
    inputs, weight = draw(lengths_q, keys, heads, dim, dtype, device, rest=3)
    if device == "cuda":  # freed at once: the memory that libraries get next is not zero by luck
        torch.full((1 << 22,), float("nan"), device=device)
    got = outcome(lambda *x: packed_attention(*x, scale=0.3, plan=plan), inputs, weight)
    assert_right(got, inputs, weight, lengths_q, keys, 0.3)


# One contract for all.


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dim, dtype", [(16, torch.float32), (80, torch.float16), (128, torch.bfloat16)])
def test_reference_keeps_the_contract(dim, dtype, case):
    backend.set_backend("reference")
    contract(dim, dtype, case)


@pytest.mark.parametrize("dim, dtype", [(16, torch.float16), (80, torch.bfloat16)])
@pytest.mark.parametrize("name, case", PAIRS)
def test_libraries_keep_the_contract(fakes, name, case, dim, dtype):
    backend.set_backend(name)
    contract(dim, dtype, case)
    assert fakes == [name]


@pytest.mark.gpu
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(
    "name, case, dtype",
    [*((*pair, torch.float32) for pair in OURS), *((*pair, dtype) for pair in OURS + PAIRS for dtype in HALVES)],
)
def test_every_backend_keeps_the_contract(name, case, dtype, dim):
    reason = libraries.missing(name) if name in LIBRARIES else None
    if reason:
        pytest.skip(reason)
    backend.set_backend(name)
    contract(dim, dtype, case, "cuda", heads=3)


@pytest.mark.parametrize("name", [name for name in LIBRARIES if name != "cudnn"])
def test_any_strides_and_a_packed_gradient(fakes, name):
    backend.set_backend(name)
    lengths = [3, 0, 8, 3]
    plan = AttentionPlan.from_lengths(lengths)
    qkv, weight = torch.randn(16, 3, 2, 16).bfloat16(), torch.randn(16, 2, 16).bfloat16()
    out, gradient = outcome(lambda x: packed_attention_qkv(x, scale=0.3, plan=plan), [qkv], weight)
    assert_right([out, *gradient.unbind(1)], qkv.unbind(1), weight, lengths, lengths, 0.3)
    shifted = torch.randn(3 * 16 * 2 * 16 + 4).bfloat16()[4:].view(3, 16, 2, 16).unbind()  # from an odd address
    odd = torch.randn(3, 16, 2, 17).bfloat16()[..., 1:].unbind()  # rows of 34 bytes
    expanded = torch.randn(3, 16, 1, 16).bfloat16().expand(-1, -1, 2, -1).unbind()
    for inputs in (shifted, odd, expanded):
        got = outcome(lambda *x: packed_attention(*x, scale=0.3, plan=plan), inputs, weight)
        assert_right(got, inputs, weight, lengths, lengths, 0.3)


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_casts_for_libraries_too(fakes, dtype):
    backend.set_backend("flash_attn")
    x = torch.randn(9, 2, 16, requires_grad=True)
    with torch.autocast("cpu", dtype):
        out = packed_attention(x, x, x, plan=AttentionPlan.from_lengths([4, 5]))
    assert out.dtype == dtype and torch.autograd.grad(out.float().sum(), x)[0].dtype == torch.float32


def test_compiled_without_a_break_and_not_anew_for_other_lengths(fakes):
    backend.set_backend("varlen")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v, plan: packed_attention(q, k, v, plan=plan), fullgraph=True, backend=counter
    )
    for lengths in ([3, 0, 8], [5, 4, 7, 2], [6, 1], [2, 9, 3]):
        plan, count = AttentionPlan.from_lengths(lengths), sum(lengths) + 2
        *inputs, weight = torch.randn(4, count, 2, 16).bfloat16().unbind()
        want = outcome(partial(packed_attention, plan=plan), inputs, weight)
        got = outcome(partial(compiled, plan=plan), inputs, weight)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert fakes == ["varlen"] * 8 and counter.frame_count <= 2


def test_flops_are_counted_whatever_is_named():
    backend.set_backend("varlen")
    x = torch.randn(9, 2, 16).bfloat16()
    assert flops.count(packed_attention, x, x, x, plan=AttentionPlan.from_lengths([4, 5])) == 4 * (16 + 25) * 2 * 16
    assert backend.get_backend() == "varlen"


# What a named library answers.


def attend(lengths=(5, 9), dtype=torch.bfloat16, dim=16, plan=None, lengths_k=None):
    keys = lengths if lengths_k is None else lengths_k
    q, k, v = (torch.randn(sum(n), 2, dim).to(dtype) for n in (lengths, keys, keys))
    return packed_attention(q, k, v, plan=plan or AttentionPlan.from_lengths(lengths, lengths_k))


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize(
    "request_, message",
    [
        ({"dtype": torch.float32}, "float16 and bfloat16, got torch.float32"),
        ({"dtype": torch.float64}, "float16 and bfloat16, got torch.float64"),
        ({"dim": 20}, "multiple of 8 up to 256, got 20"),
        ({"dim": 264}, "multiple of 8 up to 256, got 264"),
        ({"plan": AttentionPlan.from_cu_seqlens(cumulative([5, 9]), max_seqlen_q=9)}, "lengths on the host"),
        ({"lengths": (0, 0)}, "at least one query and key"),
        ({"lengths_k": (0, 0)}, "at least one query and key"),
    ],
)
def test_a_named_library_says_what_it_cannot_do(fakes, name, request_, message):
    backend.set_backend(name)
    with pytest.raises(RuntimeError, match=f"AVFAST_BACKEND={name}: .*{message}.*AVFAST_BACKEND=auto"):
        attend(**request_)
    with pytest.raises(ValueError, match="plan holds 18 queries and 18 keys, got 14 and 14 rows"):
        attend(plan=AttentionPlan.from_lengths([9, 9]))
    assert not fakes


@pytest.mark.parametrize("request_, message", [
    ({"lengths": (5, 9)}, "one length, got different"),
    ({"lengths": (4, 0)}, "one length, got different"),
    ({"lengths": (4, 4), "lengths_k": (3, 5)}, "one length, got different"),
    ({"lengths": (4, 4), "lengths_k": (1, 1)}, "of one key"),
])  # fmt: skip
def test_cudnn_says_which_lengths_it_takes(fakes, request_, message):
    backend.set_backend("cudnn")
    with pytest.raises(RuntimeError, match=f"AVFAST_BACKEND=cudnn: .*{message}"):
        attend(**request_)
    assert not fakes


@pytest.mark.parametrize("name", LIBRARIES)
def test_determinism_reaches_a_library_or_is_refused(fakes, name):
    torch.use_deterministic_algorithms(True)
    backend.set_backend(name)
    if name in ("xformers", "cudnn"):
        with pytest.raises(RuntimeError, match=f"AVFAST_BACKEND={name}: it is not deterministic"):
            attend((4, 4))
    else:
        attend((4, 4))
        assert fakes == [name if name == "varlen" else f"{name} deterministic"]  # varlen reads the switch itself


@pytest.mark.parametrize("name", LIBRARIES)
def test_without_a_gpu_a_named_library_is_an_error_for_attention_alone(name):
    backend.set_backend(name)
    assert backend.which(torch.device("cpu")) == "reference"
    with pytest.raises(RuntimeError, match=f"AVFAST_BACKEND={name}: it needs a CUDA device, got cpu"):
        attend((4, 4))


@pytest.mark.parametrize("name, module, package", [
    ("flash_attn", "flash_attn", "flash-attn"),
    ("flash_attn_4", "flash_attn.cute", "--pre flash-attn-4"),
    ("xformers", "xformers.ops", "xformers"),
])  # fmt: skip
def test_a_missing_library_is_named_with_its_pip_line(fakes, monkeypatch, name, module, package):
    backend.set_backend(name)
    # flash-attn-4 alone leaves a package flash_attn without a function
    for broken in (ModuleType(module), None):
        monkeypatch.setitem(sys.modules, module, broken)
        with pytest.raises(RuntimeError, match=rf"AVFAST_BACKEND={name}: {module}.*\(pip install {package}\)"):
            attend()


def test_auto_is_ours(fakes):
    assert tuple(libraries.LIBRARIES) == LIBRARIES
    for name in ("auto", "reference"):
        backend.set_backend(name)
        attend()
    assert not fakes
