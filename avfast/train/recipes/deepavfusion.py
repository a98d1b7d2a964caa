"""DeepAVFusion (arXiv:2312.01017): recipes by its section 4.1, and tables.

Where the paper is silent (betas; norms and biases are not decayed) they are the released code's; its "Adam" with a
weight decay of 0.05 is taken to be AdamW, as in that code and in MAE. The paper starts both unimodal transformers from
masked autoencoders: the image's comes from timm, the audio's is a file (AudioMAE on AudioSet-2M) that ``--init_audio``
names. ``..._released`` are the commands of the released README, with the ramp of the learning rate that the paper does
not mention.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from avfast.train.config import Config
from avfast.train.recipes.row import VGG, VGG_TEST, Figures, Row


def deepavfusion_demo() -> Config:
    """A tiny DeepAVFusion on the built-in clips, a few minutes on two CPU cores."""
    return Config(
        recipe="deepavfusion_demo",
        model="deepavfusion_tiny",
        cache_media=True,
        workers=0,
        model_args={
            "audio_size": [128, 64],  # the 2 s of a clip
            "embed_dim": 64,
            "decoder_depth": 2,
            # the paper's own text (Eq. 14 and after Eq. 15): at this size fusion tokens learn sooner from it
            "decoder_input": "fusion",
            "norm_pix_audio": False,
            "norm_pix_visual": False,
        },
        crop_scale=(0.85, 1.0),
        batch_size=32,
        epochs=36.0,
        optimizer="adamw",
        lr=2e-3,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        decay_1d=False,
        clip_grad=1.0,
        schedule="cosine",
        warmup_steps=40,
        log_every=31,
        checkpoint_every=310,
        knn_every=10.0,
    )


def _deepavfusion(name: str, epochs: float, accumulate: int, paper_batch: int) -> Config:
    """What the pre-trainings share: 64 clips per GPU and pass, and a rate of 1.5e-4 for every 256 clips of a step."""
    return Config(
        recipe=f"deepavfusion_{name}",
        model="deepavfusion_base",
        timm="vit_base_patch16_224.mae",
        crop_scale=(0.5, 1.0),
        batch_size=64,
        accumulate=accumulate,
        paper_batch=paper_batch,
        epochs=epochs,
        optimizer="adamw",
        lr=1.5e-4,
        lr_batch=256,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        decay_1d=False,
        schedule="cosine",
        warmup_epochs=40.0,
        knn_every=10.0,
    )


def deepavfusion_vggsound_pretrain() -> Config:
    """VGGSound, large scale: 8 GPUs of 64 clips, two passes a step; with --init_audio AudioMAE's checkpoint."""
    return _deepavfusion("vggsound_pretrain", 800.0, 2, 1024)


def deepavfusion_audioset_pretrain() -> Config:
    """AudioSet: 8 GPUs of 64 clips, eight passes a step; with --init_audio AudioMAE's checkpoint."""
    return _deepavfusion("audioset_pretrain", 200.0, 8, 4096)


RELEASED_FUSION = {"fusion_residual": "normed", "fusion_scale": 64**-0.5, "train_decoder_positions": True}


def deepavfusion_vggsound_released() -> Config:
    """The released code's command for VGGSound: 512 clips a step, 200 epochs, unimodal parts ramped up."""
    return replace(
        _deepavfusion("vggsound_released", 200.0, 1, 512), model_args=dict(RELEASED_FUSION), unimodal_ramp=0.5
    )


def deepavfusion_audioset_released() -> Config:
    """The released code's command for AudioSet: 2048 clips a step, fusion blocks of full width."""
    return replace(
        _deepavfusion("audioset_released", 200.0, 4, 2048),
        model="deepavfusion_audioset",
        model_args=dict(RELEASED_FUSION),
        unimodal_ramp=0.5,
    )


RECIPES = (
    deepavfusion_demo,
    deepavfusion_vggsound_pretrain,
    deepavfusion_audioset_pretrain,
    deepavfusion_vggsound_released,
    deepavfusion_audioset_released,
)
PAPER = "DeepAVFusion (arXiv:2312.01017)"
TABLES = {
    "fusion-4": "Table 4: unimodal pre-training, early fusion, interactions",
    "fusion-5": "Table 5: dense against factorized interactions",
    "fusion-6a": "Table 6a: fusion layers",
    "fusion-6b": "Table 6b: fusion tokens",
    "fusion-6c": "Table 6c: aggregation tokens of each modality",
    "fusion-7": "Table 7: unimodal pre-training, other figures",
    "fusion-figure-3": "Figure 3: nearest neighbours by audio, image and fusion tokens while training",
}

PROBE_FUSION = (
    "linear accuracy: see this run's probe, where theirs is trained by LARS on augmented clips; SDR (separation) and "
    "mIoU (segmentation) need fine-tuning, not here yet"
)
MID = "the text says layers 9-12, the figures are those of 3 layers in Table 6a"
NO_FUSION = "called no early fusion; the figures are those of fusion at the last layer alone in Table 6a"
SPEED = "speed and memory of inference: python benchmarks/deepavfusion.py"


def _fusion(table: str, label: str, linear: float, sdr: float, miou: float, *, note: str = "", **more: Any) -> Row:
    """A row of DeepAVFusion's studies: VGGSound, 200 epochs of 512 clips a step on 2 GPUs (section 4.1).

    ``more``: arguments of the model, ``timm`` for another start than MAE's, ``speed`` for Table 5's other columns.
    """
    start = {"timm": None} if "timm" in more else {"init_audio": "audiomae.pth"}
    settings = {f"model.{name}": value for name, value in more.items() if name not in ("timm", "speed")}
    return Row(
        table, label, deepavfusion_vggsound_pretrain,
        {**more.get("speed", {}), "linear acc": linear, "SDR": sdr, "mIoU": miou},
        {"epochs": 200.0, "accumulate": 4, "paper_batch": 512, **start, **settings},
        note="; ".join(filter(None, (note, PROBE_FUSION))), data=(VGG,), eval_data=VGG_TEST,
    )  # fmt: skip


def _speed(videos: float, memory: float) -> Figures:
    return {"videos/s": videos, "memory (GB)": memory}


ROWS = (
    _fusion("fusion-4", "(1) full", 53.08, 6.53, 52.05),
    _fusion("fusion-4", "(2) no unimodal pre-training", 44.36, 2.03, 29.55, timm=None),
    _fusion("fusion-4", "(3) no interactions: token fusion", 51.19, 6.15, 48.71, fusion_arch="token"),
    _fusion("fusion-4", "(4) mid fusion", 51.21, 5.85, 48.04, fusion_layers=3, note=MID),
    _fusion("fusion-4", "(5) late fusion", 46.52, 5.32, 44.32, fusion_layers=1),
    _fusion("fusion-4", "(6) no fusion", 39.67, 4.23, 38.32, fusion_layers=0),

    _fusion(
        "fusion-5", "no early fusion", 46.52, 5.32, 44.32, fusion_layers=1, speed=_speed(14.5, 10.3),
        note=f"{NO_FUSION}; {SPEED}",
    ),
    _fusion(
        "fusion-5", "dense", 52.82, 6.30, 52.13, fusion_arch="dense", speed=_speed(4.3, 31.6),
        note=f"here without forming a pair, exactly; {SPEED}",
    ),
    _fusion("fusion-5", "factorized", 53.08, 6.53, 52.05, speed=_speed(12.8, 13.1), note=SPEED),

    _fusion("fusion-6a", "12", 53.08, 6.53, 52.05, fusion_layers=12),
    _fusion("fusion-6a", "9", 52.76, 6.15, 49.93, fusion_layers=9),
    _fusion("fusion-6a", "6", 52.29, 6.12, 49.02, fusion_layers=6),
    _fusion("fusion-6a", "3", 51.21, 5.85, 48.04, fusion_layers=3),
    _fusion("fusion-6a", "1", 46.52, 5.32, 44.32, fusion_layers=1),
    _fusion("fusion-6a", "0", 39.67, 4.23, 38.32, fusion_layers=0),

    _fusion("fusion-6b", "1", 51.86, 5.94, 50.67, num_fusion_tokens=[1, 8, 8]),
    _fusion("fusion-6b", "8", 51.97, 5.83, 51.14, num_fusion_tokens=[8, 8, 8]),
    _fusion("fusion-6b", "16", 53.08, 6.53, 52.05, num_fusion_tokens=[16, 8, 8]),
    _fusion("fusion-6b", "32", 52.18, 6.43, 50.60, num_fusion_tokens=[32, 8, 8]),

    _fusion("fusion-6c", "4", 51.78, 5.68, 49.59, num_fusion_tokens=[16, 4, 4]),
    _fusion("fusion-6c", "8", 53.08, 6.53, 52.05, num_fusion_tokens=[16, 8, 8]),
    _fusion("fusion-6c", "16", 52.25, 6.16, 50.89, num_fusion_tokens=[16, 16, 16]),

    *(
        Row(
            "fusion-7", label, deepavfusion_vggsound_pretrain, figures,
            {"epochs": 200.0, "accumulate": 4, "paper_batch": 512, **start}, data=(VGG,), eval_data=VGG_TEST,
            note="contradicts Table 4, rows 1 and 2; all but the linear accuracy need fine-tuning, not here yet",
        )
        for label, start, figures in (
            (
                "no unimodal pre-training", {"timm": None},
                {"linear acc": 40.65, "fine-tuned acc": 52.79, "localisation": 57.16, "SDR": 4.53, "mIoU": 35.05},
            ),
            (
                "unimodal pre-training", {"init_audio": "audiomae.pth"},
                {"linear acc": 42.75, "fine-tuned acc": 55.28, "localisation": 58.78, "SDR": 4.83, "mIoU": 36.41},
            ),
        )
    ),
    Row(
        "fusion-figure-3", "nearest neighbours", deepavfusion_vggsound_pretrain,
        {"fusion": "far above both", "audio, image": "reference"}, {"init_audio": "audiomae.pth"}, data=(VGG,),
        eval_data=VGG_TEST, note="a curve, known in words only; neighbours in metrics.jsonl, every 10 epochs",
    ),
)  # fmt: skip
