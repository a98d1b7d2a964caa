"""Noising of masked patches, against what PyTorch's own operators take for it.

    python benchmarks/diffusion.py [--quick] [--cases 'video*,audio*'] [--dtypes float32,bfloat16] [--graph]

`eager` indexes a view of the raw input by patches, draws, multiplies twice and adds; `eager_patchify` first writes all
patches, as released code does; `compiled` is the first under torch.compile. On CUDA `avfast_native` is the CUDA kernel
of csrc/ beside `avfast`'s Triton. The gate asks each for the clean patches at t = 0, exactly, and for unit variance at
the last step; ours moreover for the reference's noise. Useful work is reading the patches and writing the result; the
note compares the time with that of a clone of the result, measured in the same rounds. All allocate what they return.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import common
import torch
from common import OURS, Row
from memory import MIB, Memory, memory_in_subprocess, peak_memory
from torch import Tensor

from avfast import backend
from avfast.ops import NoiseSchedule, diffuse_patches

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16)}
SCHEDULE = NoiseSchedule()


@dataclass(frozen=True)
class Case:
    """B inputs of a shape, of whose patches ``kept`` are noised."""

    name: str
    batch: int
    shape: tuple[int, ...]
    patch: tuple[int, ...]
    noised: int

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Input, ids and timesteps."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.batch, *self.shape, generator=generator).to(device)
        sizes = self.shape[-len(self.patch) :]
        count = torch.tensor([n // p for n, p in zip(sizes, self.patch, strict=True)]).prod().item()
        ids = torch.rand(self.batch, int(count), generator=generator).argsort(1)[:, : self.noised]
        t = torch.randint(1, SCHEDULE.steps + 1, (self.batch,), generator=generator)
        return x, ids.to(device), t.to(device)


def all_cases(batch: int) -> dict[str, Case]:
    """What masking 0.8 leaves to noise of 16 frames of 224 x 224, and of 10 s of audio."""
    cases = [
        Case(f"video-1254-b{batch}", batch, (3, 16, 224, 224), (2, 16, 16), 1254),
        Case(f"audio-410-b{batch}", batch, (1024, 128), (16, 16), 410),
        Case("tiny", 2, (3, 4, 32, 32), (2, 16, 16), 5),
    ]
    return {case.name: case for case in cases}


def patch_view(x: Tensor, patch: Sequence[int]) -> Tensor:
    """(B, *grid, C, *patch) of input with channels, a view."""
    x = x if x.ndim == len(patch) + 2 else x[:, None]
    n = len(patch)
    for i in reversed(range(n)):
        x = x.unflatten(2 + i, (-1, patch[i]))
    return x.permute(0, *range(2, 2 + 2 * n, 2), 1, *range(3, 3 + 2 * n, 2))


def mixed(patches: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
    signal, level = SCHEDULE.tables(patches.device)
    noised = signal[t][:, None, None] * patches + level[t][:, None, None] * torch.randn_like(patches)
    return noised.to(dtype)


def eager(x: Tensor, ids: Tensor, t: Tensor, seed: Tensor, patch: Sequence[int], dtype: torch.dtype) -> Tensor:
    view = patch_view(x, patch)
    sample, places = torch.arange(len(x), device=x.device)[:, None], []
    for size in reversed(view.shape[1 : 1 + len(patch)]):
        places.insert(0, ids % size)
        ids = ids // size
    return mixed(view[(sample, *places)].flatten(2), t, dtype)


def eager_patchify(x: Tensor, ids: Tensor, t: Tensor, seed: Tensor, patch: Sequence[int], dtype: torch.dtype) -> Tensor:
    every = patch_view(x, patch).flatten(1, len(patch)).flatten(2)
    return mixed(every.gather(1, ids[..., None].expand(-1, -1, every.shape[2])), t, dtype)


def avfast(x: Tensor, ids: Tensor, t: Tensor, seed: Tensor, patch: Sequence[int], dtype: torch.dtype) -> Tensor:
    return diffuse_patches(x, ids, t, SCHEDULE, seed, patch=patch, dtype=dtype)


def under(name: str, *args: object) -> Tensor:
    """Ours under another backend."""
    before = backend.get_backend()
    backend.set_backend(name)
    try:
        return avfast(*args)  # type: ignore[arg-type]
    finally:
        backend.set_backend(before)


Call = Callable[..., Tensor]
VARIANTS: dict[str, Call] = {
    OURS: avfast,
    f"{OURS}_native": partial(under, "native"),
    "eager": eager,
    "eager_patchify": eager_patchify,
    "compiled": eager,
}


def build(name: str, case: Case, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """A call without arguments; ``t`` as a keyword takes other timesteps."""
    x, ids, t = case.inputs(device)
    seed = torch.ones(1, dtype=torch.int64, device=device)
    call = torch.compile(VARIANTS[name], dynamic=False) if name == "compiled" else VARIANTS[name]

    def run(t: Tensor = t) -> Tensor:
        return call(x, ids, t, seed, case.patch, dtype)

    return run


def error(name: str, case: Case, dtype: torch.dtype, run: Callable[..., Tensor], device: torch.device) -> float:
    """Largest of the errors that the gate asks for."""
    x, ids, t = case.inputs(device)
    every = patch_view(x, case.patch).flatten(1, len(case.patch)).flatten(2)
    clean = every.gather(1, ids[..., None].expand(-1, -1, every.shape[2])).to(dtype)
    last = torch.full_like(t, SCHEDULE.steps)
    noise = run(last).float()
    spread = (noise.var() - 1).abs().item() * (noise.numel() / 50) ** 0.5  # five standard errors make 1
    found = [common.rms_error([run(torch.zeros_like(t))], [clean]), 0.0 if spread < 1 else spread]
    if name.startswith(OURS):
        few = slice(None), slice(0, max(1, 40 // case.batch))
        reference = under("reference", x, ids[few], t, torch.ones_like(t[:1]), case.patch, torch.float32)
        found.append(common.rms_error([run()[few]], [reference]))
    return max(found)


def main(argv: Sequence[str] | None = None) -> int:
    parse = common.parser(__doc__.splitlines()[0])
    parse.add_argument("--dtypes", help="of the result, default float32 on the CPU, bfloat16 and float32 on CUDA")
    parse.add_argument("--batch", type=int, help="samples, default 64 on CUDA, 32 on the CPU, 4 there with --quick")
    parse.add_argument("--graph", action="store_true", help="time replays of CUDA graphs")
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse.parse_args(argv)
    device = common.begin(args)
    cuda = device.type == "cuda"
    cases = all_cases(args.batch or (64 if cuda else 4 if args.quick else 32))
    cases = {name: cases[name] for name in common.chosen(cases, args.cases, ["tiny"])}
    hidden = [*([] if cuda else [f"{OURS}_native"]), *(["compiled"] if args.quick and not cuda else [])]
    names = common.chosen(VARIANTS, args.variants, hidden)
    dtypes = [DTYPES[name] for name in common.chosen(DTYPES, args.dtypes, [] if cuda else ["bfloat16"])]
    if args.memory_of:
        found = {}
        for case in cases.values():
            for dtype in dtypes:
                build(args.memory_of, replace(case, batch=1), dtype, device)()
                run = build(args.memory_of, case, dtype, device)
                found[f"{case.name} {dtype}"] = (peak_memory(run, device) / MIB, 0.0)
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
        for dtype in dtypes:
            new, good = [], {}
            blank = Row("diffusion", case.name, "", str(dtype)[6:], "both", "graph" if args.graph else "eager")
            bound = common.limit(dtype, 0.0)
            for name in names:
                try:
                    run = build(name, case, dtype, device)
                    found = error(name, case, dtype, run, device)
                except Exception as problem:  # a baseline that fails must not end the run
                    new.append(replace(blank, variant=name, note=f"failed: {common.reason(problem)}"))
                    continue
                if found <= bound:
                    good[name] = run, found
                else:
                    new.append(replace(blank, variant=name, error=found, note=f"REFUSED: error above {bound:.1e}"))
            if good:
                result = next(iter(good.values()))[0]()
                runs = {name: run for name, (run, _) in good.items()} | {"clone": result.clone}
                steps = {name: {"both": run} for name, run in runs.items()}
                if args.graph:
                    steps, failures = common.captured(runs)
                    new += [replace(blank, variant=name, note=why) for name, why in failures.items()]
                timings = common.interleave(steps, device, rounds=rounds, budget=budget)
                clone = timings.pop("clone")["both"].median if "clone" in timings else None
                moved = result.numel() * 4 + result.nbytes
                for name, timing in timings.items():
                    row = replace(blank, variant=name, error=good[name][1]).timed(timing["both"])
                    if clone:
                        row = replace(row, note=f"{timing['both'].median / clone:.2f} x a clone of the result")
                    peak = used.get(name, {}).get(f"{case.name} {dtype}")
                    peak = (peak_memory(good[name][0], device) / MIB, 0.0) if cuda else peak
                    row = replace(row, copy_share=moved / timing["both"].median / floors.copy)
                    new.append(replace(row, peak_mib=peak[0]) if peak else row)
                del result, runs, steps
            rows += common.report("diffusion", new, machine, args.csv)
    return common.finish("diffusion", rows, machine, args.csv, not args.bare)


if __name__ == "__main__":
    sys.exit(main())
