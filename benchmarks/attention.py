"""Attention within packed sequences against what else computes it.

    python benchmarks/attention.py [--quick] [--cases 'mix*,ragged'] [--dtypes float32,bfloat16] [--graph]

Every variant gets contiguous inputs in its own layout (padding and unpadding are not timed) and is first held against
an explicit softmax in float64, gradients included. `forward` records what the backward needs, as in training.
Useful work is 4 H D sum(n^2) FLOP forward and twice that backward; the fewest bytes are q, k, v, out and, backward,
these and four gradients. `ideal` is how much faster than the row the useful work alone would be at the same rate.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import common
import torch
import torch.nn.functional as F
from attention_cases import Case, all_cases
from common import OURS, Row
from memory import MIB, Memory, memory_in_subprocess, peak_memory, saved_bytes
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from avfast import backend, ops
from avfast.ops import AttentionPlan
from avfast.ops._attention_libraries import LIBRARIES, missing
from avfast.packing import cumulative, runs

WORK = {"forward": 1, "backward": 2, "both": 3}
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16)}


# The variants.


class Unavailable(Exception):
    """Why a variant cannot run."""


@dataclass(frozen=True)
class Variant:
    """``call`` on ``leaves`` (q, k, v); ``packed`` maps its layout to ``(T, H, D)``."""

    leaves: tuple[Tensor, ...]
    grad: Tensor
    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    packed: Callable[[Tensor], Tensor] = lambda x: x

    def phases(self) -> dict[str, Callable[[], object]]:
        """The two halves of a step."""
        state: dict[str, Tensor] = {}

        def forward() -> None:
            state["out"] = self.call(*self.leaves)

        def backward() -> None:
            torch.autograd.grad(state.pop("out"), self.leaves, self.grad)

        return {"forward": forward, "backward": backward}

    def both(self) -> None:
        torch.autograd.grad(self.call(*self.leaves), self.leaves, self.grad)

    def results(self) -> list[Tensor]:
        """Output and gradients, packed."""
        out = self.call(*self.leaves)
        return [self.packed(x.detach()) for x in (out, *torch.autograd.grad(out, self.leaves, self.grad))]


Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """q, k, v and the gradient of the output, ``(T, H, D)``, the same for every call."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, sum(case.lengths), case.heads, case.dim)
    return tuple(torch.randn(shape, generator=generator).to(device, dtype).unbind(0))


def _packed(data: Inputs, call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Variant:
    q, k, v, grad = (x.clone() for x in data)
    return Variant(tuple(x.requires_grad_() for x in (q, k, v)), grad, call)


def _padded(case: Case, data: Inputs, call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Variant:
    """``call`` takes and gives ``(B, H, N, D)`` views of ``(B, N, H, D)`` tensors, as projections leave them."""
    q, k, v, grad = (pad_sequence(x.split(case.lengths), batch_first=True) for x in data)
    keep = _key_mask(case, grad.device)
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    return Variant(leaves, grad, lambda *x: call(*(y.transpose(1, 2) for y in x)).transpose(1, 2), lambda x: x[keep])


def _key_mask(case: Case, device: torch.device) -> Tensor:
    lengths = torch.tensor(case.lengths, device=device)
    return torch.arange(max(case.lengths), device=device) < lengths[:, None]


def _cuda_half(data: Inputs) -> None:
    if data[0].device.type != "cuda" or data[0].dtype == torch.float32:
        raise Unavailable("CUDA and half precision only")


def avfast(case: Case, data: Inputs) -> Variant:
    plan = AttentionPlan.from_lengths(case.lengths, device=data[0].device)
    return _packed(data, lambda q, k, v: ops.packed_attention(q, k, v, plan=plan))


def avfast_device_plan(case: Case, data: Inputs) -> Variant:
    """The lengths known to the device only."""
    if data[0].device.type != "cuda":
        raise Unavailable("CUDA only")
    cu = cumulative(case.lengths, data[0].device)
    plan = AttentionPlan.from_cu_seqlens(cu, tokens_q=sum(case.lengths), max_seqlen_q=max(case.lengths))
    return _packed(data, lambda q, k, v: ops.packed_attention(q, k, v, plan=plan))


def through(library: str, case: Case, data: Inputs) -> Variant:
    """What ``AVFAST_BACKEND`` gives: the library whole, and what our function adds to it."""
    _cuda_half(data)
    if missing(library) or (LIBRARIES[library].equal_only and not case.equal):
        raise Unavailable(missing(library) or "lengths differ")
    plan = AttentionPlan.from_lengths(case.lengths, device=data[0].device)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        before = backend.get_backend()
        backend.set_backend(library)
        try:
            return ops.packed_attention(q, k, v, plan=plan)
        finally:
            backend.set_backend(before)

    return _packed(data, call)


def padded_mask(case: Case, data: Inputs) -> Variant:
    if case.equal:
        raise Unavailable("nothing to pad")
    mask = _key_mask(case, data[0].device)[:, None, None]
    return _padded(case, data, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def dense(case: Case, data: Inputs) -> Variant:
    if not case.equal:
        raise Unavailable("lengths differ")
    return _padded(case, data, lambda q, k, v: F.scaled_dot_product_attention(q, k, v))


def dense_cudnn(case: Case, data: Inputs) -> Variant:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    _cuda_half(data)
    if not case.equal:
        raise Unavailable("lengths differ")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)

    return _padded(case, data, call)


def loop(case: Case, data: Inputs) -> Variant:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # split, not slices: the gradient of a slice fills a whole tensor with zeros per sequence.
        parts = zip(*(x.transpose(0, 1).split(case.lengths, 1) for x in (q, k, v)), strict=True)
        outs = [F.scaled_dot_product_attention(*(x[None] for x in part))[0] for part in parts]
        return torch.cat(outs, 1).transpose(0, 1)

    return _packed(data, call)


def grouped(case: Case, data: Inputs) -> Variant:
    """One dense SDPA per run of consecutive equal lengths."""
    groups = runs(case.lengths)
    if case.equal or len(groups) == len(case.lengths):
        raise Unavailable("the same as dense or loop")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        split = zip(*(x.split([count * n for count, n in groups]) for x in (q, k, v)), strict=True)
        outs = []
        for part, shape in zip(split, groups, strict=True):
            heads = [x.unflatten(0, shape).transpose(1, 2) for x in part]
            outs.append(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(0, 1))
        return torch.cat(outs)

    return _packed(data, call)


def _imported(module: str, function: str) -> Any:
    try:
        return getattr(import_module(module), function)
    except (ImportError, OSError, AttributeError) as error:
        raise Unavailable(f"not installed ({error})") from None


def varlen(case: Case, data: Inputs) -> Variant:
    _cuda_half(data)
    call = _imported("torch.nn.attention.varlen", "varlen_attn")
    cu, longest = cumulative(case.lengths, data[0].device), max(case.lengths)
    return _packed(data, lambda q, k, v: call(q, k, v, cu, cu, longest, longest))


def flash_attn(case: Case, data: Inputs) -> Variant:
    _cuda_half(data)
    call = _imported("flash_attn", "flash_attn_varlen_func")
    cu, longest = cumulative(case.lengths, data[0].device), max(case.lengths)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return _packed(data, lambda q, k, v: call(q, k, v, cu, cu, longest, longest, deterministic=deterministic))


def flash_attn_4(case: Case, data: Inputs) -> Variant:
    _cuda_half(data)
    call = _imported("flash_attn.cute", "flash_attn_varlen_func")
    cu, longest = cumulative(case.lengths, data[0].device), max(case.lengths)
    given = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}
    given["deterministic"] = torch.are_deterministic_algorithms_enabled()
    return _packed(data, lambda q, k, v: call(q, k, v, **given)[0])


def xformers(case: Case, data: Inputs) -> Variant:
    _cuda_half(data)
    call = _imported("xformers.ops", "memory_efficient_attention")
    mask = _imported("xformers.ops.fmha.attn_bias", "BlockDiagonalMask").from_seqlens(list(case.lengths))
    return _packed(data, lambda q, k, v: call(q[None], k[None], v[None], attn_bias=mask)[0])


def flex(case: Case, data: Inputs, options: dict[str, Any] | None = None) -> Variant:
    """flex_attention, compiled, with a document mask that is built once."""
    device = data[0].device
    if device.type != "cuda":
        raise Unavailable("no backward pass outside CUDA")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    total = sum(case.lengths)
    document = torch.repeat_interleave(torch.arange(len(case.lengths)), torch.tensor(case.lengths)).to(device)
    rows = 256 if options and torch.cuda.get_device_capability(device)[0] >= 10 else 128  # FA4's tile on Blackwell
    mask = create_block_mask(
        lambda b, h, i, j: document[i] == document[j], None, None, total, total, device=device, BLOCK_SIZE=(rows, 128)
    )
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(*heads: Tensor) -> Tensor:
        out = compiled(*(x.transpose(0, 1)[None] for x in heads), block_mask=mask, kernel_options=options)
        return out[0].transpose(0, 1)

    return _packed(data, call)


def flex_flash(case: Case, data: Inputs) -> Variant:
    """flex_attention on FlashAttention 4."""
    _cuda_half(data)
    _imported("flash_attn.cute", "flash_attn_func")
    return flex(case, data, {"BACKEND": "FLASH"})


VARIANTS: dict[str, Callable[[Case, Inputs], Variant]] = {
    OURS: avfast,
    "avfast_device_plan": avfast_device_plan,
    **{f"{OURS}_{library}": partial(through, library) for library in LIBRARIES},
    "padded_mask": padded_mask,
    "dense": dense,
    "dense_cudnn": dense_cudnn,
    "grouped": grouped,
    "loop": loop,
    "varlen": varlen,
    "flash_attn": flash_attn,
    "flash_attn_4": flash_attn_4,
    "xformers": xformers,
    "flex": flex,
    "flex_flash": flex_flash,
}


# The gate.


def reference(case: Case, data: Inputs) -> list[Tensor]:
    """Output and gradients of an explicit softmax in float64, sequence by sequence."""
    q, k, v = (x.double().requires_grad_() for x in data[:3])
    outs = []
    for x, y, z in zip(*(x.transpose(0, 1).split(case.lengths, 1) for x in (q, k, v)), strict=True):
        outs.append((x @ y.mT * case.dim**-0.5).softmax(-1) @ z)
    out = torch.cat(outs, 1).transpose(0, 1)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), data[3].double())]


def gate(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, bool]:
    """Error of the op on a small case, and whether it passes."""
    case = all_cases(1)["tiny"]
    data = inputs(case, dtype, device)
    want = reference(case, data)
    error, plain = (common.rms_error(build(case, data).results(), want) for build in (avfast, loop))
    return error, error <= common.limit(dtype, plain)


def repeats_bitwise(variant: Variant, times: int = 30) -> bool:
    """Whether output and gradients are the same bits in every run."""
    first = variant.results()
    return all(torch.equal(a, b) for _ in range(times - 1) for a, b in zip(first, variant.results(), strict=True))


# The run.


def measure(
    case: Case, dtype: torch.dtype, device: torch.device, names: Sequence[str], rounds: int, budget: float, graph: bool
) -> tuple[list[Row], dict[str, Variant]]:
    """Rows with error and times of every variant that is there; memory and floors are filled in by the caller."""
    data, rows, good = inputs(case, dtype, device), [], {}
    want = reference(case, data)
    bound = common.limit(dtype, common.rms_error(loop(case, data).results(), want))
    blank = Row("attention", case.name, "", str(dtype).removeprefix("torch."), "both", "graph" if graph else "eager")
    errors = {}
    for name in names:
        try:
            variant = VARIANTS[name](case, data)
            errors[name] = common.rms_error(variant.results(), want)
        except Unavailable:
            continue
        except Exception as problem:  # a baseline that fails must not end the run
            rows.append(replace(blank, variant=name, note=f"failed: {common.reason(problem)}"))
            continue
        if errors[name] <= bound:
            good[name] = variant
        else:
            rows.append(replace(blank, variant=name, error=errors[name], note=f"REFUSED: error above {bound:.1e}"))
    del want
    steps = {name: variant.phases() for name, variant in good.items()}
    if graph:
        steps, failures = common.captured({name: variant.both for name, variant in good.items()})
        rows += [replace(blank, variant=name, error=errors[name], note=why) for name, why in failures.items()]
    for name, timings in common.interleave(steps, device, rounds=rounds, budget=budget).items():
        for phase, timing in timings.items():
            rows.append(replace(blank, variant=name, phase=phase, error=errors[name]).timed(timing))
    return rows, good


def memory(variant: Variant, device: torch.device) -> tuple[float, float]:
    """MiB of a step at its peak, and kept for the backward pass."""
    peak = peak_memory(variant.both, device)
    saved = saved_bytes(lambda: variant.call(*variant.leaves), variant.leaves)
    return peak / MIB, saved / MIB


def main(argv: Sequence[str] | None = None) -> int:
    parse = common.parser(__doc__.splitlines()[0])
    parse.add_argument("--dtypes", help="comma-separated, default float32 and bfloat16, bfloat16 on CUDA")
    parse.add_argument("--tokens", type=int, help="about this many per case: 16384, on the CPU 3136, quick 784")
    parse.add_argument("--graph", action="store_true", help="time replays of CUDA graphs")
    parse.add_argument("--deterministic", action="store_true", help="ask for it; compare 30 runs of ours bit by bit")
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse.parse_args(argv)
    device = common.begin(args)
    cuda = device.type == "cuda"
    torch.use_deterministic_algorithms(args.deterministic)
    cases = all_cases(args.tokens or (16384 if cuda else 784 if args.quick else 3136))
    cases = {name: cases[name] for name in common.chosen(cases, args.cases, hidden=["tiny"])}
    if args.quick and not cuda:
        cases = {name: replace(case, heads=case.heads // 2) for name, case in cases.items()}
    names = common.chosen(VARIANTS, args.variants)
    dtypes = {name: DTYPES[name] for name in common.chosen(DTYPES, args.dtypes, ["float32"] if cuda else ["float16"])}
    if not args.dtypes and cuda:
        dtypes.pop("float16")
    # Only the ragged cases have goals in bfloat16 on a CPU, where the padded call is very slow.
    todo = [(c, d) for c in cases.values() for d in dtypes.values()]
    if args.quick and not cuda and not args.dtypes:
        todo = [(c, d) for c, d in todo if d == torch.float32 or not c.equal]
    if args.memory_of:
        found = {}
        for case, dtype in todo:
            try:
                warm = replace(case, lengths=case.lengths[:2])
                VARIANTS[args.memory_of](warm, inputs(warm, dtype, device)).both()
                variant = VARIANTS[args.memory_of](case, inputs(case, dtype, device))
            except Unavailable:
                continue
            found[f"{case.name} {dtype}"] = memory(variant, device)
        print(json.dumps(found))
        return 0

    machine, floors = common.header(device, dtypes.values())
    used: dict[str, Memory] = {}
    if not cuda:
        used = {name: memory_in_subprocess(__file__, argv, name) for name in names if _runs_on_cpu(name)}
    rows: list[Row] = []
    rounds, budget = (
        args.rounds or (50 if cuda else 5 if args.quick else 15),
        float("inf") if args.rounds else 2.0 if args.quick else 20.0,
    )
    for case, dtype in todo:
        new, variants = measure(case, dtype, device, names, rounds, budget, args.graph)
        for i, row in enumerate(new):
            times = WORK[row.phase]
            new[i] = floors.share(row, dtype, times * case.flops, times * case.bytes(dtype))
            if row.phase != "both" or row.median_ms is None:
                continue
            key = f"{case.name} {dtype}"
            found = memory(variants[row.variant], device) if cuda else used.get(row.variant, {}).get(key)
            new[i] = replace(new[i], ideal=case.padding if row.variant == "padded_mask" else 1.0)
            if found:
                new[i] = replace(new[i], peak_mib=found[0], saved_mib=found[1])
        if args.deterministic and OURS in variants and not repeats_bitwise(variants[OURS]):
            refused = {"median_ms": None, "note": "REFUSED: runs differ"}
            new = [replace(row, **refused) if row.variant == OURS else row for row in new]
        rows += common.report("attention", new, machine, args.csv)
        del variants
    return common.finish("attention", rows, machine, args.csv, not args.bare)


def _runs_on_cpu(name: str) -> bool:
    return name in (OURS, "padded_mask", "dense", "grouped", "loop")


if __name__ == "__main__":
    sys.exit(main())
