"""What several test files share."""

from __future__ import annotations

import math
from importlib import metadata

import numpy
import pytest
import torch

# Triton's interpreter makes a number of an array of one element, which NumPy 2.4 no longer does.
interpreter = pytest.mark.skipif(
    tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4)
    and any(d.version.startswith("3.6.") for d in metadata.distributions(name="triton")),
    reason="the interpreter of Triton 3.6 does not work with NumPy from 2.4 on",
)


def relative_error(got: torch.Tensor, want: torch.Tensor, scale: float | None = None) -> float:
    """max|got - want| / max(max|want|, 1e-4 scale); NaN or infinity on one side only is an infinite error.

    `scale` is the largest magnitude in play (for gradients: of the whole model), so that a tensor which is nearly zero
    beside the others is not judged by its own rounding noise.
    """
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    if want.numel() == 0:
        return 0.0
    finite = torch.isfinite(want)
    if not torch.equal(finite, torch.isfinite(got)) or not torch.equal(
        got[~finite].nan_to_num(0.0), want[~finite].nan_to_num(0.0)
    ):
        return math.inf
    got, want = got[finite], want[finite]
    if want.numel() == 0:
        return 0.0
    difference = (got - want).abs().max().item()
    floor = max(want.abs().max().item(), 1e-4 * (scale or 0.0))
    return difference / floor if floor else (0.0 if difference == 0 else math.inf)


def assert_close(name: str, got: torch.Tensor, want: torch.Tensor, tol: float, scale: float | None = None) -> None:
    """Same shape, and `relative_error` at most `tol`; the message says where the worst element is."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error = relative_error(got, want, scale)
    if error <= tol:
        return
    difference = (got.detach().cpu().double() - want.detach().cpu().double()).abs().nan_to_num(math.inf)
    index = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    raise AssertionError(
        f"{name}: error {error:.3g} > {tol:.3g}; worst at {index}: got {got[index].item():.8g}, "
        f"expected {want[index].item():.8g}"
    )
