"""Decoder blocks in which masked tokens read the visible ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import nn

from avfast import flops
from avfast.models.branch_decoder import BranchDecoder
from avfast.models.views import BranchDraws
from avfast.nn import CrossBlock, CrossBlocks
from avfast.nn.block import Read
from avfast.ops import AttentionPlan


def naive(stack, norm, x, masked, visible):
    """One masked token after the other, instance by instance."""
    rows = []
    for tokens, m, v in zip(x, masked, visible, strict=True):
        context = tokens[v]
        for token in tokens[m]:
            for block in stack:
                heads = block.attn.num_heads
                q = block.attn.q(block.norm1(token)).view(heads, 1, -1)
                k, v_ = block.attn.kv(context).view(len(context), 2, heads, -1).permute(1, 2, 0, 3)
                weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
                token = token + block.attn.proj((weights @ v_).flatten())
                token = token + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(token))))
            rows.append(norm(token))
    return torch.stack(rows)


def case(count=9, visible=(3, 5, 1), dtype=torch.float64):
    torch.manual_seed(0)
    stack, norm = CrossBlocks(16, 3, 2).to(dtype), nn.LayerNorm(16).to(dtype)
    order = [torch.randperm(count) for _ in visible]
    seen = [o[:n].sort().values for o, n in zip(order, visible, strict=True)]
    masked = [o[n:].sort().values for o, n in zip(order, visible, strict=True)]
    return stack, norm, torch.randn(len(visible), count, 16, dtype=dtype), masked, seen


def decode(stack, norm, x, masked, visible, recompute=False):
    count = x.shape[1]
    rows, places = (torch.cat([i * count + ids for i, ids in enumerate(kind)]) for kind in (masked, visible))
    lengths = [[len(ids) for ids in kind] for kind in (masked, visible)]
    whole = AttentionPlan.from_lengths([count] * len(x))
    return stack(x.flatten(0, 1), whole, places, Read(rows, AttentionPlan.from_lengths(*lengths)), norm, recompute)


def test_every_masked_token_alone_in_float64():
    stack, norm, x, masked, visible = case()
    x.requires_grad_()
    leaves = [x, *stack.parameters(), *norm.parameters()]
    want = naive(stack, norm, x, masked, visible)
    exact = torch.autograd.grad(want.square().sum(), leaves)
    largest = max(g.abs().max().item() for g in exact)
    for recompute in (False, True):
        got = decode(stack, norm, x, masked, visible, recompute)
        assert_close("tokens", got, want, 1e-12)
        for a, b in zip(torch.autograd.grad(got.square().sum(), leaves), exact, strict=True):
            assert_close("gradient", a, b, 1e-11, largest)


def test_some_masked_tokens_get_the_values_they_get_among_all():
    stack, norm, x, masked, visible = case(count=200, visible=(30, 50, 41), dtype=torch.float32)
    everything = decode(stack, norm, x, masked, visible)
    chosen = [torch.randperm(len(m))[: n or None].sort().values for m, n in zip(masked, (40, 7, 0), strict=True)]
    some = decode(stack, norm, x, [m[c] for m, c in zip(masked, chosen, strict=True)], visible)
    starts = torch.tensor([0, *(len(m) for m in masked)]).cumsum(0).tolist()
    rows = torch.cat([start + c for start, c in zip(starts, chosen, strict=False)])
    assert 0 < len(rows) < len(everything)
    assert_close("tokens", some, everything[rows], 1e-6)


def test_what_is_not_read_changes_nothing():
    stack, norm, x, masked, visible = case()
    want = decode(stack, norm, x, [m[:1] for m in masked], visible)
    x[0, masked[0][1:]] = 7.0
    assert torch.equal(decode(stack, norm, x, [m[:1] for m in masked], visible), want)
    with pytest.raises(ValueError, match="needs the rows of the kept tokens and the masked rows"):
        stack(x.flatten(0, 1), AttentionPlan.from_lengths([9] * 3), None, None, norm, False)


@pytest.mark.parametrize("kind", ["cross", "local"])
def test_as_the_stack_of_a_decoder(kind):
    """Noised patches stand in for masked ones, and only masked ones are read."""
    grid, batch, kept = (8, 4), 2, 10
    decoder = BranchDecoder(24, 32, 2, 2, kind, grid, 48, 6, "none", 4.0)
    assert "mask_token" not in decoder.state_dict()
    order = torch.stack([torch.randperm(32) for _ in range(batch)])
    visible, masked = order[:, :kept], order[:, kept:]
    counts = 1 + kept, kept if kind == "cross" else 32, 32 - kept
    draws = BranchDraws(visible[None], masked, None, counts).planned(torch.device("cpu"))
    tokens, noised = torch.randn(batch, 1 + kept, 24), torch.randn(batch, 32 - kept, 6)
    got = decoder(tokens, draws, noised)
    x = torch.zeros(batch, 32, 32).scatter(1, visible[..., None].expand(-1, -1, 32), decoder.embed(tokens[:, 1:]))
    x = x.scatter(1, masked[..., None].expand(-1, -1, 32), decoder.embed_noised(noised)) + decoder.pos_embed
    if kind == "cross":
        want = naive(decoder.blocks, decoder.norm, x, masked, visible).unflatten(0, masked.shape)
    else:
        for block in decoder.blocks:
            x = block(x, grid)
        want = decoder.norm(x).gather(1, masked[..., None].expand(-1, -1, 32))
    assert got.shape == (batch, 32 - kept, 48)
    assert_close("prediction", got, decoder.pred(want), 1e-5)


def test_flops_of_a_block_by_hand():
    dim, hidden, masked, visible = 16, 64, 6 + 4, 3 + 5
    block, plan = CrossBlock(dim, 2), AttentionPlan.from_lengths([6, 4], [3, 5])
    x, context = torch.randn(masked, dim), torch.randn(visible, dim)
    products = masked * 2 * dim * dim + visible * 2 * dim * dim + 2 * masked * dim * hidden
    pairs = 6 * 3 + 4 * 5
    assert flops.count(lambda: block(x, context, plan)) == 2 * (products + 2 * pairs * dim)
