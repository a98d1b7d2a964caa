"""AudioMAE (arXiv:2207.06405), with and without diffusion, as DiffMAViL's appendix E trains it: recipes.

Rows with them stand in DiffMAViL's tables.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from avfast.train.config import Config


def table_4(recipe: str, model: str, **model_args: Any) -> Config:
    """DiffMAViL's Table 4, column AS-2M, on 256 GPUs: 8 clips each; its learning rates are absolute.

    The paper is silent on the crops of frames and on norms and biases, which are not decayed here: both are
    SpatiotemporalMAE's.
    """
    return Config(
        recipe=recipe,
        model=model,
        model_args=model_args,
        crop_scale=(0.5, 1.0),
        batch_size=8,
        paper_batch=2048,
        epochs=60.0,
        optimizer="adamw",
        lr=4e-4,
        betas=(0.9, 0.95),
        weight_decay=1e-5,
        decay_1d=False,
        schedule="cosine",
        warmup_epochs=8.0,
        min_lr=1e-6,
    )


def audiomae_pretrain() -> Config:
    """AudioMAE with DiffMAViL's 8 decoder blocks and 60 epochs (its own: 16 and 33)."""
    return table_4("audiomae_pretrain", "audio_mae_base")


def audiomae_diffusion_pretrain() -> Config:
    """The same with noised patches in place of the mask token; what is predicted is not normalised, as in DiffMAViL."""
    return replace(
        audiomae_pretrain(),
        recipe="audiomae_diffusion_pretrain",
        model_args={"mask_content": "diffused", "norm_pix": False},
    )


RECIPES = (audiomae_pretrain, audiomae_diffusion_pretrain)
