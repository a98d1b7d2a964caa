"""Attention within each sequence of a packed batch.

For every sequence s with queries Q_s, keys K_s and values V_s:  O_s = softmax(scale Q_s K_s^T) V_s. No sequence sees
another, nothing is causal, no padding is computed. Empty sequences are legal; rows past the last sequence and queries
of a sequence without keys give zeros, in outputs and gradients.

Operators: ``avfast::packed_attention`` and ``avfast::packed_attention_qkv`` (one packed ``(T, 3, H, D)`` input whose
gradient is written in place of a stack), each with its ``_backward``. The eager bodies run anywhere and group sequences
of equal length; on CUDA devices Triton kernels run, deterministic in both directions. A library that ``AVFAST_BACKEND``
names takes the place of the operators, with its own autograd (:mod:`avfast.ops._attention_libraries`). On the CPU
sequences of which a plan says that all are equally long are a dense batch for one call of PyTorch's own attention: it
costs the host less than an operator. ``torch.func`` transforms do not go through custom operators, and there is no
second derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avfast import backend
from avfast.kernels.work_lists import blocks_per_sequence, most_items, work_lists
from avfast.ops import _attention_libraries as libraries
from avfast.ops import _attention_reference as reference
from avfast.ops._shared import autocast_dtype, logit_scale, register_autograd, without_autocast


@dataclass(frozen=True, eq=False)
class HostLengths:
    """What the host knows of a plan's sequences.

    Args:
        q: queries per sequence.
        k: keys per sequence.
        total_q: sum of the queries.
        total_k: sum of the keys.
        equal: whether all sequences have as many queries, and as many keys, as the others.
        one_sided: whether a sequence has queries and no keys, or keys and no queries.
    """

    q: tuple[int, ...]
    k: tuple[int, ...]
    total_q: int
    total_k: int
    equal: bool
    one_sided: bool

    @classmethod
    def of(cls, q: Sequence[int], k: Sequence[int]) -> HostLengths:
        """Of as many queries as keys sequences."""
        one_sided = q is not k and any((n == 0) != (m == 0) for n, m in zip(q, k, strict=True))
        return cls(tuple(q), tuple(k), sum(q), sum(k), len(set(q)) == len(set(k)) == 1, one_sided)


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """What depends on lengths only; built once per step and shared by all layers.

    Args:
        cu_seqlens_q: ``(S + 1,)`` int32 boundaries of the queries' sequences.
        cu_seqlens_k: the same for keys and values; None in self-attention.
        work: int32 lists of what the kernels' programs do, see :func:`avfast.kernels.work_lists.work_lists`; empty
            where none run.
        max_seqlen_q: no sequence has more queries; 0 when unknown.
        max_seqlen_k: likewise for keys.
        host: the lengths themselves; None when only the device knows.
        runs: those of an exported program, see :meth:`from_runs`.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor | None = None
    work: list[Tensor] = field(default_factory=list)
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    host: HostLengths | None = None
    runs: tuple[tuple[int, int, int], ...] | None = None

    @classmethod
    def from_lengths(
        cls,
        lengths_q: Sequence[int],
        lengths_k: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> AttentionPlan:
        """From lengths that are known on the host.

        Args:
            lengths_q: queries per sequence.
            lengths_k: keys per sequence, default ``lengths_q``.
            device: of the tokens, default the CPU. For ``meta`` the plan stays there, so that FLOPs can be counted.
        """
        cu_seqlens_k = None if lengths_k is None else _boundaries(lengths_k)
        plan = cls(
            _boundaries(lengths_q), cu_seqlens_k, [], max(lengths_q, default=0), max(lengths_k or (), default=0)
        )  # fmt: skip
        plan.check()
        plan = replace(plan, host=HostLengths.of(lengths_q, lengths_q if lengths_k is None else lengths_k))
        return plan if device is None else plan.to(device)

    @classmethod
    def from_runs(
        cls, runs: Sequence[tuple[int, int]], context: int = 0, device: torch.device | str | None = None
    ) -> AttentionPlan:
        """For a program that is exported, whose number of sequences the host does not know, only that they are equal.

        Args:
            runs: ``(count, length)`` of consecutive sequences; the counts may be symbols.
            context: further keys in front of those of each sequence.
            device: of the tokens.
        """
        whole = [(count, n, context + n) for count, n in runs]
        q, k = (
            torch.cat([torch.full((run[0],), run[i], dtype=torch.int32, device=device) for run in whole]).cumsum(
                0, dtype=torch.int32
            )
            for i in (1, 2)
        )
        q, k = F.pad(q, (1, 0)), F.pad(k, (1, 0))
        longest = max(n for _, n in runs)
        return cls(q, k if context else None, [], longest, context + longest if context else 0, runs=tuple(whole))

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor | None = None,
        *,
        tokens_q: int | None = None,
        tokens_k: int | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> AttentionPlan:
        """From sequence boundaries ``(S + 1,)``, without reading them: no host synchronisation, CUDA graphs capture it.

        Args:
            cu_seqlens_q: boundaries of the queries' sequences.
            cu_seqlens_k: the same for keys and values, default ``cu_seqlens_q``.
            tokens_q: rows of q. On a CUDA device each call builds the kernels' work lists anew unless it is given here.
            tokens_k: rows of k, where there is ``cu_seqlens_k``.
            max_seqlen_q: no sequence has more queries; saves a launch when at most 256.
            max_seqlen_k: likewise for keys, where there is ``cu_seqlens_k``.
        """
        plan = cls(cu_seqlens_q, cu_seqlens_k, [], max_seqlen_q or 0, max_seqlen_k or 0)
        plan.check()
        if tokens_q is None or not cu_seqlens_q.is_cuda:
            return plan
        work = _bounded_work(
            tokens_q, tokens_q if tokens_k is None else tokens_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q or 0,
            max_seqlen_k or 0,
        )  # fmt: skip
        return replace(plan, work=work)

    def check(self) -> None:
        """Raises ValueError when dtypes or shapes are not those of boundaries."""
        for name, x in (("cu_seqlens_q", self.cu_seqlens_q), ("cu_seqlens_k", self.cu_seqlens_k)):
            if x is not None and (x.ndim != 1 or x.shape[0] == 0 or x.dtype != torch.int32):
                raise ValueError(f"{name} must be int32 of shape (S + 1,), got {x.dtype} {tuple(x.shape)}")
        if self.cu_seqlens_k is not None and self.cu_seqlens_q.shape != self.cu_seqlens_k.shape:
            raise ValueError(
                f"{len(self)} query and {self.cu_seqlens_k.shape[0] - 1} key sequences do not fit each other"
            )

    def __len__(self) -> int:
        """Sequences."""
        return self.cu_seqlens_q.shape[0] - 1

    def to(self, device: torch.device | str) -> AttentionPlan:
        """On another device, with work lists where kernels use them."""
        device = torch.device(device)
        if device.type == "meta" or device.type == self.cu_seqlens_q.device.type == "cpu":
            return self
        q, k, work = self.cu_seqlens_q, self.cu_seqlens_k, self.work
        if not work and device.type == "cuda" and q.device.type == "cpu":
            work = _exact_work(q, k)
        return replace(
            self,
            cu_seqlens_q=q.to(device, non_blocking=True),
            cu_seqlens_k=None if k is None else k.to(device, non_blocking=True),
            work=list(torch.cat(work).to(device, non_blocking=True).split([len(x) for x in work])) if work else [],
        )


def _boundaries(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)


def _exact_work(cu_q: Tensor, cu_k: Tensor | None) -> list[Tensor]:
    """Work lists without an unused item, from boundaries on the host."""
    q, k = cu_q.diff(), (cu_q if cu_k is None else cu_k).diff()
    sides = [(q, k)] if cu_k is None else [(q, k), (k, q)]
    return work_lists(cu_q, cu_k, [blocks_per_sequence(own, other).sum(1).tolist() for own, other in sides])


def _bounded_work(
    tokens_q: int, tokens_k: int, cu_q: Tensor, cu_k: Tensor | None, max_q: int, max_k: int
) -> list[Tensor]:
    """Work lists from boundaries that nobody reads, as long as they may have to be."""
    sequences = len(cu_q) - 1
    if cu_k is None:
        return work_lists(cu_q, None, [most_items(tokens_q, sequences, max_q, max_q)])
    counts = [most_items(tokens_q, sequences, max_q, max_k), most_items(tokens_k, sequences, max_k, max_q)]
    return work_lists(cu_q, cu_k, counts)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None, work: list[Tensor], max_q: int, max_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with without_autocast(q):
        if not backend.use_kernels("packed_attention", q):
            return reference.forward(q, k, v, cu_q, cu_q if cu_k is None else cu_k, scale)
        from avfast.kernels import packed_attention as kernels

        out, lse = _like_outputs(q)
        work = work or _bounded_work(len(q), len(k), cu_q, cu_k, max_q, max_k)
        kernels.forward(q, k, v, cu_q[-1:], work[:3], scale, out, lse)
        return out, lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor | None,
    work: list[Tensor], max_q: int, max_k: int, scale: float, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    with without_autocast(q):
        if not backend.use_kernels("packed_attention", q):
            reference.backward(grad, q, k, v, out, lse, cu_q, cu_q if cu_k is None else cu_k, scale, dq, dk, dv)
            return
        from avfast.kernels import packed_attention as kernels

        work = work or _bounded_work(len(q), len(k), cu_q, cu_k, max_q, max_k)
        end_k = (cu_q if cu_k is None else cu_k)[-1:]
        kernels.backward(grad, q, k, v, out, lse, cu_q[-1:], end_k, work[:3], work[-3:], scale, dq, dk, dv)


def _like_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.empty(q.shape[1], q.shape[0], dtype=reference.statistics_dtype(q.dtype), device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("avfast::packed_attention", mutates_args=())
def _op(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, work: list[Tensor],
    max_seqlen_q: int, max_seqlen_k: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, work, max_seqlen_q, max_seqlen_k, scale)


@torch.library.custom_op("avfast::packed_attention_backward", mutates_args=())
def _op_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None, work: list[Tensor], max_seqlen_q: int, max_seqlen_k: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = _empty(q), _empty(k), _empty(v)
    _backward(
        grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, work, max_seqlen_q, max_seqlen_k, scale, dq, dk, dv
    )  # fmt: skip
    return dq, dk, dv


@torch.library.custom_op("avfast::packed_attention_qkv", mutates_args=())
def _op_qkv(
    qkv: Tensor, cu_seqlens: Tensor, work: list[Tensor], max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(1)
    return _forward(q, k, v, cu_seqlens, None, work, max_seqlen, 0, scale)


@torch.library.custom_op("avfast::packed_attention_qkv_backward", mutates_args=())
def _op_qkv_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, work: list[Tensor], max_seqlen: int,
    scale: float,
) -> Tensor:  # fmt: skip
    gradient = _empty(qkv)
    q, k, v = qkv.unbind(1)
    dq, dk, dv = gradient.unbind(1)
    _backward(grad, q, k, v, out, lse, cu_seqlens, None, work, max_seqlen, 0, scale, dq, dk, dv)
    return gradient


@_op.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _like_outputs(q)


@_op_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q), _empty(k), _empty(v)


@_op_qkv.register_fake
def _(qkv: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _like_outputs(qkv[:, 0])


@_op_qkv_backward.register_fake
def _(grad: Tensor, qkv: Tensor, *args: Any) -> Tensor:
    return _empty(qkv)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.first = next(i for i, x in enumerate(inputs) if isinstance(x, list | tuple))
    ctx.numbers = inputs[ctx.first + 1 :]
    ctx.save_for_backward(*inputs[: ctx.first], *output, *inputs[ctx.first])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple:
    saved = ctx.saved_tensors  # activation checkpointing lets each be read once
    inputs, (out, lse, *work) = saved[: ctx.first], saved[ctx.first :]
    nothing = (*(None for _ in inputs), [None] * len(work), *(None for _ in ctx.numbers))
    if grad is None:
        return nothing
    if len(inputs) == 2:
        qkv, cu_seqlens = inputs
        return (_op_qkv_backward(grad, qkv, out, lse, cu_seqlens, work, *ctx.numbers), *nothing[1:])
    q, k, v, cu_seqlens_q, cu_seqlens_k = inputs
    grads = _op_backward(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, work, *ctx.numbers)
    return (*grads, *nothing[3:])


register_autograd("packed_attention", _op, _op_backward, _differentiate, _save)
register_autograd("packed_attention", _op_qkv, _op_qkv_backward, _differentiate, _save)


def _plan(
    plan: AttentionPlan | None, q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int | None,
    max_k: int | None,
) -> AttentionPlan:  # fmt: skip
    if plan is None:
        if cu_q is None:
            raise ValueError("packed_attention needs cu_seqlens_q or a plan")
        return AttentionPlan.from_cu_seqlens(
            cu_q, cu_k, tokens_q=q.shape[0], tokens_k=k.shape[0], max_seqlen_q=max_q, max_seqlen_k=max_k
        )
    return plan if plan.cu_seqlens_q.device == q.device else plan.to(q.device)


def _alternative(q: Tensor, k: Tensor, plan: AttentionPlan, scale: float) -> Callable[..., Tensor] | None:
    """What takes the operator's place on (q, k, v): the library that is named, or on the CPU PyTorch's own attention
    where packed tokens are a dense batch."""
    library = backend.get_backend()
    if library in backend.ATTENTION_LIBRARIES:
        return partial(libraries.attend, library, plan=plan, scale=scale)
    if plan.runs is not None and backend.inlined(q):
        return partial(_by_runs, runs=plan.runs, scale=scale)
    host = plan.host
    if q.device.type != "cpu" or torch.compiler.is_compiling() or host is None or not host.equal:
        return None  # a compiled step reads no length of the host, so that one serves all
    if not 0 < host.total_q == q.shape[0] or not 0 < host.total_k == k.shape[0]:
        return None
    if backend.use_kernels("packed_attention", q):
        return None
    return partial(_dense, sequences=len(plan), scale=scale)


def _dense(q: Tensor, k: Tensor, v: Tensor, sequences: int, scale: float) -> Tensor:
    dtype = reference.working_dtype(q)
    if dtype != q.dtype:
        with without_autocast(q):
            return _dense(q.to(dtype), k.to(dtype), v.to(dtype), sequences, scale).to(q.dtype)
    q, k, v = (x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1)


def _by_runs(q: Tensor, k: Tensor, v: Tensor, runs: Sequence[tuple[int, int, int]], scale: float) -> Tensor:
    rows = [count * n for count, n, _ in runs], [count * m for count, _, m in runs]
    parts = zip(runs, q.split(rows[0]), k.split(rows[1]), v.split(rows[1]), strict=True)
    read = [
        _dense(part, keys, values, count, scale) if n and m else torch.zeros_like(part)
        for (count, n, m), part, keys, values in parts
    ]
    return read[0] if len(read) == 1 else torch.cat(read)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    scale: float | None = None,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Attention within each packed sequence.

    Args:
        q: ``(Tq, H, D)`` queries, of any strides; in float32, float16, bfloat16, float64. Under autocast they are cast
            as matrix products are. The kernels take D up to 128, fastest where a multiple of 16, in all but float64;
            the rest runs in PyTorch's own operations.
        k: ``(Tk, H, D)`` keys.
        v: ``(Tk, H, D)`` values.
        cu_seqlens_q: ``(S + 1,)`` int32 boundaries of the queries' sequences, rising from 0. On a CUDA device nobody
            reads them on the host, so their values are not checked.
        cu_seqlens_k: the same for keys and values, default ``cu_seqlens_q``.
        max_seqlen_q: no sequence has more queries; not needed, saves a launch when at most 256.
        max_seqlen_k: likewise for keys.
        scale: positive factor of the logits, default ``D ** -0.5``.
        plan: takes the place of boundaries and maxima, and saves making work lists in each layer.

    Returns:
        ``(Tq, H, D)``. Rows past the last sequence are zeros; queries of a sequence without keys give zeros.

    Raises:
        ValueError: on shapes, dtypes or boundaries that do not fit, or when neither boundaries nor plan are given.
    """
    if q.ndim != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        raise ValueError(f"q, k, v must be (T, H, D), got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    q, k, v = (x.to(autocast_dtype(x)) for x in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    p = _plan(plan, q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    scale = logit_scale(scale, q.shape[-1])
    run = _alternative(q, k, p, scale)
    if run is not None:
        return run(q, k, v)
    return _op(q, k, v, p.cu_seqlens_q, p.cu_seqlens_k, p.work, p.max_seqlen_q, p.max_seqlen_k, scale)[0]


def packed_attention_qkv(
    qkv: Tensor,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    scale: float | None = None,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Self-attention from one packed tensor, read in place; its gradient is one tensor as well.

    Args:
        qkv: ``(T, 3, H, D)``: queries, keys, values.
        cu_seqlens: ``(S + 1,)`` int32 boundaries.
        max_seqlen: no sequence is longer.
        scale: as in :func:`packed_attention`.
        plan: as in :func:`packed_attention`, with equal queries and keys.

    Returns:
        ``(T, H, D)``.
    """
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be (T, 3, H, D), got {tuple(qkv.shape)}")
    if plan is not None and plan.cu_seqlens_k is not None:
        raise ValueError("packed_attention_qkv needs a plan of one set of lengths, got one with lengths_k")
    qkv = qkv.to(autocast_dtype(qkv))
    p = _plan(plan, qkv, qkv, cu_seqlens, None, max_seqlen, None)
    scale = logit_scale(scale, qkv.shape[-1])
    run = _alternative(qkv, qkv, p, scale)
    if run is not None:
        return run(*qkv.unbind(1))
    return _op_qkv(qkv, p.cu_seqlens_q, p.work, p.max_seqlen_q, scale)[0]
