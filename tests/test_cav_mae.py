from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from released import EXTENTS, Released

from avfast import CAVMAE, create_model

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(scope="module", params=EXTENTS)
def released(request) -> Released:
    return Released("cav_mae", *request.param)


def test_fine_tuned_logits_and_features_equal_the_released_ones(released):
    tol = TOLERANCE[released.dtype]
    model = CAVMAE.from_released(released.state("finetune")).to(released.dtype).eval()
    rows = None if released.whole else 1
    audio, image = released.input("ft_audio")[:rows], released.input("ft_image")[:rows]
    with torch.no_grad():
        released.check("ft_logits_multimodal", model.classify(audio, image), tol, rows)
        released.check("ft_logits_audioonly", model.classify(audio), tol, rows)
        released.check("ft_logits_videoonly", model.classify(None, image), tol, rows)
        released.check("ft_logits_missingvideoonly", model.classify(None, image, missing=True), tol, rows)
        if not released.whole:
            return
        released.check("ft_logits_missingaudioonly", model.classify(audio, missing=True), tol)
        features = model.encode(audio, image)
        for name, tokens in (
            ("multimodal", features.fused),
            ("audioonly", features.audio),
            ("videoonly", features.visual),
        ):
            released.check(f"ft_tokens_{name}", tokens, tol)
            released.check(f"ft_pooled_{name}", tokens.mean(1), tol)
        frames = torch.stack([image, image.flip(0)], 1)
        logits = model.classify(audio, frames)
        assert_close("frame 1", logits[:, 1], model.classify(audio, image.flip(0)), tol)


def test_pre_training_pass_equals_the_released_one(released):
    tol = TOLERANCE[released.dtype]
    model = CAVMAE.from_released(released.state("pretrain")).to(released.dtype).eval()
    audio, image = released.input("pt_audio"), released.input("pt_image")
    keep = {f"{name}_keep": released.ids(f"pt_keep_{name}") for name in ("audio", "visual")}
    draws = model.draw(len(audio), **keep)
    with torch.set_grad_enabled(released.whole):
        out = model(audio, image, draws)
    released.check("pt_loss_mae_audio_normpix", out.losses["reconstruction_audio"], tol)
    released.check("pt_loss_mae_visual_normpix", out.losses["reconstruction_visual"], tol)
    released.check("pt_loss_contrastive", out.losses["contrastive"], tol)
    released.check("pt_loss_contrastive_weighted", 0.01 * out.losses["contrastive"], tol)
    released.check("pt_loss_total_normpix", out.loss, tol)
    released.check("pt_pred_audio", out.reconstruction["audio"], tol)
    released.check("pt_pred_visual", out.reconstruction["visual"], tol)
    if not released.whole:
        return
    out.loss.backward()
    grads = {
        "blocks_u.0.attn.qkv.weight": model.blocks_u[0].attn.qkv.weight.grad,
        "patch_embed_a.proj.weight": model.patch_embed_a.proj.weight.grad,
        "mask_token": model.decoder.mask_token.grad,
        "norm_v.weight": model.norm.weight.grad[2],
    }
    for key, grad in grads.items():
        released.check_gradient("pt_grad", key, grad, tol)
    with torch.no_grad():
        features = model.encode(audio, image, **keep)
        released.check("pt_pooled_audio", features.audio.mean(1), tol)
        released.check("pt_pooled_visual", features.visual.mean(1), tol)
        released.check("pt_latent", features.fused, tol)
        features = model.encode(audio[:2], image[:2])
        released.check("pt_feat_pooled_audio", features.audio.mean(1), tol)
        released.check("pt_feat_pooled_visual", features.visual.mean(1), tol)
        model.norm_pix, model.contrastive_direction = False, "both"
        out = model(audio, image, draws)
        released.check("pt_loss_mae_audio_raw", out.losses["reconstruction_audio"], tol)
        released.check("pt_loss_mae_visual_raw", out.losses["reconstruction_visual"], tol)
        released.check("pt_loss_contrastive_bidirectional", out.losses["contrastive"], tol)


def test_initial_positions_are_the_released_tables():
    released, model = Released("cav_mae"), create_model("cav_mae_base")
    for name, table in (
        ("pos_embed_a", model.pos_embed_a),
        ("pos_embed_v", model.pos_embed),
        ("decoder_pos_embed_a", model.decoder.pos_embed_a),
        ("decoder_pos_embed_v", model.decoder.pos_embed_v),
    ):
        assert not table.requires_grad
        want = torch.from_numpy(released.expected[f"sincos_{name}_slice_0_8_16"])
        assert_close(name, table[:, ::8, ::16].double(), want, 1e-6)
