from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from released import Released
from small_models import (
    assert_stored,
    figures_of,
    named_weights,
    signals,
    small_inference,
    small_mae_st,
    small_released,
)

from avfast import DiffMAViL, MAViL
from avfast.nn.patches import patchify
from avfast.ops.diffuse_patches import diffuse_patches
from avfast.ops.masked_patch_mse import normalise_patches
from avfast.random import DrawKey

SMALL = {
    "img_size": 32, "num_frames": 8, "audio_size": (128, 64), "embed_dim": 32, "depth": 2, "num_heads": 2,
    "fusion_depth": 1, "decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2,
}  # fmt: skip
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-8}
FINE_TUNED = "finetuned_av (3 fusion blocks)"


def pair(batch: int) -> dict[str, torch.Tensor]:
    return {"audio": signals(batch, 128, 64), "visual": signals(batch, 3, 8, 32, 32)}


def drawn(model, batch=3, **given):
    return model.draw(batch, key=DrawKey(1, 2, range(batch), batch), **given)


# Parity.


def released_state(released: Released, heads: bool = False) -> dict[str, torch.Tensor]:
    """The fine-tuned model; with heads of its own for audio and video alone."""
    state = released.state(FINE_TUNED)
    if not heads:
        return state
    entry = released.manifest[FINE_TUNED]
    extra = released.manifest["no_fusion: extra keys"]
    released.manifest["alone"] = {
        **entry, "keys": extra, "norm_scale_keys": [key for key, *_ in extra if key.endswith("norm_a.weight")]
        + [key for key, *_ in extra if key.endswith("norm_v.weight")],
    }  # fmt: skip
    return {k: v for k, v in state.items() if "_av" not in k} | released.state("alone")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
@torch.no_grad()
def test_tokens_and_logits_equal_the_released_ones(dtype):
    released, tol = Released("mavil", dtype), TOLERANCE[dtype]
    audio, video = released.input("spec")[:, 0], released.input("video")
    model = MAViL.from_released(released_state(released)).to(dtype).eval()
    assert len(model.fusion.blocks) == 3 and list(model.heads) == ["fused"] and model.frontend.video_frames == 8
    found = model.encode(audio, video)
    released.check("audio_tokens_12", found.audio, tol)
    released.check("video_tokens_12", found.visual, tol)
    released.check("logits_av", model.classify(audio, video), tol)
    tokens = {name: model.branches[name].encode(x) for name, x in model.images(audio, video).items()}
    released.check("fusion_tokens_3", torch.cat([*model.fusion(**tokens).values()], 1), tol)
    model.fusion.blocks = model.fusion.blocks[:2]
    fused = model.fusion(**tokens)
    released.check("fusion_tokens_2", torch.cat([*fused.values()], 1), tol)
    released.check("fusion_audio_cls_2", fused["audio"][:, 0], tol)
    released.check("fusion_pooled_2", torch.cat([x[:, 1:].mean(1) for x in fused.values()], 1), tol)


@pytest.mark.slow
@torch.no_grad()
def test_logits_of_each_modality_alone_equal_the_released_ones():
    released, tol = Released("mavil"), TOLERANCE[torch.float32]
    model = MAViL.from_released(released_state(released, heads=True)).eval()
    assert list(model.heads) == ["audio", "visual"] and not model.fusion.blocks
    released.check("logits_a", model.classify(released.input("spec")[:, 0]), tol)
    released.check("logits_v", model.classify(visual=released.input("video")), tol)


CASES = {
    "mavil": (MAViL, {}),
    "mavil cross": (MAViL, {"decoder_attention": "cross"}),
    "mavil diffused": (MAViL, {"mask_content": "diffused", "audio_decoder": "global"}),
    "diffmavil": (DiffMAViL, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_small_model_gives_the_stored_figures(case):
    build, settings = CASES[case]
    model = named_weights(build(**SMALL, **settings))
    assert_stored(case, figures_of(model, *pair(2).values()), "diff" in case)


# The losses.


def contrast(a: torch.Tensor, v: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = F.normalize(a) @ F.normalize(v).T / temperature
    own = torch.arange(len(a))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


@pytest.mark.parametrize("norm_pix", [True, False])
def test_losses_equal_their_definitions(norm_pix):
    model, inputs = DiffMAViL(**SMALL, norm_pix=norm_pix).double().eval(), pair(3)
    draws = drawn(model).to("cpu")
    output = model(**inputs, draws=draws)
    means, images = {}, model.images(**inputs)
    for name, branch in model.branches.items():
        side = draws.sides()[name]
        one_by_one = []
        for kept in side.kept:  # view by view
            plan = drawn(model).to("cpu").sides()[name].plan("encoder")
            both = branch.encode(images[name], plan, torch.stack([kept, kept]))
            one_by_one.append(both[:3])
        means[name] = [x[:, 1:].mean(1) for x in one_by_one]
        target = patchify(images[name], branch.target_patch).gather(
            1, side.masked[..., None].expand_as(output.reconstruction[name])
        )
        if norm_pix:
            target = normalise_patches(target)[0]
        want = (output.reconstruction[name] - target).square().mean()
        assert_close(name, output.losses[f"reconstruction_{name}"], want, 1e-12)
        assert_close(name, output.losses[f"intra_modal_{name}"], contrast(*means[name], 1.0), 1e-10)
    inter = contrast(means["audio"][0], means["visual"][0], 0.1)
    assert_close("inter", output.losses["inter_modal"], inter, 1e-10)
    total = sum(output.losses[f"reconstruction_{n}"] + 0.01 * output.losses[f"intra_modal_{n}"] for n in means)
    assert_close("loss", output.loss, total + 0.1 * inter, 1e-10)


def test_a_clip_that_lacks_a_modality_counts_in_the_intra_modal_loss_of_the_other_alone():
    model, inputs = DiffMAViL(**SMALL).double(), pair(4)
    has = [True, True, True, False]
    found = model(**inputs, draws=drawn(model, 4, has_audio=has)).losses
    other = inputs | {"audio": torch.cat([inputs["audio"][:3], 5 + inputs["audio"][3:]])}
    assert found == model(**other, draws=drawn(model, 4, has_audio=has)).losses
    whole = model(**inputs, draws=drawn(model, 4)).losses
    three = {name: x[:3] for name, x in inputs.items()}
    alone = model(**three, draws=model.draw(3, key=DrawKey(1, 2, range(3), 4))).losses
    for name, loss in found.items():
        assert_close(name, loss, (whole if name == "intra_modal_visual" else alone)[name], 1e-12)


def test_diffmavil_says_its_own_defaults():
    said = inspect.signature(DiffMAViL).parameters
    assert {name: said[name].default for name in ("mask_content", "decoder_attention", "norm_pix", "rounding")} == {
        "mask_content": "diffused", "decoder_attention": "cross", "norm_pix": False, "rounding": "floor"
    }  # fmt: skip
    model = DiffMAViL(**SMALL, decoder_attention="self")
    assert model.audio.mask_content == "diffused" and model.visual.decoder.attention == "self"
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        DiffMAViL(mask=1)


def test_draws_of_other_views_are_refused():
    two, one = MAViL(**SMALL), MAViL(**SMALL, intra_weight=0.0)
    for model, other in ((two, one), (one, two)):
        with pytest.raises(ValueError, match=f"draws hold {other.views} views of audio, the model takes {model.views}"):
            model(**{name: x.float() for name, x in pair(2).items()}, draws=other.draw(2))
    with pytest.raises(ValueError, match="noise_seed is of mask_content"):
        two.draw(2, noise_seed=3)


def test_weights_of_zero_leave_losses_and_views_out():
    model = MAViL(**SMALL, intra_weight=0.0, inter_weight=0.0)
    inputs = {name: x.float() for name, x in pair(2).items()}
    draws = drawn(model, 2)
    assert draws.audio.kept.shape[0] == 1 and not model.contrasts
    assert list(model(**inputs, draws=draws).losses) == ["reconstruction_audio", "reconstruction_visual"]
    contrastive = MAViL(**SMALL | {"decoder_depth": 0})
    found = contrastive(**inputs, draws=drawn(contrastive, 2)).losses
    assert list(found) == ["inter_modal", "intra_modal_audio", "intra_modal_visual"]


def test_masked_tokens_decoded_in_a_subset_give_the_same_values():
    model, inputs = DiffMAViL(**SMALL, decode_fraction=0.4).double(), pair(2)
    some = drawn(model, 2).to("cpu")
    model.eval()
    every = drawn(model, 2).to("cpu")
    assert torch.equal(some.visual.kept, every.visual.kept) and torch.equal(some.audio.masked, every.audio.masked)
    assert some.visual.masked.shape[1] == round(0.4 * every.visual.masked.shape[1])
    few, all_of_them = (model(**inputs, draws=draws).reconstruction["visual"] for draws in (some, every))
    places = (some.visual.masked[..., None] == every.visual.masked[:, None]).to(torch.int8).argmax(2)
    assert torch.equal(every.visual.masked.gather(1, places), some.visual.masked)
    assert_close("predictions", few, all_of_them.gather(1, places[..., None].expand_as(few)), 1e-6)
    with pytest.raises(ValueError, match="decode_fraction must be"):
        MAViL(**SMALL, decode_fraction=0.5)


def test_what_stands_in_for_masked_patches_is_noised_pixels_or_a_token():
    model, inputs = DiffMAViL(**SMALL).double().eval(), pair(2)
    draws = drawn(model, 2, audio_timesteps=torch.tensor([1, 900]), visual_timesteps=torch.tensor([5, 700]))
    noised = model.visual.noised(inputs["visual"], draws.visual, draws.noise)
    want = diffuse_patches(
        inputs["visual"], draws.visual.masked, torch.tensor([5, 700]), model.visual.schedule, int(draws.noise.seed),
        patch=(2, 16, 16), sample_ids=torch.tensor([0, 1]), stream=1,
    )  # fmt: skip
    assert torch.equal(noised, want)
    own = patchify(inputs["visual"], (2, 16, 16)).gather(1, draws.visual.masked[..., None].expand_as(noised))
    own = own.unflatten(2, (-1, 3)).mT.flatten(2)
    assert (noised[0] - own[0]).abs().max() < 1 < (noised[1] - own[1]).abs().max()
    before = model(**inputs, draws=draws).loss
    assert before != model(**inputs, draws=drawn(model, 2, visual_timesteps=torch.tensor([6, 700]))).loss
    barely = drawn(model, 2, visual_timesteps=torch.ones(2, dtype=torch.int64))
    shown = model.figures(inputs, barely, model(**inputs, draws=barely)).reconstruction.visual
    assert torch.equal(shown["input"], inputs["visual"][:, :, 4].float())
    assert 0 < (shown["noised input"] - shown["input"]).abs().max() < 0.2  # 0.025 deviations of noise at t = 1
    assert MAViL(**SMALL).draw(2).noise is None
    with pytest.raises(ValueError, match="timesteps are of mask_content"):
        MAViL(**SMALL).draw(2, audio_timesteps=torch.ones(2, dtype=torch.int64))
    one = drawn(DiffMAViL(**SMALL, timesteps="batch"), 3).audio.timesteps
    assert len(one.unique()) == 1 < len(drawn(model, 3).audio.timesteps.unique())


# Stage 2.

SHALLOW = {**SMALL, "depth": 1, "decoder_depth": 1}


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    return MAViL(**SHALLOW, num_classes=3)


def test_a_student_predicts_the_fused_tokens_of_a_frozen_teacher(teacher, tmp_path):
    torch.save({"model": teacher.state_dict()}, tmp_path / "stage1.pth")
    student = DiffMAViL(**SHALLOW, teacher=str(tmp_path / "stage1.pth")).double()
    names = {name for name, _ in student.named_parameters()}
    assert names == student.state_dict().keys() and not any("teacher" in name for name in names)
    inputs, draws = pair(2), drawn(student, 2).to("cpu")
    output = student(**inputs, draws=draws)
    output.loss.backward()
    assert not output.reconstruction and student.figures(inputs, draws, output).reconstruction is None
    assert all(p.grad is None for p in student.teacher.model.parameters())
    fused = teacher.double().eval().encode(**inputs).fused.detach()
    counts = [teacher.audio.num_patches, teacher.visual.num_patches]
    student.eval()
    tokens = {n: b.encode(student.images(**inputs)[n], draws.sides()[n].plan("encoder"), draws.sides()[n].kept)
              for n, b in student.branches.items()}  # fmt: skip
    seen = student.fusion(tokens["audio"][:2], tokens["visual"][:2], draws.plan("fusion"))
    for (name, branch), features in zip(student.branches.items(), fused.split(counts, 1), strict=True):
        side = draws.sides()[name]
        predicted = branch.decode(seen[name], student.images(**inputs)[name], side, draws.noise)
        wanted = features.gather(1, side.masked[..., None].expand_as(predicted))
        assert_close(name, output.losses[f"distillation_{name}"], (predicted - wanted).square().mean(), 1e-12)
    with pytest.raises(ValueError, match="missing keys: fusion.blocks.1"):
        DiffMAViL(**SHALLOW | {"fusion_depth": 2}, teacher=str(tmp_path / "stage1.pth"))


@pytest.mark.slow
def test_a_step_of_stage_2_compiles_as_a_whole(teacher):
    student = MAViL(**SHALLOW, teacher=teacher.state_dict()).double()
    inputs, draws = pair(2), drawn(student, 2).to("cpu")
    compiled = torch.compile(student, backend="eager", fullgraph=True)
    assert_close("loss", compiled(**inputs, draws=draws).loss, student(**inputs, draws=draws).loss, 1e-12)


# Weights of elsewhere.


def test_encoders_start_from_masked_autoencoders_of_one_modality(tmp_path, caplog):
    model, audio, video = MAViL(**SMALL | {"audio_size": (256, 128)}), small_released(), small_mae_st()
    torch.save(video, tmp_path / "mae_st.pth")
    model.load_pretrained(audio=audio, video=tmp_path / "mae_st.pth")
    assert torch.equal(model.audio.pos_embed, audio["pos_embed"])
    table = model.visual.pos_embed[0, 1:].view(4, 4, 32)
    assert_close("positions", table[2, 3], video["pos_embed_temporal"][0, 2] + video["pos_embed_spatial"][0, 3], 1e-6)
    assert torch.equal(model.visual.blocks[0].attn.qkv.weight[32:64], video["blocks.0.attn.k.weight"])
    with pytest.raises(ValueError, match="mae_st.pth: no AudioMAE checkpoint"):
        model.load_pretrained(audio=tmp_path / "mae_st.pth")
    with pytest.raises(ValueError, match="no mae_st checkpoint"):
        model.load_pretrained(video=audio)
    small = MAViL(**SMALL | {"img_size": 16, "num_frames": 16})  # fewer mel bins, and fewer places in a frame
    small.load_pretrained(audio=audio, video=tmp_path / "mae_st.pth")
    assert "pos_embed 16 x 8 -> 8 x 4 (cut and interpolated)" in caplog.text
    assert "pos_embed 4 x 2 x 2 -> 8 x 1 x 1 (interpolated)" in caplog.text
    spatial, place = video["pos_embed_spatial"][0], small.visual.pos_embed[0, 1:]
    assert_close("one place", place.mean(0), video["pos_embed_temporal"][0].mean(0) + spatial.mean(0), 0.05)


def test_the_inference_model_says_its_settings():
    state = small_inference({"av": 5})
    model = MAViL.from_released(state, img_size=32)
    assert len(model.fusion.blocks) == 1 and model.audio.norm is None and model.audio.decoder is None
    assert model.visual.patch_embed.grid_size == (4, 2, 2) and model.frontend.video_frames == 8
    audio, video = torch.randn(2, 256, 128), torch.randn(2, 3, 8, 32, 32)
    assert model.classify(audio, video).shape == (2, 5)
    with pytest.raises(RuntimeError, match="no audio classification head"):
        model.classify(audio)
    with pytest.raises(RuntimeError, match="without a decoder and without contrast"):
        MAViL.from_released(state, img_size=32, inter_weight=0.0, intra_weight=0.0)(audio, video)
    pretrained = MAViL.from_released(small_inference({}), img_size=32)
    assert not pretrained.heads and pretrained.encode(audio, video).fused.shape == (2, 128 + 16, 32)
    with pytest.raises(ValueError, match="fill no grid of frames of 224 pixels"):
        MAViL.from_released(state)
    with pytest.raises(ValueError, match="no released MAViL checkpoint"):
        MAViL.from_released({"cls_token": torch.zeros(1)})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"audio_decoder": "swin"}, "audio_decoder must be local or global"),
        ({"decoder_attention": "joint"}, "decoder_attention must be self or cross"),
        ({"target_frames": 3}, "target_frames must be 4"),
        ({"img_size": 40, "mask_content": "diffused"}, "patches of 2 x 16 x 16 must divide the input, which is 8 x 40"),
        ({"num_classes": 2, "heads": ("both",)}, "heads must be of audio, visual, fused"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        MAViL(**SMALL | settings)
