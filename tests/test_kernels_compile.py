"""Kernels compiled ahead of time, without a GPU: registers, shared memory, spills, tensor-core instructions.

`python tests/test_kernels_compile.py` writes the table of all variants, benchmarks/results/compile_check.csv.
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

from avfast.kernels import packed_attention as kernels  # noqa: E402

from avfast.ops.packed_attention import BLOCKS  # noqa: E402

TABLE = Path(__file__).parents[1] / "benchmarks" / "results" / "compile_check.csv"
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
CHOSEN = ("op", "kernel", "arch", "head_dim", "dtype", "rows", "precision")
MEASURED = ("registers", "stack", "spills", "shared", "hgmma", "hmma")


def sources() -> str:
    """What a row depends on: the kernel's source and the compiler."""
    text = Path(kernels.__file__).read_bytes() + triton.__version__.encode()
    return hashlib.sha256(text).hexdigest()[:16]


def compiled(
    name: str, head_dim: int, dtype: torch.dtype, rows: int, precision: str, arch: int = 90, **changes
) -> dict:
    """A row of the table."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernels.KERNELS[name]
    constants = kernels.constants(name, head_dim, dtype, rows) | {"PRECISION": precision} | changes
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        aligned = True
        if argument in constants:
            signature[argument], aligned = "constexpr", False
        elif argument in ("heads", "items", "rows", "rows_q"):
            signature[argument], aligned = "i32", False
        elif argument == "scale":
            signature[argument], aligned = "fp32", False
        elif argument.endswith(("_row", "_head")):
            signature[argument] = "i32"
        elif argument == "boundary":
            signature[argument], aligned = "*i32", False
        else:
            signature[argument] = {"work": "*i32", "lse": "*fp32", "delta": "*fp32"}.get(argument, POINTERS[dtype])
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    chosen = ("packed_attention", name, arch, head_dim, str(dtype).removeprefix("torch."), rows, precision)
    return dict(zip(CHOSEN, chosen, strict=True)) | inspected(result) | {"source": sources()}


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


def variants() -> list[tuple]:
    """All that the launchers can ask for on sm_90."""
    return [
        (*variant, precision)
        for variant in kernels.variants(BLOCKS)
        for precision in (("tf32", "tf32x3") if variant[2] == torch.float32 else ("tf32x3",))
    ]


def check(row: dict) -> None:
    assert int(row["stack"]) == 0 and int(row["spills"]) == 0, f"spills: {row}"
    assert int(row["shared"]) <= SHARED[int(row["arch"])], f"too much shared memory: {row}"
    assert int(row["hgmma"]) + int(row["hmma"]) > 0, f"no tensor cores: {row}"


def committed() -> dict[tuple, dict]:
    with TABLE.open(newline="") as file:
        return {tuple(row[key] for key in CHOSEN): row for row in csv.DictReader(file)}


def key(row: dict) -> tuple:
    return tuple(str(row[name]) for name in CHOSEN)


@pytest.mark.parametrize("name", kernels.KERNELS)
@pytest.mark.parametrize("head_dim, dtype, rows", [(64, torch.bfloat16, 64), (64, torch.bfloat16, 128)])
def test_shipped_variants_use_tensor_cores_and_do_not_spill(name, head_dim, dtype, rows):
    row = compiled(name, head_dim, dtype, rows, "tf32x3")
    check(row)
    assert row["hgmma"] > 0
    if row["source"] == committed()[key(row)]["source"]:
        assert {k: str(v) for k, v in row.items()} == committed()[key(row)]


@pytest.mark.parametrize("arch", [80, 100])
@pytest.mark.parametrize("name", kernels.KERNELS)
def test_kernels_compile_for_other_architectures(name, arch):
    row = compiled(name, 64, torch.bfloat16, 64, "tf32x3", arch)
    assert row["stack"] <= 64
    assert row["shared"] <= SHARED[arch]


def test_the_check_sees_a_kernel_that_spills():
    row = compiled("dkv", 128, torch.float32, 64, "tf32x3", BLOCK_M=32, BLOCK_N=64)
    with pytest.raises(AssertionError, match="spills"):
        check(row)
    assert row["stack"] > 0 and row["spills"] > 0


def test_the_committed_table_holds_every_variant_of_these_sources():
    table = {key: row for key, row in committed().items() if row["op"] == "packed_attention"}
    wanted = {key(dict(zip(CHOSEN, ("packed_attention", name, 90, d, str(t)[6:], rows, precision), strict=True)))
              for name, d, t, rows, precision in variants()}  # fmt: skip
    assert set(table) == wanted
    for row in table.values():
        check(row)
    stale = {row["source"] for row in table.values()} - {sources()}
    if triton.__version__ == "3.6.0":
        assert not stale, "kernels changed: run python tests/test_kernels_compile.py and commit the table"


@pytest.mark.slow
@pytest.mark.parametrize("variant", variants(), ids=str)
def test_every_variant(variant):
    row = compiled(*variant)
    check(row)
    if triton.__version__ == "3.6.0":
        assert {k: str(v) for k, v in row.items()} == committed()[key(row)]


def write() -> None:
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    with TABLE.open("w", newline="") as file:
        table = csv.DictWriter(file, [*CHOSEN, *MEASURED, "source"], lineterminator="\n")
        table.writeheader()
        for variant in variants():
            row = compiled(*variant)
            table.writerow(row)
            file.flush()
            print(row)


if __name__ == "__main__":
    sys.exit(write())
