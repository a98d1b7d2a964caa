"""The loss ops against their formulas written out."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close

from avfast.ops import info_nce, masked_patch_mse


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


def test_errors_name_the_shapes():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        info_nce(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="do not fit"):
        masked_patch_mse(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.ones(1, 3, dtype=torch.bool))
