"""AVBERT's three transformers: what sharing weights saves, and the step against the same without our operators.

    python benchmarks/avbert.py [--quick] [--cases 'B*'] [--variants 'avfast,cached*'] [--positions 30]

Cases `B4` to `B32` are so many clips: the visual and the audio transformer on 31 tokens each, the multimodal one on 62,
forward and backward, gradients of all inputs and weights, scheme `part` (no optimiser). `recomputed` and `cached` are
its twins in plain PyTorch, as the released code has it: queries, keys and values projected one after the other, each by
normalize(x V^T), Sigma and U, every factor a parameter of its own. `recomputed` takes the exponential of a rotation
wherever it is used; `cached` all of them once in a step, in one batched torch.linalg.matrix_exp; `cached_compiled` is
that under torch.compile, on CUDA with mode="reduce-overhead". First each is held against the twin in float64. On CUDA
`avfast` and `cached` also run from a graph.

The other cases are sharing schemes, ours alone and with the optimiser (AdamW with AMSGrad): their note says how many
parameters and how much memory for its state. The floor is our FLOPs at the rate of a large product.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import common
import torch
import torch.nn.functional as F
from common import OURS, Row
from memory import MIB, Memory, memory_in_subprocess, peak_memory, saved_bytes
from torch import Tensor, nn

from avfast import flops
from avfast.nn import SharedLowRankTransformer

SCHEMES = ("none", "layers", "transformers", "all", "part", "part_att")
VARIANTS = (OURS, "recomputed", "cached", "cached_compiled")
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0, "rank": 8}
PROJECTIONS = (("attention.0.qkv", 3), ("attention.0.proj", 1), ("mlp.0.fc1", 1), ("mlp.0.fc2", 1))


@dataclass(frozen=True)
class Case:
    """So many clips of so many positions; a sharing scheme with its optimiser, or the twins."""

    clips: int
    positions: int
    sharing: str | None = None
    tiny: bool = False
    depth: int = 6

    def module(self) -> SharedLowRankTransformer:
        torch.manual_seed(0)
        sizes = TINY if self.tiny else {"depth": self.depth}
        module = SharedLowRankTransformer(**sizes, sharing=self.sharing or "part", init_std=0.05)
        with torch.no_grad():  # rotations as after some training, of spectral norm 2 or less
            for skew in module.orthogonal_parameters():
                skew.add_(torch.randn_like(skew), alpha=0.5 * skew.shape[-1] ** -0.5)
        return module

    def inputs(self, width: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        lengths = (1 + self.positions, 1 + self.positions, 2 + 2 * self.positions)
        return [torch.randn(self.clips, n, width, generator=generator) for n in lengths]


class Ours(nn.Module):
    """``forward(visual, audio, multimodal)`` to the three outputs."""

    def __init__(self, module: SharedLowRankTransformer) -> None:
        super().__init__()
        self.module = module

    def forward(self, *tokens: Tensor) -> list[Tensor]:
        factors = self.module.factors()
        return [self.module(x, i, factors) for i, x in enumerate(tokens)]

    def gradients(self) -> dict[str, Tensor]:
        """By the twin's names."""
        return pieces({name: p.grad for name, p in self.module.named_parameters()})


def pieces(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters, or what belongs to them, cut into those of the twin."""
    found = {f"norms.{name}": x for name, x in tensors.items() if "norm" in name}
    rotations = tensors["skew"].unflatten(0, (-1, len(tensors[f"{PROJECTIONS[0][0]}.v"])))
    kind = 0
    for name, chunks in PROJECTIONS:
        for chunk in range(chunks):
            found |= {f"u.{kind}": tensors[f"{name}.u"][chunk], f"bias.{kind}": tensors[f"{name}.bias"][chunk]}
            for i, v in enumerate(tensors[f"{name}.v"]):
                found |= {f"v.{kind}.{i}": v.chunk(chunks)[chunk], f"a.{kind}.{i}": rotations[kind, i]}
            kind += 1
    return found


class Twin(nn.Module):
    """The same in PyTorch's operators, a parameter for every factor."""

    def __init__(self, ours: SharedLowRankTransformer, cached: bool) -> None:
        super().__init__()
        self.depths, self.heads, self.cached = ours.depths, ours.attention[0].num_heads, cached
        found = pieces({name: p.detach() for name, p in ours.named_parameters()})
        self.names = list(found)
        self.weights = nn.ParameterList(nn.Parameter(x.clone()) for x in found.values())

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in zip(self.names, self.weights, strict=True)}

    def forward(self, *tokens: Tensor) -> list[Tensor]:
        p = dict(zip(self.names, self.weights, strict=True))
        sigma: dict[str, Tensor] = {}
        if self.cached:
            names = [name for name in self.names if name.startswith("a.")]
            sigma = dict(zip(names, rotation(torch.stack([p[name] for name in names])).unbind(), strict=True))
        return [self.transformer(x, i, p, sigma) for i, x in enumerate(tokens)]

    def transformer(self, x: Tensor, i: int, p: dict[str, Tensor], sigma: dict[str, Tensor]) -> Tensor:
        def project(x: Tensor, kind: int) -> Tensor:
            name = f"a.{kind}.{i}"
            turned = F.normalize(F.linear(x, p[f"v.{kind}.{i}"]), dim=-1) @ (
                sigma[name] if self.cached else rotation(p[name])
            )
            return F.linear(turned, p[f"u.{kind}"], p[f"bias.{kind}"])

        def norm(x: Tensor, name: str) -> Tensor:
            weight, bias = p[f"norms.{name}.0.norm.weight"], p[f"norms.{name}.0.norm.bias"]
            return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-12)

        for _ in range(self.depths[i]):
            q, k, v = (project(x, kind).unflatten(-1, (self.heads, -1)).transpose(1, 2) for kind in range(3))
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = norm(x + project(attended, 3), "attention")
            x = norm(x + project(F.gelu(project(x, 4)), 5), "mlp")
        return x


def rotation(a: Tensor) -> Tensor:
    """In float32 whatever autocast says."""
    with torch.autocast(a.device.type, enabled=False):
        upper = a.triu(1)
        return torch.linalg.matrix_exp(upper - upper.mT)


class Step:
    """A form of the transformers and what it runs on; the loss is a fixed linear function of all outputs."""

    def __init__(self, form: nn.Module, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        exact = dtype == torch.float64
        self.form = form.to(device, dtype) if exact else form.to(device)
        self.device, self.dtype = device, dtype
        width = next(iter(form.modules())).module.embed_dim if isinstance(form, Ours) else form.weights[0].shape[0]
        self.tokens = [x.to(device).requires_grad_() for x in case.inputs(width)]
        self.weights = [torch.cos(torch.arange(x.numel()).view(x.shape)).to(device) for x in self.tokens]
        if exact:
            self.tokens = [x.detach().double().requires_grad_() for x in self.tokens]
        self.call: Callable[..., list[Tensor]] = self.form
        self.optimizer: torch.optim.Optimizer | None = None

    def loss(self) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        half = self.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(self.device.type, self.dtype if half else torch.bfloat16, enabled=half):
            outs = self.call(*self.tokens)
        return sum((out * w).sum() for out, w in zip(outs, self.weights, strict=True))

    def clear(self) -> None:
        self.form.zero_grad(set_to_none=True)
        for x in self.tokens:
            x.grad = None

    def both(self) -> None:
        self.clear()
        self.loss().backward()

    def phases(self) -> dict[str, Callable[[], object]]:
        state: dict[str, Tensor] = {}

        def forward() -> None:
            self.clear()
            state["loss"] = self.loss()

        found: dict[str, Callable[[], object]] = {
            "forward": forward,
            "backward": lambda: state.pop("loss").backward(),
        }
        return found if self.optimizer is None else found | {"optimiser": self.optimizer.step}

    def results(self) -> tuple[float, list[Tensor]]:
        """The loss, and all gradients by the twin's names in order, concatenated by kind and each input's."""
        self.clear()
        loss = self.loss()
        loss.backward()
        grads = self.form.gradients()
        kinds: dict[str, list[Tensor]] = {}
        for name in sorted(grads):
            kinds.setdefault(name[:4], []).append(grads[name].detach().flatten().double())
        found = [torch.cat(parts) for parts in kinds.values()] + [x.grad.detach().double() for x in self.tokens]
        self.clear()
        return loss.item(), found

    def memory(self) -> tuple[float, float]:
        """MiB at the peak of a step, gradients included, and kept for the backward pass."""
        self.clear()
        peak = peak_memory(self.both, self.device) / MIB
        self.clear()
        return peak, saved_bytes(self.loss, [*self.form.parameters(), *self.tokens]) / MIB


def build(variant: str, case: Case, device: torch.device, dtype: torch.dtype) -> Step:
    module = case.module()
    step = Step(Ours(module) if variant == OURS else Twin(module, variant != "recomputed"), case, device, dtype)
    if variant.endswith("compiled"):
        step.call = torch.compile(step.form, mode="reduce-overhead" if device.type == "cuda" else None, dynamic=False)
    return step


def difference(got: Step, want: list[Tensor]) -> float:
    """The largest RMS ratio of a kind of gradients."""
    return common.rms_error(got.results()[1], want)


def twins(
    case: Case, blank: Row, device: torch.device, dtype: torch.dtype, args, memory: dict[str, Memory]
) -> list[Row]:
    """Rows of all forms that pass the gate, timed in turns."""
    small = replace(case, clips=min(case.clips, 4))
    exact = build("cached", small, device, torch.float64).results()[1]
    plain = difference(build("cached", small, device, dtype), exact)
    bound = 1e-4 if dtype == torch.float32 else 2 * plain
    runs: dict[str, common.Phases] = {}
    rows, errors, steps = [], {}, {}
    for variant in args.forms:
        try:
            errors[variant] = difference(build(variant, small, device, dtype), exact)
            steps[variant] = build(variant, case, device, dtype)
            for _ in range(3 if device.type == "cuda" else 1):
                steps[variant].both()
        except Exception as problem:  # one form that fails must not end the run
            rows.append(replace(blank, variant=variant, note=f"failed: {common.reason(problem)}"))
            continue
        if variant == OURS and errors[variant] > bound:
            note = f"REFUSED: error above {bound:.1e}"
            rows.append(replace(blank, variant=variant, error=errors[variant], note=note))
            continue
        runs[variant] = steps[variant].phases()
        if device.type == "cuda" and not variant.endswith("compiled"):
            graphs, failures = common.captured({f"{variant}+graph": steps[variant].both})
            runs |= graphs
            rows += [replace(blank, variant=variant, launch="graph", note=why) for why in failures.values()]
            steps[variant].clear()
    work = flop(case)
    for label, timings in common.interleave(runs, device, rounds=args.rounds, budget=args.budget).items():
        variant, _, launch = label.partition("+")
        for phase, timing in timings.items():
            launch = launch or ("compile" if variant.endswith("compiled") else "eager")
            row = replace(blank, variant=variant, phase=phase, launch=launch, error=errors[variant]).timed(timing)
            if phase == "both":
                row = args.floors.share(row, dtype, work)
                row = replace(row, clips_per_s=case.clips / timing.median)
                found = steps[variant].memory() if device.type == "cuda" else memory.get(variant, {}).get(blank.case)
                if found and launch != "graph":
                    row = replace(row, peak_mib=found[0], saved_mib=found[1])
            rows.append(row)
    return rows


def flop(case: Case) -> float:
    """Of our step without an optimiser, counted on meta."""
    module = case.module().to("meta")
    tokens = [x.to("meta").requires_grad_() for x in case.inputs(module.embed_dim)]
    return float(flops.count(lambda: sum(x.sum() for x in Ours(module)(*tokens)), backward=True))


def scheme(case: Case, blank: Row, device: torch.device, dtype: torch.dtype, args) -> list[Row]:
    """Rows of a whole step of ours, the optimiser's memory in the note."""
    step = build(OURS, case, device, dtype)
    fused = device.type == "cuda"
    step.optimizer = torch.optim.AdamW(step.form.parameters(), 1e-4, (0.9, 0.98), amsgrad=True, fused=fused)
    for _ in range(2):
        step.both()
        step.optimizer.step()
    count = sum(p.numel() for p in step.form.parameters())
    state = sum(x.nbytes for each in step.optimizer.state.values() for x in each.values() if isinstance(x, Tensor))
    note = f"{count:,} parameters, {state / MIB:.0f} MiB optimiser"
    runs = {case.sharing: step.phases()}
    rows = []
    for phase, timing in common.interleave(runs, device, rounds=args.rounds, budget=args.budget)[case.sharing].items():
        rows.append(replace(blank, variant=OURS, phase=phase, note=note).timed(timing))
        if phase == "both":
            rows[-1] = replace(args.floors.share(rows[-1], dtype, flop(case)), clips_per_s=case.clips / timing.median)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parse = common.parser(__doc__.splitlines()[0])
    parse.add_argument("--positions", type=int, default=30, help="one-second clips of a sequence, T")
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse.parse_args(argv)
    device = common.begin(args)
    cuda = device.type == "cuda"
    depth = 1 if args.quick and not cuda else 6
    make = partial(Case, positions=args.positions, depth=depth)
    cases = {f"B{clips}": make(clips) for clips in (4, 8, 16, 32)}
    cases |= {name: make(32 if cuda else 4, sharing=name) for name in SCHEMES}
    cases |= {"tiny": Case(2, 3, tiny=True), "tiny-part": Case(2, 3, "part", tiny=True)}
    hidden = ["tiny", "tiny-part", *([] if cuda else ["B4", "B16", "B32"])]
    names = common.chosen(cases, args.cases, hidden)
    args.forms = common.chosen(VARIANTS, args.variants, ["cached_compiled"] if args.quick and not cuda else [])
    args.budget = float("inf") if args.rounds else 20.0 if args.quick else 120.0
    args.rounds = args.rounds or (30 if cuda else 3 if args.quick else 15)
    dtype = torch.bfloat16 if cuda else torch.float32
    if args.memory_of:
        build(args.memory_of, cases["tiny"], device, dtype).both()
        found = {name: build(args.memory_of, cases[name], device, dtype) for name in names if not cases[name].sharing}
        if args.memory_of.endswith("compiled"):
            for step in found.values():
                step.both()
        print(json.dumps({name: step.memory() for name, step in found.items()}))
        return 0

    machine, args.floors = common.header(device, [dtype])
    memory: dict[str, Memory] = {}
    if not cuda and any(not cases[name].sharing for name in names):
        memory = {form: memory_in_subprocess(__file__, argv, form) for form in args.forms}
    rows: list[Row] = []
    for name in names:
        blank = Row("avbert", name, "", str(dtype)[6:], "both")
        case = cases[name]
        if case.sharing:
            new = scheme(case, blank, device, dtype, args)
        else:
            new = twins(case, blank, device, dtype, args, memory)
        rows += common.report("avbert", new, machine, args.csv)
    return common.finish("avbert", rows, machine, args.csv, not args.bare)


if __name__ == "__main__":
    sys.exit(main())
