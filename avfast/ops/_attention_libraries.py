"""Packed attention by other people's kernels, for the shapes where they were measured to be faster than ours.

Each library is one small adapter under the contract of :mod:`avfast.ops._attention_reference`: it returns the output
``(Tq, H, D)`` and the natural log-sum-exp ``(H, Tq)``, so the forward pass of one and the backward pass of another fit
together. :func:`forward` and :func:`backward` see to what the libraries leave open: rows past the last sequence,
queries without keys, keys without queries, strides that their loads cannot take.

They run where ``AVFAST_BACKEND`` names them, which ends in an error where they cannot, and under ``auto`` where
:data:`TABLE` has a row. **The table is empty, nothing has been measured on a GPU yet**, so ``auto`` means ours.
It never leaves ours when deterministic algorithms are asked for, in float32 and float64, or when only the device knows
the lengths (a plan that is not from :meth:`AttentionPlan.of`).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from avfast import backend

HALVES = (torch.float16, torch.bfloat16)
DEVICE = "cuda"


class Lengths(NamedTuple):
    """Boundaries of the sequences, their greatest lengths and their sums; the sums are 0 when only the device knows."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    total_q: int
    total_k: int
    cross: bool

    @classmethod
    def of(
        cls, cu_q: Tensor, cu_k: Tensor | None, max_q: int, max_k: int, total_q: int, total_k: int
    ) -> Lengths:  # fmt: skip
        """Without ``cu_k`` the keys' numbers are the queries'."""
        if cu_k is None:
            return cls(cu_q, cu_q, max_q, max_q, total_q, total_q, False)
        return cls(cu_q, cu_k, max_q, max_k, total_q, total_k, True)

    @property
    def sequences(self) -> int:
        """How many."""
        return self.cu_q.shape[0] - 1

    @property
    def known(self) -> bool:
        """On the host, and there is something to do."""
        return min(self.max_q, self.max_k, self.total_q, self.total_k) > 0

    @property
    def equal(self) -> bool:
        """No sequence is longer than the longest, so the sums are reached only when none is shorter."""
        return self.total_q == self.sequences * self.max_q and self.total_k == self.sequences * self.max_k


class Varlen:
    """What ``torch.nn.attention.varlen.varlen_attn`` calls: the FlashAttention 2 that PyTorch carries."""

    max_head_dim: ClassVar[int] = 256
    deterministic: ClassVar[bool] = True  # it obeys torch.use_deterministic_algorithms
    equal_only: ClassVar[bool] = False

    def problem(self) -> str | None:
        """Why it cannot be called here."""
        if not torch.backends.cuda.is_flash_attention_available():
            return "this PyTorch was built without FlashAttention"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, n: Lengths, scale: float) -> tuple[Tensor, Tensor]:
        op = torch.ops.aten._flash_attention_forward
        return op(q, k, v, n.cu_q, n.cu_k, n.max_q, n.max_k, 0.0, False, False, scale=scale)[:2]

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, n: Lengths, scale: float,
        into: Sequence[Tensor],
    ) -> None:  # fmt: skip
        op = torch.ops.aten._flash_attention_backward
        state = _no_dropout_state(q)
        _copy(
            op(grad, q, k, v, out, lse, n.cu_q, n.cu_k, n.max_q, n.max_k, 0.0, False, state, state, scale=scale), into
        )


class FlashAttn:
    """flash-attn 2.7 or later (``pip install flash-attn``); its backward pass writes into our gradients."""

    max_head_dim: ClassVar[int] = 256
    deterministic: ClassVar[bool] = True
    equal_only: ClassVar[bool] = False

    def problem(self) -> str | None:
        found = _flash_attn()
        return found if isinstance(found, str) else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, n: Lengths, scale: float) -> tuple[Tensor, Tensor]:
        return _flash_attn()._flash_attn_varlen_forward(
            q=q, k=k, v=v, cu_seqlens_q=n.cu_q, cu_seqlens_k=n.cu_k, max_seqlen_q=n.max_q, max_seqlen_k=n.max_k,
            dropout_p=0.0, softmax_scale=scale, causal=False,
        )[:2]  # fmt: skip

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, n: Lengths, scale: float,
        into: Sequence[Tensor],
    ) -> None:  # fmt: skip
        dq, dk, dv = into
        _flash_attn()._flash_attn_varlen_backward(
            dout=grad, q=q, k=k, v=v, out=out, softmax_lse=lse, dq=dq, dk=dk, dv=dv, cu_seqlens_q=n.cu_q,
            cu_seqlens_k=n.cu_k, max_seqlen_q=n.max_q, max_seqlen_k=n.max_k, dropout_p=0.0, softmax_scale=scale,
            causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip


class Xformers:
    """xformers' ``memory_efficient_attention`` under a block-diagonal mask (``pip install xformers``)."""

    max_head_dim: ClassVar[int] = 256
    deterministic: ClassVar[bool] = False
    equal_only: ClassVar[bool] = False

    def problem(self) -> str | None:
        found = _xformers()
        return found if isinstance(found, str) else None

    def _mask(self, n: Lengths) -> Any:
        # Boundaries on the host serve to split tensors and to check causal masks, neither of which happens here.
        make = _xformers().attn_bias
        infos = [
            make._SeqLenInfo(seqstart=cu, max_seqlen=most, min_seqlen=most if n.equal else 0, seqstart_py=[0, total])
            for cu, most, total in ((n.cu_q, n.max_q, n.total_q), (n.cu_k, n.max_k, n.total_k))
        ]
        return make.BlockDiagonalMask(q_seqinfo=infos[0], k_seqinfo=infos[1])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, n: Lengths, scale: float) -> tuple[Tensor, Tensor]:
        call = _xformers().memory_efficient_attention_forward_requires_grad
        out, lse = call(q[None], k[None], v[None], attn_bias=self._mask(n), scale=scale)
        return out[0], lse.squeeze(0)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, n: Lengths, scale: float,
        into: Sequence[Tensor],
    ) -> None:  # fmt: skip
        batched = (x[None] for x in (grad, out, lse, q, k, v))
        grads = _xformers().memory_efficient_attention_backward(*batched, attn_bias=self._mask(n), scale=scale)
        _copy([x[0] for x in grads], into)


class Cudnn:
    """cuDNN's dense attention, for sequences of one length: the packed rows are a batch as they lie."""

    max_head_dim: ClassVar[int] = 128
    deterministic: ClassVar[bool] = False
    equal_only: ClassVar[bool] = True

    def problem(self) -> str | None:
        if not torch.backends.cudnn.is_available():
            return "this PyTorch was built without cuDNN"
        if os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE") == "1":
            return "TORCH_CUDNN_SDPA_AVOID_RECOMPILE=1 changes the layout of its log-sum-exps"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, n: Lengths, scale: float) -> tuple[Tensor, Tensor]:
        op = torch.ops.aten._scaled_dot_product_cudnn_attention
        q, k, v = (_dense(x, n) for x in (q, k, v))
        out, lse, *_ = op(q, k, v, None, True, 0.0, False, False, scale=scale)
        if lse.shape != (*q.shape[:3], 1):
            raise RuntimeError(f"cuDNN's log-sum-exps have an unexpected shape: {tuple(lse.shape)}")
        return out.transpose(1, 2).flatten(0, 1), lse[..., 0].transpose(0, 1).flatten(1)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, n: Lengths, scale: float,
        into: Sequence[Tensor],
    ) -> None:  # fmt: skip
        op = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
        statistics = lse.unflatten(1, (n.sequences, n.max_q)).transpose(0, 1).contiguous()[..., None]
        grad, q, k, v, out = (_dense(x, n) for x in (grad, q, k, v, out))
        state = _no_dropout_state(q)
        grads = op(
            grad, q, k, v, out, statistics, state, state, None, None, None, n.max_q, n.max_k, 0.0, False, scale=scale
        )  # fmt: skip
        _copy([x.transpose(1, 2).flatten(0, 1) for x in grads], into)


Library = Varlen | FlashAttn | Xformers | Cudnn
LIBRARIES: dict[str, Library] = dict(
    zip(backend.ATTENTION_LIBRARIES, (Varlen(), FlashAttn(), Xformers(), Cudnn()), strict=True)
)


def _dense(x: Tensor, n: Lengths) -> Tensor:
    """``(sequences, H, length, D)`` view of the packed rows of sequences of one length."""
    return x.unflatten(0, (n.sequences, -1)).transpose(1, 2)


def _no_dropout_state(q: Tensor) -> Tensor:
    return torch.empty(2, dtype=torch.uint64, device=q.device)


def _copy(found: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    for x, y in zip(into, found, strict=True):
        x.copy_(y)


def _parameters(function: Callable) -> list[str]:
    operator = getattr(function, "_opoverload", None)  # of a torch.library.custom_op
    if operator is not None:
        return [argument.name for argument in operator._schema.arguments]
    return list(inspect.signature(function).parameters)


def _unexpected(module: Any, needed: dict[str, str]) -> str | None:
    """What a module lacks of the functions and parameters that an adapter uses."""
    for name, parameters in needed.items():
        function = getattr(module, name, None)
        if function is None:
            return f"{module.__name__} has no {name}"
        missing = [p for p in parameters.split() if p not in _parameters(function)]
        if missing:
            return f"{module.__name__}.{name} has no parameter {', '.join(missing)}"
    return None


@cache
def _flash_attn() -> Any:
    """The module with flash-attn's two directions, or why there is none."""
    try:
        module = import_module("flash_attn.flash_attn_interface")
    except (ImportError, OSError) as error:
        return f"flash-attn cannot be imported (pip install flash-attn): {error}"
    shared = (
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal "
        "window_size_left window_size_right softcap alibi_slopes"
    )
    backward = f"{shared} dout out softmax_lse dq dk dv deterministic"
    needed = {"_flash_attn_varlen_forward": shared, "_flash_attn_varlen_backward": backward}
    return _unexpected(module, needed) or module


@cache
def _xformers() -> Any:
    """xformers' module of attention, or why there is none."""
    try:
        fmha = import_module("xformers.ops.fmha")
    except (ImportError, OSError) as error:
        return f"xformers cannot be imported (pip install xformers): {error}"
    needed = {
        "memory_efficient_attention_forward_requires_grad": "query key value attn_bias scale",
        "memory_efficient_attention_backward": "grad output lse query key value attn_bias scale",
    }
    infos = {"_SeqLenInfo": "seqstart max_seqlen min_seqlen seqstart_py", "BlockDiagonalMask": "q_seqinfo k_seqinfo"}
    return _unexpected(fmha, needed) or _unexpected(fmha.attn_bias, infos) or fmha


# Which library, if any.


@dataclass(frozen=True)
class TakeOver:
    """One row of the table: where a library replaces our kernels.

    Args:
        library: a name in :data:`LIBRARIES`.
        phases: ``forward``, ``backward`` or both.
        capability: compute capability of the device it was measured on; other devices are not concluded from it.
        head_dims: head dimensions.
        longest: least and greatest length of the longest sequence, of queries or keys.
        equal: whether it holds for sequences of one length, or for ragged ones.
        cross: whether it holds for cross-attention, or for self-attention.
        measured: the file of rows and the commit that show it.
        dtypes: half-precision dtypes.
    """

    library: str
    phases: tuple[str, ...]
    capability: tuple[int, int]
    head_dims: tuple[int, ...]
    longest: tuple[int, int]
    equal: bool
    cross: bool
    measured: str
    dtypes: tuple[torch.dtype, ...] = HALVES

    def fits(self, phase: str, q: Tensor, lengths: Lengths) -> bool:
        """Whether a request is of this row's class."""
        return (
            phase in self.phases
            and q.shape[-1] in self.head_dims
            and q.dtype in self.dtypes
            and self.longest[0] <= max(lengths.max_q, lengths.max_k) <= self.longest[1]
            and lengths.equal == self.equal
            and lengths.cross == self.cross
            and _capability(q.device) == self.capability
        )


TABLE: tuple[TakeOver, ...] = ()
"""Take-overs, the first that fits counts. Rows come from ``benchmarks/attention.py`` on a GPU; none has run yet."""


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def refusal(library: Library, q: Tensor, lengths: Lengths) -> str | None:
    """Why a library cannot do a request."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    head_dim = q.shape[-1]
    if q.device.type != DEVICE:
        return f"it needs a CUDA device, got {q.device}"
    if q.dtype not in HALVES:
        return f"it takes float16 and bfloat16, got {q.dtype}"
    if head_dim % 8 or head_dim > library.max_head_dim:
        return f"it takes head dimensions of a multiple of 8 up to {library.max_head_dim}, got {head_dim}"
    if not lengths.known:
        return "it needs lengths on the host: give a plan made by AttentionPlan.of with at least one query and key"
    if deterministic and not library.deterministic:
        return "it is not deterministic, and torch.use_deterministic_algorithms asks for that"
    if library.equal_only and not lengths.equal:
        return "it takes sequences of one length, got different ones"
    if library.equal_only and lengths.max_k == 1:
        return "it does not take sequences of one key"
    if q.device.type == "cuda" and _capability(q.device) < (8, 0):
        return f"it needs compute capability 8.0, got {'.'.join(map(str, _capability(q.device)))}"
    return library.problem()


def choose(phase: str, q: Tensor, lengths: Lengths) -> Library | None:
    """The library that does a request, None for our own implementation.

    Args:
        phase: ``forward`` or ``backward``.
        q: the queries.
        lengths: of the sequences.

    Raises:
        RuntimeError: when ``AVFAST_BACKEND`` names a library that is missing or cannot do it.
    """
    name = backend.get_backend()
    if name in LIBRARIES:
        reason = refusal(LIBRARIES[name], q, lengths)
        if reason is not None:
            raise RuntimeError(f"AVFAST_BACKEND={name}: {reason}; AVFAST_BACKEND=auto picks what can")
        return LIBRARIES[name]
    if name != "auto" or q.device.type != DEVICE or torch.are_deterministic_algorithms_enabled():
        return None
    for row in TABLE:
        if lengths.known and row.fits(phase, q, lengths) and refusal(LIBRARIES[row.library], q, lengths) is None:
            return LIBRARIES[row.library]
    return None


# The contract that a library alone does not keep.


def _readable(x: Tensor) -> Tensor:
    """With rows that 16-byte loads can take."""
    aligned = x.stride(-1) == 1 and all(s and s % 8 == 0 for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def _lonely(own: Tensor, other: Tensor, rows: int) -> Tensor:
    """``(rows,)`` bool: of sequences that have nothing on the other side."""
    return (other.diff() == 0).repeat_interleave(own.diff(), output_size=rows)


def forward(library: Library, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``(Tq, H, D)`` and natural log-sum-exp ``(H, Tq)``; 0 and -inf in rows without keys."""
    rows, total = q.shape[0], lengths.total_q
    keys = lengths.total_k
    if rows < total or k.shape[0] < keys:
        raise ValueError(f"the plan holds {total} queries and {keys} keys, got {rows} and {k.shape[0]} rows")
    out, lse = library.forward(_readable(q[:total]), _readable(k[:keys]), _readable(v[:keys]), lengths, scale)
    if lse.shape != (q.shape[1], total):  # older versions pad them to the longest sequence
        raise RuntimeError(
            f"the log-sum-exps of {type(library).__name__} have shape {tuple(lse.shape)}, expected (heads, queries) = "
            f"{(q.shape[1], total)}; AVFAST_BACKEND=auto or a newer version of the library runs"
        )
    if lengths.cross:
        lonely = _lonely(lengths.cu_q, lengths.cu_k, total)
        out.masked_fill_(lonely[:, None, None], 0)
        lse.masked_fill_(lonely, float("-inf"))
    if rows > total:
        out = torch.cat([out, out.new_zeros(rows - total, *out.shape[1:])])
        lse = torch.cat([lse, lse.new_full((lse.shape[0], rows - total), float("-inf"))], 1)
    return out.contiguous(), lse.contiguous()


def backward(
    library: Library, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths,
    scale: float, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Writes the gradients, zeros included, into ``dq``, ``dk`` and ``dv``, which may be strided views."""
    total, keys = lengths.total_q, lengths.total_k
    into = (dq[:total], dk[:keys], dv[:keys])
    grad, q, k, v, out = map(_readable, (grad[:total], q[:total], k[:keys], v[:keys], out[:total]))
    library.backward(grad, q, k, v, out, lse[:, :total].contiguous(), lengths, scale, into)
    for x, rows in ((dq, total), (dk, keys), (dv, keys)):
        x[rows:].zero_()
    if lengths.cross:
        dq[:total].masked_fill_(_lonely(lengths.cu_q, lengths.cu_k, total)[:, None, None], 0)
        lonely = _lonely(lengths.cu_k, lengths.cu_q, keys)[:, None, None]
        dk[:keys].masked_fill_(lonely, 0)
        dv[:keys].masked_fill_(lonely, 0)
