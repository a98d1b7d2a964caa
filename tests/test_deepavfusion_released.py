from __future__ import annotations

import math
import re
from functools import cached_property

import numpy as np
import pytest
import torch
from helpers import assert_close
from released import Released

from avfast import DeepAVFusion
from avfast.models import Features, patched
from avfast.nn.block import add
from avfast.released import deepavfusion

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
ARCHS = {"dense": "dense_mmi", "factorized": "factorized_mmi", "token": "token"}
TABLES = {
    "encoder.image.pos_embed": "pos_image", "encoder.audio.pos_embed": "pos_audio",
    "image_decoder_pos_embed": "decpos_image", "audio_decoder_pos_embed": "decpos_audio",
}  # fmt: skip


class ReleasedFusion(Released):
    """The released code with one kind of fusion."""

    def __init__(self, arch: str, dtype: torch.dtype = torch.float32, whole: bool = True) -> None:
        super().__init__("deepavfusion", dtype, whole)
        self.arch, self.name = arch, ARCHS[arch]

    def keys(self, decoders: bool) -> dict[str, list[int]]:
        """Keys and shapes of the released state dict, in alphabetical order."""
        layouts = self.manifest["keys (# counts from 0 to the first number)"]
        patterns = layouts[f"encoder_{self.name}"] | (layouts["decoders"] if decoders else {})
        return dict(sorted((k.replace("#", str(i)), shape) for k, (n, shape) in patterns.items() for i in range(n)))

    def table(self, name: str) -> torch.Tensor:
        """A position table from its parts for columns and rows."""
        column, row = (torch.from_numpy(self.expected[f"{name}_{axis}"]) for axis in "wh")
        grid = (len(row), len(column), -1)
        return torch.cat([column[None].expand(grid), row[:, None].expand(grid)], 2).flatten(0, 1)[None]

    @cached_property
    def state(self) -> dict[str, torch.Tensor]:
        """The released state dict; with decoders, unless nothing is known about them."""
        return self.filled(self.keys(decoders=self.arch != "token"))

    def first_layers(self, count: int) -> dict[str, torch.Tensor]:
        """The encoder's state dict with its first layers alone."""
        layer = re.compile(r"blocks\.(\d+)\.")
        keys = self.keys(decoders=False).items()
        return self.filled({k: v for k, v in keys if not (m := layer.search(k)) or int(m[1]) < count})

    def filled(self, keys: dict[str, list[int]]) -> dict[str, torch.Tensor]:
        """Synthetic weights, which follow from their names."""
        state = {}
        for key, shape in keys.items():
            if key in TABLES:
                state[key] = self.table(TABLES[key])
                continue
            n = self.normal(key, shape)
            if key.endswith(".weight"):
                n = 1 + 0.1 * n if len(shape) == 1 else n / math.sqrt(math.prod(shape[1:]))
            else:
                n = 0.02 * n
            state[key] = torch.from_numpy(n.astype(np.float32))
        return state

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Audio as ``(B, frames, mels)`` and images."""
        return self.input("audio").squeeze(1).mT, self.input("image")

    def kept(self) -> dict[str, torch.Tensor]:
        return {
            "audio_keep": torch.from_numpy(self.expected["audio_ids_keep"]),
            "visual_keep": torch.from_numpy(self.expected["image_ids_keep"]),
        }

    def check_slices(self, name: str, got: torch.Tensor, tol: float) -> None:
        """Compare with a stored slice, whose steps its name gives."""
        (key,) = [key for key in self.expected if key.startswith(f"{name}_slice_")]
        rows, columns = (int(x) for x in key.split("_")[-2:])
        assert_close(key, got[:, ::rows, ::columns], torch.from_numpy(self.expected[key]), tol)


def statistics(*tokens: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.stack([x.double().mean(), x.double().std(correction=0)]) for x in tokens])


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("factorized", torch.float32, False), id="factorized-float32-forward"),
        *(
            pytest.param((arch, dtype, True), marks=pytest.mark.slow, id=f"{arch}-{str(dtype)[6:]}")
            for dtype in TOLERANCE
            for arch in ARCHS
        ),
    ],
)
def released(request) -> ReleasedFusion:
    return ReleasedFusion(*request.param)


@pytest.fixture(scope="module")
def model(released) -> DeepAVFusion:
    settings, weights = deepavfusion.convert(released.state)
    with torch.device("meta"):  # from_released would fill 300 million parameters twice
        model = DeepAVFusion(**settings)
    model.load_state_dict({k: v.to(released.dtype) for k, v in weights.items()}, assign=True)
    return model.eval()


def by_layer(model: DeepAVFusion, audio, image, **keep) -> list[Features]:
    """Tokens after each layer, before the final norms."""
    draws, states = model.trace(audio, image, **keep)
    layers = [(add(*a), add(*v), draws.batch_order(tokens)) for a, v, tokens in states[1:]]
    return [patched.features(*layer, draws, True, True) for layer in layers]


@pytest.mark.parametrize("masked", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["masked", "full"])
def test_tokens_of_every_layer_equal_the_released_ones(released, model, masked):
    tol = TOLERANCE[released.dtype]
    kind = f"{released.name}_{'masked' if masked else 'full'}"
    audio, image = released.inputs()
    with torch.no_grad():
        final = model.encode(audio, image, **(released.kept() if masked else {}))
        layers = by_layer(model, audio, image, **(released.kept() if masked else {}))
    for name, tokens in (("image", final.visual), ("audio", final.audio), ("fusion", final.fused)):
        released.check_slices(f"{kind}_{name}", tokens.double(), tol)
    got = statistics(final.visual, final.audio, final.fused)
    assert_close("mean and deviation", got, torch.from_numpy(released.expected[f"{kind}_mean_std"]), tol)
    got = torch.stack([statistics(x.visual, x.audio, x.fused) for x in layers])
    assert_close("layers", got, torch.from_numpy(released.expected[f"{kind}_layer_mean_std"]), tol)
    if not masked:
        pooled = torch.stack([x.double().mean(1)[:, ::2] for x in (final.visual, final.audio, final.fused)], 1)
        assert_close("pooled", pooled, torch.from_numpy(released.expected[f"{kind}_pooled"]), tol)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_first_layers_of_every_kind_of_fusion_equal_the_released_ones(arch):
    released = ReleasedFusion(arch)
    model = DeepAVFusion.from_released(released.first_layers(2)).eval()
    audio, image = released.inputs()
    for kind, kept in (("masked", released.kept()), ("full", {})):
        with torch.no_grad():
            layers = by_layer(model, audio, image, **kept)
        got = torch.stack([statistics(x.visual, x.audio, x.fused) for x in layers])
        want = torch.from_numpy(released.expected[f"{released.name}_{kind}_layer_mean_std"][:2])
        assert_close(kind, got, want, TOLERANCE[torch.float32])


def test_losses_predictions_and_gradients_equal_the_released_ones(released, model):
    if released.arch == "token":
        pytest.skip("there are no numbers of masked pre-training with token fusion")
    tol, prefix = TOLERANCE[released.dtype], f"avmae_{released.name}"
    fixed = ("encoder.image.pos_embed", "encoder.audio.pos_embed")
    trainable = {k: released.whole and k not in fixed for k in released.state}
    leaves = {k: v.detach().to(released.dtype).requires_grad_(trainable[k]) for k, v in released.state.items()}
    _, weights = deepavfusion.convert(leaves)
    audio, image = released.inputs()
    out = torch.func.functional_call(model, weights, (audio, image, model.draw(len(audio), **released.kept())))
    losses = torch.stack([out.losses["reconstruction_visual"], out.losses["reconstruction_audio"], out.loss])
    assert_close("losses", losses.double(), torch.from_numpy(released.expected[f"{prefix}_losses"]), tol)
    predictions = out.reconstruction["visual"], out.reconstruction["audio"]
    for name, patches in zip(("image", "audio"), predictions, strict=True):
        released.check_slices(f"{prefix}_pred_{name}", patches.double(), tol)
    want = torch.from_numpy(released.expected[f"{prefix}_pred_mean_std"])
    assert_close("predictions", statistics(*predictions), want, tol)
    if not released.whole:
        return
    out.loss.backward()
    trained = {k: v for k, v in leaves.items() if v.requires_grad}
    assert all(v.grad is not None for v in trained.values())
    largest = max(v.grad.abs().max().item() for v in trained.values())
    norms = torch.stack([v.grad.double().norm() for v in trained.values()])
    want = torch.from_numpy(released.expected[f"{prefix}_grad_l2_all"])
    for key, got, norm in zip(trained, norms, want, strict=True):
        assert_close(f"norm of the gradient of {key}", got, norm, tol, norms.max().item())
    for name, index in released.manifest["gradient slices"].items():
        if not name.startswith(f"{prefix}_grad::"):
            continue
        gradient = trained[name.split("::")[1]].grad.double()
        steps = tuple(slice(None, None, int(part.split("::")[1]) if "::" in part else 1) for part in index.split(", "))
        assert_close(name, gradient[steps], torch.from_numpy(released.expected[name]), tol, largest)


def test_the_layout_of_the_released_checkpoint_has_893_tensors():
    keys = ReleasedFusion("factorized").keys(decoders=True)
    assert len(keys) == 893
    assert len(deepavfusion.convert({k: torch.empty(s, device="meta") for k, s in keys.items()})[1]) == 893 - 2 * 12


def test_unknown_and_missing_keys_are_listed():
    keys = ReleasedFusion("factorized").keys(decoders=True)
    state = {k: torch.zeros(s) for k, s in keys.items() if not any(f"blocks.{i}." in k for i in range(1, 12))}
    model = DeepAVFusion.from_released({f"module.{k}": v for k, v in state.items()})
    assert (model.fusion_arch, model.fusion_layers, len(model.blocks_a)) == ("factorized", (0,), 1)
    block = model.fusion_blocks["0"]
    assert block.residual == "normed" and block.attn.scale == 0.125 and block.num_tokens == (16, 8, 8)
    assert model.decoders["visual"].pos_embed.requires_grad
    encoder = DeepAVFusion.from_released({k: v for k, v in state.items() if k.startswith("encoder.")})
    assert not encoder.decoders and not DeepAVFusion.from_released(state, decoder_depth=0).decoders
    with pytest.raises(RuntimeError, match="without a decoder"):
        encoder(torch.zeros(1, 192, 128), torch.zeros(1, 3, 224, 224))
    with pytest.raises(ValueError, match="1 unknown keys in the checkpoint: encoder.image.cls_token"):
        DeepAVFusion.from_released({**state, "encoder.image.cls_token": torch.zeros(1)})
    for key, ours in (
        ("encoder.audio.blocks.0.attn.qkv.bias", "blocks_a.0.attn.qkv.bias"),
        ("encoder.fusion_blocks.0.attn.k.weight", "fusion_blocks.0.attn.kv.weight"),
        ("image_decoder_mask_token", "decoders.visual.mask_token"),
    ):
        with pytest.raises(ValueError, match=f"1 missing keys: {ours}"):
            DeepAVFusion.from_released({k: v for k, v in state.items() if k != key})
    with pytest.raises(ValueError, match="no released DeepAVFusion checkpoint"):
        DeepAVFusion.from_released({"encoder.image.pos_embed": torch.zeros(1)})
    with pytest.raises(ValueError, match="lacks pos_embed"):
        DeepAVFusion.from_released({k: v for k, v in state.items() if "pos_embed" not in k})


def test_settings_come_from_the_shapes():
    state = {k: torch.empty(s, device="meta") for k, s in ReleasedFusion("dense").keys(decoders=True).items()}
    late = {k: v for k, v in state.items() if not any(f"fusion_blocks.{i}." in k for i in range(9))}
    settings, _ = deepavfusion.convert(late)
    assert settings["fusion_layers"] == [9, 10, 11] and settings["depth"] == 12 and settings["fusion_arch"] == "dense"
    assert settings["fusion_attn_ratio"] == 0.25 and settings["fusion_mlp_ratio"] == 1.0
    assert settings["audio_size"] == (192, 128) and settings["img_size"] == 224
    none = {k: v for k, v in state.items() if ".fusion_blocks." not in k}
    assert deepavfusion.convert(none)[0]["fusion_layers"] == []
