"""Draws a results file of the benchmarks: `python benchmarks/plot.py results/<device>/<benchmark>.csv`."""

from __future__ import annotations

import csv
import sys
from pathlib import Path


def plot(path: Path | str) -> Path | None:
    """One bar per case and variant for the latest measurement of each, as a PNG beside the file.

    Returns:
        The plot's path, or None without matplotlib or without a timed row.
    """
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    path = Path(path)
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["median_ms"] and row["phase"] == "both"]
    if not rows:
        return None
    latest = {(f"{r['dtype']} {r['launch']}", r["case"], r["variant"]): r for r in rows}
    panels = list(dict.fromkeys(key[0] for key in latest))
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(11, 3.2 * len(panels)), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        cases = list(dict.fromkeys(case for p, case, _ in latest if p == panel))
        variants = list(dict.fromkeys(variant for p, _, variant in latest if p == panel))
        width = 0.8 / len(variants)
        for number, variant in enumerate(variants):
            bars = [(i, latest[panel, c, variant]) for i, c in enumerate(cases) if (panel, c, variant) in latest]
            places = [i + (number - (len(variants) - 1) / 2) * width for i, _ in bars]
            median = [float(row["median_ms"]) for _, row in bars]
            spread = [
                [max(m - float(row["p20_ms"]), 0) for m, (_, row) in zip(median, bars, strict=True)],
                [max(float(row["p80_ms"]) - m, 0) for m, (_, row) in zip(median, bars, strict=True)],
            ]
            axis.bar(places, median, width, yerr=spread, label=variant, error_kw={"lw": 0.7})
        axis.set_xticks(range(len(cases)), cases, rotation=20, ha="right", fontsize=8)
        axis.set_yscale("log")
        axis.set_ylabel("ms, forward + backward")
        axis.set_title(f"{rows[-1]['benchmark']} on {rows[-1]['device']}, {panel}", fontsize=10)
        axis.legend(fontsize=7, ncols=4)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
    return target


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(plot(name))
