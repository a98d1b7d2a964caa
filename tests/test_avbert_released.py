"""AVBERT against the numbers of its released code, from weights in the released layout."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from released import Released

from avfast import AVBERT
from avfast.checkpoints import load_into
from avfast.nn import SharedLowRankTransformer
from avfast.ops import low_rank_linear, skew_exp
from avfast.released import avbert

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
MODALITIES = ("visual", "audio", "multi")


class ReleasedAVBERT(Released):
    """The released code's model of Kinetics-Sounds."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__("avbert", dtype)

    @cached_property
    def shapes(self) -> dict[str, list[int]]:
        return {key: shape for key, shape, _ in self.manifest["state_dict"]}

    def weight(self, key: str, shape: list[int]) -> torch.Tensor:
        """The synthetic weight of a name."""
        rules = self.manifest["weight_rules"]
        if key.endswith(".num_batches_tracked"):
            return torch.tensor(0)
        if key.endswith(".base"):
            return torch.eye(shape[0])
        n = self.normal(key, shape)
        if key.endswith(".A"):
            n = 0.05 * n
        elif key in rules["norm_scale_keys"] or key in rules["norm_scale_keys_group_f"]:
            n = 1 + 0.1 * n
        elif key.endswith(".running_var"):
            n = 1 + 0.1 * abs(n)
        elif key.endswith(".running_mean"):
            n = 0.1 * n
        elif key.endswith(".bias") or key in rules["embedding_keys"]:
            n = 0.02 * n
        else:
            n = n / np.sqrt(np.prod(shape[1:]))
        return torch.from_numpy(n.astype(np.float32))

    @cached_property
    def state(self) -> dict[str, torch.Tensor]:
        """The released state dict; aliases hold NaN, and so does the visual network, most of the weights."""
        nan = torch.full((), float("nan"))
        dead = {key for key in self.shapes if key in self.manifest["aliases"] or key.startswith("avbert.visual_conv.")}
        return {k: nan.expand(s) if k in dead else self.weight(k, s) for k, s in self.shapes.items()}

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """The weights whose names begin so, without ``avbert.``."""
        return {
            key.removeprefix("avbert."): self.weight(key, shape)
            for key, shape in self.shapes.items()
            if key.startswith(f"avbert.{prefix}")
        }

    def input(self, name: str) -> torch.Tensor:
        shape = self.manifest["inputs"][name]["shape"]
        return torch.from_numpy(self.normal(f"input:{name}", shape).astype(np.float32)).to(self.dtype)

    def check(self, name: str, got: torch.Tensor, tol: float | None = None, rows: int | None = None) -> None:
        """Compare with all that is stored of an output: slices, mean and deviation, or the whole."""
        tol = TOLERANCE[self.dtype] if tol is None else tol
        got = got.detach().double()
        found = [key for key in self.expected if key == name or key.startswith((f"{name}[", f"{name}.mean_std"))]
        assert found, name
        for key in found:
            want = torch.from_numpy(np.asarray(self.expected[key]))
            if key.endswith(".mean_std"):
                part = torch.stack([got.mean(), got.std(correction=0)])
            else:
                part = got[steps(key[len(name) :])]
            assert_close(key, part, want, tol)


def steps(index: str):
    """The index that ``"[:,0,::4]"`` stands for."""
    parts = index.strip("[]").split(",") if index else []
    return tuple(slice(*(int(x) if x else None for x in p.split(":"))) if ":" in p else int(p) for p in parts)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(torch.float64, id="float64"),
        pytest.param(torch.float32, id="float32", marks=pytest.mark.slow),
    ],
)
def released(request) -> ReleasedAVBERT:
    return ReleasedAVBERT(request.param)


@pytest.fixture(scope="module")
def model(released) -> AVBERT:
    """The released model without the weights of its visual network, which are most of them."""
    return AVBERT.from_released(released.state).to(released.dtype).eval()


@pytest.fixture(scope="module")
def transformer(model) -> SharedLowRankTransformer:
    return model.transformer


def check_network(released, network, x, name, rows):
    """Compare pooled features, and mean and deviation after each stage."""
    found = []
    handles = [
        part.register_forward_hook(lambda module, args, x: found.append(torch.stack([x.mean(), x.std(correction=0)])))
        for part in (network.stem, *network.stages)
    ]
    pooled = network(x)
    released.check(name, pooled)
    want = torch.from_numpy(released.expected["d.stage_stats"][rows])
    # PyTorch's own deviation of 655,360 numbers depends on how they are shared out to threads, by 5e-12.
    assert_close(f"{name} by stage", torch.stack(found), want, max(TOLERANCE[released.dtype], 1e-11))
    for handle in handles:
        handle.remove()
    return pooled


@torch.no_grad()
def test_audio_network_gives_the_released_features(released, model):
    audio = released.input("d.audio")[0, :, 0].mT  # theirs are (B, T, 1, mels, frames)
    check_network(released, model.audio_cnn, audio, "d.pool_audio", slice(5, 10))


@torch.no_grad()
def test_model_gives_the_released_tokens_of_features(released, model):
    features = {name: released.input(f"c.feat_{name}") for name in ("visual", "audio")}
    for name, given in features.items():
        x = model.adapters[name](given)
        released.check(f"c.adapter_{name}", x)
        released.check(f"c.emb_{name}", model.times[name](model.adapters[name].sequence(x)))
    found = model.encode(**features)
    released.check("c.y_v", found.visual)
    released.check("c.y_a", found.audio)
    released.check("c.emb_multi", model.times["fused"](found.visual, found.audio))
    released.check("c.z", found.fused)
    alone = {name: getattr(model.encode(**{name: given}), name) for name, given in features.items()}
    assert torch.equal(alone["visual"], found.visual) and torch.equal(alone["audio"], found.audio)


def released_key(name: str) -> str:
    """The key of a gradient's name, such as ``"dA.value.ms0"``."""
    kind, *where = name.split(".")
    if kind == "dbos":
        return "avbert.summary_encoding.bos_embeddings.weight"
    factor = f"{'attention.' if where[0] not in ('ffn', 'ffn_output') else ''}factor_{where[0]}"
    tensor = {
        "dA": f"orthogonal_{where[-1]}_linear.A",
        "dV": f"{where[-1]}_linear.weight",
        "dU": "s_linear.weight",
        "db": "s_linear.bias",
    }[kind]
    return f"avbert.{avbert.SHARED}{factor}.{tensor}"


@pytest.mark.parametrize("loss", ["sumsq", "probe"])
def test_gradients_equal_the_released_ones(released, model, loss):
    tol, keys = TOLERANCE[released.dtype], released.manifest["gradnorm_keys"]
    z = model.encode(released.input("c.feat_audio"), released.input("c.feat_visual")).fused
    value = z.square().sum() if loss == "sumsq" else (z * released.input("e.probe")).sum()
    released.check(f"e.{loss}.loss", value)
    gradients = dict(
        zip(
            own := dict(model.named_parameters()),
            torch.autograd.grad(value, own.values(), allow_unused=True),
            strict=True,
        )
    )
    # Back through the conversion, to the released names and shapes.
    leaves = released.state
    leaves = {k: v.to(released.dtype).requires_grad_(k in keys) for k, v in leaves.items()}
    weights = {k: v for k, v in avbert.convert(leaves)[1].items() if v.requires_grad}
    found = torch.autograd.grad(
        list(weights.values()), [leaves[key] for key in keys], [gradients[name] for name in weights]
    )
    found = dict(zip(keys, found, strict=True))
    largest = max(gradient.abs().max().item() for gradient in found.values())
    (key_bias,) = [key for key in keys if key.endswith("factor_key.s_linear.bias")]  # cancels in every softmax
    assert found[key_bias].abs().max() <= 1e-6 * largest
    norms = torch.from_numpy(released.expected[f"e.{loss}.gradnorms"])
    for key, norm in zip(keys, norms, strict=True):
        assert_close(f"norm of the gradient of {key}", found[key].double().norm(), norm, tol, norms.max().item())
    for name in (name for name in released.expected if name.startswith(f"e.{loss}.d") and "[" in name):
        kind, index = name.removeprefix(f"e.{loss}.").split("[")
        gradient = found[released_key(kind)]
        want = torch.from_numpy(released.expected[name])
        assert_close(name, gradient[steps(index)], want, tol, largest)
        if kind.startswith("dA"):
            assert not gradient.tril().any()


@torch.no_grad()
def test_low_rank_projections_give_the_released_values(released, transformer):
    released.check("a.sigma", skew_exp(transformer.skew))
    kinds = {"qkv": ("query", "key", "value"), "proj": ("dense",), "fc1": ("ffn",), "fc2": ("ffn_output",)}
    for projection, names in kinds.items():
        x = released.input("a.x3072" if projection == "fc2" else "a.x768")
        out, low = [], []
        for factors in transformer.factors():
            v, g, bias = factors[projection]
            out.append(torch.stack(low_rank_linear(x, v, g, bias), -2))
            low.append(F.normalize((x @ v.mT).unflatten(-1, g.shape[:2]), dim=-1))
        for chunk, name in enumerate(names):
            released.check(f"a.out.{name}", torch.stack(out)[..., chunk, :])
            released.check(f"a.lowrank.{name}", torch.stack(low)[..., chunk, :])


@torch.no_grad()
def test_transformers_give_the_released_tokens_of_every_layer(released, transformer):
    factors = transformer.factors()
    for i, name in enumerate(MODALITIES):
        layers = []
        handle = transformer.mlp[0].register_forward_hook(lambda module, args, out, layers=layers: layers.append(out))
        released.check(f"b.out_{name}", transformer(released.input(f"b.emb_{name}"), i, factors))
        released.check(f"b.hidden_{name}", torch.stack(layers))
        handle.remove()


@torch.no_grad()
def test_transformers_give_the_released_tokens_where_attention_is_sharp(released):
    state = released.part("transformer.")
    for name in ("query", "key"):
        key = f"{avbert.SHARED}attention.factor_{name}.s_linear.weight"
        state[key] = 12 * state[key].to(released.dtype)
    model = SharedLowRankTransformer().to(released.dtype).eval()
    load_into(model, avbert.low_rank_transformer(state))
    for i, name in enumerate(MODALITIES):
        released.check(f"g.out_{name}", model(released.input(f"b.emb_{name}"), i))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_model_gives_the_released_tokens_and_logits_of_clips(dtype):
    released = ReleasedAVBERT(dtype)
    networks = {f"avbert.{key}": value for key, value in released.part("visual_conv.").items()}
    state = {**released.state, **networks}
    model = AVBERT.from_released(state).to(dtype).eval()
    visual, audio = released.input("d.visual"), released.input("d.audio")[:, :, 0].mT
    found = model.encode(audio, visual)
    released.check("d.y_v", found.visual)
    released.check("d.y_a", found.audio)
    released.check("d.z", found.fused)
    pooled = torch.cat(
        [
            check_network(released, model.visual_cnn, visual[0], "d.pool_visual", slice(0, 5)),
            check_network(released, model.audio_cnn, audio[0], "d.pool_audio", slice(5, 10)),
        ],
        1,
    )
    # The classifiers of Kinetics-Sounds, which are not the model's.
    head = {key: value.to(dtype) for key, value in state.items() if "head." in key}
    logits = F.linear(pooled, head["concat_head.projection.weight"], head["concat_head.projection.bias"])
    released.check("d.logits_clip", logits)
    released.check("d.probs_clip", logits.softmax(1))
    summed = torch.zeros(())
    for i, z in enumerate(found.fused.chunk(2, 1)):
        pairs = torch.cat([z[:, :1].expand_as(z[:, 1:]), z[:, 1:]], 2).flatten(0, 1)
        summed = summed + F.linear(pairs, head[f"concat_seq_head.fc{i + 1}.weight"])
    summed = F.layer_norm(summed, (768,), head["concat_seq_head.ln.weight"], head["concat_seq_head.ln.bias"])
    logits = F.linear(summed, head["concat_seq_head.projection.weight"], head["concat_seq_head.projection.bias"])
    released.check("d.logits_seq", logits)
    released.check("d.probs_seq", logits.softmax(1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_model_that_shares_nothing_gives_the_released_tokens(dtype):
    released = ReleasedAVBERT(dtype)
    model = AVBERT.from_released(unshared(released)).to(dtype).eval()
    assert model.transformer.sharing == "none" and model.transformer.depths == (6, 6, 6)
    for i, name in enumerate(MODALITIES):
        released.check(f"f.out_{name}", model.transformer(released.input(f"f.emb_{name}"), i))
    found = model.encode(released.input("f.feat_audio"), released.input("f.feat_visual"))
    released.check("f.y_v", found.visual)
    released.check("f.y_a", found.audio)
    released.check("f.z", found.fused)


def unshared(released, device=None) -> dict[str, torch.Tensor]:
    """The state dict of the model without sharing, and without the weights of its networks."""
    keys = [(key, shape) for key, shape, _ in released.manifest["group_f_state_dict"]["tensors"]]
    keys += [(key, shape) for key, shape in released.shapes.items() if "transformer." not in key]
    if device is not None:
        return {key: torch.empty(shape, device=device) for key, shape in keys}
    nan = torch.full((), float("nan"))
    return {k: nan.expand(s) if "_conv." in k else released.weight(k, s) for k, s in keys}


@pytest.fixture
def layout() -> dict[str, torch.Tensor]:
    """The released layout, without values."""
    return {key: torch.empty(shape, device="meta") for key, shape in ReleasedAVBERT().shapes.items()}


def empty(state, **settings) -> AVBERT:
    with torch.device("meta"):
        return AVBERT.from_released(state, **settings)


def test_the_layout_of_the_released_checkpoint(layout):
    assert len(layout) == 991
    settings, weights = avbert.convert({key.removeprefix("avbert."): value for key, value in layout.items()})
    assert settings["num_clips"] == 21 and settings["rank"] == 128 and settings["mlp_ratio"] == 4
    assert settings["sharing"] == "part" and settings["num_heads"] == 12
    model = empty(layout)
    trained = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(avbert.NEW))
    assert trained == 43_778_080
    own = set(model.state_dict())
    assert set(weights) <= own and all(name.startswith(avbert.NEW) for name in own - set(weights))
    rotations = {f"{key.removesuffix('.A')}._B": value for key, value in layout.items() if key.endswith(".A")}
    assert len(rotations) == 72
    assert set(avbert.convert({**layout, **rotations})[1]) == set(weights)


def test_settings_may_differ_from_the_released_ones(layout):
    model = empty(layout, num_clips=10, depth=2, cpp=False, sharing="part")
    assert model.times["fused"].positions.shape == (11, 768) and model.transformer.depths == (2, 2, 2)
    with pytest.raises(ValueError, match=r"3 wrong shapes: times.visual.positions \(22, 768\) instead of \(31, 768\)"):
        empty(layout, num_clips=30)
    none = empty(unshared(ReleasedAVBERT(), "meta"))
    assert none.transformer.sharing == "none" and len(none.transformer.attention) == 18


def test_unknown_and_missing_keys_are_listed(layout, tmp_path):
    for key, message in (
        (f"avbert.{avbert.SHARED}factor_ffn.ms1_linear.weight", f"1 missing keys .*: {avbert.SHARED}factor_ffn.ms1_"),
        ("avbert.audio_conv.s3.res1.branch2.b2.weight", "missing keys: audio_cnn.stages.1.1.layers.2.conv.weight"),
        ("avbert.summary_encoding.bos_embeddings.weight", "2 missing keys: adapters.visual.bos, adapters.audio.bos"),
        ("avbert.visual_fc.weight", "no released AVBERT checkpoint: expected keys avbert"),
    ):
        with pytest.raises(ValueError, match=message):
            empty({k: v for k, v in layout.items() if not k.endswith(key.removeprefix("avbert.transformer."))})
    for key in (
        "avbert.visual_conv.s6.stem.conv.weight",
        "avbert.transformer.pooler.weight",
        f"avbert.{avbert.SHARED}pooler.weight",
    ):
        with pytest.raises(ValueError, match=f"1 unknown keys in the checkpoint: {key.removeprefix('avbert.')}"):
            empty({**layout, key: torch.empty(1, device="meta")})
    several = {k: v for k, v in unshared(ReleasedAVBERT(), "meta").items() if ".layer.3.attention.self.key" not in k}
    with pytest.raises(
        ValueError, match="6 missing keys .*single_visual_transformer.encoder.layer.3.attention.self.key"
    ):
        empty(several)
    file = tmp_path / "other.pth"
    torch.save({"state_dict": {"conv.weight": torch.zeros(1)}}, file)
    with pytest.raises(ValueError, match=r"other.pth: no released AVBERT checkpoint: .* found conv.weight"):
        AVBERT.from_released(file)


def test_a_base_of_a_rotation_is_kept():
    released = ReleasedAVBERT(torch.float64)
    state = released.part("transformer.")
    key = f"{avbert.SHARED}attention.factor_value."
    base = torch.linalg.qr(torch.randn(128, 128, dtype=torch.float64))[0]
    state[f"{key}orthogonal_ms1_linear.base"] = base
    weights = {name: value.double() for name, value in avbert.low_rank_transformer(state).items()}
    x = torch.randn(5, 768, dtype=torch.float64)
    v, a, u = (
        state[f"{key}{name}"].double() for name in ("ms1_linear.weight", "orthogonal_ms1_linear.A", "s_linear.weight")
    )
    want = F.normalize(x @ v.mT, dim=-1) @ base @ skew_exp(a) @ u.mT
    chunk = slice(256, 384)  # values come after queries and keys
    got = F.normalize(x @ weights["attention.0.qkv.v"][1, chunk].mT, dim=-1)
    got = got @ skew_exp(weights["skew"][2 * 3 + 1]) @ weights["attention.0.qkv.u"][2].mT
    assert_close("value", got, want, 1e-6)
