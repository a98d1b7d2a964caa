from __future__ import annotations

import sys
from functools import partial
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from torch import Tensor, nn

from avfast.masking import Kept
from avfast.nn import ContextBlock, FusionBlock, PatchDecoder, TokenLayout
from avfast.nn.fusion import linear_halves
from avfast.ops import AttentionPlan

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import materialised  # noqa: E402

sys.path.pop(0)

DIM, HEADS, TOKENS = 24, 3, (4, 2, 3)
ARCHS = ("dense", "factorized", "token")
SETTINGS = (
    {},
    {"residual": "normed", "scale": 0.3},
    {"attn_ratio": 0.5, "mlp_ratio": 2.0},
)


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double()


def block(arch: str, **settings) -> FusionBlock:
    return randomised(FusionBlock(DIM, HEADS, arch, TOKENS, **{"attn_ratio": 0.25, **settings}))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, dtype=torch.float64)


def naive(module: FusionBlock, tokens: Tensor, audio: Tensor, visual: Tensor) -> Tensor:
    """What the block computes, from its definition."""
    if module.arch != "token":
        return materialised.fusion_block(module, tokens, audio, visual)
    x = module.norm1(tokens)
    source = torch.cat([module.norm1_v(visual), module.norm1_a(audio)], 1)
    update = materialised.cross_attention(module.attn, x, source)
    x = (x if module.residual == "normed" else tokens) + update
    return x + module.mlp(module.norm2(x))


def boundaries(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def compare(module: nn.Module, got: Tensor, want: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Outputs, and gradients of inputs and parameters."""
    assert_close("output", got, want, 1e-12)
    factor = torch.randn_like(want)
    everything = [*inputs, *module.parameters()]
    grads = [torch.autograd.grad(out, everything, factor, allow_unused=True) for out in (got, want)]
    scale = max(g.abs().max().item() for g in grads[1] if g is not None)
    names = [*(f"input {i}" for i in range(len(inputs))), *(name for name, _ in module.named_parameters())]
    for name, a, b in zip(names, *grads, strict=True):
        assert a is not None, f"{name} has no gradient"
        assert_close(f"gradient of {name}", a, torch.zeros_like(a) if b is None else b, 1e-11, scale)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_fusion_block_equals_its_definition_with_pairs_formed(arch, settings):
    module = block(arch, **settings)
    inputs = tuple(x.requires_grad_() for x in (draw(2, sum(TOKENS)), draw(2, 7), draw(2, 5)))
    compare(module, module(*inputs), naive(module, *inputs), inputs)


@pytest.mark.parametrize("ragged", ["audio", "visual", "both"])
@pytest.mark.parametrize("arch", ARCHS)
def test_packed_sources_of_unequal_length_equal_instances_one_by_one(arch, ragged):
    module = block(arch)
    lengths_a = (5, 4, 1) if ragged != "visual" else (3, 3, 3)
    lengths_v = (2, 6, 3) if ragged != "audio" else (4, 4, 4)
    tokens, audio, visual = draw(3, sum(TOKENS)), draw(sum(lengths_a)), draw(sum(lengths_v))
    cu_a, cu_v = boundaries(lengths_a), boundaries(lengths_v)
    parts = zip(audio.split(lengths_a), visual.split(lengths_v), strict=True)
    want = torch.cat([naive(module, tokens[i : i + 1], a[None], v[None]) for i, (a, v) in enumerate(parts)])
    if ragged == "audio":
        visual, cu_v = visual.unflatten(0, (3, -1)), None
    if ragged == "visual":
        audio, cu_a = audio.unflatten(0, (3, -1)), None
    assert_close("output", module(tokens, audio, visual, cu_a, cu_v), want, 1e-12)


@pytest.mark.parametrize("arch", ARCHS)
def test_an_instance_without_a_modality_reads_nothing_of_it(arch):
    module = block(arch)
    tokens, audio, visual = draw(2, sum(TOKENS)), draw(6), draw(2, 5)
    out = module(tokens, audio, visual, boundaries((6, 0)))
    assert torch.isfinite(out).all()
    both = module(tokens[:1], audio[None], visual[:1])
    assert_close("with both", out[:1], both, 1e-12)
    only = module(tokens[1:], draw(1, 0), visual[1:])
    assert_close("with one", out[1:], only, 1e-12)
    neither = module(tokens[1:], draw(1, 0), draw(1, 0))
    assert torch.isfinite(neither).all() and not torch.allclose(neither, only)
    if arch == "token":
        assert_close("one softmax", only, naive(module, tokens[1:], draw(1, 0), visual[1:]), 1e-12)
    if arch == "dense":
        x, source = module.norm1(tokens[1:]), module.norm1_v(visual[1:])
        k, v = nn.functional.linear(source, module.attn.kv.weight[:, :DIM]).split(module.attn.widths, -1)
        read = materialised.attend(module.attn.q(x), k, v, HEADS, None) + module.attn.kv.bias[module.attn.widths[0] :]
        x = tokens[1:] + module.attn.proj(read)
        assert_close("half of the sum", only, x + module.mlp(module.norm2(x)), 1e-12)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", [(2, 3), (4,), (2, 0)])
def test_halves_of_a_weight_have_the_gradients_of_slices(shape, autocast):
    dtype = torch.float32 if autocast else torch.float64
    leaves = [torch.randn(*shape, 6, dtype=dtype), torch.randn(2, 5, 6, dtype=dtype), torch.randn(4, 12, dtype=dtype)]
    leaves = [x.requires_grad_() for x in leaves]

    def plain(first: Tensor, second: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.linear(first, weight[:, :6]), nn.functional.linear(second, weight[:, 6:])

    def step(call):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            first, second = call(*leaves)
        assert first.dtype == second.dtype == (torch.bfloat16 if autocast else dtype)
        loss = first.to(dtype).square().sum() + second.to(dtype).square().sum()
        return first, second, *torch.autograd.grad(loss, leaves)

    for i, (got, want) in enumerate(zip(step(linear_halves), step(plain), strict=True)):
        assert got.dtype == want.dtype
        assert_close(str(i), got, want, 1e-2 if autocast else 1e-12)
    compiled = torch.compile(linear_halves, fullgraph=True, backend="aot_eager")
    for i, (got, want) in enumerate(zip(step(compiled), step(plain), strict=True)):
        assert_close(f"compiled {i}", got, want, 1e-2 if autocast else 1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_weights_are_those_of_the_map_over_pairs(packed):
    module = block("dense", scale=0.7)
    tokens, audio, visual = draw(2, sum(TOKENS)), draw(2, 6), draw(2, 5)
    cu = boundaries((6, 6)) if packed else None
    p, r = module.weights(tokens, audio.flatten(0, 1) if packed else audio, visual, cu)
    q, (k_a, _), (k_v, _) = module.attn.project(module.norm1(tokens), module.norm1_a(audio), module.norm1_v(visual))
    want = (q @ materialised.pairs(k_a, k_v).mT * 0.7).softmax(-1)
    assert_close("map", (p[..., :, None] * r[..., None, :]).flatten(-2), want, 1e-12)
    assert not p.requires_grad and not r.requires_grad


def test_factorized_weights_add_up_over_patches():
    module = block("factorized")
    p, r = module.weights(draw(2, sum(TOKENS)), draw(2, 6), draw(2, 5))
    assert p.shape == (2, HEADS, TOKENS[0], 6) and r.shape == (2, HEADS, TOKENS[0], 5)
    assert_close("p", p.sum(-1), torch.ones(2, HEADS, TOKENS[0]), 1e-12)
    assert_close("r", r.sum(-1), torch.ones(2, HEADS, TOKENS[0]), 1e-12)
    # aggregation tokens that all read one patch leave nothing else to read
    nn.init.zeros_(module.attn_a.q.weight)
    nn.init.zeros_(module.attn_a.q.bias)
    p, _ = module.weights(draw(2, sum(TOKENS)), draw(2, 6), draw(2, 5))
    assert_close("uniform reading", p, torch.full_like(p, 1 / 6), 1e-12)


@pytest.mark.parametrize("lengths", [(5, 5, 5), (6, 4, 4, 0)])
@pytest.mark.parametrize("context", [0, 3])
def test_a_context_block_equals_a_whole_block_whose_first_rows_are_thrown_away(lengths, context):
    module = randomised(ContextBlock(DIM, HEADS))
    x, update = (draw(sum(lengths)).requires_grad_() for _ in range(2))
    further = draw(len(lengths), context).requires_grad_()
    layout = TokenLayout.of(lengths, context)
    assert (layout.cu_seqlens is None) == (len(set(lengths)) == 1)
    before, (stream, rest) = module((x, update), layout, further if context else None)
    assert torch.equal(before, x + update)
    parts = (x + update).split(lengths)
    want = torch.cat([materialised.context_block(module, further[i : i + 1], p[None])[0] for i, p in enumerate(parts)])
    inputs = (x, update, further) if context else (x, update)
    compare(module, stream + rest, want, inputs)


def test_a_context_block_has_the_parameters_of_timms():
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    theirs = vision_transformer.Block(DIM, HEADS, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    module = ContextBlock(DIM, HEADS)
    module.load_state_dict(theirs.state_dict())
    x = torch.randn(10, DIM)
    stream, update = module((x, None), TokenLayout.of((5, 5), 0))[1]
    assert_close("output", stream + update, theirs(x.unflatten(0, (2, 5))).flatten(0, 1), 1e-5)


def test_a_decoder_puts_mask_tokens_where_nothing_was_kept():
    decoder = randomised(PatchDecoder(DIM, 16, 2, 2, (2, 3), 7))
    further, tokens = draw(2, 4), draw(4)
    kept = Kept.pack([torch.tensor([4]), torch.tensor([5, 0, 2])])
    plan = AttentionPlan.from_lengths((10, 10))
    got = decoder(tokens, kept.flat(6), plan, further=further)
    for row, ids in enumerate(kept.to_list()):
        x = decoder.mask_token[0].expand(6, -1).clone()
        own = tokens[:3] if row else tokens[3:]
        for i, patch in enumerate(ids.tolist()):
            x[patch] = decoder.embed(own[i])
        x = torch.cat([decoder.embed(further[row]), x + decoder.pos_embed[0]])
        for layer in decoder.blocks:
            x = layer(x, AttentionPlan.from_lengths((10,)))
        assert_close("prediction", got[row], decoder.pred(decoder.norm(x))[4:], 1e-12)
    blind = decoder(None, None, plan, further=further)
    nowhere = torch.zeros(0, dtype=torch.int64)
    assert_close("without tokens", blind, decoder(draw(0), nowhere, plan, further=further), 1e-12)
    assert not decoder.pos_embed.requires_grad
    assert PatchDecoder(DIM, 16, 1, 2, (2, 3), 7, train_positions=True).pos_embed.requires_grad


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: FusionBlock(DIM, HEADS, "sparse"), "arch must be one of dense, factorized, token, got 'sparse'"),
        (lambda: FusionBlock(DIM, HEADS, residual="none"), "residual must be one of raw, normed"),
        (lambda: FusionBlock(DIM, HEADS, num_tokens=(4, 0, 2)), "three positive numbers"),
        (lambda: FusionBlock(DIM, HEADS, attn_ratio=0.2), r"dim \* attn_ratio 5 must be multiples of num_heads 3"),
        (lambda: block("dense")(draw(2, 8), draw(2, 3), draw(2, 3)), r"tokens must be \(B, 9, D\), got \(2, 8, 24\)"),
        (lambda: block("token").weights(draw(2, 9), draw(2, 3), draw(2, 3)), "one softmax"),
    ],
)
def test_errors_name_what_was_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
