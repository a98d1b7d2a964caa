"""Stand-ins for attention libraries, on the CPU: their signatures, a written-out softmax, and their bad habits.

Rows that no sequence reaches and rows without a counterpart hold NaN; empty problems, rows that 16-byte loads cannot
take, wrong boundaries and wrong maxima are refused. `calls` lists which direction of which library ran.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

NAN = float("nan")


def _loadable(*tensors: Tensor) -> None:
    for x in tensors:
        assert x.stride(-1) == 1 and x.data_ptr() % 16 == 0, (x.shape, x.stride())
        assert all(s % 8 == 0 for s in x.stride()[:-1]), (x.shape, x.stride())


def _sequences(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int):
    """(rows of q, rows of k) of the sequences that have both."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape
    assert q.shape[0] and k.shape[0] and len(cu_q) > 1, "an empty problem crashes"
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
    assert cu_q[-1] <= q.shape[0] and cu_k[-1] <= k.shape[0]
    for i in range(len(cu_q) - 1):
        rows = slice(*cu_q[i : i + 2].tolist()), slice(*cu_k[i : i + 2].tolist())
        if all(r.stop > r.start for r in rows):
            yield rows


def varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k, scale) -> tuple[Tensor, Tensor]:
    _loadable(q, k, v)
    out, lse = torch.full_like(q, NAN), torch.full((q.shape[1], q.shape[0]), NAN)
    for a, b in _sequences(q, k, cu_q, cu_k, max_q, max_k):
        x, y, z = (t.double().transpose(0, 1) for t in (q[a], k[b], v[b]))
        logits = scale * x @ y.mT
        out[a] = (logits.softmax(-1) @ z).transpose(0, 1).to(q.dtype)
        lse[:, a] = logits.logsumexp(-1).float()
    return out, lse


def varlen_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale) -> list[Tensor]:
    _loadable(grad, q, k, v, out)
    assert lse.shape == (q.shape[1], q.shape[0]) and lse.is_contiguous() and lse.dtype == torch.float32
    dq, dk, dv = (torch.full(x.shape, NAN, dtype=x.dtype) for x in (q, k, v))
    for a, b in _sequences(q, k, cu_q, cu_k, max_q, max_k):
        g, x, y, z, o = (t.double().transpose(0, 1) for t in (grad[a], q[a], k[b], v[b], out[a]))
        p = (scale * x @ y.mT - lse[:, a].double()[..., None]).exp()
        ds = scale * p * (g @ z.mT - (g * o).sum(-1, keepdim=True))
        for into, rows, value in ((dq, a, ds @ y), (dk, b, ds.mT @ x), (dv, b, p.mT @ g)):
            into[rows] = value.transpose(0, 1).to(into.dtype)
    return [dq, dk, dv]


class Aten:
    """CPU kernels for the entry points that PyTorch has for CUDA only; its own schemas check the arguments."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.library = torch.library.Library("aten", "IMPL")
        for name in ("_flash_attention_forward", "_flash_attention_backward", "_scaled_dot_product_cudnn_attention"):
            self.library.impl(name, getattr(self, name), "CPU")
        name = "_scaled_dot_product_cudnn_attention_backward"
        self.library.impl(name, getattr(self, name), "CPU")

    def _flash_attention_forward(self, q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale):
        assert (dropout, causal, debug) == (0.0, False, False)
        self.calls.append("varlen forward")
        empty = torch.empty(0)
        return *varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k, scale), empty, empty, empty

    def _flash_attention_backward(
        self, grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, seed, unused, *, scale
    ):
        assert (dropout, causal) == (0.0, False)
        self.calls.append("varlen backward")
        return tuple(varlen_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale))

    def _scaled_dot_product_cudnn_attention(
        self, q, k, v, bias, with_lse, dropout=0.0, causal=False, debug=False, *, scale
    ):
        assert bias is None and with_lse and (dropout, causal, debug) == (0.0, False, False)
        self.calls.append("cudnn forward")
        count, n, m = q.shape[0], q.shape[2], k.shape[2]
        cu_q, cu_k = (torch.arange(count + 1, dtype=torch.int32) * x for x in (n, m))
        packed = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        out, lse = varlen_forward(*packed, cu_q, cu_k, n, m, scale)
        out = out.unflatten(0, (count, n)).transpose(1, 2)
        lse = lse.unflatten(1, (count, n)).transpose(0, 1).contiguous()[..., None]
        empty = torch.empty(0)
        return out, lse, empty, empty, n, m, empty, empty, empty

    def _scaled_dot_product_cudnn_attention_backward(
        self, grad, q, k, v, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, dropout, causal, *, scale
    ):
        assert bias is None and cu_q is None and cu_k is None and (dropout, causal) == (0.0, False)
        (count, heads, n, _), m = q.shape, k.shape[2]
        assert (max_q, max_k) == (n, m) and lse.shape == (count, heads, n, 1) and lse.is_contiguous()
        self.calls.append("cudnn backward")
        cu_q, cu_k = (torch.arange(count + 1, dtype=torch.int32) * x for x in (n, m))
        packed = (x.transpose(1, 2).flatten(0, 1) for x in (grad, q, k, v, out))
        lse = lse[..., 0].transpose(0, 1).flatten(1).contiguous()
        grads = varlen_backward(*packed, lse, cu_q, cu_k, n, m, scale)
        return tuple(x.unflatten(0, (count, -1)).transpose(1, 2) for x in grads)


def flash_attn_modules(calls: list[str]) -> dict[str, ModuleType]:
    """flash-attn 2.8's interface."""

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
        calls.append("flash_attn forward")
        out, lse = varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
        return out, lse, None, None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
        calls.append("flash_attn backward" + " deterministic" * deterministic)
        _loadable(dq, dk, dv)
        grads = varlen_backward(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale
        )
        for into, value in zip((dq, dk, dv), grads, strict=True):
            into.copy_(value)
        return softmax_lse

    interface = ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward = _flash_attn_varlen_forward
    interface._flash_attn_varlen_backward = _flash_attn_varlen_backward
    package = ModuleType("flash_attn")
    package.flash_attn_interface = interface
    return {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


@dataclass
class _SeqLenInfo:
    seqstart: Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]


@dataclass
class BlockDiagonalMask:
    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo
    _batch_sizes: Any = None


def xformers_modules(calls: list[str], padded_lse: bool = False) -> dict[str, ModuleType]:
    """xformers 0.0.35's interface; `padded_lse`: as its CUTLASS kernels return log-sum-exps."""

    def lengths(mask: BlockDiagonalMask) -> tuple:
        assert isinstance(mask, BlockDiagonalMask)
        a, b = mask.q_seqinfo, mask.k_seqinfo
        for info in (a, b):
            equal = len(set(info.seqstart.diff().tolist())) == 1
            assert (info.min_seqlen == info.max_seqlen) <= equal and info.seqstart_py[-1] == info.seqstart[-1]
        return a.seqstart, b.seqstart, a.max_seqlen, b.max_seqlen

    def memory_efficient_attention_forward_requires_grad(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        calls.append("xformers forward")
        out, lse = varlen_forward(query[0], key[0], value[0], *lengths(attn_bias), scale)
        return out[None], lse.unsqueeze(0).repeat(2, 1, 1) if padded_lse else lse[None]

    def memory_efficient_attention_backward(
        grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
    ):
        calls.append("xformers backward")
        tensors = (x[0] for x in (grad, query, key, value, output, lse))
        return tuple(x[None] for x in varlen_backward(*tensors, *lengths(attn_bias), scale))

    fmha = ModuleType("xformers.ops.fmha")
    fmha.attn_bias = SimpleNamespace(
        __name__="xformers.ops.fmha.attn_bias", _SeqLenInfo=_SeqLenInfo, BlockDiagonalMask=BlockDiagonalMask
    )
    fmha.memory_efficient_attention_forward_requires_grad = memory_efficient_attention_forward_requires_grad
    fmha.memory_efficient_attention_backward = memory_efficient_attention_backward
    return {"xformers": ModuleType("xformers"), "xformers.ops": ModuleType("xformers.ops"), "xformers.ops.fmha": fmha}


def install(monkeypatch: Any, modules: dict[str, ModuleType]) -> None:
    """Makes `import` find stand-ins, and avfast look again."""
    from avfast.ops import _attention_libraries as libraries

    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    libraries._flash_attn.cache_clear()
    libraries._xformers.cache_clear()
