"""Kernels compiled ahead of time, without a GPU: registers, shared memory, spills, tensor-core instructions.

`python tests/test_kernels_compile.py [OP ...]` brings benchmarks/results/compile_check.csv up to date, all variants.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)
triton = pytest.importorskip("triton")

from avfast.kernels import packed_attention, pair_attention  # noqa: E402
from avfast.ops.packed_attention import BLOCKS  # noqa: E402

TABLE = Path(__file__).parents[1] / "benchmarks" / "results" / "compile_check.csv"
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
STATISTICS = ("lse", "lse_a", "lse_v", "delta", "bias")
NUMBERS = ("heads", "items", "rows", "rows_q", "batch", "queries", "all_queries", "n_a", "n_v", "bias_column")
OPS = {"packed_attention": packed_attention, "pair_attention": pair_attention}
CHOSEN = ("op", "kernel", "arch", "head_dim", "dtype", "rows", "precision")
MEASURED = ("registers", "stack", "spills", "shared", "hgmma", "hmma")
Variant = tuple[str, str, tuple[int, ...], torch.dtype, int, str]
"""Op, kernel, head dimensions, dtype, rows, precision; pair_attention has two head dimensions (queries', values')."""


def sources(op: str) -> str:
    """What a row depends on: the kernel's source and the compiler."""
    text = Path(OPS[op].__file__).read_bytes() + triton.__version__.encode()
    return hashlib.sha256(text).hexdigest()[:16]


def constants(variant: Variant) -> dict:
    """Compile-time arguments and options; of the pair kernels the form that does most (masks, a bias, sums)."""
    op, name, dims, dtype, rows, precision = variant
    if op == "packed_attention":
        chosen = packed_attention.constants(name, *dims, dtype, rows)
    else:
        masked = pair_attention.MASKED
        chosen = pair_attention.constants(name, *dims, dtype, masked, masked)
        chosen["BIAS" if name == "forward" else "ADD"] = True
    return chosen | {"PRECISION": precision}


def compiled(variant: Variant, arch: int = 90, **changes) -> dict:
    """A row of the table."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    op, name, dims, dtype, rows, precision = variant
    kernel = OPS[op].KERNELS[name]
    fixed = constants(variant) | changes
    options = {key: fixed.pop(key) for key in ("num_warps", "num_stages")}
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        aligned = True
        if argument in fixed:
            signature[argument], aligned = "constexpr", False
        elif argument == "scale":
            signature[argument], aligned = "fp32", False
        elif argument.endswith(("_row", "_head", "_batch")):
            signature[argument] = "i32"
        elif argument == "boundary":
            signature[argument], aligned = "*i32", False
        elif argument in ("work", "keys_a", "keys_v"):
            signature[argument] = "*i32" if argument == "work" else "*u8"
        elif argument in STATISTICS:
            signature[argument] = "*fp32"
        elif argument in NUMBERS:
            signature[argument], aligned = "i32", False
        else:
            signature[argument] = POINTERS[dtype]
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, fixed, attributes)
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return labels(variant, arch) | inspected(result) | {"source": sources(op)}


def labels(variant: Variant, arch: int = 90) -> dict:
    op, name, dims, dtype, rows, precision = variant
    chosen = (op, name, arch, "x".join(map(str, dims)), str(dtype).removeprefix("torch."), rows, precision)
    return dict(zip(CHOSEN, chosen, strict=True))


def inspected(result) -> dict:
    """Registers and stack from the resource report; spills and tensor-core instructions from the machine code.

    The report alone does not do: it says LOCAL:0 of a kernel that spills.
    """
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(result.asm["cubin"])
        report = subprocess.run([tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
        code = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", report.stdout)
    assert found, report.stdout
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code.stdout))
    products = [len(re.findall(rf"\b{name}\b", code.stdout)) for name in ("HGMMA", "HMMA")]
    measured = (int(found[1]), int(found[2]), spills, result.metadata.shared, *products)
    return dict(zip(MEASURED, measured, strict=True))


def variants() -> list[Variant]:
    """All that the launchers can ask for on sm_90."""
    found = [
        ("packed_attention", name, (dim,), dtype, rows) for name, dim, dtype, rows in packed_attention.variants(BLOCKS)
    ]
    found += [
        ("pair_attention", name, (d, e), dtype, pair_attention.QUERIES[dtype])
        for name, d, e, dtype in pair_attention.variants()
    ]
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


PACKED = [("packed_attention", name, (64,), torch.bfloat16, 64, "tf32x3") for name in packed_attention.KERNELS]
LONG = [(*variant[:4], 128, "tf32x3") for variant in PACKED]
PAIR = [
    ("pair_attention", name, dims, torch.bfloat16, 32, "tf32x3")
    for name in pair_attention.KERNELS
    for dims in ((16, 16), (16, 64), (64, 64))
]


@pytest.mark.parametrize("variant", PACKED + LONG + PAIR, ids=str)
def test_shipped_variants_use_tensor_cores_and_do_not_spill(variant):
    row = compiled(variant)
    check(row)
    # Of the pair kernels only the products with a tile of keys on the left have the 64 rows of a warp group.
    assert row["hgmma"] > 0 or variant[1] == "forward" and variant in PAIR
    if row["source"] == committed()[key(row)]["source"]:
        assert {k: str(v) for k, v in row.items()} == committed()[key(row)]


@pytest.mark.parametrize("arch", [80, 100])
@pytest.mark.parametrize("variant", PACKED + PAIR, ids=str)
def test_kernels_compile_for_other_architectures(variant, arch):
    row = compiled(variant, arch)
    assert row["stack"] <= 64
    assert row["shared"] <= SHARED[arch]


def test_the_check_sees_a_kernel_that_spills():
    row = compiled(("packed_attention", "dkv", (128,), torch.float32, 64, "tf32x3"), BLOCK_M=32, BLOCK_N=64)
    with pytest.raises(AssertionError, match="spills"):
        check(row)
    assert row["stack"] > 0 and row["spills"] > 0


@pytest.mark.parametrize("op", OPS)
def test_the_committed_table_holds_every_variant_of_these_sources(op):
    table = {key: row for key, row in committed().items() if row["op"] == op}
    assert set(table) == {key(labels(variant)) for variant in variants() if variant[0] == op}
    for row in table.values():
        check(row)
    stale = {row["source"] for row in table.values()} - {sources(op)}
    if triton.__version__ == "3.6.0":
        assert not stale, f"kernels changed: run python tests/test_kernels_compile.py {op} and commit the table"


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
    todo = [k for k, v in wanted.items() if v[0] in ops and (k not in rows or rows[k]["source"] != sources(v[0]))]
    for number, k in enumerate(todo):
        rows[k] = compiled(wanted[k])
        print(f"{number + 1} of {len(todo)}", rows[k], flush=True)
        with TABLE.open("w", newline="") as file:
            table = csv.DictWriter(file, [*CHOSEN, *MEASURED, "source"], lineterminator="\n")
            table.writeheader()
            table.writerows(rows[k] for k in wanted if k in rows)


if __name__ == "__main__":
    sys.exit(write(sys.argv[1:] or list(OPS)))
