"""The fusion module of DeepAVFusion over all audio-visual pairs: exact without pairs, against pairs that are formed.

    python benchmarks/pair_attention.py [--quick] [--cases 'full*,masked*'] [--dtypes float32,bfloat16] [--graph]

Every variant is the whole module (projections of queries, keys, values and output) with the same weights, and is first
held against float64, with gradients of inputs and weights. `materialised` is the published module on concatenated
pairs; `summed_pairs` forms them after the projections; `two_sdpa` is what someone who knows that the softmax over pairs
separates would write in PyTorch, and `two_sdpa_compiled` the same under torch.compile. The note of a row holds the
FLOPs of its variant forward, useful work is that of ours; `ideal` is the ratio of the two. Peak memory is what a step
takes beyond weights, inputs, output and gradients, which are the same for all.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import common
import materialised
import torch
from common import OURS, Row
from memory import MIB, Memory, memory_in_subprocess, peak_memory, saved_bytes
from torch import Tensor

from avfast import flops
from avfast.nn.fusion import PairAttention

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16)}
Call = Callable[[PairAttention, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """B samples, F queries, audio x visual tokens, module width D, widths of keys and of values."""

    name: str
    batch: int
    queries: int
    audio: int
    visual: int
    dim: int = 768
    heads: int = 12
    widths: tuple[int, int] = (192, 192)

    def module(self, dtype: torch.dtype, device: torch.device | str) -> PairAttention:
        torch.manual_seed(0)
        return PairAttention(self.dim, self.heads, *self.widths).to(device, dtype)

    def inputs(self, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
        """Normalised fusion, audio and visual tokens, and the gradient of the output; the same for every call."""
        generator = torch.Generator().manual_seed(1)
        tokens = (self.queries, self.audio, self.visual, self.queries)
        return [torch.randn(self.batch, n, self.dim, generator=generator).to(device, dtype) for n in tokens]


def all_cases(batch: int) -> dict[str, Case]:
    """Patches of a whole clip, those masked pre-training keeps, and the aggregation tokens of the factorized form."""
    cases = [
        Case(f"full-96x196-b{batch}", batch, 32, 96, 196),
        Case(f"full-wide-b{batch}", batch, 32, 96, 196, widths=(768, 768)),
        Case(f"masked-19x49-b{batch}", batch, 32, 19, 49),
        Case(f"aggregated-8x8-b{batch}", batch, 16, 8, 8, widths=(192, 768)),
        Case("tiny", 2, 3, 4, 5, 32, 2, (32, 32)),
    ]
    return {case.name: case for case in cases}


def avfast(module: PairAttention, x: Tensor, audio: Tensor, visual: Tensor) -> Tensor:
    return module(x, audio, visual)


VARIANTS: dict[str, Call] = {
    OURS: avfast,
    "materialised": materialised.pair_module,
    "summed_pairs": materialised.summed_pair_module,
    "two_sdpa": materialised.two_attentions,
    "two_sdpa_compiled": materialised.two_attentions,
}


@dataclass(frozen=True)
class Variant:
    """``call`` on the module and its inputs; gradients of inputs and weights are asked for."""

    module: PairAttention
    inputs: list[Tensor]
    grad: Tensor
    call: Call

    @classmethod
    def build(cls, name: str, case: Case, dtype: torch.dtype, device: torch.device | str) -> Variant:
        *inputs, grad = case.inputs(dtype, device)
        call = VARIANTS[name]
        if name.endswith("_compiled"):
            call = torch.compile(call, dynamic=False)
        return cls(case.module(dtype, device), [x.requires_grad_() for x in inputs], grad, call)

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.inputs, *self.module.parameters()]

    def forward(self) -> Tensor:
        return self.call(self.module, *self.inputs)

    def both(self) -> list[Tensor]:
        """Output and gradients."""
        out = self.forward()
        return [out.detach(), *torch.autograd.grad(out, self.leaves, self.grad)]

    def phases(self) -> dict[str, Callable[[], object]]:
        """The two halves of a step."""
        state: dict[str, Tensor] = {}

        def forward() -> None:
            state["out"] = self.forward()

        return {
            "forward": forward,
            "backward": lambda: torch.autograd.grad(state.pop("out"), self.leaves, self.grad),
        }


def reference(case: Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Output and gradients from the same rounded weights and inputs in float64, as two softmaxes written out."""

    def call(module: PairAttention, x: Tensor, audio: Tensor, visual: Tensor) -> Tensor:
        weights = module.kv.weight.chunk(2, 1)
        heads = partial(torch.unflatten, dim=-1, sizes=(case.heads, -1))
        q, out = heads(module.q(x)).transpose(1, 2), 0
        for tokens, weight in zip((visual, audio), weights, strict=True):
            k, v = (heads(y).transpose(1, 2) for y in (tokens @ weight.T + module.kv.bias).split(case.widths, -1))
            out = out + (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        bias = module.kv.bias[case.widths[0] :]
        return module.proj(out.transpose(1, 2).flatten(2) - bias)  # which was added twice

    rounded = Variant.build(OURS, case, dtype, device)
    inputs = [x.detach().double().requires_grad_() for x in rounded.inputs]
    return Variant(copy.deepcopy(rounded.module).double(), inputs, rounded.grad.double(), call).both()


def error(got: list[Tensor], want: list[Tensor]) -> float:
    """RMS error of each tensor; gradients that are small beside the largest are judged by 1e-4 of it (the key bias has
    none in theory)."""
    floor = 1e-4 * max(x.norm().item() for x in want[1:])
    pairs = [(x.detach().double(), y) for x, y in zip(got, want, strict=True)]
    return max(
        common.rms_error([x], [y]) if y.norm() > floor else ((x - y).norm() / floor).nan_to_num(float("inf")).item()
        for x, y in pairs
    )


def gflop(name: str, case: Case) -> float:
    """Of the forward pass, counted on meta."""
    *inputs, _ = case.inputs(torch.float32, "meta")
    return flops.count(VARIANTS[name], case.module(torch.float32, "meta"), *inputs) / 1e9


def measure(
    case: Case, dtype: torch.dtype, device: torch.device, names: Sequence[str], rounds: int, budget: float, graph: bool
) -> tuple[list[Row], dict[str, Variant]]:
    """Rows with error and times; memory and rates are filled in by the caller."""
    want, rows, good, errors = reference(case, dtype, device), [], {}, {}
    plain = error(Variant.build("two_sdpa", case, dtype, device).both(), want)
    bound = common.limit(dtype, plain)
    blank = Row("pair_attention", case.name, "", str(dtype)[6:], "both", "graph" if graph else "eager")
    for name in names:
        try:
            variant = Variant.build(name, case, dtype, device)
            errors[name] = error(variant.both(), want)
        except Exception as problem:  # a baseline that fails must not end the run
            rows.append(replace(blank, variant=name, note=f"failed: {common.reason(problem)}"))
            continue
        if errors[name] <= bound:
            good[name] = variant
        else:
            rows.append(replace(blank, variant=name, error=errors[name], note=f"REFUSED: error above {bound:.1e}"))
    steps = {name: variant.phases() for name, variant in good.items()}
    if graph:
        steps, failures = common.captured({name: variant.both for name, variant in good.items()})
        rows += [replace(blank, variant=name, error=errors[name], note=why) for name, why in failures.items()]
    for name, timings in common.interleave(steps, device, rounds=rounds, budget=budget).items():
        for phase, timing in timings.items():
            rows.append(replace(blank, variant=name, phase=phase, error=errors[name]).timed(timing))
    return rows, good


def step_memory(variant: Variant, device: torch.device) -> tuple[float, float]:
    """MiB of a step at its peak without the output and gradients that it returns, and kept for the backward pass."""
    returned = sum(x.nbytes for x in (variant.grad, *variant.leaves))
    peak = peak_memory(variant.both, device) - returned
    return peak / MIB, saved_bytes(variant.forward, variant.leaves) / MIB


def main(argv: Sequence[str] | None = None) -> int:
    parse = common.parser(__doc__.splitlines()[0])
    parse.add_argument("--dtypes", help="comma-separated, default float32 on the CPU, bfloat16 and float32 on CUDA")
    parse.add_argument("--batch", type=int, help="samples, default 64 on CUDA, 1 on the CPU")
    parse.add_argument("--graph", action="store_true", help="time replays of CUDA graphs")
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse.parse_args(argv)
    device = common.begin(args)
    cuda = device.type == "cuda"
    cases = all_cases(args.batch or (64 if cuda else 1))
    hidden = ["tiny", *(name for name in cases if args.quick and name.startswith("full-wide"))]
    cases = {name: cases[name] for name in common.chosen(cases, args.cases, hidden)}
    names = common.chosen(VARIANTS, args.variants, ["two_sdpa_compiled"] if args.quick and not cuda else [])
    dtypes = [DTYPES[name] for name in common.chosen(DTYPES, args.dtypes, ["float16", *(["bfloat16"] * (not cuda))])]
    if args.memory_of:
        found = {}
        for case in cases.values():
            for dtype in dtypes:
                warm = replace(case, batch=1, audio=2, visual=2)
                Variant.build(args.memory_of, warm, dtype, device).both()
                variant = Variant.build(args.memory_of, case, dtype, device)
                if args.memory_of.endswith("_compiled"):
                    variant.both()
                found[f"{case.name} {dtype}"] = step_memory(variant, device)
        print(json.dumps(found))
        return 0

    machine, floors = common.header(device, dtypes)
    used: dict[str, Memory] = {}
    if not cuda:
        used = {name: memory_in_subprocess(__file__, argv, name) for name in names}
    rows: list[Row] = []
    rounds = args.rounds or (50 if cuda else 5 if args.quick else 15)
    budget = float("inf") if args.rounds else 5.0 if args.quick else 30.0
    for case in cases.values():
        counts = {name: gflop(name, case) for name in names}
        least = gflop(OURS, case)
        for dtype in dtypes:
            new, variants = measure(case, dtype, device, names, rounds, budget, args.graph)
            for i, row in enumerate(new):
                if row.median_ms is None:
                    continue
                note, ideal = f"{counts[row.variant]:.4g} GFLOP forward", counts[row.variant] / least
                row = replace(row, note=note, ideal=ideal)
                new[i] = floors.share(row, dtype, {"forward": 1, "backward": 2, "both": 3}[row.phase] * least * 1e9)
                if row.phase != "both":
                    continue
                found = used.get(row.variant, {}).get(f"{case.name} {dtype}")
                found = step_memory(variants[row.variant], device) if cuda else found
                if found:
                    new[i] = replace(new[i], peak_mib=found[0], saved_mib=found[1])
            rows += common.report("pair_attention", new, machine, args.csv)
            del variants
    return common.finish("pair_attention", rows, machine, args.csv, not args.bare)


if __name__ == "__main__":
    sys.exit(main())
