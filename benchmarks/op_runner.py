"""Times an operator, forward and backward, against other ways to compute it: what the scripts of small operators share.

Every variant is first held against float64, gradients included. Peak memory is what a step takes beyond its inputs,
output and gradients, which are the same for all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import common
import torch
from common import OURS, Row
from memory import MIB, Memory, memory_in_subprocess, peak_memory, saved_bytes
from torch import Tensor

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16)}
C = TypeVar("C")


@dataclass(frozen=True)
class Operator(Generic[C]):
    """An operator, and how its cases are computed.

    Args:
        name: of the script and its results.
        cases: by name, for a batch.
        variants: by name, ``call(case, *leaves, *constants) -> Tensor``; those ending in ``_compiled`` are compiled.
            The first that is not ours is the plain one.
        inputs: for a case, dtype and device its leaves, whose gradients are asked for, and its constants.
        moved: bytes that have to be read and written in the forward and in the backward pass.
        flops: of the forward pass; `backward` times as many are those of the backward pass.
        hidden: cases that run when they are named only.
        unlike: variants that compute something else for the same purpose, held against themselves in float64.
    """

    name: str
    cases: Callable[[int], dict[str, C]]
    variants: Mapping[str, Callable[..., Tensor | tuple[Tensor, ...]]]
    inputs: Callable[[C, torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]]
    moved: Callable[[C, torch.dtype], tuple[float, float]]
    flops: Callable[[C], float] = lambda case: 0.0
    backward: float = 2.0
    hidden: tuple[str, ...] = ("tiny",)
    unlike: tuple[str, ...] = ()

    def step(self, name: str, case: C, dtype: torch.dtype, device: torch.device, exact: bool = False) -> Step:
        torch.manual_seed(0)
        leaves, constants = self.inputs(case, dtype, device)
        if exact:
            wide = [x.double() if x.is_floating_point() else x for x in (*leaves, *constants)]
            leaves, constants = wide[: len(leaves)], wide[len(leaves) :]
        call = self.variants[name]
        if name.endswith("_compiled"):
            call = torch.compile(call, dynamic=False)
        return Step(lambda *tensors: call(case, *tensors), [x.requires_grad_() for x in leaves], constants)

    @property
    def plain(self) -> str:
        return next(name for name in self.variants if not name.startswith(OURS))


@dataclass
class Step:
    """A call and its inputs."""

    call: Callable[..., Tensor | tuple[Tensor, ...]]
    leaves: list[Tensor]
    constants: list[Tensor]
    _grads: list[Tensor] | None = None

    def forward(self) -> list[Tensor]:
        """Outputs."""
        found = self.call(*self.leaves, *self.constants)
        return list(found) if isinstance(found, tuple) else [found]

    def grads(self, outs: list[Tensor]) -> list[Tensor]:
        """Of the outputs, made once: fixed values of both signs."""
        if self._grads is None:
            values = [torch.arange(x.numel(), device=x.device).view(x.shape) % 7 - 2.5 for x in outs]
            self._grads = [value.to(x.dtype) for value, x in zip(values, outs, strict=True)]
        return self._grads

    def both(self) -> list[Tensor]:
        """Outputs and gradients."""
        outs = self.forward()
        return [*(x.detach() for x in outs), *torch.autograd.grad(outs, self.leaves, self.grads(outs))]

    def phases(self) -> dict[str, Callable[[], object]]:
        """The two halves of a step."""
        state: dict[str, list[Tensor]] = {}

        def forward() -> None:
            state["outs"] = self.forward()

        def backward() -> None:
            outs = state.pop("outs")
            torch.autograd.grad(outs, self.leaves, self.grads(outs))

        return {"forward": forward, "backward": backward}

    def memory(self, device: torch.device) -> tuple[float, float]:
        """MiB at the peak without what is returned, and kept for the backward pass."""
        returned = sum(x.nbytes for x in (*self.grads(self.forward()), *self.leaves))
        present = [*self.leaves, *self.constants]
        peak = peak_memory(self.both, device) - returned
        return peak / MIB, saved_bytes(self.forward, present) / MIB


def measure(op: Operator, case: object, name: str, dtype: torch.dtype, device: torch.device, names: Sequence[str],
            rounds: int, budget: float, graph: bool) -> tuple[list[Row], dict[str, Step]]:  # fmt: skip
    """Rows with error and times, and the variants that passed."""
    want = op.step(op.plain, case, dtype, device, exact=True).both()
    plain = common.rms_error(op.step(op.plain, case, dtype, device).both(), want)
    bound = common.limit(dtype, plain)
    blank = Row(op.name, name, "", str(dtype)[6:], "both", "graph" if graph else "eager")
    rows, good, errors, notes = [], {}, {}, dict.fromkeys(op.unlike, common.UNLIKE)
    for variant in names:
        try:
            step = op.step(variant, case, dtype, device)
            exact = op.step(variant, case, dtype, device, exact=True).both() if variant in op.unlike else want
            errors[variant] = common.rms_error(step.both(), exact)
        except Exception as problem:  # a baseline that fails must not end the run
            rows.append(replace(blank, variant=variant, note=f"failed: {common.reason(problem)}"))
            continue
        allowed = bound if variant.startswith(OURS) else max(bound, 2 * plain)  # what is beaten need not be better
        if errors[variant] <= allowed:
            good[variant] = step
        else:
            rows.append(replace(blank, variant=variant, error=errors[variant], note=f"REFUSED: above {allowed:.1e}"))
    del want
    steps = {variant: step.phases() for variant, step in good.items()}
    if graph:
        steps, failures = common.captured({variant: step.both for variant, step in good.items()})
        rows += [replace(blank, variant=v, error=errors[v], note=why) for v, why in failures.items()]
    for variant, timings in common.interleave(steps, device, rounds=rounds, budget=budget).items():
        for phase, timing in timings.items():
            row = replace(blank, variant=variant, phase=phase, error=errors[variant], note=notes.get(variant, ""))
            rows.append(row.timed(timing))
    return rows, good


def main(op: Operator, script: str, description: str, argv: Sequence[str] | None = None) -> int:
    """The command line of a script."""
    parse = common.parser(description)
    parse.add_argument("--dtypes", help="comma-separated, default float32 on the CPU, bfloat16 and float32 on CUDA")
    parse.add_argument("--batch", type=int, help="samples, default 64 on CUDA, 8 on the CPU")
    parse.add_argument("--graph", action="store_true", help="time replays of CUDA graphs")
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse.parse_args(argv)
    device = common.begin(args)
    cuda = device.type == "cuda"
    cases = op.cases(args.batch or (64 if cuda else 2 if args.quick else 8))
    cases = {name: cases[name] for name in common.chosen(cases, args.cases, op.hidden)}
    compiled = [name for name in op.variants if name.endswith("_compiled")]
    names = common.chosen(op.variants, args.variants, compiled if args.quick and not cuda else [])
    dtypes = [DTYPES[name] for name in common.chosen(DTYPES, args.dtypes, ["float16", *(["bfloat16"] * (not cuda))])]
    if args.memory_of:
        found = {}
        for name, case in cases.items():
            for dtype in dtypes:
                op.step(args.memory_of, op.cases(1)["tiny"], dtype, device).both()
                step = op.step(args.memory_of, case, dtype, device)
                if args.memory_of in compiled:
                    step.both()
                found[f"{name} {dtype}"] = step.memory(device)
        print(json.dumps(found))
        return 0

    machine, floors = common.header(device, dtypes)
    used: dict[str, Memory] = {}
    if not cuda:
        used = {name: memory_in_subprocess(script, argv, name) for name in names}
    rows: list[Row] = []
    rounds = args.rounds or (50 if cuda else 5 if args.quick else 15)
    budget = float("inf") if args.rounds else 5.0 if args.quick else 30.0
    for name, case in cases.items():
        flops = op.flops(case)
        for dtype in dtypes:
            new, steps = measure(op, case, name, dtype, device, names, rounds, budget, args.graph)
            moved = op.moved(case, dtype)
            back = op.backward * flops
            work = {"forward": (flops, moved[0]), "backward": (back, moved[1]), "both": (flops + back, sum(moved))}
            for i, row in enumerate(new):
                if row.median_ms is None:
                    continue
                new[i] = floors.share(row, dtype, *work[row.phase])
                found = used.get(row.variant, {}).get(f"{name} {dtype}")
                if row.phase == "both" and (cuda or found):
                    peak, saved = steps[row.variant].memory(device) if cuda else found
                    new[i] = replace(new[i], peak_mib=peak, saved_mib=saved)
            rows += common.report(op.name, new, machine, args.csv)
            del steps
    return common.finish(op.name, rows, machine, args.csv, not args.bare)
