"""PNG pictures of a run: what went in, what the model saw, what it made of it; the loss curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from avfast.train.log import read_metrics


@torch.no_grad()
def reconstructions(model: nn.Module, audio: Tensor, visual: Tensor, draws: Any) -> dict[str, list[Tensor]] | None:
    """Input, masked input and reconstruction per modality; None where the model reconstructs nothing.

    Every process must call it, since the model's contrastive loss is gathered over all.

    Returns:
        ``{"audio": [(B, frames, mels)] * 3, "visual": [(B, 3, H, W)] * 3}`` on the CPU. Masked patches of the masked
        input are NaN; visible patches of the reconstruction are those of the input.
    """
    training = model.training
    model.eval()
    output = model(audio, visual, draws)
    model.train(training)
    rows = {}
    for modality, inputs, keep in (("audio", audio, draws.audio_keep), ("visual", visual, draws.visual_keep)):
        if modality not in output.reconstruction:
            return None
        patchify, unpatchify = (getattr(model, f"{name}_{modality}") for name in ("patchify", "unpatchify"))
        patches = patchify(inputs)
        masked = keep.masked(patches.shape[1])[..., None]
        predicted = patchify(
            model.reconstruction_to_input(modality, output.reconstruction[modality].to(inputs.dtype), inputs)
        )
        seen = patches.masked_fill(masked, torch.nan)
        rows[modality] = [
            x.float().cpu() for x in (inputs, unpatchify(seen), unpatchify(patches.where(~masked, predicted)))
        ]
    return rows


def draw_reconstructions(rows: dict[str, list[Tensor]], path: Path) -> None:
    """One row per clip: frame, masked frame, reconstruction, and the same for the spectrogram."""
    count = len(rows["audio"][0])
    figure = _figure(13, 2.2 * count)
    axes = figure.subplots(count, 6, squeeze=False, width_ratios=[1, 1, 1, 1.6, 1.6, 1.6])
    for column, title in enumerate(("input", "masked input", "reconstruction") * 2):
        axes[0][column].set_title(title)
    for i in range(count):
        frames = [x[i].permute(1, 2, 0) for x in rows["visual"]]
        low, high = frames[0].amin((0, 1)), frames[0].amax((0, 1))
        for column, frame in enumerate(frames):
            shown = ((frame - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
            axes[i][column].imshow(shown.nan_to_num(0.5).numpy())
        spectrograms = [x[i].T for x in rows["audio"]]
        limits = {"vmin": spectrograms[0].min().item(), "vmax": spectrograms[0].max().item()}
        for column, spectrogram in enumerate(spectrograms):
            axes[i][3 + column].imshow(spectrogram.numpy(), origin="lower", aspect="auto", **limits)
            axes[i][3 + column].set_facecolor("0.5")
        for axis in axes[i]:
            axis.set_xticks([])
            axis.set_yticks([])
    figure.savefig(path, dpi=100)


def draw_losses(metrics: Path, path: Path) -> None:
    """Every loss of metrics.jsonl over steps."""
    rows = read_metrics(metrics)
    if not rows:
        return
    names = list(rows[-1]["losses"])
    figure = _figure(4 * (len(names) + 1), 3)
    axes = figure.subplots(1, len(names) + 1, squeeze=False)[0]
    for axis, name in zip(axes, ["loss", *names], strict=True):
        axis.plot([r["step"] for r in rows], [r["loss"] if name == "loss" else r["losses"][name] for r in rows])
        axis.set_title(name)
        axis.set_xlabel("step")
    figure.savefig(path, dpi=100)


def _figure(width: float, height: float) -> Any:
    # the object interface with the Agg canvas: no display, no global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg(Figure(figsize=(width, height), layout="constrained")).figure
