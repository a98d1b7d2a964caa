"""Grids of patches of any number of axes, and decoders over them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn

from avfast.masking import Kept
from avfast.models.patched import embed_kept
from avfast.nn import PatchDecoder, PatchEmbed, SpaceTimePositions, patchify, positions, sincos, unpatchify
from avfast.nn.block import PackedBlock, Read, run_blocks
from avfast.ops import AttentionPlan, masked_patch_mse
from avfast.packing import other_rows

TUBES = ((4, 6, 9), (2, 3, 4), 3)  # a grid of (2, 2, 2); the last column is dropped
GRIDS = {"frame": ((6, 9), 3, 3), "time x mel": ((12, 8), (3, 4), 1), "tubes": TUBES}


def naive_patches(x: Tensor, patch: tuple[int, ...]) -> Tensor:
    """By slices, one patch after the other; values of a patch run over it, then channels."""
    corners = torch.cartesian_prod(*(torch.arange(0, n - p + 1, p) for n, p in zip(x.shape[2:], patch, strict=True)))
    cut = [
        x[(..., *(slice(i, i + p) for i, p in zip(corner, patch, strict=True)))].movedim(1, -1).flatten(1)
        for corner in corners.tolist()
    ]
    return torch.stack(cut, 1)


@pytest.mark.parametrize("grid", GRIDS)
def test_patches_are_embedded_as_by_a_convolution_and_put_together_again(grid):
    size, patch, channels = GRIDS[grid]
    module = PatchEmbed(size, patch, channels, 5).double()
    x = torch.randn(2, channels, *size).double().requires_grad_()
    want = module.proj(x).flatten(2).mT.flatten(0, 1)
    assert_close("all", module(x), want, 1e-12)
    rows = torch.tensor([5, 0, 2 * module.num_patches - 1, 5])
    assert_close("kept", module(x, rows), want[rows], 1e-12)
    assert_close("none", module(x, rows[:0]), want[:0], 1e-12)
    factor = torch.randn_like(want[rows])
    inputs = [x, *module.parameters()]
    for got, exact in zip(
        *(torch.autograd.grad(y, inputs, factor) for y in (module(x, rows), want[rows])), strict=True
    ):
        assert_close("gradient", got, exact, 1e-12)
    patches = patchify(x, module.patch_size)
    assert torch.equal(patches, naive_patches(x, module.patch_size))
    assert patches.shape[1:] == (module.num_patches, module.values)
    whole = unpatchify(patches, module.grid_size, module.patch_size)
    used = tuple(slice(0, g * p) for g, p in zip(module.grid_size, module.patch_size, strict=True))
    assert torch.equal(whole, x[(..., *used)])


def test_kept_tubes_alone_are_read():
    module = PatchEmbed(*TUBES, 5)
    x, rows = torch.full((2, 3, *TUBES[0]), torch.nan), torch.tensor([6, 9])
    naive = (
        x[0, :, 2:, 3:, :4],
        x[1, :, :2, :3, 4:8],
    )  # tubes 6 = (1, 1, 0) of the first and 1 = (0, 0, 1) of the second
    for tube in naive:
        tube.normal_()
    assert_close("tubes", module(x, rows), torch.cat([module.proj(tube[None]).flatten(1) for tube in naive]), 1e-5)


def test_kept_tubes_compile_with_any_number_of_them():
    module, x = PatchEmbed(*TUBES, 5), torch.randn(2, 3, *TUBES[0])
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for count in (2, 3, 5):
            rows = torch.randperm(2 * module.num_patches)[:count]
            assert torch.equal(compiled(x, rows), module(x, rows))


def test_positions_of_a_video_are_those_of_its_time_plus_those_of_its_place():
    table = SpaceTimePositions(16, (3, 2, 4))
    want = sincos(16, (3,)).repeat_interleave(8, 0) + sincos(16, (2, 4)).repeat(3, 1)
    assert torch.equal(table()[0], want)
    first = torch.cat([torch.sin(torch.tensor([2.0])), torch.cos(torch.tensor([2.0]))])
    assert_close("time 2", sincos(16, (3,))[2, [0, 8]], first, 1e-6)
    for trained in (False, True):
        assert positions(16, (2, 4), trained).requires_grad is trained
        assert {x.requires_grad for x in positions(16, (3, 2, 4), trained).parameters()} == {trained}
    with pytest.raises(ValueError, match="dim must be a multiple of 4, got 6"):
        sincos(6, (2, 4))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: PatchEmbed((8, 8), (2, 2, 2), 3, 4), r"2 or 3 sizes and as many patch sizes, got \(8, 8\) and \(2, 2"),
        (lambda: PatchEmbed((1, 8, 8), (2, 4, 4), 3, 4), r"an input of \(1, 8, 8\) holds no patch of 2 x 4 x 4"),
        (lambda: PatchEmbed(*TUBES, 4)(torch.zeros(1, 3, 6, 9)), r"expected \(B, 3, 4, 6, 9\), got \(1, 3, 6, 9\)"),
        (
            lambda: patchify(torch.zeros(1, 3, 8, 8), (2, 4, 4)),
            r"2 x 4 x 4 need 5 dimensions \(B, C, ...\), got \(1, 3",
        ),
    ],
)
def test_errors_name_the_shapes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# A masked autoencoder of videos, from these parts alone.

DIM, WIDE, HEADS = 12, 16, 2  # of the encoder, of the decoder, of both
SIZE, PATCH = (4, 6, 8), (2, 3, 4)
IDS = [torch.tensor([1, 6]), torch.tensor([0, 4, 7])]


class VideoAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = embed = PatchEmbed(SIZE, PATCH, 3, DIM)
        self.pos_embed = SpaceTimePositions(DIM, embed.grid_size)
        self.blocks = nn.ModuleList(PackedBlock(DIM, HEADS) for _ in range(2))
        self.norm = nn.LayerNorm(DIM, eps=1e-6)
        self.decoder = PatchDecoder(DIM, WIDE, 2, HEADS, embed.grid_size, embed.values, train_positions=True)

    def forward(self, video, kept, read=None):
        x = embed_kept(self.patch_embed, self.pos_embed, video, kept)
        x = run_blocks(self.blocks, x, AttentionPlan.from_lengths(kept.lengths), norm=self.norm)
        count = self.patch_embed.num_patches
        plan = AttentionPlan.from_lengths((count,) * len(kept))
        return self.decoder(x, kept.flat(count), plan, read)


def naive_attention(module, x, source):
    """Queries of one sequence ``(M, D)`` over keys and values of another, ``(N, D)``."""
    q, k, v = (
        F.linear(y, w, b).unflatten(1, (module.num_heads, -1)).transpose(0, 1)
        for y, w, b in zip((x, source, source), module.qkv.weight.chunk(3), module.qkv.bias.chunk(3), strict=True)
    )
    mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    return module.proj(mixed.transpose(0, 1).flatten(1))


def naive_block(block, x):
    normed = block.norm1(x)
    x = x + naive_attention(block.attn, normed, normed)
    return x + block.mlp(block.norm2(x))


def naive_decoder_input(model, video):
    """Encoder, then all patches of each instance as the decoder's blocks take them: convolution, no packing."""
    embed, decoder = model.patch_embed, model.decoder
    tokens = embed.proj(video).flatten(2).mT + model.pos_embed()
    for row, ids in enumerate(IDS):
        x = tokens[row, ids]
        for block in model.blocks:
            x = naive_block(block, x)
        whole = list(decoder.mask_token[0].expand(embed.num_patches, -1))
        for token, i in zip(decoder.embed(model.norm(x)), ids.tolist(), strict=True):
            whole[i] = token
        yield torch.stack(whole) + decoder.pos_embed()[0]


def naive_prediction(model, video):
    decoder, rows = model.decoder, []
    for x in naive_decoder_input(model, video):
        for block in decoder.blocks:
            x = naive_block(block, x)
        rows.append(decoder.pred(decoder.norm(x)))
    return torch.stack(rows)


def built():
    model = VideoAutoencoder().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, torch.randn(2, 3, *SIZE).double(), Kept.pack(IDS)


def test_a_video_autoencoder_of_these_parts_equals_its_dense_computation():
    model, video, kept = built()
    count = model.patch_embed.num_patches
    rows = other_rows(kept.flat(count), 2 * count)
    read = Read(rows, AttentionPlan.from_lengths([count - len(ids) for ids in IDS], (count, count)))
    got, want = model(video, kept), naive_prediction(model, video)
    assert_close("prediction", got, want, 1e-12)
    assert_close("masked patches alone", model(video, kept, read), want.flatten(0, 1)[rows], 1e-12)
    picture = unpatchify(got, model.patch_embed.grid_size, PATCH)
    assert_close("as a video", naive_patches(picture, PATCH), want, 1e-12)
    loss = masked_patch_mse(got, video, torch.where(kept.masked(count), torch.arange(count), -1), patch=PATCH)
    target = naive_patches(video, PATCH)
    exact = (want - target).square().mean(-1)[kept.masked(count)].mean()
    trained = [x for x in model.parameters() if x.requires_grad]
    for a, b in zip(*(torch.autograd.grad(x, trained) for x in (loss, exact)), strict=True):
        assert_close("gradient", a, b, 1e-11, scale=1.0)
