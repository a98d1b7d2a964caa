"""Synthetic weights and inputs of the parity fixtures: all follow from names (tests/fixtures/*/manifest.json)."""

import json
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_close

FOLDER = Path(__file__).parent / "fixtures"
EXTENTS = [
    pytest.param((torch.float32, False), id="float32-forward"),
    pytest.param((torch.float32, True), id="float32", marks=pytest.mark.slow),
    pytest.param((torch.float64, True), id="float64", marks=pytest.mark.slow),
]
"""How much of the full-size parity is computed: (dtype, whole). Part of it is a forward pass, of one clip where clips
are computed one by one; the whole has every output and gradient."""


class Released:
    """One released code base: its weights, its inputs and the numbers it gave."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, whole: bool = True) -> None:
        self.whole = whole
        self.manifest = json.loads((FOLDER / name / "manifest.json").read_text())
        self.dtype = dtype
        self.folder = FOLDER / name

    @cached_property
    def expected(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / "expected.npz") as file:
            return dict(file)

    def normal(self, name: str, shape) -> np.ndarray:
        return self.random(name).standard_normal(shape)

    def random(self, name: str) -> np.random.RandomState:
        return np.random.RandomState(zlib.crc32((self.manifest["SALT"] + name).encode()))

    def state(self, layout: str, unread: str = "none") -> dict[str, torch.Tensor]:
        """Released state dict of a layout of the manifest, such as ``"pretrain"``; keys that are never read hold NaN.

        So do those that begin with ``unread``.
        """
        entry = self.manifest[layout]
        scales, dead = set(entry["norm_scale_keys"]), set(entry["dead_keys"])
        (plain,) = [set(keys) for name, keys in entry.items() if "value 0.02*n" in name]
        state = {}
        for key, shape, _ in entry["keys"]:
            if key in entry["aliases"] or key.startswith(unread) or key in dead and not key.startswith("ast_base"):
                state[key] = torch.full((), float("nan")).expand(shape)
                continue
            n = self.normal(key, shape)
            if key in scales:
                value = 1 + 0.1 * n
            elif len(shape) > 1 and key not in plain:
                value = n / np.sqrt(np.prod(shape[1:]))
            else:
                value = 0.02 * n
            state[key] = torch.from_numpy(value.astype(np.float32))
        return state

    def input(self, name: str) -> torch.Tensor:
        shape = next(entry["shape"] for entry in self.manifest["inputs"] if entry["name"] == name)
        return torch.from_numpy(self.normal(f"input:{name}", shape).astype(np.float32)).to(self.dtype)

    def ids(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.expected[f"ids_{name}"]).long()

    def check(self, name: str, got: torch.Tensor, tol: float, rows: int | None = None) -> None:
        """Compare with an expected output (its first ``rows``), or with its stored slice, mean and deviation."""
        got = got.detach().double()
        if name in self.expected:
            want = torch.from_numpy(np.asarray(self.expected[name]))
            assert_close(name, got, want if rows is None else want[:rows], tol)
            return
        (sliced,) = [key for key in self.expected if key.startswith(f"{name}_slice_")]
        _, rows, columns = (int(x) for x in sliced.rsplit("_slice_", 1)[1].split("_"))
        assert_close(sliced, got[:, ::rows, ::columns], torch.from_numpy(self.expected[sliced]), tol)
        statistics = torch.stack([got.mean(), got.std(correction=0)])
        assert_close(name, statistics, torch.from_numpy(self.expected[f"{name}_mean_std"]), tol)

    def check_gradient(self, prefix: str, key: str, grad: torch.Tensor, tol: float) -> None:
        """Compare a gradient in the released shape with its stored slice and norm."""
        entry = next(e for e in self.manifest["outputs"] if e["name"] == f"{prefix}::{key}::slice")
        index = entry["meaning"].split("slice [")[1].split("] of shape")[0]
        want = torch.from_numpy(self.expected[f"{prefix}::{key}::slice"])
        got = grad.detach().double()[
            tuple(
                slice(None, None, int(part.split("::")[1]))
                if "::" in part
                else slice(None)
                if part == ":"
                else int(part)
                for part in index.replace(" ", "").split(",")
            )
        ]
        assert_close(f"{prefix}::{key}", got, want, tol)
        norm = torch.from_numpy(np.asarray(self.expected[f"{prefix}::{key}::l2"]))
        assert_close(f"{prefix}::{key} norm", grad.detach().double().norm(), norm, tol)
