"""Packed attention by other libraries, each taken whole: its public function, with its own autograd.

``AVFAST_BACKEND`` names one; where it cannot do a request, an error says why. ``auto`` takes none of them: that
changes when a GPU has shown where one is faster than our kernels. The contract is one function, ``(q, k, v, plan,
scale) -> out`` for the rows of the sequences alone; :func:`attend` adds what packed attention promises beyond it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from avfast.ops.packed_attention import AttentionPlan

HALVES = (torch.float16, torch.bfloat16)
DEVICE = "cuda"


@dataclass(frozen=True)
class Library:
    """A library and what it takes.

    Args:
        call: ``(q, k, v, plan, scale) -> out``, tensors ``(T, H, D)`` without rows past the last sequence.
        function: its public function, where it is imported from.
        install: its name for pip, empty where PyTorch carries it.
        deterministic: whether it does what ``torch.use_deterministic_algorithms`` asks for.
        equal_only: whether it takes sequences of one length only.
    """

    call: Callable[[Tensor, Tensor, Tensor, AttentionPlan, float], Tensor]
    function: str
    install: str = ""
    deterministic: bool = True
    equal_only: bool = False


def _bounds(plan: AttentionPlan) -> tuple[Tensor, Tensor, int, int]:
    """Boundaries and greatest lengths of queries and keys, in the order of every varlen function."""
    if plan.cu_seqlens_k is None:
        return plan.cu_seqlens_q, plan.cu_seqlens_q, plan.max_seqlen_q, plan.max_seqlen_q
    return plan.cu_seqlens_q, plan.cu_seqlens_k, plan.max_seqlen_q, plan.max_seqlen_k


def _varlen(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q, k, v, *_bounds(plan), scale=scale)
    assert isinstance(out, Tensor)  # it is a tuple only where log-sum-exps are asked for
    return out


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    deterministic = torch.are_deterministic_algorithms_enabled()
    return flash_attn_varlen_func(q, k, v, *_bounds(plan), softmax_scale=scale, deterministic=deterministic)


def _flash_attn_4(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    bounds = dict(zip(names, _bounds(plan), strict=True))
    deterministic = torch.are_deterministic_algorithms_enabled()
    return flash_attn_varlen_func(q, k, v, **bounds, softmax_scale=scale, deterministic=deterministic)[0]


def _xformers(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    assert plan.host is not None
    mask = BlockDiagonalMask.from_seqlens(plan.host.q, plan.host.k, device=q.device)
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask, scale=scale)[0]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """The packed rows of sequences of one length are a batch as they lie."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x.unflatten(0, (len(plan), -1)).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1)


LIBRARIES = {
    "varlen": Library(_varlen, "torch.nn.attention.varlen.varlen_attn"),
    "flash_attn": Library(_flash_attn, "flash_attn.flash_attn_varlen_func", "flash-attn"),
    "flash_attn_4": Library(_flash_attn_4, "flash_attn.cute.flash_attn_varlen_func", "--pre flash-attn-4"),
    "xformers": Library(_xformers, "xformers.ops.memory_efficient_attention", "xformers", deterministic=False),
    "cudnn": Library(_cudnn, "torch.nn.attention.sdpa_kernel", deterministic=False, equal_only=True),
}


def missing(name: str) -> str | None:
    """Why a library's function cannot be imported, None where it can."""
    library = LIBRARIES[name]
    module, _, function = library.function.rpartition(".")
    try:
        getattr(import_module(module), function)
    except (ImportError, OSError, AttributeError) as error:  # OSError: a broken binary
        return f"{library.function} cannot be imported (pip install {library.install or 'torch'}): {error}"
    return None


def refusal(name: str, q: Tensor, plan: AttentionPlan) -> str | None:
    """Why a library cannot do a request, None where it can."""
    library, host, head_dim = LIBRARIES[name], plan.host, q.shape[-1]
    if q.device.type != DEVICE:
        return f"it needs a CUDA device, got {q.device}"
    if q.dtype not in HALVES:
        return f"it takes float16 and bfloat16, got {q.dtype}"
    if head_dim % 8 or head_dim > 256:
        return f"it takes head dimensions of a multiple of 8 up to 256, got {head_dim}"
    if host is None or not host.total_q or not host.total_k:
        return "it needs lengths on the host, at least one query and key: give a plan by AttentionPlan.from_lengths"
    if torch.are_deterministic_algorithms_enabled() and not library.deterministic:
        return "it is not deterministic, and torch.use_deterministic_algorithms asks for that"
    if library.equal_only and not host.equal:
        return "it takes sequences of one length, got different ones"
    if library.equal_only and plan.max_seqlen_k == 1:
        return "it does not take sequences of one key"
    return None if torch.compiler.is_compiling() else missing(name)  # an import cannot be traced


def _readable(x: Tensor) -> Tensor:
    """With rows that 16-byte loads can take."""
    start = torch.compiler.is_compiling() or x.data_ptr() % 16 == 0  # addresses cannot be traced
    if start and x.stride(-1) == 1 and all(n and n % 8 == 0 for n in x.stride()[:-1]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _alone(own: Tensor, other: Tensor, rows: int) -> Tensor:
    """``(rows, 1, 1)`` bool: of sequences that have nothing on the other side."""
    return (other.diff() == 0).repeat_interleave(own.diff(), output_size=rows)[:, None, None]


def attend(name: str, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """``(Tq, H, D)``: packed attention by the library ``name``, with everything that ours promises.

    Raises:
        RuntimeError: when the library is missing or cannot do it.
        ValueError: when there are fewer rows than the plan holds.
    """
    reason = refusal(name, q, plan)
    host = plan.host
    if reason is not None or host is None:
        raise RuntimeError(f"AVFAST_BACKEND={name}: {reason}; AVFAST_BACKEND=auto picks what can")
    total, keys, rest = host.total_q, host.total_k, q.shape[0] - host.total_q
    if rest < 0 or k.shape[0] < keys:
        raise ValueError(f"the plan holds {total} queries and {keys} keys, got {q.shape[0]} and {k.shape[0]} rows")
    q, k, v = _readable(q[:total]), _readable(k[:keys]), _readable(v[:keys])
    if not host.one_sided:
        out = LIBRARIES[name].call(q, k, v, plan, scale)
    else:  # whatever the library leaves in rows without a counterpart, in gradients as well
        cu_q, cu_k, *_ = _bounds(plan)
        no_keys, no_queries = _alone(cu_q, cu_k, total), _alone(cu_k, cu_q, keys)
        q, k, v = q.masked_fill(no_keys, 0), k.masked_fill(no_queries, 0), v.masked_fill(no_queries, 0)
        out = LIBRARIES[name].call(q, k, v, plan, scale).masked_fill(no_keys, 0)
    return F.pad(out, (0, 0, 0, 0, 0, rest)) if rest else out
