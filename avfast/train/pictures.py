"""PNG pictures of a run: what went in, what the model saw, what it made of it, where its fusion tokens look; losses."""

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
        frames = [x[i] for x in rows["visual"]]
        for column, frame in enumerate(frames):
            axes[i][column].imshow(_shown(frame, frames[0]))
        spectrograms = [x[i].T for x in rows["audio"]]
        limits = {"vmin": spectrograms[0].min().item(), "vmax": spectrograms[0].max().item()}
        for column, spectrogram in enumerate(spectrograms):
            axes[i][3 + column].imshow(spectrogram.numpy(), origin="lower", aspect="auto", **limits)
            axes[i][3 + column].set_facecolor("0.5")
    _save(figure, path)


@torch.no_grad()
def fusion_maps(model: nn.Module, audio: Tensor, visual: Tensor) -> dict[str, Any] | None:
    """Where the fusion tokens look; None where the model has none, or none that weigh each modality by itself.

    Returns:
        On the CPU: the inputs ``audio`` ``(B, frames, mels)`` and ``visual`` ``(B, 3, H, W)``, and the weights of the
        first, the middle and the last fusion layer, averaged over heads and fusion tokens: ``p`` ``{layer: (B, mel
        patches, time patches)}`` and ``r`` ``{layer: (B, rows, columns)}``. A pair's weight is a product of the two
        before that average.
    """
    if not hasattr(model, "fusion_attention") or not len(audio):
        return None
    training = model.training
    model.eval()
    try:
        layers = model.fusion_attention(audio, visual)
    except ValueError:  # one softmax over both modalities: its weights are no product
        layers = {}
    model.train(training)
    if not layers:
        return None
    order = list(layers)
    chosen = dict.fromkeys((order[0], order[len(order) // 2], order[-1]))
    maps: dict[str, Any] = {"audio": audio.float().cpu(), "visual": visual.float().cpu()}
    for name, side, grid in (("p", 0, model.patch_embed_a.grid_size), ("r", 1, model.patch_embed.grid_size)):
        maps[name] = {i: layers[i][side].float().mean((1, 2)).unflatten(1, grid).cpu() for i in chosen}
    return maps


def draw_fusion(maps: dict[str, Any], path: Path) -> None:
    """One row per clip: frame, r over it at each layer, spectrogram, p over it at each layer."""
    count, layers = len(maps["audio"]), list(maps["p"])
    figure = _figure(2.2 * (1 + len(layers)) * 2.6, 2.2 * count)
    widths = [1.0] * (1 + len(layers)) + [1.6] * (1 + len(layers))
    axes = figure.subplots(count, len(widths), squeeze=False, width_ratios=widths)
    for i in range(count):
        frame, spectrogram = maps["visual"][i], maps["audio"][i].T.numpy()
        sides = (
            ("r", _shown(frame, frame), {"cmap": "gray"}),
            ("p", spectrogram, {"cmap": "gray", "origin": "lower", "aspect": "auto"}),
        )
        for side, (name, image, how) in enumerate(sides):
            row = axes[i][side * (1 + len(layers)) :]
            height, width = image.shape[:2]
            for column, layer in enumerate([None, *layers]):
                row[column].imshow(image, **how)
                if layer is not None:
                    edges = (-0.5, width - 0.5, -0.5, height - 0.5) if side else (-0.5, width - 0.5, height - 0.5, -0.5)
                    row[column].imshow(
                        maps[name][layer][i].numpy(), extent=edges, alpha=0.6, **{**how, "cmap": "inferno"}
                    )
                if i == 0:
                    row[column].set_title("input" if layer is None else f"{name}, layer {layer}")
    _save(figure, path)


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


def _shown(frame: Tensor, of: Tensor) -> Any:
    """(3, H, W) as (H, W, 3) in 0 to 1 by the range of each channel in ``of``; what is not known is grey."""
    low, high = of.amin((1, 2), keepdim=True), of.amax((1, 2), keepdim=True)
    shown = ((frame - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return shown.nan_to_num(0.5).permute(1, 2, 0).numpy()


def _save(figure: Any, path: Path) -> None:
    for axis in figure.axes:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=100)


def _figure(width: float, height: float) -> Any:
    # the object interface with the Agg canvas: no display, no global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg(Figure(figsize=(width, height), layout="constrained")).figure
