"""``python -m avfast.models``: parameters of every preset by part, beside the papers' figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from avfast.models.avbert import AVBERT
from avfast.models.registry import PRESETS, create_model, list_models

# Millions, as the AVSiam paper's Tables give them; the rule that reproduces them is COUNTED below.
PAPER = {"avsiam_base": 100, "avsiam_large": 332, "avsiam_huge": 672, "avsep_large": 640, "cav_mae_base": 164}
PARTS = ("patch_embed", "pos_embed", "encoder", "fusion", "decoder", "head")
COUNTED = ("patch_embed", "pos_embed", "encoder", "fusion")

# AVBERT's, by the first name of a parameter, and the transformers of its paper's comparisons, with its figures.
CLIP_PARTS = {
    "visual_cnn": "cnn", "audio_cnn": "cnn", "adapters": "adapter", "times": "pos_embed", "transformer": "transformer",
    "mep_heads": "head", "cpp_heads": "head",
}  # fmt: skip
SCHEMES: dict[str, tuple[dict[str, Any], str]] = {
    "Multi-6: none": ({"sharing": "none"}, "128M"),
    "across layers": ({"sharing": "layers"}, ""),
    "across transformers": ({"sharing": "transformers"}, ""),
    "both: all": ({"sharing": "all"}, ""),
    "both, low rank: part": ({"sharing": "part"}, "4M"),
    "part for attention": ({"sharing": "part_att"}, ""),
    "Multi-2: none": ({"sharing": "none", "embed_dim": 320, "num_heads": 5, "depth": 2}, ""),
}


def part_of(name: str) -> str:
    """The part of a model that a parameter belongs to."""
    parts = name.split(".")
    if parts[0] in CLIP_PARTS:
        return CLIP_PARTS[parts[0]]
    first = parts[1] if parts[0] in ("audio", "visual") else parts[0]
    if first.startswith(("blocks_u", "fusion")):
        return "fusion"
    if first.startswith(("patch_embed", "pos_embed", "decoder", "head")):
        return next(part for part in PARTS if first.startswith(part))
    return "encoder"


def count_parameters(name: str, **overrides: Any) -> Counter[str]:
    """Parameters per part of a preset, built on the meta device, with other settings on demand."""
    with torch.device("meta"):
        model = create_model(name, **overrides)
    counts: Counter[str] = Counter()
    for parameter_name, parameter in model.named_parameters():
        counts[part_of(parameter_name)] += parameter.numel()
    return counts


def header(first: str, parts: Iterable[str]) -> str:
    """The names of columns."""
    return f"{first:22}" + "".join(f"{part:>13}" for part in parts)


def row(name: str, counts: Sequence[int]) -> str:
    """A line of a table."""
    return f"{name:22}" + "".join(f"{count:>13,}" for count in counts)


def main() -> None:
    """Print the tables."""
    clips = [name for name in list_models() if PRESETS[name][0] is AVBERT]
    print(header("model", [*PARTS, "total", "counted"]) + f"{'paper':>8}{'ratio':>8}")
    for name in list_models():
        if name in clips:
            continue
        counts = count_parameters(name)
        counted = sum(counts[part] for part in COUNTED)
        paper = f"{PAPER[name]:>7}M{counted / PAPER[name] / 1e6:>8.3f}" if name in PAPER else ""
        print(row(name, [*(counts[part] for part in PARTS), sum(counts.values()), counted]) + paper)
    print(f"counted: {' + '.join(COUNTED)} (no decoder, no heads), the rule that is nearest to the papers' figures\n")

    columns = list(dict.fromkeys(CLIP_PARTS.values()))
    print(header("model", [*columns, "total"]))
    for name in clips:
        counts = count_parameters(name)
        print(row(name, [*(counts[part] for part in columns), sum(counts.values())]))
    print("\n" + header("avbert_base, sharing", ["transformer"]) + f"{'paper':>8}")
    for name, (settings, figure) in SCHEMES.items():
        print((row(name, [count_parameters("avbert_base", **settings)["transformer"]]) + f"{figure:>8}").rstrip())
    print("transformer: weights, biases and LayerNorms of the three")


if __name__ == "__main__":
    main()
