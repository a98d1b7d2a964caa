"""Files of tensors, written, and read without running what is in them, and what a file that is none looks like."""

from __future__ import annotations

import argparse
import datetime
import pathlib
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def _safe_types() -> list[Any]:
    """Plain data that trainers store beside the weights; none of it runs code when it is read.

    Pairs give the type that stands in for a name: other versions of Python, NumPy and Lightning have other names.
    """
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    array = np.zeros(0).__reduce__()[0]
    types: list[Any] = [
        int, float, bool, str, bytes, list, tuple, dict, argparse.Namespace, datetime.datetime, datetime.date,
        datetime.timedelta, np.ndarray, np.dtype, *{type(np.dtype(c)) for c in np.typecodes["All"]},
        (lambda *_: {}, "collections.defaultdict"), (lambda *_: [], "collections.deque"),
    ]  # fmt: skip
    for package in ("numpy.core", "numpy._core"):
        types += [(scalar, f"{package}.multiarray.scalar"), (array, f"{package}.multiarray._reconstruct")]
    for module in ("pathlib", "pathlib._local"):
        types += [(pathlib.PurePosixPath, f"{module}.{name}") for name in ("PosixPath", "PurePosixPath")]
        types += [(pathlib.PureWindowsPath, f"{module}.{name}") for name in ("WindowsPath", "PureWindowsPath")]
    for module in ("lightning.fabric", "lightning_fabric"):
        types.append((dict, f"{module}.utilities.data.AttributeDict"))
    for module in ("lightning.pytorch", "pytorch_lightning"):
        types.append((dict, f"{module}.utilities.parsing.AttributeDict"))
    return types


def read(path: Path, mmap: bool = False) -> Any:
    """What a ``.pth``/``.pt``/``.bin`` or ``.safetensors`` file holds, on the CPU; the content tells which it is.

    Args:
        path: the file.
        mmap: map the tensors of a torch file, so that only those used are read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, in one line that says what it looks like.
    """
    if not path.is_file():
        what = "a folder, not a file" if path.is_dir() else None
        raise FileNotFoundError(f"{path} is {what}" if what else f"no checkpoint at {path}")
    with path.open("rb") as file:
        head = file.read(512)
    try:
        if _safetensors_header(head, path.stat().st_size):
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_safe_types()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*TorchScript")  # said by the error
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except PermissionError:
        raise
    except Exception as error:  # readers of files raise many kinds for content that is none
        raise ValueError(f"{path} {_appearance(path, head, str(error))}") from error


def write(path: Path, state: Mapping[str, Tensor]) -> None:
    """Writes tensors as a safetensors file, with the permissions of any new file."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    # cloned: safetensors refuses tensors that share memory
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}, path, {"format": "pt"})
    path.chmod(mode)  # safetensors lets nobody else read its files


def _safetensors_header(head: bytes, size: int) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < size


def _appearance(path: Path, head: bytes, reason: str) -> str:
    """What a file that could not be read is, as far as its first bytes and the reader's complaint tell."""
    text = head.lstrip().lower()
    if not head:
        return "is empty"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights themselves; fetch them with: git lfs pull"
    if text.startswith(b"<"):
        return "is a web page (HTML or XML), not weights; the download asked for something else first"
    if text.startswith((b"{", b"[")):
        return "is JSON text, not weights"
    if head.startswith(b"\x1f\x8b") or head[257:262] == b"ustar":
        return "is a packed archive (gzip or tar); unpack it first"
    if head.startswith(b"\x89HDF"):
        return "is an HDF5 file; only files of torch.save and safetensors are read"
    blocked = re.search(r"GLOBAL ([\w.]+)", reason)
    if blocked:
        kind = "a whole pickled model" if blocked[1].startswith("torch.nn.modules") else "Python objects"
        return (
            f"holds {kind} ({blocked[1]}), which could run code when read; save its state_dict() alone where it "
            "was made"
        )
    if head.startswith(b"PK"):
        return _zip_appearance(path)
    if _safetensors_header(head, 2**63) or path.suffix == ".safetensors":
        return f"is no whole safetensors file: cut short or damaged ({path.stat().st_size} bytes)"
    if head.startswith(b"\x80"):
        return f"is a pickle that is cut short, damaged or not made by torch.save ({path.stat().st_size} bytes)"
    if head.isascii():
        first = head.splitlines()[0][:40].decode()
        return f"is text that starts with {first!r}, not weights"
    return f"is no file of torch.save or safetensors; it starts with the bytes {head[:8].hex(' ')}"


def _zip_appearance(path: Path) -> str:
    try:
        names = zipfile.ZipFile(path).namelist()
    except zipfile.BadZipFile:
        return f"is cut short or damaged: {path.stat().st_size} bytes without the end of a file of torch.save"
    if any(name.endswith("constants.pkl") for name in names):
        return "is a TorchScript model; save its state_dict() alone"
    if any(name.endswith(".npy") for name in names):
        return "is a NumPy archive; only files of torch.save and safetensors are read"
    if not any(name.endswith("data.pkl") for name in names):
        return f"is a zip archive of other things ({', '.join(names[:3])})"
    return "is damaged: its parts do not fit together"
