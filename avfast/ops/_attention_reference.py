"""The eager bodies of packed attention: sequences of equal shape make one dense batch, one attention call each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

Rows = slice | Tensor


@dataclass(frozen=True)
class Group:
    """``count`` sequences of ``length_q`` queries and ``length_k`` keys, neither 0, and the rows they occupy."""

    count: int
    length_q: int
    length_k: int
    rows_q: Rows
    rows_k: Rows

    def dense(self, x: Tensor, keys: bool = False) -> Tensor:
        """``(T, H, D) -> (count, H, length, D)``."""
        rows, length = (self.rows_k, self.length_k) if keys else (self.rows_q, self.length_q)
        return x[rows].unflatten(0, (self.count, length)).transpose(1, 2)

    def packed(self, x: Tensor) -> Tensor:
        """``(count, H, length, D) -> (count length, H, D)``."""
        return x.transpose(1, 2).flatten(0, 1)


def groups(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, rows_q: int, rows_k: int) -> list[Group]:
    """Sequences by shape. Reads the boundaries, which waits for a device other than the CPU.

    Raises:
        ValueError: when the boundaries do not fit each other or the numbers of rows.
    """
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for name, bounds, rows in (("cu_seqlens_q", bounds_q, rows_q), ("cu_seqlens_k", bounds_k, rows_k)):
        falls = any(b < a for a, b in zip(bounds, bounds[1:], strict=False))
        if not bounds or bounds[0] != 0 or falls or bounds[-1] > rows:
            raise ValueError(f"{name} must rise from 0 to at most the {rows} rows it bounds, got {bounds}")
    shapes: dict[tuple[int, int], list[int]] = {}
    for i in range(len(bounds_q) - 1):
        n, m = bounds_q[i + 1] - bounds_q[i], bounds_k[i + 1] - bounds_k[i]
        if n and m:
            shapes.setdefault((n, m), []).append(i)
    device = cu_seqlens_q.device
    return [
        Group(len(members), n, m, _rows(bounds_q, members, n, device), _rows(bounds_k, members, m, device))
        for (n, m), members in shapes.items()
    ]


def _rows(bounds: list[int], members: list[int], length: int, device: torch.device) -> Rows:
    starts = [bounds[i] for i in members]
    if starts[-1] - starts[0] == (len(starts) - 1) * length:
        return slice(starts[0], starts[-1] + length)
    return (torch.tensor(starts, device=device)[:, None] + torch.arange(length, device=device)).flatten()


def _cover(found: list[Group], rows: int, keys: bool = False) -> bool:
    return sum(group.count * (group.length_k if keys else group.length_q) for group in found) == rows


@cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix units for a half-precision dtype. Without them float32 is several times faster."""
    names = {
        torch.bfloat16: ("_is_amx_tile_supported", "_is_avx512_bf16_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
    }
    return any(getattr(torch.cpu, name, lambda: False)() for name in names.get(dtype, ()))


def working_dtype(x: Tensor) -> torch.dtype:
    """What attention on ``x`` is computed in: half precision only where the CPU has matrix units for it."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and not (x.device.type == "cpu" and _multiplies(x.dtype)) else x.dtype


def _prepared(*tensors: Tensor) -> list[Tensor]:
    dtype = working_dtype(tensors[0])
    return [x.to(dtype) if x.stride(-1) == 1 else x.to(dtype).contiguous() for x in tensors]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the log-sum-exp: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output ``(Tq, H, D)`` and natural log-sum-exp ``(H, Tq)``; 0 and -inf in rows without keys."""
    found = groups(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=statistics_dtype(q.dtype), device=q.device)
    if not _cover(found, q.shape[0]):
        out.zero_()
        lse.fill_(float("-inf"))
    q, k, v = _prepared(q, k, v)
    dense = _flash_forward if q.device.type == "cpu" else _plain_forward
    for group in found:
        part, part_lse = dense(group.dense(q), group.dense(k, True), group.dense(v, True), scale)
        out[group.rows_q] = group.packed(part).to(out.dtype)
        part_lse = part_lse.transpose(0, 1)
        if isinstance(group.rows_q, slice):
            lse[:, group.rows_q].view(part_lse.shape).copy_(part_lse)
        else:
            lse[:, group.rows_q] = part_lse.flatten(1)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    scale: float, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Writes the gradients, zeros included, into ``dq``, ``dk`` and ``dv``, which may be strided views."""
    found = groups(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0])
    for x, keys in ((dq, False), (dk, True), (dv, True)):
        if not _cover(found, x.shape[0], keys):
            x.zero_()
    grad, q, k, v, out = _prepared(grad, q, k, v, out)
    dense = _flash_backward if q.device.type == "cpu" else _plain_backward
    for group in found:
        part_lse = lse[:, group.rows_q].unflatten(1, (group.count, group.length_q)).transpose(0, 1).contiguous()
        grads = dense(
            group.dense(grad), group.dense(q), group.dense(k, True), group.dense(v, True), group.dense(out), part_lse,
            scale,
        )  # fmt: skip
        for x, part, rows in zip((dq, dk, dv), grads, (group.rows_q, group.rows_k, group.rows_k), strict=True):
            x[rows] = group.packed(part).to(x.dtype)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return op(grad, q, k, v, out, lse, 0.0, False, scale=scale)


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    logits = (q @ k.mT) * scale
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp() @ v, lse


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    p = ((q @ k.mT) * scale - lse[..., None]).exp()
    delta = (grad * out).sum(-1, keepdim=True)
    ds = p * (grad @ v.mT - delta) * scale
    return ds @ k, ds.mT @ q, p.mT @ grad
