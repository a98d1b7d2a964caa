from __future__ import annotations

import argparse
import collections
import datetime
import gzip
import json
import os
import pathlib
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import assert_close
from released import Released
from safetensors.torch import save_file

from avfast import CAVMAE, AVSiam, DeepAVFusion, checkpoints, create_model
from avfast.nn import sincos
from avfast.released.vit import ast_encoder
from avfast.train import checkpoint
from avfast.train.config import Config
from avfast.train.setup import build_model

timm = pytest.importorskip("timm")
resample_abs_pos_embed = timm.layers.resample_abs_pos_embed
VIT = "vit_tiny_patch16_224"
SETTINGS = {"audio_size": (64, 32), "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
ONE = torch.ones(2)


def one_block(name: str, layout: str) -> dict[str, torch.Tensor]:
    """A released layout with one block of each kind, all zeros."""
    keys = Released(name).manifest[layout]["keys"]
    later = re.compile(r"blocks(_[avu])?\.([1-9]|1\d)\.")
    return {key: torch.zeros(shape) for key, shape, _ in keys if not later.search(key)}


@pytest.fixture(scope="module")
def released_state() -> dict[str, torch.Tensor]:
    return one_block("avsiam", "pretrain")


@pytest.fixture(scope="module")
def cav_mae_state() -> dict[str, torch.Tensor]:
    return one_block("cav_mae", "pretrain")


# Files.


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."])
@pytest.mark.parametrize("wrapper", ["", "model", "state_dict", "model_state_dict", "module", "teacher", "my_net"])
def test_wrappers_and_prefixes(wrapper, prefix):
    state = {f"{prefix}blocks.0.w": ONE, f"{prefix}norm.w": ONE}
    wrapped = {wrapper: state, "epoch": 3, "optimizer": {"state": {0: {"step": ONE}}}} if wrapper else state
    assert list(checkpoints.load(wrapped)) == ["blocks.0.w", "norm.w"]


def test_prefixes_within_names_and_averaged_models():
    state = {
        "n_averaged": torch.ones(()),
        "module.encoder._orig_mod.w": ONE,
        "module.net.neck._fsdp_wrapped_module.b": ONE,
    }
    assert list(checkpoints.load({"ema": {"state_dict": state}})) == ["encoder.w", "neck.b"]
    with pytest.raises(ValueError, match="holds a twice"):
        checkpoints.load({"a": ONE, "module.a": ONE})
    with pytest.raises(ValueError, match="no tensors; its entries are epoch"):
        checkpoints.load({"epoch": 3})


def test_plain_data_beside_the_weights_is_read(tmp_path):
    extra = {
        "args": argparse.Namespace(lr=1e-3, out=pathlib.Path("runs"), layers=collections.OrderedDict(a=1)),
        "best": np.float64(0.37), "epoch": np.int64(3), "done": np.bool_(True), "curve": np.arange(3.0),
        "dtype": np.dtype("f4"), "when": datetime.datetime(2024, 5, 1), "counts": collections.defaultdict(int, a=1),
        "last": collections.deque([1, 2], maxlen=3),
    }  # fmt: skip
    torch.save({"model": {"module.a": ONE}, **extra}, tmp_path / "a.pth")
    torch.save({"model": {"a": ONE}, **extra}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file({"a": ONE}, tmp_path / "a.safetensors")
    (tmp_path / "named.bin").write_bytes((tmp_path / "a.safetensors").read_bytes())
    for name in ("a.pth", "old.pth", "a.safetensors", "named.bin"):
        assert torch.equal(checkpoints.load(str(tmp_path / name))["a"], ONE), name


class Code:
    """Runs when it is unpickled by a reader that lets it."""

    def __reduce__(self):
        return (os.mkdir, ("made-by-a-checkpoint",))


def test_files_that_are_no_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(1000)}, "whole.pth")
    save_file({"a": torch.ones(1000)}, "whole.safetensors")
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1282543933\n"
    contents = {
        "lfs.pth": (lfs, "is a Git LFS pointer"),
        "lfs.safetensors": (lfs, "is a Git LFS pointer"),
        "page.pth": (b"<!DOCTYPE html><html><title>Quota exceeded</title></html>", "is a web page"),
        "empty.pth": (b"", "is empty"),
        "answer.pth": (b'{"error": "gated"}', "is JSON text"),
        "words.pth": (b"Not Found\n", "is text that starts with 'Not Found'"),
        "cut.pth": (pathlib.Path("whole.pth").read_bytes()[:1500], "is cut short or damaged: 1500 bytes"),
        "cut.safetensors": (pathlib.Path("whole.safetensors").read_bytes()[:1500], "cut short or damaged"),
        "noise.safetensors": (b"\xff" * 40, "is no whole safetensors file"),
        "noise.pth": (b"\xff" * 40, "starts with the bytes ff ff"),
        "packed.pth": (gzip.compress(b"a"), "is a packed archive"),
    }
    for name, (content, _) in contents.items():
        pathlib.Path(name).write_bytes(content)
    objects = {
        "list.pth": ([ONE], "found a list"),
        "tensor.pth": (ONE, "found a Tensor"),
        "module.pth": (torch.nn.Linear(2, 2), r"holds a whole pickled model \(torch.nn.modules.linear.Linear\)"),
        "code.pth": ({"model": {"a": ONE}, "extra": Code()}, r"holds Python objects \(posix.mkdir\)"),
    }
    for name, (value, _) in objects.items():
        torch.save(value, name)
    with zipfile.ZipFile("script.pth", "w") as file:
        file.writestr("script/constants.pkl", b"\x80\x02).")
        file.writestr("script/data.pkl", b"\x80\x02).")
    objects["script.pth"] = (None, "is a TorchScript model")
    for name, (_, words) in {**contents, **objects}.items():
        with pytest.raises(ValueError, match=words) as caught:
            checkpoints.load(tmp_path / name)
        assert name in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not pathlib.Path("made-by-a-checkpoint").exists()
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*b.pth"):
        checkpoints.load(tmp_path / "b.pth")
    with pytest.raises(FileNotFoundError, match="is a folder, not a file"):
        checkpoints.load(tmp_path)


# What the caller wants from a released checkpoint.


def test_errors_name_the_file(tmp_path, cav_mae_state):
    path = tmp_path / "cav.pth"
    torch.save({**cav_mae_state, "extra.weight": ONE}, path)
    with pytest.raises(ValueError, match="cav.pth: 1 unknown keys in the checkpoint: extra.weight"):
        CAVMAE.from_released(path)
    with pytest.raises(ValueError, match="cav.pth: no released AVSiam checkpoint"):
        AVSiam.from_released(path)
    torch.save(cav_mae_state, path)
    with pytest.raises(ValueError, match="cav.pth: the checkpoint does not fit the model: .*patch_embed.proj.weight"):
        CAVMAE.from_released(str(path), patch_size=32)
    with pytest.raises(ValueError, match="cav.pth: .*unknown keys"):
        DeepAVFusion(**TINY_FUSION).load_pretrained(image=path)


TINY_FUSION = {
    "img_size": 32, "audio_size": (64, 32), "embed_dim": 32, "depth": 1, "num_heads": 2, "num_fusion_tokens": (2, 1, 1),
    "decoder_depth": 0,
}  # fmt: skip


def test_positions_follow_the_sizes_that_are_asked_for(cav_mae_state, released_state, caplog):
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(64.0), indexing="ij")
    table = torch.stack([row.flatten(), column.flatten()], 1)[None].repeat(1, 1, 384)
    for cls, state, name in ((CAVMAE, cav_mae_state, "pos_embed_a"), (AVSiam, released_state, "vit_base.pos_embed_a")):
        state = {k: v for k, v in state.items() if not k.startswith(("decoder", "mask_token"))} | {name: table}
        cut = cls.from_released(state, audio_size=(512, 128), img_size=384)
        assert torch.equal(cut.pos_embed_a[0].view(8, 32, -1), table[0].view(8, 64, -1)[:, :32])
        assert cut.pos_embed.shape[1] == 576 and cut.frontend_args["num_frames"] == 512
        caplog.clear()
        longer = cls.from_released(state, audio_size=(2048, 64)).pos_embed_a
        assert_close("longer", longer, resample_abs_pos_embed(table, [4, 128], [8, 64], 0), 1e-5)
        assert "pos_embed_a 8 x 64 -> 4 x 128 (interpolated)" in caplog.text
        shorter = cls.from_released(state, audio_size=(512, 128), resizing="interpolate").pos_embed_a
        assert_close("shorter", shorter, resample_abs_pos_embed(table, [8, 32], [8, 64], 0), 1e-5)
        with pytest.raises(ValueError, match="resizing must be one of cut, interpolate, got 'crop'"):
            cls.from_released(state, resizing="crop")
        short = {**state, name: table.view(1, 8, 64, -1)[:, :, :32].flatten(1, 2)}
        assert cls.from_released(short).audio_size == (512, 128)
        with pytest.raises(ValueError, match="pos_embed_a holds 511 positions, which fill no grid of 8 rows"):
            cls.from_released({**state, name: table[:, 1:]})


def test_a_fixed_table_tells_its_grid_and_decoders_are_resized(cav_mae_state):
    state = {**cav_mae_state, "pos_embed_a": sincos(768, (4, 64))[None]}  # 64 mel bins
    state["decoder_pos_embed_a"] = sincos(512, (4, 64))[None]
    model = CAVMAE.from_released(state)
    assert model.audio_size == (1024, 64)
    model = CAVMAE.from_released(state, audio_size=(256, 64), img_size=112).eval()
    assert torch.equal(model.pos_embed_a[0], sincos(768, (4, 16)))
    assert torch.equal(model.decoder.pos_embed_a[0], sincos(512, (4, 16)))
    out = model(torch.zeros(1, 256, 64), torch.zeros(1, 3, 112, 112))
    assert out.reconstruction["visual"].shape == (1, 49, 768)


def test_resizing_moves_only_the_axis_that_differs():
    table = torch.randn(1, 6 * 5, 4)
    grid = table.view(1, 6, 5, 4)
    assert torch.equal(checkpoints.resize(table, (6, 5), (6, 5)), table)
    assert torch.equal(checkpoints.resize(table, (6, 5), (6, 3), cut=1), grid[:, :, :3].flatten(1, 2))
    longer = checkpoints.resize(table, (6, 5), (6, 10), cut=1).view(1, 6, 10, 4)
    assert_close("longer", longer, resample_abs_pos_embed(table, [6, 10], [6, 5], 0).view(1, 6, 10, 4), 1e-6)
    video = torch.randn(1, 1 + 4 * 30, 4)  # a class token, then (time, row, column)
    smaller = checkpoints.resize(video, (4, 6, 5), (3, 3, 5), cut=0)
    assert torch.equal(smaller[:, 0], video[:, 0])
    for i in range(3):
        want = resample_abs_pos_embed(video[:, 1 + 30 * i : 31 + 30 * i], [3, 5], [6, 5], 0)
        assert_close("a time of a video", smaller[:, 1 + 15 * i : 16 + 15 * i], want, 1e-6)


def test_a_run_starts_from_one_of_other_sizes(tmp_path):
    arguments = {"depth": 1, "decoder_depth": 1}
    model = create_model("avsiam_tiny", **arguments)
    saved = {"config": json.loads(Config(model="avsiam_tiny", model_args=arguments).to_json())}
    path = checkpoint.save(tmp_path / "checkpoints", 1, model.state_dict(), saved)
    smaller = arguments | {"audio_size": [96, 64], "img_size": 32}
    config = Config(model="avsiam_tiny", model_args=smaller, init_from=str(tmp_path))
    short = build_model(config)
    assert torch.equal(short.pos_embed_a[0].view(4, 6, -1), model.pos_embed_a[0].view(4, 12, -1)[:, :6])
    assert_close("frames", short.pos_embed, resample_abs_pos_embed(model.pos_embed, [4, 4], [8, 8], 0), 1e-5)
    assert short.decoder.pos_embed_a.shape[1] == 24
    every = build_model(replace(config, resizing="interpolate", init_from=str(path)))
    assert_close("audio", every.pos_embed_a, resample_abs_pos_embed(model.pos_embed_a, [4, 6], [4, 12], 0), 1e-5)


def test_parts_that_are_declared_otherwise_start_anew(cav_mae_state):
    state = one_block("avsiam", "finetune")
    classes = state["mlp_head.1.weight"].shape[0]
    assert AVSiam.from_released(state).head_v[1].out_features == classes
    assert AVSiam.from_released(state, num_classes=None).head_v is None
    with pytest.warns(
        UserWarning, match="head_a, head_av, head_v: not the checkpoint's, starting anew for num_classes=309"
    ):
        model = AVSiam.from_released(state, num_classes=309)
    assert model.head_av[1].weight.shape == (309, 1536) and model.head_av[1].weight.abs().sum() > 0
    assert not model.encoder.blocks[0].attn.qkv.weight.any()
    with pytest.warns(UserWarning, match="head_av: not the checkpoint's"):
        model = AVSiam.from_released(state, joint_head="mean")
    assert not model.head_v[1].weight.any()
    model = CAVMAE.from_released(cav_mae_state, decoder_depth=0, num_classes=309)
    assert model.decoder is None and model.head[1].out_features == 309
    with pytest.warns(UserWarning, match="decoder: not the checkpoint's, starting anew for decoder_depth=2"):
        assert len(CAVMAE.from_released(cav_mae_state, decoder_depth=2).decoder.blocks) == 2


def test_unknown_and_missing_keys_are_listed(released_state):
    model = AVSiam.from_released(released_state)
    assert model.encoder_a is None and len(model.encoder.blocks) == 1 and model.objective == "released"
    assert AVSiam.from_released(released_state, num_classes=5).head_av is not None
    with pytest.raises(ValueError, match="1 unknown keys in the checkpoint: vit_base.gamma"):
        AVSiam.from_released({**released_state, "vit_base.gamma": torch.zeros(1)})
    without = {k: v for k, v in released_state.items() if k != "vit_base.blocks.0.attn.qkv.bias"}
    with pytest.raises(ValueError, match="1 missing keys: encoder.blocks.0.attn.qkv.bias"):
        AVSiam.from_released(without)
    without = {k: v for k, v in released_state.items() if k != "vit_base.blocks.0.norm1_v.bias"}
    with pytest.raises(ValueError, match="vit_base.*norm1_v.bias|encoder.blocks.0.norm1_v.bias"):
        AVSiam.from_released(without)
    with pytest.raises(ValueError, match="wrong shapes: decoder.mask_token"):
        AVSiam.from_released({**released_state, "mask_token": torch.zeros(1, 1, 3)})
    with pytest.raises(ValueError, match="no released AVSiam checkpoint"):
        AVSiam.from_released({"blocks.0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="no released CAV-MAE checkpoint"):
        CAVMAE.from_released(released_state)


def test_a_timm_vit_gives_its_own_features_for_frames():
    vit = timm.create_model(VIT, num_classes=0, class_token=False, global_pool="avg", fc_norm=False).eval()
    model = AVSiam.from_timm(VIT, pretrained=False, **SETTINGS)
    assert (model.embed_dim, len(model.encoder.blocks), model.img_size) == (192, 12, 224)
    model.load_vit(vit.state_dict())
    image = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert_close("tokens", model.eval().encode(None, image).visual, vit.forward_features(image), 1e-5)
    assert_close("audio kernel", model.patch_embed_a.proj.weight, vit.patch_embed.proj.weight.mean(1, True), 1e-6)
    positions = torch.arange(8) * 196 // 8
    assert torch.equal(model.pos_embed_a[0], vit.pos_embed[0, positions])
    for i, fusion in enumerate(model.fusion):
        assert torch.equal(fusion.mlp.fc1.weight, vit.blocks[10 + i].mlp.fc1.weight)
        assert torch.equal(fusion.norm1.weight, vit.blocks[10 + i].norm1.weight)


def test_an_ast_checkpoint_starts_the_shared_encoder():
    vit = timm.create_model(VIT, num_classes=0)
    state = {f"v.{k}": v for k, v in vit.state_dict().items()}
    state["v.patch_embed.proj.weight"] = state["v.patch_embed.proj.weight"].sum(1, keepdim=True)
    state |= {"v.dist_token": torch.zeros(1, 1, 192), "mlp_head.0.weight": torch.zeros(192)}
    row, column = torch.meshgrid(torch.arange(12.0), torch.arange(101.0), indexing="ij")
    table = torch.stack([row.flatten(), column.flatten()], 1)[None].repeat(1, 1, 96)
    state["v.pos_embed"] = torch.cat([torch.full((1, 2, 192), 1e6), table], 1)  # two class tokens
    model = AVSiam.from_timm(VIT, pretrained=False, **{**SETTINGS, "audio_size": (512, 128)})
    model.load_vit(ast_encoder(state))
    kernel = state["v.patch_embed.proj.weight"]
    assert torch.equal(model.patch_embed_a.proj.weight, kernel)
    found = model.pos_embed_a[0, :, :2].view(8, 32, 2)
    assert_close("mel", found[1:7, 3, 0], 1.5 * torch.arange(1, 7) + 0.25, 0.02)
    assert_close(
        "time", found[2, :, 1], 50 / 32 * (torch.arange(32) + 0.5) - 0.5, 0.02
    )  # 512 frames are 50 of stride 10
    found = model.pos_embed[0, :, :2].view(14, 14, 2)
    assert (found.diff(dim=0)[..., 0] > 0).all() and (found.diff(dim=1)[..., 1] > 0).all()
    assert_close("visual kernel", model.patch_embed.proj.weight.sum(1, keepdim=True), kernel, 1e-6)
    with pytest.raises(ValueError, match="unknown keys"):
        ast_encoder({"w.blocks": torch.zeros(1)})


SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64, "num_classes": 0}


def vit_of(**settings) -> torch.nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    vit = VisionTransformer(**{**SMALL, **settings}).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return vit


@pytest.fixture
def offered(monkeypatch):
    """``offered(vit)`` makes it what timm creates."""
    return lambda vit: monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: vit)


@pytest.mark.parametrize(
    "variant",
    [
        {}, {"init_values": 0.5}, {"qkv_bias": False}, {"no_embed_class": True}, {"reg_tokens": 4},
        {"reg_tokens": 4, "no_embed_class": True}, {"patch_size": 8}, {"norm_layer": "layernorm"}, {"mlp_ratio": 2.0},
    ],
    ids=str,
)  # fmt: skip
def test_variants_of_vits_that_are_the_same_function(variant, offered):
    vit = vit_of(**variant)
    offered(vit)
    model = AVSiam.from_timm("variant", **SETTINGS, fusion_depth=1).eval()
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():  # without the tokens that AVSiam has no place for
        patches = vit.patch_embed(image)
        x = vit.blocks(patches + vit.pos_embed[:, -patches.shape[1] :])
        assert_close("tokens", model.encode(None, image).visual, vit.norm(x), 1e-5)
    assert_close("fusion", model.fusion[0].attn.proj.weight, model.encoder.blocks[-1].attn.proj.weight, 1e-6)


@pytest.mark.parametrize(
    "variant, words",
    [
        ({"qk_norm": True, "norm_layer": "layernorm"}, "unknown keys in the checkpoint: blocks.0.attn.q_norm.weight"),
        ({"pre_norm": True}, "norm_pre.weight"),
        ({"pos_embed": "none"}, "no position table"),
        ({"global_pool": "avg"}, "fc_norm.weight, fc_norm.bias; its final norm comes after the pooling"),
        ({"final_norm": False}, "missing keys: norm.weight"),
        ({"act_layer": "gelu_tanh"}, "compute something else"),
        ({"norm_layer": "rmsnorm"}, "missing keys: norm.bias"),
        ({"img_size": (64, 128)}, "not square"),
        ({"patch_size": (16, 8)}, "not square"),
    ],
    ids=str,
)
def test_variants_of_vits_that_are_refused_in_words(variant, words, offered):
    offered(vit_of(**variant))
    with pytest.raises(ValueError, match=f"variant is no plain Vision Transformer: .*{words}"):
        AVSiam.from_timm("variant", **SETTINGS)


def test_state_dicts_of_vits_of_other_grids_patches_and_heads():
    vit = vit_of(img_size=96)
    state = vit.state_dict() | {"head.weight": ONE, "head.bias": ONE, "decoder_embed.weight": ONE}
    row, column = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    positions = (10 * row + column).view(1, 36, 1).expand(-1, -1, 32)
    state["pos_embed"] = torch.cat([torch.full((1, 2, 32), 1e6), positions], 1)
    state["dist_token"] = state["cls_token"]
    settings = {"embed_dim": 32, "depth": 2, "num_heads": 2, "audio_size": (64, 32), "decoder_depth": 0}
    model = AVSiam(img_size=192, **settings)
    model.load_vit(state)
    table = model.pos_embed[0, :, 0].view(12, 12)
    assert_close("rows", table[3:-3, 1].diff(), torch.full((5,), 5.0), 1e-5)
    assert_close("columns", table[1, 3:-3].diff(), torch.full((5,), 0.5), 1e-5)
    with pytest.raises(ValueError, match=r"patch_embed.proj.weight \(32, 3, 16, 16\) instead of \(32, 3, 8, 8\)"):
        AVSiam(img_size=96, patch_size=8, **settings).load_vit(state)
    with pytest.raises(ValueError, match="it has no pos_embed"):
        model.load_vit({k: v for k, v in state.items() if k != "pos_embed"})
    with pytest.raises(ValueError, match="1 missing keys: norm.bias"):
        model.load_vit({k: v for k, v in state.items() if k != "norm.bias"})
    with pytest.raises(ValueError, match="pos_embed holds 31 positions, which fill no grid"):
        model.load_vit({**state, "pos_embed": state["pos_embed"][:, :31]})
    fusion = DeepAVFusion(**{**TINY_FUSION, "depth": 2})
    fusion.load_pretrained(image=state)
    assert torch.equal(fusion.blocks_v[1].mlp.fc2.weight, vit.blocks[1].mlp.fc2.weight)


def test_a_model_that_is_no_plain_vit_is_refused():
    with pytest.raises(ValueError, match="resnet10t is no plain Vision Transformer"):
        AVSiam.from_timm("resnet10t", pretrained=False)
