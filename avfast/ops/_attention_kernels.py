"""Whether attention runs on kernels."""

from __future__ import annotations

import warnings
from functools import cache

from torch import Tensor

from avfast import backend


def on_kernels(*tensors: Tensor) -> bool:
    """Whether the Triton kernels run for such heads; under ``auto`` the eager bodies take what the kernels do not:
    float64, and with a warning head dimensions above theirs."""
    if backend.which(tensors[0].device) == "reference":
        return False
    from avfast.kernels import common as kernels

    if backend.get_backend() == "triton" or kernels.supports(*tensors):
        return True
    if tensors[0].dtype in kernels.DTYPES:
        _warn_once(max(x.shape[-1] for x in tensors), kernels.MOST_COLUMNS)
    return False


@cache
def _warn_once(head_dim: int, most: int) -> None:
    warnings.warn(
        f"attention with head dimension {head_dim} runs without kernels, which take up to {most}, and is slower so",
        stacklevel=3,
    )
