from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from avfast.ops import AttentionPlan, packed_attention
from avfast.packing import cumulative


def naive(q, k, v, lengths_q, lengths_k, scale):
    """Softmax attention written out, one sequence and one head at a time."""
    out = torch.zeros_like(q)
    begin_q = begin_k = 0
    for n, m in zip(lengths_q, lengths_k, strict=True):
        for head in range(q.shape[1]):
            logits = scale * q[begin_q : begin_q + n, head] @ k[begin_k : begin_k + m, head].T
            if m:
                out[begin_q : begin_q + n, head] = logits.softmax(1) @ v[begin_k : begin_k + m, head]
        begin_q, begin_k = begin_q + n, begin_k + m
    return out


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=6), st.booleans(), st.integers(0, 3))
def test_forward_and_gradients_against_the_written_out_formula(pairs, cross, rest):
    lengths_q = [n for n, _ in pairs]
    lengths_k = [m for _, m in pairs] if cross else lengths_q
    generator = torch.Generator().manual_seed(len(pairs) + rest)
    q, k, v, weight = (
        torch.randn(sum(n) + rest, 2, 16, dtype=torch.float64, generator=generator)
        for n in (lengths_q, lengths_k, lengths_k, lengths_q)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    boundaries = [cumulative(lengths_q), cumulative(lengths_k) if cross else None]
    got = packed_attention(*inputs, *boundaries, scale=0.3)
    want = naive(*inputs, lengths_q, lengths_k, 0.3)
    assert_close("out", got, want, 1e-12)
    assert got[sum(lengths_q) :].abs().sum() == 0
    got_grads = torch.autograd.grad((got * weight).sum(), inputs)
    want_grads = torch.autograd.grad((want * weight).sum() + sum(x.sum() * 0 for x in inputs), inputs)
    for name, a, b in zip("qkv", got_grads, want_grads, strict=True):
        assert_close(f"d{name}", a, b, 1e-11, scale=1.0)


def test_a_plan_replaces_the_boundaries():
    q, k, v = torch.randn(3, 5, 2, 16).unbind()
    plan = AttentionPlan.build(cumulative([2, 3]))
    assert torch.equal(plan.cu_seqlens_q, AttentionPlan.of([2, 3]).cu_seqlens_q)
    assert torch.equal(packed_attention(q, k, v, plan=plan), packed_attention(q, k, v, cumulative([2, 3])))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (lambda x: (x, x, x), "needs cu_seqlens_q or a plan"),
        (lambda x: (x[0], x, x, cumulative([5])), r"must be \(T, H, D\)"),
        (lambda x: (x, x, x[:4], cumulative([5])), r"must be \(T, H, D\)"),
        (lambda x: (x, x, x, cumulative([4, 2])), "at most the 5 rows"),
        (lambda x: (x, x, x, cumulative([4, 1]), cumulative([5])), "2 query and 1 key sequences"),
    ],
)
def test_errors_name_what_was_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        packed_attention(*arguments(torch.zeros(5, 2, 16)))
