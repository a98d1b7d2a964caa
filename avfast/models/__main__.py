"""``python -m avfast.models``: parameters of every preset by part, beside the papers' figures."""

from __future__ import annotations

from collections import Counter

import torch

from avfast.models.registry import create_model, list_models

# Millions, as the AVSiam paper's Tables give them; the rule that reproduces them is COUNTED below.
PAPER = {"avsiam_base": 100, "avsiam_large": 332, "avsiam_huge": 672, "avsep_large": 640, "cav_mae_base": 164}
PARTS = ("patch_embed", "pos_embed", "encoder", "fusion", "decoder", "head")
COUNTED = ("patch_embed", "pos_embed", "encoder", "fusion")


def part_of(name: str) -> str:
    """The part of a model that a parameter belongs to."""
    parts = name.split(".")
    first = parts[1] if parts[0] in ("audio", "visual") else parts[0]
    if first.startswith(("blocks_u", "fusion")):
        return "fusion"
    if first.startswith(("patch_embed", "pos_embed", "decoder", "head")):
        return next(part for part in PARTS if first.startswith(part))
    return "encoder"


def count_parameters(name: str) -> Counter[str]:
    """Parameters per part of a preset, built on the meta device."""
    with torch.device("meta"):
        model = create_model(name)
    counts: Counter[str] = Counter()
    for parameter_name, parameter in model.named_parameters():
        counts[part_of(parameter_name)] += parameter.numel()
    return counts


def main() -> None:
    """Print the table."""
    print(
        f"{'model':14}"
        + "".join(f"{part:>13}" for part in PARTS)
        + f"{'total':>13}{'counted':>13}{'paper':>8}{'ratio':>8}"
    )
    for name in list_models():
        counts = count_parameters(name)
        counted = sum(counts[part] for part in COUNTED)
        paper = f"{PAPER[name]:>7}M{counted / PAPER[name] / 1e6:>8.3f}" if name in PAPER else ""
        row = "".join(f"{counts[part]:>13,}" for part in PARTS)
        print(f"{name:14}{row}{sum(counts.values()):>13,}{counted:>13,}{paper}")
    print(f"counted: {' + '.join(COUNTED)} (no decoder, no heads), the rule that is nearest to the papers' figures")


if __name__ == "__main__":
    main()
