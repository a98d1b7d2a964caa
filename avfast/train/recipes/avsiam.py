"""AVSiam (arXiv:2403.19638): recipes, which are the pre-training columns of its supplement's Tables 4-6, and tables.

CAV-MAE's rows in these tables are AVSiam's authors' too.
"""

from __future__ import annotations

from dataclasses import replace

from avfast.train.config import Config
from avfast.train.recipes.cav_mae import cav_mae_base_pretrain
from avfast.train.recipes.row import ACAV, AS_2M, FINE_TUNE, VGG, VGG_EVAL, Figures, Row


def demo() -> Config:
    """A tiny AVSiam on the built-in clips, a few minutes on two CPU cores."""
    return Config(
        recipe="demo",
        model="avsiam_tiny",
        cache_media=True,
        workers=0,
        model_args={"temperature": 0.1},
        crop_scale=(0.85, 1.0),
        batch_size=48,
        epochs=22.0,
        optimizer="adamw",
        lr=1.5e-3,
        betas=(0.9, 0.98),
        weight_decay=0.05,
        clip_grad=1.0,
        schedule="cosine",
        warmup_steps=30,
        log_every=20,
        checkpoint_every=200,
        group_parts=1,
    )


def _avsiam(size: str, batch_size: int, timm: str) -> Config:
    """What Tables 4-6 share. The batch is per GPU: 16, 32 and 64 GPUs make 1536 clips in each of them."""
    return Config(
        recipe=f"avsiam_{size}_pretrain",
        model=f"avsiam_{size}",
        timm=timm,
        batch_size=batch_size,
        epochs=20.0,
        optimizer="adam",
        lr=1e-4,
        betas=(0.95, 0.999),
        weight_decay=5e-7,
        schedule="step",
        decay_start=10.0,
        decay_every=5.0,
        decay_rate=0.5,
        paper_batch=1536,
    )


def avsiam_base_pretrain() -> Config:
    """Table 4: 16 GPUs of 96 clips."""
    return _avsiam("base", 96, "vit_base_patch16_224.augreg_in21k")


def avsiam_large_pretrain() -> Config:
    """Table 5: 32 GPUs of 48 clips."""
    return _avsiam("large", 48, "vit_large_patch16_224.augreg_in21k")


def avsiam_huge_pretrain() -> Config:
    """Table 6: 64 GPUs of 24 clips."""
    return _avsiam("huge", 24, "vit_huge_patch14_224.orig_in21k")


def avsiam_base_released() -> Config:
    """Table 4 with the model and the two losses of the released code (whose script has lr 2e-4, 25 epochs, batch 4)."""
    return replace(
        avsiam_base_pretrain(),
        recipe="avsiam_base_released",
        model_args={
            "objective": "released",
            "mask_ratios": [0.0, 0.2, 0.4, 0.6, 0.8],
            "audio_structure": "time_frequency",
            "norm_pix": False,
            "stop_gradient": False,
            "separate_mae_audio": True,
            "double_embedding": True,
            "eps": 1e-5,
            "decoder_depth": 8,
        },
    )


RECIPES = (demo, avsiam_base_pretrain, avsiam_large_pretrain, avsiam_huge_pretrain, avsiam_base_released)
PAPER = "AVSiam (arXiv:2403.19638)"
TABLES = {
    "main": "main table: accuracy against the cost of pre-training",
    "ablation": "masking and objective",
    "encoders": "shared against separate encoders, ViT against AST weights (a: audio, v: visual)",
    "retrieval": "zero-shot retrieval",
    "missing-modality": "one modality at test time (a: audio, v: visual)",
    "throughput": "clips per second in training",
    "supplement-1": "supplement, Table 1: from scratch",
    "supplement-2": "supplement, Table 2: fine-tuned on one modality (a: audio, v: visual)",
    "supplement-3": "supplement, Table 3: multi-ratio masking in CAV-MAE",
    "supplement-4-6": "supplement, Tables 4-6: hyper-parameters of pre-training, which are the recipes",
}

BASE, LARGE, HUGE = avsiam_base_pretrain, avsiam_large_pretrain, avsiam_huge_pretrain
RELEASED, CAV_MAE = avsiam_base_released, cav_mae_base_pretrain
CAV_MAE_START = "from random weights, where the paper starts from images'; "
MULTI_RATIO = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
SIZE = "model size not known: Large, as in the comparison of encoders"


def _main(hours: float, parameters: float, as_20k: float, as_2m: float, vgg: float) -> Figures:
    return {
        "V100 hours": hours, "parameters (M)": parameters,
        "AS-20K mAP": as_20k, "AS-2M mAP": as_2m, "VGGSound acc": vgg,
    }  # fmt: skip


def _settings(batch: int, gpus: str) -> Figures:
    return {
        "optimizer": "Adam", "betas": "0.95, 0.999", "weight decay": 5e-7, "lr": 1e-4, "decay from": 10, "by": 0.5,
        "every": 5, "epochs": 20, "batch per GPU": batch, "GPUs": gpus, "mean": -5.081, "std": 4.485,
    }  # fmt: skip


ROWS = (
    Row("main", "AVSiam-Base", BASE, _main(177, 100, 41.6, 50.1, 64.9)),
    Row(
        "main", "AVSiam-Base (released code)", RELEASED, _main(177, 100, 41.6, 50.1, 64.9),
        note="the same row with the two passes and two optimisers of the released code; " + FINE_TUNE,
    ),
    Row(
        "main", "AVSiam-Base+", BASE, _main(450, 100, 43.0, 51.4, 66.7), data=(AS_2M, VGG, ACAV),
        note="sets as in the name of the released checkpoint, as+vgg+acav; " + FINE_TUNE,
    ),
    Row("main", "AVSiam-Large", LARGE, _main(310, 332, 44.1, 52.1, 67.1)),
    Row("main", "AVSiam-Huge", HUGE, _main(800, 672, 45.0, 54.1, 68.0)),
    Row("main", "CAV-MAE", CAV_MAE, _main(672, 164, 42.0, 51.2, 65.5), note=CAV_MAE_START + FINE_TUNE),

    Row("ablation", "fixed ratio 25 %", BASE, {"AS-20K mAP": 40.8, "V100 hours": 362}, {"model.mask_ratios": [0.25]}),
    Row("ablation", "fixed ratio 50 %", BASE, {"AS-20K mAP": 39.5, "V100 hours": 142}, {"model.mask_ratios": [0.5]}),
    Row("ablation", "fixed ratio 75 %", BASE, {"AS-20K mAP": 38.6, "V100 hours": 120}, {"model.mask_ratios": [0.75]}),
    Row(
        "ablation", "contrastive only, no masking", BASE, {"AS-20K mAP": 40.4, "V100 hours": 510},
        {"model.mask_ratios": [0.0], "model.reconstruction_weight": 0},
    ),
    Row("ablation", "multi-ratio (theirs)", BASE, {"AS-20K mAP": 41.3, "V100 hours": 160}),

    Row(
        "encoders", "AVSep-Large (separate)", LARGE, {"AS-2M a+v": 52.0, "parameters (M)": 640, "memory (GB)": 20.6},
        {"model": "avsep_large"},
    ),
    Row(
        "encoders", "AVSiam-Large (shared)", LARGE, {"AS-2M a+v": 52.1, "parameters (M)": 332, "memory (GB)": 10.9},
    ),
    Row("encoders", "shared, ViT weights", BASE, {"a": "reference", "v, a+v": "reference"}),
    Row(
        "encoders", "shared, AST weights", BASE, {"a": "+1 mAP", "v, a+v": "much worse"},
        {"timm": None, "init_ast": "ast.pth"}, note="known in words only; " + FINE_TUNE,
    ),

    Row("retrieval", "AVSiam (shared)", LARGE, {"VGGSound a->v R@1 (%)": 20.4}, note=SIZE, eval_data=VGG_EVAL),
    Row(
        "retrieval", "AVSep (separate)", LARGE, {"VGGSound a->v R@1 (%)": 12.8}, {"model": "avsep_large"}, note=SIZE,
        eval_data=VGG_EVAL,
    ),

    Row(
        "missing-modality", "AVSiam", BASE, {"VGGSound a": 55.7, "VGGSound v": 46.0},
        note="model size not known: Base, as CAV-MAE's; " + FINE_TUNE,
    ),
    Row(
        "missing-modality", "CAV-MAE", CAV_MAE, {"VGGSound a": 51.8, "VGGSound v": 27.3},
        note=CAV_MAE_START + FINE_TUNE,
    ),

    *(
        Row(
            "throughput", label, recipe, {"clips/s": speed},
            {"paper_batch": None, "steps": 200, "evaluate": False, "figures": 0},
            note="clips_per_second in summary.json; the paper's is taken to be of one V100; its batch is unknown",
        )
        for label, recipe, speed in (("AVSiam-Base", BASE, 75.4), ("CAV-MAE", CAV_MAE, 22.5))
    ),

    Row(
        "supplement-1", "AVSiam", BASE, {"V100 hours": 475, "VGGSound acc": 64.4}, {"timm": None},
        note="neither the set nor the epochs of this run are given (20 epochs took 177 hours); " + FINE_TUNE,
    ),
    Row(
        "supplement-2", "AVSiam-Large", LARGE,
        {"V100 hours": 310, "AS-2M a": 48.5, "AS-2M v": 32.0, "VGGSound a": 61.2, "VGGSound v": 51.9},
    ),
    Row(
        "supplement-3", "CAV", CAV_MAE, {"AS-20K mAP": 38.5, "VGGSound acc": 64.1},
        {"model.contrastive_weight": 1, "model.reconstruction_weight": 0}, note=CAV_MAE_START + FINE_TUNE,
    ),
    Row(
        "supplement-3", "+ MAE loss", CAV_MAE, {"AS-20K mAP": 42.0, "VGGSound acc": 65.5},
        note=CAV_MAE_START + FINE_TUNE,
    ),
    Row(
        "supplement-3", "+ multi-ratio masking", CAV_MAE, {"AS-20K mAP": 42.8, "VGGSound acc": 66.4},
        {"model.mask_ratios": MULTI_RATIO}, note=CAV_MAE_START + FINE_TUNE,
    ),
    Row("supplement-4-6", "AVSiam-Base", BASE, _settings(96, "16 A5000"), note=""),
    Row("supplement-4-6", "AVSiam-Large", LARGE, _settings(48, "32 A5000"), note=""),
    Row("supplement-4-6", "AVSiam-Huge", HUGE, _settings(24, "64 V100"), note=""),
)  # fmt: skip
