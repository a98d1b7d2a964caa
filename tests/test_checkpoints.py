from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from released import Released
from safetensors.torch import save_file

from avfast import CAVMAE, AVSiam, checkpoints

timm = pytest.importorskip("timm")
VIT = "vit_tiny_patch16_224"
SETTINGS = {"audio_size": (64, 32), "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}


@pytest.fixture(scope="module")
def released_state() -> dict[str, torch.Tensor]:
    """The released layout at one encoder block, all zeros."""
    keys = Released("avsiam").manifest["pretrain"]["keys"]
    return {key: torch.zeros(shape) for key, shape, _ in keys if not any(f"blocks.{i}." in key for i in range(1, 12))}


def test_files_wrappers_and_prefixes(tmp_path):
    state = {"module.a": torch.ones(2)}
    torch.save({"model": state, "epoch": 3}, tmp_path / "a.pth")
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    for source in (state, tmp_path / "a.pth", str(tmp_path / "a.safetensors")):
        assert torch.equal(checkpoints.load(source)["a"], torch.ones(2))
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoints.load(tmp_path / "b.pth")
    with pytest.raises(ValueError, match="no tensors; its entries are epoch"):
        checkpoints.load({"epoch": 3})


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
    state["v.pos_embed"] = torch.arange(1214.0)[None, :, None].expand(1, -1, 192)  # two class tokens, 12 x 101 patches
    model = AVSiam.from_timm(VIT, pretrained=False, **SETTINGS)
    model.load_vit(checkpoints.ast(state))
    kernel = state["v.patch_embed.proj.weight"]
    assert torch.equal(model.patch_embed_a.proj.weight, kernel)
    for table in (model.pos_embed[0, :, 0], model.pos_embed_a[0, :, 0]):
        assert torch.equal(table, 2 + torch.arange(len(table)) * 1212 // len(table))
    assert_close("visual kernel", model.patch_embed.proj.weight.sum(1, keepdim=True), kernel, 1e-6)
    with pytest.raises(ValueError, match="unknown keys"):
        checkpoints.ast({"w.blocks": torch.zeros(1)})


def test_a_model_that_is_no_plain_vit_is_refused():
    with pytest.raises(ValueError, match="resnet10t is no plain Vision Transformer"):
        AVSiam.from_timm("resnet10t", pretrained=False)
