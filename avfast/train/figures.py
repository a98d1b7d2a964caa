"""PNG figures of a run: what went in, what the model saw, what it made of it, where it looks; losses."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from avfast.data.clip_list import ClipList
from avfast.data.frontend import Frontend
from avfast.models.contract import AttentionMaps, Reconstruction
from avfast.train.log import read_metrics

HERTZ = (250, 1000, 4000, 16000)


@dataclass(frozen=True)
class Labels:
    """What a figure says beside the pixels.

    Args:
        title: of the figure.
        names: of the rows.
        frontend: of the model, for seconds and hertz.
    """

    title: str
    names: Sequence[str]
    frontend: Frontend

    @classmethod
    def of(cls, title: str, clips: ClipList, index: Sequence[int], frontend: Frontend) -> Labels:
        """Rows named by the clips' ids and classes."""
        names = []
        for i in index:
            clip = clips.clips[i]
            words = [clip.id, *(clips.class_names[label] for label in clip.labels)]
            lines = [line for word in words for line in textwrap.wrap(word, 26)[:2]][:5]
            # a name may hold bytes that are no text, and a dollar would begin a formula
            names.append("\n".join(lines).encode(errors="backslashreplace").decode().replace("$", r"\$"))
        return cls(title, names, frontend)

    def spectrogram(self, axis: Any, spectrogram: Tensor, **how: Any) -> Any:
        """Draws ``(frames, mels)`` over seconds and hertz; the image."""
        mels = spectrogram.shape[1]
        extent = (0, self.frontend.seconds, -0.5, mels - 0.5)
        image = axis.imshow(spectrogram.T.numpy(), origin="lower", aspect="auto", extent=extent, **how)
        low, high = _mel(self.frontend.low_hz), _mel(self.frontend.sample_rate / 2)
        shown = [hertz for hertz in HERTZ if low < _mel(hertz) < high]
        places = [(_mel(hertz) - low) / (high - low) * (mels + 1) - 1 for hertz in shown]
        axis.set_yticks(places, [f"{hertz // 1000} kHz" if hertz >= 1000 else f"{hertz} Hz" for hertz in shown])
        axis.tick_params(labelsize=8)
        axis.set_xticks([0, self.frontend.seconds], ["0", f"{self.frontend.seconds:.3g} s"])
        return image


def _mel(hertz: float) -> float:
    """Kaldi's and HTK's scales alike, up to a factor."""
    return math.log(1 + hertz / 700)


def draw_reconstructions(shown: Reconstruction, labels: Labels, path: Path) -> None:
    """One row per clip: the frame, what of it was seen, what was made of it, and the same for the spectrogram."""
    sides = {"visual": shown.visual, "audio": shown.audio}
    columns = [(side, title, values) for side, found in sides.items() for title, values in found.items()]
    figure, axes = _grid([side for side, *_ in columns], len(labels.names))
    for row, name in enumerate(labels.names):
        for axis, (side, title, values) in zip(axes[row], columns, strict=True):
            first, *_, last = sides[side]
            image = _panel(axis, side, values[row], sides[side][first][row], labels)
            if row == 0:
                axis.set_title(side if title == first else title)
            if title == "masked":
                axis.set_xlabel(f"{shown.masked[side][row]:.0%} masked")
            if side == "audio" and title == last:
                figure.colorbar(image, ax=axis, label="log-mel power")
        axes[row][0].set_ylabel(name, fontsize=8)
    _save(figure, labels.title, path)


def draw_attention(maps: AttentionMaps, labels: Labels, path: Path) -> None:
    """One row per clip: the frame, r over it at each layer, the spectrogram, p over it at each layer."""
    sides = (("visual", maps.visual, "r", maps.r), ("audio", maps.audio, "p", maps.p))
    columns = [
        (side, given, weights, f"{name}, layer {layer}" if weights is not None else side)
        for side, given, name, found in sides
        if given is not None
        for layer, weights in [(None, None), *found.items()]
    ]
    figure, axes = _grid([side for side, *_ in columns], len(labels.names))
    for row, name in enumerate(labels.names):
        for axis, (side, given, weights, title) in zip(axes[row], columns, strict=True):
            image = _panel(axis, side, given[row], given[row], labels, cmap="gray")
            if row == 0:
                axis.set_title(title)
            if weights is None:
                continue
            most = weights[row].max().clamp(min=1e-12)
            how = {
                "extent": image.get_extent(),
                "origin": image.origin,
                "aspect": axis.get_aspect(),
                "vmin": 0,
                "vmax": 1,
            }
            image = axis.imshow((weights[row] / most).numpy(), alpha=0.6, cmap="inferno", **how)
            axis.set_xlabel(f"at most {most / weights[row].mean():.1f} x the mean")
        axes[row][0].set_ylabel(name, fontsize=8)
    figure.colorbar(image, ax=list(axes[:, -1]), label="weight / largest of its panel")
    _save(figure, f"{labels.title}\n{maps.legend}", path)


def draw_losses(metrics: Path, title: str, path: Path, contrasted: int = 0) -> None:
    """Every loss of metrics.jsonl over steps; the contrastive one beside chance among ``contrasted`` clips."""
    rows = read_metrics(metrics)
    if not rows:
        return
    names = list(rows[-1]["losses"])
    figure = _figure(4 * (len(names) + 1), 3.4)
    axes = figure.subplots(1, len(names) + 1, squeeze=False)[0]
    for axis, name in zip(axes, ["loss", *names], strict=True):
        axis.plot([r["step"] for r in rows], [r["loss"] if name == "loss" else r["losses"][name] for r in rows])
        axis.set_title("loss (weighted sum)" if name == "loss" else name.replace("_", " "))
        axis.set_xlabel("step")
        # what is put back is told by squared errors; everything else is told apart, by cross entropies
        squared = name.startswith(("reconstruction", "distillation"))
        axis.set_ylabel("loss" if name == "loss" else "mean squared error" if squared else "nats")
        if name == "contrastive" and contrasted > 1:
            axis.axhline(math.log(contrasted), color="0.5", linestyle="--", label=f"chance, ln {contrasted}")
            axis.legend()
    _save(figure, title, path)


def _grid(sides: Sequence[str], rows: int) -> tuple[Any, Any]:
    """A figure and its axes ``(rows, columns)``; frames are square, spectrograms wider."""
    widths = [1.6 if side == "audio" else 1.0 for side in sides]
    figure = _figure(2.1 * sum(widths) + 1, 2.4 * rows + 1)
    return figure, figure.subplots(rows, len(sides), squeeze=False, width_ratios=widths)


def _panel(axis: Any, side: str, values: Tensor, given: Tensor, labels: Labels, **how: Any) -> Any:
    """Draws a frame or a spectrogram over the range of the input ``given``; what is not known is grey."""
    if side == "audio":
        axis.set_facecolor("0.5")
        return labels.spectrogram(axis, values, vmin=given.min().item(), vmax=given.max().item(), **how)
    _bare(axis)
    return axis.imshow(_shown(values, given))


def _shown(frame: Tensor, of: Tensor) -> Any:
    """(3, H, W) as (H, W, 3) in 0 to 1 by the range of each channel in ``of``; what is not known is grey."""
    low, high = of.amin((1, 2), keepdim=True), of.amax((1, 2), keepdim=True)
    shown = ((frame - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return shown.nan_to_num(0.5).permute(1, 2, 0).numpy()


def _bare(axis: Any) -> None:
    axis.set_xticks([])
    axis.set_yticks([])


def _save(figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script that the font lacks
        figure.savefig(path, dpi=100)


def _figure(width: float, height: float) -> Any:
    # the object interface with the Agg canvas: no display, no global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg(Figure(figsize=(width, height), layout="constrained")).figure
