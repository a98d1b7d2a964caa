from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_contract import HALVES, assert_right, draw, outcome
from avfast.kernels.work_lists import ROWS, SHORT, SPARE
from helpers import assert_close, interpreter
from hypothesis import given, settings
from hypothesis import strategies as st

from avfast import backend, flops
from avfast.ops import AttentionPlan, flash_attn_varlen_func, packed_attention, packed_attention_qkv
from avfast.ops.packed_attention import _bounded_work, _exact_work
from avfast.packing import cumulative

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=6), st.booleans(), st.integers(0, 3))
def test_forward_and_gradients_against_the_written_out_formula(pairs, cross, rest):
    lengths_q = [n for n, _ in pairs]
    lengths_k = [m for _, m in pairs] if cross else lengths_q
    inputs, weight = draw(lengths_q, lengths_k, 2, 16, torch.float64, rest=rest)
    boundaries = [cumulative(lengths_q), cumulative(lengths_k) if cross else None]
    got = outcome(lambda *x: packed_attention(*x, *boundaries, scale=0.3), inputs, weight)
    assert_right(got, inputs, weight, lengths_q, lengths_k, 0.3, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("lengths", [[5, 40, 5, 0, 1, 40, 5], [33], []])
def test_every_dtype(dtype, lengths):
    inputs, weight = draw(lengths, lengths, 2, 16, dtype, rest=3)
    got = outcome(lambda *x: packed_attention(*x, cumulative(lengths)), inputs, weight)
    assert_right(got, inputs, weight, lengths, lengths, 0.25)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("lengths, keys, rest", [([7] * 3, [7] * 3, 0), ([2] * 3, [9] * 3, 0), ([4] * 2, [4] * 2, 1)])
def test_a_plan_of_equal_lengths(lengths, keys, rest, dtype, autocast):
    """One dense call on the CPU, but where rows are left over."""
    inputs, weight = draw(lengths, keys, 2, 16, dtype, rest=rest)
    plan = AttentionPlan.from_lengths(lengths, None if lengths == keys else keys)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        got = outcome(lambda *x: packed_attention(*x, plan=plan), inputs, weight)
    assert got[0].dtype == (autocast or dtype) and got[0].is_contiguous()
    if autocast in (None, dtype):
        assert_right(got, inputs, weight, lengths, keys, 0.25)
    if lengths == keys and autocast is None:
        qkv = torch.stack([x.detach() for x in inputs], 1).requires_grad_()
        out = packed_attention_qkv(qkv, plan=plan)
        assert torch.equal(out, got[0])
        (grad,) = torch.autograd.grad((out * weight.to(out.dtype)).sum(), qkv)
        for a, b in zip(grad.unbind(1), got[1:], strict=True):
            assert_close("gradient", a, b, 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


def test_the_formula_for_other_devices_equals_the_one_for_cpus(monkeypatch):
    from avfast.ops import _attention_reference as reference

    lengths = [5, 9, 5]
    inputs, weight = draw(lengths, lengths, 2, 16, torch.float64)
    monkeypatch.setattr(reference, "_flash_forward", reference._plain_forward)
    monkeypatch.setattr(reference, "_flash_backward", reference._plain_backward)
    got = outcome(lambda *x: packed_attention(*x, cumulative(lengths)), inputs, weight)
    assert_right(got, inputs, weight, lengths, lengths, 0.25, 1e-11)


def test_packed_qkv_is_the_same_and_has_one_gradient():
    lengths = [3, 0, 8, 3]
    qkv = torch.randn(16, 3, 2, 16, requires_grad=True)
    plan, weight = AttentionPlan.from_lengths(lengths), torch.randn(16, 2, 16)
    want = packed_attention(*qkv.unbind(1), plan=plan)
    for got in (packed_attention_qkv(qkv, plan=plan), packed_attention_qkv(qkv, cumulative(lengths), 8)):
        assert torch.equal(got, want)
        assert torch.equal(*(torch.autograd.grad((x * weight).sum(), qkv, retain_graph=True)[0] for x in (got, want)))


def test_a_plan_replaces_the_boundaries():
    q, k, v = torch.randn(3, 5, 2, 16).unbind()
    plan = AttentionPlan.from_cu_seqlens(cumulative([2, 3]))
    assert torch.equal(plan.cu_seqlens_q, AttentionPlan.from_lengths([2, 3]).cu_seqlens_q)
    want = packed_attention(q, k, v, cumulative([2, 3]))
    assert torch.equal(packed_attention(q, k, v, plan=plan), want)
    assert torch.equal(flash_attn_varlen_func(q, k, v, cumulative([2, 3]), cumulative([2, 3]), 3, 3), want)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (lambda x: (x, x, x), "needs cu_seqlens_q or a plan"),
        (lambda x: (x[0], x, x, cumulative([5])), r"must be \(T, H, D\)"),
        (lambda x: (x, x, x[:4], cumulative([5])), r"must be \(T, H, D\)"),
        (lambda x: (x, x.half(), x, cumulative([5])), "share a dtype"),
        (lambda x: (x, x, x, cumulative([5]).long()), "must be int32"),
        (lambda x: (x, x, x, cumulative([4, 2])), "at most the 5 rows"),
        (lambda x: (x, x, x, cumulative([4, 1]), cumulative([5])), "2 query and 1 key sequences"),
    ],
)
def test_errors_name_what_was_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        packed_attention(*arguments(torch.zeros(5, 2, 16)))


def test_more_errors():
    x, bounds = torch.zeros(5, 2, 16), cumulative([5])
    with pytest.raises(ValueError, match="scale must be positive, got -1"):
        packed_attention(x, x, x, bounds, scale=-1)
    with pytest.raises(ValueError, match=r"qkv must be \(T, 3, H, D\)"):
        packed_attention_qkv(x, bounds)
    with pytest.raises(ValueError, match="a plan of one set of lengths"):
        packed_attention_qkv(x[:, None].expand(-1, 3, -1, -1), plan=AttentionPlan.from_lengths([5], [5]))
    with pytest.raises(NotImplementedError, match="dropout_p=0.1, causal=True, fewer heads in k"):
        flash_attn_varlen_func(x, x[:, :1], x[:, :1], bounds, bounds, 5, 5, 0.1, causal=True)
    with pytest.raises(ValueError, match="auto, reference, triton, .*, got 'cuda'"):
        backend.set_backend("cuda")
    assert backend.get_backend() == os.environ.get("AVFAST_BACKEND", "auto")


def test_double_backward_is_refused():
    x = torch.randn(5, 2, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(packed_attention(x, x, x, cumulative([5])).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device):
    bounds = cumulative([3, 0, 8]).to(device)
    x = torch.randn(3, 2, 13, 32, device=device)
    q, k, v = (x[i].transpose(0, 1)[..., :16].requires_grad_() for i in range(3))
    torch.library.opcheck(torch.ops.avfast.packed_attention.default, (q, k, v, bounds, None, [], 8, 0, 0.25))
    torch.library.opcheck(torch.ops.avfast.packed_attention.default, (q, k, v, bounds, bounds, [], 0, 0, 0.25))
    qkv = torch.randn(13, 2, 3, 16, device=device).transpose(1, 2).requires_grad_()
    torch.library.opcheck(torch.ops.avfast.packed_attention_qkv.default, (qkv, bounds, [], 8, 0.25))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("autocast", [None, *HALVES])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.bfloat16,) * 3, (torch.float32, *HALVES)])
def test_compiled_equals_eager_inside_and_outside_autocast(autocast, dtypes, device):
    if autocast is None and len(set(dtypes)) > 1:
        pytest.skip("mixed dtypes need autocast")
    plan = AttentionPlan.from_lengths([3, 6], device=device)
    inputs = [torch.randn(9, 2, 16, device=device).to(dtype).requires_grad_() for dtype in dtypes]

    def step(q, k, v):
        with torch.autocast(device, autocast, enabled=autocast is not None):
            return packed_attention(q, k, v, plan=plan)

    want, got = step(*inputs), torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    assert got.dtype == want.dtype == (autocast or dtypes[0])
    assert torch.equal(got, want)
    for a, b, x in zip(
        *(torch.autograd.grad(y.float().square().sum(), inputs) for y in (got, want)), inputs, strict=True
    ):
        assert a.dtype == b.dtype == x.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("maxima", [False, True])
def test_new_lengths_do_not_recompile(maxima):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(
        lambda q, k, v, bounds, most: packed_attention(q, k, v, bounds, max_seqlen_q=most),
        fullgraph=True,
        backend=counter,
    )
    generator = torch.Generator().manual_seed(0)
    for i in range(20):
        lengths = torch.randint(0, 12, (2 + i % 7,), generator=generator).add_(1).tolist()
        q, k, v = torch.randn(3, sum(lengths), 2, 16)
        most = max(lengths) if maxima else None
        want = packed_attention(q, k, v, cumulative(lengths))
        assert torch.equal(compiled(q, k, v, cumulative(lengths), most), want)
    assert counter.frame_count <= (3 if maxima else 2)


def test_new_plans_do_not_recompile():
    """Their work lists, one per length class, may hold nothing, one item or many."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda qkv, plan: packed_attention_qkv(qkv, plan=plan), fullgraph=True, backend=counter)
    for lengths in ([5], [70, 3], [300], [70, 80, 90, 3, 3], [300, 3], [300, 300, 300], [257, 65, 64], [1, 1, 1, 1]):
        plan = AttentionPlan.from_lengths(lengths)
        plan = replace(plan, work=_exact_work(plan.cu_seqlens_q, None))
        compiled(torch.zeros(sum(lengths), 3, 1, 16), plan)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops(device):
    q = torch.randn(12, 3, 16, device=device, requires_grad=True)
    k, v = torch.randn(2, 9, 3, 16, device=device)
    plan = AttentionPlan.from_lengths([5, 0, 7], [4, 2, 3], device=device)
    forward = 4 * (5 * 4 + 7 * 3) * 3 * 16
    assert flops.count(packed_attention, q, k, v, plan=plan) == forward
    assert flops.count(lambda: packed_attention(q, k, v, plan=plan).sum(), backward=True) == 3 * forward
    qkv, alone = q[:, None].expand(-1, 3, -1, -1), AttentionPlan.from_lengths([5, 7], device=device)
    total = flops.count(lambda: packed_attention_qkv(qkv, plan=alone).sum(), backward=True)
    assert total == 3 * 4 * (25 + 49) * 3 * 16
    with pytest.raises(ValueError, match="give a plan by AttentionPlan.from_lengths"):
        flops.count(packed_attention_qkv, qkv.to("meta"), torch.zeros(3, dtype=torch.int32, device="meta"))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 700)), max_size=8), st.booleans(), st.booleans())
def test_work_lists_hold_every_row_once_and_most_work_first(pairs, cross, exact):
    lengths_q = [n for n, _ in pairs]
    lengths_k = [m for _, m in pairs] if cross else lengths_q
    bounds_q, bounds_k = cumulative(lengths_q), cumulative(lengths_k) if cross else None
    if exact:
        lists = _exact_work(bounds_q, bounds_k)
    else:
        longest = [max(lengths, default=0) for lengths in (lengths_q, lengths_k)]
        lists = _bounded_work(sum(lengths_q), sum(lengths_k), bounds_q, bounds_k, *longest)
    sides = [(lengths_q, lengths_k), (lengths_k, lengths_q)] if cross else [(lengths_q, lengths_k)]
    assert len(lists) == 3 * len(sides)
    for side, (own, other) in enumerate(sides):
        own_bounds, other_bounds = cumulative(own).tolist(), cumulative(other).tolist()
        rows, found = [], []
        for (size, block), items in zip(ROWS.items(), lists[3 * side : 3 * side + 3], strict=True):
            used = [item for item in items.tolist() if any(item)]
            assert items[len(used) :].tolist() == [[0] * 4] * (len(items) - len(used))
            assert len(items) >= len(used) + SPARE if not exact else len(items) == len(used) + SPARE
            work = [end - begin for _, _, begin, end in used]
            assert work == sorted(work, reverse=True)
            for begin, end, other_begin, other_end in used:
                if end > begin:
                    s = own_bounds.index(end) - 1
                    assert (end, other_begin, other_end) == (own_bounds[s + 1], *other_bounds[s : s + 2])
                    fits = own[s] <= ROWS["tiny"] and other[s] <= ROWS["tiny"]
                    assert size == ("tiny" if fits else "short" if own[s] <= SHORT else "long")
                rows += range(begin, min(begin + block, end))
                found.append(size)
        assert sorted(rows) == list(range(sum(own)))
        # A tiny sequence has its item even without rows of its own, as one program may write both sides' gradients.
        assert found.count("tiny") == sum(0 < n + m and max(n, m) <= 64 for n, m in zip(own, other, strict=True))


# Kernels: on a GPU, and interpreted in a process of their own.

CASES = {
    "ragged": ([33, 0, 70, 1], None),
    "cross": ([3, 65, 0, 9], [40, 70, 8, 0]),
    "long queries": ([300], [20]),
    "long keys": ([20], [290]),
    "tails": ([65, 144, 100], [90, 16, 48]),
    "tiny": ([64, 0, 5], [9, 30, 0]),
    "nothing": ([], None),
}
SMALL = [
    (16, torch.float32, "ragged"),
    (64, torch.bfloat16, "ragged"),
    (48, torch.bfloat16, "tails"),
    (24, torch.float32, "tails"),
    (64, torch.bfloat16, "cross"),
    (80, torch.float16, "cross"),
    (80, torch.bfloat16, "tiny"),
    (16, torch.float16, "long queries"),
    (64, torch.bfloat16, "nothing"),
]
ALL = list(itertools.product((16, 32, 48, 64, 80, 128), (torch.float32, *HALVES), CASES))


def run_kernels(dim, dtype, case, device, heads):
    lengths_q, lengths_k = CASES[case]
    plan = AttentionPlan.from_lengths(lengths_q, lengths_k, device=device)
    lengths_k = lengths_q if lengths_k is None else lengths_k
    inputs, weight = draw(lengths_q, lengths_k, heads, dim, dtype, device, rest=3)
    got = outcome(lambda *x: packed_attention(*x, plan=plan), inputs, weight)
    assert_right(got, inputs, weight, lengths_q, lengths_k, dim**-0.5)
    return inputs, weight, plan, got


@pytest.mark.skipif(not INTERPRETED, reason="run by test_kernels_in_the_interpreter")
@pytest.mark.parametrize("dim, dtype, case", SMALL)
def test_interpreted_kernels(dim, dtype, case):
    run_kernels(dim, dtype, case, "cpu", 1)


@pytest.mark.skipif(not INTERPRETED, reason="run by test_kernels_in_the_interpreter")
def test_interpreted_kernels_on_packed_qkv():
    qkv, weight = torch.randn(20, 3, 2, 16), torch.randn(20, 2, 16)
    out, grad = outcome(lambda x: packed_attention_qkv(x, cumulative([11, 6])), [qkv], weight)
    backend.set_backend("reference")
    want, want_grad = outcome(lambda x: packed_attention_qkv(x, cumulative([11, 6])), [qkv], weight)
    backend.set_backend("triton")
    assert_close("out", out, want, 1e-5)
    assert_close("gradient", grad, want_grad, 1e-5)


@interpreter
@pytest.mark.skipif(not INTERPRETED, reason="run by test_kernels_in_the_interpreter")
@pytest.mark.parametrize("own, other", [(128, 32), (0, 0)])
def test_interpreted_other_backward_passes_of_tiny_sequences(own, other, monkeypatch):
    """One program for sequences of up to 128 rows, and the two kernels of longer ones."""
    from avfast.kernels import packed_attention as kernels

    monkeypatch.setitem(ROWS, "tiny", own or 64)
    with kernels.override("whole", "tiny", kernels.Tile(own, other, 8, 1) if own else None):
        run_kernels(16, torch.bfloat16, "tails" if own else "tiny", "cpu", 1)


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "interpreted", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "AVFAST_BACKEND": "triton"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:]
    assert f"{len(SMALL) + 3} passed" in result.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("dim, dtype, case", ALL)
def test_kernels(dim, dtype, case):
    inputs, weight, plan, got = run_kernels(dim, dtype, case, "cuda", 3)
    built = AttentionPlan.from_cu_seqlens(
        plan.cu_seqlens_q, plan.cu_seqlens_k, tokens_q=len(inputs[0]), tokens_k=len(inputs[1])
    )
    again = outcome(lambda *x: packed_attention(*x, plan=built), inputs, weight)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_backward_is_the_same_every_time(dtype):
    lengths = [49, 196, 392, 700, 1, 98] * 4
    inputs, weight = draw(lengths, lengths, 4, 64, dtype, "cuda", rest=5)
    plan = AttentionPlan.from_lengths(lengths, device="cuda")
    first = outcome(lambda *x: packed_attention(*x, plan=plan), inputs, weight)
    for _ in range(30):
        again = outcome(lambda *x: packed_attention(*x, plan=plan), inputs, weight)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_new_lengths_and_the_host_never_waits():
    old, new, rest = [100, 300, 20], [10, 150, 240], 20
    qkv = torch.randn(sum(old) + rest, 3, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bounds, weight = cumulative(old).cuda(), torch.randn(sum(old) + rest, 2, 64, device="cuda", dtype=torch.bfloat16)

    def step():
        out = packed_attention_qkv(qkv, bounds)
        return out, torch.autograd.grad((out * weight).sum(), qkv)[0]

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
    for lengths in (old, new):
        bounds.copy_(cumulative(lengths))
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            assert torch.equal(got, want)
        assert not captured[0][sum(lengths) :].any()
