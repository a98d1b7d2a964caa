"""CAV-MAE (arXiv:2210.07839): its released script's settings. Rows with it stand in AVSiam's tables."""

from __future__ import annotations

from avfast.train.config import Config


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


RECIPES = (cav_mae_base_pretrain,)
