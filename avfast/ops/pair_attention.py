"""Attention of a few queries over all pairs of two token sets, without a pair ever being formed.

DeepAVFusion (Eqs. 4-8, and 11-13 with aggregated tokens) makes one token of every audio-visual pair, X_ij = Wa a_i +
Wv v_j, and lets fusion tokens attend to all n_a n_v of them. Keys and values are affine in the pair, so they are sums
as well: k_ij = ka_i + kv_j + b and Va_i + Vv_j + c for values. Then the logits of a query q add,
  s q.k_ij = s q.ka_i + s q.kv_j + const,
the exponential of a sum is a product, and so is the normaliser: the softmax over pairs is p_i r_j with
  p = softmax_i(s q.ka_i),   r = softmax_j(s q.kv_j).
The constant has cancelled, and with it the key bias b, whose gradient is zero. As p and r each add up to 1,
  sum_ij p_i r_j (Va_i + Vv_j + c) = sum_i p_i Va_i + sum_j r_j Vv_j + c.
This is exact, not an approximation, and costs O(n_a + n_v) in place of O(n_a n_v). With dV_i = p_i dO, dp_i = dO.Va_i
and dlogit_i = p_i (dp_i - sum_i p_i dp_i) the backward is that of two ordinary attentions which share queries and dO.

What that means for the method: as published, the attention over pairs is a product measure and what it reads out is a
sum of one part per modality. It cannot prefer a combination (i, j) beyond preferring i and preferring j: "dense
interactions" are two cross-attentions, added. A joint choice would need a nonlinearity or a bilinear term on the pair.
Dropping entries of the pair map breaks the product, and so does a mask that is not one per token.

Operators: ``avfast::pair_attention`` and ``avfast::pair_attention_backward``. The eager bodies run anywhere, in float32
for half precision; on CUDA devices Triton kernels run, one in each direction, deterministic. ``torch.func`` transforms
do not go through custom operators, and there is no second derivative. On the CPU the two attentions, where they are
dense, without masks and not in float64, are two calls of PyTorch's own, whose dispatch costs less than an operator's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from avfast import backend
from avfast.ops import _attention_reference as reference
from avfast.ops._shared import autocast_dtype, logit_scale, register_autograd, without_autocast


def pair_attention(
    q: Tensor,
    k_a: Tensor | None,
    v_a: Tensor | None,
    k_v: Tensor | None,
    v_v: Tensor | None,
    bias_v: Tensor | None = None,
    *,
    scale: float | None = None,
    mask_a: Tensor | None = None,
    mask_v: Tensor | None = None,
    cu_seqlens_a: Tensor | None = None,
    cu_seqlens_v: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """``sum_i p_i Va_i + sum_j r_j Vv_j + bias``, which is softmax attention over all pairs (i, j).

    A modality that is absent (None), empty or fully masked adds nothing and gets zero gradients; what masked tokens
    hold is never read.

    Args:
        q: ``(B, H, F, Dqk)`` queries, of any strides; F is small (fusion tokens). In float32, float16, bfloat16,
            float64. Under autocast all but the bias are cast as matrix products are. The kernels take Dqk and Dv up to
            128, fastest where multiples of 16, in all but float64; the rest runs in PyTorch's own operations.
        k_a: ``(B, H, Na, Dqk)`` keys of the first modality, or packed ``(Ta, H, Dqk)`` with ``cu_seqlens_a``; None
            together with ``v_a``.
        v_a: ``(B, H, Na, Dv)`` or ``(Ta, H, Dv)`` values.
        k_v: keys of the second modality, likewise.
        v_v: values of the second modality.
        bias_v: broadcastable to ``(H, Dv)``, added once; the bias of the pair's value map.
        scale: positive factor of the logits, default ``Dqk ** -0.5``.
        mask_a: ``(B, Na)`` bool, True where a token takes part; default all.
        mask_v: ``(B, Nv)`` bool.
        cu_seqlens_a: ``(B + 1,)`` int32: keys of sample b are rows ``cu[b]:cu[b + 1]`` of the packed ones. On a CUDA
            device nobody reads them on the host, so their values are not checked.
        cu_seqlens_v: the same for the second modality.
        dropout_p: only 0.

    Returns:
        ``(B, H, F, Dv)``, a view of ``(B, F, H, Dv)`` memory, so that joining the heads copies nothing.

    Raises:
        ValueError: on shapes, dtypes, masks or boundaries that do not fit.
        NotImplementedError: on dropout.
    """
    if dropout_p != 0:
        raise NotImplementedError(
            f"pair_attention does not drop entries of the attention map, got dropout_p={dropout_p}: a pair map with "
            "dropped entries is no product of two softmaxes any more, and every pair would have to be formed"
        )
    q, (k_a, v_a, keys_a), (k_v, v_v, keys_v) = _checked(
        q, (k_a, v_a, mask_a, cu_seqlens_a), (k_v, v_v, mask_v, cu_seqlens_v)
    )
    if bias_v is not None:
        try:
            bias_v = bias_v.expand(q.shape[1], v_a.shape[-1])
        except RuntimeError as e:
            want = (q.shape[1], v_a.shape[-1])
            raise ValueError(f"bias_v must broadcast to (H, Dv) = {want}, got {tuple(bias_v.shape)}") from e
    scale = logit_scale(scale, q.shape[-1])
    if _is_dense(q, k_a, k_v, v_a, keys_a, keys_v):
        return _dense(q, ((k_a, v_a), (k_v, v_v)), bias_v, scale)
    return _op(q, k_a, v_a, keys_a, k_v, v_v, keys_v, bias_v, scale)[0]


@torch.no_grad()
def pair_weights(
    q: Tensor,
    k_a: Tensor | None,
    k_v: Tensor | None,
    *,
    scale: float | None = None,
    mask_a: Tensor | None = None,
    mask_v: Tensor | None = None,
    cu_seqlens_a: Tensor | None = None,
    cu_seqlens_v: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The two factors of the attention map, for looking at; the map itself is their outer product.

    Args:
        q: queries; these and the others as in :func:`pair_attention`.
        k_a: keys of the first modality.
        k_v: keys of the second modality.
        scale: factor of the logits.
        mask_a: tokens that take part.
        mask_v: tokens that take part.
        cu_seqlens_a: boundaries of packed keys. They are read on the host.
        cu_seqlens_v: boundaries of packed keys.

    Returns:
        p ``(B, H, F, Na)`` and r ``(B, H, F, Nv)`` without gradient, in float32 (float64 for float64 inputs). Masked
        tokens have weight 0; packed keys are padded with zeros to the longest sequence.
    """
    q, a, v = _checked(q, (k_a, k_a, mask_a, cu_seqlens_a), (k_v, k_v, mask_v, cu_seqlens_v))
    scale = logit_scale(scale, q.shape[-1])
    with without_autocast(q):
        return _weights(q, a[0], a[2], scale), _weights(q, v[0], v[2], scale)


Side = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _checked(q: Tensor, a: Side, v: Side) -> tuple[Tensor, tuple, tuple]:
    """Queries and per side (keys, values, what is known of the keys), cast and of shapes that fit."""
    if q.ndim != 4:
        raise ValueError(f"q must be (B, H, F, Dqk), got {tuple(q.shape)}")
    known = a[1] if a[1] is not None else v[1]
    if known is None:
        raise ValueError("pair_attention needs the keys and values of at least one modality, got none")
    q = q.to(autocast_dtype(q))
    return q, _checked_side("a", q, known.shape[-1], *a), _checked_side("v", q, known.shape[-1], *v)


def _checked_side(
    name: str, q: Tensor, dim_v: int, k: Tensor | None, v: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    batch, heads, _, dim = q.shape
    if k is None or v is None:
        if not k is v is mask is cu_seqlens is None:
            raise ValueError(f"an absent modality has none of k_{name}, v_{name}, mask_{name} and cu_seqlens_{name}")
        return q.new_zeros(batch, heads, 0, dim), q.new_zeros(batch, heads, 0, dim_v), None
    k, v = k.to(autocast_dtype(k)), v.to(autocast_dtype(v))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k_{name}, v_{name} must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    lead = (batch, heads, k.shape[-2]) if cu_seqlens is None else (k.shape[0], heads)
    if tuple(k.shape) != (*lead, dim) or tuple(v.shape) != (*lead, dim_v):
        want = "(B, H, N, D)" if cu_seqlens is None else "(T, H, D), being packed,"
        raise ValueError(
            f"k_{name} and v_{name} must be {want} to fit q {tuple(q.shape)} and values of dimension {dim_v}, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError(f"packed keys have no padding to mask: give mask_{name} or cu_seqlens_{name}, not both")
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.shape != (batch + 1,):
            raise ValueError(
                f"cu_seqlens_{name} must be int32 of shape ({batch + 1},), got {cu_seqlens.dtype} "
                f"{tuple(cu_seqlens.shape)}"
            )
    elif mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, k.shape[2])):
        raise ValueError(
            f"mask_{name} must be bool of shape {(batch, k.shape[2])}, one per token, got {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    return k, v, cu_seqlens if mask is None else mask


def _is_dense(q: Tensor, k_a: Tensor, k_v: Tensor, v: Tensor, keys_a: Tensor | None, keys_v: Tensor | None) -> bool:
    """Whether PyTorch's attention on the CPU computes both sides; in float64 the formula written out is more exact."""
    if not (keys_a is keys_v is None and (k_a.shape[2] or k_v.shape[2])):
        return False
    if backend.inlined(q):
        return True
    if q.device.type != "cpu" or q.dtype == torch.float64:
        return False
    return not backend.use_kernels("pair_attention", q, v)


def _dense(q: Tensor, sides: Sequence[tuple[Tensor, Tensor]], bias: Tensor | None, scale: float) -> Tensor:
    wide = reference.statistics_dtype(q.dtype)
    if q.dtype != wide:
        with without_autocast(q):
            sides = [(k.to(wide), v.to(wide)) for k, v in sides]
            return _dense(q.to(wide), sides, None if bias is None else bias.to(wide), scale).to(q.dtype)
    reads = [F.scaled_dot_product_attention(q, k, v, scale=scale) for k, v in sides if k.shape[2]]
    out = reads[0] if len(reads) == 1 else reads[0] + reads[1]
    return out if bias is None else out + bias[:, None]


@torch.library.custom_op("avfast::pair_attention", mutates_args=())
def _op(
    q: Tensor, k_a: Tensor, v_a: Tensor, keys_a: Tensor | None, k_v: Tensor, v_v: Tensor, keys_v: Tensor | None,
    bias: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output and the natural log-sum-exp ``(B, H, F)`` per side.

    ``keys_*`` is what is known of a side's keys: a bool mask ``(B, N)``, the int32 boundaries of packed keys, or None.
    """
    with without_autocast(q):
        if not backend.use_kernels("pair_attention", q, v_a):
            return _reference(q, k_a, v_a, keys_a, k_v, v_v, keys_v, bias, scale)
        from avfast.kernels import pair_attention as kernels

        outputs = _like_outputs(q, v_a)
        kernels.forward(q, k_a, v_a, keys_a, k_v, v_v, keys_v, bias, scale, *outputs)
        return outputs


@torch.library.custom_op("avfast::pair_attention_backward", mutates_args=())
def _op_backward(
    grad: Tensor, q: Tensor, k_a: Tensor, v_a: Tensor, keys_a: Tensor | None, k_v: Tensor, v_v: Tensor,
    keys_v: Tensor | None, lse_a: Tensor, lse_v: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k_a, v_a, k_v, v_v."""
    with without_autocast(q):
        if not backend.use_kernels("pair_attention", q, v_a):
            return _reference_backward(grad, q, k_a, v_a, keys_a, k_v, v_v, keys_v, lse_a, lse_v, scale)
        from avfast.kernels import pair_attention as kernels

        grads = _like_inputs(q, k_a, v_a, k_v, v_v)
        kernels.backward(grad, q, k_a, v_a, keys_a, k_v, v_v, keys_v, lse_a, lse_v, scale, *grads)
        return grads


def _tokens_first(x: Tensor, dim: int) -> Tensor:
    """Memory for something like x with another last dimension; dense ones lie as ``(B, N, H, D)``."""
    if x.ndim == 3:
        return x.new_empty(*x.shape[:2], dim)
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], dim).transpose(1, 2)


def _like_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=reference.statistics_dtype(q.dtype))
    return _tokens_first(q, v.shape[-1]), lse, torch.empty_like(lse)


def _like_inputs(q: Tensor, k_a: Tensor, v_a: Tensor, k_v: Tensor, v_v: Tensor) -> Gradients:
    dq, dk_a, dv_a, dk_v, dv_v = (_tokens_first(x, x.shape[-1]) for x in (q, k_a, v_a, k_v, v_v))
    return dq, dk_a, dv_a, dk_v, dv_v


@_op.register_fake
def _(q: Tensor, k_a: Tensor, v_a: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like_outputs(q, v_a)


@_op_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k_a: Tensor, v_a: Tensor, keys_a: Tensor | None, k_v: Tensor, v_v: Tensor, *args: Any
) -> Gradients:
    return _like_inputs(q, k_a, v_a, k_v, v_v)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, bias, ctx.scale = inputs
    _, lse_a, lse_v = output
    ctx.save_for_backward(*tensors, lse_a, lse_v)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(lse_a, lse_v)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    q, k_a, v_a, k_v, v_v = _op_backward(grad, *ctx.saved_tensors, ctx.scale)
    bias = None
    if ctx.bias_dtype is not None:
        bias = grad.sum((0, 2), dtype=reference.statistics_dtype(grad.dtype)).to(ctx.bias_dtype)
    return q, k_a, v_a, None, k_v, v_v, None, bias, None


register_autograd("pair_attention", _op, _op_backward, _differentiate, _save)


class _Part(NamedTuple):
    """Samples with equally many keys, those keys as ``(b, H, n, D)``, and the packed rows they came from."""

    samples: slice | Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    group: reference.Group | None

    def put(self, x: Tensor, part: Tensor) -> None:
        """Writes what belongs to these keys."""
        if self.group is None:
            x.copy_(part)
        else:
            x[self.group.rows_k] = self.group.packed(part).to(x.dtype)


def _parts(k: Tensor, v: Tensor, keys: Tensor | None, batch: int, dtype: torch.dtype) -> Iterator[_Part]:
    """Sequences of equal length together; what masked tokens hold is replaced by zeros."""
    k, v = k.to(dtype), v.to(dtype)
    if k.ndim == 4:
        hidden = None if keys is None else ~keys[:, None, :, None]
        if hidden is not None:
            k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
        yield _Part(slice(None), k, v, None if hidden is None else hidden.mT, None)
        return
    assert keys is not None  # packed
    samples = torch.arange(batch + 1, dtype=torch.int32, device=k.device)
    for group in reference.groups(samples, keys, batch, k.shape[0]):
        yield _Part(group.rows_q, group.dense(k, True), group.dense(v, True), None, group)


def _logits(q: Tensor, part: _Part, scale: float) -> Tensor:
    logits = (q[part.samples] * scale) @ part.k.mT
    return logits if part.mask is None else logits.masked_fill_(part.mask, float("-inf"))


def _normalised(logits: Tensor, lse: Tensor) -> Tensor:
    """Softmax from logits and their log-sum-exp; rows without keys are zeros."""
    return logits.sub_(lse.masked_fill(lse == float("-inf"), 0)[..., None]).exp_()


def _reference(
    q: Tensor, k_a: Tensor, v_a: Tensor, keys_a: Tensor | None, k_v: Tensor, v_v: Tensor, keys_v: Tensor | None,
    bias: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = reference.statistics_dtype(q.dtype)
    out, lse_a, lse_v = _like_outputs(q.to(dtype), v_a)
    out.zero_() if bias is None else out.copy_(bias[:, None])
    q_ = q.to(dtype)
    for k, v, keys, lse in ((k_a, v_a, keys_a, lse_a), (k_v, v_v, keys_v, lse_v)):
        lse.fill_(float("-inf"))
        for part in _parts(k, v, keys, q.shape[0], dtype):
            logits = _logits(q_, part, scale)
            lse[part.samples] = logits.logsumexp(-1)
            out[part.samples] += _normalised(logits, lse[part.samples]) @ part.v
    return out.to(q.dtype), lse_a, lse_v


def _reference_backward(
    grad: Tensor, q: Tensor, k_a: Tensor, v_a: Tensor, keys_a: Tensor | None, k_v: Tensor, v_v: Tensor,
    keys_v: Tensor | None, lse_a: Tensor, lse_v: Tensor, scale: float,
) -> Gradients:  # fmt: skip
    dtype = reference.statistics_dtype(q.dtype)
    grads = _like_inputs(q, k_a, v_a, k_v, v_v)
    dq, q_, grad = torch.zeros_like(q, dtype=dtype), q.to(dtype), grad.to(dtype)
    sides = ((k_a, v_a, keys_a, lse_a, *grads[1:3]), (k_v, v_v, keys_v, lse_v, *grads[3:]))
    for k, v, keys, lse, dk, dv in sides:
        if k.ndim == 3:
            dk.zero_()  # rows beyond the last sequence belong to no part
            dv.zero_()
        for part in _parts(k, v, keys, q.shape[0], dtype):
            p = _normalised(_logits(q_, part, scale), lse[part.samples])
            do = grad[part.samples]
            part.put(dv, p.mT @ do)
            dp = do @ part.v.mT
            ds = (dp - (p * dp).sum(-1, keepdim=True)).mul_(p).mul_(scale)
            dq[part.samples] += ds @ part.k
            part.put(dk, ds.mT @ q_[part.samples])
    grads[0].copy_(dq)
    return grads


def _weights(q: Tensor, k: Tensor, keys: Tensor | None, scale: float) -> Tensor:
    dtype = reference.statistics_dtype(q.dtype)
    longest = k.shape[2] if k.ndim == 4 else int(keys.diff().max()) if keys is not None and len(q) else 0
    weights = q.new_zeros(*q.shape[:3], longest, dtype=dtype)
    for part in _parts(k, k, keys, q.shape[0], dtype):
        logits = _logits(q.to(dtype), part, scale)
        weights[part.samples, :, :, : logits.shape[-1]] = _normalised(logits, logits.logsumexp(-1))
    return weights
