"""DiffMAViL's Table 5: FLOPs of pre-training by module, relative to MAViL's, counted on the models themselves.

    python benchmarks/flops.py

Nothing is computed: the modules of the base models run on meta tensors, for one clip, and `avfast.flops` counts their
matrix products (of a forward pass, 2 FLOP per multiply-add). Both views of a clip go through the encoders, one through
fusion and decoders. Where the masking ratio changes, the figure is the mean over 60 epochs.

What they are relative to is MAViL as its authors describe it: it embeds all patches of a view before it masks them, and
decodes and predicts all of them. The MAViL of this library (the row `here`) embeds what it keeps and reads its decoders
at what is masked, which is the same function.

The paper does not say what else it counted. `AS BUILT` are the models as they stand. `AS IN THE PAPER` is a reading
that meets all twelve cells of the rows R2 and R3: no class tokens, one frame to a tubelet in place of two, which makes
as many tokens of half the values, and a spectrogram that MAViL too masks before it embeds it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch
from torch import nn

from avfast import flops
from avfast.models import create_model
from avfast.nn import run_blocks
from avfast.ops import AttentionPlan
from avfast.random import DrawKey, progress
from avfast.train.recipes.mavil import R1, R2, R3, diffmavil_pretrain, mavil_pretrain

MODULES = ("audio encoder", "audio decoder", "video encoder", "video decoder", "fusion", "total")
CASES: dict[str, tuple[Any, Mapping[str, Any]]] = {
    "here": (mavil_pretrain, {}),
    **{f"R{i}": (diffmavil_pretrain, changes) for i, changes in enumerate((R1, R2, R3), 1)},
}
PAPER = {
    "R1": (1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    "R2": (1.0, 1.0, 0.97, 0.53, 1.0, 0.81),
    "R3": (0.74, 1.0, 0.72, 0.54, 0.74, 0.68),
}
EPOCHS = 60


@dataclass(frozen=True)
class Reading:
    """How to count.

    Args:
        title: printed above the table.
        cls: whether sequences carry their class token.
        embeds_all: modalities of which MAViL embeds all patches.
        predicts_all: DiffMAViL's decoders of self-attention predict all patches, as MAViL's do.
        model: settings of both models.
    """

    title: str
    cls: bool
    embeds_all: tuple[str, ...]
    predicts_all: bool
    model: tuple[tuple[str, Any], ...] = ()


BUILT = Reading("AS BUILT", True, ("audio", "visual"), False, (("num_frames", 16), ("tubelet_size", 2)))
EXACT = Reading("AS IN THE PAPER", False, ("visual",), True, (("num_frames", 8), ("tubelet_size", 1)))


def counts(model: nn.Module, point: float, cls: bool, embeds_all: Sequence[str], predicts_all: bool) -> dict[str, int]:
    """FLOPs of a clip by module, of a model on meta at a point of training (0 to 1)."""
    draws = model.draw(1, key=DrawKey(0, 0, (0,), 1, point)).to("meta")
    found, lengths = {}, []
    for name, title in (("audio", "audio"), ("visual", "video")):
        branch, drawn = getattr(model, name), getattr(draws, name)
        embed = branch.patch_embed
        image = torch.empty(1, embed.proj.in_channels, *embed.img_size, device="meta")
        views, _, kept = drawn.kept.shape
        rows = None if name in embeds_all else torch.empty(kept, dtype=torch.int64, device="meta")
        lengths.append(kept + cls)
        found[f"{title} encoder"] = views * (flops.count(embed, image, rows) + blocks(branch.blocks, lengths[-1]))
        tokens = torch.empty(1, 1 + kept, branch.decoder.embed.in_features, device="meta")
        whole = predicts_all and branch.decoder.attention != "cross"
        found[f"{title} decoder"] = flops.count(branch.decode, tokens, image, drawn, draws.noise, whole)
    return found | {"fusion": blocks(model.fusion.blocks, sum(lengths))}


def blocks(stack: nn.ModuleList, length: int) -> int:
    """FLOPs of transformer blocks, all alike, over one sequence."""
    x = torch.empty(length, stack[0].norm1.weight.numel(), device="meta")
    return len(stack) * flops.count(run_blocks, stack[:1], x, AttentionPlan.from_lengths([length]))


def kept(model: nn.Module, point: float) -> dict[str, int]:
    """By module, the number of kept patches that its FLOPs are a quadratic function of."""
    audio, video = (model.masking.kept(branch.num_patches, point) for branch in (model.audio, model.visual))
    numbers = audio, audio, video, video, audio + video
    return dict(zip(MODULES, numbers, strict=False))


def mean(model: nn.Module, reading: Reading, epochs: int = EPOCHS) -> dict[str, float]:
    """FLOPs of a clip by module, the mean over training: three points give a quadratic function."""
    points = (0.0, 0.5, 1.0) if model.visible(0.0) != model.visible(1.0) else (0.0,)
    found = [counts(model, point, reading.cls, (), reading.predicts_all) for point in points]
    at = [kept(model, point) for point in points]
    means = {}
    for name in found[0]:
        known = [(numbers[name], value[name]) for numbers, value in zip(at, found, strict=True)]
        wanted = [kept(model, progress(epoch, epochs))[name] for epoch in range(epochs)]
        means[name] = sum(through(known, x) for x in wanted) / epochs
    return means


def through(known: Sequence[tuple[int, int]], x: int) -> float:
    """At x, the polynomial that takes these values (Lagrange's form)."""
    return sum(y * prod((x - other) / (at - other) for other, _ in known if other != at) for at, y in known)


@cache
def table(reading: Reading) -> dict[str, dict[str, float]]:
    """By row and module, FLOPs relative to MAViL's."""
    found = {}
    base: dict[str, float] = {}
    for case, (recipe, changes) in CASES.items():
        config = recipe()
        arguments = config.model_args | {k[6:]: v for k, v in changes.items() if k.startswith("model.")}
        with torch.device("meta"):
            model = create_model(config.model, **arguments, **dict(reading.model))
        if not base:
            base = counts(model, 0.0, reading.cls, reading.embeds_all, True)
        own = mean(model, replace(reading, predicts_all=False) if case == "here" else reading)
        shares = {name: own[name] / base[name] for name in own}
        found[case] = shares | {"total": sum(own.values()) / sum(base.values())}
    return found


def main() -> int:
    print(__doc__.partition("\n")[0])
    width = max(map(len, MODULES))
    for reading in (BUILT, EXACT):
        settings = ", ".join(f"{name}={value}" for name, value in reading.model)
        cls = "with" if reading.cls else "without"
        print(f"\n{reading.title}: a forward pass, {settings}, rounding=floor, {cls} class tokens; MAViL embeds all")
        print(f"patches of {' and '.join(reading.embeds_all)} before it masks them; in brackets the paper's figures")
        print("     " + "  ".join(f"{name:>{width}}" for name in MODULES))
        for case, shares in table(reading).items():
            paper = PAPER.get(case)
            cells = [f"{shares[name]:.3f}" + (f" ({paper[i]})" if paper else "") for i, name in enumerate(MODULES)]
            print(f"{case:5}" + "  ".join(f"{cell:>{width}}" for cell in cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
