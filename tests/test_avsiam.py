from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from released import Released

from avfast import AVSiam, create_model
from avfast.masking import DrawKey
from avfast.models import Draws
from avfast.models.__main__ import COUNTED, PAPER, count_parameters

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(scope="module", params=[torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)])
def released(request) -> Released:
    return Released("avsiam", request.param)


@pytest.fixture(scope="module")
def pretrain_state(released) -> dict[str, torch.Tensor]:
    return released.state("pretrain")


def backward(model: AVSiam, loss: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    loss.backward()


def test_fine_tuned_logits_and_features_equal_the_released_ones(released):
    tol = TOLERANCE[released.dtype]
    model = AVSiam.from_released(released.state("finetune")).to(released.dtype).eval()
    assert model.decoder is None
    audio, image = released.input("ft_audio"), released.input("ft_image")
    with torch.no_grad():
        released.check("ft_logits_audio", model.classify(audio), tol)
        released.check("ft_logits_visual", model.classify(None, image), tol)
        released.check("ft_logits_av", model.classify(audio, image), tol)
        features = model.encode(audio, image)
        for name, tokens in (("audio", features.audio), ("visual", features.visual), ("fused", features.fused)):
            released.check(f"ft_tokens_{name}", tokens, tol)
        released.check("ft_pooled_audio", features.audio.mean(1), tol)
        released.check("ft_pooled_visual", features.visual.mean(1), tol)
        released.check("ft_pooled_fused_audio", features.fused[:, :512].mean(1), tol)
        released.check("ft_pooled_fused_visual", features.fused[:, 512:].mean(1), tol)
        logits = model.classify(released.input("ft10_audio"), released.input("ft10_video"))
        released.check("ft10_logits_av_per_frame", logits, tol)
        released.check("ft10_mean_sigmoid", logits.sigmoid().mean(1), tol)


@pytest.mark.parametrize("variant", ["mae_base", "mae_shared"])
def test_reconstruction_pass_equals_the_released_one(released, pretrain_state, variant):
    tol = TOLERANCE[released.dtype]
    separate = variant == "mae_base"
    model = AVSiam.from_released(pretrain_state, separate_mae_audio=separate).to(released.dtype)
    audio, image = released.input("mae_audio"), released.input("mae_image")
    keep_a, keep_v = released.ids("mae_keep_audio"), released.ids("mae_keep_visual")
    out = model(audio, image, Draws(keep_a, keep_v, branch="reconstruction"))
    assert set(out.losses) == {"reconstruction_audio", "reconstruction_visual"}
    released.check(f"{variant}_loss_audio", out.losses["reconstruction_audio"], tol)
    released.check(f"{variant}_loss_visual", out.losses["reconstruction_visual"], tol)
    released.check(f"{variant}_loss_total", out.loss, tol)
    released.check(f"{variant}_pred_audio", out.reconstruction["audio"], tol)
    released.check(f"{variant}_pred_visual", out.reconstruction["visual"], tol)
    if not separate:
        with torch.no_grad():
            fused = model.encode(audio, image, audio_keep=keep_a, visual_keep=keep_v).fused
        released.check("mae_shared_fused", fused, tol)
        return
    backward(model, out.loss)
    grads = {
        "vit_base.blocks.0.attn.qkv.weight": model.encoder.blocks[0].attn.qkv.weight.grad,
        "ast_base.blocks.0.attn.qkv.weight": model.encoder_a.blocks[0].attn.qkv.weight.grad,
        "mm_layer_1.norm1_a.weight": model.fusion[0].norm1.weight.grad,
        "mask_token": model.decoder.mask_token.grad,
        "vit_base.patch_embed_a.proj.weight": model.patch_embed_a.proj.weight.grad,
    }
    for key, grad in grads.items():
        released.check_gradient("mae_base_grad", key, grad, tol)


def test_contrastive_pass_equals_the_released_one(released, pretrain_state):
    tol = TOLERANCE[released.dtype]
    model = AVSiam.from_released(pretrain_state).to(released.dtype)
    keep = {"audio": [None] * 10, "visual": [None] * 10}
    for modality in keep:
        offset, order = 0, torch.from_numpy(released.expected[f"perm_cl_perm_{modality}"]).tolist()
        for group in range(5):
            for ids in released.ids(f"cl_keep_{modality}_g{group}"):
                keep[modality][order[offset]] = ids
                offset += 1
    draws = Draws(keep["audio"], keep["visual"], branch="contrastive")
    audio, image = released.input("cl_audio"), released.input("cl_image")
    out = model(audio, image, draws)
    assert set(out.losses) == {"contrastive"} and not out.reconstruction
    released.check("cl_loss", out.loss, tol)
    released.check("cl_accuracy", out.contrastive_accuracy, tol)
    backward(model, out.loss)
    block = model.encoder.blocks
    grads = {
        "vit_base.blocks.0.attn.qkv.weight": block[0].attn.qkv.weight.grad,
        "vit_base.blocks.11.norm2_a.weight": block[11].norm2.weight.grad[0],
        "vit_base.blocks.6.norm1_v.bias": block[6].norm1.bias.grad[1],
        "vit_base.patch_embed_a.proj.weight": model.patch_embed_a.proj.weight.grad,
    }
    for key, grad in grads.items():
        released.check_gradient("cl_grad", key, grad, tol)
    positions = torch.cat([torch.zeros(1, 1, 768, dtype=released.dtype), model.pos_embed.grad], 1)
    released.check_gradient("cl_grad", "vit_base.pos_embed", positions, tol)
    assert model.fusion[0].mlp.fc1.weight.grad is None
    with torch.no_grad():
        features = model.encode(audio, image, audio_keep=keep["audio"], visual_keep=keep["visual"])
    released.check("cl_pooled_audio", features.audio.mean(), tol)
    released.check("cl_pooled_visual", features.visual.mean(), tol)
