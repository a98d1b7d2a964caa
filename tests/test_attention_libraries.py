"""Packed attention by every implementation under one contract, and which of them runs when."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fake_attention
import pytest
import torch
from attention_contract import HALVES, assert_right, draw, outcome

from avfast import backend
from avfast.ops import AttentionPlan, packed_attention, packed_attention_qkv
from avfast.ops import _attention_libraries as libraries

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LIBRARIES = backend.ATTENTION_LIBRARIES
CASES = {
    "ragged": ([5, 40, 0, 1, 40, 0], None),
    "equal": ([24] * 3, None),
    "cross": ([3, 9, 0, 5], [7, 0, 4, 5]),
    "equal cross": ([8] * 3, [24] * 3),
}
DIMS = (16, 32, 64, 80, 128)


def takes(name, case):
    """Whether a library is made for lengths like these."""
    return name != "cudnn" or "equal" in case


PAIRS = [(name, case) for name in LIBRARIES for case in CASES if takes(name, case)]
INTERPRETED_CASES = [  # no bfloat16, which the interpreter truncates
    (16, torch.float32, "ragged"),
    (16, torch.float32, "cross"),
    (80, torch.float16, "equal cross"),
]
OURS = [(name, case) for name in ("reference", "triton") for case in CASES]


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    name = backend.get_backend()
    yield
    backend.set_backend(name)
    torch.use_deterministic_algorithms(False)
    monkeypatch.undo()
    libraries._flash_attn.cache_clear()
    libraries._xformers.cache_clear()


@pytest.fixture
def fakes(monkeypatch):
    """All libraries, on the CPU; which of them were called."""
    aten = fake_attention.Aten()
    modules = fake_attention.flash_attn_modules(aten.calls) | fake_attention.xformers_modules(aten.calls)
    fake_attention.install(monkeypatch, modules)
    monkeypatch.setattr(libraries, "DEVICE", "cpu")
    yield aten.calls
    aten.library._destroy()


def contract(dim, dtype, case, device="cpu", heads=2, backward=None):
    """Values and gradients against float64, with rows past the end, the backward pass by another if one is named."""
    lengths_q, lengths_k = CASES[case]
    plan = AttentionPlan.of(lengths_q, lengths_k, device=device)
    keys = lengths_q if lengths_k is None else lengths_k
    inputs, weight = draw(lengths_q, keys, heads, dim, dtype, device, rest=3)
    if device == "cuda":  # freed at once: the memory that libraries get next is not zero by luck
        torch.full((1 << 22,), float("nan"), device=device)

    def attend(*x):
        out = packed_attention(*x, scale=0.3, plan=plan)
        if backward:
            backend.set_backend(backward)
        return out

    got = outcome(attend, inputs, weight)
    assert_right(got, inputs, weight, lengths_q, keys, 0.3)


# One contract for all.


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_reference_keeps_the_contract(dtype, dim, case):
    backend.set_backend("reference")
    contract(dim, dtype, case)


@pytest.mark.parametrize("dim, dtype", [(16, torch.float16), *((dim, torch.bfloat16) for dim in DIMS)])
@pytest.mark.parametrize("name, case", PAIRS)
def test_adapters_keep_the_contract(fakes, name, case, dtype, dim):
    backend.set_backend(name)
    contract(dim, dtype, case)
    assert fakes == [f"{name} forward", f"{name} backward"]


@pytest.mark.skipif(not INTERPRETED, reason="run by test_kernels_keep_the_contract_in_the_interpreter")
@pytest.mark.parametrize("dim, dtype, case", INTERPRETED_CASES)
def test_interpreted_kernels_keep_the_contract(dim, dtype, case):
    contract(dim, dtype, case, heads=1)


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_kernels_keep_the_contract_in_the_interpreter():
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "interpreted", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "AVFAST_BACKEND": "triton"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:]
    assert f"{len(INTERPRETED_CASES)} passed" in result.stdout


def use_on_gpu(name):
    """Names a backend, or skips where it is not to be had."""
    problem = libraries.LIBRARIES[name].problem() if name in LIBRARIES else None
    if problem:
        pytest.skip(problem)
    backend.set_backend(name)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(
    "name, case, dtype",
    [*((*pair, torch.float32) for pair in OURS), *((*pair, dtype) for pair in OURS + PAIRS for dtype in HALVES)],
)
def test_every_backend_keeps_the_contract(name, case, dtype, dim):
    use_on_gpu(name)
    contract(dim, dtype, case, "cuda", heads=3)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "names, case",
    [
        (names, case)
        for names in itertools.permutations(["auto", *LIBRARIES], 2)
        for case in ("equal", "cross")
        if all(takes(name, case) for name in names)
    ],
)
def test_one_goes_forward_and_another_backward(request, names, case, device):
    """Log-sum-exps mean the same to all of them."""
    calls = request.getfixturevalue("fakes") if device == "cpu" else []
    for name in reversed(names):
        use_on_gpu(name) if device == "cuda" else backend.set_backend(name)
    contract(16, torch.bfloat16, case, device, backward=names[1])
    if device == "cpu":
        assert calls == [f"{n} {d}" for n, d in zip(names, ("forward", "backward"), strict=True) if n != "auto"]


@pytest.mark.parametrize("name", ["varlen", "flash_attn", "xformers"])
def test_any_strides_and_a_packed_gradient(fakes, name):
    backend.set_backend(name)
    lengths = [3, 0, 8, 3]
    plan = AttentionPlan.of(lengths)
    qkv, weight = torch.randn(16, 3, 2, 16).bfloat16(), torch.randn(16, 2, 16).bfloat16()
    out, gradient = outcome(lambda x: packed_attention_qkv(x, scale=0.3, plan=plan), [qkv], weight)
    assert_right([out, *gradient.unbind(1)], qkv.unbind(1), weight, lengths, lengths, 0.3)
    odd = torch.randn(3, 16, 2, 17).bfloat16()[..., 1:].unbind()  # rows of 34 bytes from an odd address
    transposed = torch.randn(3, 2, 16, 16).bfloat16().transpose(1, 2).unbind()
    for inputs in (odd, transposed):
        got = outcome(lambda *x: packed_attention(*x, scale=0.3, plan=plan), inputs, weight)
        assert got[0].is_contiguous()  # as torch.compile was told
        assert_right(got, inputs, weight, lengths, lengths, 0.3)
        leaves = [x.requires_grad_() for x in inputs]
        numbers = (plan.cu_seqlens_q, None, None, 8, 0, 0.3, 14, 0)
        torch.library.opcheck(torch.ops.avfast.packed_attention.default, (*leaves, *numbers))


def test_compiled_equals_eager(fakes):
    backend.set_backend("varlen")
    plan = AttentionPlan.of([3, 0, 8])
    inputs = [torch.randn(13, 2, 16).bfloat16() for _ in range(3)]
    weight = torch.randn(13, 2, 16).bfloat16()
    attend = torch.compile(lambda *x: packed_attention(*x, plan=plan), fullgraph=True, backend="aot_eager")
    want, got = (outcome(f, inputs, weight) for f in (lambda *x: packed_attention(*x, plan=plan), attend))
    assert fakes == ["varlen forward", "varlen backward"] * 2
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# What a named library answers.


def attend(lengths=(5, 9), dtype=torch.bfloat16, dim=16, plan=None, lengths_k=None):
    keys = lengths if lengths_k is None else lengths_k
    q, k, v = (torch.randn(sum(n), 2, dim).to(dtype) for n in (lengths, keys, keys))
    return packed_attention(q, k, v, plan=plan or AttentionPlan.of(lengths, lengths_k))


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize(
    "request_, message",
    [
        ({"dtype": torch.float32}, "float16 and bfloat16, got torch.float32"),
        ({"dtype": torch.float64}, "float16 and bfloat16, got torch.float64"),
        ({"dim": 20}, "multiple of 8 up to (256|128), got 20"),
        ({"dim": 264}, "multiple of 8 up to (256|128), got 264"),
        ({"plan": AttentionPlan.build(torch.tensor([0, 5, 14], dtype=torch.int32))}, "lengths on the host"),
        ({"plan": AttentionPlan.build(torch.tensor([0, 5, 14], dtype=torch.int32), max_seqlen_q=9)}, "on the host"),
        ({"lengths": (0, 0)}, "at least one query and key"),
        ({"lengths_k": (0, 0)}, "at least one query and key"),
    ],
)
def test_a_named_library_says_what_it_cannot_do(fakes, name, request_, message):
    backend.set_backend(name)
    with pytest.raises(RuntimeError, match=f"AVFAST_BACKEND={name}: .*{message}.*AVFAST_BACKEND=auto"):
        attend(**request_)
    assert not fakes


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_plan_of_more_rows_than_there_are_is_refused_before_the_kernel_reads_them(fakes, name):
    backend.set_backend(name)
    with pytest.raises(ValueError, match="plan holds 18 queries and 18 keys, got 14 and 14 rows"):
        attend(plan=AttentionPlan.of([9, 9]))
    assert not fakes


def test_cudnn_says_which_lengths_it_takes(fakes, monkeypatch):
    backend.set_backend("cudnn")
    for lengths in ((5, 9), (5, 0)):
        with pytest.raises(RuntimeError, match="sequences of one length, got different"):
            attend(lengths)
    with pytest.raises(RuntimeError, match="of one key"):
        attend((4, 4), lengths_k=(1, 1))
    attend((4, 4))
    monkeypatch.setenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1")
    with pytest.raises(RuntimeError, match="TORCH_CUDNN_SDPA_AVOID_RECOMPILE"):
        attend((4, 4))


def test_equal_lengths_are_known_not_guessed():
    """Eight rows, two sequences, the longest of four: still not two sequences of four."""
    plan = AttentionPlan.of([2, 4])
    n = libraries.Lengths.of(plan.cu_seqlens_q, None, plan.max_seqlen_q, 0, plan.total_q, 0)
    assert n.known and not n.equal and n._replace(total_q=8, total_k=8).equal
    assert not libraries.Lengths.of(plan.cu_seqlens_q, plan.cu_seqlens_q, 4, 4, 6, 8).equal


@pytest.mark.parametrize("name", ["xformers", "cudnn"])
def test_determinism_is_refused_by_those_without_it(fakes, name):
    backend.set_backend(name)
    attend((4, 4))
    torch.use_deterministic_algorithms(True)
    with pytest.raises(RuntimeError, match=f"AVFAST_BACKEND={name}: it is not deterministic"):
        attend((4, 4))


def test_determinism_reaches_those_that_have_it(fakes):
    torch.use_deterministic_algorithms(True)
    backend.set_backend("flash_attn")
    contract(16, torch.bfloat16, "ragged")
    assert fakes == ["flash_attn forward", "flash_attn backward deterministic"]
    backend.set_backend("varlen")  # reads the global switch itself
    contract(16, torch.bfloat16, "ragged")


@pytest.mark.parametrize("name", LIBRARIES)
def test_without_a_gpu_a_named_library_is_an_error(name):
    backend.set_backend(name)
    with pytest.raises(RuntimeError, match=f"AVFAST_BACKEND={name}: it needs a CUDA device, got cpu"):
        attend((4, 4))


@pytest.mark.parametrize("name, package", [("flash_attn", "flash-attn"), ("xformers", "xformers")])
def test_a_missing_library_is_named_with_its_pip_line(fakes, monkeypatch, name, package):
    fake_attention.install(monkeypatch, {name: None})
    for module in [m for m in sys.modules if m.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, module)
    backend.set_backend(name)
    with pytest.raises(RuntimeError, match=rf"AVFAST_BACKEND={name}: .*pip install {package}"):
        attend()


def test_a_library_with_another_signature_is_an_error(fakes, monkeypatch):
    modules = fake_attention.flash_attn_modules([])
    interface = modules["flash_attn.flash_attn_interface"]
    interface._flash_attn_varlen_forward = lambda q, k, v, cu_seqlens_q, cu_seqlens_k, window_size: None
    fake_attention.install(monkeypatch, modules)
    backend.set_backend("flash_attn")
    with pytest.raises(RuntimeError, match="_flash_attn_varlen_forward has no parameter max_seqlen_q, max_seqlen_k"):
        attend()
    del interface._flash_attn_varlen_forward
    libraries._flash_attn.cache_clear()
    with pytest.raises(RuntimeError, match="flash_attn_interface has no _flash_attn_varlen_forward"):
        attend()


def test_parameters_of_custom_operators_are_seen():
    @torch.library.custom_op("avfast_test::two", mutates_args=())
    def two(dout: torch.Tensor, softcap: float) -> torch.Tensor:
        return dout * softcap

    assert libraries._parameters(two) == ["dout", "softcap"]


def test_padded_log_sum_exps_are_refused(fakes, monkeypatch):
    fake_attention.install(monkeypatch, fake_attention.xformers_modules([], padded_lse=True))
    backend.set_backend("xformers")
    with pytest.raises(
        RuntimeError, match=r"Xformers have shape \(2, 2, 14\), expected \(heads, queries\) = \(2, 14\)"
    ):
        attend()


def test_other_ops_take_no_notice():
    for name in LIBRARIES:
        backend.set_backend(name)
        assert backend.which(torch.device("cpu")) == "reference"


# What `auto` chooses.

ROW = libraries.TakeOver("varlen", ("forward", "backward"), (0, 0), (16,), (5, 9), False, False, "a test")


def ran(calls, **request):
    calls.clear()
    attend(**request)
    return bool(calls)


def test_auto_is_ours_until_somebody_measures(fakes):
    assert libraries.TABLE == ()
    assert not ran(fakes) and not ran(fakes, lengths=(9, 9))


def test_auto_follows_the_table(fakes, monkeypatch):
    monkeypatch.setattr(libraries, "TABLE", (ROW,))
    contract_calls = ["varlen forward", "varlen backward"]
    lengths, (inputs, weight) = [5, 9, 0], draw([5, 9, 0], [5, 9, 0], 2, 16, torch.bfloat16)
    got = outcome(lambda *x: packed_attention(*x, scale=0.3, plan=AttentionPlan.of(lengths)), inputs, weight)
    assert fakes == contract_calls
    assert_right(got, inputs, weight, lengths, lengths, 0.3)


@pytest.mark.parametrize(
    "request_",
    [
        {"dtype": torch.float32},
        {"dtype": torch.float64},
        {"dim": 32},
        {"lengths": (4, 3)},
        {"lengths": (10, 3)},
        {"lengths": (9, 9)},
        {"lengths_k": (9, 5)},
        {"plan": AttentionPlan.build(torch.tensor([0, 5, 14], dtype=torch.int32), max_seqlen_q=9)},
    ],
)
def test_auto_stays_with_ours_outside_the_row(fakes, monkeypatch, request_):
    monkeypatch.setattr(libraries, "TABLE", (ROW,))
    assert ran(fakes) and not ran(fakes, **request_)


@pytest.mark.parametrize("warn_only", [False, True])
def test_auto_stays_with_ours_where_determinism_is_asked_for(fakes, monkeypatch, warn_only):
    monkeypatch.setattr(libraries, "TABLE", (ROW,))
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    assert not ran(fakes)


def test_a_row_counts_for_its_device_and_phases_only(fakes, monkeypatch):
    monkeypatch.setattr(libraries, "TABLE", (replace(ROW, capability=(9, 0)),))
    assert not ran(fakes)
    monkeypatch.setattr(libraries, "TABLE", (replace(ROW, phases=("backward",)),))
    contract(16, torch.bfloat16, "equal")
    assert not fakes
    monkeypatch.setattr(
        libraries, "TABLE", (replace(ROW, phases=("backward",), equal=True, longest=(24, 24), library="cudnn"),)
    )
    contract(16, torch.bfloat16, "equal")
    assert fakes == ["cudnn backward"]


def test_auto_passes_over_a_library_that_is_not_there(fakes, monkeypatch):
    fake_attention.install(monkeypatch, {"flash_attn.flash_attn_interface": None})
    monkeypatch.setattr(libraries, "TABLE", (replace(ROW, library="flash_attn"),))
    assert not ran(fakes)
    monkeypatch.setattr(libraries, "TABLE", (replace(ROW, library="flash_attn"), ROW))
    assert ran(fakes) and fakes == ["varlen forward"]


def test_auto_on_the_cpu_is_the_reference(monkeypatch):
    monkeypatch.setattr(libraries, "TABLE", (ROW,))
    x = torch.randn(3, 14, 2, 16).bfloat16().unbind()
    plan = AttentionPlan.of([5, 9])
    got = packed_attention(*x, plan=plan)
    backend.set_backend("reference")
    assert torch.equal(got, packed_attention(*x, plan=plan))
