"""Pre-training steps: what models and masking ratios cost, and AVSiam's packed step against other schedules.

    python benchmarks/avsiam.py [--quick] [--cases 'encoder*'] [--size base] [--pairs 96] [--compile]

`encoder-*` is the contrastive step (embedding, encoder, InfoNCE), `full-*` the joint objective with fusion layers and
decoder; both are one forward and one backward pass without the optimiser, which is the same for all. Every schedule
starts from the same weights and draws, and is first held against the padded one in float32: loss and all gradients.
`ideal` is how much faster the packed step would be if time went with FLOPs. `models` and `masking` compare steps of
different models and of different ratios.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import attention
import common
import torch
from attention_cases import MIXES
from avsiam_variants import GroupByGroup, PackedGroups, PackedVarlen, Padded, Variant
from common import OURS, Row
from memory import MIB, Memory, memory_in_subprocess, peak_memory, saved_bytes
from torch import Tensor, nn

from avfast import flops
from avfast.models import create_model

FLOAT_LIMIT, HALF_LIMIT = 1e-4, 0.02
RATIOS = {"0-50": MIXES["mix-0-50"], "0-80": MIXES["mix-0-80"]}
RELEASED = {
    "objective": "released", "mask_ratios": RATIOS["0-80"], "audio_structure": "time_frequency", "norm_pix": False,
    "stop_gradient": False,
}  # fmt: skip
MASKING = {"none": (0.0,), "25 %": (0.25,), "50 %": (0.5,), "75 %": (0.75,), "multi-ratio": RATIOS["0-50"]}
CASES = [f"{step}-{name}" for step in ("encoder", "full") for name in RATIOS] + ["models", "masking", "tiny"]
SCHEDULES = {
    "padded": Padded,
    "group_by_group": GroupByGroup,
    "packed_groups": PackedGroups,
    "packed_varlen": PackedVarlen,
}
Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Step:
    """One forward and backward pass of ``loss`` over the parameters of ``module``."""

    module: nn.Module
    loss: Loss

    def phases(self) -> dict[str, Callable[[], object]]:
        state: dict[str, Tensor] = {}

        def forward() -> None:
            self.module.zero_grad(set_to_none=True)
            state["loss"] = self.loss()

        return {"forward": forward, "backward": lambda: state.pop("loss").backward()}

    def both(self) -> None:
        self.module.zero_grad(set_to_none=True)
        self.loss().backward()

    def results(self) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients."""
        self.module.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        grads = {name: p.grad.float() for name, p in self.module.named_parameters() if p.grad is not None}
        self.module.zero_grad(set_to_none=True)
        return loss.item(), grads


def difference(got: tuple[float, dict[str, Tensor]], want: tuple[float, dict[str, Tensor]]) -> float:
    """The larger of the loss's relative error and the RMS ratio of all gradients taken together."""
    if got[1].keys() != want[1].keys():
        return math.inf
    squares = [((got[1][k] - want[1][k]).double().square().sum(), want[1][k].double().square().sum()) for k in want[1]]
    grads = (sum(a for a, _ in squares) / sum(b for _, b in squares)).sqrt().item()
    error = max(abs(got[0] - want[0]) / abs(want[0]), grads)
    return error if math.isfinite(error) else math.inf


@dataclass(frozen=True)
class Setting:
    """What a run measures."""

    device: torch.device
    dtype: torch.dtype
    size: str
    pairs: int | None
    depth: int | None
    compile: bool
    variants: str | None
    rounds: int
    budget: float

    def model(self, name: str, **overrides) -> nn.Module:
        torch.manual_seed(0)
        if self.depth is not None:
            overrides = {"depth": self.depth, "decoder_depth": min(self.depth, 6), **overrides}
        return create_model(name, **overrides).to(self.device)

    def inputs(self, model: nn.Module, pairs: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        shapes = (pairs, *model.audio_size), (pairs, 3, model.img_size, model.img_size)
        return tuple(torch.randn(shape, generator=generator).to(self.device) for shape in shapes)

    def autocast(self, loss: Loss) -> Loss:
        def run() -> Tensor:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                return loss()

        return run

    def row(self, case: str, pairs: int) -> Row:
        depth = "" if self.depth is None else f" depth {self.depth}"
        name = f"{case} {self.size}{depth} {pairs} pairs"
        return Row("avsiam", name, "", str(self.dtype).removeprefix("torch."), "both")


@dataclass(frozen=True)
class Bench:
    """A model's step in several schedules: ``losses`` by (variant, launch), FLOPs of a step by variant."""

    row: Row
    pairs: int
    model: nn.Module
    reference: Loss
    losses: dict[tuple[str, str], Step]
    flops: dict[str, int]


def schedules(setting: Setting, case: str) -> Bench:
    """AVSiam's step as every schedule runs it."""
    part, ratios = ("full", "0-50") if case == "tiny" else case.split("-", 1)
    size = "tiny" if case == "tiny" else setting.size
    setting = replace(setting, size=size)
    weights = {} if part == "full" else {"reconstruction_weight": 0.0}
    model = setting.model(f"avsiam_{size}", mask_ratios=RATIOS[ratios], **weights)
    pairs = setting.pairs or (96 if setting.device.type == "cuda" else len(RATIOS[ratios]))
    audio, visual = setting.inputs(model, pairs)
    draws = model.draw(pairs, torch.Generator().manual_seed(2)).to(setting.device)
    parts = ("contrastive", "reconstruction") if part == "full" else ("contrastive",)
    modules = {name: build(model, draws, parts) for name, build in SCHEDULES.items() if _runs(name, setting)}
    losses = {OURS: lambda: model(audio, visual, draws).loss}
    losses |= {name: lambda module=module: module(audio, visual) for name, module in modules.items()}
    steps = {(name, "eager"): Step(model, setting.autocast(loss)) for name, loss in losses.items()}
    if setting.compile:
        compiled = {name: torch.compile(module, dynamic=False) for name, module in {OURS: model, **modules}.items()}
        fast = {name: lambda run=run: run(audio, visual) for name, run in compiled.items()}
        fast[OURS] = lambda: compiled[OURS](audio, visual, draws).loss
        steps |= {(name, "compile"): Step(model, setting.autocast(loss)) for name, loss in fast.items()}
    if part == "full" and size != "tiny" and setting.device.type == "cuda":
        steps["released_two_branches", "eager"] = released(setting, pairs, audio, visual)
    counts = {"padded": count(Padded, model, draws, parts), OURS: count(PackedGroups, model, draws, parts)}
    reference = Padded(model, draws, parts)
    reference.recompute = True  # in float32 what 96 pairs keep would fill a GPU
    return Bench(setting.row(case, pairs), pairs, model, lambda: reference(audio, visual), steps, counts)


def released(setting: Setting, pairs: int, audio: Tensor, visual: Tensor) -> Step:
    """Both passes of the released objective, one after the other, group by group."""
    model = setting.model(f"avsiam_{setting.size}", **{**RELEASED, "decoder_depth": setting.depth or 8})
    passes = [
        GroupByGroup(model, model.draw(pairs, torch.Generator().manual_seed(2), only=only), (only,))
        for only in model.passes
    ]
    # The passes share no activation, so one backward pass of the sum is the work of two.
    return Step(model, setting.autocast(lambda: sum(one(audio, visual) for one in passes)))


def count(build: type[Variant], model: nn.Module, draws, parts: Sequence[str]) -> int:
    """FLOPs of a step, counted on meta tensors in plain operators."""
    blank = copy.deepcopy(model).to("meta")
    pairs, size = len(draws.audio_keep.lengths), blank.img_size
    audio = torch.empty(pairs, *blank.audio_size, device="meta")
    visual = torch.empty(pairs, 3, size, size, device="meta")
    return flops.count(build(blank, draws.to("meta"), parts), audio, visual, backward=True)


def _runs(name: str, setting: Setting) -> bool:
    return name != "packed_varlen" or (setting.device.type == "cuda" and setting.dtype != torch.float32)


def compare(setting: Setting, bench: Bench, floors: common.Floors, memory: dict[str, Memory]) -> list[Row]:
    """Rows of all schedules that pass the gate."""
    want = Step(bench.model, bench.reference).results()
    names = common.chosen(dict.fromkeys(name for name, _ in bench.losses), setting.variants)
    rows, good, errors = [], {}, {}
    plain = 0.0
    if setting.dtype != torch.float32:
        plain = difference(Step(bench.model, setting.autocast(bench.reference)).results(), want)
    bound = FLOAT_LIMIT if setting.dtype == torch.float32 else max(HALF_LIMIT, 2 * plain)
    for (name, launch), step in bench.losses.items():
        row = replace(bench.row, variant=name, launch=launch)
        if name not in names:
            continue
        try:
            own = step.module is bench.model
            errors[name, launch] = difference(step.results(), want) if own else 0.0
            if errors[name, launch] > bound:
                rows.append(replace(row, error=errors[name, launch], note=f"REFUSED: error above {bound:.1e}"))
                continue
            good[name, launch] = step.phases()
            if not own:
                step.both()
            if setting.device.type == "cuda" and launch in ("eager", "compile"):
                mode = "graph" if launch == "eager" else "compile+graph"
                step.module.zero_grad(set_to_none=True)
                graphs, failures = common.captured({mode: step.both})
                rows += [replace(row, launch=mode, note=why) for why in failures.values()]
                for phases in graphs.values():
                    good[name, mode], errors[name, mode] = phases, errors[name, launch]
        except Exception as problem:  # one schedule that fails must not end the run
            rows.append(replace(row, note=f"failed: {common.reason(problem)}"))
    labels = {f"{name}/{launch}": (name, launch) for name, launch in good}
    timed = common.interleave(
        {label: good[key] for label, key in labels.items()},
        setting.device,
        rounds=setting.rounds,
        budget=setting.budget,
    )
    for label, (name, launch) in labels.items():
        for phase, timing in timed[label].items():
            row = replace(bench.row, variant=name, launch=launch, phase=phase).timed(timing)
            if phase == "both":
                row = floors.share(row, setting.dtype, bench.flops[OURS])
                ideal = bench.flops.get(name, bench.flops[OURS]) / bench.flops[OURS]
                ideal = None if name == "released_two_branches" else ideal
                row = replace(row, clips_per_s=bench.pairs / timing.median, ideal=ideal, error=errors[name, launch])
                found = memory.get(name, {}).get(row.case)
                if setting.device.type == "cuda" and launch == "eager":
                    found = step_memory(bench.losses[name, launch], setting.device)
                if found and launch == "eager":
                    row = replace(row, peak_mib=found[0], saved_mib=found[1])
            rows.append(row)
    print(f"\n{bench.row.case}: FLOPs of a step: packed {bench.flops[OURS]:.4g}, padded {bench.flops['padded']:.4g}")
    return rows


def step_memory(step: Step, device: torch.device) -> tuple[float, float]:
    """MiB of a warm step at its peak, gradients included, and kept for the backward pass."""
    step.module.zero_grad(set_to_none=True)
    peak = peak_memory(step.both, device)
    saved = saved_bytes(step.loss, step.module.parameters())
    return peak / MIB, saved / MIB


def costs(setting: Setting, case: str) -> tuple[Row, int, dict[str, Step]]:
    """Steps of different models, or of AVSiam at different masking ratios."""
    pairs = setting.pairs or (96 if setting.device.type == "cuda" else 6 if setting.size == "tiny" else 2)
    if case == "masking":
        models = {name: setting.model(f"avsiam_{setting.size}", mask_ratios=ratios) for name, ratios in MASKING.items()}
    else:
        models = {
            "AVSiam": setting.model(f"avsiam_{setting.size}"),
            "AVSep": setting.model(f"avsiam_{setting.size}", shared=False),
        }
        if setting.size in ("tiny", "base"):
            models["CAV-MAE"] = setting.model(f"cav_mae_{setting.size}")
    steps = {}
    for name, model in models.items():
        audio, visual = setting.inputs(model, pairs)
        draws = model.draw(pairs, torch.Generator().manual_seed(2)).to(setting.device)
        loss = setting.autocast(lambda m=model, a=audio, v=visual, d=draws: m(a, v, d).loss)
        steps[name] = Step(model, loss)
    return setting.row(case, pairs), pairs, steps


def table(setting: Setting, case: str, memory: dict[str, Memory]) -> list[Row]:
    """Clips per second and memory of :func:`costs`; the gate is that of the attention they all use."""
    blank, pairs, steps = costs(setting, case)
    error, right = attention.gate(setting.device, setting.dtype)
    names = common.chosen(steps, setting.variants) if setting.variants else list(steps)
    if not right:
        return [replace(blank, variant=n, error=error, note="REFUSED: packed_attention is wrong") for n in names]
    for name in names:
        steps[name].both()
    chosen = {name: steps[name].phases() for name in names}
    rows = []
    timed = common.interleave(chosen, setting.device, rounds=setting.rounds, budget=setting.budget)
    for name, timings in timed.items():
        row = replace(blank, variant=name, error=error).timed(timings["both"])
        row = replace(row, clips_per_s=pairs / timings["both"].median)
        found = step_memory(steps[name], setting.device) if setting.device.type == "cuda" else None
        found = found or memory.get(case, {}).get(name)
        if found:
            row = replace(row, peak_mib=found[0], saved_mib=found[1])
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parse = common.parser(__doc__.splitlines()[0])
    parse.add_argument("--size", choices=["tiny", "base", "large"], default="base")
    parse.add_argument(
        "--pairs", type=int, help="default 96 on CUDA; on the CPU as many as ratios, 2 where models differ"
    )
    parse.add_argument("--depth", type=int, help="encoder and decoder blocks; default the preset's, 2 with --quick")
    parse.add_argument("--compile", action="store_true", help="also torch.compile every schedule, in many minutes")
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse.parse_args(argv)
    device = common.begin(args)
    cuda = device.type == "cuda"
    quick_cpu = args.quick and not cuda
    setting = Setting(
        device=device,
        dtype=torch.bfloat16 if cuda else torch.float32,
        size=args.size,
        pairs=args.pairs,
        depth=2 if args.depth is None and quick_cpu else args.depth,
        compile=args.compile,
        variants=args.variants,
        rounds=args.rounds or (3 if quick_cpu else 5 if args.quick else 30 if cuda else 7),
        budget=float("inf") if args.rounds else 10.0 if args.quick else 120.0,
    )
    cases = common.chosen(CASES, args.cases, hidden=["tiny"])
    if args.memory_of:
        print(json.dumps(measured_memory(setting, cases, args.memory_of, quick_cpu)))
        return 0
    machine, floors = common.header(device, [setting.dtype])
    memory: dict[str, Memory] = {}
    if not cuda:
        wanted = common.chosen([OURS, *SCHEDULES], setting.variants) if set(cases) - {"models", "masking"} else []
        wanted = [name for name in wanted if _runs(name, setting)]
        for name in [*wanted, *(case for case in ("models", "masking") if case in cases)]:
            memory[name] = memory_in_subprocess(__file__, argv, name)
    rows: list[Row] = []
    for case in cases:
        if case in ("models", "masking"):
            new = table(_tiny(setting, quick_cpu), case, memory)
        else:
            new = compare(setting, schedules(setting, case), floors, memory)
        rows += common.report("avsiam", new, machine, args.csv)
    return common.finish("avsiam", rows, machine, args.csv, not args.bare)


def _tiny(setting: Setting, quick: bool) -> Setting:
    return replace(setting, size="tiny", depth=None) if quick else setting


def measured_memory(setting: Setting, cases: Sequence[str], variant: str, quick: bool) -> Memory:
    """In a process of its own: a schedule in all cases, or all steps of ``models`` or ``masking``."""
    if variant in ("models", "masking"):
        _, _, steps = costs(_tiny(setting, quick), variant)
        next(iter(steps.values())).both()
        return {name: step_memory(step, setting.device) for name, step in steps.items()}
    setting, found = replace(setting, compile=False), {}
    schedules(setting, "tiny").losses[variant, "eager"].both()
    for case in cases:
        if case not in ("models", "masking"):
            bench = schedules(setting, case)
            found[bench.row.case] = step_memory(bench.losses[variant, "eager"], setting.device)
    return found


if __name__ == "__main__":
    sys.exit(main())
