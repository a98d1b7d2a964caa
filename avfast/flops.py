"""Counts the floating point operations of a call, by running it once on any device, `meta` included.

Convention: the arithmetic the mathematics asks for, 2 FLOP per multiply-add, in matrix products, convolutions and
attention; pointwise operations, reductions and softmax count nothing. The backward pass of attention counts four matrix
products, twice its forward pass, whichever implementation runs: PyTorch's own counter charges five to the fused ones,
which recompute the scores, and four to the plain one, and it charges nothing at all to the fused one of the CPU. So a
block counts the same on the CPU, on `meta` and on a GPU. What activation checkpointing runs twice is counted twice.

Operators of this library have their formula here; an operator is opaque to the counter, so what its body runs is not
counted again, and packed attention runs as ours here where ``AVFAST_BACKEND`` names another library. What depends on
lengths is read from them, and raises where they are not known (boundaries on `meta`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from avfast import backend

__all__ = ["breakdown", "count"]

# Five equal matrix products in PyTorch's formula, of which one recomputes the scores.
_FUSED_BACKWARDS = (
    "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_cudnn_attention_backward",
    "_flash_attention_backward",
    "_efficient_attention_backward",
)


def count(fn: Callable[..., Any], *args: Any, backward: bool = False, **kwargs: Any) -> int:
    """FLOPs of `fn(*args, **kwargs)`.

    Args:
        fn: a module or any callable. It is run once, as it stands: in the gradient mode it is called in, with its
            random draws; on meta tensors no arithmetic happens, and anything that asks for values raises.
        backward: also run, and count, the backward pass of the result, which must be a scalar tensor or an object
            with a scalar `.loss`. Gradients accumulate in `.grad` as in any backward pass.

    Raises:
        TypeError: `backward` is set and the result is neither.
        ValueError: `backward` is set and the loss is not a scalar or carries no gradient.
    """
    return sum(breakdown(fn, *args, backward=backward, **kwargs).values())


def breakdown(fn: Callable[..., Any], *args: Any, backward: bool = False, **kwargs: Any) -> dict[str, int]:
    """As `count`, by operator: `{"aten.addmm": 123, ...}`, largest first."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton where there is one

    named = backend.get_backend()
    if named in backend.ATTENTION_LIBRARIES:  # what they run is no operator that has a formula
        backend.set_backend("auto")
    try:
        with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
            result = fn(*args, **kwargs)
            if backward:
                _loss(result).backward()
    finally:
        backend.set_backend(named)
    counts = {str(op): int(flops) for op, flops in counter.get_flop_counts().get("Global", {}).items()}
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _loss(result: Any) -> torch.Tensor:
    loss = result if isinstance(result, torch.Tensor) else getattr(result, "loss", None)
    if not isinstance(loss, torch.Tensor):
        raise TypeError(f"backward=True needs a scalar tensor or an object with .loss, got {type(result).__name__}")
    if loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            f"backward=True needs a scalar that requires grad, got shape {tuple(loss.shape)}, "
            f"requires_grad={loss.requires_grad}"
        )
    return loss


def _formulas() -> dict[Any, Callable[..., int]]:
    from torch.utils.flop_counter import flop_registry

    import avfast.ops  # noqa: F401  defines what torch.ops.avfast holds

    aten, own = torch.ops.aten, torch.ops.avfast
    formulas: dict[Any, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: _raw(_attention),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _raw(_attention_backward),
        own.packed_attention: _raw(_packed),
        own.packed_attention_backward: _raw(_packed_backward),
        own.packed_attention_qkv: _raw(_packed_qkv),
        own.packed_attention_qkv_backward: _raw(_packed_qkv_backward),
        own.local_attention: _raw(_local),
        own.local_attention_backward: _raw(_local_backward),
        own.low_rank_linear: _raw(_low_rank),
        own.low_rank_linear_backward: _raw(_low_rank_backward),
        own.pair_attention: _raw(_pair),
        own.pair_attention_backward: _raw(_pair_backward),
        own.skew_exp: _raw(_skew_exp),
        own.skew_exp_backward: _raw(_skew_exp_backward),
    }
    for name in _FUSED_BACKWARDS:
        op = getattr(aten, name, None)
        if op in flop_registry:
            formulas[op] = _raw(_without_recomputation(flop_registry[op]))
    return formulas


def _raw(formula: Callable[..., int]) -> Callable[..., int]:
    """Marks a formula as one that takes the operator's own arguments, tensors included."""
    formula._get_raw = True  # type: ignore[attr-defined]
    return formula


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any
) -> int:
    return 2 * _attention(q, k, v)


def _packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> int:
    if cu_seqlens_q.is_meta:
        raise ValueError("FLOPs of packed attention on meta need lengths: give a plan by AttentionPlan.from_lengths")
    lengths_q = cu_seqlens_q.diff()
    lengths_k = lengths_q if cu_seqlens_k is None else cu_seqlens_k.diff()
    pairs = int((lengths_q.long() * lengths_k).sum())
    return 4 * pairs * q.shape[1] * q.shape[2]


def _packed_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> int:
    return 2 * _packed(q, k, v, *args)


def _packed_qkv(qkv: torch.Tensor, cu_seqlens: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    q, k, v = qkv.unbind(1)
    return _packed(q, k, v, cu_seqlens, None)


def _packed_qkv_backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> int:
    return 2 * _packed_qkv(qkv, cu_seqlens)


def _pair(
    q: torch.Tensor,
    k_a: torch.Tensor,
    v_a: torch.Tensor,
    keys_a: torch.Tensor | None,
    k_v: torch.Tensor,
    v_v: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> int:
    # Every key, packed or not, meets the queries of its one sample, so that no lengths are needed.
    keys = sum(k.shape[0] if k.ndim == 3 else k.shape[0] * k.shape[2] for k in (k_a, k_v))
    return 2 * keys * q.shape[1] * q.shape[2] * (q.shape[3] + v_a.shape[-1])


def _pair_backward(grad: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * _pair(*args)


def _local(qkv: torch.Tensor, bias: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    batch, tokens, _, heads, dim = qkv.shape
    return 4 * batch * tokens * bias.shape[-1] * heads * dim


def _local_backward(grad: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * _local(*args)


def _low_rank(x: torch.Tensor, v: torch.Tensor, g: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * x.shape[0] * (v.numel() + g.numel())


def _low_rank_backward(grad: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * _low_rank(*args)


def _skew_exp(a: torch.Tensor, **kwargs: Any) -> int:
    return 6 * 2 * a.numel() * a.shape[-1]  # without the squarings, whose number depends on values


def _skew_exp_backward(grad: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    return 10 * 2 * grad.numel() * grad.shape[-1]


def _without_recomputation(formula: Callable[..., int]) -> Callable[..., int]:
    def four_of_five(*args: Any, **kwargs: Any) -> int:
        return formula(*args, **kwargs) * 4 // 5

    return four_of_five
