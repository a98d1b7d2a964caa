"""The loss ops against their formulas written out."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close

from avfast.ops import info_nce
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


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_of_half_precision_are_computed_in_float32(dtype, autocast):
    """Nearly collapsed features, whose logits half precision cannot tell apart, against float64 of the same inputs."""
    a, v = (torch.ones(2, 64, 32) + 0.02 * torch.randn(2, 64, 32)).to(dtype).unbind()
    patches = (torch.randn(3, 4, 64) + 5).to(dtype)
    calls = {
        "info_nce": (lambda a, v: info_nce(a, v, 0.05).loss, (a, v)),
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


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: info_nce(x.int(), x), r"floating-point tensors, got torch\.int32 \(1, 2\)"),
        (lambda x: info_nce(x, x, temperature=0.0), "temperature must be positive, got 0.0"),
        (lambda x: info_nce(x, x, direction="sideways"), "direction must be one of both, .*got 'sideways'"),
    ],
)
def test_errors_name_what_no_loss_can_take(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(1, 2))
