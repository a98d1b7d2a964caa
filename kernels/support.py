"""What the kernels take. Needs no Triton, so that dispatch may ask it anywhere, compiled regions included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (16, 32, 64, 80, 128)
"""Head dimensions of models in use: what the ahead-of-time checks compile. Any from 1 to ``MOST_COLUMNS`` runs."""
MOST_COLUMNS = 128
MOST_RANKS = 256
NATIVE = {"cpu": ((torch.float32,), (torch.float32, torch.bfloat16)), "cuda": (DTYPES, DTYPES)}
"""What the compiled code of csrc/ reads and writes."""
WIDEST = {
    **dict.fromkeys(("packed_attention", "pair_attention", "local_attention"), ("head dimensions", MOST_COLUMNS)),
    "low_rank_linear": ("ranks", MOST_RANKS),
}
"""Of ops whose kernels hold whole rows: what those rows are, and how many values they may have."""


def native(kind: str, dtypes: Sequence[torch.dtype]) -> bool:
    """Whether csrc/ reads the first dtype and writes the second on a kind of device."""
    return kind in NATIVE and all(dtype in taken for dtype, taken in zip(dtypes, NATIVE[kind], strict=True))


def refusal(op: str, *tensors: Tensor) -> str | None:
    """Why the kernels of an op do not take these tensors, None where they do; of an op in ``WIDEST`` tensors with what
    is limited last."""
    kind, most = WIDEST.get(op, ("", 0))
    dims = [x.shape[-1] for x in tensors] if kind else []
    if all(x.dtype in DTYPES for x in tensors) and all(1 <= n <= most for n in dims):
        return None
    dtype = next((x.dtype for x in tensors if x.dtype not in DTYPES), tensors[0].dtype)
    limit, got = (f"{kind} up to {most} in ", f"{', '.join(map(str, dims))} in ") if dims else ("", "")
    return f"the Triton kernels of {op} take {limit}float32, float16 and bfloat16, got {got}{dtype}"
