from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close
from test_fusion import materialised
from torch import nn

from avfast import DeepAVFusion, create_model, flops
from avfast.models import Output
from avfast.models.fusion_draws import fused_layers
from avfast.nn import patchify
from avfast.random import DrawKey

SMALL = {
    "img_size": 32, "patch_size": 8, "audio_size": (40, 16), "embed_dim": 32, "depth": 3, "num_heads": 2,
    "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "num_fusion_tokens": (4, 2, 2),
}  # fmt: skip


def small(**settings) -> DeepAVFusion:
    torch.manual_seed(0)
    return DeepAVFusion(**{**SMALL, **settings}).double()


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, 40, 16, dtype=torch.float64), torch.randn(size, 3, 32, 32, dtype=torch.float64)


def gradients(model: DeepAVFusion) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trained(model: DeepAVFusion) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "settings, encoder, both",
    [
        ({}, 268_660_224, 320_563_712),
        ({"fusion_attn_ratio": 1.0, "fusion_mlp_ratio": 4.0}, 327_094_272, 378_997_760),
        ({"fusion_mlp_ratio": 4.0}, 311_155_200, 363_058_688),
        ({"fusion_arch": "dense"}, 196_031_232, None),
        ({"fusion_arch": "token"}, 192_492_288, None),
    ],
)
def test_parameter_counts_are_those_of_the_released_models(settings, encoder, both):
    with torch.device("meta"):
        model = create_model("deepavfusion_base", **settings)
    total = sum(p.numel() for p in model.parameters())
    assert total - sum(p.numel() for p in model.decoders.parameters()) == encoder
    assert both in (total, None)
    if settings.get("fusion_attn_ratio") == 1.0:
        with torch.device("meta"):
            named = create_model("deepavfusion_audioset")
        assert sum(p.numel() for p in named.parameters()) == both


GFLOP = {("dense", False): 55.5, ("factorized", False): 62.5, ("dense", True): 15.5, ("factorized", True): 17.7}


@pytest.mark.parametrize("arch, masked", GFLOP)
def test_the_encoder_computes_nothing_that_is_thrown_away(arch, masked):
    with torch.device("meta"):
        model = create_model("deepavfusion_base", fusion_arch=arch, decoder_depth=0)
        audio, visual = torch.empty(1, 192, 128), torch.empty(1, 3, 224, 224)
        keep = {"audio_keep": torch.arange(19)[None], "visual_keep": torch.arange(49)[None]} if masked else {}
    with torch.no_grad():
        counts = flops.breakdown(model.encode, audio, visual, **keep)
    na, nv = (19, 49) if masked else (96, 196)
    own = 12 * 4 * 768 * (nv * (nv + 32) + na * (na + 32))  # softmax attention of the unimodal blocks
    assert counts["avfast.packed_attention"] == own
    # the bounds are without the unimodal blocks' own attention, which PyTorch's counter does not see on a CPU
    assert sum(counts.values()) - own <= GFLOP[arch, masked] * 1e9
    if masked:
        assert sum(counts.values()) <= GFLOP[arch, masked] * 1e9


@pytest.mark.parametrize("arch", ["dense", "factorized"])
@pytest.mark.parametrize("layers", ["all", 2, "none", (0, 2)])
def test_the_encoder_equals_the_published_form_with_pairs_formed(arch, layers):
    model = small(fusion_arch=arch, fusion_layers=layers)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    data = batch(2)
    keep_a, keep_v = torch.tensor([[0, 4, 7], [9, 2, 1]]), torch.tensor([[3, 0, 15, 8], [1, 2, 3, 4]])
    for kept in ({}, {"audio_keep": keep_a, "visual_keep": keep_v}):
        got = model.encode(*data, **kept)
        want = materialised.Encoder(model, *kept.values())(*data)
        results = []
        for outs in ((got.audio, got.visual, got.fused), want):
            torch.manual_seed(1)
            loss = sum((x * torch.randn_like(x)).sum() for x in outs)
            names = [n for n in sorted(trained(model)) if not n.startswith("decoders")]
            leaves = [model.get_parameter(n) for n in names]
            results.append(torch.autograd.grad(loss, leaves, allow_unused=True))
        for name, a, b in zip(("audio", "visual", "fused"), (got.audio, got.visual, got.fused), want, strict=True):
            assert_close(name, a, b, 1e-12)
        scale = max(g.abs().max().item() for g in results[1] if g is not None)
        for name, a, b in zip(names, *results, strict=True):
            assert (a is None) == (b is None), name
            if a is not None:
                assert_close(name, a, b, 1e-11, scale)


def test_draws_keep_the_papers_shares_and_follow_the_key():
    with torch.device("meta"):
        big = create_model("deepavfusion_base", depth=1, decoder_depth=1)
    draws = big.draw(3)
    assert draws.audio_keep.lengths == (19,) * 3 and draws.visual_keep.lengths == (49,) * 3
    model = small()
    key = DrawKey(0, 7, range(6), 6)
    one, same, other = (model.draw(6, key=k) for k in (key, key, DrawKey(0, 8, range(6), 6)))
    assert torch.equal(one.audio_keep.ids, same.audio_keep.ids)
    assert not torch.equal(one.visual_keep.ids, other.visual_keep.ids)
    half = model.draw(3, key=DrawKey(0, 7, range(3, 6), 6))
    assert torch.equal(half.visual_keep.ids, one.visual_keep.ids[3 * 4 :])
    generated = [model.draw(6, torch.Generator().manual_seed(3)).audio_keep.ids for _ in range(2)]
    assert torch.equal(*generated)


@pytest.mark.parametrize("arch", ["dense", "factorized", "token"])
def test_ragged_batches_equal_instances_one_by_one(arch):
    model = small(fusion_arch=arch).eval()
    audio, visual = batch(4)
    keep_a = [torch.randperm(10)[:n] for n in (3, 5, 2, 5)]
    keep_v = [torch.randperm(16)[:n] for n in (2, 1, 9, 4)]  # the longest audio has two orders
    together = model(audio, visual, model.draw(4, audio_keep=keep_a, visual_keep=keep_v))
    features = model.encode(audio, visual, audio_keep=keep_a, visual_keep=keep_v)
    for i in range(4):
        own = slice(i, i + 1)
        alone = model(audio[own], visual[own], model.draw(1, audio_keep=keep_a[own], visual_keep=keep_v[own]))
        for name, patches in alone.reconstruction.items():
            assert_close(name, together.reconstruction[name][own], patches, 1e-12)
        one = model.encode(audio[own], visual[own], audio_keep=keep_a[own], visual_keep=keep_v[own])
        assert_close("audio", features.audio.to_list()[i], one.audio[0], 1e-12)
        assert_close("visual", features.visual.to_list()[i], one.visual[0], 1e-12)
        assert_close("fused", features.fused[i], one.fused[0], 1e-12)


def test_a_missing_modality_counts_in_no_loss_of_its_own():
    model = small()
    audio, visual = batch(4)
    draws = model.draw(4, key=DrawKey(0, 0, range(4), 4), has_audio=[True, False, True, True])
    assert draws.audio_keep.batch_lengths()[1] == 0
    changed = audio.clone()
    changed[1] = 1e3
    outs = [model(a, visual, draws) for a in (audio, changed)]
    for name, value in outs[0].losses.items():
        assert torch.equal(value, outs[1].losses[name]), name
    keep = [draws.audio_keep.to_list(), draws.visual_keep.to_list()]
    rows = [0, 2, 3]
    own = [[ids[i] for i in rows] for ids in keep]
    three = model(audio[rows], visual[rows], model.draw(3, audio_keep=own[0], visual_keep=own[1]))
    assert_close("audio", outs[0].losses["reconstruction_audio"], three.losses["reconstruction_audio"], 1e-12)
    silent = model.encode(visual=visual[1:2], audio_keep=keep[0][:1], visual_keep=keep[1][1:2]).fused
    both = model.encode(audio, visual, audio_keep=keep[0], visual_keep=keep[1]).fused
    assert_close("fused", both[1:2], silent, 1e-12)


@pytest.mark.parametrize("arch", ["dense", "factorized", "token"])
@pytest.mark.parametrize("given", ["audio", "visual", "nothing"])
def test_a_batch_without_a_modality_still_touches_every_parameter(given, arch):
    model = small(fusion_arch=arch)
    audio, visual = batch(0 if given == "nothing" else 3)
    out = model(audio if given != "visual" else None, visual if given != "audio" else None)
    out.loss.backward()
    assert torch.isfinite(out.loss) and not model.has_unused_parameters
    assert set(gradients(model)) == trained(model)
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values())
    absent = {"audio": "visual", "visual": "audio"}.get(given)
    if absent:
        assert out.losses[f"reconstruction_{absent}"] == 0 < out.losses[f"reconstruction_{given}"]
        features = model.encode(**{given: audio if given == "audio" else visual})
        assert getattr(features, absent) is None and features.fused.shape == (3, 8, 32)


@pytest.mark.parametrize("layers", ["all", 1, "none"])
def test_every_parameter_is_trained_and_fixed_tables_are_not(layers):
    model = small(train_decoder_positions=True, fusion_layers=layers)
    model(*batch(3)).loss.backward()
    fixed = {name for name, _ in model.named_parameters()} - trained(model)
    assert fixed == {"pos_embed", "pos_embed_a"}
    assert set(gradients(model)) == trained(model)
    assert all(grad.abs().max() > 0 for grad in gradients(model).values())
    for block in model.fusion_blocks.values():
        assert block.attn.kv.bias.grad[: block.attn.widths[0]].abs().max() == 0  # the key bias of pairs cancels
    positions = {f"decoders.{name}.pos_embed" for name in ("audio", "visual")}
    assert trained(model) - trained(small(fusion_layers=layers)) == positions
    assert all(name.startswith(model.unimodal_parts) for name in trained(model) if name.startswith(("blocks", "patch")))


@pytest.mark.parametrize("layers, late", [("all", ("2",)), ((0, 1), ("1", "2"))])
def test_decoders_of_fusion_tokens_alone_leave_the_last_unimodal_blocks_untrained(layers, late):
    model = small(decoder_input="fusion", fusion_layers=layers)
    assert model.has_unused_parameters
    model(*batch(3)).loss.backward()
    assert model.eval()(*batch(3)).reconstruction["visual"].shape == (3, 16, 192)
    untrained = trained(model) - set(gradients(model))
    parts = ("norm_a.", "norm_v.", *(f"blocks_{m}.{i}." for i in late for m in "av"))
    assert untrained == {name for name in trained(model) if name.startswith(parts)}
    assert untrained == {name for name in trained(model) if name.startswith(model.unused_parts)}
    assert {name.split(".")[1] for name in gradients(model) if name.startswith("blocks_a.")} == {"0", "1", "2"} - {
        *late
    }
    with pytest.raises(ValueError, match="needs a fusion layer"):
        small(decoder_input="fusion", fusion_layers="none")


def test_a_step_with_a_missing_modality_compiles_whole():
    model = small(depth=1)
    data, draws = batch(3), model.draw(3, has_audio=[True, False, True]).to("cpu")
    torch.compile(model, fullgraph=True, backend="aot_eager")(*data, draws).loss.backward()
    got = gradients(model)
    model.zero_grad()
    model(*data, draws).loss.backward()
    for name, grad in gradients(model).items():
        assert_close(name, got[name], grad, 1e-10)
    torch._dynamo.reset()


HAS_VISUAL = (False, False, False, True, True)


def share(decoder_input: str, rows: range) -> tuple[DeepAVFusion, tuple]:
    """The same model everywhere, and some of a batch of five clips of which three have no pictures."""
    model = small(decoder_input=decoder_input)
    audio, visual = batch(5)
    draws = model.draw(len(rows), key=DrawKey(0, 0, rows, 5), has_visual=[HAS_VISUAL[i] for i in rows])
    return model, (audio[rows.start : rows.stop], visual[rows.start : rows.stop], draws)


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for decoder_input in ("all", "fusion"):
        model, data = share(decoder_input, (range(3), range(3, 5))[rank])
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=model.has_unused_parameters)
        for _ in range(2):  # DDP sees in the second pass what it missed in the first
            model.zero_grad()
            loss = wrapped(*data).loss
            loss.backward()
        torch.save((loss.detach(), gradients(model)), f"{folder}/{decoder_input}_{rank}")
    dist.destroy_process_group()


def test_two_processes_equal_one_where_one_of_them_has_no_pictures(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    for decoder_input in ("all", "fusion"):
        model, data = share(decoder_input, range(5))
        want = model(*data).loss
        want.backward()
        (loss, got), (other, _) = (torch.load(tmp_path / f"{decoder_input}_{rank}") for rank in range(2))
        assert_close("mean loss", (loss + other) / 2, want, 1e-12)
        for name, grad in gradients(model).items():
            assert_close(name, got[name], grad, 1e-11, 1.0)


@pytest.mark.parametrize("layers, depth, want", [
    ("all", 3, (0, 1, 2)), ("none", 3, ()), (0, 3, ()), (1, 3, (2,)), (3, 3, (0, 1, 2)), ([2, 0], 3, (0, 2)),
])  # fmt: skip
def test_fusion_layers(layers, depth, want):
    assert fused_layers(layers, depth) == want


@pytest.mark.parametrize("layers", [4, -1, True, "late", (0, 0), (3,), ("1",)])
def test_fusion_layers_that_do_not_exist(layers):
    with pytest.raises(ValueError, match="fusion_layers must be"):
        fused_layers(layers, 3)


def test_fusion_attention_gives_both_factors_in_batch_order():
    model = small(fusion_arch="dense", fusion_layers=2)
    audio, visual = batch(3)
    maps = model.fusion_attention(audio, visual)
    assert list(maps) == [1, 2]
    p, r = maps[1]
    assert p.shape == (3, 2, 8, 10) and r.shape == (3, 2, 8, 16) and not p.requires_grad
    assert_close("p", p.sum(-1), torch.ones(3, 2, 8), 1e-12)
    keep_a = [torch.arange(n) for n in (3, 10, 5)]
    p, r = model.fusion_attention(audio, visual, audio_keep=keep_a)[2]
    alone = model.fusion_attention(audio[:1], visual[:1], audio_keep=keep_a[:1])[2]
    assert_close("first p", p[:1, :, :, :3], alone[0], 1e-12)
    assert_close("first r", r[:1], alone[1], 1e-12)
    assert p[0, :, :, 3:].abs().max() == 0
    for arch, error in (("factorized", None), ("token", ValueError)):
        other = small(fusion_arch=arch)
        if error:
            with pytest.raises(error, match="one softmax"):
                other.fusion_attention(audio, visual)
        else:
            assert other.fusion_attention(audio, visual)[0][0].shape == (3, 2, 4, 10)


def test_reconstructions_become_inputs_again():
    model = small(norm_pix_audio=False)
    audio, visual = batch(2)
    perfect, wanted = {}, {}
    for name, inputs, patches in (
        ("audio", audio, patchify(audio.mT[:, None], (8, 8))),
        ("visual", visual, patchify(visual, (8, 8))),
    ):
        if name == "visual":
            patches = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        perfect[name], wanted[name] = patches, inputs.float()
    shown = model.figures({"audio": audio, "visual": visual}, model.draw(2), Output(None, reconstruction=perfect))
    for name, found in (("audio", shown.reconstruction.audio), ("visual", shown.reconstruction.visual)):
        seen, guess = found["masked"], found["reconstruction"]
        assert_close(name, guess, wanted[name], 1e-6)
        assert torch.isnan(seen).any() and ((seen == wanted[name]) | torch.isnan(seen)).all()
    raw, normed = (small(norm_pix_visual=flag)(audio, visual, model.draw(2, key=DrawKey(0, 0, range(2), 2))).losses
                   for flag in (False, True))  # fmt: skip
    assert raw["reconstruction_audio"] == normed["reconstruction_audio"]
    assert raw["reconstruction_visual"] != normed["reconstruction_visual"]


def mae_state(model: DeepAVFusion, channels: int) -> dict[str, torch.Tensor]:
    """A masked autoencoder of the model's width in timm's names, with what is left out."""
    state = {f"blocks.{k}": torch.randn_like(v) for k, v in model.blocks_a.state_dict().items()}
    state |= {f"norm.{k}": torch.randn_like(v) for k, v in model.norm_a.state_dict().items()}
    state["patch_embed.proj.weight"] = torch.randn(32, channels, 8, 8).double()
    state["patch_embed.proj.bias"] = torch.randn(32).double()
    left_out = {"cls_token": (1, 1, 32), "pos_embed": (1, 17, 32), "mask_token": (1, 1, 16)}
    state |= {k: torch.randn(s) for k, s in left_out.items()}
    return state | {"decoder_pos_embed": torch.randn(1, 17, 16), "decoder_blocks.0.attn.tau": torch.randn(2)}


def test_unimodal_parts_start_from_masked_autoencoders(tmp_path):
    model = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    image, audio = mae_state(model, 3), mae_state(model, 1)
    torch.save({"model": audio}, tmp_path / "audiomae.pth")
    model.load_pretrained(image, tmp_path / "audiomae.pth")
    for name, value in model.state_dict().items():
        loaded = name.startswith(model.unimodal_parts)
        assert torch.equal(value, before[name]) is not loaded, name
    assert torch.equal(model.patch_embed.proj.weight, image["patch_embed.proj.weight"])
    assert torch.equal(model.blocks_a[1].attn.qkv.weight, audio["blocks.1.attn.qkv.weight"])
    assert torch.equal(model.norm_v.bias, image["norm.bias"])
    # a patch of 8 frames and 8 mel bins through the kernel as AudioMAE applies it, to (time, mel)
    spectrogram = torch.randn(1, 40, 16, dtype=torch.float64)
    want = (audio["patch_embed.proj.weight"][:, 0] * spectrogram[0, :8, :8]).sum((1, 2))
    got = model.patch_embed_a(spectrogram.transpose(1, 2)[:, None])[0]
    assert_close("first token", got, want + audio["patch_embed.proj.bias"], 1e-12)
    other = small()
    other.load_pretrained(audio=audio)
    assert torch.equal(other.blocks_v[0].attn.qkv.weight, before["blocks_v.0.attn.qkv.weight"])
    with pytest.raises(ValueError, match="1 unknown keys in the checkpoint: fc_norm.weight"):
        other.load_pretrained(image={**image, "fc_norm.weight": torch.zeros(32)})
    with pytest.raises(ValueError, match="wrong shapes: patch_embed.proj.weight"):
        other.load_pretrained(image=audio)


def test_the_front_end_makes_the_models_inputs():
    model = create_model("deepavfusion_tiny")
    assert type(model.frontend).__name__ == "HTKFrontend"
    seconds = model.frontend.num_samples
    assert model.frontend.audio(torch.randn(2, seconds)).shape == (2, *model.audio_size)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m, a, v: m(a[:, :30], v), ValueError, r"audio must be \(B, 40, 16\), got \(3, 30, 16\)"),
        (lambda m, a, v: m(a[:2], v), ValueError, "batches of 2 and 3"),
        (lambda m, a, v: m.encode(), ValueError, "give audio, visual or both"),
        (lambda m, a, v: m.draw(3, audio_keep=[torch.arange(2)]), ValueError, "audio_keep holds 1 instances"),
        (lambda m, a, v: m.encode(a, v, audio_keep=[torch.arange(2)]), ValueError, "audio_keep holds 1 instances"),
        (lambda m, a, v: m.draw(3, only="sideways"), ValueError, "only must be one of joint"),
        (lambda m, a, v: small(decoder_input="tokens"), ValueError, "decoder_input must be"),
        (lambda m, a, v: small(fusion_arch="sparse"), ValueError, "arch must be one of"),
        (lambda m, a, v: small(audio_mask_ratio=1.0), ValueError, r"\[0, 1\)"),
        (lambda m, a, v: small(visual_mask_ratio=-0.1), ValueError, r"\[0, 1\)"),
        (lambda m, a, v: small(num_fusion_tokens=(4, 2)), ValueError, "three positive numbers"),
    ],
)
def test_errors_name_what_was_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call(small(), *batch(3))
