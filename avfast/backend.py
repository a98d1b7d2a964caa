"""Which implementation of an op runs: the only dispatch state.

``AVFAST_BACKEND`` or :func:`set_backend` name it: ``auto`` (the default: Triton on CUDA devices, the reference
elsewhere), ``reference`` (the eager body, any device) or ``triton`` (an error where Triton cannot run; with
``TRITON_INTERPRET=1`` it runs on the CPU too). ``native`` is the compiled code of csrc/ (:mod:`avfast.build`), which
``auto`` takes on CPUs and on CUDA devices without Triton: an error where it cannot run. ``varlen``, ``flash_attn``,
``flash_attn_4``, ``xformers`` and ``cudnn`` are other libraries' packed attention
(:mod:`avfast.ops._attention_libraries`): an error where they cannot run. Under ``native`` and these, ops that have no
such implementation run as under ``auto``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from avfast.kernels import support
from avfast.tensors import exporting

ATTENTION_LIBRARIES = ("varlen", "flash_attn", "flash_attn_4", "xformers", "cudnn")
BACKENDS = ("auto", "reference", "triton", "native", *ATTENTION_LIBRARIES)
try:
    _HAS_TRITON = find_spec("triton") is not None  # here, as a search for a package cannot be traced
except ImportError:  # by an import hook
    _HAS_TRITON = False


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_backend = _checked(os.environ.get("AVFAST_BACKEND", "auto"), "AVFAST_BACKEND")


def set_backend(name: str) -> None:
    """One of :data:`BACKENDS`, for this process.

    Raises:
        ValueError: on another name.
    """
    global _backend
    _backend = _checked(name, "the backend")


def get_backend() -> str:
    """The name in force."""
    return _backend


def which(device: torch.device) -> str:
    """``reference`` or ``triton``: what an op with both runs on tensors of this device.

    Raises:
        RuntimeError: ``triton`` was asked for and cannot run there.
    """
    if _backend == "reference":
        return "reference"
    if _backend == "triton":
        if not _HAS_TRITON:
            raise RuntimeError("AVFAST_BACKEND=triton: Triton is not installed (pip install triton)")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(f"AVFAST_BACKEND=triton: needs a CUDA device or TRITON_INTERPRET=1, got {device}")
        return "triton"
    return "triton" if device.type == "cuda" and _HAS_TRITON else "reference"


def inlined(x: Tensor) -> bool:
    """Whether a program is exported (``torch.export``) that shall hold PyTorch's own operators in place of an op.

    That is so where the reference runs: on a CPU, and with ``AVFAST_BACKEND=reference`` everywhere.
    """
    return exporting() and which(x.device) == "reference"


def use_kernels(op: str, *tensors: Tensor) -> bool:
    """Whether ``avfast.kernels.<op>`` runs on these tensors, and not the eager body: the one question of every op.

    Under ``auto`` the eager bodies take what the kernels do not: float64 and, with a warning, large head dimensions.

    Args:
        op: name of the op.
        tensors: those whose dtype, and in attention whose head dimension, decide; all on one device.

    Raises:
        RuntimeError: ``triton`` was asked for and cannot run on the device.
        ValueError: ``triton`` was asked for and does not take such tensors.
    """
    device = tensors[0].device
    if device.type == "meta" or which(device) == "reference":
        return False
    refusal = support.refusal(op, *tensors)
    if refusal is not None and _backend == "triton":
        raise ValueError(f"{refusal}; AVFAST_BACKEND=auto and reference take any")
    if refusal is not None and all(x.dtype in support.DTYPES for x in tensors):
        _warn_once(refusal)
    return refusal is None


def use_native(op: str, x: Tensor, dtypes: Sequence[torch.dtype]) -> bool:
    """Whether ``torch.ops.avfast_native.<op>_<cpu or cuda>`` runs, which is then loaded; asked before the kernels.

    Args:
        op: name of an op that csrc/ has.
        x: decides the device.
        dtypes: of what the op reads and writes, float32 first on a CPU.

    Raises:
        RuntimeError: ``native`` was asked for and cannot run.
    """
    kind, taken = x.device.type, support.native(x.device.type, dtypes)
    if _backend == "native":
        if not taken:
            raise RuntimeError(
                f"AVFAST_BACKEND=native: {op} in csrc/ does not take {dtypes[0]} to {dtypes[1]} on {kind}"
            )
    elif not taken or _backend in ("reference", "triton") or (kind == "cuda" and _HAS_TRITON):
        return False
    from avfast import build

    if build.load(kind):
        return True
    if _backend == "native":
        raise RuntimeError("AVFAST_BACKEND=native: csrc/ could not be compiled, see the warning")
    return False


@cache
def _warn_once(refusal: str) -> None:
    warnings.warn(f"{refusal}: this runs without kernels, and is slower so", stacklevel=3)
