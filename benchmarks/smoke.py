"""The first launch of every kernel on a device, outputs and gradients against PyTorch in float64.

    python benchmarks/smoke.py [--only 'packed*']

Each problem is right within what `common.limit` allows: half precision may err twice as much as plain PyTorch. A kernel
that is wrong in every dtype points at its launcher, in float32 alone at how TF32 products are split, with a head
dimension of 80 alone at its masked columns.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import common
import local_attention
import low_rank
import masked_patch_mse
import torch
import torch.nn.functional as F
from common import OURS, Row
from machine import Machine
from torch import Tensor

from avfast import ops
from avfast.ops import AttentionPlan
from avfast.ops.add_layer_norm import add_layer_norm
from avfast.ops.patch_embed_kept import gather_patches

Call = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Problem:
    """``ours`` and ``exact`` of the same ``leaves``; ``exact`` takes any dtype."""

    name: str
    dtype: torch.dtype
    leaves: Sequence[Tensor]
    ours: Call
    exact: Call


def outcome(call: Call, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, and gradients of what can have them, for gradients that depend on the shapes alone."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in leaves]
    outs = call(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(x) for x in outs]
    wanted = [x for x in leaves if x.requires_grad]
    return [*(x.detach() for x in outs), *torch.autograd.grad(outs, wanted, grads)]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``(..., N, D)``, softmax written out."""
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def packed(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], lengths_k: Sequence[int]) -> Tensor:
    """Sequence by sequence; rows past the last are zeros."""
    sides = [x.transpose(0, 1)[:, : sum(n)].split(n, 1) for x, n in ((q, lengths), (k, lengths_k), (v, lengths_k))]
    out = torch.cat([attend(*part) for part in zip(*sides, strict=True)], 1).transpose(0, 1)
    return F.pad(out, (0, 0, 0, 0, 0, q.shape[0] - out.shape[0]))


def packed_problems(device: torch.device, tiny: bool) -> Iterator[Problem]:
    sides = {"short": ([49, 196, 1, 64], None), "long": ([392, 300], None), "cross": ([9, 300, 65], [130, 40, 512])}
    kinds = [(64, torch.bfloat16), (32, torch.float16), (64, torch.float32), (80, torch.bfloat16), (16, torch.bfloat16)]
    for dim, dtype in kinds[:1] if tiny else kinds:
        for name, (lengths, keys) in sides.items():
            if tiny:
                lengths, keys = [n // 8 + 1 for n in lengths], None if keys is None else [n // 8 for n in keys]
            plan = AttentionPlan.from_lengths(lengths, keys, device=device)
            rows = sum(lengths) + 3, sum(keys or lengths) + 3
            q, k, v = (torch.randn(n, 4, dim, device=device).to(dtype) for n in (rows[0], rows[1], rows[1]))
            label = f"packed D{dim} {str(dtype)[6:]} {name}"
            exact = lambda q, k, v, n=lengths, m=keys: packed(q, k, v, n, m or n)  # noqa: E731
            if keys is None:
                qkv = torch.stack([q, k, v], 1)
                yield Problem(label, dtype, [qkv], lambda x, p=plan: ops.packed_attention_qkv(x, plan=p),
                              lambda x, f=exact: f(*x.unbind(1)))  # fmt: skip
            else:
                yield Problem(label, dtype, [q, k, v],
                              lambda q, k, v, p=plan: ops.packed_attention(q, k, v, plan=p), exact)  # fmt: skip


def pair_problems(device: torch.device, tiny: bool) -> Iterator[Problem]:
    kinds = [(16, 16, torch.bfloat16), (16, 64, torch.bfloat16), (64, 64, torch.float16), (64, 64, torch.float32)]
    for d, e, dtype in kinds[:1] if tiny else kinds:
        sizes = (32, d), (19, d), (19, e), (49, d), (49, e)
        leaves = [torch.randn(3, n, 4, m, device=device).to(dtype).transpose(1, 2) for n, m in sizes]
        present = torch.arange(19, device=device) < torch.tensor([[19], [5], [1]], device=device)
        for mask in (None, present):

            def exact(q: Tensor, k_a: Tensor, v_a: Tensor, k_v: Tensor, v_v: Tensor, mask=mask) -> Tensor:
                logits = q @ k_a.mT * q.shape[-1] ** -0.5
                if mask is not None:
                    logits = logits.masked_fill(~mask[:, None, None], float("-inf"))
                return logits.softmax(-1) @ v_a + attend(q, k_v, v_v)

            label = f"pair {d}x{e} {str(dtype)[6:]}{' masked' if mask is not None else ''}"
            yield Problem(label, dtype, leaves, lambda *x, m=mask: ops.pair_attention(*x, mask_a=m), exact)


def other_problems(device: torch.device, tiny: bool) -> Iterator[Problem]:
    rows, width = ([70, 29], 64) if tiny else ([700, 299], 768)
    for dtype in (torch.bfloat16, torch.float32):
        x, residual = (torch.randn(sum(rows), width, device=device) for _ in range(2))
        weight, bias = (torch.randn(2, width, device=device) for _ in range(2))

        def ours(x: Tensor, r: Tensor, w: Tensor, b: Tensor, dtype=dtype) -> tuple[Tensor, ...]:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return add_layer_norm(x, r, w, b, rows)

        def exact(x: Tensor, r: Tensor, w: Tensor, b: Tensor, dtype=dtype) -> tuple[Tensor, ...]:
            total = x + r
            parts = zip(total.split(rows), w, b, strict=True)
            normed = torch.cat([F.layer_norm(p, p.shape[1:], w, b, 1e-6) for p, w, b in parts])
            return normed if normed.dtype == torch.float64 else normed.to(dtype), total

        yield Problem(f"norm {str(dtype)[6:]}", dtype, [x, residual.to(dtype), weight, bias], ours, exact)

    images = torch.randn(2, 1, 64 if tiny else 1024, 128, device=device).mT
    patches = images.shape[2] * images.shape[3] // 256
    rows_kept = torch.randperm(2 * patches, device=device)[: patches // 2]

    def gathered(images: Tensor) -> Tensor:
        every = images.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1)
        return every[rows_kept]

    yield Problem("gather", torch.float32, [images], lambda x: gather_patches(x, rows_kept, 16), gathered)


def operator_problems(device: torch.device, tiny: bool) -> Iterator[Problem]:
    """The cases of the operators' own benchmarks, few samples of each."""
    for script, label in ((local_attention, "local"), (low_rank, "low_rank"), (masked_patch_mse, "mse")):
        cases = script.OP.cases(2)
        for name in ("tiny",) if tiny else (name for name in cases if name != "tiny"):
            for dtype in (torch.bfloat16, torch.float32):
                leaves, constants = script.OP.inputs(cases[name], dtype, device)
                ours, exact = (
                    lambda *x, call=script.OP.variants[variant], case=cases[name], rest=constants: call(case, *x, *rest)
                    for variant in (OURS, script.OP.plain)
                )
                yield Problem(f"{label} {name} {str(dtype)[6:]}", dtype, leaves, ours, exact)


def check(problem: Problem) -> Row:
    """The row of one problem; without a note it is right."""
    start = time.perf_counter()
    row = Row("smoke", problem.name, OURS, str(problem.dtype)[6:], "both")
    try:
        want = outcome(problem.exact, [x.double() for x in problem.leaves])
        bound = common.limit(problem.dtype, common.rms_error(outcome(problem.exact, problem.leaves), want))
        error = common.rms_error(outcome(problem.ours, problem.leaves), want)
    except Exception as reason:  # the next kernel may be right
        return replace(row, note=f"FAILED: {common.reason(reason)}")
    verdict = "" if error <= bound else f"WRONG: error above {bound:.1e}"
    print(f"{problem.name}: {error:.1e} of {bound:.1e}, {time.perf_counter() - start:.1f} s {verdict}", flush=True)
    return replace(row, error=error, note=verdict)


GROUPS = {"packed": packed_problems, "pair": pair_problems, "other": other_problems, "operators": operator_problems}


def main(argv: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--only", help="comma-separated names of problems, * allowed")
    parse.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parse.add_argument("--csv", default="-", help="file the rows are added to")
    parse.add_argument("--tiny", action="store_true", help="small shapes, one head dimension")
    args = parse.parse_args(argv)
    device = torch.device(args.device)
    torch.manual_seed(0)
    problems = [problem for group in GROUPS.values() for problem in group(device, args.tiny)]
    wanted = common.chosen([problem.name for problem in problems], args.only)
    rows = [check(problem) for problem in problems if problem.name in wanted]
    common.print_rows(rows)
    if args.csv != "-":
        common.append_rows(Path(args.csv), rows, Machine.here(device))
    return int(any(row.note for row in rows))


if __name__ == "__main__":
    sys.exit(main())
