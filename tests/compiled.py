"""Ahead-of-time compilation of Triton kernels, without a GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple


class Usage(NamedTuple):
    """Registers per thread, bytes of stack (spills), bytes of shared memory, widths of memory accesses in bits."""

    registers: int
    stack: int
    shared: int
    accesses: set[int]


def compile_for_hopper(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], num_warps: int, arch: int = 90
) -> Usage:
    """Compile for sm_90 or another architecture, with pointers and strides that are multiples of 16 as those of
    contiguous tensors are.

    Args:
        kernel: a ``@triton.jit`` function.
        types: Triton type of every argument that is no constant, such as ``"*fp32"``; integers may be left out.
        constants: values of the ``tl.constexpr`` arguments.
        num_warps: per program.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    unknown = (set(types) | set(constants)) - set(names)
    assert not unknown, f"{kernel.__name__} has no argument {unknown}"
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = [i for i, name in enumerate(names) if name not in constants and name.endswith(("_ptr", "_stride"))]
    source = ASTSource(kernel, signature, values, {(i,): [["tt.divisibility", 16]] for i in aligned})
    target = GPUTarget("cuda", arch, 32)
    binary = triton.compile(source, target=target, options={"num_warps": num_warps})
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        report = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    counts = {name: int(count) for name, count in re.findall(r"(REG|STACK):(\d+)", report)}
    accesses = re.findall(r"\b(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", binary.asm["ptx"])
    widths = {int(lanes or 1) * int(bits) for lanes, bits in accesses}
    return Usage(counts["REG"], counts["STACK"], binary.metadata.shared, widths)
