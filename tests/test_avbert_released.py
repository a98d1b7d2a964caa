"""AVBERT against the numbers of its released code, from weights in the released layout."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pytest
import torch
from helpers import assert_close
from released import Released

from avfast.checkpoints import load_into, rename
from avfast.nn import AudioResNet, SharedLowRankTransformer, VideoResNet
from avfast.ops import low_rank_linear, skew_exp
from avfast.released import avbert

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.float64, marks=pytest.mark.slow, id="float64"),
]


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


def statistics(module, args, output):
    return torch.stack([output.mean(), output.std(correction=0)])


def check_network(released, network, x, name, rows):
    """Compare pooled features, and mean and deviation after each stage."""
    found = []
    for part in (network.stem, *network.stages):
        part.register_forward_hook(lambda *args: found.append(statistics(*args)))
    with torch.no_grad():
        released.check(name, network(x))
    want = torch.from_numpy(released.expected["d.stage_stats"][rows])
    assert_close(f"{name} by stage", torch.stack(found), want, TOLERANCE[released.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_audio_network_gives_the_released_features(dtype):
    released = ReleasedAVBERT(dtype)
    network = AudioResNet(variant="released")
    load_into(network, rename(released.part("audio_conv."), avbert.AUDIO))
    audio = released.input("d.audio")[0, :, 0].mT  # theirs are (B, T, 1, mels, frames)
    check_network(released, network.to(dtype).eval(), audio, "d.pool_audio", slice(5, 10))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_visual_network_gives_the_released_features(dtype):
    released = ReleasedAVBERT(dtype)
    network = VideoResNet()
    load_into(network, rename(released.part("visual_conv."), avbert.VISUAL))
    check_network(released, network.to(dtype).eval(), released.input("d.visual")[0], "d.pool_visual", slice(0, 5))


MODALITIES = ("visual", "audio", "multi")


@pytest.fixture(scope="module", params=TOLERANCE, ids=["float32", "float64"])
def released(request) -> ReleasedAVBERT:
    return ReleasedAVBERT(request.param)


@pytest.fixture(scope="module")
def transformer(released) -> SharedLowRankTransformer:
    model = SharedLowRankTransformer()
    load_into(model, avbert.low_rank_transformer(released.part("transformer.")))
    return model.to(released.dtype).eval()


@torch.no_grad()
def test_low_rank_projections_give_the_released_values(released, transformer):
    released.check("a.sigma", skew_exp(transformer.skew))
    kinds = {"qkv": ("query", "key", "value"), "proj": ("dense",), "fc1": ("ffn",), "fc2": ("ffn_output",)}
    for projection, names in kinds.items():
        x = released.input("a.x3072" if projection == "fc2" else "a.x768")
        out, low = [], []
        for factors in transformer.factors():
            v, g, bias = factors[projection]
            out.append(low_rank_linear(x, v, g, bias))
            low.append(torch.nn.functional.normalize((x @ v.mT).unflatten(-1, g.shape[:2]), dim=-1))
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
def test_transformers_that_share_nothing_give_the_released_tokens(dtype):
    released = ReleasedAVBERT(dtype)
    keys = [(key, shape) for key, shape, _ in released.manifest["group_f_state_dict"]["tensors"]]
    state = {key.removeprefix("avbert."): released.weight(key, shape) for key, shape in keys}
    model = SharedLowRankTransformer(sharing="none")
    load_into(model, avbert.separate_transformers(state))
    model = model.to(dtype).eval()
    for i, name in enumerate(MODALITIES):
        released.check(f"f.out_{name}", model(released.input(f"f.emb_{name}"), i))
