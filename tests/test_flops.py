from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avfast import AVSiam, flops

QUERIES, KEYS, HEADS, HEAD_DIM, BATCH = 7, 9, 3, 16, 2
ATTENTION = 2 * 2 * BATCH * HEADS * QUERIES * KEYS * HEAD_DIM  # two matrix products, 2 FLOP per multiply-add


def _qkv(device: str, dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> list[torch.Tensor]:
    return [
        torch.randn(BATCH, HEADS, n, HEAD_DIM, device=device, dtype=dtype, requires_grad=requires_grad)
        for n in (QUERIES, KEYS, KEYS)
    ]


@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_counts_two_products_forward_and_four_backward(device, dtype, masked):
    mask = torch.ones(QUERIES, KEYS, dtype=torch.bool, device=device) if masked else None

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum()

    assert flops.count(attend, *_qkv(device, dtype)) == ATTENTION
    assert flops.count(attend, *_qkv(device, dtype), backward=True) == 3 * ATTENTION
    with torch.no_grad():
        assert flops.count(attend, *_qkv(device, dtype, requires_grad=False)) == ATTENTION


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"])
def test_every_gpu_attention_counts_the_same(backend):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        got = flops.count(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v).sum(), *_qkv("cuda", torch.bfloat16), backward=True
        )
    assert got == 3 * ATTENTION


def test_the_recomputed_product_of_fused_backwards_is_not_charged():
    q, k, v = _qkv("meta", requires_grad=False)
    formulas = {str(op): formula for op, formula in flops._formulas().items()}
    for kind in ("flash", "efficient", "cudnn"):
        formula = formulas[f"aten._scaled_dot_product_{kind}_attention_backward"]
        assert formula(q, q, k, v, out_val=None) == 2 * ATTENTION


def test_linear_and_convolution():
    linear = nn.Linear(5, 7)
    assert flops.count(linear, torch.randn(3, 5)) == 2 * 3 * 5 * 7
    # No gradient with respect to the input is asked for, hence one more product and not two.
    assert flops.count(lambda x: linear(x).sum(), torch.randn(3, 5), backward=True) == 2 * (2 * 3 * 5 * 7)
    patches = nn.Conv2d(3, 8, kernel_size=4, stride=4)
    assert flops.count(patches, torch.randn(2, 3, 16, 16)) == 2 * (2 * 16) * (3 * 4 * 4) * 8


def _block_flops(batch: int, tokens: int, dim: int, mlp_ratio: int = 4) -> int:
    per_token = 2 * dim * (3 * dim + dim + 2 * mlp_ratio * dim)
    return batch * (tokens * per_token + 4 * tokens * tokens * dim)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_dense_block_counts_the_closed_form_on_every_device(device):
    timm_block = pytest.importorskip("timm.models.vision_transformer").Block
    block = timm_block(48, 3, qkv_bias=True).to(device)
    x = torch.randn(2, 17, 48, device=device, requires_grad=True)
    forward = _block_flops(2, 17, 48)
    assert flops.count(block, x) == forward
    assert flops.count(lambda x: block(x).sum(), x, backward=True) == 3 * forward


def test_padding_one_instance_is_seen():
    linear = nn.Linear(6, 6)
    packed, padded = torch.randn(5 + 9, 6), torch.randn(2 * 9, 6)
    assert flops.count(linear, packed) < flops.count(linear, padded)


def test_breakdown_names_operators_largest_first_and_sums_to_the_count():
    block = nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Linear(64, 2, bias=False))
    x = torch.randn(3, 4)
    parts = flops.breakdown(block, x)
    assert parts == {"aten.addmm": 2 * 3 * 4 * 64, "aten.mm": 2 * 3 * 64 * 2}
    assert list(parts.values()) == sorted(parts.values(), reverse=True)
    assert flops.count(block, x) == sum(parts.values())
    assert flops.breakdown(torch.relu, x) == {}


def test_backward_takes_an_object_with_a_loss_and_names_what_it_cannot_use():
    linear = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    wrapped = flops.count(lambda x: SimpleNamespace(loss=linear(x).sum()), x, backward=True)
    assert wrapped == flops.count(lambda x: linear(x).sum(), x, backward=True)
    with pytest.raises(TypeError, match="list"):
        flops.count(lambda x: [x], x, backward=True)
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        flops.count(linear, x, backward=True)
    with pytest.raises(ValueError, match="requires_grad=False"):
        flops.count(torch.sum, x, backward=True)


def test_a_closed_formula_registry_is_left_as_it_was():
    from torch.utils.flop_counter import flop_registry

    before = dict(flop_registry)
    flops.count(lambda q, k, v: F.scaled_dot_product_attention(q, k, v).sum(), *_qkv("cpu"), backward=True)
    assert dict(flop_registry) == before


AVSIAM = dict(
    img_size=64, patch_size=16, audio_size=(128, 64), embed_dim=48, depth=2, num_heads=3, fusion_depth=1,
    decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2, mask_ratios=(0.0, 0.25, 0.5),
)  # fmt: skip
NUM_AUDIO, NUM_VISUAL, PATCH = 32, 16, 256
LENGTHS = [(32, 8), (24, 16), (16, 12)]  # kept (audio, visual) patches per instance


def _layer(tokens: int, dim: int, squares: int) -> int:
    """A transformer block: 12 dim^2 multiply-adds per token, and 2 dim per pair of tokens that see each other."""
    return 2 * (12 * dim * dim * tokens + 2 * dim * squares)


def _last_layer(read: int, tokens: int, dim: int, squares: int) -> int:
    """Of the tokens that are not read only keys and values: 2 of the 12 dim^2."""
    return 2 * (10 * dim * dim * read + 2 * dim * dim * tokens + 2 * dim * squares)


def _avsiam_flops(lengths: list[tuple[int, int]], backward: bool, training: bool = True) -> int:
    audio, visual = sum(a for a, _ in lengths), sum(v for _, v in lengths)
    tokens, batch, everything = audio + visual, len(lengths), NUM_AUDIO + NUM_VISUAL
    dim, width = AVSIAM["embed_dim"], AVSIAM["decoder_embed_dim"]
    embed = 2 * dim * PATCH * (audio + 3 * visual)
    encoder = AVSIAM["depth"] * _layer(tokens, dim, sum(a * a + v * v for a, v in lengths))
    contrast = 2 * (2 * batch * batch * dim)
    fusion = AVSIAM["fusion_depth"] * _layer(tokens, dim, sum((a + v) ** 2 for a, v in lengths))
    read_a, read_v = batch * NUM_AUDIO - audio * training, batch * NUM_VISUAL - visual * training
    read, patches = read_a + read_v, batch * everything
    decoder = (AVSIAM["decoder_depth"] - 1) * _layer(patches, width, patches * everything)
    decoder += _last_layer(read, patches, width, read * everything)
    ends = 2 * tokens * dim * width + 2 * width * PATCH * (read_a + 3 * read_v)
    rest = encoder + contrast + fusion + decoder + ends
    # Two more products per product in the backward pass, but nobody asks for the gradient of the pixels.
    return embed + rest + (embed + 2 * rest if backward else 0)


def _avsiam_count(lengths: list[tuple[int, int]], backward: bool, device: str = "cpu", training: bool = True) -> int:
    model = AVSiam(**AVSIAM).to(device).train(training)
    draws = model.draw(
        len(lengths),
        audio_keep=[torch.randperm(NUM_AUDIO)[:a].sort().values for a, _ in lengths],
        visual_keep=[torch.randperm(NUM_VISUAL)[:v].sort().values for _, v in lengths],
    )
    audio = torch.randn(len(lengths), *AVSIAM["audio_size"], device=device)
    visual = torch.randn(len(lengths), 3, AVSIAM["img_size"], AVSIAM["img_size"], device=device)
    return flops.count(model, audio, visual, draws, backward=backward)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("backward", [False, True])
def test_a_joint_step_of_avsiam_computes_its_kept_tokens_and_nothing_else(backward, device):
    want = _avsiam_flops(LENGTHS, backward)
    assert _avsiam_count(LENGTHS, backward, device) == want
    for instance, modality in ((0, 1), (2, 0)):
        padded = [list(pair) for pair in LENGTHS]
        padded[instance][modality] = max(pair[modality] for pair in LENGTHS)
        assert _avsiam_count(padded, backward, device) != pytest.approx(want, rel=1e-3)


def test_a_joint_step_of_avsiam_in_evaluation_predicts_every_patch():
    want = _avsiam_flops(LENGTHS, True, training=False)
    assert _avsiam_count(LENGTHS, True, training=False) == want > 1.01 * _avsiam_flops(LENGTHS, True)


@pytest.mark.parametrize("batch", [3, 6])
def test_drawn_masks_cost_the_same_at_every_step(batch):
    model = AVSiam(**AVSIAM)
    audio, visual = torch.randn(batch, *AVSIAM["audio_size"]), torch.randn(batch, 3, 64, 64)
    counts = {flops.count(model, audio, visual) for _ in range(3)}
    assert len(counts) == 1
    dense = AVSiam(**AVSIAM | {"mask_ratios": (0.0,)})
    assert counts.pop() < flops.count(dense, audio, visual)
