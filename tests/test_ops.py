"""The loss ops against their formulas written out."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close

from avfast.ops import info_nce, masked_patch_mse
from avfast.ops.masked_patch_mse import normalise_patches


@pytest.mark.parametrize("direction", ["both", "audio_to_visual", "visual_to_audio"])
def test_info_nce_is_the_formula(direction):
    a, v = torch.randn(2, 5, 8, dtype=torch.float64).unbind()
    similarity = (a / a.norm(dim=1, keepdim=True)) @ (v / v.norm(dim=1, keepdim=True)).T / 0.05
    terms = {
        "audio_to_visual": -similarity.log_softmax(1).diagonal().mean(),
        "visual_to_audio": -similarity.log_softmax(0).diagonal().mean(),
    }
    hits = {
        "audio_to_visual": (similarity.argmax(1) == torch.arange(5)).double().mean(),
        "visual_to_audio": (similarity.argmax(0) == torch.arange(5)).double().mean(),
    }
    chosen = list(terms) if direction == "both" else [direction]
    out = info_nce(a, v, 0.05, direction)
    assert_close("loss", out.loss, torch.stack([terms[d] for d in chosen]).mean(), 1e-12)
    assert_close("accuracy", out.accuracy.double(), torch.stack([hits[d] for d in chosen]).mean(), 1e-6)


def test_info_nce_of_no_pairs_is_zero_and_keeps_the_graph():
    a = torch.randn(0, 8, requires_grad=True)
    out = info_nce(a, a)
    out.loss.backward()
    assert out.loss == 0 and a.grad is not None


@pytest.mark.parametrize("norm_pix", [False, True])
def test_masked_patch_mse_is_the_formula(norm_pix):
    prediction, patches = torch.randn(2, 3, 4, 6, dtype=torch.float64).unbind()
    mask = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    terms = []
    for i, j in mask.nonzero().tolist():
        target = patches[i, j]
        if norm_pix:
            target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6) ** 0.5
        terms.append(((prediction[i, j] - target) ** 2).mean())
    got = masked_patch_mse(prediction, patches, mask, norm_pix=norm_pix)
    assert_close("loss", got, torch.stack(terms).mean(), 1e-12)
    assert masked_patch_mse(prediction, patches, torch.zeros_like(mask)) == 0


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_of_half_precision_are_computed_in_float32(dtype, autocast):
    """Nearly collapsed features, whose logits half precision cannot tell apart, against float64 of the same inputs."""
    a, v = (torch.ones(2, 64, 32) + 0.02 * torch.randn(2, 64, 32)).to(dtype).unbind()
    prediction, patches = (torch.randn(2, 3, 4, 64) + 5).to(dtype).unbind()
    mask = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    calls = {
        "info_nce": (lambda a, v: info_nce(a, v, 0.05).loss, (a, v)),
        "mse": (lambda x, y: masked_patch_mse(x, y, mask), (prediction, patches)),
        "plain mse": (lambda x, y: masked_patch_mse(x, y, mask, norm_pix=False), (prediction, patches)),
        "deviation": (lambda x: normalise_patches(x)[2].sum(), (patches,)),
    }
    for name, (call, inputs) in calls.items():
        inputs = [x.requires_grad_() for x in inputs]
        exact = [x.detach().double().requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got = call(*inputs)
        want = call(*exact)
        assert got.dtype == torch.float32, name
        assert_close(name, got, want.float(), 1e-6)
        bound = 1e-4 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps  # the gradient is rounded once
        for x, y in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, exact), strict=True):
            assert_close(f"gradient of {name}", x, y.float().to(x.dtype), bound)


def test_errors_name_the_shapes():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        info_nce(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="do not fit"):
        masked_patch_mse(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.ones(1, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: info_nce(x.int(), x), r"floating-point tensors, got torch\.int32 \(1, 2\)"),
        (lambda x: info_nce(x, x, temperature=0.0), "temperature must be positive, got 0.0"),
        (lambda x: info_nce(x, x, direction="sideways"), "direction must be one of both, .*got 'sideways'"),
        (lambda x: masked_patch_mse(x[None], x[None], torch.ones(1, 1)), r"mask must be bool.*got torch\.float32"),
        (lambda x: masked_patch_mse(x[None], x[None].long(), x[None, :, 0] > 0), "got torch.int64"),
    ],
)
def test_errors_name_what_no_loss_can_take(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(1, 2))
