"""DeepAVFusion's encoder: the paper's Table 5 (no fusion, late, dense, factorized), ours and the published form.

    python benchmarks/deepavfusion.py [--quick] [--cases 'dense*'] [--size base] [--clips 2] [--compile]

The published form runs on the same weights: dense fusion forms all pairs, the unimodal blocks compute queries and MLPs
of fusion tokens whose results are thrown away. Each form is first held against the other one in float32: outputs and,
with the training step, all gradients. `inference` is one forward pass without gradients, `forward` and `backward` make
the training step `both` (encoder alone, no optimiser). `full` has all 96 + 196 patches, `masked` the 19 + 49 that
pre-training keeps. All cases of a token setting are timed in turns; `ideal` is the FLOPs over ours. Peak memory holds
gradients of all weights; saved memory is what a step keeps for its backward pass.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import common
import materialised
import torch
from common import OURS, Row
from memory import MIB, Memory, memory_in_subprocess, peak_memory, saved_bytes
from torch import Tensor, nn

from avfast import flops
from avfast.models import DeepAVFusion, create_model

ARCHITECTURES = {
    "none": {"fusion_layers": "none"},
    "late": {"fusion_layers": 1},
    "dense": {"fusion_arch": "dense"},
    "factorized": {"fusion_arch": "factorized"},
}
TOKENS = ("full", "masked")
FORMS = (OURS, "published")
# Of the tiny model with 64-pixel frames, for tests.
TINY = {
    "img_size": 64, "patch_size": 16, "audio_size": (64, 32), "embed_dim": 64, "depth": 2, "num_heads": 4,
    "num_fusion_tokens": (4, 2, 2),
}  # fmt: skip
FLOAT_LIMIT, HALF_LIMIT = 1e-4, 0.02
GATE_CLIPS = 4


class Ours(nn.Module):
    """``forward(audio, visual)`` to audio, visual and fusion tokens; how they are packed is made once, as in a step."""

    def __init__(self, model: DeepAVFusion, audio_ids: Tensor, visual_ids: Tensor) -> None:
        super().__init__()
        self.model = model
        draws = model.draw(len(audio_ids), audio_keep=audio_ids, visual_keep=visual_ids)
        self.draws = draws.to(audio_ids.device)

    def forward(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, ...]:
        model, batch = self.model, len(audio)
        a, v, tokens = model.finish(*model.run(model.images(audio, visual), self.draws))
        return a.unflatten(0, (batch, -1)), v.unflatten(0, (batch, -1)), tokens


@dataclass(frozen=True)
class Setting:
    """What a run measures."""

    device: torch.device
    dtype: torch.dtype
    size: str
    clips: int
    depth: int | None

    def model(self, arch: str) -> DeepAVFusion:
        torch.manual_seed(0)
        settings = {"decoder_depth": 0, **ARCHITECTURES[arch]}
        if self.size == "tiny":
            model = DeepAVFusion(**TINY, **settings)
        else:
            depth = {} if self.depth is None else {"depth": self.depth}
            model = create_model(f"deepavfusion_{self.size}", **settings, **depth)
        return model.to(self.device)

    def row(self, arch: str, tokens: str) -> Row:
        depth = "" if self.depth is None or self.size == "tiny" else f" depth {self.depth}"
        return Row(
            "deepavfusion", f"{arch} {tokens} {self.size}{depth} {self.clips} clips", "", str(self.dtype)[6:], "both"
        )


@dataclass(frozen=True)
class Step:
    """An encoder and what it is run on; the loss is a fixed linear function of all tokens."""

    encoder: nn.Module
    inputs: tuple[Tensor, Tensor]
    dtype: torch.dtype

    def outputs(self) -> list[Tensor]:
        device = self.inputs[0].device.type
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            return list(self.encoder(*self.inputs))

    def loss(self) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        outs = self.outputs()
        weights = [torch.randn(x.shape[-1], generator=generator).to(x.device) for x in outs]
        return sum((x.float().mean((0, 1)) * w).sum() for x, w in zip(outs, weights, strict=True))

    def inference(self) -> None:
        with torch.no_grad():
            self.outputs()

    def both(self) -> None:
        self.encoder.zero_grad(set_to_none=True)
        self.loss().backward()

    def phases(self) -> dict[str, Callable[[], object]]:
        """The two halves of a training step."""
        state: dict[str, Tensor] = {}

        def forward() -> None:
            self.encoder.zero_grad(set_to_none=True)
            state["loss"] = self.loss()

        return {"forward": forward, "backward": lambda: state.pop("loss").backward()}

    def results(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Outputs and gradients."""
        with torch.no_grad():
            outs = [x.float() for x in self.outputs()]
        self.both()
        grads = {n: p.grad.float() for n, p in self.encoder.named_parameters() if p.grad is not None}
        self.encoder.zero_grad(set_to_none=True)
        return outs, grads


def build(setting: Setting, model: DeepAVFusion, tokens: str, form: str, device: torch.device | str) -> Step:
    """One form of the encoder; inputs and kept patches are the same for all."""
    generator = torch.Generator().manual_seed(1)
    ids = []
    for patches, ratio in (
        (model.patch_embed_a.num_patches, model.audio_mask_ratio),
        (model.patch_embed.num_patches, model.visual_mask_ratio),
    ):
        kept = patches if tokens == "full" else int(patches * (1 - ratio))
        order = torch.rand(setting.clips, patches, generator=generator).argsort(1)
        ids.append(order[:, :kept].sort(1).values)
    shapes = (setting.clips, *model.audio_size), (setting.clips, 3, model.img_size, model.img_size)
    inputs = tuple(torch.randn(shape, generator=generator).to(device) for shape in shapes)
    if form == OURS:
        layout_device = "cpu" if str(device) == "meta" else device
        encoder: nn.Module = Ours(model, *(x.to(layout_device) for x in ids))
        if str(device) == "meta":
            encoder.draws = encoder.draws.to("meta")
    else:
        kept_ids = [None, None] if tokens == "full" else [x.to(device) for x in ids]
        encoder = materialised.Encoder(model, *kept_ids)
    return Step(encoder, inputs, setting.dtype)


def gflop(setting: Setting, model: DeepAVFusion, tokens: str, form: str) -> float:
    """Of a forward pass per clip, counted on meta."""
    one = replace(setting, clips=1, dtype=torch.float32)
    step = build(one, copy.deepcopy(model).to("meta"), tokens, form, "meta")
    return flops.count(step.encoder, *step.inputs) / 1e9


def difference(got: tuple, want: tuple) -> float:
    """The largest RMS ratio of an output, and of all gradients taken together."""
    if got[1].keys() != want[1].keys():
        return math.inf
    squares = [((got[1][k] - want[1][k]).double().square().sum(), want[1][k].double().square().sum()) for k in want[1]]
    grads = (sum(a for a, _ in squares) / sum(b for _, b in squares)).sqrt().item()
    error = max(common.rms_error(got[0], want[0]), grads)
    return error if math.isfinite(error) else math.inf


def steps_of(
    setting: Setting, arch: str, tokens: str, forms: Sequence[str], compiled: bool
) -> tuple[dict[tuple[str, str], Step], list[Row], dict[str, float]]:
    """By (form, launch) what passed the gate, rows of what did not, and errors by form."""
    model, blank = setting.model(arch), setting.row(arch, tokens)
    # The pairs that the published form makes of a whole batch in float32 would not fit on a GPU.
    small = replace(setting, clips=min(setting.clips, GATE_CLIPS))
    exact = build(replace(small, dtype=torch.float32), model, tokens, "published", setting.device).results()
    usual = 0.0
    if setting.dtype != torch.float32:
        usual = difference(build(small, model, tokens, "published", setting.device).results(), exact)
    bound = FLOAT_LIMIT if setting.dtype == torch.float32 else max(HALF_LIMIT, 2 * usual)
    good: dict[tuple[str, str], Step] = {}
    rows, errors = [], {}
    for form in forms:
        try:
            errors[form] = difference(build(small, model, tokens, form, setting.device).results(), exact)
            step = build(setting, model, tokens, form, setting.device)
            step.both()
            step.inference()
        except Exception as problem:  # one form that fails must not end the run
            rows.append(replace(blank, variant=form, note=f"failed: {common.reason(problem)}"))
            continue
        if errors[form] > bound:
            note = f"REFUSED: error above {bound:.1e}"
            rows.append(replace(blank, variant=form, error=errors[form], note=note))
            continue
        good[form, "eager"] = step
        if compiled:
            try:
                fast = replace(step, encoder=torch.compile(step.encoder, dynamic=False))
                fast.both()
                fast.inference()
                good[form, "compile"] = fast
            except Exception as problem:
                note = f"failed: {common.reason(problem)}"
                rows.append(replace(blank, variant=form, launch="compile", note=note))
    return good, rows, errors


def timed(setting: Setting, todo: dict[str, Step], rounds: int, budget: float) -> dict[str, dict[str, common.Timing]]:
    """Phases of every step, all in turns; on CUDA a graph of each as well."""
    runs: dict[str, common.Phases] = {}
    for label, step in todo.items():
        runs[label] = step.phases()
        runs[f"{label}|inference"] = {"inference": step.inference}
        if setting.device.type == "cuda":
            step.encoder.zero_grad(set_to_none=True)
            graphs, failures = common.captured({f"{label}+graph": step.both})
            runs |= graphs
            for why in failures.values():
                print(f"{label}: {why}", file=sys.stderr)
            step.encoder.zero_grad(set_to_none=True)
    taken = common.interleave(runs, setting.device, rounds=rounds, budget=budget)
    for label in todo:
        taken[label] |= taken.pop(f"{label}|inference")
    return taken


def compare(
    setting: Setting, tokens: str, architectures: Sequence[str], args, memory: dict[str, Memory]
) -> dict[str, list[Row]]:
    """Rows by architecture; all architectures are timed in turns."""
    forms = common.chosen(FORMS, args.variants)
    todo, rows, errors, counts = {}, {arch: [] for arch in architectures}, {}, {}
    for arch in architectures:
        good, rows[arch], seen = steps_of(setting, arch, tokens, forms, args.compile)
        todo |= {f"{arch}/{form}/{launch}": step for (form, launch), step in good.items()}
        errors |= {(arch, form): error for form, error in seen.items()}
        counts |= {(arch, form): gflop(setting, setting.model(arch), tokens, form) for form in (*forms, OURS)}
    for label, timings in timed(setting, todo, args.rounds, args.budget).items():
        arch, form, launch = label.split("/")
        blank = replace(setting.row(arch, tokens), variant=form, launch=launch, error=errors[arch, form])
        note = f"{counts[arch, form]:.4g} GFLOP per clip forward"
        for phase, timing in timings.items():
            row = replace(blank, phase=phase, note=note, ideal=counts[arch, form] / counts[arch, OURS]).timed(timing)
            row = replace(row, clips_per_s=setting.clips / timing.median)
            if launch == "eager" and phase in ("inference", "both"):
                found = memory.get(f"{arch}/{form}", {}).get(f"{tokens} {phase}")
                if setting.device.type == "cuda":
                    found = step_memory(todo[label], phase)
                if found:
                    row = replace(row, peak_mib=found[0], saved_mib=found[1] or None)
            rows[arch].append(row)
    return rows


def step_memory(step: Step, phase: str) -> tuple[float, float]:
    """MiB at the peak of a step or of an inference pass, and kept for the backward pass."""
    device = step.inputs[0].device
    step.encoder.zero_grad(set_to_none=True)
    if phase == "inference":
        return peak_memory(step.inference, device) / MIB, 0.0
    peak = peak_memory(step.both, device) / MIB
    step.encoder.zero_grad(set_to_none=True)
    return peak, saved_bytes(step.loss, [*step.encoder.parameters(), *step.inputs]) / MIB


def table(rows: Sequence[Row]) -> None:
    """Every training step and inference pass against the published factorized one and the one without fusion."""
    measured = {(r.case.split(" ", 1)[1], r.case.split()[0], r.variant, r.launch, r.phase): r for r in rows}
    for (rest, arch, form, launch, phase), row in measured.items():
        if phase not in ("both", "inference") or form != OURS or row.median_ms is None:
            continue
        others = {
            "published dense": measured.get((rest, "dense", "published", launch, phase)),
            "published factorized": measured.get((rest, "factorized", "published", launch, phase)),
            "no fusion": measured.get((rest, "none", OURS, launch, phase)),
        }
        text = [f"{o.median_ms / row.median_ms:.2f} x {name}" for name, o in others.items() if o and o.median_ms]
        if text:
            print(f"{arch} {rest} {phase} ({launch}): {', '.join(text)}")


def main(argv: Sequence[str] | None = None) -> int:
    parse = common.parser(__doc__.splitlines()[0])
    parse.add_argument("--size", choices=["tiny", "base"], default="base")
    parse.add_argument("--clips", type=int, help="default 64 on CUDA, 2 on the CPU")
    parse.add_argument("--depth", type=int, help="layers; default 12, 2 with --quick")
    parse.add_argument("--tokens", choices=[*TOKENS, "both"], default="both")
    parse.add_argument("--compile", action="store_true", help="also torch.compile both forms, in many minutes")
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse.parse_args(argv)
    device = common.begin(args)
    cuda = device.type == "cuda"
    args.budget = float("inf") if args.rounds else 20.0 if args.quick else 120.0
    args.rounds = args.rounds or (5 if args.quick and cuda else 30 if cuda else 3 if args.quick else 7)
    depth = 2 if args.depth is None and args.quick and not cuda else args.depth
    dtype = torch.bfloat16 if cuda else torch.float32
    setting = Setting(device, dtype, args.size, args.clips or (64 if cuda else 2), depth)
    architectures = common.chosen(ARCHITECTURES, args.cases)
    kinds = TOKENS if args.tokens == "both" else (args.tokens,)
    if args.memory_of:
        arch, form = args.memory_of.split("/")
        warm = replace(setting, size="tiny")
        build(warm, warm.model(arch), "full", form, device).both()
        found = {}
        for tokens in kinds:
            step = build(setting, setting.model(arch), tokens, form, device)
            found |= {f"{tokens} {phase}": step_memory(step, phase) for phase in ("inference", "both")}
        print(json.dumps(found))
        return 0

    machine, _ = common.header(device, [dtype])
    memory: dict[str, Memory] = {}
    if not cuda:
        names = [f"{arch}/{form}" for arch in architectures for form in common.chosen(FORMS, args.variants)]
        memory = {name: memory_in_subprocess(__file__, argv, name) for name in names}
    rows: list[Row] = []
    for tokens in kinds:
        for new in compare(setting, tokens, architectures, args, memory).values():
            rows += common.report("deepavfusion", new, machine, args.csv)
    print()
    table(rows)
    return common.finish("deepavfusion", rows, machine, args.csv, not args.bare)


if __name__ == "__main__":
    sys.exit(main())
