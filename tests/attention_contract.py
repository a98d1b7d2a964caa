"""What packed attention has to compute, whoever computes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from helpers import assert_close, relative_error

HALVES = (torch.float16, torch.bfloat16)


def naive(q, k, v, lengths_q, lengths_k, scale):
    """Softmax attention written out, one sequence and one head at a time."""
    out = torch.zeros_like(q) + 0 * (q.sum() + k.sum() + v.sum())
    begin_q = begin_k = 0
    for n, m in zip(lengths_q, lengths_k, strict=True):
        for head in range(q.shape[1]):
            logits = scale * q[begin_q : begin_q + n, head] @ k[begin_k : begin_k + m, head].T
            if m:
                out[begin_q : begin_q + n, head] = logits.softmax(1) @ v[begin_k : begin_k + m, head]
        begin_q, begin_k = begin_q + n, begin_k + m
    return out


def plain(q, k, v, lengths_q, lengths_k, scale):
    """What PyTorch makes of it in the dtype given, sequence by sequence."""
    out = torch.zeros_like(q) + 0 * (q.sum() + k.sum() + v.sum())
    begin_q = begin_k = 0
    for n, m in zip(lengths_q, lengths_k, strict=True):
        if n and m:
            parts = q[begin_q : begin_q + n], k[begin_k : begin_k + m], v[begin_k : begin_k + m]
            one = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in parts), scale=scale)
            out[begin_q : begin_q + n] = one[0].transpose(0, 1)
        begin_q, begin_k = begin_q + n, begin_k + m
    return out


def outcome(attend, inputs, weight):
    """Output and gradients of q, k, v for a loss that is linear in the output."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs, materialize_grads=True)]


def draw(lengths_q, lengths_k, heads, dim, dtype, device="cpu", rest=0):
    """q, k, v as views of a packed tensor where the lengths allow it, and the weight of a loss."""
    if lengths_q == lengths_k:
        *inputs, weight = torch.randn(sum(lengths_q) + rest, 4, heads, dim, device=device).to(dtype).unbind(1)
    else:
        *inputs, weight = (
            torch.randn(sum(n) + rest, heads, dim, device=device).to(dtype)
            for n in (lengths_q, lengths_k, lengths_k, lengths_q)
        )
    return inputs, weight


def assert_right(got, inputs, weight, lengths_q, lengths_k, scale, tol=1e-5):
    """Against float64; in half precision an error of twice plain PyTorch's, or an RMS ratio of 0.005, is allowed."""
    inputs, weight = [x.detach().cpu() for x in inputs], weight.cpu()
    exact = outcome(lambda *x: naive(*x, lengths_q, lengths_k, scale), [x.double() for x in inputs], weight.double())
    usual = None
    if inputs[0].dtype in HALVES:
        usual = outcome(lambda *x: plain(*x, lengths_q, lengths_k, scale), inputs, weight)
    largest = max((x.abs().max().item() for x in exact[1:] if x.numel()), default=0.0)
    for i, (name, a, b) in enumerate(zip(("out", "dq", "dk", "dv"), got, exact, strict=True)):
        assert a.dtype == inputs[0].dtype
        allowed, a = tol, a.cpu()
        if usual is not None:
            allowed = 2 * relative_error(usual[i], b, largest if i else None)
            if (a.double() - b).norm() <= 0.005 * b.norm():
                continue
        assert_close(name, a, b, allowed, scale=largest if i else None)
    assert not any(x[sum(n) :].any() for x, n in zip(got, (lengths_q, lengths_q, lengths_k, lengths_k), strict=True))
