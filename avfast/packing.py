"""Ragged token sequences as one (T, D) tensor.

Masking at several ratios gives sequences of different lengths. They are stored one after another, without padding, as
FlashAttention's variable-length functions do, and the lengths are also known on the host, so that nothing has to ask
the device for a shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from avfast.tensors import to_device


def runs(lengths: Iterable[int]) -> list[tuple[int, int]]:
    """Consecutive equal lengths as ``(count, length)``: ``(5, 5, 3)`` gives ``[(2, 5), (1, 3)]``."""
    return [(len(list(group)), length) for length, group in groupby(lengths)]


def cumulative(lengths: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Sequence boundaries ``(S + 1,)`` int32, from 0 to the number of tokens."""
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
    return bounds if device is None else to_device(bounds, device)


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, permutation: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(permutation, inverse)
        return x.index_select(0, permutation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        permutation, inverse = ctx.saved_tensors
        return permute_rows(grad, inverse, permutation), None, None


def permute_rows(x: Tensor, permutation: Tensor, inverse: Tensor) -> Tensor:
    """``x[permutation]`` whose gradient is gathered as well, by the ``inverse`` permutation: deterministic."""
    return _PermuteRows.apply(x, permutation, inverse)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token_rows: Tensor) -> Tensor:
        ctx.save_for_backward(token_rows)
        ctx.count = x.shape[0]
        return x.index_select(0, token_rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (token_rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.count, *grad.shape[1:]).index_copy(0, token_rows, grad), None


def take_rows(x: Tensor, token_rows: Tensor) -> Tensor:
    """``x[token_rows]`` of distinct rows, whose gradient is therefore written and not added, which is deterministic."""
    return _TakeRows.apply(x, token_rows)


def other_rows(token_rows: Tensor, total: int) -> Tensor:
    """``(total - R,)`` int64, ascending: ``0 .. total - 1`` without R distinct ``token_rows``; no host waits."""
    free = torch.ones(total, dtype=torch.int8, device=token_rows.device).index_fill(0, token_rows, 0)
    return free.argsort(descending=True, stable=True)[: total - token_rows.shape[0]]


@dataclass(frozen=True)
class PackedTokens:
    """S token sequences stored one after another.

    Args:
        values: ``(T, ...)``, usually ``(T, D)``; the rows of sequence i are ``cu_seqlens[i]:cu_seqlens[i + 1]``.
        lengths: the S sequence lengths, on the host. Zero is allowed.

    Raises:
        ValueError: if the lengths do not add up to T, or one is negative.
    """

    values: Tensor
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(int(n) for n in self.lengths))
        if any(n < 0 for n in self.lengths):
            raise ValueError(f"lengths must not be negative, got {self.lengths}")
        if self.values.ndim < 1 or sum(self.lengths) != self.values.shape[0]:
            raise ValueError(
                f"lengths add up to {sum(self.lengths)} tokens, but values has shape {tuple(self.values.shape)}"
            )

    @property
    def cu_seqlens(self) -> Tensor:
        """Sequence boundaries ``(S + 1,)`` int32 on the device of ``values``."""
        return cumulative(self.lengths, self.values.device)

    def __len__(self) -> int:
        """Number of sequences S."""
        return len(self.lengths)

    def to_list(self) -> list[Tensor]:
        """The sequences as a list of ``(n_i, ...)`` views."""
        return list(self.values.split(list(self.lengths)))

    def select(self, chosen: Sequence[int]) -> PackedTokens:
        """The sequences with the given numbers, in that order."""
        if tuple(chosen) == tuple(range(len(self))):
            return self
        parts = self.to_list()
        return PackedTokens(torch.cat([parts[i] for i in chosen]), tuple(self.lengths[i] for i in chosen))

    def mean(self, dtype: torch.dtype | None = None) -> Tensor:
        """Mean of each sequence, ``(S, ...)``, in the dtype of ``values`` or a given one; an empty one gives zeros."""
        groups = runs(self.lengths)
        parts = self.values.split([count * length for count, length in groups])
        means = [
            part.unflatten(0, (count, length)).mean(1, dtype=dtype)
            if length
            else part.new_zeros(count, *part.shape[1:], dtype=dtype)
            for part, (count, length) in zip(parts, groups, strict=True)
        ]
        return torch.cat([self.values[:0].to(dtype or self.values.dtype), *means])
