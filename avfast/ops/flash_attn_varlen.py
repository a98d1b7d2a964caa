"""Packed attention under the signature of flash-attn's function."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from avfast.ops.packed_attention import packed_attention


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """:func:`packed_attention` under the signature of flash-attn's function, for people who switch over.

    It is deterministic whether asked or not.

    Raises:
        NotImplementedError: on dropout, causal or windowed attention, soft capping, ALiBi, paged keys, fewer key heads
            than query heads, and when the probabilities are asked for.
    """
    asked = {
        f"dropout_p={dropout_p}": dropout_p != 0,
        "causal=True": causal,
        f"window_size={tuple(window_size)}": any(size >= 0 for size in window_size),
        f"softcap={softcap}": softcap != 0,
        "alibi_slopes": alibi_slopes is not None,
        "return_attn_probs=True": return_attn_probs,
        "block_table": block_table is not None,
        "fewer heads in k than in q": k.shape[1] != q.shape[1],
    }
    refused = [name for name, is_asked in asked.items() if is_asked]
    if refused:
        raise NotImplementedError(f"packed_attention does not do {', '.join(refused)}")
    return packed_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=softmax_scale)
