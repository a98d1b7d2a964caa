"""Kernels compiled ahead of time, without a GPU: registers, shared memory, spills, tensor-core instructions.

`python tests/test_kernels_compile.py [OP ...]` brings benchmarks/results/compile_check.csv up to date, all variants.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)
triton = pytest.importorskip("triton")

from avfast.kernels.work_lists import ROWS  # noqa: E402

from avfast.kernels import (  # noqa: E402
    common,
    local_attention,
    low_rank_linear,
    packed_attention,
    packed_attention_backward,
    packed_tiles,
    pair_attention,
)

TABLE = Path(__file__).parents[1] / "benchmarks" / "results" / "compile_check.csv"
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
STATISTICS = ("lse", "lse_a", "lse_v", "delta", "bias", "scales", "dbias", "dscales", "length")
NUMBERS = (
    "heads", "items", "rows", "rows_q", "rows_k", "split", "batch", "queries", "all_queries", "n_a", "n_v",
    "bias_column", "windows", "per_program", "columns", "shift_rows", "shift_columns", "splits", "steps",
)  # fmt: skip
OPS: dict[str, tuple[Any, ...]] = {
    "packed_attention": (packed_attention, packed_attention_backward, packed_tiles, common),
    "pair_attention": (pair_attention, common),
    "local_attention": (local_attention, common),
    "low_rank_linear": (low_rank_linear, common),
}
"""The module of each op, and what it is made of."""
CHOSEN = ("op", "kernel", "arch", "head_dim", "dtype", "tile", "precision")
MEASURED = ("registers", "programs", "stack", "spills", "shared", "hgmma", "hmma", "loop", "total")
"""Per thread; at once on a multiprocessor; bytes; instructions: spills, tensor-core ones, of a round of the loop over
tiles (0: there is none), and all."""
Variant = tuple[str, str, tuple[int, ...], torch.dtype, str, str]
"""Op, kernel, head dimensions, dtype, length class, precision; pair_attention has two head dimensions (queries',
values') and no length classes; local_attention is compiled for shifted windows of 4 x 4; low_rank_linear has the widths
of input, chunk and output, and three chunks."""


def constants(variant: Variant, arch: int = 90) -> dict:
    """Compile-time arguments and options; of the pair kernels the form that does most (masks, a bias, sums)."""
    op, name, dims, dtype, size, precision = variant
    if op == "packed_attention":
        chosen = packed_attention.constants(name, *dims, dtype, size, capability=arch // 10)
    elif op == "local_attention":
        chosen = local_attention.constants(*dims, [4, 4], [2, 0])
    elif op == "low_rank_linear":
        chosen = low_rank_linear.constants(name, 3, *dims, dtype)
    else:
        chosen = pair_attention.constants(name, *dims, dtype, "masked", "masked")
        chosen["BIAS" if name == "forward" else "ADD"] = True
    return chosen | {"PRECISION": precision}


def source(variant: Variant) -> str:
    """What a row depends on: the kernels' text without comments, what they are compiled with, and the compiler."""
    found = {name: x for module in OPS[variant[0]] for name, x in vars(module).items()}
    parts = {name: without_comments(x.src) for name, x in found.items() if isinstance(x, triton.JITFunction)}
    parts |= {name: repr(x.value) for name, x in found.items() if isinstance(x, triton.language.constexpr)}
    text = repr((sorted(parts.items()), sorted(constants(variant).items(), key=str), triton.__version__))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def without_comments(code: str) -> str:
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return " ".join(token.string for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL))


def compiled(variant: Variant, arch: int = 90, **changes) -> dict:
    """A row of the table."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    op, name, dims, dtype, size, precision = variant
    kernel = OPS[op][0].KERNELS[name]
    fixed = constants(variant, arch) | changes
    options = {key: fixed.pop(key) for key in ("num_warps", "num_stages", "maxnreg") if key in fixed}
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        aligned = True
        if argument in fixed:
            signature[argument], aligned = "constexpr", False
        elif argument == "scale":
            signature[argument], aligned = "fp32", False
        elif argument.endswith(("_row", "_head", "_batch", "_part")):
            signature[argument] = "i32"
        elif argument.startswith("boundary"):
            signature[argument], aligned = "*i32", False
        elif argument in ("work", "keys_a", "keys_v"):
            signature[argument], aligned = ("*i32", True) if argument == "work" else ("*u8", False)
        elif argument in STATISTICS:
            signature[argument] = "*fp32"
        elif argument in NUMBERS:
            signature[argument], aligned = "i32", False
        else:
            signature[argument] = POINTERS[dtype]
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    code = ASTSource(kernel, signature, fixed, attributes)
    result = triton.compile(code, target=GPUTarget("cuda", arch, 32), options=options)
    return labels(variant, arch) | inspected(result, options["num_warps"]) | {"source": source(variant)}


def labels(variant: Variant, arch: int = 90) -> dict:
    op, name, dims, dtype, size, precision = variant
    fixed = constants(variant)
    own = fixed["BLOCK_F" if op == "pair_attention" else "BLOCK_M"]
    other = fixed.get("BLOCK_N", own)
    tile = f"{other}x{own}" if name == "dkv" else f"{own}x{other}"
    chosen = (op, name, arch, "x".join(map(str, dims)), str(dtype).removeprefix("torch."), tile, precision)
    return dict(zip(CHOSEN, chosen, strict=True))


def inspected(result, warps: int) -> dict:
    """Registers and stack from the resource report; spills and tensor-core instructions from the machine code.

    The report alone does not do: it says LOCAL:0 of a kernel that spills.
    """
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(result.asm["cubin"])
        report = subprocess.run([tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
        code = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report.stdout)
    assert found, report.stdout
    registers, shared = int(found[1]), result.metadata.shared
    # Registers are given out by eights; a program takes 1 KiB of shared memory beside its own.
    programs = min(65536 // (32 * warps * -(-registers // 8) * 8), 228 * 1024 // (shared + 1024), 64 // warps)
    spills, *products = (len(re.findall(rf"\b(?:{name})\b", code)) for name in ("LDL|STL", "HGMMA", "HMMA"))
    total, loop = counted(code)
    measured = (registers, programs, int(found[2]), spills, shared, *products, loop, total)
    return dict(zip(MEASURED, measured, strict=True))


def counted(code: str) -> tuple[int, int]:
    """Instructions in all, and in the longest loop that holds tensor-core ones."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    longest = 0
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(found[1])
            jump = re.search(r"\bBRA\b.*\((\.L_\w+)\)", found[1])
            body = instructions[labels[jump[1]] :] if jump and jump[1] in labels else []
            if any("HGMMA" in x or "HMMA" in x for x in body):
                longest = max(longest, len(body))
    return len(instructions), longest


def variants() -> list[Variant]:
    """What the launchers ask for on sm_90 at the head dimensions in use."""
    found = [("packed_attention", name, (dim,), dtype, size) for name, dim, dtype, size in packed_attention.variants()]
    found += [
        ("pair_attention", name, (d, e), dtype, "")
        for name, d, e, dtype in pair_attention.variants()
        if d == e or dtype != torch.float16  # whose code is bfloat16's but for the type
    ]
    kinds = itertools.product(local_attention.KERNELS, (16, 32, 64), (torch.bfloat16, torch.float32))
    found += [("local_attention", name, (dim,), dtype, "") for name, dim, dtype in kinds]
    kinds = itertools.product(low_rank_linear.KERNELS, (32, 64, 128, 256), (torch.bfloat16, torch.float32))
    found += [("low_rank_linear", name, (768, rank, 768), dtype, "") for name, rank, dtype in kinds]
    return [
        (*variant, precision)
        for variant in found
        for precision in (("tf32", "tf32x3") if variant[3] == torch.float32 else ("tf32x3",))
    ]


def check(row: dict) -> None:
    # A backward in float32 with a head dimension above 64 holds a few words more than there are registers.
    wide = row["op"] == "pair_attention" and max(map(int, str(row["head_dim"]).split("x"))) > 64
    stack = 64 if wide and row["kernel"] == "backward" and row["dtype"] == "float32" else 0
    assert int(row["stack"]) <= stack and (stack or int(row["spills"]) == 0), f"spills: {row}"
    assert int(row["shared"]) <= SHARED[int(row["arch"])], f"too much shared memory: {row}"
    assert int(row["hgmma"]) + int(row["hmma"]) > 0, f"no tensor cores: {row}"


def committed() -> dict[tuple, dict]:
    with TABLE.open(newline="") as file:
        return {tuple(row[key] for key in CHOSEN): row for row in csv.DictReader(file)}


def key(row: dict) -> tuple:
    return tuple(str(row[name]) for name in CHOSEN)


HALF = torch.bfloat16
PACKED = [
    ("packed_attention", name, (64,), HALF, "tiny" if name == "whole" else "short", "tf32x3")
    for name in packed_attention.KERNELS
]
PAIR = [("pair_attention", name, (64, 64), HALF, "", "tf32x3") for name in pair_attention.KERNELS]
LOCAL = [("local_attention", name, (32,), HALF, "", "tf32x3") for name in local_attention.KERNELS]
LOW_RANK = [("low_rank_linear", name, (768, 128, 768), HALF, "", "tf32x3") for name in low_rank_linear.KERNELS]
OTHERS = [
    *(("packed_attention", name, (64,), HALF, "long", "tf32x3") for name in ("forward", "dq")),
    *(
        ("pair_attention", name, dims, HALF, "", "tf32x3")
        for name in pair_attention.KERNELS
        for dims in ((16, 16), (16, 64))
    ),
]


def slow(cases: list) -> list:
    return [pytest.param(*(case if isinstance(case, list) else [case]), marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("variant", PACKED + PAIR + LOCAL + LOW_RANK + slow(OTHERS), ids=str)
def test_shipped_variants_use_tensor_cores_and_do_not_spill(variant):
    row = compiled(variant)
    check(row)
    # Of the pair kernels only the products with a tile of keys on the left have the 64 rows of a warp group.
    # Those of local attention have the 16 rows of a warp.
    assert row["hgmma"] > 0 or variant[:2] == ("pair_attention", "forward") or variant[0] == "local_attention"
    if row["source"] == committed()[key(row)]["source"]:
        assert {k: str(v) for k, v in row.items()} == committed()[key(row)]


FEW = [[PACKED[0], 80], [PACKED[2], 100]]
REST = [
    [variant, arch] for variant in PACKED + PAIR + LOCAL + LOW_RANK for arch in (80, 100) if [variant, arch] not in FEW
]


@pytest.mark.parametrize("variant, arch", FEW + slow(REST), ids=str)
def test_kernels_compile_for_other_architectures(variant, arch):
    row = compiled(variant, arch)
    assert row["stack"] <= 64
    assert row["shared"] <= SHARED[arch]


def test_the_check_sees_a_kernel_that_spills():
    row = compiled(("packed_attention", "forward", (64,), HALF, "short", "tf32x3"), maxnreg=64)
    with pytest.raises(AssertionError, match="spills"):
        check(row)
    assert row["stack"] > 0 and row["spills"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("dim", [24, 48, 96])
@pytest.mark.parametrize("name, size", [("forward", "short"), ("dq", "short"), ("dkv", "long"), ("whole", "tiny")])
def test_head_dimensions_between_those_in_use(name, size, dim):
    check(compiled(("packed_attention", name, (dim,), HALF, size, "tf32x3")))


def test_the_table_says_what_the_kernels_were_written_for():
    """Before: 375, 329 and 303 instructions a round, 3 programs at once in the forward, 2,521 for dq and dkv together,
    and 128 columns for 80."""
    rows = {tuple(row[k] for k in ("kernel", "head_dim", "tile")): row for row in committed().values()
            if row["op"] == "packed_attention" and row["dtype"] == "bfloat16"}  # fmt: skip
    forward, dq, dkv, whole = (
        {name: int(rows[key, "64", tile][name]) for name in MEASURED}
        for key, tile in (("forward", "64x64"), ("dq", "64x64"), ("dkv", "64x32"), ("whole", "64x64"))
    )
    assert forward["loop"] <= 300 and forward["programs"] >= 4
    assert dq["loop"] <= 260 and dq["programs"] >= 4
    assert dkv["loop"] <= 245 and dkv["programs"] >= 3
    assert whole["total"] <= 0.6 * 2521
    assert int(rows["forward", "80", "64x64"]["loop"]) <= 350


@pytest.mark.parametrize("op", OPS)
def test_the_committed_table_holds_every_variant_of_these_sources(op):
    table = {which: row for which, row in committed().items() if row["op"] == op}
    wanted = {key(labels(variant)): source(variant) for variant in variants() if variant[0] == op}
    assert set(table) == set(wanted)
    for row in table.values():
        check(row)
    if triton.__version__ == "3.6.0":
        stale = [k for k, row in table.items() if row["source"] != wanted[k]]
        assert not stale, f"kernels changed: run python tests/test_kernels_compile.py {op} and commit the table"


CANDIDATES = [
    (name, dim, size, tile)
    for name in packed_attention.KERNELS
    for dim in (64, 80, 128)
    for size in ROWS
    for tile in packed_attention.candidates(name, dim, HALF, size)[1:]
]


@pytest.mark.slow
@pytest.mark.parametrize("name, dim, size, tile", CANDIDATES, ids=str)
def test_candidates_do_not_spill(name, dim, size, tile, monkeypatch):
    monkeypatch.setitem(ROWS, "tiny", max(64, tile.own if name == "whole" else 0))
    with packed_attention.override(name, size, tile):
        check(compiled(("packed_attention", name, (dim,), HALF, size, "tf32x3")))


@pytest.mark.slow
@pytest.mark.parametrize("variant", variants(), ids=str)
def test_every_variant(variant):
    row = compiled(variant)
    check(row)
    if triton.__version__ == "3.6.0":
        assert {k: str(v) for k, v in row.items()} == committed()[key(row)]


def write(ops: list[str]) -> None:
    """Rows of these ops that are missing or stale; every row is stored at once, so that a run can be cut short."""
    wanted = {key(labels(variant)): variant for variant in variants()}
    rows = {k: row for k, row in committed().items() if k in wanted} if TABLE.exists() else {}
    todo = [k for k, v in wanted.items() if v[0] in ops and (k not in rows or rows[k]["source"] != source(v))]
    for number, k in enumerate(todo):
        rows[k] = compiled(wanted[k])
        print(f"{number + 1} of {len(todo)}", rows[k], flush=True)
        with TABLE.open("w", newline="") as file:
            table = csv.DictWriter(file, [*CHOSEN, *MEASURED, "source"], lineterminator="\n")
            table.writeheader()
            table.writerows(rows[k] for k in wanted if k in rows)


if __name__ == "__main__":
    sys.exit(write(sys.argv[1:] or list(OPS)))
