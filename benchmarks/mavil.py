"""Time of an epoch of pre-training: MAViL against DiffMAViL's rows R1 to R4, with curriculum and adaptive batch.

    python benchmarks/mavil.py [--quick] [--cases 'MAViL,R4'] [--size base] [--clips 48] [--compile]

A step is a forward pass, a backward pass and AdamW on random clips that wait on the device; loading is left out. A row
whose masking ratio changes is timed at the beginning, the middle and the end of training; a row whose batch adapts (R4)
takes the batch that it has there, others always `--clips`. `epoch` is the mean time over training of so many clips, by
Simpson's rule over the three points: what an epoch takes, in steps of the baseline. `ratio` is MAViL's time over the
row's, `ideal` what it would be if time went with FLOPs. Before it is timed, loss and gradients of every step are held
against those of the reference bodies in float32.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import common
import torch
from common import OURS, Row
from memory import MIB, Memory, memory_in_subprocess, peak_memory, saved_bytes
from torch import Tensor, nn

from avfast import backend, flops
from avfast.models import create_model
from avfast.random import DrawKey
from avfast.train.recipes.mavil import R1, R2, R3, R4, diffmavil_pretrain, mavil_pretrain

CASES = {
    "MAViL": (mavil_pretrain, {}),
    **{f"R{i}": (diffmavil_pretrain, changes) for i, changes in enumerate((R1, R2, R3, R4), 1)},
}
PAPER = {"MAViL": 1.0, "R1": 1.0, "R2": 0.96, "R3": 0.96, "R4": 0.82}  # Tables 1 and 2
POINTS = {"first epoch": (0.0, 1 / 6), "middle": (0.5, 4 / 6), "last epoch": (1.0, 1 / 6)}  # with Simpson's weights
GATE_CLIPS = 4


@dataclass(frozen=True)
class Setting:
    """What a run measures; ``clips`` is the batch of rows whose batch does not adapt."""

    device: torch.device
    dtype: torch.dtype
    size: str
    clips: int
    depth: int | None

    def model(self, case: str) -> nn.Module:
        torch.manual_seed(0)
        recipe, changes = CASES[case]
        config = recipe()
        arguments = config.model_args | {k[6:]: v for k, v in changes.items() if k.startswith("model.")}
        if self.depth is not None:
            arguments |= {"depth": self.depth, "decoder_depth": min(self.depth, 8)}
        return create_model(config.model.replace("base", self.size), **arguments).to(self.device)

    def batches(self, case: str, model: nn.Module) -> dict[str, tuple[float, float, int]]:
        """By point of training: the progress, its weight, the batch."""
        if model.visible(0.0) == model.visible(1.0):
            return {"": (1.0, 1.0, self.clips)}
        recipe, changes = CASES[case]
        adapts = changes.get("adaptive_batch", recipe().adaptive_batch)
        tokens = self.clips * model.visible(1.0)
        return {
            point: (progress, weight, round(tokens / model.visible(progress)) if adapts else self.clips)
            for point, (progress, weight) in POINTS.items()
        }

    def row(self, case: str, point: str) -> Row:
        depth = "" if self.depth is None else f" depth {self.depth}"
        name = f"{point or 'any epoch'} {self.size}{depth} {self.clips} clips"
        variant = case if case == "MAViL" else f"{OURS}_{case}"
        return Row("mavil", name, variant, str(self.dtype).removeprefix("torch."), "both")


@dataclass(frozen=True)
class Step:
    """One step."""

    model: nn.Module
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer | None = None

    def phases(self) -> dict[str, Callable[[], object]]:
        state: dict[str, Tensor] = {}

        def forward() -> None:
            self.model.zero_grad(set_to_none=True)
            state["loss"] = self.loss()

        phases: dict[str, Callable[[], object]] = {
            "forward": forward,
            "backward": lambda: state.pop("loss").backward(),
        }
        return phases | ({} if self.optimizer is None else {"optimizer": self.optimizer.step})

    def both(self) -> None:
        for run in self.phases().values():
            run()

    def results(self) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients."""
        self.model.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        grads = {name: p.grad.float() for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return loss.item(), grads


def build(
    setting: Setting,
    model: nn.Module,
    progress: float,
    clips: int,
    dtype: torch.dtype,
    optimizer: torch.optim.Optimizer | None = None,
    compiled: nn.Module | None = None,
) -> Step:
    """A step at a point of training; clips and draws are the same for all rows."""
    device, run = setting.device, compiled or model
    inputs, draws = inputs_of(model, clips, device), model.draw(clips, key=key(clips, progress)).to(device)

    def loss() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return run(**inputs, draws=draws).loss

    return Step(model, loss, optimizer)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """At a rate of 0, so that every round starts from the same weights."""
    trained = [p for p in model.parameters() if p.requires_grad]
    fast = {"fused": True, "capturable": True} if trained[0].is_cuda else {}
    return torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, **fast)


def key(clips: int, progress: float) -> DrawKey:
    return DrawKey(0, 0, range(clips), clips, progress)


def inputs_of(model: nn.Module, clips: int, device: torch.device | str) -> dict[str, Tensor]:
    """Random clips as the front end would give them."""
    front, generator = model.frontend, torch.Generator().manual_seed(1)
    frames = front.spec.num_frames
    shapes = {
        "audio": (clips, front.num_frames, front.num_mel_bins),
        "visual": (clips, 3, frames, front.image_size, front.image_size),
    }
    if str(device) == "meta":
        return {name: torch.empty(shape, device=device) for name, shape in shapes.items()}
    return {name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()}


def gflop(setting: Setting, case: str, model: nn.Module) -> dict[str, float]:
    """Of a step per clip at every point, counted on meta."""
    blank, found = copy.deepcopy(model).to("meta"), {}
    for point, (progress, _, _) in setting.batches(case, model).items():
        draws = blank.draw(2, key=key(2, progress)).to("meta")
        found[point] = flops.count(blank, **inputs_of(blank, 2, "meta"), draws=draws, backward=True) / 2e9
    return found


def difference(got: tuple[float, dict[str, Tensor]], want: tuple[float, dict[str, Tensor]]) -> float:
    """The larger of the loss's relative error and the RMS ratio of all gradients taken together."""
    if got[1].keys() != want[1].keys():
        return math.inf
    squares = [((got[1][k] - want[1][k]).double().square().sum(), want[1][k].double().square().sum()) for k in want[1]]
    grads = (sum(a for a, _ in squares) / sum(b for _, b in squares)).sqrt().item()
    error = max(abs(got[0] - want[0]) / abs(want[0]), grads)
    return error if math.isfinite(error) else math.inf


def gate(setting: Setting, model: nn.Module, progress: float) -> tuple[float, float]:
    """The error of a small step, and the largest that passes."""
    clips, named = min(setting.clips, GATE_CLIPS), backend.get_backend()
    try:
        backend.set_backend("reference")
        exact = build(setting, model, progress, clips, torch.float32).results()
        half = setting.dtype != torch.float32
        usual = difference(build(setting, model, progress, clips, setting.dtype).results(), exact) if half else 0.0
    finally:
        backend.set_backend(named)
    got = build(setting, model, progress, clips, setting.dtype).results()
    return difference(got, exact), common.limit(setting.dtype, usual)


Steps = dict[tuple[str, str, str], Step]
"""By case, point and launch."""


def steps_of(setting: Setting, case: str, compiled: bool) -> tuple[Steps, list[Row], float]:
    """What passed the gate, rows of what did not, and the largest error."""
    model, worst = setting.model(case), 0.0
    optimizer = adamw(model)
    fast = torch.compile(model, dynamic=False) if compiled else None
    good: Steps = {}
    rows = []
    for point, (progress, _, clips) in setting.batches(case, model).items():
        blank = setting.row(case, point)
        try:
            error, bound = gate(setting, model, progress)
            worst = max(worst, error)
            if error > bound:
                rows.append(replace(blank, error=error, note=f"REFUSED: error above {bound:.1e}"))
                continue
            for launch, module in (("eager", None), ("compile", fast)):
                if launch == "eager" or compiled:
                    step = build(setting, model, progress, clips, setting.dtype, optimizer, module)
                    step.both()
                    good[case, point, launch] = step
        except Exception as problem:  # one row that fails must not end the run
            rows.append(replace(blank, note=f"failed: {common.reason(problem)}"))
    return good, rows, worst


def compare(setting: Setting, cases: Sequence[str], args, memory: dict[str, Memory]) -> list[Row]:
    """Rows of all steps, which are timed in turns, and of the epochs that they make."""
    todo: Steps = {}
    rows, errors, counts, batches = [], {}, {}, {}
    for case in dict.fromkeys(("MAViL", *cases)):
        model = setting.model(case)
        counts[case], batches[case] = gflop(setting, case, model), setting.batches(case, model)
    for case in cases:
        good, bad, errors[case] = steps_of(setting, case, args.compile)
        todo |= good
        rows += bad
    runs: dict[str, common.Phases] = {"/".join(name): step.phases() for name, step in todo.items()}
    if setting.device.type == "cuda":
        for (case, point, launch), step in todo.items():
            mode = "graph" if launch == "eager" else "compile+graph"
            step.model.zero_grad(set_to_none=True)
            graphs, failures = common.captured({f"{case}/{point}/{mode}": step.both})
            runs |= graphs
            rows += [replace(setting.row(case, point), launch=mode, note=why) for why in failures.values()]
    timed = common.interleave(runs, setting.device, rounds=args.rounds, budget=args.budget)
    epochs: dict[tuple[str, str], list[common.Timing]] = {}
    baseline = mean(counts["MAViL"], batches["MAViL"])
    for label, phases in timed.items():
        case, point, launch = label.split("/")
        _, weight, clips = batches[case][point]
        for phase, timing in phases.items():
            row = replace(setting.row(case, point), launch=launch, phase=phase, error=errors[case]).timed(timing)
            if phase == "both":
                note = f"{clips} clips, {counts[case][point]:.4g} GFLOP per clip"
                row = replace(row, clips_per_s=clips / timing.median, note=note)
                epochs.setdefault((case, launch), []).append(scaled(timing, weight * setting.clips / clips))
                found = memory.get(case, {}).get(point)
                if setting.device.type == "cuda" and launch == "eager":
                    found = step_memory(todo[case, point, launch])
                if found and launch == "eager":
                    row = replace(row, peak_mib=found[0], saved_mib=found[1])
            rows.append(row)
    for (case, launch), parts in epochs.items():
        if len(parts) == len(batches[case]):
            row = replace(setting.row(case, "epoch"), launch=launch, phase="epoch", error=errors[case])
            rows.append(replace(row, ideal=baseline / mean(counts[case], batches[case])).timed(total(parts)))
    return rows


def mean(counts: Mapping[str, float], batches: Mapping[str, tuple[float, float, int]]) -> float:
    """Over training, by Simpson's rule."""
    return sum(weight * counts[point] for point, (_, weight, _) in batches.items())


def scaled(timing: common.Timing, factor: float) -> common.Timing:
    return replace(timing, median=timing.median * factor, low=timing.low * factor, high=timing.high * factor)


def total(parts: Sequence[common.Timing]) -> common.Timing:
    sums = {name: sum(getattr(part, name) for part in parts) for name in ("median", "low", "high")}
    return replace(parts[0], **sums)


def step_memory(step: Step) -> tuple[float, float]:
    """MiB of a warm step at its peak, gradients included, and kept for the backward pass."""
    device = next(step.model.parameters()).device
    step.model.zero_grad(set_to_none=True)
    peak = peak_memory(step.both, device)
    return peak / MIB, saved_bytes(step.loss, step.model.parameters()) / MIB


def table(rows: Sequence[Row]) -> None:
    """Times of an epoch relative to MAViL's, beside the paper's."""
    epochs = {(row.launch, row.variant): row for row in rows if row.phase == "epoch" and row.median_ms is not None}
    for launch in dict.fromkeys(launch for launch, _ in epochs):
        base = epochs.get((launch, "MAViL"))
        for case, paper in PAPER.items():
            row = epochs.get((launch, case if case == "MAViL" else f"{OURS}_{case}"))
            if row is not None and base is not None:
                print(
                    f"{case} ({launch}): an epoch takes {row.median_ms / base.median_ms:.3f} of MAViL's "
                    f"(paper {paper}), its FLOPs are {1 / row.ideal:.3f}"
                )


def main(argv: Sequence[str] | None = None) -> int:
    parse = common.parser(__doc__.splitlines()[0])
    parse.add_argument("--size", choices=["tiny", "base"], help="default base on CUDA, tiny on the CPU")
    parse.add_argument("--clips", type=int, help="default 48 on CUDA (16 with --quick), 8 on the CPU")
    parse.add_argument("--depth", type=int, help="blocks of encoders and, up to 8, of decoders; default the preset's")
    parse.add_argument("--compile", action="store_true", help="also torch.compile every row, in many minutes")
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse.parse_args(argv)
    device = common.begin(args)
    cuda = device.type == "cuda"
    args.budget = float("inf") if args.rounds else 15.0 if args.quick else 120.0
    args.rounds = args.rounds or (5 if args.quick and cuda else 30 if cuda else 3 if args.quick else 7)
    dtype = torch.bfloat16 if cuda else torch.float32
    clips = args.clips or (16 if cuda and args.quick else 48 if cuda else 8)
    setting = Setting(device, dtype, args.size or ("base" if cuda else "tiny"), clips, args.depth)
    cases = common.chosen(CASES, args.cases)
    if args.memory_of:
        model, found = setting.model(args.memory_of), {}
        optimizer = adamw(model)
        build(setting, model, 1.0, 2, dtype, optimizer).both()
        for point, (progress, _, batch) in setting.batches(args.memory_of, model).items():
            found[point] = step_memory(build(setting, model, progress, batch, dtype, optimizer))
        print(json.dumps(found))
        return 0
    machine, _ = common.header(device, [dtype])
    memory: dict[str, Memory] = {}
    if not cuda:
        memory = {case: memory_in_subprocess(__file__, argv, case) for case in cases}
    rows = common.report("mavil", compare(setting, cases, args, memory), machine, args.csv)
    print()
    table(rows)
    common.finish("mavil", rows, machine, args.csv, not args.bare)
    return int(any(row.median_ms is None and not row.note.startswith("no graph") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
