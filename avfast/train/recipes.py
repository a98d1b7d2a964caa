"""Published settings, one function each.

AVSiam's figures are those of its supplementary material, Tables 4-6, pre-training columns; CAV-MAE's are those of its
released scripts.

DeepAVFusion's are those of its section 4.1. Where the paper is silent (betas; norms and biases are not decayed) they
are the released code's; its "Adam" with a weight decay of 0.05 is taken to be AdamW, as in that code and in MAE. The
paper starts both unimodal transformers from masked autoencoders: the image's comes from timm, the audio's is a file
(AudioMAE on AudioSet-2M) that ``--init_audio`` names. ``..._released`` are the commands of the released README, with
the ramp of the learning rate that the paper does not mention.
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
        neighbours_every=10.0,
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
        neighbours_every=10.0,
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


RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (
        demo,
        avsiam_base_pretrain,
        avsiam_large_pretrain,
        avsiam_huge_pretrain,
        avsiam_base_released,
        cav_mae_base_pretrain,
        deepavfusion_demo,
        deepavfusion_vggsound_pretrain,
        deepavfusion_audioset_pretrain,
        deepavfusion_vggsound_released,
        deepavfusion_audioset_released,
    )
}
