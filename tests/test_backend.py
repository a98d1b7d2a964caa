from __future__ import annotations

import pytest
import torch

from avfast import backend


@pytest.mark.parametrize("op", ["packed_attention", "add_layer_norm", "patch_embed_kept"])
def test_kernels_run_where_triton_does_on_what_they_take(monkeypatch, op):
    x = torch.zeros(2, 16)
    assert not backend.use_kernels(op, x)
    monkeypatch.setattr(backend, "which", lambda device: "triton")  # as on a GPU
    assert backend.use_kernels(op, x) and backend.use_kernels(op, x.half(), x.half())
    assert not backend.use_kernels(op, x.double()) and not backend.use_kernels(op, x, x.double())
    assert not backend.use_kernels(op, x.to("meta"))
    monkeypatch.setattr(backend, "_backend", "triton")
    with pytest.raises(ValueError, match=f"kernels of {op} take .*float32, .*torch.float64.*AVFAST_BACKEND=auto"):
        backend.use_kernels(op, x.double())


def test_only_attention_has_a_largest_head_dimension_and_says_so_once(monkeypatch):
    monkeypatch.setattr(backend, "which", lambda device: "triton")
    wide = torch.zeros(2, 192)
    assert backend.use_kernels("add_layer_norm", wide)
    with pytest.warns(UserWarning, match="up to 128 .* got 192 in torch.float32: this runs without kernels"):
        assert not backend.use_kernels("packed_attention", wide)
