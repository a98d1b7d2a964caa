"""What a device reaches at its best: a large copy, and matrix products of several shapes; the largest is the ceiling.

    python benchmarks/ceilings.py [--dtypes bfloat16,float32]

The rest of the benchmarks counts on the same figures.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import common
import torch
from common import Row
from machine import Machine

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32)}


def rows(device: torch.device, dtypes: Sequence[str], budget: float) -> list[Row]:
    """Per dtype the rate of each shape, and one row for the copy; ``matmul_share`` is the share of the largest."""
    bandwidth = common.copy_bandwidth(device)
    found = [Row("ceilings", "copy", "copy", "int8", "run", note=f"{bandwidth / 1e9:.0f} GB/s")]
    for name in dtypes:
        rates = common.matmul_rates(device, DTYPES[name], budget)
        blank, top = Row("ceilings", "", "matmul", name, "run"), max(rates.values())
        found += [
            replace(blank, case=shape, tflops=rate / 1e12, matmul_share=rate / top) for shape, rate in rates.items()
        ]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parse = common.parser(__doc__.splitlines()[0])
    parse.add_argument("--dtypes", help="comma-separated; default all on CUDA, bfloat16 and float32 on the CPU")
    args = parse.parse_args(argv)
    device = common.begin(args)
    hidden = [] if device.type == "cuda" else ["float16"]
    machine = Machine.here(device)
    found = rows(device, common.chosen(DTYPES, args.dtypes, hidden), 0.5 if args.quick else 5.0)
    common.report("ceilings", found, machine, args.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
