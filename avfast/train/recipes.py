"""Published settings, one function each.

AVSiam's figures are those of its supplementary material, Tables 4-6, pre-training columns; CAV-MAE's are those of its
released scripts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from avfast.train.config import Config


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


def cav_mae_base_pretrain() -> Config:
    """CAV-MAE's scale++: 256 clips, here over 8 GPUs; from random weights, where the paper starts from images'."""
    return Config(
        recipe="cav_mae_base_pretrain",
        model="cav_mae_base",
        batch_size=32,
        epochs=25.0,
        optimizer="adam",
        lr=2e-4,
        betas=(0.95, 0.999),
        weight_decay=5e-7,
        schedule="step",
        decay_start=10.0,
        decay_every=5.0,
        decay_rate=0.5,
        paper_batch=256,
    )


RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (
        demo,
        avsiam_base_pretrain,
        avsiam_large_pretrain,
        avsiam_huge_pretrain,
        avsiam_base_released,
        cav_mae_base_pretrain,
    )
}
