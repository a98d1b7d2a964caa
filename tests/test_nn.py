from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import assert_close
from torch import nn

from avfast.nn import DropPath, KeptSequences, Mlp, PackedAttention, PackedBlock, SplitLayerNorm, run_blocks
from avfast.ops import AttentionPlan

LENGTHS = (5, 1, 7, 3)


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def timm_block() -> nn.Module:
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    norm = partial(nn.LayerNorm, eps=1e-6)
    return randomised(vision_transformer.Block(48, 3, qkv_bias=True, norm_layer=norm))


def one_by_one(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([block(part[None])[0] for part in x.split(LENGTHS)])


@pytest.mark.parametrize("recompute", [False, True])
def test_weights_of_timm_blocks_load_and_give_their_output_and_gradients(recompute):
    theirs = [timm_block() for _ in range(3)]
    ours = nn.ModuleList(PackedBlock(48, 3) for _ in theirs)
    for own, block in zip(ours, theirs, strict=True):
        own.load_state_dict(block.state_dict())
    x = torch.randn(sum(LENGTHS), 48, requires_grad=True)
    got = run_blocks(ours, x, AttentionPlan.from_lengths(LENGTHS), recompute=recompute)
    want = one_by_one(nn.Sequential(*theirs), x)
    assert_close("output", got, want, 1e-5)
    factor = torch.randn_like(want)
    names = [name for name, _ in ours.named_parameters()]
    got_grads = torch.autograd.grad(got, [x, *ours.parameters()], factor)
    theirs_by_name = dict(nn.ModuleList(theirs).named_parameters())
    want_grads = torch.autograd.grad(want, [x, *(theirs_by_name[name] for name in names)], factor)
    scale = max(g.abs().max().item() for g in want_grads)
    for name, a, b in zip(["x", *names], got_grads, want_grads, strict=True):
        assert_close(f"gradient of {name}", a, b, 1e-5, scale)


def test_attention_and_mlp_alone_take_timms_weights():
    block = timm_block()
    attention, mlp = PackedAttention(48, 3), Mlp(48, 192)
    attention.load_state_dict(block.attn.state_dict())
    mlp.load_state_dict(block.mlp.state_dict())
    x = torch.randn(sum(LENGTHS), 48)
    assert_close("attention", attention(x, AttentionPlan.from_lengths(LENGTHS)), one_by_one(block.attn, x), 1e-5)
    assert_close("mlp", mlp(x), block.mlp(x), 1e-6)


def test_a_block_leaves_its_last_addition_to_the_next():
    block = randomised(PackedBlock(16, 2))
    x, pending, plan = torch.randn(16, 16), torch.randn(16, 16), AttentionPlan.from_lengths(LENGTHS)
    stream, update = block((x, pending), plan)
    assert_close("pair", stream + update, block(x + pending, plan), 1e-6)
    assert_close("chain", run_blocks([block], x + pending, plan), block(x + pending, plan), 1e-6)


def test_every_norm_set_serves_its_own_rows():
    sizes = (LENGTHS[0] + LENGTHS[1], LENGTHS[2] + LENGTHS[3])
    block = randomised(PackedBlock(16, 2, norm_sets=2))
    x = torch.randn(sum(LENGTHS), 16)
    got = run_blocks([block, block], x, AttentionPlan.from_lengths(LENGTHS), sizes)
    for i, (part, lengths) in enumerate(zip(x.split(sizes), (LENGTHS[:2], LENGTHS[2:]), strict=True)):
        single = PackedBlock(16, 2)
        single.load_state_dict({k: v[i] if "norm" in k else v for k, v in block.state_dict().items()})
        want = run_blocks([single, single], part, AttentionPlan.from_lengths(lengths))
        assert_close(f"set {i}", got.split(sizes)[i], want, 1e-5)
    with pytest.raises(ValueError, match="2 affine sets, got 1 group sizes"):
        SplitLayerNorm(16)(x, (16,))
    with pytest.raises(ValueError, match="add up to 15 rows, there are 16"):
        SplitLayerNorm(16)(x, (8, 7))


# Stochastic depth.


def kept(sequences: tuple[int, ...], sizes: tuple[int, ...] = ()) -> KeptSequences:
    rows = torch.arange(sum(LENGTHS)).split(LENGTHS)
    return KeptSequences(
        torch.cat([rows[i] for i in sequences]), AttentionPlan.from_lengths([LENGTHS[i] for i in sequences]), sizes, 2.0
    )


def test_dropped_sequences_skip_a_branch_and_the_others_count_more():
    block = timm_block()
    ours = PackedBlock(48, 3)
    ours.load_state_dict(block.state_dict())
    x = torch.randn(sum(LENGTHS), 48, requires_grad=True)
    drop = DropPath(kept((0, 2)), kept((2, 3)))
    want = []
    for i, part in enumerate(x[None].split(LENGTHS, 1)):
        part = part + 2 * block.attn(block.norm1(part)) if i in (0, 2) else part
        want.append(part + 2 * block.mlp(block.norm2(part)) if i in (2, 3) else part)
    want = torch.cat(want, 1)[0]
    plan = AttentionPlan.from_lengths(LENGTHS)
    for recompute in (False, True):
        got = run_blocks([ours], x, plan, recompute=recompute, drops=[drop])
        assert_close("output", got, want, 1e-5)
        factor = torch.randn_like(want)
        assert_close(
            "gradient",
            *(torch.autograd.grad(out, x, factor, retain_graph=True)[0] for out in (got, want)),
            1e-5,
        )
    with_update, none = ours((x, x), plan, drop=drop)
    assert none is None
    assert_close("update", with_update, run_blocks([ours], 2 * x, plan, drops=[drop]), 1e-6)


def test_a_drawn_share_of_the_sequences_is_kept_with_its_rows_and_norm_sets():
    lengths = [4, 2, 3, 3, 1, 2, 5, 2]
    sizes = (9, 13)
    plan_rows = torch.arange(22).split(lengths)
    counts = torch.zeros(8)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        drawn = KeptSequences.draw(lengths, 0.25, generator, sizes)
        chosen = [i for i, rows in enumerate(plan_rows) if set(rows.tolist()) <= set(drawn.token_rows.tolist())]
        assert len(chosen) == 6 and drawn.scale == 8 / 6
        assert torch.equal(drawn.token_rows, torch.cat([plan_rows[i] for i in chosen]))
        assert drawn.sizes == (int((drawn.token_rows < 9).sum()), int((drawn.token_rows >= 9).sum()))
        assert drawn.plan.cu_seqlens_q.diff().tolist() == [lengths[i] for i in chosen]
        counts[chosen] += 1
    assert_close("share of each", counts / 2000, torch.full((8,), 0.75), 0.06)


def test_draws_follow_their_generator_and_keep_at_least_one_sequence():
    pairs = [DropPath.draw(LENGTHS, 0.5, torch.Generator().manual_seed(s)) for s in (1, 1)]
    assert torch.equal(pairs[0].mlp.token_rows, pairs[1].mlp.token_rows)
    assert len(KeptSequences.draw((3,), 0.9).token_rows) == 3
    assert len(KeptSequences.draw((), 0.5).token_rows) == 0
    with pytest.raises(ValueError, match=r"lies in \[0, 1\), got 1"):
        KeptSequences.draw(LENGTHS, 1)


def test_a_head_count_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match="dim 16 is not a multiple of num_heads 3"):
        PackedAttention(16, 3)
