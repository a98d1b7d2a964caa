"""The collectives that a step over a global batch needs. In a single process they do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_alone = False


def world_size() -> int:
    """Number of processes, 1 where torch.distributed is not initialised or within :func:`alone`."""
    if _alone:
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process calls a model without the others, such as a copy on ``meta``."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def all_sum(x: Tensor) -> Tensor:
    """Sum of a tensor without gradient over all processes, the same on each."""
    if world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_sum(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_sum(grad)


def all_sum_with_gradient(x: Tensor) -> Tensor:
    """:func:`all_sum`, through which the gradient of each summand is the sum of all processes' gradients."""
    return x if world_size() == 1 else _AllSum.apply(x)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: tuple[int, ...]) -> Tensor:
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        ctx.counts = counts
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.split(list(ctx.counts))[dist.get_rank()], None


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """The rows of all processes in rank order, and where this process's own begin.

    The processes tell each other n over the host where their group can (gloo, as the training loop starts it), so that
    none waits for its device in the middle of a step.

    Args:
        rows: ``(n, ...)``; n may differ between processes and may be 0.

    Returns:
        ``(sum of n, ...)`` and an offset. The gradient of each row is summed over processes and returned to its owner.
    """
    if world_size() == 1:
        return rows, 0
    on_host = "cpu" in dist.get_backend_config()
    counts = torch.zeros(world_size(), dtype=torch.int64, device="cpu" if on_host else rows.device)
    counts[dist.get_rank()] = rows.shape[0]
    sizes = tuple(all_sum(counts).tolist())
    return _GatherRows.apply(rows, sizes), sum(sizes[: dist.get_rank()])
