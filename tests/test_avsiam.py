from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from released import EXTENTS, Released

from avfast import AVSiam, PackedTokens, create_model
from avfast.models.__main__ import COUNTED, PAPER, count_parameters
from avfast.random import DrawKey

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(scope="module", params=EXTENTS)
def released(request) -> Released:
    return Released("avsiam", *request.param)


@pytest.fixture(scope="module")
def pretrain_state(released) -> dict[str, torch.Tensor]:
    return released.state("pretrain", unread="none" if released.whole else "ast_base")


def backward(model: AVSiam, loss: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    loss.backward()


def test_fine_tuned_logits_and_features_equal_the_released_ones(released):
    tol = TOLERANCE[released.dtype]
    model = AVSiam.from_released(released.state("finetune")).to(released.dtype).eval()
    assert model.decoder is None
    rows = None if released.whole else 1
    audio, image = released.input("ft_audio")[:rows], released.input("ft_image")[:rows]
    with torch.no_grad():
        released.check("ft_logits_audio", model.classify(audio), tol, rows)
        released.check("ft_logits_visual", model.classify(None, image), tol, rows)
        released.check("ft_logits_av", model.classify(audio, image), tol, rows)
        if not released.whole:
            return
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


@pytest.mark.parametrize("variant", [pytest.param("mae_base", marks=pytest.mark.slow), "mae_shared"])
def test_reconstruction_pass_equals_the_released_one(released, pretrain_state, variant):
    tol = TOLERANCE[released.dtype]
    separate = variant == "mae_base"
    if separate and not released.whole:
        pytest.skip("the whole has it")
    model = AVSiam.from_released(pretrain_state, separate_mae_audio=separate).to(released.dtype).eval()
    audio, image = released.input("mae_audio"), released.input("mae_image")
    keep_a, keep_v = released.ids("mae_keep_audio"), released.ids("mae_keep_visual")
    with torch.set_grad_enabled(separate):
        draws = model.draw(len(audio), only="reconstruction", audio_keep=keep_a, visual_keep=keep_v)
        out = model(audio, image, draws)
    assert set(out.losses) == {"reconstruction_audio", "reconstruction_visual"}
    released.check(f"{variant}_loss_audio", out.losses["reconstruction_audio"], tol)
    released.check(f"{variant}_loss_visual", out.losses["reconstruction_visual"], tol)
    released.check(f"{variant}_loss_total", out.loss, tol)
    released.check(f"{variant}_pred_audio", out.reconstruction["audio"], tol)
    released.check(f"{variant}_pred_visual", out.reconstruction["visual"], tol)
    if not separate:
        if not released.whole:
            return
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


@pytest.mark.slow
def test_contrastive_pass_equals_the_released_one(released, pretrain_state):
    if not released.whole:
        pytest.skip("the whole has it")
    tol = TOLERANCE[released.dtype]
    model = AVSiam.from_released(pretrain_state).to(released.dtype)
    keep = {"audio": [None] * 10, "visual": [None] * 10}
    for modality in keep:
        offset, order = 0, torch.from_numpy(released.expected[f"perm_cl_perm_{modality}"]).tolist()
        for group in range(5):
            for ids in released.ids(f"cl_keep_{modality}_g{group}"):
                keep[modality][order[offset]] = ids
                offset += 1
    audio, image = released.input("cl_audio"), released.input("cl_image")
    draws = model.draw(10, only="contrastive", audio_keep=keep["audio"], visual_keep=keep["visual"])
    out = model(audio, image, draws)
    assert set(out.losses) == {"contrastive"} and not out.reconstruction
    released.check("cl_loss", out.loss, tol)
    released.check("cl_accuracy", out.metrics["contrastive_accuracy"], tol)
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


SMALL = {
    "img_size": 32, "patch_size": 8, "audio_size": (40, 16), "embed_dim": 32, "depth": 2, "num_heads": 2,
    "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2,
}  # fmt: skip


def small(**settings) -> AVSiam:
    torch.manual_seed(0)
    return AVSiam(**{**SMALL, **settings}).double()


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, 40, 16, dtype=torch.float64), torch.randn(size, 3, 32, 32, dtype=torch.float64)


def gradients(model: AVSiam) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", sorted(PAPER))
def test_parameter_counts_are_within_1_5_percent_of_the_papers(name):
    counts = count_parameters(name)
    assert abs(sum(counts[part] for part in COUNTED) / (PAPER[name] * 1e6) - 1) < 0.015


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean avsiam_base"):
        create_model("avsiam_bas")


@settings(deadline=None, max_examples=10)
@given(st.data())
def test_a_packed_pass_equals_instances_one_by_one(data):
    model = small(temperature=1.0).eval()
    audio, visual = batch(3)
    keep_a = [torch.randperm(10)[: data.draw(st.integers(1, 10))] for _ in range(3)]
    keep_v = [torch.randperm(16)[: data.draw(st.integers(1, 16))] for _ in range(3)]
    together = model(audio, visual, model.draw(3, audio_keep=keep_a, visual_keep=keep_v))
    features = model.encode(audio, visual, audio_keep=keep_a, visual_keep=keep_v)
    for i in range(3):
        own = model.draw(1, audio_keep=keep_a[i : i + 1], visual_keep=keep_v[i : i + 1])
        alone = model(audio[i : i + 1], visual[i : i + 1], own)
        for name, patches in alone.reconstruction.items():
            assert_close(name, together.reconstruction[name][i : i + 1], patches, 1e-12)
        one = model.encode(audio[i : i + 1], visual[i : i + 1], audio_keep=[keep_a[i]], visual_keep=[keep_v[i]])
        for name in ("audio", "visual", "fused"):
            whole = getattr(features, name)
            got = whole.to_list()[i] if isinstance(whole, PackedTokens) else whole[i]
            assert_close(name, got, getattr(one, name)[0], 1e-12)


def test_an_instance_with_nothing_masked_adds_nothing_to_the_reconstruction():
    model = small()
    audio, visual = batch(2)
    masked_a, masked_v = torch.arange(5), torch.arange(8)
    full = model.draw(2, audio_keep=[masked_a, torch.arange(10)], visual_keep=[masked_v, torch.arange(16)])
    alone = model.draw(1, audio_keep=[masked_a], visual_keep=[masked_v])
    both, one = model(audio, visual, full), model(audio[:1], visual[:1], alone)
    for name in ("reconstruction_audio", "reconstruction_visual"):
        assert_close(name, both.losses[name], one.losses[name], 1e-12)


def test_the_stop_gradient_keeps_the_reconstruction_out_of_the_encoder():
    audio, visual = batch(6)
    for stop in (True, False):
        model = small(contrastive_weight=0.0, stop_gradient=stop)
        model(audio, visual).loss.backward()
        trained = {name for name, grad in gradients(model).items() if grad.abs().sum() > 0}
        assert any(name.startswith("fusion") for name in trained)
        assert any(name.startswith(("encoder", "patch_embed")) for name in trained) is not stop
        assert model.has_unused_parameters


def test_released_passes_split_the_parameters():
    model = small(objective="released")
    assert model.passes == ("contrastive", "reconstruction") and model.has_unused_parameters
    audio, visual = batch(5)
    first = model.draw(5, only="contrastive")
    model(audio, visual, first).loss.backward()
    assert not any(name.startswith(("fusion", "decoder")) for name in gradients(model))
    second = model.draw(5, only="reconstruction")
    assert set(second.audio_keep.lengths) == {2} and set(second.visual_keep.lengths) == {4}
    model.zero_grad(set_to_none=True)
    model(audio, visual, second).loss.backward()
    assert all(name.startswith(("fusion", "decoder")) for name in gradients(model))


def test_a_missing_modality_counts_in_no_loss_of_its_own():
    model = small()
    audio, visual = batch(4)
    draws = model.draw(4, key=DrawKey(0, 0, range(4), 4), has_audio=[True, False, True, True])
    assert 0 in draws.audio_keep.lengths
    changed = audio.clone()
    changed[1] = 1e3
    outs = [model(a, visual, draws) for a in (audio, changed)]
    for name, value in outs[0].losses.items():
        assert torch.equal(value, outs[1].losses[name]), name
    pairs = [0, 2, 3]
    keep = [draws.audio_keep.to_list(), draws.visual_keep.to_list()]
    own = [[ids[i] for i in pairs] for ids in keep]
    three = model(audio[pairs], visual[pairs], model.draw(3, audio_keep=own[0], visual_keep=own[1]))
    assert_close("contrastive", outs[0].losses["contrastive"], three.losses["contrastive"], 1e-12)


@pytest.mark.parametrize("given", ["audio", "visual", "nothing"])
def test_a_batch_without_a_modality_still_touches_every_parameter(given):
    model = small()
    audio, visual = batch(0 if given == "nothing" else 3)
    out = model(audio if given != "visual" else None, visual if given != "audio" else None)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert set(gradients(model)) == {name for name, _ in model.named_parameters()}
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values())


def test_shared_norms_and_separate_encoders_are_settings():
    names = {name for name, _ in small(shared_norms=True).named_parameters()}
    assert not any(p.ndim == 2 for n, p in small(shared_norms=True).named_parameters() if "norm" in n)
    avsep = small(shared=False)
    assert {name for name, _ in avsep.named_parameters()} - names
    assert sum(p.numel() for p in avsep.encoder_a.parameters()) == sum(p.numel() for p in avsep.encoder.parameters())
    avsep(*batch(3)).loss.backward()
    assert set(gradients(avsep)) == {name for name, _ in avsep.named_parameters()}


def test_classification_takes_either_modality_both_and_several_frames():
    model = small(num_classes=7, decoder_depth=0).eval()
    audio, visual = batch(2)
    assert model.classify(audio).shape == model.classify(None, visual).shape == (2, 7)
    frames = torch.stack([visual, visual.flip(0)], 1)
    logits = model.classify(audio, frames)
    assert logits.shape == (2, 2, 7) and model.classify(None, frames).shape == (2, 2, 7)
    assert_close("second frame", logits[:, 1], model.classify(audio, visual.flip(0)), 1e-12)
    with pytest.raises(RuntimeError, match="num_classes"):
        small().classify(audio)
    with pytest.raises(RuntimeError, match="without a decoder"):
        model(audio, visual)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda m, a, v: m(a[:, :30], v),
            ValueError,
            r"audio must be \(B, 40, 16\), got .*; .* with audio_size=\(30, 16\)",
        ),
        (lambda m, a, v: m(a, v[..., :16]), ValueError, r"visual must be \(B, 3, 32, 32\), got \(3, 3, 32, 16\)$"),
        (lambda m, a, v: m(a, v[..., :16, :16]), ValueError, "a model built or loaded with img_size=16 takes it"),
        (lambda m, a, v: m(a[:2], v), ValueError, "batches of 2 and 3"),
        (lambda m, a, v: m(a, v.to(torch.uint8)), ValueError, "floating point"),
        (lambda m, a, v: m.encode(), ValueError, "give audio, visual or both"),
        (lambda m, a, v: m.draw(3, audio_keep=[torch.arange(2)]), ValueError, "audio_keep holds 1 instances"),
        (lambda m, a, v: m(a, v, m.draw(2)), ValueError, "draws are of 2 instances, the batch has 3"),
        (lambda m, a, v: m(a, None, m.draw(3)), ValueError, "keep patches of visual, which is not given"),
        (lambda m, a, v: m.draw(3, only="sideways"), ValueError, "only must be one of joint"),
        (lambda m, a, v: m.draw(3, key=DrawKey(0, 0, range(2), 2)), ValueError, "2 positions for a batch of 3"),
        (lambda m, a, v: small(objective="both"), ValueError, "objective must be"),
        (lambda m, a, v: small(mask_ratios=(1.0,)), ValueError, r"\[0, 1\)"),
        (lambda m, a, v: small(mask_ratios=()), ValueError, "at least one ratio"),
        (lambda m, a, v: small(num_heads=5), ValueError, "not a multiple of num_heads"),
        (lambda m, a, v: small(patch_size=64), ValueError, "holds no patch"),
    ],
)
def test_errors_name_what_was_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call(small(), *batch(3))
