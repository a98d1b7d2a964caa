"""MAViL and DiffMAViL (arXiv:2310.03937): recipes by Table 4, and tables.

MAViL here is the one that DiffMAViL's authors trained beside theirs, its first stage, by the same settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from avfast.train.config import Config
from avfast.train.recipes.audio_mae import audiomae_diffusion_pretrain, audiomae_pretrain, table_4
from avfast.train.recipes.row import Figures, Row


def diffmavil_demo() -> Config:
    """A tiny DiffMAViL on the built-in clips, with curriculum and adaptive batch; a few minutes on two CPU cores.

    Its 48 patches of audio and 32 of video hold less than the paper's 512 and 1568, so fewer are masked: from 80 % to
    60 %, at which the first batch is twice the last one too. Contrast weighs more, which is what a short training of
    few clips learns to hear from.
    """
    return Config(
        recipe="diffmavil_demo",
        model="diffmavil_tiny",
        cache_media=True,
        workers=0,
        model_args={
            "num_frames": 4,
            "embed_dim": 96,
            "depth": 3,
            "mask_ratio": [0.8, 0.6],
            "inter_weight": 1.0,
            "intra_weight": 0.1,
            "intra_temperature": 0.1,
        },
        crop_scale=(0.85, 1.0),
        batch_size=32,
        adaptive_batch=True,
        epochs=36.0,
        optimizer="adamw",
        lr=2e-3,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        decay_1d=False,
        clip_grad=1.0,
        schedule="cosine",
        warmup_epochs=2.0,
        log_every=20,
        checkpoint_every=200,
        group_parts=1,
    )


def mavil_pretrain() -> Config:
    """MAViL of Table 1: 80 % masked throughout, mask tokens, self-attention in the video decoder."""
    return table_4("mavil_pretrain", "mavil_base")


# Rows of Table 2, by what they change in the last, which is the recipe.
R1: Mapping[str, Any] = {"model.decoder_attention": "self", "model.mask_ratio": 0.8, "adaptive_batch": False}
R2: Mapping[str, Any] = {"model.mask_ratio": 0.8, "adaptive_batch": False}
R3: Mapping[str, Any] = {"adaptive_batch": False}
R4: Mapping[str, Any] = {}


def diffmavil_pretrain() -> Config:
    """DiffMAViL of Table 1, which is row R4 of Table 2: 8 clips per GPU in the last epoch, 16 in the first.

    R3 is --no-adaptive_batch; R2 that and --model.mask_ratio 0.8; R1 both and --model.decoder_attention self.
    """
    return replace(table_4("diffmavil_pretrain", "diffmavil_base", mask_ratio=[0.9, 0.8]), adaptive_batch=True)


RECIPES = (diffmavil_demo, mavil_pretrain, diffmavil_pretrain)
PAPER = "DiffMAViL (arXiv:2310.03937)"
TABLES = {
    "diffmavil-1": "Table 1: MAViL and DiffMAViL",
    "diffmavil-2": "Table 2: cross-attention, curriculum, adaptive batch",
    "diffmavil-3": "Table 3: cross-attention in both",
    "diffmavil-4": "Table 4: hyper-parameters of pre-training, which are the recipes', and of fine-tuning",
    "diffmavil-5": "Table 5: FLOPs by module, relative to MAViL's",
    "diffmavil-6": "Table 6: AudioMAE with diffusion",
}

COST = "FLOPs: python benchmarks/flops.py; epoch time: python benchmarks/mavil.py"
SEEDS = (
    "mean and deviation over three seeds, as with --seed 0, 1 and 2; accuracies need the audio encoder fine-tuned, "
    "which is not here yet"
)
TUNING = "cannot be run yet: fine-tuning is to come; the command pre-trains what it starts from"


def _accuracies(as_20k: str, vgg: str, esc: str, spc: str) -> Figures:
    """Of three seeds each; ESC-50's over five folds."""
    columns = {"AS-20K mAP": as_20k, "VGGSound acc": vgg, "ESC-50 acc": esc, "SPC-v2 acc": spc}
    return {name: value for name, value in columns.items() if value}


def _cost(flops: float, time: float) -> Figures:
    return {"FLOPs": flops, "epoch time": time}


def _settings(text: str) -> Figures:
    """A column of Table 4, its lines in order."""
    names = (
        "weight decay", "lr", "layer decay", "min lr", "warm-up", "epochs", "batch", "GPUs", "augmentation", "SpecAug",
        "drop path", "mixup", "cutmix", "multi-label", "loss", "mean", "std",
    )  # fmt: skip
    return {"optimizer": "AdamW", "betas": "0.9, 0.95", "schedule": "cosine"} | dict(
        zip(names, text.split(), strict=True)
    )


def _modules(*shares: float) -> Figures:
    names = "audio encoder", "audio decoder", "video encoder", "video decoder", "fusion", "total"
    return dict(zip(names, shares, strict=True))


MAVIL, DIFFMAVIL = mavil_pretrain, diffmavil_pretrain
ABLATIONS = (
    ("R1", R1, _accuracies("36.0 +- 0.08", "57.5 +- 0.09", "94.7 +- 0.10", "97.9 +- 0.04"), _cost(1, 1)),
    ("R2", R2, _accuracies("36.3 +- 0.09", "57.4 +- 0.03", "94.2 +- 0.20", "97.9 +- 0.08"), _cost(0.81, 0.96)),
    ("R3", R3, _accuracies("36.0 +- 0.07", "57.3 +- 0.19", "93.3 +- 0.10", "97.6 +- 0.05"), _cost(0.68, 0.96)),
    ("R4", R4, _accuracies("35.8 +- 0.16", "57.0 +- 0.17", "93.1 +- 0.18", "97.7 +- 0.04"), _cost(0.68, 0.82)),
)
ROWS = (
    Row(
        "diffmavil-1", "MAViL", MAVIL,
        {**_accuracies("35.9 +- 0.10", "57.2 +- 0.12", "93.7 +- 0.13", "98.0 +- 0.08"), **_cost(1, 1)},
        note=f"{SEEDS}; {COST}",
    ),
    Row("diffmavil-1", "DiffMAViL", DIFFMAVIL, {**ABLATIONS[3][2], **ABLATIONS[3][3]}, note=f"{SEEDS}; {COST}"),

    *(
        Row("diffmavil-2", label, DIFFMAVIL, {**accuracies, **cost}, settings, note=f"{SEEDS}; {COST}")
        for label, settings, accuracies, cost in ABLATIONS
    ),

    Row(
        "diffmavil-3", "MAViL, cross", MAVIL, _accuracies("36.1 +- 0.04", "", "93.6 +- 0.25", "98.0 +- 0.12"),
        {"model.decoder_attention": "cross"}, note=SEEDS,
    ),
    Row(
        "diffmavil-3", "DiffMAViL, cross", DIFFMAVIL, _accuracies("36.3 +- 0.09", "", "94.2 +- 0.20", "97.9 +- 0.08"),
        R2, note=f"row R2 of Table 2; {SEEDS}",
    ),

    Row(
        "diffmavil-4", "pre-training, AS-2M", DIFFMAVIL,
        _settings("1e-5 4e-4 - 1e-6 8 60 2048 256 R - 0 - - - MSE+contrastive -4.268 4.569"),
        note="R: the waveform rolled; the batch is the last epoch's; MAViL's is mavil_pretrain",
    ),
    *(
        Row("diffmavil-4", f"fine-tuning, {name}", DIFFMAVIL, _settings(f"1e-4 {settings}"), note=TUNING)
        for name, settings in (
            ("AS-20K", "2.5e-4 0.75 1e-6 4 60 64 1 R 192/48 0.1 0.5 1.0 yes BCE -4.268 4.569"),
            ("VGGSound", "2e-4 0.75 1e-6 1 60 256 4 R+N 192/48 0.1 0.5 1.0 no BCE -5.189 3.260"),
            ("ESC-50", "2.5e-4 0.75 1e-6 4 100 64 1 R 96/24 0.1 0 0 no CE -6.627 5.359"),
            ("SPC-v2", "1e-3 0.75 1e-6 4 60 256 1 R 48/48 0.1 0 0 no CE -6.702 5.448"),
        )
    ),

    *(
        Row("diffmavil-5", label, DIFFMAVIL, figures, settings, note="counted: python benchmarks/flops.py")
        for label, settings, figures in (
            ("R1", R1, _modules(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)),
            ("R2", R2, _modules(1.0, 1.0, 0.97, 0.53, 1.0, 0.81)),
            ("R3", R3, _modules(0.74, 1.0, 0.72, 0.54, 0.74, 0.68)),
        )
    ),

    Row(
        "diffmavil-6", "AudioMAE", audiomae_pretrain,
        _accuracies("34.2 +- 0.06", "57.1 +- 0.16", "92.6 +- 0.12", "98.4 +- 0.03"), note=SEEDS,
    ),
    Row(
        "diffmavil-6", "AudioMAE + diffusion", audiomae_diffusion_pretrain,
        _accuracies("35.5 +- 0.07", "57.9 +- 0.08", "93.6 +- 0.02", "98.4 +- 0.05"), note=SEEDS,
    ),
)  # fmt: skip
