"""Stand-ins for attention libraries, on the CPU: their public functions, a written-out softmax, and their bad habits.

Rows that no sequence reaches and rows without a counterpart hold NaN, in gradients too; empty problems, rows that
16-byte loads cannot take, wrong boundaries and wrong maxima are refused. `calls` lists what ran.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from avfast.ops import _attention_libraries as libraries

NAN = float("nan")


def _sequences(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int):
    """(rows of q, rows of k) of the sequences that have both."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape
    assert q.shape[0] and k.shape[0] and len(cu_q) > 1, "an empty problem crashes"
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
    assert cu_q[-1] == q.shape[0] and cu_k[-1] == k.shape[0]
    for i in range(len(cu_q) - 1):
        rows = slice(*cu_q[i : i + 2].tolist()), slice(*cu_k[i : i + 2].tolist())
        if all(r.stop > r.start for r in rows):
            yield rows


def forward(q, k, v, bounds, scale) -> tuple[Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for x in (q, k, v):
        assert x.stride(-1) == 1 and x.data_ptr() % 16 == 0, (x.shape, x.stride())
        assert all(s % 8 == 0 for s in x.stride()[:-1]), (x.shape, x.stride())
    out, lse = torch.full(q.shape, NAN, dtype=q.dtype), torch.full((q.shape[1], q.shape[0]), NAN)
    for a, b in _sequences(q, k, *bounds):
        x, y, z = (t.double().transpose(0, 1) for t in (q[a], k[b], v[b]))
        logits = scale * x @ y.mT
        out[a] = (logits.softmax(-1) @ z).transpose(0, 1).to(q.dtype)
        lse[:, a] = logits.logsumexp(-1).float()
    return out, lse


def backward(grad, q, k, v, out, lse, bounds, scale) -> list[Tensor]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dq, dk, dv = (torch.full(x.shape, NAN, dtype=x.dtype) for x in (q, k, v))
    for a, b in _sequences(q, k, *bounds):
        g, x, y, z, o = (t.double().transpose(0, 1) for t in (grad[a], q[a], k[b], v[b], out[a]))
        p = (scale * x @ y.mT - lse[:, a].double()[..., None]).exp()
        ds = scale * p * (g @ z.mT - (g * o).sum(-1, keepdim=True))
        for into, rows, value in ((dq, a, ds @ y), (dk, b, ds.mT @ x), (dv, b, p.mT @ g)):
            into[rows] = value.transpose(0, 1).to(into.dtype)
    return [dq, dk, dv]


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bounds, scale):
        out, lse = forward(q, k, v, bounds, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = bounds, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        return *backward(grad, *ctx.saved_tensors, *ctx.rest), None, None


class Aten:
    """CPU kernels for what PyTorch's varlen_attn calls; PyTorch's own schemas check the arguments."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls
        self.library = torch.library.Library("aten", "IMPL")
        for name in ("_flash_attention_forward", "_flash_attention_backward"):
            self.library.impl(name, getattr(self, name), "CPU")

    def _flash_attention_forward(self, q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, *debug, **rest):
        assert (dropout, causal) == (0.0, False)
        self.calls.append("varlen")
        out, lse = forward(q, k, v, (cu_q, cu_k, max_q, max_k), rest.get("scale"))
        return out, lse, *(torch.empty(0) for _ in range(3))

    def _flash_attention_backward(
        self, grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, *state, **rest
    ):
        assert (dropout, causal) == (0.0, False)
        return tuple(backward(grad, q, k, v, out, lse, (cu_q, cu_k, max_q, max_k), rest.get("scale")))


@dataclass
class BlockDiagonalMask:
    lengths_q: list[int]
    lengths_k: list[int]

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert device in (None, torch.device("cpu"))
        return cls(list(q_seqlen), list(q_seqlen if kv_seqlen is None else kv_seqlen))


def modules(calls: list[str]) -> dict[str, dict[str, Any]]:
    """What flash-attn 2.8, flash-attn-4 and xformers 0.0.35 export."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        calls.append("flash_attn" + " deterministic" * deterministic)
        return Attention.apply(q, k, v, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), softmax_scale)

    def flash_attn_4_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, softmax_scale=None, causal=False, deterministic=False, return_lse=False,
    ):  # fmt: skip
        calls.append("flash_attn_4" + " deterministic" * deterministic)
        bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return Attention.apply(q, k, v, bounds, softmax_scale), None

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        calls.append("xformers")
        assert isinstance(attn_bias, BlockDiagonalMask) and query.shape[0] == key.shape[0] == 1
        lengths = attn_bias.lengths_q, attn_bias.lengths_k
        cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0, dtype=torch.int32) for n in lengths)
        return Attention.apply(query[0], key[0], value[0], (cu_q, cu_k, *map(max, lengths)), scale)[None]

    return {
        "flash_attn": {"flash_attn_varlen_func": flash_attn_varlen_func},
        "flash_attn.cute": {"flash_attn_varlen_func": flash_attn_4_varlen_func},
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
        "xformers.ops.fmha": {},
        "xformers.ops.fmha.attn_bias": {"BlockDiagonalMask": BlockDiagonalMask},
    }


@contextmanager
def installed(monkeypatch: Any) -> Iterator[list[str]]:
    """All libraries, on the CPU, and PyTorch's choice of cuDNN for dense attention; yields which of them ran."""
    calls: list[str] = []
    for name, contents in modules(calls).items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)

    @contextmanager
    def sdpa_kernel(backends, set_priority=False):
        assert backends == torch.nn.attention.SDPBackend.CUDNN_ATTENTION
        calls.append("cudnn")
        yield

    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", sdpa_kernel)
    monkeypatch.setattr(libraries, "DEVICE", "cpu")
    aten = Aten(calls)
    yield calls
    aten.library._destroy()
